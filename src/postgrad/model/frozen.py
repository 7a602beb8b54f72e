"""Products with a frozen weight W in 8 bits: what fp8.py and int8.py have in common.

Most of what LoRA training multiplies is frozen: x Wᵀ on the way forward and g W on the way back,
nothing more, because W has no gradient. Both can be made in 8 bits (SwitchBack, Wortsman et al.
2023, arXiv 2304.13013, does so for all but the gradient of W).
"""

import weakref
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor
from torch.autograd import Function

Copy = TypeVar("Copy")


class EightBit(Protocol):
    """A frozen weight W [out, in] in 8 bits."""

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x Wᵀ + b [T, out] for x [..., in] of T rows in all."""

    def backward(self, grad: Tensor) -> Tensor:
        """Return grad W [T, in] for grad [T, out]."""


class SharedInput(Generic[Copy]):
    """Quantises the inputs of a model's layers; one that several layers read, only once.

    Query, key and value have the same input, gate and up too.
    """

    def __init__(self) -> None:
        """Begin with nothing quantised."""
        self._of: tuple[weakref.ref[Tensor], int, Callable[[Tensor], Copy]] | None = None
        self._found: Copy | None = None

    def __call__(self, x: Tensor, quantise: Callable[[Tensor], Copy]) -> Copy:
        """Return x [..., in] quantised as rows [T, in].

        The same as last time if it is the same tensor, unchanged, and the same function. What
        changes a tensor behind autograd's back (`.data`) is not seen.
        """
        if x.is_inference():  # counts no changes
            return quantise(x.reshape(-1, x.shape[-1]))
        last = self._of
        same = last and last[0]() is x and last[1] == x._version and last[2] == quantise
        if not same or self._found is None:
            self._found = quantise(x.detach().reshape(-1, x.shape[-1]))
            self._of = weakref.ref(x), x._version, quantise
        return self._found


def linear(x: Tensor, bias: Tensor | None, weight: EightBit) -> Tensor:
    """Return x Wᵀ + b [..., out], differentiable in x."""
    return _Linear.apply(x, bias, weight)  # type: ignore[no-untyped-call,no-any-return]


class _Linear(Function):
    """y = x Wᵀ + b with W and b frozen; keeps nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: EightBit) -> Tensor:
        ctx.weight, ctx.shape = weight, x.shape
        return weight.forward(x, bias).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = ctx.weight.backward(grad.reshape(-1, grad.shape[-1]))
        return found.view(ctx.shape), None, None
