"""Training on one GPU: is it right, how fast is it, how fast is TRL, what would the GPU allow?

Usage: python benchmarks/gpu_train_speed.py [--peer-python PYTHON | --no-peer]. One command for a
machine with one CUDA device; README.md beside this file says what is measured. Our speed first,
then checks (gpu_checks.py), then TRL; prints a table last, writes JSON, and ends with 1 if a check
failed. What no time is left for is left out and named.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_checks import Bench, Failed, cpu_curves, device_tests, loss_curves
from gpu_shapes import FULL_ROW, make_rows, write_tokens
from harness import (
    HERE,
    RESULTS,
    circumstances,
    contender_environment,
    frozen,
    peer_python,
    read_lines,
    say,
    table,
    write_result,
)

from postgrad.errors import PostgradError
from postgrad.model.load import model_directory

LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
GOALS = {"llama-3-8b": "16,000 tok/s", "smollm2-360m": "3 x TRL", "smollm2-135m": "3 x TRL"}
ABLATIONS = {"no graphs": {"graphs": False}, "not compiled": {"compile": False}}
FP8_MODELS = ("llama-3-8b",)
"""Models whose products are large enough for float8 to gain more than quantising costs."""


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to train, the same for everyone."""

    model: str
    kind: str
    """Which rows: `full` or `chat` (see gpu_shapes.make_rows)."""
    tokens_per_batch: int
    micro_batch_tokens: int
    peer_rows: int
    """Rows of a step of TRL with about as many tokens."""
    steps: int
    warmup_steps: int

    @property
    def name(self) -> str:
        """Return what the table calls it."""
        return f"{self.kind}, {self.tokens_per_batch} a step"


CASES = (
    Case("smollm2-135m", "chat", 2720, 2720, 16, 120, 60),
    Case("smollm2-135m", "chat", 16384, 16384, 96, 50, 20),
    Case("llama-3-8b", "full", 4 * FULL_ROW, FULL_ROW, 1, 12, 4),
    Case("smollm2-360m", "chat", 2720, 2720, 16, 120, 60),
    Case("smollm2-360m", "chat", 16384, 16384, 96, 40, 16),
)
QUICK_CASES = (Case("tiny", "chat", 1024, 1024, 6, 4, 2),)
PEER_STEPS, PEER_WARMUP = 24, 6
"""Of the peer, at most; its steps take long and are all alike."""


def attempt(name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Measure, or say why not."""
    began = time.monotonic()
    try:
        found = measure()
    except (Failed, PostgradError, OSError, LookupError, ValueError) as error:
        found = {"failed": str(error)}
    found["took_seconds"] = round(time.monotonic() - began, 1)
    say(f"{name}: {found.get('failed') or summary_of(found)} ({found['took_seconds']} s)")
    return found


def summary_of(found: dict[str, Any]) -> str:
    """Return the one figure that is worth a line while it runs."""
    if "tokens_per_second" in found:
        return f"{found['tokens_per_second']:.0f} tokens/s"
    return "passed" if found.get("passed") else str(found.get("detail", "done"))


def ours(bench: Bench, case: Case, **how: bool) -> dict[str, Any]:
    """Return the job that measures postgrad's own loop: compile, graphs, fp8."""
    return {
        "job": "train",
        "model": str(bench.shape(case.model)),
        "kind": case.kind,
        "rows": 64 if case.kind == "full" else 4000,
        "tokens_per_batch": case.tokens_per_batch,
        "micro_batch_tokens": case.micro_batch_tokens,
        "steps": case.steps,
        "warmup_steps": case.warmup_steps,
        "run": str(bench.folder / f"run-{next(bench.counter)}"),
        "compile": True,
        "graphs": True,
        "fp8": False,
        **how,
    }


def peer_settings(case: Case) -> dict[str, dict[str, Any]]:
    """Return how TRL is run: as it comes, and as it is fastest with the same tokens a step."""
    best = {
        "gradient_checkpointing": False,
        "bf16": True,
        "per_device_train_batch_size": case.peer_rows,
    }
    if case.kind == "chat":
        best["train_sampling_strategy"] = "group_by_length"
    longest = {"max_length": FULL_ROW, "max_steps": min(case.steps, PEER_STEPS)}
    return {
        "TRL defaults": {"dtype": "float32", "sft": longest},
        "TRL tuned": {"dtype": "bfloat16", "sft": {**longest, **best}},
    }


def peer(bench: Bench, python: Path, case: Case, setting: dict[str, Any]) -> dict[str, Any]:
    """Measure TRL's SFTTrainer on the same rows."""
    directory = bench.shape(case.model)
    size = json.loads((directory / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    count = 64 if case.kind == "full" else 4000
    place = bench.folder / f"peer-{next(bench.counter)}"
    spec = {
        **setting,
        "model": str(directory),
        "rows": str(write_tokens(place.with_suffix(".rows"), make_rows(case.kind, count, size))),
        "metrics": str(place.with_suffix(".jsonl")),
        "output": str(place),
        "lora": LORA,
    }
    path = place.with_suffix(".json")
    path.write_text(json.dumps(spec), encoding="utf-8")
    bench.run([python, HERE / "peers" / "trl_random.py", path])
    lines = read_lines(Path(spec["metrics"]))
    steps = [line for line in lines if "step" in line]
    first, last = steps[min(case.warmup_steps, PEER_WARMUP) - 1], steps[-1]
    return {
        "tokens_per_second": (last["tokens"] - first["tokens"])
        / (last["seconds"] - first["seconds"]),
        "tokens_per_step": last["tokens"] / len(steps),
        "peak_device_bytes": last.get("peak_device_bytes"),
        "facts": next(line for line in lines if "step" not in line),
    }


def find_peer(options: argparse.Namespace) -> tuple[Path | None, str | dict[str, str]]:
    """Return the Python with TRL and what is installed there, or why there is none."""
    if options.no_peer:
        return None, "left out (--no-peer)"
    os.environ.update(PIP_RETRIES="0", PIP_DEFAULT_TIMEOUT="10")
    try:
        python = options.peer_python or peer_python(HERE / "peers" / "trl-requirements.txt")
        subprocess.run(
            [python, "-c", "import trl, peft, datasets"],
            check=True,
            capture_output=True,
            env=contender_environment(),
            timeout=60,
        )
        return python, frozen(python)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return None, f"TRL cannot be installed or imported: {str(error).splitlines()[0]}"


def share_of_bound(found: dict[str, Any], products: dict[str, Any], kind: str) -> dict[str, float]:
    """Return what the matrix products alone would allow, and the share of it that was reached."""
    if "failed" in found or "failed" in products:
        return {}
    sample = make_rows(kind, 200, 512)
    supervised = sum(row.supervised for row in sample) / sum(len(row) for row in sample)
    seconds = (
        products["frozen_seconds_per_token"]
        + products["adapter_seconds_per_token"]
        + supervised * products["head_seconds_per_supervised_token"]
    )
    share = found["tokens_per_second"] * seconds
    return {"bound_tokens_per_second": 1 / seconds, "share_of_bound": share}


def measure_ours(
    bench: Bench, cases: Sequence[Case]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the bounds by model, and our figures: each model in a process of its own."""
    bounds, measured = {}, []
    for model in dict.fromkeys(case.model for case in cases):
        wanted = [
            (case, "postgrad" if not fp8 else "postgrad, fp8", ours(bench, case, fp8=fp8))
            for case in cases
            if case.model == model
            for fp8 in ((False, True) if model in FP8_MODELS else (False,))
        ]
        products = {"job": "bound", "model": str(bench.shape(model))}
        bounds[model], *found = bench.work(products, *(spec for *_, spec in wanted))
        say(f"{model}: {bounds[model].get('failed') or 'bound measured'}")
        for (case, trainer, _), one in zip(wanted, found, strict=True):
            measured.append(noted(case, trainer, one, bounds))
    return bounds, measured


def noted(
    case: Case, trainer: str, found: dict[str, Any], bounds: dict[str, Any]
) -> dict[str, Any]:
    """Say a figure as soon as it is there; returns its line of the document."""
    say(f"{case.model}, {case.name}: {trainer}: {found.get('failed') or summary_of(found)}")
    found |= share_of_bound(found, bounds[case.model], case.kind)
    return {"model": case.model, "case": case.name, "trainer": trainer, **found}


def measure(bench: Bench, options: argparse.Namespace, document: dict[str, Any]) -> None:
    """Make the measurements and the checks, the most important first, and put them in there."""
    cases = QUICK_CASES if options.quick else CASES
    bounds, measured = measure_ours(bench, cases)
    document |= {"bounds": bounds, "measured": measured}
    device = next((b["device"] for b in bounds.values() if "device" in b), {"name": "unknown"})
    on_device = device["name"] not in ("cpu", "unknown")
    if not on_device and not options.quick:
        reasons = [bound["failed"] for bound in bounds.values() if "failed" in bound]
        raise SystemExit(f"no CUDA device {reasons or ''}; --quick shows on a CPU that all runs")
    can_compile, can_fp8 = bool(device.get("can_compile")), bool(device.get("can_fp8"))
    checks: dict[str, Any] = {}
    document |= {"device": device, "checks": checks}
    if not options.no_checks:
        with ThreadPoolExecutor() as pool:
            if on_device:
                tests = pool.submit(attempt, "tests", lambda: device_tests(bench))
            checks["loss curves"] = curves_check(bench, options, can_compile, can_fp8)
            if on_device:
                checks["tests on the device"] = tests.result()
    python, document["peer"] = find_peer(options)
    for name in ("TRL tuned", "TRL defaults") if python else ():
        for case in cases:
            setting = peer_settings(case)[name]
            found = attempt(
                f"{case.model}, {case.name}: {name}",
                lambda case=case, setting=setting: peer(bench, python, case, setting),
            )
            measured.append(noted(case, name, found, bounds))
    if on_device and options.ablations:
        for name, how in ABLATIONS.items():
            (found,) = bench.work(ours(bench, cases[0], **how))
            measured.append(noted(cases[0], f"postgrad, {name}", found, bounds))


def curves_check(
    bench: Bench, options: argparse.Namespace, can_compile: bool, can_fp8: bool
) -> dict[str, Any]:
    """Compare loss curves on the real model, or on random weights where none was given."""

    def compare() -> dict[str, Any]:
        if options.model:
            model, name = model_directory(options.model), options.model
        else:
            model = bench.shape("tiny" if options.quick else "smollm2-135m")
            name = f"{model.name}, random weights"
            bench.work({"job": "save", "model": str(model)})
            (model / ".bytes").touch()
        curves = loss_curves(bench, model, options.reference, can_compile, can_fp8)
        return {"model": name, **curves}

    return attempt("loss curves", compare)


def speed_table(document: dict[str, Any]) -> str:
    """Return the short table that people read."""
    lines = [["model", "tokens", "trainer", "tok/s", "peak GB", "of bound", "x TRL tuned", "goal"]]
    measured = document["measured"]
    for row in measured:
        key = (row["model"], row["case"])
        tuned = [
            other.get("tokens_per_second")
            for other in measured
            if (other["model"], other["case"], other["trainer"]) == (*key, "TRL tuned")
        ]
        rate, peak = row.get("tokens_per_second"), row.get("peak_device_bytes")
        share = row.get("share_of_bound")
        lines.append(
            [
                *(*key, row["trainer"]),
                f"{rate:,.0f}" if rate else f"- {row['failed'][:40]}",
                f"{peak / 1e9:.1f}" if peak else "",
                f"{100 * share:.0f} %" if share else "",
                f"{rate / tuned[0]:.1f}" if rate and tuned and tuned[0] else "",
                GOALS.get(row["model"], "") if row["trainer"] == "postgrad" else "",
            ]
        )
    verdicts = [
        f"{name}: {'passed' if check.get('passed') else 'FAILED'}: "
        f"{check.get('failed') or check['detail']}"
        for name, check in document["checks"].items()
    ]
    if isinstance(document["peer"], str):
        verdicts.append(f"TRL: {document['peer']}")
    return "\n".join([table(lines), "", *verdicts])


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny model: proves that it runs")
    parser.add_argument("--model", help="real model for the loss curves; default: random weights")
    parser.add_argument(
        "--reference", type=Path, help="the CPU's curves, made with --make-reference"
    )
    parser.add_argument(
        "--make-reference",
        type=Path,
        help="only train --model on the CPU, curves to there",
    )
    parser.add_argument("--peer-python", type=Path, help="a Python that has TRL")
    parser.add_argument("--no-peer", action="store_true", help="without TRL")
    parser.add_argument("--no-checks", action="store_true", help="speed only")
    parser.add_argument("--ablations", action="store_true", help="also without each fast path")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
    parser.add_argument("--out", type=Path, help="the JSON; default: benchmarks/results/...")
    parser.add_argument("--keep", type=Path, help="working folder with all logs, kept")
    return parser.parse_args()


def main() -> None:
    """Check, measure, write, print."""
    options = arguments()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="postgrad-gpu-") as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(folder, began + 60 * options.minutes, iter(range(1, sys.maxsize)))
        if options.make_reference:
            losses = cpu_curves(bench, model_directory(options.model))
            text = json.dumps({"model": options.model, "losses": losses}) + "\n"
            options.make_reference.write_text(text, encoding="utf-8")
            return
        document = {
            "benchmark": "gpu-train-speed",
            **circumstances(),
            "device": {"name": "unknown"},
            "checks": {},
            "measured": [],
            "peer": "not asked",
            "lora": LORA,
            "quick": options.quick,
        }
        try:
            measure(bench, options, document)
        finally:
            document["seconds"] = round(time.monotonic() - began, 1)
            slug = re.sub(r"[^a-z0-9]+", "-", document["device"]["name"].lower()).strip("-")
            out = options.out or RESULTS / f"{document['date']}-{slug}-gpu-train-speed.json"
            say(f"written: {write_result(document, 'gpu-train-speed', out)}")
    print(speed_table(document))
    if not all(check.get("passed") for check in document["checks"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
