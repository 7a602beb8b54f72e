"""Attention of short documents on a CPU in one call of attention.c, forward and backward.

Batched products (buckets.py, which computes the same) spend most of their time on short documents
with gathering them into rectangles, with scores that the causal mask throws away and with starting
small products. Here a document's keys and values are read once, in float32, and stay in the cache.
"""

import functools
import math
import threading
from typing import Any

import torch
from torch import Tensor

from postgrad.model.kernels import call, usable
from postgrad.model.layout import Layout

LANES, BLOCK = 16, 16
"""As attention.c pads keys, and the queries that it takes at once."""
ROOM = 2**22
"""Numbers that a thread may need for one document; longer ones go elsewhere."""
MEAN_SPAN = {torch.float32: math.inf, torch.bfloat16: 128.0}
"""Tokens that a query's document has on average at most: beyond, batched products in bf16 are
faster where the processor has them, because these here are in float32 (LOG.md)."""

_own = threading.local()


def fits(q: Tensor, k: Tensor, v: Tensor, layout: Layout, limit: int) -> bool:
    """Whether attention.c can work on these: q [T, H, D], k and v [T, K, D]."""
    width, longest = q.shape[2], min(limit, max(layout.spans))
    return (
        usable(*(x.new_empty(0) for x in (q, k, v)))
        and v.shape[2] == width
        and width % LANES == 0
        and backward_room(longest, width) <= ROOM
        and mean_span(layout, limit) <= MEAN_SPAN[q.dtype]
    )


@functools.lru_cache(maxsize=16)
def mean_span(layout: Layout, limit: int) -> float:
    """Return the tokens of a query's document, a shared prefix included, on average over queries.

    >>> mean_span(Layout((2, 6, 30)), limit=10)
    5.0
    """
    short = [both for both in zip(layout.lengths, layout.spans, strict=True) if both[1] <= limit]
    return sum(own * span for own, span in short) / sum(own for own, _ in short)


def short_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, limit: int, scale: float
) -> Tensor:
    """Attention of the documents up to `limit` tokens; zeros where longer ones stand.

    q [T, H, D], k and v [T, K, D], H a multiple of K -> [T, H, D].
    """
    return _ShortAttention.apply(q, k, v, layout, limit, float(scale))  # type: ignore[no-untyped-call,no-any-return]


@functools.lru_cache(maxsize=16)
def documents(layout: Layout, limit: int) -> Tensor:
    """Return [D, 3] int64: first own token, own tokens, shared tokens in front of them."""
    rows, start = [], 0
    for number, (own, span) in enumerate(zip(layout.lengths, layout.spans, strict=True)):
        if span <= limit:
            rows.append((start, own, layout.prefix if number else 0))
        start += own
    return torch.tensor(rows)


def forward_room(length: int, width: int) -> int:
    """Return the numbers that a thread needs for a document of so many tokens."""
    padded = -(-length // LANES) * LANES
    return 2 * padded * width + BLOCK * (2 * width + padded)


def backward_room(length: int, width: int) -> int:
    """Return the same for the gradient, which keeps the document's probabilities."""
    padded = -(-length // LANES) * LANES
    return 7 * padded * width + BLOCK * width + 2 * padded * padded


class _ShortAttention(torch.autograd.Function):
    """softmax(q kᵀ s) v for every document; keeps its inputs and a number a query."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout, limit: int, scale: float
    ) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        found, (tokens, heads, width) = documents(layout, limit), q.shape
        out = _like(q, layout, found)
        log_sums = torch.empty(tokens, heads)
        longest = min(limit, max(layout.spans))
        threads = torch.get_num_threads()
        room = forward_room(longest, width)
        call(
            *("attention", q.dtype, q, k, v, found, out, log_sums),
            *(_work(threads * room), room, scale, len(found), heads, k.shape[1], width),
            *(layout.window or longest, threads),
        )
        ctx.save_for_backward(q, k, v, log_sums)
        ctx.found, ctx.layout, ctx.longest, ctx.scale = found, layout, longest, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_sums = ctx.saved_tensors
        found = ctx.found  # cached, perhaps since an inference, which could not be saved
        grad = grad.to(q.dtype).contiguous()
        (_, heads, width), key_heads, prefix = q.shape, k.shape[1], ctx.layout.prefix
        dq, dk, dv = (_like(x, ctx.layout, found) for x in (q, k, v))
        of_prefix = torch.empty(2, len(found), key_heads, prefix, width)
        threads = torch.get_num_threads()
        room = backward_room(ctx.longest, width)
        call(
            *("attention_backward", q.dtype, grad, q, k, v, log_sums, found, dq, dk, dv),
            *(of_prefix, _work(threads * room), room, ctx.scale, len(found), heads, key_heads),
            *(width, ctx.layout.window or ctx.longest, prefix, threads),
        )
        return dq, dk, dv, None, None, None


def _like(x: Tensor, layout: Layout, found: Tensor) -> Tensor:
    """Room for a result: zeros where no document in `found` will write."""
    return torch.empty_like(x) if len(found) == len(layout.lengths) else torch.zeros_like(x)


def _work(numbers: int) -> Tensor:
    """Return room for intermediate results, which every call of a thread uses again."""
    kept: Tensor | None = getattr(_own, "work", None)
    if kept is None or len(kept) < numbers:
        kept = _own.work = torch.empty(numbers)
    return kept
