"""Replay: general chats among the training rows, so that what they say nothing about is kept.

The chats are the user's file, or the base model's own answers (made in `train.replay`). They train
and do nothing else: no split holds them, so they are never validated, tested or shown as examples.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from postgrad.config import DataConfig
from postgrad.data.files import data_files
from postgrad.data.generic_prompts import all_replay_prompts, replay_prompts
from postgrad.data.near_duplicates import find_twins
from postgrad.data.rows import read_file, refuse_or_drop
from postgrad.data.splits import request_texts
from postgrad.errors import DataError
from postgrad.sources import resolve
from postgrad.types import Check, Conversation, Dropped, Example, Message, Split

SELF = "self"
"""What the recipe says for the base model's own answers."""
ANSWER_TOKENS = 128
"""Longest answer of the base model."""


@dataclass(frozen=True, slots=True)
class Replay:
    """The chats to train on, those left out and why, and a sentence for the report."""

    examples: tuple[Example, ...]
    dropped: tuple[Dropped, ...]
    check: Check


def wanted_rows(config: DataConfig, training_rows: int) -> int:
    """Return how many chats the recipe asks for: a share of the training rows, at least one."""
    return max(1, round(config.replay_share * training_rows))


def read_replay(
    config: DataConfig, training_rows: int, held_out: Sequence[Example], seed: int
) -> Replay:
    """Draw chats from the file that `data.replay` names.

    Raises:
        DataError: Malformed rows (unless they are dropped), or none that can be used.
    """
    uri = config.replay
    assert uri is not None
    plain = DataConfig(train=uri)
    examples: list[Example] = []
    dropped: list[Dropped] = []
    for path in data_files(resolve(uri, "data"), uri):
        found = read_file(path, plain)
        dropped += refuse_or_drop(found.problems, config.on_invalid)
        examples += found.examples
    drawn = choose(examples, training_rows, held_out, config, seed)
    return replace(drawn, dropped=(*dropped, *drawn.dropped))


def choose(
    rows: Sequence[Example],
    training_rows: int,
    held_out: Sequence[Example],
    config: DataConfig,
    seed: int,
) -> Replay:
    """Draw as many rows as are wanted, none of them like a validation or test row.

    The order is that of a seeded hash of the content, so a smaller share is a beginning of a larger
    one. Rows that are merely not drawn are counted, not listed.

    Raises:
        DataError: None is left.
    """
    wanted = wanted_rows(config, training_rows)
    different = {row.id: row for row in rows}
    order = sorted(different, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    kept: list[Example] = []
    dropped: list[Dropped] = []
    while order and len(kept) < wanted:
        room = wanted - len(kept)
        some, order = [different[name] for name in order[:room]], order[room:]
        leaks = dict(_leaks(some, held_out, config))
        for row in some:
            if row.id in leaks:
                reason, twin = leaks[row.id]
                dropped.append(Dropped(row.id, row.source, "overlap", reason, twin.source))
            else:
                kept.append(replace(row, id=f"replay-{row.id}", split=Split.TRAIN, group=None))
    if not kept:
        why = f"all {len(rows)} are like validation or test rows" if rows else "there are none"
        raise DataError(f"data.replay has no usable rows: {why}", "give other general chats")
    own = config.replay == SELF
    whence = "the base model's own answers" if own else f"{len(rows):,} rows of {config.replay}"
    detail = (
        f"{len(kept):,} general chats from {whence} are trained on beside {training_rows:,} rows"
    )
    if len(kept) < wanted:
        detail += f"; {wanted:,} were asked for"
    if dropped:
        detail += f"; {len(dropped)} like validation or test rows were left out"
    figures = {"rows": len(kept), "wanted": wanted, "given": len(rows), "overlaps": len(dropped)}
    figures["unfinished"] = sum(row.unfinished for row in kept)
    return Replay(tuple(kept), tuple(dropped), Check("replay", True, detail, data=figures))


def _leaks(
    rows: Sequence[Example], held_out: Sequence[Example], config: DataConfig
) -> Iterator[tuple[str, tuple[str, Example]]]:
    """Yield (id, (reason, the held-out row)) of rows whose request is held out, or nearly.

    System messages are not compared: that of `data.system` stands in the held-out rows alone.
    """
    texts = request_texts([*rows, *held_out], config.prompt_template, system=False)
    mine, others = texts[: len(rows)], texts[len(rows) :]
    exact = dict(zip(others, held_out, strict=True))
    twins = {}
    if config.near_duplicate is not None:
        twins = find_twins(mine, others, config.near_duplicate)
    for index, (row, text) in enumerate(zip(rows, mine, strict=True)):
        if text in exact:
            yield row.id, (f"same request as a row of {exact[text].split}", exact[text])
        elif index in twins:
            other, similarity = twins[index]
            what = f"{similarity:.2f} similar to a row of {held_out[other].split}"
            yield row.id, (what, held_out[other])


def self_prompts(config: DataConfig, training_rows: int, seed: int) -> list[str]:
    """Return the requests that the base model is to answer: as many as there are rows wanted."""
    return replay_prompts(min(wanted_rows(config, training_rows), len(all_replay_prompts())), seed)


def planned_self_replay(config: DataConfig, training_rows: int, seed: int) -> tuple[Example, ...]:
    """Return stand-ins for answers that do not exist yet, as long as they can be: for a plan."""
    answer = Message("assistant", " ".join(["a"] * (ANSWER_TOKENS - 1)))
    return tuple(
        Example(
            f"replay-planned-{number}",
            Conversation((Message("user", prompt), answer)),
            f"base:{number}",
            split=Split.TRAIN,
        )
        for number, prompt in enumerate(self_prompts(config, training_rows, seed), 1)
    )
