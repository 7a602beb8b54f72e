"""Products with a frozen weight in int8: twice the rate of bf16 on the CPUs that have it.

Values are whole numbers from -127 to 127 with a float32 scale for each row, so that an outlier
costs its own row alone (LLM.int8(), Dettmers et al. 2022, arXiv 2208.07339, without its second
product for outliers). Activations and gradients get their scales as they come. A weight is
quantised once, by output: x Wᵀ multiplies the scales in afterwards, g W multiplies them into g
before it is quantised. Sums of products are exact, whatever the order and the number of threads.
"""

import functools
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from postgrad.model.frozen import SharedInput
from postgrad.model.kernels import call, usable

LARGEST = 127.0
"""Largest value; -128 is not used, so that a row and its negative are the same."""
LEAST = 1e-30
"""A row whose largest value is smaller counts as zeros."""
WIDEST = 2**17
"""Most values in a sum: 2^17 127^2 is below 2^31."""
SMALLEST = 2**16
"""Weights of a layer from which quantising its input can pay at all."""
PROBE_ROWS, PROBE_TURNS = 256, 7
LEAST_GAIN = 1.2
"""How much faster a layer must be in a trial for int8 to be chosen by itself."""


def why_not(device: torch.device) -> str:
    """Return why int8 products cannot be had on this device; "" when they can."""
    if device.type != "cpu":
        return "they are made on CPUs only"
    if not hasattr(torch, "_int_mm"):
        return f"torch {torch.__version__} has no int8 products"
    return _inexact()


@functools.cache
def _inexact() -> str:
    """Return what is wrong with the largest sums; "" when nothing is.

    Older processors add pairs of products in 16 bits, which the largest values overflow.
    """
    generator = torch.Generator().manual_seed(0)
    signs = (torch.randint(0, 2, (96, 64), generator=generator) * 2 - 1).to(torch.int8)
    a, b = 127 * signs[:64], 127 * signs.abs()
    try:
        exact = all(
            torch.equal(torch._int_mm(x, y.t()).long(), x.long() @ y.long().t())
            for x in (a, -a)
            for y in (b, -b, b * signs)
        )
    except RuntimeError as error:
        return f"torch has none here ({str(error).splitlines()[0]})"
    return "" if exact else "this processor's int8 sums overflow"


@dataclass(frozen=True, slots=True)
class Quantised:
    """A matrix whose rows have a scale each: row i is scales[i] values[i]."""

    values: Tensor
    """[R, K] int8."""
    scales: Tensor
    """[R] float32."""


def quantised(x: Tensor, columns: Tensor | None = None) -> Quantised:
    """Quantise the rows of x [R, K], each column multiplied by `columns` [K] before."""
    x = x.detach().contiguous()
    if not usable(x):
        return Quantised(*quantise_definition(x, columns))
    found = Quantised(torch.empty_like(x, dtype=torch.int8), torch.empty(len(x)))
    call("quantise", x.dtype, x, columns, found.values, found.scales, *x.shape)
    return found


def quantise_definition(x: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return values and scales; a row with NaN or infinity gets scale NaN."""
    wide = x.float() if columns is None else x.float() * columns
    largest = wide.abs().amax(1)
    finite, some = largest.isfinite(), largest > LEAST
    factor = torch.where(finite & some, LARGEST / largest, 0.0)
    values = torch.where(finite.unsqueeze(1), wide * factor.unsqueeze(1), 0.0)
    scales = torch.where(some, largest / LARGEST, 0.0).where(finite, float("nan"))
    return values.round().to(torch.int8), scales


def dequantised(
    sums: Tensor, scales: Tensor, columns: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return sums [R, N] int32 times scales [R] and, where given, columns [N], plus bias [N]."""
    y = torch.empty(sums.shape, dtype=dtype)
    if not usable(y) or (bias is not None and bias.dtype != dtype):
        return dequantise_definition(sums, scales, columns, bias).to(dtype)
    call("dequantise", dtype, sums, scales, columns, bias, y, *sums.shape)
    return y


def dequantise_definition(
    sums: Tensor, scales: Tensor, columns: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Return the same in float32."""
    factor = scales.unsqueeze(1) if columns is None else scales.unsqueeze(1) * columns
    return sums * factor if bias is None else sums * factor + bias.float()


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """A frozen weight W [out, in], quantised by output."""

    weight: Quantised
    inputs: SharedInput[Quantised]
    """Shared by the layers of a model."""

    @classmethod
    def of(cls, weight: Tensor, inputs: SharedInput[Quantised]) -> "Int8Weight | None":
        """Quantise a weight [out, in]; None where it is too small to pay or too wide for sums."""
        if weight.numel() < SMALLEST or max(weight.shape) > WIDEST:
            return None
        return cls(quantised(weight), inputs)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x Wᵀ + b [T, out] for x [..., in] of T rows in all."""
        rows = self.inputs(x)
        sums = torch._int_mm(rows.values, self.weight.values.t())
        return dequantised(sums, rows.scales, self.weight.scales, bias, x.dtype)

    def backward(self, grad: Tensor) -> Tensor:
        """Return grad W [T, in] for grad [T, out]."""
        rows = quantised(grad, self.weight.scales)
        sums = torch._int_mm(rows.values, self.weight.values)
        return dequantised(sums, rows.scales, None, None, grad.dtype)


def shared_input() -> SharedInput[Quantised]:
    """Return what quantises the inputs of a model's layers."""
    return SharedInput(quantised)


def pays(weight: Tensor) -> bool:
    """Time a layer forward and backward in int8 and as it is: is int8 faster by `LEAST_GAIN`?"""
    eight = Int8Weight.of(weight, shared_input())
    if eight is None or not usable(weight):
        return False
    x, grad = (torch.ones(PROBE_ROWS, width, dtype=weight.dtype) for width in weight.shape[::-1])

    def plain() -> None:
        functional.linear(x, weight)
        grad @ weight

    def in_int8() -> None:
        eight.forward(x.view_as(x), None)  # a new view: nothing is found quantised
        eight.backward(grad)

    best = {plain: float("inf"), in_int8: float("inf")}
    with torch.no_grad():
        for _ in range(PROBE_TURNS):
            for work in best:
                began = time.perf_counter()
                work()
                best[work] = min(best[work], time.perf_counter() - began)
    return best[plain] > LEAST_GAIN * best[in_int8]
