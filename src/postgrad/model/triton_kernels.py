"""What torch's compiler makes a slow kernel of, written by hand in Triton for a CUDA device.

The rotary embedding reads each number together with one that lies half a head further on. Of both
ways to write that in tensor operations torch 2.11 made kernels that took 3 to 5 times as long as
their bytes need (LOG.md).
"""

import torch
import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]
from torch import Tensor

HEADS = 8
"""Heads of one token that a program turns."""


def rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """Return x cos + sign rotate_half(x) sin: x [T, H, D], cos and sin [T, D], all contiguous.

    The halves of cos and of sin must be equal; computed in float32, rounded once.
    """
    y = torch.empty_like(x)
    tokens, heads, width = x.shape
    grid = (tokens, triton.cdiv(heads, HEADS))
    half = width // 2
    _rotate[grid](x, cos, sin, y, sign, heads, half, triton.next_power_of_2(half), HEADS)
    return y


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _rotate(  # type: ignore[no-untyped-def]  # noqa: ANN202
    x,  # noqa: ANN001
    cos,  # noqa: ANN001
    sin,  # noqa: ANN001
    y,  # noqa: ANN001
    sign,  # noqa: ANN001
    heads,  # noqa: ANN001
    half: tl.constexpr,
    padded: tl.constexpr,
    block: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * block + tl.arange(0, block)
    column = tl.arange(0, padded)
    inside = (head < heads)[:, None] & (column < half)[None, :]
    at = (token * heads + head)[:, None] * (2 * half) + column[None, :]
    angle = token * 2 * half + column
    c = tl.load(cos + angle, mask=column < half).to(tl.float32)[None, :]
    s = tl.load(sin + angle, mask=column < half).to(tl.float32)[None, :] * sign
    first = tl.load(x + at, mask=inside).to(tl.float32)
    second = tl.load(x + at + half, mask=inside).to(tl.float32)
    dtype = y.dtype.element_ty
    tl.store(y + at, (first * c - second * s).to(dtype), mask=inside)
    tl.store(y + at + half, (second * c + first * s).to(dtype), mask=inside)
