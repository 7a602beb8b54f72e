"""What the loop asks of a training method: a loss sum and its weight for a micro-batch."""

from typing import Any, Protocol

from postgrad.types import Batch, LossSum


class Objective(Protocol):
    """A training method: others differ only in this function or in where batches come from."""

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the parts of its loss sums, `LossSum.terms`; () when there is only the loss."""
        ...

    def __call__(self, model: Any, batch: Batch, per_document: bool = False) -> LossSum:
        """Return the *sum* of weighted losses of `batch` and the sum of weights, never a mean."""
        ...
