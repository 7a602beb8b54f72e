"""How a batch of prompts advances one token at a time: two decoders with one interface.

`SharedDecoder` is for models whose layers all attend to everything before them. Keys and values
stand in buffers reserved once and written in place:

    shared prefix (once, batch 1) | rest of each prompt, padded on the right | generated tokens

A query attends to the prefix and to its own row separately and the two results are merged by their
log-sum-exp, so a prefix that all prompts share (system prompt, few-shot block) is neither computed
nor read once per row (cascade inference: Ye et al. 2024, "Cascade Inference", FlashInfer).

`PaddedDecoder` is for every other model (sliding windows, linear attention, soft-capping): left
padding, Transformers' own cache, masks and attention.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

NAME = "postgrad-decode"
PREFILL_TOKENS = 2048
"""Tokens of one forward pass over prompts: large enough for full speed, small for the cache."""

KeyValues = tuple[Tensor, Tensor]


class Decoder(Protocol):
    """A batch of prompts on its way; rows are numbered from 0 and renumbered by `keep`."""

    def prefill(self) -> Tensor:
        """Read the prompts; return the logits [rows, vocabulary] of each one's next token."""

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to each row; return the logits [rows, vocabulary] of the next."""

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only: row i becomes the row that was `rows[i]`."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """The tokens that all prompts of a batch begin with, computed once."""

    length: int
    layers: tuple[KeyValues, ...]
    """Keys and values of each layer, [1, key heads, length, width]."""


@dataclass(frozen=True, slots=True)
class _Decoding:
    """What the attention of one forward pass must know; travels as a keyword argument."""

    prefix: Prefix | None
    bias: Tensor | None
    """[rows, 1, 1, columns] 0 or -inf on the row's own columns; None = all visible."""


def can_share(model: Any) -> bool:
    """Return whether `SharedDecoder` computes what the model means.

    True when every layer attends to all earlier positions with a plain softmax through
    Transformers' attention interface, and caches the keys that its attention sees (latent
    attention does not).
    """
    config = model.config.get_text_config(decoder=True)
    layers = DynamicCache(config=model.config).layers
    return bool(
        model._supports_sdpa
        and model._supports_attention_backend
        and layers
        and all(type(layer) is DynamicLayer for layer in layers)
        and getattr(config, "attn_logit_softcapping", None) is None
        and getattr(config, "kv_lora_rank", None) is None
    )


def steady_length(model: Any) -> int | None:
    """Return the length beyond which a longer row would change the others; None = never.

    Some rotary embeddings (dynamic, longrope) rescale by the longest position of the batch.
    """
    config = model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") not in ("dynamic", "longrope"):
        return None
    return int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)


class SharedDecoder:
    """Decode with a shared prefix and reserved buffers; see the module."""

    def __init__(
        self, model: Any, prefix: Prefix | None, prompts: Sequence[Sequence[int]], room: int
    ) -> None:
        """Take the prompts without the prefix, longest first, and reserve `room` more columns."""
        self._model, self._prefix, self._prompts = model, prefix, prompts
        self._start = prefix.length if prefix else 0
        device = _device(model)
        self._lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self._columns = len(prompts[0])
        layers = len(DynamicCache(config=model.config).layers)
        self._layers = [_ReservedLayer(len(prompts), self._columns + room) for _ in range(layers)]
        self._cache = Cache(layers=self._layers)
        self._bias: Tensor | None = None
        self._generated = 0

    def prefill(self) -> Tensor:
        """Read the prompts, a few thousand tokens at a time; see `Decoder`."""
        logits, first = [], 0
        while first < len(self._prompts):
            rows = max(1, PREFILL_TOKENS // len(self._prompts[first]))
            logits.append(self._read(first, self._prompts[first : first + rows]))
            first += rows
        columns = torch.arange(self._layers[0].capacity, device=self._lengths.device)
        gap = (columns >= self._lengths[:, None]) & (columns < self._columns)
        if gap.any():
            zero = torch.zeros(gap.shape, dtype=logits[0].dtype, device=gap.device)
            self._bias = zero.masked_fill_(gap, float("-inf"))[:, None, None, :]
        for layer in self._layers:
            layer.select(0, len(self._prompts), self._columns)
        return torch.cat(logits)

    def step(self, tokens: Tensor) -> Tensor:
        """See `Decoder`."""
        positions = self._start + self._lengths + self._generated
        self._generated += 1
        bias = self._bias
        if bias is not None:
            bias = bias[..., : self._columns + self._generated]
        logits: Tensor = self._forward(tokens[:, None], positions[:, None], bias, 1)
        return logits[:, -1]

    def keep(self, rows: Tensor) -> None:
        """See `Decoder`; only rows that change places are copied."""
        moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero()[:, 0]
        for layer in self._layers:
            layer.move(rows[moved], moved, len(rows))
        self._lengths = self._lengths[rows]
        if self._bias is not None:
            self._bias = self._bias[rows]

    def _read(self, first: int, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Run prompts `first` and following, padded on the right: causality hides the padding."""
        longest = len(prompts[0])
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        ids = ids.to(self._lengths.device)
        for layer in self._layers:
            layer.select(first, len(prompts), 0)
        positions = self._start + torch.arange(longest, device=ids.device)
        last, where = torch.unique(
            self._lengths[first : first + len(prompts)] - 1, return_inverse=True
        )
        logits: Tensor = self._forward(ids, positions.expand(len(prompts), -1), None, last)
        return logits[torch.arange(len(prompts), device=ids.device), where]

    def _forward(
        self, ids: Tensor, positions: Tensor, bias: Tensor | None, logits_to_keep: Any
    ) -> Any:
        return self._model(
            input_ids=ids,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=logits_to_keep,
            decoding=_Decoding(self._prefix, bias),
        ).logits


class PaddedDecoder:
    """Decode any causal model: left padding, Transformers' own cache, masks and attention."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]]) -> None:
        """Take whole prompts, longest first."""
        self._model = model
        longest = len(prompts[0])
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        self._ids, self._mask = ids.to(_device(model)), mask.to(_device(model))
        self._cache = DynamicCache(config=model.config)
        names = signature(model.forward).parameters
        self._recurrent = "cache_params" in names
        self._takes_positions = "position_ids" in names

    def prefill(self) -> Tensor:
        """See `Decoder`."""
        return self._forward(self._ids, (self._mask.cumsum(-1) - 1).clamp_(min=0))

    def step(self, tokens: Tensor) -> Tensor:
        """See `Decoder`."""
        positions = self._mask.sum(-1, keepdim=True)
        self._mask = functional.pad(self._mask, (0, 1), value=1)
        return self._forward(tokens[:, None], positions)

    def keep(self, rows: Tensor) -> None:
        """See `Decoder`."""
        self._cache.reorder_cache(rows)
        self._mask = self._mask[rows]

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        inputs = {"input_ids": ids, "use_cache": True, "logits_to_keep": 1}
        if self._recurrent:
            inputs["cache_params"] = self._cache
        else:
            inputs["past_key_values"] = self._cache
        if ids.shape == self._mask.shape or not self._recurrent:
            inputs["attention_mask"] = self._mask
        if self._takes_positions:
            inputs["position_ids"] = positions
        logits: Tensor = self._model(**inputs).logits
        return logits[:, -1]


def read_prefix(model: Any, ids: Sequence[int]) -> Prefix:
    """Compute keys and values of a common beginning; call it inside `decoding_attention`."""
    cache = DynamicCache(config=model.config)
    tokens = torch.tensor([list(ids)], device=_device(model))
    positions = torch.arange(len(ids), device=tokens.device)[None]
    model(
        input_ids=tokens,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return Prefix(len(ids), tuple((layer.keys, layer.values) for layer in cache.layers))


@contextmanager
def decoding_attention(model: Any) -> Iterator[None]:
    """Run the model with the attention that `SharedDecoder` needs, and its own again afterwards."""
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


class _ReservedLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer in a buffer made once; tokens are written in place."""

    def __init__(self, rows: int, capacity: int) -> None:
        super().__init__()
        self.rows, self.capacity = rows, capacity
        self.first, self.count, self.length = 0, rows, 0
        self._buffers: KeyValues | None = None

    def select(self, first: int, count: int, length: int) -> None:
        """Work on rows first ... first + count, of which `length` columns are filled."""
        self.first, self.count, self.length = first, count, length

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> KeyValues:
        """Write the new columns; return all filled columns of the selected rows."""
        if self._buffers is None:
            self._buffers = self._reserve(key_states), self._reserve(value_states)
        begin, self.length = self.length, self.length + key_states.shape[2]
        rows = slice(self.first, self.first + self.count)
        keys, values = self._buffers
        keys[rows, :, begin : self.length] = key_states
        values[rows, :, begin : self.length] = value_states
        return keys[rows, :, : self.length], values[rows, :, : self.length]

    def move(self, origin: Tensor, target: Tensor, count: int) -> None:
        """Copy rows `origin` onto rows `target` and go on with the first `count`."""
        assert self._buffers is not None
        for buffer in self._buffers:
            buffer[target, :, : self.length] = buffer[origin, :, : self.length]
        self.count = count

    def get_seq_length(self) -> int:
        """Return the number of filled columns."""
        return self.length

    def _reserve(self, like: Tensor) -> Tensor:
        # zeros: a hidden column has weight 0, and 0 times whatever memory holds may be NaN
        return like.new_zeros(self.rows, like.shape[1], self.capacity, like.shape[3])


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    decoding: _Decoding | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention function of Transformers' interface.

    Query [B, H, S, D], key and value [B, K, T, D] -> [B, S, H, D]. Several queries at once are
    prompts, causal and S = T; a single one sees every column that `decoding.bias` leaves it. Both
    see the whole prefix as well.
    """
    rows, heads, length, width = query.shape
    scale = scaling if scaling is not None else width**-0.5
    key_heads, prefix = key.shape[1], decoding.prefix if decoding else None
    if length > 1:
        assert length == key.shape[2], "prompts are read in one pass"
        key, value = (_repeat(x, heads // key_heads) for x in (key, value))
        own, own_weight = _attend(query, key, value, scale, causal=True)
    else:
        stacked = query.reshape(rows, key_heads, heads // key_heads, width)
        bias = decoding.bias if decoding else None
        own, own_weight = _attend(stacked, key, value, scale, bias=bias)
        own, own_weight = own.reshape(rows, heads, 1, -1), own_weight.reshape(rows, heads, 1)
    if prefix is None:
        return own.transpose(1, 2), None
    grouped = query.reshape(rows, key_heads, -1, width).transpose(0, 1)
    grouped = grouped.reshape(1, key_heads, -1, width)
    shared, weight = _attend(grouped, *prefix.layers[module.layer_idx], scale)
    shared = shared.view(key_heads, rows, -1, own.shape[-1]).transpose(0, 1).reshape(own.shape)
    weight = weight.view(key_heads, rows, -1).transpose(0, 1).reshape(own_weight.shape)
    share = torch.sigmoid(weight - own_weight).unsqueeze(-1).to(query.dtype)
    return torch.lerp(own, shared, share).transpose(1, 2), None


def _repeat(x: Tensor, times: int) -> Tensor:
    """[B, K, T, D] -> [B, K * times, T, D], each head `times` times in a row."""
    rows, heads, length, width = x.shape
    return x[:, :, None].expand(-1, -1, times, -1, -1).reshape(rows, heads * times, length, width)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    *,
    causal: bool = False,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return softmax(q kᵀ) v and the log of the softmax's denominator, float32 [B, H, S]."""
    if query.device.type == "cpu" and query.shape[-1] == value.shape[-1]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(  # type: ignore[no-any-return]
            query, key, value, 0.0, causal, attn_mask=bias, scale=scale
        )
    return attend_plainly(query, key, value, scale, causal=causal, bias=bias)


def attend_plainly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    *,
    causal: bool = False,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same by matrix products, for devices without a kernel that returns the denominator."""
    scores = (query @ key.transpose(-1, -2)).float() * scale
    if bias is not None:
        scores = scores + bias
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
        scores = scores.masked_fill_(hidden, float("-inf"))
    weight = torch.logsumexp(scores, -1)
    return (scores - weight.unsqueeze(-1)).exp_().to(value.dtype) @ value, weight


def _device(model: Any) -> torch.device:
    device: torch.device = next(model.parameters()).device
    return device


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, lambda **_: None)
