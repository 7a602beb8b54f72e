"""A loss and its gradient, two of which a pre-flight check compares."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from postgrad.data.batches import micro_batches
from postgrad.train.objective import Objective
from postgrad.train.optimizer import trainable
from postgrad.types import Check, Tokens

SAMPLED_ELEMENTS = 20_000_000
"""Gradient elements that are compared one by one; norms are over all."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Largest relative differences that rounding explains, by compute precision."""

    loss: float
    norm: float
    """Of the whole gradient."""
    gradient: float
    """Norm of the difference of two gradients, as a share of the norm."""


TOLERANCES = {
    torch.float32: Tolerance(loss=1e-4, norm=1e-3, gradient=1e-2),
    torch.bfloat16: Tolerance(loss=2e-2, norm=5e-2, gradient=2.5e-1),
}
"""Measured on a 135M model: 1e-6, 1e-6 and 9e-6 in float32; 3e-3, 1e-3 and 5e-2 in bfloat16. What
the checks are for (a mean for a sum, a shifted label, a scaled logit) is 0.1 and more in all."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A loss in nats per supervised token and its gradient."""

    loss: float
    norm: float
    sample: dict[str, Tensor]


def objective_losses(
    model: Any,
    objective: Objective,
    rows: Sequence[Tokens],
    packed: bool,
    capacity: int | None = None,
) -> Iterator[Tensor]:
    """Yield the loss sums of rows laid out in micro-batches of up to `capacity` tokens."""
    tokens = capacity or len(rows) * max(map(len, rows))
    for batch in micro_batches(rows, tokens, packed):
        yield objective(model, batch).total


def measure(model: Any, losses: Iterator[Tensor], rows: Sequence[Tokens]) -> Measured:
    """Add up loss sums and the gradients of the trained parameters, both per supervised token."""
    weight = sum(row.supervised for row in rows)
    model.zero_grad(set_to_none=True)
    total = 0.0
    for loss in losses:
        (loss / weight).backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    return taken(model, total, weight)


def taken(model: Any, total: float, weight: float) -> Measured:
    """Take the gradients that are there, of a loss sum over a weight, and remove them."""
    gradients = {name: p.grad for name, p in trainable(model).items() if p.grad is not None}
    norm = float(torch.nn.utils.get_total_norm(list(gradients.values())))
    sample, left = {}, SAMPLED_ELEMENTS
    for name in sorted(gradients, key=lambda name: (gradients[name].numel(), name)):
        left -= gradients[name].numel()
        if left < 0:
            break
        sample[name] = gradients[name].float().clone()
    model.zero_grad(set_to_none=True)
    return Measured(total / weight, norm, sample)


def compare(
    name: str, ours: Measured, other: Measured, tolerance: Tolerance, what: str, remedy: str
) -> Check:
    """Return a check that passes when both are near; `what` says how `other` was computed."""
    loss = abs(ours.loss - other.loss) / max(1.0, abs(other.loss))
    norm = abs(ours.norm - other.norm) / max(other.norm, 1e-12)
    difference = math.sqrt(sum(_square(ours.sample[n] - g) for n, g in other.sample.items()))
    size = math.sqrt(sum(_square(g) for g in other.sample.values()))
    gradient = difference / max(size, 1e-12)
    passed = loss <= tolerance.loss and norm <= tolerance.norm and gradient <= tolerance.gradient
    detail = (
        f"loss {ours.loss:.5f} against {other.loss:.5f} nats per token by {what}, gradient norm "
        f"{ours.norm:.5g} against {other.norm:.5g} (differences: loss {loss:.1e}, norm {norm:.1e}, "
        f"gradient {gradient:.1e}; limits {tolerance.loss:.0e}, {tolerance.norm:.0e}, "
        f"{tolerance.gradient:.0e})"
    )
    data = {"loss": ours.loss, "reference_loss": other.loss, "loss_difference": loss}
    data |= {"gradient_norm": ours.norm, "reference_gradient_norm": other.norm}
    data |= {"norm_difference": norm, "gradient_difference": gradient}
    return Check(name, passed, detail, "" if passed else remedy, data=data)


def _square(tensor: Tensor) -> float:
    return float(tensor.double().square().sum())
