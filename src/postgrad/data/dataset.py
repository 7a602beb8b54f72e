"""A recipe's data section to a Dataset: read, checked, split; and to a run directory and back."""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from postgrad.config import DataConfig
from postgrad.data.files import Problem, data_files
from postgrad.data.replay import SELF, Replay, read_replay
from postgrad.data.rows import read_file, refuse_or_drop
from postgrad.data.splits import divide
from postgrad.errors import DataError
from postgrad.run import Run, read_jsonl
from postgrad.sources import resolve
from postgrad.types import Check, Conversation, Dropped, Example, Message, Split, ToolCall

_SHOWN = 24
_HELD_OUT_NAME = re.compile(r"(valid|validation|val|dev|test|eval|holdout)([-_. ].*)?")


@dataclass(frozen=True, slots=True)
class Dataset:
    """All rows of a run: used with their split, or dropped with a reason."""

    examples: tuple[Example, ...]
    dropped: tuple[Dropped, ...]
    files: tuple[Mapping[str, Any], ...]
    """path, uri, given_as (train, validation, test), sha256, format, rows of every file read."""
    checks: tuple[Check, ...]
    """`rows-well-formed`, `split-overlap`, `held-out-size`, and `replay` where there is some."""
    replay: tuple[Example, ...] = ()
    """General chats that are trained on too; in no split, so nothing else ever sees them."""

    def of(self, split: Split) -> tuple[Example, ...]:
        """Return the examples of one split, in order."""
        return tuple(example for example in self.examples if example.split is split)

    @property
    def held_out(self) -> tuple[Example, ...]:
        """Return the validation and the test rows."""
        return (*self.of(Split.VALIDATION), *self.of(Split.TEST))

    def with_replay(self, replay: Replay) -> "Dataset":
        """Return the same rows and these chats; what the ledger holds is not added again."""
        new = [row for row in replay.dropped if row not in self.dropped]
        return dataclasses.replace(
            self,
            dropped=(*self.dropped, *new),
            checks=(*self.checks, replay.check),
            replay=replay.examples,
        )


@dataclass(slots=True)
class _Reading:
    """What the files of a recipe hold, gathered file by file."""

    rows: dict[Split, list[Example]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    files: list[Mapping[str, Any]] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)


def load_dataset(config: DataConfig, seed: int) -> Dataset:
    """Read, check and split everything that `config` names.

    Raises:
        SourceError: A file, package or hub data set cannot be found.
        DataError: Malformed rows (all of them listed), an unclear format, too few rows.
    """
    reading = _read(config)
    dropped = refuse_or_drop(reading.problems, config.on_invalid)
    for split, rows in reading.rows.items():
        if not rows:
            raise DataError(f"data.{split} has no usable rows", "see the rows dropped as invalid")
    given: dict[Split, Sequence[Example]] = {
        split: rows for split, rows in reading.rows.items() if split is not Split.TRAIN
    }
    division = divide(reading.rows[Split.TRAIN], given, config, seed)
    check = _rows_check(reading, dropped)
    dataset = Dataset(
        division.examples,
        (*dropped, *division.dropped),
        tuple(reading.files),
        (check, *division.checks),
    )
    if config.replay in (None, SELF):
        return dataset
    training_rows = len(dataset.of(Split.TRAIN))
    return dataset.with_replay(read_replay(config, training_rows, dataset.held_out, seed))


def _read(config: DataConfig) -> _Reading:
    reading = _Reading()
    for split, uri, path in _files(config):
        found = read_file(path, config)
        reading.rows.setdefault(split, []).extend(found.examples)
        reading.problems.extend(found.problems)
        reading.files.append({**found.facts, "uri": uri, "given_as": split.value})
        reading.ignored.update(found.ignored)
    return reading


def _files(config: DataConfig) -> Iterator[tuple[Split, str, Path]]:
    """Yield (split it was given as, what the recipe says, file) for every file to read."""
    named = {Split.VALIDATION: config.validation, Split.TEST: config.test}
    held_out = [
        (split, uri, path)
        for split, uri in named.items()
        if isinstance(uri, str)
        for path in data_files(resolve(uri, "data"), uri)
    ]
    taken = {path.resolve(): split for split, _, path in held_out}
    if len(taken) != len(held_out):
        raise DataError("data.validation and data.test share a file", "give two different files")
    for uri in (config.train,) if isinstance(config.train, str) else config.train:
        location = resolve(uri, "data")
        files = data_files(location, uri)
        if location.is_dir():
            files = [path for path in files if path.resolve() not in taken]
            _refuse_held_out(location, uri, files)
        for path in files:
            if path.resolve() in taken:
                same = taken[path.resolve()]
                raise DataError(
                    f"{path} is given twice, as train and as {same}",
                    f"give another file, or a share such as data.{same}=0.1",
                )
            taken[path.resolve()] = Split.TRAIN
            yield Split.TRAIN, uri, path
    yield from held_out


def _refuse_held_out(folder: Path, uri: str, files: Sequence[Path]) -> None:
    """Refuse to train on a file whose name says that it is held out."""
    for path in files:
        parts = path.relative_to(folder).parts
        if any(_HELD_OUT_NAME.fullmatch(part.lower().partition(".")[0]) for part in parts):
            raise DataError(
                f"{uri}: this folder of training rows holds {Path(*parts)}, held out by its name",
                f"say what it is (data.test={path} or data.validation={path}), or list the "
                "training files in data.train",
            )
    if not files:
        raise DataError(f"{uri}: no training files beside validation and test", "check data.train")


def _rows_check(reading: _Reading, dropped: Sequence[Dropped]) -> Check:
    rows = sum(file["rows"] for file in reading.files)
    formats = Counter(file["format"] for file in reading.files)
    detail = f"{rows} rows in {len(reading.files)} file(s), read as {', '.join(sorted(formats))}"
    if dropped:
        detail += f"; {len(dropped)} malformed rows were dropped"
    if reading.ignored:
        columns = ", ".join(f"{name} ({count})" for name, count in sorted(reading.ignored.items()))
        detail += f"; columns not read: {columns}"
    return Check(
        "rows-well-formed",
        True,
        detail,
        rows=tuple(f"{row.source}: {row.reason}" for row in dropped[:_SHOWN]),
        data={
            "rows": rows,
            "dropped": len(dropped),
            "formats": dict(sorted(formats.items())),
            "ignored_columns": dict(sorted(reading.ignored.items())),
        },
    )


# --- run directory ------------------------------------------------------------------------------


def save_dataset(dataset: Dataset, run: Run) -> None:
    """Write data/kept.jsonl, data/dropped.jsonl, data/manifest.jsonl and, if any, replay.jsonl.

    The manifest has a line per file, then one per split, then one per check.
    """
    run.write_jsonl(run.kept_path, map(example_to_row, dataset.examples))
    run.write_jsonl(run.dropped_path, map(dataclasses.asdict, dataset.dropped))
    files = [
        {"file": file["path"], **{key: value for key, value in file.items() if key != "path"}}
        for file in dataset.files
    ]
    counts = Counter(example.split for example in dataset.examples)
    splits = [{"split": split.value, "rows": counts[split]} for split in Split if counts[split]]
    if dataset.replay:
        run.write_jsonl(run.replay_path, map(example_to_row, dataset.replay))
        splits.append({"split": "replay", "rows": len(dataset.replay)})
    checks = [{"check": dataclasses.asdict(check)} for check in dataset.checks]
    run.write_jsonl(run.manifest_path, [*files, *splits, *checks])


def read_dataset(run: Run) -> Dataset:
    """Return the dataset that `save_dataset` wrote, equal to the original.

    Raises:
        DataError: The run has no data yet.
    """
    if not run.kept_path.exists():
        raise DataError(f"{run.path} has no data/kept.jsonl", "run the stage that reads the data")
    manifest = read_jsonl(run.manifest_path)
    files = [
        {"path": line["file"], **{key: value for key, value in line.items() if key != "file"}}
        for line in manifest
        if "file" in line
    ]
    checks = [line["check"] for line in manifest if "check" in line]
    return Dataset(
        tuple(map(example_from_row, read_jsonl(run.kept_path))),
        tuple(Dropped(**line) for line in read_jsonl(run.dropped_path)),
        tuple(files),
        tuple(Check(**{**check, "rows": tuple(check["rows"])}) for check in checks),
        tuple(map(example_from_row, read_jsonl(run.replay_path))),
    )


def example_to_row(example: Example) -> dict[str, Any]:
    """Return an example as a line of data/kept.jsonl: id, split, source, group, messages, tools."""
    row: dict[str, Any] = {
        "id": example.id,
        "split": example.split.value if example.split else None,
        "source": example.source,
        "group": example.group,
        "messages": [_message_to_row(message) for message in example.conversation.messages],
    }
    if example.conversation.tools:
        row["tools"] = list(example.conversation.tools)
    if example.unfinished:
        row["unfinished"] = True
    return row


def _message_to_row(message: Message) -> dict[str, Any]:
    row: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        row["tool_calls"] = [_call_to_row(call) for call in message.tool_calls]
    for key in ("tool_call_id", "name", "weight"):
        value = getattr(message, key)
        if value is not None:
            row[key] = value
    return row


def _call_to_row(call: ToolCall) -> dict[str, Any]:
    row = {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
    return row if call.id is None else {"id": call.id, **row}


def example_from_row(row: Mapping[str, Any]) -> Example:
    """Return the example of a line of data/kept.jsonl."""
    messages = tuple(
        Message(
            message["role"],
            message["content"],
            tuple(
                ToolCall(call["function"]["name"], call["function"]["arguments"], call.get("id"))
                for call in message.get("tool_calls", ())
            ),
            message.get("tool_call_id"),
            message.get("name"),
            message.get("weight"),
        )
        for message in row["messages"]
    )
    conversation = Conversation(messages, tuple(row.get("tools", ())))
    split = Split(row["split"]) if row["split"] else None
    unfinished = row.get("unfinished", False)
    return Example(row["id"], conversation, row["source"], row["group"], split, unfinished)
