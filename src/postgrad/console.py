"""Results as text for people: what the command line prints on stdout without --json.

Pure functions from the JSON documents to text; numbers are worded here, decisions are made
elsewhere. Colour is asked for by the caller, never assumed.
"""

import json
import textwrap
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from postgrad.progress import duration

_BOLD, _GREEN, _YELLOW, _RED, _DIM, _END = (
    f"\x1b[{code}m" for code in (1, "1;32", "1;33", "1;31", 2, 0)
)
_STATE = {"passed": _GREEN, "waived": _YELLOW, "REFUSED": _RED}
_OPEN, _CLOSE = "[[", "]]"
"""Around supervised text where there is no colour."""


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return aligned columns under their heads; the last column is not padded.

    >>> print(table(["arm", "n"], [["tuned", "300"]]))
    arm    n
    tuned  300
    """
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (heads, *rows)
    )
    return "\n".join(lines)


def result_text(document: Mapping[str, Any]) -> str:
    """Return the outcome of a stage: verdict, measurements, comparisons, plan, checks, paths."""
    parts = [f"verdict: {document['verdict']}"] if document.get("verdict") else []
    labels = _labels(document)
    parts.append(measurements_text(document.get("measurements") or (), labels))
    parts.append(comparisons_text(document.get("comparisons") or (), labels))
    parts.append(references_text(document.get("references") or ()))
    parts.append(training_text(document.get("train") or {}))
    parts.append(checks_text(document.get("checks") or ()))
    parts.append(mapping_text(document.get("plan") or {}))
    places = ("run", "report", "model_card", "export", "attribution")
    parts.append(mapping_text({key: document[key] for key in places if document.get(key)}))
    return "\n\n".join(part for part in parts if part)


def _labels(document: Mapping[str, Any]) -> dict[str, str]:
    """Return what each benchmark is called where its figures stand: with source and size."""
    return {b["task"]: b["label"] for b in document.get("retention") or ()}


def measurements_text(
    measurements: Sequence[Mapping[str, Any]], labels: Mapping[str, str] = MappingProxyType({})
) -> str:
    """Return a table of measurements, each with its interval and sample size."""
    rows = [
        [
            labels.get(m["task"], str(m["task"])),
            str(m["metric"]),
            str(m["arm"]),
            _value(m, "value"),
            f"[{_value(m, 'low')}, {_value(m, 'high')}]",
            f"{m['n']:,}",
        ]
        for m in measurements
    ]
    return table(["task", "metric", "arm", "value", "interval", "n"], rows) if rows else ""


def _value(measurement: Mapping[str, Any], field: str) -> str:
    value = measurement[field]
    return f"{value:.4g}" if measurement["metric"] == "perplexity" else _percent(value)


def comparisons_text(
    comparisons: Sequence[Mapping[str, Any]], labels: Mapping[str, str] = MappingProxyType({})
) -> str:
    """Return a line for each paired comparison."""
    named = {task: f"{task}: " for task in labels}
    return "\n".join(
        f"{named.get(c.get('task', ''), '')}{c['b']} against {c['a']}: {c['verdict']}, "
        f"{100 * c['difference']:+.1f} points "
        f"[{100 * c['low']:+.1f}, {100 * c['high']:+.1f}], {_p_value(c['p'])}, n = {c['n']:,}; "
        f"this n would have seen {100 * c['detectable']:.1f} points"
        for c in comparisons
    )


def references_text(references: Sequence[Mapping[str, Any]]) -> str:
    """Return a line for each figure from outside the run, such as a linear model's."""
    return "\n".join(
        f"for comparison: {r['name']} {_percent(r['value'])}, n = {r['n']:,} ({r['source']})"
        for r in references
    )


def training_text(train: Mapping[str, Any]) -> str:
    """Return in one sentence how the weights came about."""
    if not train:
        return ""
    how = "stopped early" if train.get("stopped") == "early" else "went to the end"
    return (
        f"training {how}: {train['steps']:,} steps, best at step {train['best_step']:,} with "
        f"held-out loss {train['best_loss']:.4f} (at the start {train['start_loss']:.4f}), "
        f"{train['tokens_per_second']:,.0f} tokens/s"
    )


def checks_text(checks: Sequence[Mapping[str, Any]], colour: bool = False) -> str:
    """Return a line for each check, with the remedy under one that failed."""
    lines = []
    for check in checks:
        state = "waived" if check.get("waived") else "passed" if check["passed"] else "REFUSED"
        shown = f"{_STATE[state]}{state:<7}{_END}" if colour else f"{state:<7}"
        lines.append(f"{shown}  {check['name']}: {check['detail']}")
        if state != "passed":
            lines += [f"           {row}" for row in check.get("rows", ())]
            lines += [f"           -> {check['remedy']}"] if check.get("remedy") else []
    return "\n".join(lines)


def mapping_text(mapping: Mapping[str, Any], indent: str = "") -> str:
    """Return `key  value` lines in the unit that a key ends with; nested mappings are indented."""
    width = max((len(str(key)) for key in mapping), default=0)
    lines = []
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            lines.append(f"{indent}{key}")
            lines.append(mapping_text(value, indent + "  "))
        else:
            lines.append(f"{indent}{key!s:<{width}}  {_figure(str(key), value)}")
    return "\n".join(line for line in lines if line)


def runs_text(summaries: Sequence[Mapping[str, Any]], root: str) -> str:
    """Return the table of runs."""
    if not summaries:
        return f"no runs in {root}"
    rows = []
    for run in summaries:
        tuned, interval = run.get("tuned"), ""
        if tuned:
            interval = f" [{_percent(tuned['low'])}, {_percent(tuned['high'])}] n {tuned['n']:,}"
        rows.append(
            [
                run["run"],
                run.get("name") or "",
                run.get("verb") or "",
                run["status"],
                (run.get("created") or "")[:16].replace("T", " "),
                run.get("outcome") or "",
                f"{_percent(tuned['value'])}{interval}" if tuned else run.get("problem") or "",
            ]
        )
    return table(["run", "name", "verb", "status", "created (UTC)", "outcome", "tuned"], rows)


def run_text(run: Mapping[str, Any]) -> str:
    """Return everything known about one run."""
    changed = run.get("changed")
    sealed = "not sealed" if changed is None else "as sealed"
    if changed:
        sealed = f"CHANGED since the seal: {', '.join(changed)}"
    keys = ("run", "name", "verb", "status", "problem", "created", "finished", "seed", "verdict")
    head = {key: run[key] for key in keys if run.get(key) is not None} | {"files": sealed}
    seconds = run.get("seconds_by_stage", {}).items()
    spent = {f"time: {stage}": duration(value) for stage, value in seconds}
    labels = _labels(run)
    parts = [mapping_text(head | spent), measurements_text(run.get("measurements", ()), labels)]
    parts.append(comparisons_text(run.get("comparisons", ()), labels))
    return "\n\n".join(part for part in parts if part)


def key_text(key: str, entry: Mapping[str, Any], inside: Sequence[str] = ()) -> str:
    """Return one key of a recipe: type, default, meaning, and the keys of a section."""
    lines = [key, f"  type     {entry['type']}"]
    if not inside:
        lines.append(f"  default  {plain(entry['default'])}")
    lines += ["", *_wrapped(entry["meaning"], 78, "  ")]
    lines += ["", *(f"  {name}" for name in inside)] if inside else []
    return "\n".join(lines)


def keys_text(keys: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the list of all keys with types and defaults."""
    rows = [
        [key, "" if entry["type"].startswith("section") else plain(entry["default"]), entry["type"]]
        for key, entry in keys.items()
    ]
    return table(["key", "default", "takes"], rows)


def row_text(pieces: Sequence[tuple[str, float]], colour: bool) -> str:
    """Return a rendered row with its supervised text in green (yellow: weight not 1), or in [[ ]].

    >>> print(row_text([("Q? ", 0.0), ("A", 1.0), (".", 1.0)], colour=False))
    Q? [[A.]]
    <BLANKLINE>
    2 of 5 characters are supervised (40%)
    """
    text = ""
    last = 0.0
    for piece, weight in (*pieces, ("", 0.0)):
        if weight != last:
            text += (_END if colour else _CLOSE) if last else ""
            text += ((_GREEN if weight == 1 else _YELLOW) if colour else _OPEN) if weight else ""
            last = weight
        text += piece.replace("\x1b", "\\x1b")
    supervised = sum(len(piece) for piece, weight in pieces if weight)
    total = sum(len(piece) for piece, _ in pieces)
    share = supervised / max(1, total)
    return f"{text}\n\n{supervised:,} of {total:,} characters are supervised ({share:.0%})"


def error_text(message: str, remedy: str, colour: bool = False) -> str:
    """Return an error as people see it: what is wrong, then what to do."""
    head = f"{_RED}error{_END}" if colour else "error"
    return f"{head}: {message}\n  -> {remedy}" if remedy else f"{head}: {message}"


def plain(value: Any) -> str:
    """Return a value as it is written in YAML, on one line.

    >>> [plain(v) for v in (None, True, (0, 8), {"kind": "lora"}, "auto", 1e-8)]
    ['null', 'true', '[0, 8]', '{kind: lora}', 'auto', '1e-08']
    """
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {plain(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(plain(inner) for inner in value) + "]"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _figure(key: str, value: Any) -> str:
    """Return a value in the unit that its name ends with."""
    if isinstance(value, bool) or not isinstance(value, int | float) or key == "seed":
        return plain(value)
    if key.endswith("_bytes"):
        return f"{value / 1e9:.2f} GB"
    if key.endswith("_seconds"):
        return duration(value)
    if isinstance(value, int) or value >= 1000:
        return f"{value:,.0f}"
    return f"{value:g}"


def _percent(value: float | None) -> str:
    return "?" if value is None else f"{100 * value:.1f}%"


def _p_value(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _wrapped(text: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent)
