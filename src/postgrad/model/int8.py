"""Products with a frozen weight in int8: twice the rate of bf16 on the CPUs that have it.

Values are whole numbers from -127 to 127 with a float32 scale for each row. Activations and
gradients get their scales as they come. A few input channels of a layer are so large in every row
that the others would be rounded to little: they are left out and multiplied in the model's
precision (LLM.int8(), Dettmers et al. 2022, arXiv 2208.07339). A weight is quantised once, by
output: x Wᵀ multiplies the scales in afterwards, g W multiplies them into g before it is quantised.
Sums of products are exact, whatever the order and the number of threads.
"""

import functools
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from postgrad.model.frozen import SharedInput
from postgrad.model.kernels import call, usable

LARGEST = 127.0
"""Largest value; -128 is not used, so that a row and its negative are the same."""
LEAST = 1e-30
"""A row whose largest value is smaller counts as zeros."""
WIDEST = 2**17
"""Most values in a sum: 2^17 127^2 is below 2^31."""
ON_STACK = 2**14
"""Longest row that kernels.c quantises: a thread keeps it on its stack in float32."""
SMALLEST = 2**16
"""Weights of a layer from which quantising its input can pay at all."""
APART = 16
"""Input channels of a layer that are kept apart. With all of them quantised a gradient of the 135M
model lay 30 to 33 % from bf16's on two kinds of rows, with 8 apart 18 and 26 %, with 16 apart 15
and 17 % (LOG.md); a product of 16 takes as long as one of 8."""
PROBE_ROWS, PROBE_TURNS = 256, 9
LEAST_GAIN = 1.2
"""How much faster a layer must be in a trial for int8 to be chosen by itself."""


def why_not(device: torch.device) -> str:
    """Return why int8 products cannot be had on this device; "" when they can."""
    if device.type != "cpu":
        return "int8 products are made on CPUs only"
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
    if not usable(x) or x.shape[1] > ON_STACK:
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
class Rows:
    """An input's rows, some of its channels apart."""

    quantised: Quantised
    apart: Tensor | None
    """[R, C] what is not quantised, in the input's precision; None where all is."""


@dataclass(frozen=True, eq=False)
class Split:
    """Which input channels are quantised: all, or all but those with the largest values."""

    apart: Tensor | None = None
    """[C] int64, ascending."""
    columns: Tensor | None = None
    """[in] float32: 0 for what is apart, else 1."""

    def rows(self, x: Tensor) -> Rows:
        """Split and quantise x [R, in]."""
        apart = None if self.apart is None else x.index_select(1, self.apart)
        return Rows(quantised(x, self.columns), apart)


def split_of(largest: Tensor, before: Split) -> Split:
    """Keep apart the channels with the largest values; `before` itself if it does just that.

    Layers with one input then have one split, so that the input is quantised once.

    Args:
        largest: [in] of each input channel.
        before: of the layer before.
    """
    apart = largest.topk(min(APART, len(largest) - 1)).indices.sort().values
    if before.columns is not None and len(before.columns) == len(largest):
        assert before.apart is not None
        if torch.equal(before.apart, apart):
            return before
    return Split(apart, torch.ones(len(largest)).index_fill_(0, apart, 0.0))


@contextmanager
def watched_inputs(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Collect the largest absolute value of each layer's input channels inside the block."""
    largest: dict[str, Tensor] = {}

    def watch(name: str, given: tuple[Tensor, ...]) -> None:
        found = given[0].detach().reshape(-1, given[0].shape[-1]).abs().amax(0).float()
        largest[name] = torch.maximum(largest[name], found) if name in largest else found

    hooks = [
        layer.register_forward_pre_hook(lambda _, given, name=name: watch(name, given))
        for name, layer in layers.items()
    ]
    try:
        yield largest
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """A frozen weight W [out, in], quantised by output."""

    weight: Quantised
    inputs: SharedInput[Rows]
    """Shared by the layers of a model."""
    split: Split
    apart: Tensor | None
    """[C, out] what W makes of the channels that are apart, in its own precision."""

    @classmethod
    def of(
        cls, weight: Tensor, inputs: SharedInput[Rows], split: Split | None = None
    ) -> "Int8Weight | None":
        """Quantise a weight [out, in]; None where it is too small to pay or too wide for sums."""
        if weight.numel() < SMALLEST or max(weight.shape) > WIDEST:
            return None
        split = split or Split()
        apart = None
        if split.apart is not None:
            apart = weight.detach().index_select(1, split.apart).t().contiguous()
        return cls(quantised(weight), inputs, split, apart)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x Wᵀ + b [T, out] for x [..., in] of T rows in all."""
        rows = self.inputs(x, self.split.rows)
        sums = torch._int_mm(rows.quantised.values, self.weight.values.t())
        y = dequantised(sums, rows.quantised.scales, self.weight.scales, bias, x.dtype)
        if rows.apart is None or self.apart is None:
            return y
        return y.addmm_(rows.apart, self.apart)

    def backward(self, grad: Tensor) -> Tensor:
        """Return grad W [T, in] for grad [T, out]."""
        rows = quantised(grad, self.weight.scales)
        sums = torch._int_mm(rows.values, self.weight.values)
        return dequantised(sums, rows.scales, None, None, grad.dtype)


def pays(weight: Tensor) -> bool:
    """Time a layer forward and backward in int8 and as it is: is int8 faster by `LEAST_GAIN`?

    On one thread, whatever the training will have: both sides gain alike from more, and what else
    runs on the machine disturbs one thread least. Not without compiled kernels.
    """
    eight = Int8Weight.of(weight, SharedInput())
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
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            for _ in range(PROBE_TURNS):
                for work in best:
                    began = time.perf_counter()
                    work()
                    best[work] = min(best[work], time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    return best[plain] > LEAST_GAIN * best[in_int8]
