"""Rows that do not fit `data.max_length`: counted, dropped or cut, never silently."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from postgrad.config import DataConfig
from postgrad.data.render import Answer, Rendering
from postgrad.errors import DataError
from postgrad.types import Dropped, Tokens


def length_table(lengths: Sequence[int], max_length: int) -> dict[str, Any]:
    """Return quantiles of row lengths in tokens and what a few limits would keep.

    Keys: rows, tokens, median, p90, p95, p99, longest, max_length, over, and `limits`: for each
    limit the number of rows above it.

    >>> length_table([10, 20, 700], max_length=512)["over"]
    1
    """
    if not lengths:
        return {"rows": 0, "tokens": 0, "max_length": max_length, "over": 0, "limits": {}}
    values = np.asarray(lengths)
    quantiles = np.quantile(values, [0.5, 0.9, 0.95, 0.99], method="higher")
    longest = int(values.max())
    limits = sorted({max_length, *(int(-(-q // 64) * 64) for q in quantiles), longest})
    return {
        "rows": len(values),
        "tokens": int(values.sum()),
        **dict(zip(("median", "p90", "p95", "p99"), map(int, quantiles), strict=True)),
        "longest": longest,
        "max_length": max_length,
        "over": int((values > max_length).sum()),
        "limits": {str(limit): int((values > limit).sum()) for limit in limits},
    }


def keep_usable(
    renderings: Sequence[Rendering], config: DataConfig
) -> tuple[list[Rendering], list[Dropped]]:
    """Apply `data.on_overlength` and leave out what the template refused.

    `truncate` cuts the end off and keeps the row (ledgered as `truncated`) unless nothing that is
    supervised would be left; `drop` leaves the row out; `refuse` keeps it as it is, because the
    pre-flight check has refused it before or was waived.

    Returns:
        The rows that can be trained on, all with tokens, and the ledger of what was dropped or cut.
    """
    kept: list[Rendering] = []
    dropped: list[Dropped] = []
    for rendering in renderings:
        usable, reason = _apply(rendering, config)
        if usable is not None:
            kept.append(usable)
        if reason is not None:
            step, why = reason
            example = rendering.example
            dropped.append(Dropped(example.id, example.source, step, why))
    return kept, dropped


def keep_chats(
    renderings: Sequence[Rendering], max_length: int
) -> tuple[list[Rendering], list[Dropped]]:
    """Return the chats of data.replay that can be trained on, and the others with the reason.

    One that is too long or not whole is left out: another would do as well.

    Raises:
        DataError: None can.
    """
    kept: list[Rendering] = []
    dropped: list[Dropped] = []
    for found in renderings:
        reason = found.problems[0].detail if found.problems else ""
        if found.tokens is not None and not reason:
            long = len(found.tokens) > max_length
            reason = f"{len(found.tokens)} tokens, data.max_length is {max_length}" if long else ""
            reason = reason or ("" if found.tokens.supervised else "nothing in it is an answer")
        if reason:
            name, source = found.example.id, found.example.source
            dropped.append(Dropped(name, source, "replay", reason))
        else:
            kept.append(found)
    if not kept:
        raise DataError(
            f"no row of data.replay can be trained on (the first: {first_reason(dropped)})",
            "give other general chats, or raise data.max_length",
        )
    return kept, dropped


def first_reason(lost: Sequence[Dropped]) -> str:
    """Return where the first row that was left out stands, and why it was."""
    return f"{lost[0].source}: {lost[0].reason}" if lost else "there were none"


def _apply(
    rendering: Rendering, config: DataConfig
) -> tuple[Rendering | None, tuple[str, str] | None]:
    """Return the row to train on, if any, and (step, reason) when it was dropped or cut."""
    tokens, limit = rendering.tokens, config.max_length
    if tokens is None:
        return None, ("invalid", rendering.problems[0].detail)
    if len(tokens) <= limit or config.on_overlength == "refuse":
        return rendering, None
    too_long = f"{len(tokens)} tokens, data.max_length is {limit}"
    if config.on_overlength == "drop":
        return None, ("overlength", too_long)
    cut = Tokens(tokens.ids[:limit], tokens.weights[:limit], tokens.example_id)
    if cut.supervised == 0:
        return None, ("overlength", f"{too_long}; nothing supervised would be left")
    answers = tuple(
        Answer(a.message, a.weight, a.first, min(a.end, limit))
        for a in rendering.answers
        if a.first < limit
    )
    return replace(rendering, tokens=cut, answers=answers), ("truncated", too_long)
