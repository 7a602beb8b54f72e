"""Prove on a user's own recipe that kill -9 and --resume change nothing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from postgrad.config import Recipe
from postgrad.errors import TrainingError
from postgrad.progress import Display
from postgrad.run import Run, sha256_file

STEPS = 12
"""Optimizer steps of the proof; evaluations every fourth."""
VOLATILE = ("seconds",)
MEASURED = (
    *("threads", "micro_batch_tokens", "attention_bucket_tokens"),
    *("gradient_checkpointing", "torch_compile", "cuda_graphs", "base_precision"),
)
"""Keys whose `auto` depends on the moment: two runs may choose differently, a resumed one not."""


def verify_resume(recipe: Recipe, folder: Path, display: Display) -> dict[str, Any]:
    """Train a few steps twice, once killed with SIGKILL in the middle and resumed, and compare.

    The recipe is shortened to a dozen steps. Compared bit by bit: every line of metrics.jsonl but
    its clock, and the delivered weights.

    Raises:
        TrainingError: the two differ; names the first difference.
    """
    short = recipe.model_copy(
        update={"train": recipe.train.model_copy(update={"max_steps": STEPS, "eval_steps": 4})}
    )
    path = folder / "recipe.yaml"
    path.write_text(short.to_yaml(), encoding="utf-8")
    display.stage("uninterrupted training")
    straight = train(path, folder / "straight")
    path.write_text(_as_measured(short, straight).to_yaml(), encoding="utf-8")
    display.stage("training, killed in the middle")
    killed_at = kill_midway(path, folder / "killed", after_step=STEPS // 2)
    display.stage("resuming")
    resumed = train(path, folder / "killed", "--resume")
    difference = first_difference(straight, resumed)
    if difference:
        raise TrainingError(
            f"resuming is not exact on this machine: {difference}",
            "train without interruption here, and report this with the output of "
            "`postgrad doctor --json`",
        )
    return {"exact": True, "steps": STEPS, "killed_after_step": killed_at, "compared": 2}


def _as_measured(recipe: Recipe, run: Run) -> Recipe:
    """What a run measured on this machine, for another that must equal it bit by bit."""
    measured = {name: getattr(run.config.train, name) for name in MEASURED}
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=measured)})


def train(recipe: Path, out: Path, *flags: str) -> Run:
    """Train in a process of its own, so that it starts as a user's would."""
    result = subprocess.run(_command(recipe, out, *flags), capture_output=True, text=True)
    if result.returncode != 0:
        raise TrainingError(
            f"training failed with exit code {result.returncode}: {result.stderr.strip()[-500:]}",
            "run `postgrad train` on this recipe first",
        )
    return Run(out)


def kill_midway(recipe: Path, out: Path, after_step: int) -> int:
    """Start a training and kill -9 it once `after_step` is in metrics.jsonl; returns the step.

    Raises TrainingError when it ended before: then nothing would be proved.
    """
    with subprocess.Popen(
        _command(recipe, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        while process.poll() is None:
            if last_step(Run(out)) >= after_step:
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.005)
    if process.returncode != -signal.SIGKILL:
        raise TrainingError(
            f"training ended with exit code {process.returncode} before it could be killed",
            "run the proof again",
        )
    return last_step(Run(out))


def last_step(run: Run) -> int:
    """Return the last step recorded, -1 before the first."""
    return max((line["step"] for line in run.read_metrics()), default=-1)


def first_difference(a: Run, b: Run) -> str | None:
    """Return the first difference of two runs' metrics and weights, or None."""
    left, right = ([_timeless(line) for line in run.read_metrics()] for run in (a, b))
    for one, other in zip(left, right, strict=False):
        if one != other:
            return f"metrics at step {one['step']}: {one} against {other}"
    if len(left) != len(right):
        return f"{len(left)} lines of metrics against {len(right)}"
    for file in sorted(a.export.rglob("*.safetensors")):
        if sha256_file(file) != sha256_file(b.export / file.relative_to(a.export)):
            return f"weights in {file.name}"
    return None


def _timeless(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in VOLATILE}


def _command(recipe: Path, out: Path, *flags: str) -> list[str]:
    base = [sys.executable, "-m", "postgrad", "train", str(recipe), "--out", str(out)]
    return [*base, *flags]
