"""Sequences that begin alike, computed once: a tree of tokens and the attention over it.

The options of a question share its prompt. Their tokens are laid out as a tree, one node per
distinct beginning, and every token attends to its ancestors, so a prompt with four options costs
one prompt and four endings. Trees stand packed in one row and are gathered into batches of similar
size for the attention. Tokens that many trees begin with are read before: a few stand before the
keys of each tree, many (few-shot examples, a system prompt) are attended to separately, merged by
log-sum-exp ("Cascade Inference", Ye et al., FlashInfer, 2024).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

from postgrad.model.buckets import Bucket, gather_heads, scatter_heads, with_padding_row
from postgrad.model.decode import Prefix, attend
from postgrad.model.kernels import call, usable
from postgrad.types import IntArray

NAME = "postgrad-token-tree"
LENGTH_MULTIPLE = 16
"""Trees are padded to a multiple of this many tokens inside the attention: few distinct shapes."""
PLAIN_LENGTH = 512
"""Longest tree, prefix included, whose attention is computed by plain matrix products."""
JOINED_PREFIX = 128
"""A shared beginning up to so long is put before the keys of every tree; a longer one is attended
to separately."""
BATCH_TOKENS = 2048
"""Padded tokens of trees in one attention call: keeps the scores in the cache."""


@dataclass(frozen=True, slots=True)
class TokenTree:
    """Distinct tokens of some sequences; a parent stands before its children."""

    ids: IntArray
    """[L] token ids."""
    parents: IntArray
    """[L] index of the token before; -1 at a beginning."""
    depths: IntArray
    """[L] position in the sequence, from 0."""
    paths: tuple[tuple[int, ...], ...]
    """For each sequence the nodes of its tokens, in order."""

    def __len__(self) -> int:
        """Return the number of tokens that are computed."""
        return len(self.ids)

    def visible(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Return [L, L]: whether row's token attends to column's, itself and its ancestors."""
        seen = np.eye(len(self), dtype=np.bool_)
        for node, parent in enumerate(self.parents.tolist()):
            if parent >= 0:
                seen[node, : parent + 1] |= seen[parent, : parent + 1]
        return seen


def grow(sequences: Sequence[Sequence[int]]) -> TokenTree:
    """Return the tree of some sequences of token ids."""
    children: dict[tuple[int, int], int] = {}
    ids: list[int] = []
    parents: list[int] = []
    depths: list[int] = []
    paths = []
    for sequence in sequences:
        node, path = -1, []
        for depth, token in enumerate(sequence):
            found = children.setdefault((node, token), len(ids))
            if found == len(ids):
                ids.append(token)
                parents.append(node)
                depths.append(depth)
            node = found
            path.append(node)
        paths.append(tuple(path))
    as_array = partial(np.array, dtype=np.int64)
    return TokenTree(as_array(ids), as_array(parents), as_array(depths), tuple(paths))


@dataclass(frozen=True, slots=True)
class TreeBatch:
    """Trees of similar size as a rectangle."""

    places: Bucket
    """Where the tokens stand in the packed row; one past its end where padded. Behind that stands a
    joined prefix, which the trees see but do not ask."""
    bias: Tensor
    """[count, length, length] zero where a token may attend in its tree, else minus infinity."""

    @property
    def span(self) -> int:
        """Keys of each query, padding included."""
        return self.places.keys.shape[1]


@dataclass(frozen=True, slots=True)
class TreeLayout:
    """What the attention of one forward pass must know; travels as a keyword argument."""

    tokens: int
    batches: tuple[TreeBatch, ...]
    joined: Prefix | None
    """A short prefix, before the keys of every tree."""
    apart: Prefix | None
    """A long one, attended to separately."""


def make_layout(
    trees: Sequence[TokenTree], prefix: Prefix | None, dtype: torch.dtype, device: torch.device
) -> TreeLayout:
    """Group packed trees by size, longest first."""
    starts = np.cumsum([0, *(len(tree) for tree in trees)]).tolist()
    tokens = starts[-1]
    order = sorted(range(len(trees)), key=lambda n: -len(trees[n]))
    joined = prefix if prefix is not None and prefix.length <= JOINED_PREFIX else None
    before = joined.length if joined else 0
    batches = []
    while order:
        length = -(-len(trees[order[0]]) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        count = max(1, BATCH_TOKENS // length)
        group, order = order[:count], order[count:]
        index = np.full((len(group), length), tokens)
        hidden = np.ones((len(group), length, length), dtype=np.bool_)
        hidden[:, :, 0] = False  # padded tokens need something to attend to
        for row, number in enumerate(group):
            size = len(trees[number])
            index[row, :size] = np.arange(starts[number], starts[number] + size)
            hidden[row, :size, :size] = ~trees[number].visible()
        front = np.broadcast_to(np.arange(tokens + 1, tokens + 1 + before), (len(group), before))
        asked, seen = (
            torch.from_numpy(x).to(device) for x in (index, np.concatenate([front, index], 1))
        )
        own = sum(len(trees[number]) for number in group)
        bias = torch.zeros(hidden.shape, dtype=dtype, device=device)
        bias.masked_fill_(torch.from_numpy(hidden).to(device), float("-inf"))
        batches.append(TreeBatch(Bucket(asked, seen, own, before), bias))
    return TreeLayout(tokens, tuple(batches), joined, None if joined else prefix)


def computed_dtype(tensor: Tensor) -> torch.dtype:
    """Return in which precision the attention of such a tensor is computed: autocast's, or its."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


@contextmanager
def tree_attention(model: Any) -> Iterator[None]:
    """Run the model with this attention inside the block and its own again afterwards."""
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    layout: TreeLayout | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention function of Transformers' interface: q [1, H, T, D] -> [1, T, H, D].

    Without a layout it is causal: one sequence that becomes a prefix.
    """
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    dtype = computed_dtype(query)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    heads = query.shape[1]
    groups = heads // key.shape[1]
    if layout is None:
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        return attend(query, key, value, scale, causal=True)[0].transpose(1, 2), None
    q = with_padding_row(query[0].transpose(0, 1))
    before = layout.joined.layers[module.layer_idx] if layout.joined else (None, None)
    k, v = (_with_prefix(x, shared) for x, shared in zip((key, value), before, strict=True))
    out, weight = torch.empty_like(q), q.new_zeros(len(q), heads, dtype=torch.float32)
    for batch in layout.batches:
        if layout.apart is None and batch.span <= PLAIN_LENGTH:
            _plainly(q, k, v, scale, batch, out)
            continue
        asked, seen = batch.places.index, batch.places.keys
        rows_q = q[asked].transpose(1, 2)
        rows_k, rows_v = (x[seen].transpose(1, 2).repeat_interleave(groups, 1) for x in (k, v))
        bias = functional.pad(batch.bias, (batch.places.prefix, 0))[:, None]
        part, part_weight = attend(rows_q, rows_k, rows_v, scale, bias=bias)
        out[asked] = part.transpose(1, 2)
        weight[asked] = part_weight.transpose(1, 2).to(torch.float32)
    own, own_weight = out[:-1], weight[:-1]
    if layout.apart is None:
        return own[None], None
    shared, shared_weight = _prefix_attention(module, query, key.shape[1], layout.apart, scale)
    share = torch.sigmoid(shared_weight - own_weight).unsqueeze(-1).to(own.dtype)
    return torch.lerp(own, shared, share)[None], None


def _plainly(q: Tensor, k: Tensor, v: Tensor, scale: float, batch: TreeBatch, out: Tensor) -> None:
    """Write the attention of a batch into `out` by two matrix products, q and out [T + 1, H, D].

    Faster than the kernel on short trees. Query heads that share a key head are stacked along the
    query axis.
    """
    groups = q.shape[1] // k.shape[1]
    asked = gather_heads(q, batch.places, groups)
    keys, values = (gather_heads(x, batch.places, 1, keys=True) for x in (k, v))
    shares = tree_softmax(torch.bmm(asked, keys.transpose(1, 2)), batch.bias, scale)
    scatter_heads(out, torch.bmm(shares, values), batch.places, groups)


def tree_softmax(scores: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Turn scores into probabilities in place: softmax(scale scores + bias).

    Scores [trees * heads, queries, prefix + L], queries a multiple of L; bias [trees, L, L] is that
    of the last L keys, and no query i of L sees a key behind i. The prefix is seen by all.
    """
    trees, length, _ = bias.shape
    prefix = scores.shape[-1] - length
    if usable(scores, bias):
        rows = scores.numel() // scores.shape[-1]
        call("tree_softmax", scores.dtype, scores, bias, scale, rows, rows // trees, prefix, length)
        return scores
    hidden = functional.pad(bias, (prefix, 0))[:, None]
    by_head = scores.mul_(scale).view(trees, -1, length, prefix + length)
    return by_head.add_(hidden).softmax(-1).view_as(scores)


def _prefix_attention(
    module: Any, query: Tensor, key_heads: int, prefix: Prefix, scale: float
) -> tuple[Tensor, Tensor]:
    """Every token against the whole prefix: [T, H, D] and the log of the denominator [T, H]."""
    tokens, width = query.shape[2], query.shape[3]
    stacked = query[0].reshape(1, key_heads, -1, width)
    keys, values = (x.to(query.dtype) for x in prefix.layers[module.layer_idx])
    out, weight = attend(stacked, keys, values, scale)
    out = out.reshape(-1, tokens, width).transpose(0, 1)
    return out, weight.reshape(-1, tokens).transpose(0, 1)


def _with_prefix(x: Tensor, prefix: Tensor | None) -> Tensor:
    """[1, K, T, D] -> [T + 1 + P, K, D]: padding points at a row of zeros, then the prefix."""
    rows = x[0].transpose(0, 1)
    if prefix is None:
        return with_padding_row(rows)
    shared = prefix[0].transpose(0, 1).to(rows.dtype)
    return torch.cat([rows, rows.new_zeros(1, *rows.shape[1:]), shared])


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, lambda **_: None)
