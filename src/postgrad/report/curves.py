"""What a training wrote into metrics.jsonl, as series over its steps."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from postgrad.errors import RunError
from postgrad.run import Run

Point = tuple[int, float]
"""Optimizer step and value."""
CHANGE = "/difference"
"""Ending of the figures that are differences to the base model."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """One evaluation of the held-out loss."""

    step: int
    loss: float
    standard_error: float | None
    """Of the paired difference to the evaluation it was judged against."""
    best: bool


@dataclass(frozen=True, slots=True)
class Curves:
    """metrics.jsonl as series of (step, value)."""

    loss: tuple[Point, ...]
    learning_rate: tuple[Point, ...]
    gradient_norm: tuple[Point, ...]
    held_out: tuple[HeldOut, ...]
    probe_kl: tuple[Point, ...] = ()
    retention: Mapping[str, tuple[Point, ...]] = field(default_factory=dict)
    """Benchmark that was watched -> points of accuracy against the base model."""


def read_curves(run: Run) -> Curves | None:
    """Return the figures of a training; None before its first.

    Raises:
        RunError: a line without its step.
    """
    lines = run.read_metrics()
    if not lines:
        return None
    for number, line in enumerate(lines, 1):
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise RunError(f"{run.metrics_path}:{number}: no step", "rerun the training")

    def series(name: str) -> tuple[Point, ...]:
        return tuple(
            (line["step"], float(line[name])) for line in lines if is_finite(line.get(name))
        )

    held_out = tuple(
        HeldOut(
            step=line["step"],
            loss=float(line["validation/loss"]),
            standard_error=_number(line.get("validation/se")),
            best=bool(line.get("validation/best")),
        )
        for line in lines
        if is_finite(line.get("validation/loss"))
    )
    return Curves(
        loss=series("train/loss"),
        learning_rate=series("train/learning_rate"),
        gradient_norm=series("train/grad_norm"),
        held_out=held_out,
        probe_kl=series("probe/kl"),
        retention={
            task.removeprefix("retention/").removesuffix(CHANGE): tuple(
                (step, 100 * value) for step, value in series(task)
            )
            for task in dict.fromkeys(name for line in lines for name in line)
            if task.startswith("retention/") and task.endswith(CHANGE)
        },
    )


def is_finite(value: Any) -> bool:
    """Whether a value is a number that can be drawn."""
    return isinstance(value, int | float) and isfinite(value)


def _number(value: Any) -> float | None:
    return float(value) if is_finite(value) else None
