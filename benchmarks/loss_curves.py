"""Do both sides compute the same training? The same batches, order, adapter and learning rate.

Usage: python benchmarks/loss_curves.py [--steps N]. Five LoRA trainings on short rows, four rows a
step: postgrad and TRL, each in float32 and in bf16, postgrad also with frozen weights in int8, its
default. TRL in float32 is the reference. In float32 the curves must be equal but for rounding; the
distance between TRL's own two curves says how much bf16 moves a curve at all, and postgrad's curves
in bf16 and int8 may be no further from the reference than twice that, and no higher or lower on
average than a stated share of the loss.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rows
from contenders import DEFAULTS, RECIPE, Bench, environments
from harness import (
    HERE,
    ContenderError,
    circumstances,
    contender_environment,
    frozen,
    read_lines,
    say,
    table,
    write_result,
)

from postgrad.config import load_recipe
from postgrad.model.load import model_directory

SEED = 7
LEARNING_RATE = 1e-3
FLOAT32_TOLERANCE = 1e-3
"""Largest mean difference, as a share of the mean loss, that counts as rounding in float32."""
PRECISIONS = {
    "int8": ["model.precision=bf16", "train.base_precision=int8"],
    "bf16": ["model.precision=bf16", "train.base_precision=model"],
    "fp32": ["model.precision=fp32"],
}
"""How postgrad trains."""
NOISE_FACTOR = 2.0
"""bf16 and int8 may be so many times as far from the reference as TRL's bf16 is."""
BIAS_TOLERANCE = 0.01
"""bf16 may be this share of the mean loss higher or lower than the reference on average."""
LIMIT_SECONDS = 3600.0


def compare(bench: Bench, data: Path, steps: int, size: int) -> dict[str, Any]:
    """Train five times on the first rows of `data`; returns the curves and their distances."""
    say(f"loss curves: {steps} steps of {size} rows, five times")
    curves: dict[str, list[float]] = {}
    shared = bench.place("same-batches")
    shared.mkdir()
    for precision in PRECISIONS:
        curves[f"postgrad {precision}"] = _postgrad(bench, data, steps, size, precision, shared)
        say(f"  postgrad {precision}: last loss {curves[f'postgrad {precision}'][-1]:.4f}")
    for precision in ("bf16", "fp32"):
        curves[f"TRL {precision}"] = _trl(bench, steps, size, precision, shared)
        say(f"  TRL {precision}: last loss {curves[f'TRL {precision}'][-1]:.4f}")
    return {
        "steps": steps,
        "rows_per_step": size,
        "learning_rate": LEARNING_RATE,
        "curves": {name: [round(loss, 6) for loss in curve] for name, curve in curves.items()},
        **judge(curves),
    }


def judge(curves: dict[str, list[float]]) -> dict[str, Any]:
    """Return the distances of the curves and whether each tolerance holds."""
    reference = curves["TRL fp32"]
    exact = distance(curves["postgrad fp32"], reference)
    reduced = {name: distance(curves[f"postgrad {name}"], reference) for name in ("bf16", "int8")}
    noise = distance(curves["TRL bf16"], reference)
    mean = sum(reference) / len(reference)
    quarter = max(1, len(reference) // 4)
    return {
        "distances": {
            "postgrad fp32 and TRL fp32": exact,
            **{f"postgrad {name} and TRL fp32": found for name, found in reduced.items()},
            "postgrad bf16 and TRL bf16": distance(curves["postgrad bf16"], curves["TRL bf16"]),
            "TRL bf16 and TRL fp32 (noise)": noise,
        },
        "last_quarter_mean": {
            name: round(sum(curve[-quarter:]) / quarter, 6) for name, curve in curves.items()
        },
        "tolerances": [
            _held("float32: mean difference to the reference, share of the mean loss",
                  exact["relative"], FLOAT32_TOLERANCE),
            *(
                _held(f"{name}: mean difference to the reference, times that of TRL's bf16",
                      found["mean"] / noise["mean"] if noise["mean"] else 0.0, NOISE_FACTOR)
                for name, found in reduced.items()
            ),
            *(
                _held(f"{name}: higher or lower than the reference, share of the mean loss",
                      abs(found["signed_mean"]) / mean, BIAS_TOLERANCE)
                for name, found in reduced.items()
            ),
        ],
    }  # fmt: skip


def _held(name: str, found: float, at_most: float) -> dict[str, Any]:
    return {"name": name, "found": round(found, 6), "at_most": at_most, "holds": found <= at_most}


def distance(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """Return how far two curves are apart, in nats per token and as a share of the mean of `b`.

    >>> distance([2.0, 1.0], [2.0, 1.5])
    {'max': 0.5, 'mean': 0.25, 'relative': 0.142857, 'signed_mean': -0.25}
    """
    differences = [x - y for x, y in zip(a, b, strict=True)]
    sizes = [abs(difference) for difference in differences]
    return {
        "max": round(max(sizes), 6),
        "mean": round(sum(sizes) / len(sizes), 6),
        "relative": round(sum(sizes) / sum(b), 6),
        "signed_mean": round(sum(differences) / len(differences), 6),
    }


def text(found: dict[str, Any]) -> str:
    """Return the distances and tolerances as people read them."""
    lines = [["loss curves", "", "mean difference", "largest", "relative", "signed mean"]]
    for name, row in found["distances"].items():
        numbers = [f"{row['mean']:.5f}", f"{row['max']:.5f}", f"{100 * row['relative']:.3f} %"]
        lines.append([name, "", *numbers, f"{row['signed_mean']:+.5f}"])
    held = [["tolerance", "", "found", "at most", "holds"]]
    held += [
        [row["name"], "", f"{row['found']:.5f}", f"{row['at_most']:g}",
         "yes" if row["holds"] else "no"]
        for row in found["tolerances"]
    ]  # fmt: skip
    last = ", ".join(f"{name} {loss:.4f}" for name, loss in found["last_quarter_mean"].items())
    return (
        f"{table(lines)}\n\nmean of the last quarter: {last}\n\n{table(held)}\n"
        f"({found['steps']} steps of {found['rows_per_step']} rows, the same batches in the same "
        f"order, learning rate {found['learning_rate']:g})"
    )


def _postgrad(
    bench: Bench, data: Path, steps: int, size: int, precision: str, shared: Path
) -> list[float]:
    spec = {
        "recipe": str(RECIPE),
        "overrides": [
            f"data.train={data}",
            f"model.base={bench.model}",
            *PRECISIONS[precision],
            f"train.learning_rate={LEARNING_RATE}",
        ],
        "steps": steps,
        "rows_per_step": size,
        "run": str(bench.place(f"same-batches-postgrad-{precision}")),
        "tokens": str(shared / "tokens.jsonl"),
        "adapter": str(shared / "adapter"),
    }
    path = _run([sys.executable, HERE / "ours_in_order.py"], spec, bench)
    lines = read_lines(Path(spec["run"]) / "metrics.jsonl")
    return _checked([line["train/loss"] for line in lines if "train/loss" in line], steps, path)


def _trl(bench: Bench, steps: int, size: int, precision: str, shared: Path) -> list[float]:
    metrics = bench.place(f"same-batches-trl-{precision}.jsonl")
    spec = {
        "model": str(bench.model),
        "rows": str(shared / "tokens.jsonl"),
        "metrics": str(metrics),
        "output": str(metrics.with_suffix("")),
        "dtype": "float32",
        "adapter": str(shared / "adapter"),
        "sft": {
            "bf16": precision == "bf16",
            "per_device_train_batch_size": size,
            "train_sampling_strategy": "sequential",
            "num_train_epochs": 1,
            "gradient_checkpointing": False,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "adam_beta2": 0.95,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "max_length": None,
        },
    }
    path = _run([bench.peers["trl"], HERE / "peers" / "trl_sft.py"], spec, bench)
    return _checked([line["loss"] for line in read_lines(metrics) if "loss" in line], steps, path)


def _run(program: Sequence[str | Path], spec: dict[str, Any], bench: Bench) -> Path:
    """Run a program with its spec to the end; returns its log."""
    path = bench.place("spec.json")
    path.write_text(json.dumps(spec), encoding="utf-8")
    log = path.with_suffix(".log")
    with log.open("w", encoding="utf-8") as file:
        ended = subprocess.run(
            [*map(str, program), str(path)],
            stdout=file,
            stderr=file,
            env=contender_environment(),
            timeout=LIMIT_SECONDS,
        )
    if ended.returncode:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise ContenderError(f"exit code {ended.returncode}; {log}:\n{tail}")
    return log


def _checked(curve: list[float], steps: int, log: Path) -> list[float]:
    if len(curve) != steps:
        raise ContenderError(f"{len(curve)} of {steps} steps; see {log}")
    return curve


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows-per-step", type=int, default=4)
    parser.add_argument("--kind", choices=list(rows.KINDS), default="short")
    parser.add_argument("--model", help="hub id, directory or package URI")
    parser.add_argument("--out", type=Path, help="the JSON; default: benchmarks/results/...")
    parser.add_argument("--keep", type=Path, help="working folder with all logs, kept")
    return parser.parse_args()


def main() -> None:
    """Train, write, print."""
    options = arguments()
    base = options.model or load_recipe(RECIPE).model.base
    peers, missing = environments([DEFAULTS])
    if missing:
        raise SystemExit(f"TRL cannot be installed: {missing['trl']}")
    with tempfile.TemporaryDirectory(prefix="postgrad-curves-") as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        # A tenth of the rows is held out for validation and test.
        count = 100 + 2 * options.steps * options.rows_per_step
        data = rows.write_rows(folder / f"{options.kind}.jsonl", options.kind, count, SEED)
        bench = Bench(folder, model_directory(base), peers, iter(range(1, sys.maxsize)))
        found = compare(bench, data, options.steps, options.rows_per_step)
    document = {
        "benchmark": "loss-curves",
        **circumstances(),
        "peer_versions": frozen(peers["trl"]),
        "model": Path(base).name if Path(base).exists() else base,
        "kind": options.kind,
        **found,
    }
    path = write_result(document, "loss-curves", options.out)
    print(text(found))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
