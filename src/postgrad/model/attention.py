"""Attention over packed documents: one layout (small integer vectors), several realisations.

A packed row holds documents one after another; token i may attend to token j of the same document
with j <= i. The layout says where documents begin; no S x S mask is ever built. Realisations
compute the same function and are tested against `reference`:

- `bucketed`: documents of similar length gathered into one batched matrix product. Fastest below
  a few hundred tokens on a CPU, where flash kernels are slow in bf16, above all backward.
- `flash`: one scaled_dot_product_attention call per document.

Registered in Transformers' `AttentionInterface`, so that any hub model uses it unchanged.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "postgrad"
BUCKET_LIMIT = 320
"""Documents up to this many tokens are bucketed, longer ones go to the flash kernel."""
BUCKET_RATIO = 0.8
"""Shortest document of a bucket, as a share of its longest."""
BUCKET_TOKENS = 2048
"""Padded tokens in one bucket: keeps the score matrices in the cache."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Documents of similar length: rows [n, length] of token indices, padded with `pad`."""

    index: Tensor
    """[n * length] positions in the packed row; padding points at the row's first token."""
    real: Tensor | None
    """[n * length] True where not padding; None when nothing is padded."""
    count: int
    length: int


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
    """Group documents of similar length into buckets, longer than `bucket_limit` left out."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    long, short = [], []
    for number, length in enumerate(lengths):
        if length > bucket_limit:
            long.append((starts[number], starts[number + 1]))
        else:
            short.append(number)
    short.sort(key=lambda number: (-lengths[number], number))
    buckets: list[Bucket] = []
    group: list[int] = []
    for number in short:
        longest = lengths[group[0]] if group else 0
        full = (len(group) + 1) * longest > BUCKET_TOKENS
        if group and (full or lengths[number] < BUCKET_RATIO * longest - 8):
            buckets.append(_bucket(group, starts, lengths, device))
            group = []
        group.append(number)
    if group:
        buckets.append(_bucket(group, starts, lengths, device))
    return Layout(tuple(lengths), tuple(buckets), tuple(long))


def _bucket(
    group: list[int], starts: list[int], lengths: Sequence[int], device: torch.device | None
) -> Bucket:
    longest = lengths[group[0]]
    begin = torch.tensor([starts[n] for n in group]).unsqueeze(1)
    size = torch.tensor([lengths[n] for n in group]).unsqueeze(1)
    offset = torch.arange(longest).unsqueeze(0)
    real = offset < size
    index = torch.where(real, begin + offset, begin).reshape(-1).to(device)
    flat_real = None if bool(real.all()) else real.reshape(-1).to(device)
    return Bucket(index, flat_real, len(group), longest)


def _causal_bias(length: int, repeat: int, like: Tensor) -> Tensor:
    mask = torch.full((length, length), float("-inf"), dtype=like.dtype, device=like.device)
    return mask.triu_(1).repeat(repeat, 1)


class _BucketAttention(torch.autograd.Function):
    """softmax(q kᵀ s) v for every bucket, with the gradient written out.

    q [T, H, D], k and v [T, K, D], H a multiple of K: the H / K query heads that share a key head
    are stacked along the query axis, so grouped-query attention needs no repeated keys.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, buckets: tuple[Bucket, ...], scale: float
    ) -> Tensor:
        out = _blank(q, buckets)
        heads, kv_heads, width = q.shape[1], k.shape[1], q.shape[2]
        group = heads // kv_heads
        probabilities = []
        for bucket in buckets:
            qb = _gather_queries(q, bucket, kv_heads, group)
            kb = _gather(k, bucket)
            vb = _gather(v, bucket)
            scores = torch.baddbmm(
                _causal_bias(bucket.length, group, q), qb, kb.transpose(1, 2), alpha=scale
            )
            p = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
            probabilities.append(p)
            ob = torch.bmm(p, vb).view(bucket.count, kv_heads, group, bucket.length, width)
            _scatter(out, ob.permute(0, 3, 1, 2, 4).reshape(-1, heads, width), bucket)
        ctx.save_for_backward(q, k, v, out, *probabilities)
        ctx.buckets, ctx.scale = buckets, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *probabilities = ctx.saved_tensors
        dq, dk, dv = (_blank(x, ctx.buckets) for x in (q, k, v))
        heads, kv_heads, width = q.shape[1], k.shape[1], q.shape[2]
        group = heads // kv_heads
        row_sum = (grad.float() * out.float()).sum(-1, keepdim=True)
        for bucket, p in zip(ctx.buckets, probabilities, strict=True):
            go = _gather_queries(grad, bucket, kv_heads, group, zero_padding=True)
            delta = _gather_queries(row_sum, bucket, kv_heads, group, zero_padding=True)
            qb = _gather_queries(q, bucket, kv_heads, group)
            kb, vb = _gather(k, bucket), _gather(v, bucket)
            dvb = torch.bmm(p.transpose(1, 2), go)
            ds = torch.bmm(go, vb.transpose(1, 2)).float().sub_(delta).mul_(p).mul_(ctx.scale)
            ds = ds.to(q.dtype)
            dqb = torch.bmm(ds, kb).view(bucket.count, kv_heads, group, bucket.length, width)
            dkb = torch.bmm(ds.transpose(1, 2), qb)
            _scatter(dq, dqb.permute(0, 3, 1, 2, 4).reshape(-1, heads, width), bucket)
            for target, part in ((dk, dkb), (dv, dvb)):
                part = part.view(bucket.count, kv_heads, bucket.length, width)
                _scatter(target, part.transpose(1, 2).reshape(-1, kv_heads, width), bucket)
        return dq, dk, dv, None, None


def _blank(like: Tensor, buckets: tuple[Bucket, ...]) -> Tensor:
    """Room for a result: zeros where no bucket will write."""
    covered = sum(len(b.index) if b.real is None else int(b.real.sum()) for b in buckets)
    return torch.empty_like(like) if covered == len(like) else torch.zeros_like(like)


def _gather(x: Tensor, bucket: Bucket) -> Tensor:
    """[T, K, D] -> [n * K, L, D]."""
    rows = x.index_select(0, bucket.index).view(bucket.count, bucket.length, *x.shape[1:])
    return rows.transpose(1, 2).reshape(-1, bucket.length, x.shape[2])


def _gather_queries(
    x: Tensor, bucket: Bucket, kv_heads: int, group: int, zero_padding: bool = False
) -> Tensor:
    """[T, H, D] -> [n * K, G * L, D]: query heads that share a key head are stacked."""
    rows = x.index_select(0, bucket.index)
    if zero_padding and bucket.real is not None:
        rows = rows * bucket.real.view(-1, 1, 1)
    rows = rows.view(bucket.count, bucket.length, kv_heads, group, x.shape[2])
    return rows.permute(0, 2, 3, 1, 4).reshape(-1, group * bucket.length, x.shape[2])


def _scatter(target: Tensor, rows: Tensor, bucket: Bucket) -> None:
    """Write rows [n * L, heads, D] back to the packed row, padding left out."""
    if bucket.real is None:
        target.index_copy_(0, bucket.index, rows)
    else:
        target.index_copy_(0, bucket.index[bucket.real], rows[bucket.real])


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
AttentionMaskInterface.register(NAME, lambda **_: None)


@contextmanager
def training_attention(model: Any) -> Iterator[None]:
    """Run the model with our attention inside the block and its own outside."""
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
