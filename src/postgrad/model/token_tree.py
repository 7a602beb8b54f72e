"""Sequences that begin alike, computed once: a tree of tokens and the attention over it.

The options of a question share its prompt. Their tokens are laid out as a tree, one node per
distinct beginning, and every token attends to its ancestors, so a prompt with four options costs
one prompt and four endings. Trees stand packed in one row and are gathered into batches of similar
size for the attention; tokens that many trees begin with (few-shot examples, a system prompt) are
read before and attended to separately, merged by log-sum-exp ("Cascade Inference", Ye et al.,
FlashInfer, 2024).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from postgrad.model.decode import Prefix, attend
from postgrad.types import IntArray

NAME = "postgrad-token-tree"
LENGTH_MULTIPLE = 16
"""Trees are padded to a multiple of this many tokens inside the attention: few distinct shapes."""
PLAIN_LENGTH = 256
"""Longest tree whose attention is computed by plain matrix products."""
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

    index: Tensor
    """[count, length] positions in the packed row; one past its end where padded."""
    bias: Tensor
    """[count, 1, length, length] zero where a token may attend, else minus infinity."""


@dataclass(frozen=True, slots=True)
class TreeLayout:
    """What the attention of one forward pass must know; travels as a keyword argument."""

    tokens: int
    batches: tuple[TreeBatch, ...]
    prefix: Prefix | None


def make_layout(
    trees: Sequence[TokenTree], prefix: Prefix | None, dtype: torch.dtype, device: torch.device
) -> TreeLayout:
    """Group packed trees by size, longest first."""
    starts = np.cumsum([0, *(len(tree) for tree in trees)]).tolist()
    order = sorted(range(len(trees)), key=lambda n: -len(trees[n]))
    batches = []
    while order:
        length = -(-len(trees[order[0]]) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        count = max(1, BATCH_TOKENS // length)
        group, order = order[:count], order[count:]
        index = np.full((len(group), length), starts[-1])
        hidden = np.ones((len(group), length, length), dtype=np.bool_)
        hidden[:, :, 0] = False  # padded tokens need something to attend to
        for row, number in enumerate(group):
            size = len(trees[number])
            index[row, :size] = np.arange(starts[number], starts[number] + size)
            hidden[row, :size, :size] = ~trees[number].visible()
        bias = torch.zeros(hidden.shape, dtype=dtype, device=device)
        bias.masked_fill_(torch.from_numpy(hidden).to(device), float("-inf"))
        batches.append(TreeBatch(torch.from_numpy(index).to(device), bias[:, None]))
    return TreeLayout(starts[-1], tuple(batches), prefix)


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
    heads, width = query.shape[1], query.shape[3]
    groups = heads // key.shape[1]
    if layout is None:
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        return attend(query, key, value, scale, causal=True)[0].transpose(1, 2), None
    q, k, v = (_with_padding(x) for x in (query, key, value))
    out, weight = q.new_zeros(len(q), heads, width), q.new_zeros(len(q), heads, dtype=torch.float32)
    for batch in layout.batches:
        rows = (x[batch.index].transpose(1, 2) for x in (q, k, v))
        rows_q, rows_k, rows_v = rows
        if layout.prefix is None and batch.index.shape[1] <= PLAIN_LENGTH:
            part = _plainly(rows_q, rows_k, rows_v, scale, batch.bias)
            out[batch.index] = part.transpose(1, 2)
            continue
        rows_k, rows_v = (x.repeat_interleave(groups, 1) for x in (rows_k, rows_v))
        part, part_weight = attend(rows_q, rows_k, rows_v, scale, bias=batch.bias)
        out[batch.index] = part.transpose(1, 2)
        weight[batch.index] = part_weight.transpose(1, 2).to(torch.float32)
    own, own_weight = out[:-1], weight[:-1]
    if layout.prefix is None:
        return own[None], None
    shared, shared_weight = _prefix_attention(module, query, key.shape[1], layout.prefix, scale)
    share = torch.sigmoid(shared_weight - own_weight).unsqueeze(-1).to(own.dtype)
    return torch.lerp(own, shared, share)[None], None


def _plainly(query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor) -> Tensor:
    """The same by two matrix products: faster than the kernel on short trees, q [B, H, L, D].

    Query heads that share a key head are stacked along the query axis.
    """
    rows, heads, length, width = query.shape
    key_heads = key.shape[1]
    hidden = bias.expand(rows, key_heads, length, length).reshape(-1, 1, length, length)
    hidden = hidden.expand(-1, heads // key_heads, -1, -1).reshape(rows * key_heads, -1, length)
    stacked = query.reshape(rows * key_heads, -1, width)
    keys, values = (x.reshape(-1, length, width) for x in (key, value))
    scores = torch.baddbmm(hidden, stacked, keys.transpose(1, 2), alpha=scale)
    return torch.bmm(scores.softmax(-1), values).view(rows, heads, length, width)


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


def _with_padding(x: Tensor) -> Tensor:
    """[1, H, T, D] -> [T + 1, H, D] with a row of zeros for padding to point at."""
    rows = x[0].transpose(0, 1)
    return torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, lambda **_: None)
