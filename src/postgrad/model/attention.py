"""Attention over packed documents: one mask specification (layout.py), several realisations.

- bucketed (buckets.py): documents of similar length gathered into one batched matrix product.
- flash: one scaled_dot_product_attention call per document.
- blocked window: a long document under a sliding window, a block of queries at a time.
- varlen, dense (attention_cuda.py): all documents in one call of a kernel on a CUDA device.

All compute `layout.reference_attention`, and `_realise` chooses among them. They are registered in
Transformers' `AttentionInterface`, so that any hub model uses them unchanged; what a model asks for
that none of them computes is refused by name.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

from postgrad.errors import ModelError
from postgrad.model.attention_cuda import (
    dense_attention,
    dense_pays,
    varlen_attention,
    varlen_kernel,
)
from postgrad.model.buckets import bucketed_attention
from postgrad.model.fused import fused_layers, own_layers
from postgrad.model.layout import Layout, layout_of_positions

NAME = "postgrad-packed"
"""What Transformers knows this attention by, followed by the limit: postgrad-packed-384."""
BUCKET_LIMIT = 384
"""Documents up to this many tokens are bucketed where nothing was measured (attention_probe.py)."""
WINDOW_BUCKETS = 512
"""Under a window, documents longer than this and than two windows are not bucketed: a bucket
computes all pairs, blocks of queries (`_blocked_window`) only those near the diagonal (LOG.md)."""
QUERY_BLOCK = 128
"""Queries that go through the blocked window together."""
REFUSED = (
    "s_aux",
    "sinks",
    "position_bias",
    "relative_position_bias",
    "alibi",
    "indices",
    "block_indices",
)
"""Keywords by which models ask for attention sinks, biases on the scores and sparse keys."""
REFUSED_MASKS = ("chunked", "blockwise", "or_mask", "bidirectional")
"""Parts of Transformers' mask functions that are more or less than causal with a window."""


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
    softcap: float | None = None,
    position_ids: Tensor | None = None,
    bucket_limit: int = BUCKET_LIMIT,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention function of Transformers' interface: q [B, H, S, D], k and v [B, K, S, D].

    Returns [B, S, H, D]. A packed row (B = 1) comes with a layout; layers that do not hand it on
    (StableLM) pass the positions, which say the same. Without either every row of the batch is one
    document, padded on the right.

    Raises:
        ModelError: the model asks for something that is not computed here.
    """
    _refuse(module, attention_mask, others)
    batch, heads, length, width = query.shape
    scale = float(scaling) if scaling is not None else width**-0.5
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if layout is None and batch == 1 and position_ids is not None:
        layout = layout_of_positions(position_ids[0].tolist())
    layout = layout or Layout((length,) * batch)
    layout = replace(layout, window=sliding_window)
    q, k, v = (
        x.transpose(1, 2).reshape(batch * length, x.shape[1], x.shape[3])
        for x in (query, key, value)
    )
    out = _realise(q, k, v, layout, scale, softcap, dropout, limit=bucket_limit)
    return out.view(batch, length, heads, v.shape[2]), None


def _refuse(module: Any, attention_mask: Tensor | None, others: dict[str, Any]) -> None:
    asked = [name for name in REFUSED if others.get(name) is not None]
    if False in (others.get("is_causal"), getattr(module, "is_causal", None)):
        asked.append("is_causal=False")
    if attention_mask is not None:
        asked.append("a mask of its own")
    if asked:
        raise _unsupported(f"{type(module).__name__} asks its attention for {', '.join(asked)}")


def _unsupported(what: str) -> ModelError:
    return ModelError(
        f"{what}, which training does not compute",
        "choose a model with plain causal attention (sliding windows and capped scores are fine)",
    )


def _realise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    scale: float,
    softcap: float | None,
    dropout: float,
    *,
    limit: int,
) -> Tensor:
    """The one place where a realisation is chosen: q [T, H, D], k and v [T, K, D] -> [T, H, D].

    Documents up to `limit` tokens are bucketed (none on a GPU), longer ones go to the flash kernel.
    Capped scores are bucketed at any length; dropout is left to torch.
    """
    if softcap is not None and dropout:
        raise _unsupported("the model drops out capped attention scores (attention_dropout)")
    if q.is_cuda and softcap is None and not dropout and not layout.shared_prefix:
        if dense_pays(q, layout):
            return dense_attention(q, k, v, layout, scale)
        if (kernel := varlen_kernel(q, layout)) is not None:
            return varlen_attention(kernel, q, k, v, layout, scale)
    if layout.ends is not None:  # what follows reads lengths, and keeps what it makes of them
        raise ModelError(
            "documents whose ends are on the device need the flash kernel for documents of any "
            "length, which does not take these queries",
            "set train.cuda_graphs to false",
        )
    if softcap is not None:
        return bucketed_attention(q, k, v, layout, layout.tokens, scale, softcap)
    if layout.window is not None:
        limit = min(limit, max(WINDOW_BUCKETS, 2 * layout.window))
    if dropout or q.device.type != "cpu" or min(layout.spans) > limit:
        return per_document_attention(q, k, v, layout, scale, dropout)
    short = bucketed_attention(q, k, v, layout, limit, scale, None)
    if max(layout.spans) <= limit:
        return short
    longer = _documents(q, k, v, layout)
    parts = torch.split(short, list(layout.lengths))
    return torch.cat(
        [
            bucketed
            if span <= limit
            else _document(*qkv, layout.window, scale, 0.0)[-len(bucketed) :]
            for span, qkv, bucketed in zip(layout.spans, longer, parts, strict=True)
        ]
    )


def per_document_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, dropout: float = 0.0
) -> Tensor:
    """One call of torch's kernel for each document: q [T, H, D], k and v [T, K, D] -> [T, H, D]."""
    alike = len(layout.lengths) > 1 and len(set(layout.lengths)) == 1
    if alike and layout.window is None and not layout.shared_prefix:
        shape = (len(layout.lengths), layout.lengths[0])
        q, k, v = (x.reshape(*shape, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        return _torch(q, k, v, None, scale, dropout).transpose(1, 2).flatten(0, 1)
    return torch.cat(
        [
            _document(*qkv, layout.window, scale, dropout)[-length:]
            for length, qkv in zip(layout.lengths, _documents(q, k, v, layout), strict=True)
        ]
    )


def _documents(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield q, k and v of each document, a shared prefix in front of its own tokens.

    The queries of the prefix are room only. What its keys and values get back from all documents is
    summed in float32.
    """
    parts = zip(*(torch.split(x, list(layout.lengths)) for x in (q, k, v)), strict=True)
    yield next(parts)
    if not layout.shared_prefix:
        yield from parts
        return
    room = torch.zeros_like(q[: layout.prefix])
    wide_k, wide_v = (x[: layout.prefix].float() for x in (k, v))
    for own_q, own_k, own_v in parts:
        yield (
            torch.cat([room, own_q]),
            torch.cat([wide_k.to(k.dtype), own_k]),
            torch.cat([wide_v.to(v.dtype), own_v]),
        )


def _document(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float, dropout: float
) -> Tensor:
    """Attention of one document [L, H, D]."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    if window is None or window >= q.shape[2]:
        out = _torch(q, k, v, None, scale, dropout)
    else:
        out = _blocked_window(q, k, v, window, scale, dropout)
    return out[0].transpose(0, 1)


def _blocked_window(
    q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, dropout: float
) -> Tensor:
    """[1, H, L, D]: each block of queries sees the keys from its first query's window on.

    Near-linear in L; a dense mask of the window is slower than no window at all, because the
    kernel then computes every block.
    """
    blocks = []
    for first in range(0, q.shape[2], QUERY_BLOCK):
        end, begin = min(first + QUERY_BLOCK, q.shape[2]), max(0, first - window + 1)
        mask = _band(end - first, end - begin, window, q.device)
        keys, values = k[:, :, begin:end], v[:, :, begin:end]
        blocks.append(_torch(q[:, :, first:end], keys, values, mask, scale, dropout))
    return torch.cat(blocks, dim=2)


@functools.lru_cache(maxsize=64)
def _band(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """[queries, keys] True where the last `queries` of `keys` tokens see a key."""
    own = torch.arange(keys - queries, keys, device=device).unsqueeze(1)
    distance = own - torch.arange(keys, device=device)
    return (distance >= 0) & (distance < window)


def _torch(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout: float
) -> Tensor:
    """Call torch's kernel, causal if there is no mask; q [B, H, S, D], k and v [B, K, S, D].

    On a CUDA device float32 has one kernel that keeps no scores, and it wants as many key heads as
    query heads.
    """
    if q.is_cuda and q.dtype == torch.float32:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=True,
    )


def _mask(*_: Any, mask_function: Callable[..., Any] | None = None, **__: Any) -> None:
    """Mask function of Transformers' interface: the layout says it all, so there is none.

    Raises:
        ModelError: the model's mask is not causal with a window.
    """
    for name in _parts(mask_function):
        if any(word in name for word in REFUSED_MASKS):
            raise _unsupported(f"the model asks for another mask ({name.split('.')[0]})")


def _parts(function: Any) -> Iterator[str]:
    """Names of a mask function and of those that it is made of."""
    if not callable(function):
        return
    yield getattr(function, "__qualname__", "")
    for cell in getattr(function, "__closure__", None) or ():
        inside = cell.cell_contents
        for part in inside if isinstance(inside, tuple) else (inside,):
            yield from _parts(part)


def is_ours(model: Any) -> bool:
    """Whether the model runs with this module's attention now."""
    return str(model.config._attn_implementation).startswith(f"{NAME}-")


@contextmanager
def training_attention(model: Any, bucket_limit: int | None = None) -> Iterator[None]:
    """Run the model with our attention and fused layers inside the block, its own outside.

    Documents up to `bucket_limit` tokens are bucketed; None = as in the block around this one.
    """
    before = model.config._attn_implementation
    try:
        if bucket_limit is not None or not is_ours(model):
            model.set_attn_implementation(_registered(bucket_limit))
            if works_ahead(model):
                _ask_for_masks(model)
                model.set_attn_implementation(_registered(bucket_limit, masks=False))
        with fused_layers(model):
            yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def own_attention(model: Any, attention: str) -> Iterator[None]:
    """Run the model with `attention` and its own layers inside the block, as when it is evaluated.

    `attention` is what the model had before `training_attention`.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation(attention)
    try:
        with own_layers(model):
            yield
    finally:
        model.set_attn_implementation(before)


def works_ahead(model: Any) -> bool:
    """Whether the model is on a device that the host should not wait for."""
    return bool(model.device.type == "cuda")


def _ask_for_masks(model: Any) -> None:
    """Run two tokens through the model: it asks for its masks, and `_mask` refuses what it must.

    Before it asks, Transformers looks for packed documents in the positions and waits for the
    device to find them, in every forward pass. After this one no mask function is registered: then
    it neither looks nor asks.
    """
    training = model.training
    model.eval()
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    try:
        with torch.no_grad():
            model.base_model(ids, use_cache=False)
    finally:
        model.train(training)


def _registered(bucket_limit: int | None, masks: bool = True) -> str:
    """Name of the attention with this limit; the limit travels in the name, so it is no state."""
    limit = BUCKET_LIMIT if bucket_limit is None else bucket_limit
    name = f"{NAME}-{limit}" if masks else f"{NAME}-{limit}-no-masks"
    AttentionInterface.register(name, functools.partial(packed_attention, bucket_limit=limit))
    if masks:
        AttentionMaskInterface.register(name, _mask)
    return name
