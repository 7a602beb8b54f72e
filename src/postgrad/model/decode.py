"""How a batch of prompts advances one token at a time: two decoders with one interface.

`SharedDecoder` is for models whose layers all attend to everything before them. Keys and values
stand in buffers reserved once and written in place:

    shared prefix (once, batch 1) | rest of each prompt, padded on the right | generated tokens

Prompts are read packed, one behind the other without padding, and put into their rows. A query
attends to the prefix and to its own row separately and the two results are merged by their
log-sum-exp, so a prefix that all prompts share (system prompt, few-shot block) is neither computed
nor read once per row ("Cascade Inference", Ye et al., FlashInfer, 2024).

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

from postgrad.model.prompt_attention import PLAIN_SCORES, Pair, fits_together, read_together

NAME = "postgrad-decode"
PREFILL_TOKENS = {"cpu": 768}
"""Tokens of one pass over prompts by kind of device, `MOST_PREFILL_TOKENS` elsewhere. On a CPU more
would leave its caches, and rows of one pass are padded to the longest inside the attention."""
MOST_PREFILL_TOKENS = 8192
RESERVED_TOKENS = 64
"""Columns of a buffer for answers; as many again are added when they are full."""


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
    layers: tuple[Pair, ...]
    """Keys and values of each layer, [1, key heads, length, width]."""


@dataclass(frozen=True, slots=True)
class _Decoding:
    """What the attention of one forward pass must know; travels as a keyword argument."""

    prefix: Prefix | None
    bias: Tensor | None = None
    """[rows, 1, 1, columns] 0 or -inf on the row's own columns; None = all visible."""
    places: Pair | None = None
    """While packed prompts are read: row and column of each token, counted from the first row."""


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
        capacity = self._columns + min(room, RESERVED_TOKENS)
        self._layers = [_ReservedLayer(len(prompts), capacity) for _ in range(layers)]
        self._cache = Cache(layers=self._layers)
        self._bias: Tensor | None = None
        self._generated = 0

    def prefill(self) -> Tensor:
        """Read the prompts, some hundred or thousand tokens at a time; see `Decoder`."""
        sizes = self._lengths.tolist()
        most = PREFILL_TOKENS.get(self._lengths.device.type, MOST_PREFILL_TOKENS)
        logits, first = [], 0
        while first < len(sizes):
            end, tokens = first + 1, sizes[first]
            while end < len(sizes) and tokens + sizes[end] <= most:
                tokens += sizes[end]
                end += 1
            logits.append(self._read(first, end))
            first = end
        columns = torch.arange(self._layers[0].capacity, device=self._lengths.device)
        zero = torch.zeros(len(sizes), len(columns), dtype=logits[0].dtype, device=columns.device)
        hidden = columns >= self._lengths[:, None]
        self._bias = zero.masked_fill_(hidden, float("-inf"))[:, None, None, :]
        for layer in self._layers:
            layer.extend(len(sizes), self._columns)
        return torch.cat(logits)

    def step(self, tokens: Tensor) -> Tensor:
        """See `Decoder`."""
        assert self._bias is not None
        positions = self._start + self._lengths + self._generated
        column = self._columns + self._generated
        self._generated += 1
        if column == self._bias.shape[-1]:
            self._bias = functional.pad(self._bias, (0, RESERVED_TOKENS), value=float("-inf"))
        self._bias[..., column] = 0
        decoding = _Decoding(self._prefix, bias=self._bias)
        return self._forward(tokens[:, None], positions[:, None], decoding, 1)[:, -1]

    def keep(self, rows: Tensor) -> None:
        """See `Decoder`; only rows that change places are copied."""
        moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero()[:, 0]
        for layer in self._layers:
            layer.move(rows[moved], moved, len(rows))
        self._lengths = self._lengths[rows]
        assert self._bias is not None
        self._bias = self._bias[rows]

    def _read(self, first: int, end: int) -> Tensor:
        """Read prompts first ... end in one pass; return the logits after each."""
        packed = [token for prompt in self._prompts[first:end] for token in prompt]
        ids = torch.tensor(packed, device=self._lengths.device)
        lengths = self._lengths[first:end]
        ends = lengths.cumsum(0)
        rows = torch.repeat_interleave(lengths)
        columns = torch.arange(len(packed), device=ids.device) - (ends - lengths)[rows]
        for layer in self._layers:
            layer.place(slice(first, end), len(self._prompts[first]), (rows, columns))
        decoding = _Decoding(self._prefix, places=(rows, columns))
        return self._forward(ids[None], self._start + columns[None], decoding, ends - 1)[0]

    def _forward(
        self, ids: Tensor, positions: Tensor, decoding: _Decoding, logits_to_keep: Any
    ) -> Tensor:
        logits: Tensor = self._model(
            input_ids=ids,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=logits_to_keep,
            decoding=decoding,
        ).logits
        return logits


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
        self.selected, self.length = slice(0, rows), 0
        self._places: Pair | None = None
        self._buffers: Pair | None = None

    def place(self, rows: slice, length: int, places: Pair) -> None:
        """Next come packed tokens for these rows of up to `length` columns, each with its place."""
        self.selected, self.length, self._places = rows, length, places

    def extend(self, count: int, length: int) -> None:
        """Next comes one token after the other, behind `length` columns of the first rows."""
        self.selected, self.length, self._places = slice(0, count), length, None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Pair:
        """Write what comes next; return the selected rows.

        Of packed tokens the filled columns only; of single tokens all columns, those to come too:
        products of whole, contiguous buffers are several times faster than of their parts.
        """
        if self._buffers is None:
            self._buffers = self._reserve(key_states), self._reserve(value_states)
        if self._places is not None:
            for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
                rows = buffer[self.selected].transpose(1, 2)
                rows[self._places] = states[0].transpose(0, 1)
            keys, values = self._buffers
            return keys[self.selected, :, : self.length], values[self.selected, :, : self.length]
        if self.length == self._buffers[0].shape[2]:
            more = (0, 0, 0, RESERVED_TOKENS)
            keys, values = (functional.pad(buffer, more) for buffer in self._buffers)
            self._buffers = keys, values
        self.length += 1
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[self.selected, :, self.length - 1] = states[:, :, 0]
        keys, values = self._buffers
        return keys[self.selected], values[self.selected]

    def move(self, origin: Tensor, target: Tensor, count: int) -> None:
        """Copy rows `origin` onto rows `target` and go on with the first `count`."""
        assert self._buffers is not None
        for buffer in self._buffers:
            buffer[target, :, : self.length] = buffer[origin, :, : self.length]
        self.selected = slice(0, count)

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

    Query [B, H, S, D] -> [B, S, H, D]. Without `decoding`, and with packed prompts (B = 1), it is
    causal; a single token (S = 1) sees every column of its row that the bias leaves it. Packed
    prompts and single tokens see the whole prefix as well.
    """
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if decoding is None:
        return _causal(query, key, value, scale)[0].transpose(1, 2), None
    layer: int = module.layer_idx
    prefix = decoding.prefix.layers[layer] if decoding.prefix else None
    if decoding.places is None:
        return _last(query, key, value, scale, decoding.bias, prefix), None
    if fits_together(query, key, prefix):
        return read_together(query, key, value, scale, decoding.places, prefix), None
    own, own_weight = _packed(query, key, value, scale, decoding.places)
    if prefix is None:
        return own.transpose(1, 2), None
    shared, weight = _attend(query.reshape(1, key.shape[1], -1, query.shape[-1]), *prefix, scale)
    shared, weight = shared.view(own.shape), weight.view(own_weight.shape)
    share = torch.sigmoid(weight - own_weight).unsqueeze(-1).to(own.dtype)
    return torch.lerp(own, shared, share).transpose(1, 2), None


def _last(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    bias: Tensor | None,
    prefix: Pair | None,
) -> Tensor:
    """One token per row against the prefix and its row: query [B, H, 1, D] -> [B, 1, H, D].

    Query heads of one key head are stacked as positions; those of all rows for the prefix.
    """
    rows, heads, _, width = query.shape
    stacked = query.reshape(rows, key.shape[1], -1, width)
    scores = (stacked @ key.transpose(-1, -2)).float().mul_(scale)
    if bias is not None:
        scores += bias
    if prefix is None:
        weights = scores.softmax(-1).to(value.dtype)
        return (weights @ value).view(rows, 1, heads, -1)
    keys, values = (x[0] for x in prefix)
    grouped = stacked.transpose(0, 1).flatten(1, 2)
    before = (grouped @ keys.transpose(-1, -2)).float().mul_(scale)
    before = before.view(len(keys), rows, -1, keys.shape[1]).transpose(0, 1)
    weights = torch.cat([before, scores], -1).softmax(-1).to(value.dtype)
    first, own = weights[..., : keys.shape[1]], weights[..., keys.shape[1] :]
    shared = first.transpose(0, 1).flatten(1, 2) @ values
    shared = shared.view(len(keys), rows, -1, shared.shape[-1]).transpose(0, 1)
    out = own @ value + shared
    return out.reshape(rows, 1, heads, -1)


def _packed(query: Tensor, key: Tensor, value: Tensor, scale: float, places: Pair) -> Pair:
    """Packed query [1, H, T, D] against key and value of its rows [B, K, S, D], each row causal."""
    padded = query.new_zeros(len(key), key.shape[2], *query.shape[1::2])
    padded[places] = query[0].transpose(0, 1)
    out, weight = _causal(padded.transpose(1, 2), key, value, scale)
    out, weight = out.transpose(1, 2)[places], weight.transpose(1, 2)[places]
    return out.transpose(0, 1)[None], weight.transpose(0, 1)[None]


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Pair:
    """Rows padded on the right, S = T: causality hides the padding; heads as in `_attention`."""
    rows, heads, length, width = query.shape
    times = heads // key.shape[1]
    kernel = query.device.type == "cpu" and width == value.shape[-1]
    if not kernel or length * length <= PLAIN_SCORES:
        stacked = query.reshape(rows, -1, times * length, width)
        bias = _causal_bias(length, query.device).repeat(times, 1)
        out, weight = attend_plainly(stacked, key, value, scale, bias=bias)
        return out.reshape(rows, heads, length, -1), weight.reshape(rows, heads, length)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(  # type: ignore[no-any-return]
        query, _repeat(key, times), _repeat(value, times), 0.0, True, scale=scale
    )


def _repeat(x: Tensor, times: int) -> Tensor:
    """[B, K, T, D] -> [B, K * times, T, D], each head `times` times in a row."""
    rows, heads, length, width = x.shape
    return x[:, :, None].expand(-1, -1, times, -1, -1).reshape(rows, heads * times, length, width)


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Pair:
    """Attention to all keys, [B, H, S, D]; also the log of the softmax's denominator."""
    count = max(1, PLAIN_SCORES // key.shape[2])
    pieces = torch.split(query, count, dim=2)
    parts = [attend_plainly(piece, key, value, scale) for piece in pieces]
    outs, weights = zip(*parts, strict=True)
    return torch.cat(outs, 2), torch.cat(weights, 2)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    *,
    causal: bool = False,
    bias: Tensor | None = None,
) -> Pair:
    """The same with a mask: causal, or `bias`, added to the scores; by a kernel where one fits."""
    if query.device.type == "cpu" and query.shape[-1] == value.shape[-1]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(  # type: ignore[no-any-return]
            query, key, value, 0.0, causal, attn_mask=bias, scale=scale
        )
    if causal:
        bias = _causal_bias(query.shape[2], query.device)
    return attend_plainly(query, key, value, scale, bias=bias)


def _causal_bias(length: int, device: torch.device) -> Tensor:
    """[length, length] float32: zero on and below the diagonal, minus infinity above."""
    hidden = torch.ones(length, length, dtype=torch.bool, device=device).triu_(1)
    return torch.zeros(hidden.shape, device=device).masked_fill_(hidden, float("-inf"))


def attend_plainly(
    query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None = None
) -> Pair:
    """Return softmax(s q kᵀ + bias) v and the log of its denominator, float32 [B, H, S]."""
    scores = (query @ key.transpose(-1, -2)).float().mul_(scale)
    if bias is not None:
        scores += bias
    weight = torch.logsumexp(scores, -1)
    return scores.sub_(weight.unsqueeze(-1)).exp_().to(value.dtype) @ value, weight


def _device(model: Any) -> torch.device:
    device: torch.device = next(model.parameters()).device
    return device


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, lambda **_: None)
