"""Pre-flight probes on the loaded model: a few of the user's own rows go through it.

Nothing is changed: gradients are removed, the mode and the random state are put back.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from postgrad.config import TrainConfig
from postgrad.data.batches import micro_batches
from postgrad.data.render import Rendering
from postgrad.model.attention import BUCKET_LIMIT, is_ours, training_attention
from postgrad.model.fused import own_layers
from postgrad.model.lora import eight_bit_weights
from postgrad.model.transfer import on_device
from postgrad.train.objective import Objective
from postgrad.train.preflight.device import eight_bit_near, graphs_match
from postgrad.train.preflight.measured import (
    TOLERANCES,
    Measured,
    Tolerance,
    compare,
    measure,
    objective_losses,
)
from postgrad.train.preflight.memory import fits_in_memory
from postgrad.train.sft import model_inputs
from postgrad.types import Batch, Check, Tokens

PROBE_ROWS = 4
PROBE_TOKENS = 96
"""Tokens of a row that go through a probe: its beginning, and its end, where the answer is."""
BEGINNING = 16
"""Tokens of them that are the beginning."""
LONG_PROBE_TOKENS = BUCKET_LIMIT + 16
"""Tokens of the first probe row at least, if the user's rows are so long."""


def check_model(
    model: Any,
    objective: Objective,
    renderings: Sequence[Rendering],
    config: TrainConfig,
    *,
    micro_batch_tokens: int,
    precision: torch.dtype,
) -> tuple[Check, ...]:
    """Run every probe on the model that is about to be trained, adapters attached.

    Args:
        model: as `fit` gets it.
        objective: as `fit` gets it.
        renderings: the rows that will be used (`keep_usable`), all with tokens.
        config: the recipe's `train` section.
        micro_batch_tokens: the resolved size of a forward pass.
        precision: what matrix products are computed in; decides the tolerances.
    """
    long_tokens = long_probe_tokens(renderings, config)
    rows = probe_rows(renderings, long_tokens)
    tolerance = TOLERANCES.get(precision, TOLERANCES[torch.bfloat16])
    with undisturbed(model):
        share = bool(getattr(objective, "share_prefix", False))
        isolation = packing_isolation(model, rows, config.packing, long_tokens, share)
        packed = bool(isolation.data["packed"])
        with training_attention(model):
            ours = measure(model, objective_losses(model, objective, rows, packed), rows)
        # memory of batches in which no beginning is shared: a row may begin otherwise
        apart: Any = replace(cast(Any, objective), share_prefix=False) if share else objective
        return (
            untrained_token_ids(model, renderings),
            context_length(model, renderings),
            isolation,
            loss_matches_reference(model, ours, rows, tolerance),
            accumulation_invariance(model, objective, ours, rows, tolerance),
            *(
                [shared_prefix_matches(model, objective, apart, rows, tolerance)]
                if share and packed
                else []
            ),
            *(
                [eight_bit_near(model, apart, rows, packed, config.base_precision)]
                if eight_bit_weights(model)
                else []
            ),
            *(
                [graphs_match(model, cast(Any, objective), rows, tolerance)]
                if config.cuda_graphs is True and packed
                else []
            ),
            fits_in_memory(model, apart, renderings, micro_batch_tokens, packed),
        )


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Put mode, random state and gradients back after the block."""
    was_training = model.training
    model.eval()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        model.train(was_training)
        model.zero_grad(set_to_none=True)


def long_probe_tokens(renderings: Sequence[Rendering], config: TrainConfig) -> int:
    """Return how long the first probe row is.

    Long documents may take another realisation of attention, which must agree as well.
    """
    limit = config.attention_bucket_tokens
    longest = max(len(r.tokens) for r in renderings if r.tokens is not None)
    if limit == "auto" or limit >= longest:
        return LONG_PROBE_TOKENS
    return max(LONG_PROBE_TOKENS, limit + 16)


def probe_rows(
    renderings: Sequence[Rendering], long_tokens: int = LONG_PROBE_TOKENS
) -> list[Tokens]:
    """Choose rows of about median length and take the end of each; never fewer than two."""
    rows = [r.tokens for r in renderings if r.tokens is not None and r.tokens.supervised > 0]
    assert rows, "rows without supervised tokens are refused before"
    median = float(np.median([len(row) for row in rows]))
    chosen = sorted(rows, key=lambda row: abs(len(row) - median))[:PROBE_ROWS]
    longest = max(rows, key=len)
    if len(longest) > long_tokens - 16:
        chosen = [longest, *chosen[: PROBE_ROWS - 1]]
    if len(chosen) == 1:
        chosen *= 2
    limits = [long_tokens, *[PROBE_TOKENS] * (len(chosen) - 1)]
    ends = [_ends(row, limit) for row, limit in zip(chosen, limits, strict=True)]
    return [replace(row, example_id=f"probe-{n}") for n, row in enumerate(ends)]


def _ends(row: Tokens, limit: int) -> Tokens:
    """Cut a row to `limit` tokens: its beginning, and its last supervised token and those before.

    The beginning is what rows have in common, and what is computed for all of them at once.
    """
    last = int(np.flatnonzero(row.weights)[-1]) + 1
    if last <= limit:
        return Tokens(row.ids[:last], row.weights[:last], row.example_id)
    begin = min(BEGINNING, limit // 2)
    first = last - (limit - begin)
    weights = np.concatenate([row.weights[:begin], row.weights[first:last]])
    weights[[0, begin]] = 0
    ids = np.concatenate([row.ids[:begin], row.ids[first:last]])
    return Tokens(ids, weights, row.example_id)


def untrained_token_ids(model: Any, renderings: Sequence[Rendering]) -> Check:
    """Every token of the rows has an embedding that pre-training has moved.

    An untrained row of the embedding matrix is (nearly) zero, or (nearly) the mean of all rows, as
    new tokens are initialised; a frozen one stays so. Ids outside the matrix would crash.
    """
    name = "untrained-token-ids"
    used = _used_ids(renderings)
    weight = model.get_input_embeddings().weight
    beyond = used[used >= len(weight)]
    if len(beyond):
        sources = _sources(renderings, set(beyond.tolist()))
        return Check(
            name,
            False,
            f"{len(beyond)} token ids of the rows are not in the model's vocabulary of "
            f"{len(weight)} (the largest: {int(beyond.max())})",
            "the tokenizer does not belong to this model: load both from one place",
            sources[:24],
            len(sources),
        )
    if weight.requires_grad:
        return Check(name, True, f"the embeddings of all {len(used)} ids used are trained along")
    unmoved = used[_unmoved(weight)[torch.from_numpy(used)].cpu().numpy()]
    if not len(unmoved):
        return Check(name, True, f"all {len(used)} token ids used have trained embeddings")
    sources = _sources(renderings, set(unmoved.tolist()))
    shown = ", ".join(map(str, unmoved[:10].tolist()))
    return Check(
        name,
        False,
        f"{len(unmoved)} token ids of the rows have untrained embeddings (ids {shown})",
        "use a chat template whose tokens the model knows (model.chat_template), the instruct "
        "sibling of this base model, or full tuning (model.adapt: {kind: full})",
        sources[:24],
        len(sources),
        data={"ids": unmoved[:100].tolist()},
    )


def _unmoved(weight: Tensor) -> Tensor:
    """[V] True where an embedding is within 2 % of zero or of the mean embedding."""
    mean = weight.detach().mean(0, dtype=torch.float32)
    norms, distances = [], []
    for part in torch.split(weight.detach(), 8192):
        norms.append(part.float().norm(dim=1))
        distances.append((part.float() - mean).norm(dim=1))
    norm, distance = torch.cat(norms), torch.cat(distances)
    return (norm < 0.02 * norm.median()) | (distance < 0.02 * distance.median())


def _used_ids(renderings: Sequence[Rendering]) -> Any:
    return np.unique(np.concatenate([r.tokens.ids for r in renderings if r.tokens is not None]))


def _sources(renderings: Sequence[Rendering], ids: set[int]) -> tuple[str, ...]:
    found = (r for r in renderings if r.tokens is not None and ids & set(r.tokens.ids.tolist()))
    return tuple(rendering.example.source for rendering in found)


def context_length(model: Any, renderings: Sequence[Rendering]) -> Check:
    """No row is longer than the positions that the model knows."""
    name = "context-length"
    known = getattr(model.config, "max_position_embeddings", None)
    lengths = [(len(r.tokens), r.example.source) for r in renderings if r.tokens is not None]
    longest = max(length for length, _ in lengths)
    if not known or longest <= known:
        return Check(name, True, f"the longest row has {longest} tokens, the model takes {known}")
    over = tuple(source for length, source in lengths if length > known)
    return Check(
        name,
        False,
        f"{len(over)} rows are longer than the {known} positions of the model ({longest} tokens)",
        f"set data.max_length to {known} and data.on_overlength to drop or truncate",
        over[:24],
        len(over),
    )


def packing_isolation(
    model: Any,
    rows: Sequence[Tokens],
    packing: str,
    long_tokens: int = LONG_PROBE_TOKENS,
    share: bool = False,
) -> Check:
    """Change one token of a packed document: nothing in the other documents may move.

    `share`: as documents are laid out that have their beginning in common.

    `data["packed"]` says whether rows may be packed. When documents see each other and
    `train.packing` is auto, each gets a row of its own; with `on` the check refuses.
    """
    name = "packing-isolation"
    if packing == "off":
        return Check(name, True, "each document has a row of its own", data={"packed": False})
    try:
        moved, others, control = _perturb(model, rows, long_tokens, share)
    except (TypeError, ValueError, RuntimeError) as error:
        moved, others, control = 1, 1, 1
        found = f"this model does not take packed rows ({_first_line(error)})"
    else:
        found = f"{moved} of {others} positions of other documents moved with one changed token"
    figures = {"moved": moved, "positions": others, "control": control}
    if control == 0:
        found, moved = "the probe has no effect even inside its own document", others
    if moved == 0:
        detail = f"documents do not see each other: 0 of {others} positions moved"
        return Check(name, True, detail, data={"packed": True, **figures})
    if packing == "auto":
        detail = f"{found}: each document gets a row of its own"
        return Check(name, True, detail, data={"packed": False, **figures})
    remedy = "set train.packing to auto or off"
    return Check(name, False, found, remedy, failures=moved, data={"packed": True, **figures})


def _perturb(
    model: Any, rows: Sequence[Tokens], long_tokens: int, share: bool
) -> tuple[int, int, int]:
    """Return positions of other documents that moved, how many there are, and own ones that moved.

    The first document is long enough for the realisation of attention that long ones take. Its last
    token and that of the second are changed: nothing is nearer to the next document, and a leak
    through a short convolution reaches no further. What two equal runs differ in is noise.
    """
    long = np.resize(rows[0].ids, long_tokens)
    documents = [Tokens(long, np.zeros(len(long), np.float32), "probe-long")]
    documents += [_ends(row, 32) for row in rows[:3]]
    batch = micro_batches(documents, sum(map(len, documents)), packed=True)[0]
    moved = others = control = 0
    with torch.no_grad(), training_attention(model):
        before = _hidden(model, batch, share)
        noise: Tensor | None = None
        for document in range(2):
            inside = batch.documents[0] == document
            at = np.flatnonzero(inside)[-1]
            ids = batch.ids.copy()
            ids[0, at] = next(i for i in (*ids[0], 0, 1) if i != ids[0, at])
            changed = _hidden(model, replace(batch, ids=ids), share) != before
            if changed[0, ~inside].any():
                noise = _hidden(model, batch, share) != before if noise is None else noise
                changed &= ~noise
            by_position = changed.any(-1)[0].cpu().numpy()
            moved += int(by_position[~inside].sum())
            others += int((~inside).sum())
            control += int(by_position[inside].sum())
    return moved, others, control


def _hidden(model: Any, batch: Batch, share: bool) -> Tensor:
    """[1, S, H] last hidden states."""
    device = model.get_input_embeddings().weight.device
    inputs, place = model_inputs(batch, device, share)
    hidden: Tensor = model.base_model(**inputs).last_hidden_state
    return hidden[:, on_device(place[0], device)]


def loss_matches_reference(
    model: Any, ours: Measured, rows: Sequence[Tokens], tolerance: Tolerance
) -> Check:
    """Our loss and gradient equal plain cross-entropy on the model's own logits, row by row.

    The reference shares nothing with the training path: Transformers' own attention, one row at a
    time, all logits in float32, labels shifted here.
    """
    with _transformers_code(model):
        reference = measure(model, (_reference_loss(model, row) for row in rows), rows)
    return compare(
        "loss-matches-reference",
        ours,
        reference,
        tolerance,
        "plain logits cross-entropy",
        "the model scales or caps its logits, or its head is not a plain matrix: this model cannot "
        "be trained here yet",
    )


def accumulation_invariance(
    model: Any, objective: Objective, ours: Measured, rows: Sequence[Tokens], tolerance: Tolerance
) -> Check:
    """One micro-batch or one per row, packed or padded: the same loss sum and gradient."""
    with training_attention(model):
        apart = measure(model, objective_losses(model, objective, rows, False, 1), rows)
    return compare(
        "accumulation-invariance",
        ours,
        apart,
        tolerance,
        f"one micro-batch per row ({len(rows)} rows)",
        "set train.packing to off; if it still differs, rows of a batch influence each other in "
        "this model (batch normalisation, expert capacity)",
    )


def shared_prefix_matches(
    model: Any, objective: Objective, apart: Objective, rows: Sequence[Tokens], tolerance: Tolerance
) -> Check:
    """What rows begin with is computed once: the same loss sum and gradient as row by row."""
    row = min(rows, key=len)
    other = row.ids.copy()  # the same row with another end: all before it is in common
    last = int(np.flatnonzero(row.weights)[-1])
    other[last] = next(i for i in (*row.ids, 0, 1) if i != other[last])
    pair = [row, Tokens(other, row.weights, "probe-other")]
    with training_attention(model):
        shared = measure(model, objective_losses(model, objective, pair, True), pair)
        single = measure(model, objective_losses(model, apart, pair, True), pair)
    return compare(
        "shared-prefix-matches",
        shared,
        single,
        tolerance,
        "the same two rows by themselves",
        "set train.shared_prefix to off",
    )


@contextmanager
def _transformers_code(model: Any) -> Iterator[None]:
    before = model.config._attn_implementation
    if is_ours(model):
        # sdpa knows no capped scores (Gemma 2); some releases of Transformers take it all the same
        capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
        plain = model._supports_sdpa and capped is None
        model.set_attn_implementation("sdpa" if plain else "eager")
    try:
        with own_layers(model):
            yield
    finally:
        model.set_attn_implementation(before)


def _reference_loss(model: Any, row: Tokens) -> Tensor:
    device = model.get_input_embeddings().weight.device
    ids = torch.from_numpy(row.ids).to(device)
    weights = torch.from_numpy(row.weights).to(device)
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
    losses = functional.cross_entropy(logits, ids[1:], reduction="none")
    return (losses * weights[1:]).sum(dtype=torch.float64)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
