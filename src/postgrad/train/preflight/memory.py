"""Pre-flight: does the largest micro-batch fit? The longest row is tried before the first step."""

from collections.abc import Sequence
from typing import Any

import torch

from postgrad.data.batches import micro_batches
from postgrad.data.render import Rendering
from postgrad.model.attention import training_attention
from postgrad.train.memory import available_bytes, peak_memory, used_bytes
from postgrad.train.objective import Objective
from postgrad.train.optimizer import trainable
from postgrad.types import Batch, Check, Tokens

PROBE_TOKENS = 512
"""Smallest batch whose memory says something about larger ones."""
MARGIN = 0.9
"""Share of the available memory that training may plan to use."""
SURE = 0.5
"""Below this share an extrapolated figure is enough; above it the whole batch is tried."""
ADAM_BYTES = 8
"""Two float32 moments per trained parameter, allocated at the first optimizer step."""
GIB = 2**30


def fits_in_memory(
    model: Any,
    objective: Objective,
    renderings: Sequence[Rendering],
    micro_batch_tokens: int,
    packed: bool,
    room_bytes: int | None = None,
) -> Check:
    """Forward and backward of the longest rows, then of the fullest micro-batch, fit in memory.

    A batch of the longest rows is run first; memory grows linearly with tokens from there, so a
    micro-batch that could not fit is refused without being tried. `room_bytes` is what may be
    used, by default 90 % of what is available.
    """
    device = model.get_input_embeddings().weight.device
    rows = [r.tokens for r in renderings if r.tokens is not None and r.tokens.supervised > 0]
    rows.sort(key=lambda row: -len(row))
    first = _fullest(rows, max(PROBE_TOKENS, len(rows[0])), packed)
    full = _fullest(rows, max(micro_batch_tokens, len(rows[0])), packed)
    before = used_bytes(device)
    room = int(available_bytes(device) * MARGIN) if room_bytes is None else room_bytes
    optimizer = ADAM_BYTES * sum(p.numel() for p in trainable(model).values())
    longest = next(r.example.source for r in renderings if r.tokens is rows[0])
    with training_attention(model):
        peak = _run(model, objective, first, device)
        tried = first
        needed = None if peak is None else _extrapolate(peak - before, first, full)
        if needed is not None and SURE * room < needed + optimizer <= room and full is not first:
            peak, tried = _run(model, objective, full, device), full
            needed = None if peak is None else peak - before
    figures = {
        "tokens": int(full.ids.size),
        "tried_tokens": int(tried.ids.size),
        "needed_bytes": None if needed is None else needed + optimizer,
        "available_bytes": room,
        "longest_row": len(rows[0]),
    }
    return _verdict(figures, longest, micro_batch_tokens)


def _verdict(figures: dict[str, Any], longest: str, micro_batch_tokens: int) -> Check:
    name, needed, room = "fits-in-memory", figures["needed_bytes"], figures["available_bytes"]
    size = f"a micro-batch of {figures['tokens']} tokens"
    if needed is not None and needed <= room:
        detail = f"{size} and the optimizer need {needed / GIB:.2f} GiB of {room / GIB:.2f} GiB"
        return Check(name, True, detail, data=figures)
    if needed is None:
        detail = f"{figures['tried_tokens']} tokens ran out of memory ({room / GIB:.2f} GiB free)"
    else:
        detail = f"{size} needs about {needed / GIB:.2f} GiB, {room / GIB:.2f} GiB are available"
    smaller = figures["tried_tokens"] // 2
    if needed is not None:
        smaller = int(figures["tokens"] * room / needed)
    remedy = (
        f"set train.micro_batch_tokens to {smaller} or less"
        if figures["longest_row"] <= smaller < micro_batch_tokens
        else f"lower data.max_length below {figures['longest_row']} (the longest row)"
    )
    remedy += ", or train.gradient_checkpointing to true"
    return Check(name, False, detail, remedy, (longest,), 1, data=figures)


def _fullest(rows: Sequence[Tokens], capacity: int, packed: bool) -> Batch:
    """The longest rows, as many as fill a micro-batch of `capacity` tokens."""
    chosen, tokens = [], 0
    for row in rows:
        chosen.append(row)
        tokens += len(row)
        if tokens >= capacity:
            break
    batches = micro_batches(chosen, capacity, packed)
    return max(batches, key=lambda batch: batch.ids.size)


def _extrapolate(extra: int, first: Batch, full: Batch) -> int:
    return int(max(0, extra) * max(1.0, full.ids.size / first.ids.size))


def _run(model: Any, objective: Objective, batch: Batch, device: torch.device) -> int | None:
    """Return the peak of a forward and backward pass in training mode; None: out of memory."""
    model.train()
    try:
        with peak_memory(device) as peak:
            loss = objective(model, batch)
            (loss.total / loss.weight).backward()
        return peak.bytes
    except (torch.OutOfMemoryError, MemoryError):
        return None
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        return None
    finally:
        model.eval()
        model.zero_grad(set_to_none=True)
