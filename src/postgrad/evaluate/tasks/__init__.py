"""Benchmarks of general ability: what the model could do before, measured again after.

A task turns a row of a public data set into an `Item`: a prompt and what a right answer is. There
are three kinds of answers: the likeliest of several continuations (`choice`), the likeliest word
(`cloze`) and a greedy completion that a function scores (`generation`). Prompts are those of
lm-evaluation-harness, named in `Task.origin`. A family of tasks is a module beside this one that
lists its tasks in `TASKS`; `registry.py` knows them all. No torch here.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from postgrad.types import Evidence, Score

Row = Mapping[str, Any]
"""A row of a data set under its public column names."""


class Kind(StrEnum):
    """How an answer is taken from a model, under lm-evaluation-harness's names."""

    CHOICE = "multiple_choice"
    """The continuation with the highest log-likelihood; metrics `acc`, and `acc_norm`: per
    character."""
    CLOZE = "loglikelihood"
    """One continuation; metrics `acc` (every token is the likeliest) and `perplexity`."""
    GENERATION = "generate_until"
    """A greedy completion, scored by `Generation.score`."""


@dataclass(frozen=True, slots=True)
class Item:
    """One question of a benchmark, before examples are put in front of it."""

    id: str
    """The data set's own id, or a hash of the row: the same in every run."""
    prompt: str
    """What the model reads before it answers (for options that stand in the context: the first)."""
    reference: str
    """A right answer: the continuation shown in examples and in the report."""
    contexts: tuple[str, ...] = ()
    """Context of each option, where they differ (partial evaluation); else empty: the prompt."""
    options: tuple[str, ...] = ()
    """Choice: the texts whose log-likelihoods are compared, without the separating space.
    Cloze: one text, with it."""
    gold: int = 0
    """Choice: index of the right option."""
    group: str | None = None
    """Items of one group (a subject) share their examples, and their errors are clustered."""
    description: str = ""
    """Text before the examples and the prompt."""
    row: Row = field(default_factory=dict)
    """Generation: whatever its scorer needs."""


@dataclass(frozen=True, slots=True)
class Generation:
    """How a generation task lets the model answer and judges the answer."""

    score: Callable[[str, Item], Mapping[str, Score]]
    """Completion (cut at `until`) and item -> a score in [0, 1] for each metric of the task."""
    max_new_tokens: int
    until: tuple[str, ...] = ()
    """The completion ends before the first of these texts, besides the model's stop tokens."""


@dataclass(frozen=True, slots=True)
class Samples:
    """Where the rows of a task are published; tried in this order by `evaluate.benchmarks`."""

    names: tuple[str, ...]
    """File names, without suffix, that are looked for in the user's folder."""
    hub: str
    """Hub data set as `sources.resolve` takes it: org/name#config=...&split=..."""
    standard: int
    """Items of the standard evaluation; fewer are called a subset."""
    split: str
    """The split that is evaluated: validation or test."""
    wheel: str | None = None
    """Path inside the embedded wheel (`benchmarks.WHEEL`), where it has the task with answers."""
    wheel_row: Callable[[Row, int], Row] | None = None
    """Row of the wheel and its number from 0 -> row under the public column names."""
    shot_names: tuple[str, ...] = ()
    """The same for the rows that examples in the prompt are taken from."""
    shot_hub: str | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """A benchmark: rows, prompt, answer kind, metrics."""

    name: str
    kind: Kind
    metrics: tuple[str, ...]
    """Names under which evidence holds the scores; the first is the one that is compared."""
    chance: float | None
    """Share that guessing gets right; None where guessing gets nothing right."""
    origin: str
    """Where the prompt's format comes from: `lm-evaluation-harness 0.4.13 hellaswag 1.0`."""
    samples: Samples
    read: Callable[[Row], Item]
    """Row -> item; raises KeyError or ValueError for a row that is not of this task."""
    shots: int = 0
    """Examples in the prompt: the first of the shot rows (of the same group)."""
    separator: str = " "
    """Between prompt and answer."""
    chat: bool = False
    """Whether `evaluate.retention_template: auto` asks it under the chat template."""
    generation: Generation | None = None
    """For `Kind.GENERATION`."""
    units: Callable[[Sequence[Evidence], str], Sequence[Evidence]] | None = None
    """Evidence and metric -> the rows whose mean is the metric, where those are not the items."""


def shot_text(task: Task, shot: Item) -> str:
    """Return an example as it stands in the prompt: its prompt and its right answer."""
    if task.kind is Kind.CHOICE:
        context = shot.contexts[shot.gold] if shot.contexts else shot.prompt
        answer = shot.options[0 if shot.contexts else shot.gold]
        return f"{context}{task.separator}{answer}"
    answer = shot.reference
    return f"{shot.prompt}{'' if task.kind is Kind.CLOZE else task.separator}{answer}"


def item_id(*texts: str) -> str:
    """Return 16 hex digits of the SHA-256 of the texts: the same question, the same id."""
    return hashlib.sha256("\x00".join(texts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def preamble(task: Task, item: Item, shots: Sequence[Item]) -> str:
    """Return what stands before the item's prompt: description and examples, a blank line after."""
    chosen = choose_shots(task, item, shots)
    return item.description + "".join(shot_text(task, shot) + "\n\n" for shot in chosen)


def choose_shots(task: Task, item: Item, shots: Sequence[Item]) -> list[Item]:
    """Return the first examples of the item's group; of all, when no example has that group."""
    same = [shot for shot in shots if shot.group == item.group]
    return list(same or shots)[: task.shots]
