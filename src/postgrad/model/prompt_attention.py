"""Attention of packed prompts with their common beginning in front of every row, for CPUs.

One softmax over the beginning and the row, in one pass, instead of two results that are merged: for
beginnings that are short beside the rows, a system prompt before retrieved examples.
"""

import torch
from torch import Tensor

from postgrad.model.buckets import causal_softmax

PLAIN_SCORES = 384 * 384
"""Scores for each row and head: up to so many, two matrix products on a CPU are faster than the
kernel, whose own products are not made for bf16 on every processor."""

Pair = tuple[Tensor, Tensor]
"""Keys and values, or a result and the log of its softmax's denominator, or rows and columns."""


def fits_together(query: Tensor, key: Tensor, prefix: Pair | None) -> bool:
    """Whether packed prompts are better read with the prefix in front of every row.

    On a CPU, where the prefix is no longer than the rows and their scores stay in the caches: one
    softmax in one pass over them, and no merging.
    """
    before = prefix[0].shape[2] if prefix else 0
    length = before + key.shape[2]
    on_cpu = query.device.type == "cpu"
    return on_cpu and before <= key.shape[2] and length * length <= PLAIN_SCORES


def read_together(
    query: Tensor, key: Tensor, value: Tensor, scale: float, places: Pair, prefix: Pair | None
) -> Tensor:
    """Packed query [1, H, T, D] against prefix and rows [B, K, S, D], each causal -> [1, T, H, D].

    Query heads of one key head are stacked as positions; those of the prefix are empty.
    """
    before = prefix[0].shape[2] if prefix else 0
    if prefix:
        key, value = (
            torch.cat([shared.expand(len(own), -1, -1, -1), own], 2)
            for shared, own in zip(prefix, (key, value), strict=True)
        )
    rows, heads, length, width = *key.shape[:3], query.shape[-1]
    at = places[0], places[1] + before
    padded = query.new_zeros(rows, length, query.shape[1], width)
    padded[at] = query[0].transpose(0, 1)
    stacked = padded.transpose(1, 2).reshape(rows * heads, -1, width)
    scores = torch.bmm(stacked, key.reshape(rows * heads, length, width).transpose(1, 2))
    weights = causal_softmax(scores, scale)
    out = torch.bmm(weights, value.reshape(rows * heads, length, -1))
    return out.view(rows, query.shape[1], length, -1).transpose(1, 2)[at][None]
