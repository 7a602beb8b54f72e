"""Attention over packed documents: one layout (small integer vectors), several realisations.

A packed row holds documents one after another; token i may attend to token j of the same document
with j <= i. The layout says where documents begin; no S x S mask is ever built. Realisations
compute the same function and are tested against `reference`:

- `bucketed`: documents of similar length gathered into one batched matrix product. Fastest below
  a few hundred tokens on a CPU, where flash kernels are slow in bf16, above all backward.
- `flash`: one scaled_dot_product_attention call per document.
- on a CUDA device: see attention_cuda.py.

Registered in Transformers' `AttentionInterface`, so that any hub model uses it unchanged.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface

from postgrad.model.attention_cuda import packed_attention_cuda
from postgrad.model.fused import fused_layers
from postgrad.model.kernels import call, usable

NAME = "postgrad"
BUCKET_LIMIT = 384
"""Documents up to this many tokens are bucketed, longer ones go to the flash kernel."""
LENGTH_MULTIPLE = 16
"""A bucket is padded to a multiple of this many tokens and holds a power of two of documents, so
that few distinct shapes occur in a run (see train.sft.ROW_MULTIPLE)."""
BUCKET_TOKENS = 2048
"""Padded tokens in one bucket: keeps the score matrices in the cache."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Documents of similar length as a rectangle [count, length] of token indices."""

    index: Tensor
    """[count, length] positions in the packed row; `tokens` (one past the end) where padded."""
    tokens: int
    """Tokens of the whole packed row."""
    padded: bool
    rows: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """Cache of `head_rows`."""

    @property
    def count(self) -> int:
        """Number of documents."""
        return self.index.shape[0]

    @property
    def length(self) -> int:
        """Tokens of the longest document."""
        return self.index.shape[1]

    def head_rows(self, heads: int, group: int) -> Tensor:
        """Return where each row of [count * heads / group, group * length, D] is in [T * heads, D].

        `group` query heads share a key head and are stacked along the query axis. Padding points
        one token past the end.
        """
        if (heads, group) not in self.rows:
            head = torch.arange(heads, device=self.index.device).view(1, -1, group, 1)
            rows = self.index.view(self.count, 1, 1, self.length) * heads + head
            self.rows[heads, group] = rows.reshape(-1)
        return self.rows[heads, group]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the documents of one packed row are, grouped for the realisations."""

    lengths: tuple[int, ...]
    buckets: tuple[Bucket, ...]
    long: tuple[tuple[int, int], ...]
    """(start, end) of the documents that go through the flash kernel."""


def make_layout(
    lengths: Sequence[int], bucket_limit: int = BUCKET_LIMIT, device: torch.device | None = None
) -> Layout:
    """Group documents of similar length into buckets, longer than `bucket_limit` left out.

    On a CUDA device one kernel takes all lengths, so there are none.
    """
    if device is not None and device.type == "cuda":
        return Layout(tuple(lengths), (), ())
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    long, short = [], []
    for number, length in enumerate(lengths):
        if length > bucket_limit:
            long.append((starts[number], starts[number + 1]))
        else:
            short.append(number)
    by_length: dict[int, list[int]] = {}
    for number in short:
        rounded = -(-lengths[number] // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        by_length.setdefault(rounded, []).append(number)
    buckets: list[Bucket] = []
    for longest, group in sorted(by_length.items()):
        while group:
            most = max(1, min(len(group), BUCKET_TOKENS // longest))
            count = 1 << (most.bit_length() - 1)
            buckets.append(_bucket(group[:count], longest, starts, lengths, device))
            group = group[count:]
    return Layout(tuple(lengths), tuple(buckets), tuple(long))


def _bucket(
    group: list[int],
    longest: int,
    starts: list[int],
    lengths: Sequence[int],
    device: torch.device | None,
) -> Bucket:
    begin = torch.tensor([starts[n] for n in group]).unsqueeze(1)
    size = torch.tensor([lengths[n] for n in group]).unsqueeze(1)
    offset = torch.arange(longest).unsqueeze(0)
    real = offset < size
    index = torch.where(real, begin + offset, starts[-1]).to(device)
    return Bucket(index, starts[-1], not bool(real.all()))


class _BucketAttention(torch.autograd.Function):
    """softmax(q kᵀ s) v for every bucket, with the gradient written out.

    q [T, H, D], k and v [T, K, D], H a multiple of K: the H / K query heads that share a key head
    are stacked along the query axis, so grouped-query attention needs no repeated keys. Padding
    stands behind every document, so the causal mask hides it from real queries; the gradient that
    reaches padded queries is zero, so they add nothing to any other.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, buckets: tuple[Bucket, ...], scale: float
    ) -> Tensor:
        tokens, group = len(q), q.shape[1] // k.shape[1]
        q, k, v = _with_padding_row(q), _with_padding_row(k), _with_padding_row(v)
        out = _room(q, buckets)
        probabilities = []
        for bucket in buckets:
            qb, kb, vb = _gather(q, bucket, group), _gather(k, bucket, 1), _gather(v, bucket, 1)
            p = _causal_softmax(torch.bmm(qb, kb.transpose(1, 2)), scale)
            probabilities.append(p)
            _scatter(out, torch.bmm(p, vb), bucket, group)
        ctx.save_for_backward(q, k, v, *probabilities)
        ctx.buckets, ctx.scale = buckets, scale
        return out[:tokens]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *probabilities = ctx.saved_tensors
        tokens, group, scale = len(grad), q.shape[1] // k.shape[1], ctx.scale
        dq, dk, dv = (_room(x, ctx.buckets) for x in (q, k, v))
        grad = _with_padding_row(grad)
        for bucket, p in zip(ctx.buckets, probabilities, strict=True):
            go, qb = _gather(grad, bucket, group), _gather(q, bucket, group)
            kb, vb = _gather(k, bucket, 1), _gather(v, bucket, 1)
            _scatter(dv, torch.bmm(p.transpose(1, 2), go), bucket, 1)
            ds = _causal_softmax_backward(torch.bmm(go, vb.transpose(1, 2)), p, scale)
            _scatter(dq, torch.bmm(ds, kb), bucket, group)
            _scatter(dk, torch.bmm(ds.transpose(1, 2), qb), bucket, 1)
        return dq[:tokens], dk[:tokens], dv[:tokens], None, None


def _with_padding_row(x: Tensor) -> Tensor:
    """[T, H, D] -> [T + 1, H, D], contiguous, the last token zero: what padding reads."""
    padded = x.new_empty(len(x) + 1, *x.shape[1:])
    padded[:-1] = x
    padded[-1] = 0
    return padded


def _room(like: Tensor, buckets: tuple[Bucket, ...]) -> Tensor:
    """Room for a result: zeros where no bucket will write (documents left to the flash kernel)."""
    covered = sum(bucket.index.numel() for bucket in buckets if not bucket.padded)
    return torch.empty_like(like) if covered == len(like) - 1 else torch.zeros_like(like)


def _gather(x: Tensor, bucket: Bucket, group: int) -> Tensor:
    """[T + 1, heads, D] -> [count * heads / group, group * length, D]."""
    heads, width = x.shape[1], x.shape[2]
    index = bucket.head_rows(heads, group)
    if usable(x):
        rows = x.new_empty(len(index), width)
        call("gather", x.dtype, x, index, rows, len(index), width)
    else:
        rows = x.view(-1, width).index_select(0, index)
    return rows.view(-1, group * bucket.length, width)


def _scatter(target: Tensor, rows: Tensor, bucket: Bucket, group: int) -> None:
    """Write rows [count * heads / group, group * length, D] back; padding goes past the end."""
    heads, width = target.shape[1], target.shape[2]
    index = bucket.head_rows(heads, group)
    if usable(target, rows):
        call("scatter", rows.dtype, rows, index, target, len(index), width)
    else:
        target.view(-1, width).index_copy_(0, index, rows.view(-1, width))


def _causal_softmax(scores: Tensor, scale: float) -> Tensor:
    """Turn scores [N, group * L, L] into probabilities in place; queries see no later key."""
    length = scores.shape[-1]
    if usable(scores):
        call("causal_softmax", scores.dtype, scores, scale, scores.numel() // length, length)
        return scores
    bias = _causal_bias(length, scores.shape[1] // length, scores.dtype, scores.device)
    return scores.mul_(scale).add_(bias).softmax(-1)


def _causal_softmax_backward(dp: Tensor, p: Tensor, scale: float) -> Tensor:
    """Return the gradient of the scores from that of the probabilities; may write over `dp`."""
    length = p.shape[-1]
    if usable(dp, p):
        rows = p.numel() // length
        call("causal_softmax_backward", p.dtype, dp, p, scale, rows, length)
        return dp
    return torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype).mul_(scale)  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=512)
def _causal_bias(length: int, repeat: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[repeat * length, length] zero on and below the diagonal, minus infinity above."""
    mask = torch.full((length, length), float("-inf"), dtype=dtype, device=device)
    return mask.triu_(1).repeat(repeat, 1)


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention function of Transformers' interface: q [1, H, T, D], k and v [1, K, T, D].

    Returns [1, T, H, D]. Without a layout every row of the batch is one document (causal, padded
    on the right, so that no mask is needed).
    """
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if layout is None:
        return _causal(query, key, value, scale, sliding_window).transpose(1, 2), None
    longest = max(layout.lengths)
    if query.is_cuda:
        fits = sliding_window is None or longest <= sliding_window
        window = None if fits else sliding_window
        return packed_attention_cuda(query, key, value, layout.lengths, scale, window), None
    if sliding_window is not None and longest > sliding_window:
        return _per_document(query, key, value, layout, scale, sliding_window), None
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if not layout.buckets:
        return _per_document(query, key, value, layout, scale, None), None
    out: Tensor = _BucketAttention.apply(  # type: ignore[no-untyped-call]
        q, k, v, layout.buckets, scale
    )
    pieces: list[tuple[int, Tensor]] = []
    for start, end in layout.long:
        part = (x[:, :, start:end] for x in (query, key, value))
        pieces.append((start, _causal(next(part), next(part), next(part), scale, None)))
    return (_place(out, pieces, layout) if pieces else out).unsqueeze(0), None


def _place(short: Tensor, pieces: list[tuple[int, Tensor]], layout: Layout) -> Tensor:
    """Put flash results [1, H, L, D] between the bucketed ones [T, H, D], in order."""
    parts, position = [], 0
    for start, piece in sorted(pieces, key=lambda item: item[0]):
        parts += [short[position:start], piece[0].transpose(0, 1)]
        position = start + piece.shape[2]
    return torch.cat([*parts, short[position : sum(layout.lengths)]])


def _per_document(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, window: int | None
) -> Tensor:
    sizes = list(layout.lengths)
    pieces = zip(*(torch.split(x, sizes, dim=2) for x in (query, key, value)), strict=True)
    out = torch.cat([_causal(q, k, v, scale, window) for q, k, v in pieces], dim=2)
    return out.transpose(1, 2)


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    """Causal attention of one document per batch row; q [B, H, S, D] -> [B, H, S, D]."""
    mask = None
    if window is not None and query.shape[2] > window:
        distance = torch.arange(query.shape[2], device=query.device)
        distance = distance.unsqueeze(1) - distance.unsqueeze(0)
        mask = (distance >= 0) & (distance < window)
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
    )


def reference_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scale: float
) -> Tensor:
    """The definition, with a dense mask and float64 softmax, for tests: [1, H, T, D] -> same."""
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(list(lengths)))
    order = torch.arange(sum(lengths))
    allowed = (document[:, None] == document[None, :]) & (order[:, None] >= order[None, :])
    scores = (query.double() @ key.double().transpose(-1, -2)) * scale
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    return (weights @ value.double()).to(query.dtype)


AttentionInterface.register(NAME, packed_attention)
# No mask function is registered: then Transformers makes no mask. With one, even one that returns
# None, it first looks for packed documents in the positions, and waits for the device to do so.


@contextmanager
def training_attention(model: Any) -> Iterator[None]:
    """Run the model with our attention and fused layers inside the block, its own outside."""
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        with fused_layers(model):
            yield
    finally:
        model.set_attn_implementation(before)
