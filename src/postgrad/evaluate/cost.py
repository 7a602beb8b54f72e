"""What a request costs in each arm, and after how many requests tuning is cheaper than prompting.

From the evidence alone: tokens as counted, seconds as measured. Generation is batched, so a row's
seconds are its share of its batch on this machine: they compare arms, and are no latency. A prompt
beginning that all requests share was computed once, as a server with a prefix cache does.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from postgrad.types import Evidence

TUNING_STAGES = ("replay", "learning_rate_probe", "train")
"""Stages of a run, as run.json names them, without which there would be no tuned model: generating
the base model's own answers, trying learning rates, training."""


@dataclass(frozen=True, slots=True)
class Typical:
    """Mean and median of a figure over the requests."""

    mean: float
    median: float


@dataclass(frozen=True, slots=True)
class ArmCost:
    """What one request of an arm takes."""

    arm: str
    n: int
    """Requests that were answered; those that ended in an error cost nothing and are left out."""
    prompt_tokens: Typical
    completion_tokens: Typical
    seconds: Typical


@dataclass(frozen=True, slots=True)
class BreakEven:
    """After how many requests the training's seconds are earned back against a prompting arm."""

    arm: str
    training_seconds: float
    saved_seconds: float
    """Mean seconds of a request that the tuned model saves; negative when it is slower."""
    requests: int | None
    """The number of requests; None = never."""
    finding: str
    """The same in words."""


@dataclass(frozen=True, slots=True)
class Costs:
    """The `costs` entry of measurements.json."""

    arms: tuple[ArmCost, ...] = ()
    break_even: tuple[BreakEven, ...] = ()
    """The tuned model against each prompting arm; none without a training whose time is known."""

    def against(self, arm: str) -> BreakEven | None:
        """Return the break-even against one prompting arm."""
        return next((found for found in self.break_even if found.arm == arm), None)


def tuning_seconds(record: Mapping[str, Any]) -> float | None:
    """Return what tuning took, from a run's run.json; None where nothing was trained.

    >>> tuning_seconds({"seconds": {"learning_rate_probe": 20.0, "train": 90.0, "evaluate": 7.0}})
    110.0
    """
    spent: Mapping[str, float] = record.get("seconds", {})
    if "train" not in spent:
        return None
    return round(sum(spent.get(stage, 0.0) for stage in TUNING_STAGES), 3)


def measure_costs(
    rows: Mapping[str, Sequence[Evidence]], tuned: str, training_seconds: float | None
) -> Costs:
    """Return the cost of every arm in the order given, and when `tuned` is cheaper than each.

    `training_seconds` are those of `tuning_seconds`; None = nothing was trained.
    """
    found = [arm_cost(arm, evidence) for arm, evidence in rows.items()]
    arms = [cost for cost in found if cost is not None]
    own = next((cost for cost in arms if cost.arm == tuned), None)
    if own is None or training_seconds is None:
        return Costs(tuple(arms))
    rivals = (cost for cost in arms if cost.arm != tuned)
    return Costs(tuple(arms), tuple(break_even(c, own, training_seconds) for c in rivals))


def arm_cost(arm: str, rows: Sequence[Evidence]) -> ArmCost | None:
    """Return what a request of the arm takes; None when none was answered."""
    answered = [row for row in rows if row.error is None]
    if not answered:
        return None
    return ArmCost(
        arm,
        len(answered),
        _typical([row.prompt_tokens for row in answered]),
        _typical([row.completion_tokens for row in answered]),
        _typical([row.seconds for row in answered]),
    )


def break_even(prompting: ArmCost, tuned: ArmCost, training_seconds: float) -> BreakEven:
    """Return training seconds / (seconds a request with the prompt - seconds a request tuned).

    The first whole number of requests from which the tuned model has taken less time in all.
    Both are machine time on the machine of the run; labour and the rows' making are not in it.
    """
    saved = prompting.seconds.mean - tuned.seconds.mean
    if saved <= 0:
        why = (
            f"tuning never pays in time against {prompting.arm}: a request takes the tuned model "
            f"{tuned.seconds.mean:.3g} s and the prompted one {prompting.seconds.mean:.3g} s"
        )
        return BreakEven(prompting.arm, training_seconds, saved, None, why)
    requests = int(training_seconds / saved) + 1
    finding = (
        f"after {requests:,} requests tuning is cheaper than {prompting.arm}: "
        f"{training_seconds:,.0f} s of training / ({prompting.seconds.mean:.3g} s - "
        f"{tuned.seconds.mean:.3g} s a request)"
    )
    return BreakEven(prompting.arm, training_seconds, saved, requests, finding)


def _typical(values: Sequence[float]) -> Typical:
    return Typical(statistics.fmean(values), float(statistics.median(values)))
