"""Where bucketed attention stops paying on this machine: a second of measuring before a run.

Batched matrix products win on short documents and torch's flash kernel on long ones; where they
cross depends on the processor, the precision, the width of a head and the number of threads.
"""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from postgrad.model.attention import per_document_attention
from postgrad.model.buckets import LENGTH_MULTIPLE, bucketed_attention
from postgrad.model.layout import Layout

CERTAIN = 128
"""Documents up to this many tokens are always bucketed: the flash kernel takes several times as
long there (LOG.md)."""
PROBE_TOKENS = 512
"""Tokens of one timed pass at least, in documents of equal length."""
LENGTHS = (256, 512, 1024)
"""Lengths of documents that are tried, the longest of the rows in place of those beyond it."""
KEY_HEADS = 2
"""Key heads that are timed, with their query heads: work is proportional to heads."""
PASSES = 2
"""Passes at each length, the better counts; the first also warms up."""


@dataclass(frozen=True, slots=True)
class AttentionProbe:
    """What was measured and the limit that follows."""

    limit: int
    """Documents up to this many tokens are bucketed."""
    seconds: dict[int, tuple[float, float]]
    """Document length -> forward and backward pass bucketed, and by the flash kernel."""


def probe_attention(
    longest: int, heads: int, key_heads: int, width: int, dtype: torch.dtype
) -> AttentionProbe:
    """Time both realisations, forward and backward, on documents no longer than the training rows.

    Args:
        longest: tokens of the longest training row.
        heads: query heads of a layer.
        key_heads: key heads of a layer.
        width: of a head.
        dtype: what attention is computed in.
    """
    kept = min(key_heads, KEY_HEADS)
    shape = (heads // key_heads * kept, kept, width)
    longest = min(LENGTHS[-1], -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE)
    measured: dict[int, tuple[float, float]] = {}
    for length in (*(short for short in LENGTHS if short < 0.8 * longest), longest):
        if length > CERTAIN:
            measured[length] = _measure(length, shape, dtype)
    return AttentionProbe(crossover(measured), measured)


def crossover(seconds: dict[int, tuple[float, float]]) -> int:
    """Return the document length from which on the flash kernel is faster, never below CERTAIN.

    It lies between the last length at which buckets won and the first at which they did not.

    >>> crossover({256: (1.0, 2.0), 512: (2.0, 1.0)})
    384
    >>> crossover({256: (1.0, 2.0), 512: (1.0, 1.5)})
    512
    """
    won = CERTAIN
    for length, (bucketed, flash) in sorted(seconds.items()):
        if bucketed > flash:
            return (won + length) // 2 // LENGTH_MULTIPLE * LENGTH_MULTIPLE
        won = length
    return won


def _measure(length: int, shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[float, float]:
    """Return the seconds of a pass, bucketed and by the flash kernel."""
    heads, key_heads, width = shape
    layout = Layout((length,) * max(1, PROBE_TOKENS // length))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(layout.tokens, count, width, generator=generator).to(dtype).requires_grad_()
        for count in (heads, key_heads, key_heads)
    )

    def bucketed() -> Tensor:
        return bucketed_attention(q, k, v, layout, length, width**-0.5, None)

    def flash() -> Tensor:
        return per_document_attention(q, k, v, layout, width**-0.5)

    best = [float("inf"), float("inf")]
    for _ in range(PASSES):
        for number, realisation in enumerate((bucketed, flash)):
            began = time.perf_counter()
            out = realisation()
            torch.autograd.grad(out, (q, k, v), out.detach())
            best[number] = min(best[number], time.perf_counter() - began)
    return best[0], best[1]
