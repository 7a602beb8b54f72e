"""Attention of documents of similar length in one batched matrix product, for CPUs.

The fastest realisation up to several hundred tokens: flash kernels for CPUs are slow in bf16 on
short documents, above all backward (LOG.md). Documents are gathered into rectangles (`Bucket`);
the gradient is written out.
"""

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from postgrad.model.kernels import call, usable
from postgrad.model.layout import Layout
from postgrad.model.short_attention import fits, short_attention

LENGTH_MULTIPLE = 16
"""A bucket is padded to a multiple of this many tokens and holds a power of two of documents, so
that few distinct shapes occur in a run (see train.sft.ROW_MULTIPLES)."""
BUCKET_TOKENS = 2048
"""Padded tokens in one bucket: keeps the score matrices in the cache."""
KEPT_LENGTH = 384
"""Buckets up to this length keep their probabilities for the backward pass; longer ones compute
them again, because they grow with the square of the length."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Documents of similar length as a rectangle [count, length] of token indices."""

    index: Tensor
    """[count, length] positions in the packed row of the documents' own tokens; one past the end
    where padded, and where a shared prefix stands, which is not asked again in each."""
    keys: Tensor
    """[count, length] the same with the shared prefix: what the documents see. In trees of tokens
    (token_tree.py), whose queries have no padding for it, the prefix stands in front."""
    own: int
    """Own tokens of the documents."""
    prefix: int = 0
    """Tokens of the shared prefix in front of each."""
    rows: dict[tuple[int, int, bool], Tensor] = field(default_factory=dict)
    """Cache of `head_rows`."""

    @property
    def count(self) -> int:
        """Number of documents."""
        return self.index.shape[0]

    @property
    def length(self) -> int:
        """Tokens of the longest document."""
        return self.index.shape[1]

    def head_rows(self, heads: int, group: int, keys: bool = False) -> Tensor:
        """Return where each row of [count * heads / group, group * length, D] is in [T * heads, D].

        `group` query heads share a key head and are stacked along the query axis. Padding points
        one token past the end. `keys`: with the shared prefix.
        """
        if (heads, group, keys) not in self.rows:
            index = self.keys if keys else self.index
            head = torch.arange(heads, device=index.device).view(1, -1, group, 1)
            rows = index.view(self.count, 1, 1, -1) * heads + head
            self.rows[heads, group, keys] = rows.reshape(-1)
        return self.rows[heads, group, keys]


@functools.lru_cache(maxsize=16)
def make_buckets(
    layout: Layout, limit: int, device: torch.device | None = None
) -> tuple[Bucket, ...]:
    """Group documents of similar length, those longer than `limit` left out.

    Every layer of a step asks for the same buckets, hence the cache.
    """
    starts = [0]
    for length in layout.lengths:
        starts.append(starts[-1] + length)
    by_length: dict[tuple[int, int], list[int]] = {}
    for number, length in enumerate(layout.spans):
        if length <= limit:
            rounded = -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
            before = layout.prefix if number else 0  # the prefix itself has a bucket of its own
            by_length.setdefault((rounded, before), []).append(number)
    buckets: list[Bucket] = []
    for (longest, before), group in sorted(by_length.items()):
        while group:
            most = max(1, min(len(group), BUCKET_TOKENS // longest))
            count = 1 << (most.bit_length() - 1)
            buckets.append(_bucket(group[:count], longest, starts, before, device))
            group = group[count:]
    return tuple(buckets)


def _bucket(
    group: list[int], longest: int, starts: list[int], prefix: int, device: torch.device | None
) -> Bucket:
    begin = torch.tensor([starts[n] for n in group]).unsqueeze(1)
    size = torch.tensor([starts[n + 1] - starts[n] for n in group]).unsqueeze(1)
    offset = torch.arange(longest).unsqueeze(0)
    real = (offset >= prefix) & (offset < prefix + size)
    index = torch.where(real, begin + offset - prefix, starts[-1])
    keys = torch.where(offset < prefix, offset, index)
    return Bucket(index.to(device), keys.to(device), int(size.sum()), prefix)


@dataclass(frozen=True, slots=True)
class Scores:
    """How scores become probabilities: softmax(cap(scale q kᵀ)) over what is visible."""

    scale: float
    window: int | None = None
    softcap: float | None = None

    def probabilities(self, q: Tensor, k: Tensor) -> Tensor:
        """[N, group * L, D] and [N, L, D] -> [N, group * L, L], zero where nothing is visible."""
        scores = torch.bmm(q, k.transpose(1, 2))
        if self.softcap is None:
            return causal_softmax(scores, self.scale, self.window)
        capped = scores.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap)
        return causal_softmax(capped, 1.0, self.window)

    def backward(self, dp: Tensor, p: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Return the gradient of q kᵀ from that of the probabilities; may write over `dp`."""
        if self.softcap is None:
            return causal_softmax_backward(dp, p, self.scale, self.window)
        capped = torch.bmm(q, k.transpose(1, 2)).mul_(self.scale / self.softcap).tanh_()
        slope = capped.square_().neg_().add_(1.0)
        return causal_softmax_backward(dp, p, self.scale, self.window).mul_(slope)


def bucketed_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, limit: int, scale: float, softcap: float | None
) -> Tensor:
    """Attention of the documents up to `limit` tokens; zeros where longer ones stand.

    q [T, H, D], k and v [T, K, D], H a multiple of K -> [T, H, D].
    """
    if softcap is None and fits(q, k, v, layout, limit):
        return short_attention(q, k, v, layout, limit, scale)
    buckets = make_buckets(layout, limit, q.device)
    scores = Scores(scale, layout.window, softcap)
    return _BucketAttention.apply(q, k, v, buckets, scores)  # type: ignore[no-untyped-call,no-any-return]


class _BucketAttention(torch.autograd.Function):
    """softmax(q kᵀ s) v for every bucket, with the gradient written out.

    The H / K query heads that share a key head are stacked along the query axis, so grouped-query
    attention needs no repeated keys. Padding stands behind every document, so the causal mask
    hides it from real queries; the gradient that reaches padded queries is zero, so they add
    nothing to any other. A shared prefix is read by every document as keys and values, its queries
    are padding there; the gradients that it gets from all documents are summed in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, buckets: tuple[Bucket, ...], scores: Scores
    ) -> Tensor:
        tokens, group = len(q), q.shape[1] // k.shape[1]
        q, k, v = with_padding_row(q), with_padding_row(k), with_padding_row(v)
        out = _room(q, buckets)
        kept = []
        for bucket in buckets:
            qb, kb, vb = gather_heads(q, bucket, group), _seen(k, bucket), _seen(v, bucket)
            p = scores.probabilities(qb, kb)
            kept.append(p if bucket.length <= KEPT_LENGTH else None)
            scatter_heads(out, torch.bmm(p, vb), bucket, group)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.buckets, ctx.scores = buckets, scores
        return out[:tokens]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        tokens, group, scores = len(grad), q.shape[1] // k.shape[1], ctx.scores
        dq, dk, dv = (_room(x, ctx.buckets) for x in (q, k, v))
        shared_k, shared_v = (_SharedPrefix(x, ctx.buckets) for x in (dk, dv))
        grad = with_padding_row(grad)
        for bucket, p in zip(ctx.buckets, kept, strict=True):
            go, qb = gather_heads(grad, bucket, group), gather_heads(q, bucket, group)
            kb, vb = _seen(k, bucket), _seen(v, bucket)
            p = scores.probabilities(qb, kb) if p is None else p
            dvb = torch.bmm(p.transpose(1, 2), go)
            scatter_heads(dv, dvb, bucket, 1)
            shared_v.add(dvb, bucket)
            ds = scores.backward(torch.bmm(go, vb.transpose(1, 2)), p, qb, kb)
            scatter_heads(dq, torch.bmm(ds, kb), bucket, group)
            dkb = torch.bmm(ds.transpose(1, 2), qb)
            scatter_heads(dk, dkb, bucket, 1)
            shared_k.add(dkb, bucket)
        shared_k.settle()
        shared_v.settle()
        return dq[:tokens], dk[:tokens], dv[:tokens], None, None


def with_padding_row(x: Tensor) -> Tensor:
    """[T, H, D] -> [T + 1, H, D], contiguous, the last token zero: what padding reads."""
    padded = x.new_empty(len(x) + 1, *x.shape[1:])
    padded[:-1] = x
    padded[-1] = 0
    return padded


class _SharedPrefix:
    """The gradient of keys or values at a shared prefix: what every document sends there."""

    def __init__(self, target: Tensor, buckets: tuple[Bucket, ...]) -> None:
        """Take the [T + 1, K, D] gradient that the sum is added to in the end."""
        self.target, prefix = target, max((bucket.prefix for bucket in buckets), default=0)
        self.sum = target.new_zeros(target.shape[1], prefix, target.shape[2], dtype=torch.float32)

    def add(self, rows: Tensor, bucket: Bucket) -> None:
        """Add rows [count * K, length, D] of a bucket whose documents have the prefix."""
        if bucket.prefix:
            heads, prefix, width = self.sum.shape
            by_document = rows.view(bucket.count, heads, -1, width)[:, :, :prefix]
            self.sum += by_document.sum(0, dtype=torch.float32)

    def settle(self) -> None:
        """Add the sum to the target."""
        if self.sum.numel():
            self.target[: self.sum.shape[1]] += self.sum.transpose(0, 1).to(self.target.dtype)


def _room(like: Tensor, buckets: tuple[Bucket, ...]) -> Tensor:
    """Room for a result: zeros where no bucket will write (longer documents)."""
    covered = sum(bucket.own for bucket in buckets)
    return torch.empty_like(like) if covered == len(like) - 1 else torch.zeros_like(like)


def _seen(x: Tensor, bucket: Bucket) -> Tensor:
    """Gather keys or values [T + 1, K, D] with the shared prefix -> [count * K, length, D]."""
    return gather_heads(x, bucket, 1, keys=True)


def gather_heads(x: Tensor, bucket: Bucket, group: int, keys: bool = False) -> Tensor:
    """[T + 1, heads, D] -> [count * heads / group, group * length, D].

    `keys`: what the bucket's documents see, which may be of another length.
    """
    heads, width = x.shape[1], x.shape[2]
    index = bucket.head_rows(heads, group, keys)
    if usable(x):
        rows = x.new_empty(len(index), width)
        call("gather", x.dtype, x, index, rows, len(index), width)
    else:
        rows = x.view(-1, width).index_select(0, index)
    return rows.view(bucket.count * heads // group, -1, width)


def scatter_heads(target: Tensor, rows: Tensor, bucket: Bucket, group: int) -> None:
    """Write rows [count * heads / group, group * length, D] back; padding goes past the end."""
    heads, width = target.shape[1], target.shape[2]
    index = bucket.head_rows(heads, group)
    if usable(target, rows):
        call("scatter", rows.dtype, rows, index, target, len(index), width)
    else:
        target.view(-1, width).index_copy_(0, index, rows.view(-1, width))


def causal_softmax(scores: Tensor, scale: float, window: int | None = None) -> Tensor:
    """Turn scores [N, group * L, L] into probabilities in place.

    Query i of L sees the keys j with 0 <= i - j < window (no window: all of the past).
    """
    length = scores.shape[-1]
    visible = min(window or length, length)
    if usable(scores):
        rows = scores.numel() // length
        call("causal_softmax", scores.dtype, scores, scale, rows, length, visible)
        return scores
    bias = _bias(length, visible, scores.dtype, scores.device)
    by_head = scores.mul_(scale).view(len(scores), -1, length, length)
    return by_head.add_(bias).softmax(-1).view_as(scores)


def causal_softmax_backward(
    dp: Tensor, p: Tensor, scale: float, window: int | None = None
) -> Tensor:
    """Return the gradient of the scores from that of the probabilities; may write over `dp`."""
    length = p.shape[-1]
    if usable(dp, p):
        rows, visible = p.numel() // length, min(window or length, length)
        call("causal_softmax_backward", p.dtype, dp, p, scale, rows, length, visible)
        return dp
    return torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype).mul_(scale)  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=16)
def _bias(length: int, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[length, length] zero where a key is visible, minus infinity elsewhere."""
    hidden = torch.full((length, length), float("-inf"), dtype=dtype, device=device)
    return hidden.triu(1) + hidden.tril(-window)
