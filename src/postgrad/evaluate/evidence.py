"""Evidence on disk: one JSON line per evaluated row, from which every figure can be recomputed."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from postgrad.errors import RunError
from postgrad.run import Run, read_jsonl
from postgrad.types import Evidence, Score, StopReason

_FIELDS: Mapping[str, tuple[type, ...]] = {
    "example_id": (str,),
    "prompt": (str,),
    "reference": (str,),
    "completion": (str,),
    "scores": (dict,),
    "stop_reason": (str, type(None)),
    "prompt_tokens": (int,),
    "completion_tokens": (int,),
    "seconds": (float, int),
    "error": (str, type(None)),
    "group": (str, type(None)),
    "logprobs": (list,),
}
_LATER: Mapping[str, Any] = {"group": None, "logprobs": []}
"""Keys that older evidence does not have."""


def to_row(evidence: Evidence) -> dict[str, Any]:
    """Return the evidence as plain JSON values, keys in the order of the class."""
    row = {name: getattr(evidence, name) for name in _FIELDS}
    row["scores"] = {
        name: {"value": s.value, "passed": s.passed, "explanation": s.explanation}
        for name, s in evidence.scores.items()
    }
    row["stop_reason"] = evidence.stop_reason.value if evidence.stop_reason else None
    row["logprobs"] = list(evidence.logprobs)
    return row


def from_row(row: Mapping[str, Any]) -> Evidence:
    """Return the evidence of one line; the inverse of `to_row`.

    Raises:
        ValueError: a key is missing, unknown or holds a value of another type.
    """
    row = {**_LATER, **row}
    if row.keys() != _FIELDS.keys():
        wrong = ", ".join(sorted(row.keys() ^ _FIELDS.keys()))
        raise ValueError(f"missing or unknown keys: {wrong}")
    for name, types in _FIELDS.items():
        if not isinstance(row[name], types) or isinstance(row[name], bool):
            raise ValueError(f"{name}: {row[name]!r} is not {types[0].__name__}")
    scores = {name: _score(name, value) for name, value in row["scores"].items()}
    reason = None if row["stop_reason"] is None else StopReason(row["stop_reason"])
    logprobs = tuple(float(value) for value in row["logprobs"])
    return Evidence(**{**row, "scores": scores, "stop_reason": reason, "logprobs": logprobs})


def write_evidence(run: Run, task: str, arm: str, rows: Iterable[Evidence]) -> Path:
    """Write all rows of one arm at once, or nothing; returns the path of the file."""
    path = run.evidence_path(task, arm)
    run.write_jsonl(path, (to_row(row) for row in rows))
    return path


def read_evidence(run: Run, task: str, arm: str) -> list[Evidence]:
    """Return the rows of one arm in the order they were written.

    Raises:
        RunError: there is no such file, it is cut off, or a line is not evidence. Rows are never
            left out: the number of rows is part of the result.
    """
    path = run.evidence_path(task, arm)
    if not path.exists():
        raise RunError(f"{path} is missing", "run the evaluation that writes it")
    lines = read_jsonl(path)
    if lines and not path.read_bytes().endswith(b"\n"):
        raise RunError(f"{path}: the last line is cut off", "run the evaluation again")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(from_row(line))
        except (ValueError, AttributeError, TypeError) as error:
            reason = f"{path}: row {number} is not evidence ({error})"
            raise RunError(reason, "restore the file or run the evaluation again") from None
    return rows


def _score(name: str, value: Any) -> Score:
    try:
        score = Score(**value)
    except TypeError:
        raise ValueError(f"scores.{name}: {value!r} is not a score") from None
    if isinstance(score.value, bool) or not isinstance(score.value, int | float):
        raise ValueError(f"scores.{name}.value: {score.value!r} is not a number")
    return score
