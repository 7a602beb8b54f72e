"""Checks of gpu_train_speed.py: tests on the device, and its loss curve against the CPU's."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rows
from gpu_shapes import write_shape
from harness import HERE, contender_environment, read_lines

RECIPE = HERE / "train_speed.yaml"
CURVE_STEPS = 20
CURVE_TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2, "fp8": 5e-2}
"""Mean difference of the losses of two curves that rounding explains, as a share of the mean loss.
The reference is the CPU's curve in the same precision; that of float8 is the CPU's in bf16."""


class Failed(RuntimeError):
    """A program ended with an error or took too long."""

    def __init__(self, reason: str, printed: str = "") -> None:
        """Keep what it had printed until then."""
        super().__init__(reason)
        self.printed = printed


@dataclass(frozen=True, slots=True)
class Bench:
    """What all measurements share."""

    folder: Path
    ends: float
    """When the time is up, on the monotonic clock."""
    counter: Iterator[int]

    def run(self, command: Sequence[str | Path], **environment: str) -> str:
        """Run a program to its end; returns what it printed.

        Raises:
            Failed: with its last words.
        """
        left = self.ends - time.monotonic()
        if left < 5:
            raise Failed("no time left")
        log = self.folder / f"{next(self.counter):03d}.log"
        started = subprocess.Popen(
            [str(part) for part in command],
            env={**contender_environment(), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            stdout, stderr = started.communicate(timeout=left)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)  # with all that it has started
            stdout, stderr = started.communicate()
            log.write_text(f"{command}\n{stdout}\n{stderr}", encoding="utf-8")
            raise Failed("the time was up before it ended", stdout) from None
        log.write_text(f"{command}\n{stdout}\n{stderr}", encoding="utf-8")
        if started.returncode:
            words = [line for line in stderr.splitlines() if line.strip()]
            raise Failed(words[-1] if words else f"exit code {started.returncode}", stdout)
        return stdout

    def work(self, *specs: dict[str, Any]) -> list[dict[str, Any]]:
        """Have gpu_worker.py do jobs in one process; one that gave no result says why."""
        path = self.folder / f"{next(self.counter):03d}.json"
        path.write_text(json.dumps(specs), encoding="utf-8")
        reason = "its process ended early"
        try:
            printed = self.run(
                [sys.executable, HERE / "gpu_worker.py", path], PYTHONPATH=python_path()
            )
        except Failed as error:
            printed, reason = error.printed, str(error)
        lines = [line.removeprefix("JOB ") for line in printed.splitlines() if line[:4] == "JOB "]
        found = [json.loads(line) for line in lines]
        return [*found, *({"failed": reason} for _ in specs[len(found) :])]

    def shape(self, name: str) -> Path:
        """Return a directory with a model's config.json and a tokenizer."""
        directory = self.folder / name
        return directory if directory.exists() else write_shape(directory, name)


def device_tests(bench: Bench) -> dict[str, Any]:
    """Run the tests that need a device: attention, compiled definitions, synchronisations."""
    tests = HERE.parent / "tests"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", tests / "model", tests / "train"]
    try:
        printed = bench.run([*command, "-p", "no:cacheprovider"], PYTHONPATH=python_path())
    except Failed as error:
        failures = [line for line in error.printed.splitlines() if line.startswith("FAILED")]
        raise Failed("; ".join(failures) or str(error)) from None
    last = printed.strip().splitlines()[-1]
    passed = re.search(r"(\d+) passed", last)
    return {"passed": passed is not None, "detail": last}


def loss_curve(
    bench: Bench, model: Path, name: str, precision: str, **more: str
) -> tuple[list[float], str]:
    """Train with one recipe; returns the losses and what the isolation probe found."""
    data = rows.write_rows(bench.folder / f"{name}.jsonl", "chat", 400, 7)
    run = bench.folder / f"curve-{name}"
    tokens = 4096 if (model / ".bytes").exists() else 2048  # a token a byte: longer rows
    settings = [
        f"data.train={data}", f"model.base={model}", f"model.precision={precision}",
        f"train.max_steps={CURVE_STEPS}", "train.learning_rate=1e-3", "train.eval_rows=4",
        f"train.tokens_per_batch={tokens}", f"train.micro_batch_tokens={tokens}",
        f"data.max_length={tokens}",
        "train.waive=[held-out-size]", "train.kl_probe=null", "train.packing=on",
        *(f"train.{key}={value}" for key, value in more.items()),
    ]  # fmt: skip
    bench.run(
        [sys.executable, "-m", "postgrad", "train", RECIPE, "--out", run, *settings],
        PYTHONPATH=python_path(),
        **({"CUDA_VISIBLE_DEVICES": ""} if name.startswith("cpu-") else {}),
    )
    lines = read_lines(run / "metrics.jsonl")
    checks = json.loads((run / "preflight.json").read_text(encoding="utf-8"))["checks"]
    found = next(check for check in checks if check["name"] == "packing-isolation")
    return [line["train/loss"] for line in lines if "train/loss" in line], found["detail"]


def cpu_curves(bench: Bench, model: Path) -> dict[str, list[float]]:
    """Train on the CPU, in float32 and in bf16."""
    return {name: loss_curve(bench, model, f"cpu-{name}", name)[0] for name in ("fp32", "bf16")}


def loss_curves(
    bench: Bench, model: Path, reference: Path | None, can_compile: bool, can_fp8: bool
) -> dict[str, Any]:
    """Train on the device with the recipe of a training on a CPU; compare losses and isolation."""
    compiling = "true" if can_compile else "false"
    wanted = {
        "device-fp32": ("fp32", {"torch_compile": "false"}),
        "device-bf16": ("bf16", {"torch_compile": compiling}),
    }
    if can_fp8:
        wanted["device-fp8"] = ("bf16", {"torch_compile": compiling, "base_precision": "fp8"})
    if reference is None:
        cpu = cpu_curves(bench, model)
    else:
        cpu = json.loads(reference.read_text(encoding="utf-8"))["losses"]
    with ThreadPoolExecutor() as pool:
        asked = {
            name: pool.submit(loss_curve, bench, model, name, precision, **more)
            for name, (precision, more) in wanted.items()
        }
        found = {name: future.result() for name, future in asked.items()}
    curves = {name: curve for name, (curve, _) in found.items()}
    curves |= {f"cpu-{name}": curve for name, curve in cpu.items()}
    distances = {name: distance(curve, cpu[wanted[name][0]]) for name, (curve, _) in found.items()}
    passed = all(len(curve) == CURVE_STEPS for curve in curves.values()) and all(
        relative <= CURVE_TOLERANCE[name.split("-")[1]] for name, relative in distances.items()
    )
    return {
        "passed": passed,
        "detail": ", ".join(f"{name} {100 * x:.3f} % off" for name, x in distances.items()),
        "tolerance": CURVE_TOLERANCE,
        "curves": curves,
        "distances": distances,
        "isolation": {name: isolation for name, (_, isolation) in found.items()},
    }


def distance(curve: Sequence[float], reference: Sequence[float]) -> float:
    """Return the mean difference as a share of the mean of `reference`.

    >>> distance([2.0, 1.0], [2.0, 2.0])
    0.25
    """
    differences = [abs(a - b) for a, b in zip(curve, reference, strict=True)]
    return sum(differences) / sum(reference)


def python_path() -> str:
    """Return PYTHONPATH with this repository's own source first."""
    source = str(HERE.parent / "src")
    return os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
