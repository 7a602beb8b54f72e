"""Early stopping as a pure state machine: held-out losses in, a new state out. No torch.

Rows are paired: the same validation rows are measured every time, so the noise of a *difference*
is far smaller than that of a loss, and one standard error of it is a fair threshold.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Retained:
    """What is left of an ability: one benchmark at one evaluation, on the same items every time."""

    accuracy: float
    """Share of the items that were answered rightly."""
    difference: float
    """The same minus the base model's, paired by item; below zero is a loss."""
    items: int
    margin: float
    """Points that may be lost."""

    @property
    def below(self) -> bool:
        """Whether the estimate lost more than the margin, whatever its interval."""
        return 100 * self.difference < -self.margin - 1e-9


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A held-out evaluation: for every row the loss sum and the sum of label weights."""

    sums: Floats
    """[rows] nats."""
    weights: Floats
    """[rows] supervised tokens (weighted)."""
    kl: float | None = None
    """KL(base || tuned) on the probe, nats per token; None when it is not measured."""
    retention: Mapping[str, Retained] | None = None
    """Benchmark -> what is left of it; None when it is not measured."""

    @property
    def loss(self) -> float:
        """Token-weighted mean loss, nats per token."""
        return float(self.sums.sum() / self.weights.sum())


def paired_difference(before: HeldOut, after: HeldOut) -> tuple[float, float]:
    """Return (improvement, its standard error) in nats per token; positive = `after` is better.

    The token-weighted mean is a ratio of sums, so its standard error is that of a ratio estimator
    (Cochran, Sampling Techniques, 3rd ed., §2.11) with rows as the sampling units.
    """
    difference = before.sums - after.sums
    total = float(after.weights.sum())
    mean = float(difference.sum()) / total
    rows = len(difference)
    if rows < 2:
        return mean, math.inf
    residual = difference - mean * after.weights
    return mean, math.sqrt(rows / (rows - 1) * float((residual**2).sum())) / total


@dataclass(frozen=True, slots=True)
class StoppingState:
    """Everything early stopping remembers; saved in every checkpoint so that patience survives."""

    best_step: int
    best_loss: float
    reference: HeldOut
    """The last evaluation that was a significant improvement: what the next ones must beat."""
    waited: int = 0
    """Evaluations since then."""
    stopped: bool = False
    beyond: int = 0
    """How many of the last evaluations, one after another, were beyond `max_kl` or below the
    retention floor."""
    reason: str = ""
    """Why it stopped."""


def observe(
    state: StoppingState | None,
    step: int,
    held_out: HeldOut,
    patience: int | None,
    min_delta: float | str = "1se",
    max_kl: float | None = None,
) -> tuple[StoppingState, float]:
    """Return the state after an evaluation, and the standard error of its paired difference.

    The best checkpoint is the one with the lowest loss among those within `max_kl` of the base that
    kept every benchmark above its floor. Patience counts evaluations that did not improve on the
    reference by more than `min_delta`, or did so beyond these limits; `patience` None never stops.
    The first evaluation is the base itself.
    """
    if state is None:
        return StoppingState(step, held_out.loss, held_out), 0.0
    improvement, error = paired_difference(state.reference, held_out)
    if math.isinf(error):  # one row: its noise is unknown, so what it says counts as it is
        error = 0.0
    threshold = error if min_delta == "1se" else float(min_delta)
    near = max_kl is None or (held_out.kl is not None and held_out.kl <= max_kl)
    within = near and not _lost(held_out)
    significant = within and improvement > threshold
    waited = 0 if significant else state.waited + 1
    beyond = 0 if within else state.beyond + 1
    stopped = patience is not None and waited >= patience
    better = within and held_out.loss < state.best_loss
    return StoppingState(
        best_step=step if better else state.best_step,
        best_loss=held_out.loss if better else state.best_loss,
        reference=held_out if significant else state.reference,
        waited=waited,
        stopped=stopped,
        beyond=beyond,
        reason=_reason(beyond, waited, max_kl, held_out) if stopped else "",
    ), error


def _lost(held_out: HeldOut) -> list[str]:
    """Return what each benchmark below its floor lost."""
    return [
        f"{name} lost {-100 * kept.difference:.1f} points of {kept.margin:g} allowed"
        for name, kept in (held_out.retention or {}).items()
        if kept.below
    ]


def _reason(beyond: int, waited: int, max_kl: float | None, held_out: HeldOut) -> str:
    far, inside = [], []
    if max_kl is not None:
        far.append(f"further than max_kl={max_kl:g} nats per token from the base")
        inside.append(f"within max_kl={max_kl:g} nats per token of the base")
    if held_out.retention is not None:
        lost = ", ".join(_lost(held_out))
        far.append("below retention_floor" + (f" (in the last one {lost})" if lost else ""))
        inside.append("above retention_floor")
    if not beyond:
        return "held-out loss no longer improves"
    if beyond >= waited:
        return f"the last {waited} evaluations were {' or '.join(far)}"
    return f"held-out loss no longer improves {' and '.join(inside)}"
