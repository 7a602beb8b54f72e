"""A data file to examples: every row parsed, grouped and identified; every bad row listed."""

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from postgrad.config import DataConfig
from postgrad.data.files import Problem, RawRow, describe, read_rows
from postgrad.data.formats import (
    USED_KEYS,
    detect_format,
    format_remedy,
    parse,
    telling_key,
    unknown_format,
)
from postgrad.data.messages import BadRow, bad, value_of
from postgrad.errors import ConfigError, DataError
from postgrad.run import sha256_file
from postgrad.types import Dropped, Example, content_id

_SHOWN = 20


@dataclass(frozen=True, slots=True)
class FileRows:
    """What a data file holds: examples without a split, problems, facts for the manifest."""

    examples: tuple[Example, ...]
    problems: tuple[Problem, ...]
    facts: Mapping[str, Any]
    """path, sha256, format, rows."""
    ignored: Mapping[str, int]
    """Columns that the format does not read -> number of rows that have them."""


def read_file(path: Path, config: DataConfig) -> FileRows:
    """Read every row of a file: good ones as examples, bad ones as problems.

    Raises:
        DataError: The format cannot be told from the keys of the rows.
        ConfigError: An option of the recipe does not apply to the format found.
    """
    examples: list[Example] = []
    problems: list[Problem] = []
    ignored: Counter[str] = Counter()
    name: str | None = None
    unknown: RawRow | None = None
    for row in read_rows(path):
        if isinstance(row, Problem):
            problems.append(row)
            continue
        name = name or _choose_format(row, config)
        if name is None:
            unknown = unknown or row
            problems.append(Problem(row.source, "", unknown_format(row.values)))
            continue
        try:
            ignored.update(_unread_keys(name, row.values, config))
            conversation = parse(name, row.values, config)
            group = _group(row.values, config.group_by)
            examples.append(Example(content_id(conversation), conversation, row.source, group))
        except BadRow as found:
            problems.append(Problem(row.source, found.field, found.text))
    if name is None and unknown is not None:
        raise DataError(
            f"{unknown.source}: {unknown_format(unknown.values)}", format_remedy(unknown.values)
        )
    facts = {
        "path": str(path),
        "sha256": sha256_file(path) if path.is_file() else "",
        "format": name or config.format,
        "rows": len(examples) + sum(not problem.fatal for problem in problems),
    }
    return FileRows(tuple(examples), tuple(problems), facts, dict(ignored))


def refuse_or_drop(problems: Sequence[Problem], on_invalid: str) -> list[Dropped]:
    """Raise one error that lists all bad rows, or return them as ledger lines (`drop`).

    A file that cannot be read to its end is always an error. A bad row has no content to hash, so
    its ledger id is the hash of where it stands.
    """
    fatal = [problem for problem in problems if problem.fatal]
    if fatal or (problems and on_invalid == "refuse"):
        shown = fatal or list(problems)
        count = f"{len(shown)} {'row' if len(shown) == 1 else 'rows'} cannot be used"
        lines = [f"  {problem}" for problem in shown[:_SHOWN]]
        if len(shown) > _SHOWN:
            lines.append(f"  and {len(shown) - _SHOWN} more")
        remedy = (
            "fix them, or drop them with data.on_invalid=drop (each goes to data/dropped.jsonl)"
        )
        raise DataError(
            "\n".join(["data cannot be read" if fatal else count, *lines]),
            "repair the file" if fatal else remedy,
        )
    return [
        Dropped(
            hashlib.sha256(problem.source.encode("utf-8", "replace")).hexdigest()[:16],
            problem.source,
            "invalid",
            ": ".join(filter(None, (problem.field, problem.text))),
        )
        for problem in problems
    ]


def _choose_format(row: RawRow, config: DataConfig) -> str | None:
    name: str | None = config.format
    if name == "auto":
        keys = [key for key in row.values if key != config.group_by]
        name = detect_format(keys, row.source)
    if config.prompt_template != "{prompt}" and name in ("messages", "sharegpt"):
        raise ConfigError(
            f"data.prompt_template applies to single-turn formats, but {row.source} is {name}",
            "remove data.prompt_template; use data.system for a common instruction",
        )
    return name


def _unread_keys(name: str, values: Mapping[str, Any], config: DataConfig) -> list[str]:
    """Return the columns that are not read; one that changes the meaning makes the row bad."""
    if config.columns is not None:
        used = {config.columns.prompt, config.columns.completion, config.columns.system}
    else:
        used = {*USED_KEYS[name]}
    unread = [key for key in values if key not in used and key != config.group_by]
    if unread and config.format == "auto" and (telling := telling_key(name, unread)):
        bad("", f"also has {telling}, which {name} does not read")
    return unread


def _group(values: Mapping[str, Any], column: str | None) -> str | None:
    if column is None:
        return None
    value = value_of(values, column)
    if isinstance(value, bool | int | str):
        text = str(value).strip()
        if text:
            return text
    elif isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else str(value)
    return bad(column, f"the value of data.group_by is missing or unusable: {describe(value)}")
