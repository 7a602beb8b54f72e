r"""A task of the user's own, from a few lines of YAML: file, prompt, answer, scorer.

    name: capitals
    file: capitals.jsonl                          # beside the YAML file
    prompt: "Question: {question}\nAnswer:"       # {column} stands for the row's value
    choices: [alpha, beta, gamma]                 # the texts, or the column that lists them
    answer: gold                                  # column: number from 0, letter or text
    chance: 0.33

With `choices` the likeliest is the answer. With `scorer` instead the model writes one, which is
compared with the column `answer`. With neither, the likelihood of `answer` itself is measured.
"""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveInt, ValidationError

from postgrad.config import ScorerName, Section
from postgrad.errors import ConfigError
from postgrad.evaluate.tasks import Generation, Item, Kind, Row, Samples, Task, item_id
from postgrad.evaluate.tasks.rows import LETTERS, index
from postgrad.keys import describe, problems
from postgrad.scoring import score
from postgrad.strict_yaml import key_lines, parse_yaml
from postgrad.types import Score

_COLUMN = re.compile(r"\{(\w+)\}")


class OwnTask(Section):
    """The keys of a task file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=60)]
    """Name of the task in the report."""
    file: str
    """Rows: JSONL, CSV, Parquet, ...; a path relative to the task file."""
    prompt: str
    """What the model reads; {column} stands for the row's value."""
    answer: str
    """Column with the right answer."""
    choices: str | tuple[str, ...] | None = None
    """Options whose likelihoods are compared: the texts, or the column that lists them."""
    scorer: ScorerName | None = None
    """How a written answer is compared with the right one."""
    pattern: str | None = None
    """Regular expression for the `regex` scorer."""
    max_new_tokens: PositiveInt = 64
    """Longest written answer."""
    until: tuple[str, ...] = ()
    """A written answer ends before the first of these texts."""
    group: str | None = None
    """Column whose equal values mark items that are not independent (passage, customer)."""
    chance: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share that guessing gets right."""
    chat: bool = False
    """Ask under the chat template, as a user's message."""


def read_task(path: Path) -> tuple[Task, Path]:
    """Return the task of a YAML file and the path of its rows.

    Raises:
        ConfigError: no such file, unknown or wrong keys (all of them named).
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", "give the path of a task file") from None
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{path} is not a task file", "it needs name, file, prompt and answer")
    try:
        own = OwnTask.model_validate(tree)
    except ValidationError as error:
        found = problems(error, describe(OwnTask), str(path), key_lines(text))
        message = "\n".join(sentence for _, sentence in found)
        raise ConfigError(message, "see docs/benchmarks.md for what a task file takes") from None
    if own.choices is not None and own.scorer is not None:
        raise ConfigError(f"{path}: choices and scorer exclude each other", "leave one of them out")
    if (own.scorer == "regex") != bool(own.pattern):
        raise ConfigError(f"{path}: scorer regex and pattern go together", "give both or neither")
    return _task(own), path.parent / own.file


def _task(own: OwnTask) -> Task:
    kind = Kind.CHOICE if own.choices is not None else Kind.CLOZE
    metrics, generation = ("acc_norm", "acc") if own.choices is not None else ("acc",), None
    if own.scorer is not None:
        kind, metrics = Kind.GENERATION, (own.scorer,)
        generation = Generation(
            partial(_score, own.scorer, own.pattern), own.max_new_tokens, own.until
        )
    return Task(
        name=own.name,
        kind=kind,
        metrics=metrics,
        chance=own.chance,
        origin="the user's own",
        samples=Samples(names=(), hub="", standard=0, split=""),
        read=partial(_read, own),
        generation=generation,
        chat=own.chat,
    )


def _read(own: OwnTask, row: Row) -> Item:
    prompt = _COLUMN.sub(lambda found: str(row[found.group(1)]), own.prompt)
    group = None if own.group is None else str(row[own.group])
    answer = row[own.answer]
    if own.choices is None:
        text = str(answer)
        continuation = () if own.scorer is not None else (f" {text}",)
        return Item(item_id(prompt, text), prompt, text, options=continuation, group=group)
    found = row[own.choices] if isinstance(own.choices, str) else own.choices
    options = tuple(str(option) for option in found)
    gold = index(answer, options if str(answer) in options else LETTERS)
    return Item(
        item_id(prompt, *options), prompt, options[gold], options=options, gold=gold, group=group
    )


def _score(scorer: str, pattern: str | None, completion: str, item: Item) -> dict[str, Score]:
    return {scorer: score(scorer, completion, item.reference, pattern)}


def keys() -> dict[str, dict[str, Any]]:
    """Return every key of a task file -> {type, default, meaning}, for the documentation."""
    return describe(OwnTask)
