"""Do both sides compute the same training? The same batches, order, adapter and learning rate.

Four trainings: postgrad and TRL, each in float32 and in bf16 as it does it by default. In float32
the curves must be equal but for rounding; the distance between TRL's own two curves says how much
bf16 moves a curve at all, and postgrad's bf16 curve may be no further from TRL's than that.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import HERE, ContenderError, contender_environment, read_lines, say, table

ROWS_PER_STEP = 4
LEARNING_RATE = 1e-3
FLOAT32_TOLERANCE = 1e-3
"""Largest mean difference, as a share of the mean loss, that counts as rounding in float32."""
NOISE_FACTOR = 2.0
"""bf16 curves may differ by this many times the distance of TRL's bf16 and float32 curves."""
LIMIT_SECONDS = 3600.0


def compare(bench: Any, data: Path, steps: int) -> dict[str, Any]:
    """Train four times on the first rows of `data`; returns the curves and their distances."""
    say(f"loss curves: {steps} steps of {ROWS_PER_STEP} rows, four times")
    curves: dict[str, list[float]] = {}
    shared = bench.place("same-batches")
    shared.mkdir()
    for precision in ("fp32", "bf16"):
        curves[f"postgrad {precision}"] = _postgrad(bench, data, steps, precision, shared)
        say(f"  postgrad {precision}: last loss {curves[f'postgrad {precision}'][-1]:.4f}")
    for precision in ("fp32", "bf16"):
        curves[f"TRL {precision}"] = _trl(bench, steps, precision, shared)
        say(f"  TRL {precision}: last loss {curves[f'TRL {precision}'][-1]:.4f}")
    noise = distance(curves["TRL bf16"], curves["TRL fp32"])
    exact = distance(curves["postgrad fp32"], curves["TRL fp32"])
    reduced = distance(curves["postgrad bf16"], curves["TRL bf16"])
    return {
        "steps": steps,
        "rows_per_step": ROWS_PER_STEP,
        "learning_rate": LEARNING_RATE,
        "curves": {name: [round(loss, 6) for loss in curve] for name, curve in curves.items()},
        "distances": {
            "postgrad fp32 and TRL fp32": exact,
            "postgrad bf16 and TRL bf16": reduced,
            "postgrad bf16 and TRL fp32": distance(curves["postgrad bf16"], curves["TRL fp32"]),
            "TRL bf16 and TRL fp32 (noise)": noise,
        },
        "equal_in_fp32": exact["relative"] <= FLOAT32_TOLERANCE,
        "within_noise_in_bf16": reduced["mean"] <= NOISE_FACTOR * noise["mean"],
        "criteria": {
            "equal_in_fp32": f"mean difference at most {FLOAT32_TOLERANCE} of the mean loss",
            "within_noise_in_bf16": f"mean difference at most {NOISE_FACTOR} x the noise",
        },
    }


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
    """Return the distances as people read them."""
    lines = [["loss curves", "", "mean difference", "largest", "relative"]]
    for name, row in found["distances"].items():
        relative = f"{100 * row['relative']:.3f} %"
        lines.append([name, "", f"{row['mean']:.5f}", f"{row['max']:.5f}", relative])
    verdicts = (
        f"float32: {'equal' if found['equal_in_fp32'] else 'DIFFERENT'}; "
        f"bf16: {'within' if found['within_noise_in_bf16'] else 'BEYOND'} noise "
        f"({found['steps']} steps, same batches, learning rate {found['learning_rate']:g})"
    )
    return f"\n{table(lines)}\n{verdicts}"


def _postgrad(bench: Any, data: Path, steps: int, precision: str, shared: Path) -> list[float]:
    spec = {
        "recipe": str(HERE / "train_speed.yaml"),
        "overrides": [
            f"data.train={data}",
            f"model.base={bench.model}",
            f"model.precision={precision}",
            f"train.learning_rate={LEARNING_RATE}",
        ],
        "steps": steps,
        "rows_per_step": ROWS_PER_STEP,
        "run": str(bench.place(f"same-batches-postgrad-{precision}")),
        "tokens": str(shared / "tokens.jsonl"),
        "adapter": str(shared / "adapter"),
    }
    path = _run([sys.executable, HERE / "ours_in_order.py"], spec, bench)
    lines = read_lines(Path(spec["run"]) / "metrics.jsonl")
    return _checked([line["train/loss"] for line in lines if "train/loss" in line], steps, path)


def _trl(bench: Any, steps: int, precision: str, shared: Path) -> list[float]:
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
            "per_device_train_batch_size": ROWS_PER_STEP,
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
    path = _run([bench.peer, HERE / "peers" / "trl_sft.py"], spec, bench)
    return _checked([line["loss"] for line in read_lines(metrics) if "loss" in line], steps, path)


def _run(program: Sequence[str | Path], spec: dict[str, Any], bench: Any) -> Path:
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
