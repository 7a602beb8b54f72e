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
    parts.append(gates_text(document.get("gates") or ()))
    parts.append(measurements_text(document.get("measurements") or (), labels))
    parts.append(comparisons_text(document.get("comparisons") or ()))
    parts.append(dial_text(document.get("dial") or {}))
    parts.append(frontiers_text(document.get("frontiers") or ()))
    parts.append(seeds_text(document.get("seeds") or ()))
    parts.append(references_text(document.get("references") or ()))
    parts.append(prompt_search_text(document.get("prompt_search") or {}))
    parts.append(costs_text(document.get("costs") or {}))
    parts.append(learning_curve_text(document.get("learning_curve") or {}))
    parts.append(training_text(document.get("train") or {}))
    parts.append(checks_text(document.get("checks") or ()))
    plan = document.get("estimate") or document.get("plan") or {}
    parts.append(rows_needed_text(plan) if "points" in plan else estimate_text(plan))
    changed = {
        key: f"{plain(a)} -> {plain(b)}" for key, (a, b) in document.get("recipe", {}).items()
    }
    parts.append(mapping_text({"recipe": changed}) if changed else "")
    parts += [f"only in {what}" for what in document.get("unshared", ())]
    places = ("run", "report", "model_card", "export", "picture", "attribution")
    parts.append(mapping_text({key: document[key] for key in places if document.get(key)}))
    return "\n\n".join(part for part in parts if part)


def gates_text(gates: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of the recipe's gates, and how many were met."""
    if not gates:
        return ""
    met = sum(gate["status"] == "PASS" for gate in gates)
    rows = [[gate["name"], gate["rule"], str(gate["status"]), gate["finding"]] for gate in gates]
    head = f"gates: {met} of {len(gates)} met"
    return f"{head}\n{table(['gate', 'asked for', 'result', 'finding'], rows)}"


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


def comparisons_text(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """Return a line for each paired comparison, under its task when there are several."""
    several = len({c.get("task") for c in comparisons}) > 1
    lines = []
    for c in comparisons:
        task = f"{c['task']}: " if several else ""
        corrected = c.get("corrected")
        suite = "" if corrected is None else f" (corrected for the suite: {_p_value(corrected)})"
        lines.append(
            f"{task}{c['b']} against {c['a']}: {c['verdict']}, {100 * c['difference']:+.1f} points "
            f"[{100 * c['low']:+.1f}, {100 * c['high']:+.1f}], {_p_value(c['p'])}{suite}, "
            f"n = {c['n']:,}; this n would have seen {100 * c['detectable']:.1f} points"
        )
    return "\n".join(lines)


def dial_text(dial: Mapping[str, Any]) -> str:
    """Return the points of a dial with what each keeps and loses, what they show, the choice."""
    if not dial:
        return ""
    head = (
        f"dial: {dial['n']:,} validation rows, "
        f"{', '.join(f'{items:,} of {task}' for task, items in dial['items'].items())}"
    )
    rows = [_dial_row(point, dial["chosen"]) for point in dial["points"]]
    left = [f"left out: {reason}" for reason in dial["left_out"]]
    said = [*dial["findings"], dial["choice"]]
    said += [f"exported to {dial['exported']}"] if dial["exported"] else []
    return "\n".join([head, table(_DIAL_HEADS, rows), *left, *said])


def frontiers_text(frontiers: Sequence[Mapping[str, Any]]) -> str:
    """Return the dials of several runs as one table; nothing when they cannot be compared."""
    if not frontiers:
        return ""
    rows = [
        [entry["run"], *_dial_row(point, entry["dial"]["chosen"])]
        for entry in frontiers
        for point in entry["dial"]["points"]
    ]
    head = "dials, measured on the same validation rows and benchmark items"
    return f"{head}\n{table(['run', *_DIAL_HEADS], rows)}"


_DIAL_HEADS = (
    *("point", "validation", "interval", "gain kept", "interval", "retention, points", "interval"),
    *("less forgetting than tuned", "p (corrected)", ""),
)


def _dial_row(point: Mapping[str, Any], chosen: str) -> list[str]:
    place, between = point["place"], point["spared"] is not None
    where = f"lambda {place['scale']:g}"
    if place["step"] is not None:
        where = f"step {place['step']:,}"
    kept = f"[{_percent(point['kept_low'])}, {_percent(point['kept_high'])}]"
    lost = f"[{100 * point['retention_low']:+.1f}, {100 * point['retention_high']:+.1f}]"
    spared = ""
    if between:
        spared = f"{100 * point['spared']:.1f} [{100 * point['spared_low']:+.1f}, "
        spared += f"{100 * point['spared_high']:+.1f}]"
    return [
        where,
        _percent(point["target"]),
        f"[{_percent(point['target_low'])}, {_percent(point['target_high'])}]",
        "" if point["kept"] is None else _percent(point["kept"]),
        "" if point["kept"] is None else kept,
        f"{100 * point['retention']:+.1f}",
        lost,
        spared,
        _p_value(point["corrected"]) if between else "",
        "chosen" if place["name"] == chosen else "",
    ]


def rows_needed_text(plan: Mapping[str, Any]) -> str:
    """Return the planner's table: how often arms differ, and the rows that a difference needs."""
    points, first = f"{plan['points']:g} points", plan["rows"][0]
    powers = [f"{100 * float(power):.0f}% power" for power in first["rows_to_show"]]
    rows = [
        [
            row["task"],
            row["arms"],
            f"{row['measured_rows'] or ''}",
            f"{_percent(row['discordance'])} of rows"
            if "discordance" in row
            else f"deviation {row['deviation']:.3f}",
            *(f"{n:,}" for n in row["rows_to_show"].values()),
            *(f"{n:,}" for n in row["rows_to_certify"].values()),
        ]
        for row in plan["rows"]
    ]
    heads = ["task", "arms", "tested", "arms differ on"]
    heads += [f"show, {power}" for power in powers] + [f"certify, {power}" for power in powers]
    return (
        f"test rows needed at {100 * plan['confidence']:g}% confidence\n"
        f"  show: a true difference of {points} is found, either way\n"
        f"  certify: no more than {points} were lost, when nothing was lost\n\n"
        f"{table(heads, rows)}"
    )


def seeds_text(spreads: Sequence[Mapping[str, Any]]) -> str:
    """Return a line for each figure over seeds, with what comes from seeds and what from rows."""
    return "\n".join(
        f"{s['task']} {s['metric']} {s['arm']}{' - ' + s['against'] if s['against'] else ''} over "
        f"{len(s['values'])} seeds: {', '.join(_percent(value) for value in s['values'])}; "
        f"standard deviation of seeds {100 * s['seed_deviation']:.1f} points, standard error of "
        f"rows {100 * s['row_error']:.1f} points"
        for s in spreads
    )


def references_text(references: Sequence[Mapping[str, Any]]) -> str:
    """Return a line for each figure from outside the run, such as a linear model's."""
    return "\n".join(
        f"for comparison: {r['name']} {_percent(r['value'])}, n = {r['n']:,} ({r['source']})"
        for r in references
    )


def costs_text(costs: Mapping[str, Any]) -> str:
    """Return what a request takes in each arm, and when tuning is cheaper than each prompt."""
    if not costs.get("arms"):
        return ""
    rows = [
        [
            c["arm"],
            *(f"{c[key]['mean']:,.0f}" for key in ("prompt_tokens", "completion_tokens")),
            f"{c['seconds']['mean']:.3g}",
            f"{c['seconds']['median']:.3g}",
            f"{c['n']:,}",
        ]
        for c in costs["arms"]
    ]
    heads = ["a request of", "prompt tokens", "answer tokens", "seconds", "median", "n"]
    return "\n".join([table(heads, rows), *(found["finding"] for found in costs["break_even"])])


def prompt_search_text(search: Mapping[str, Any]) -> str:
    """Return how many prompts were tried, in which time, and which was best."""
    if not search:
        return ""
    (best,) = (found for found in search["variants"] if found["name"] == search["best"])
    trained = search["training_seconds"]
    beside = "" if trained is None else f"; the training took {duration(trained)}"
    return (
        f"prompt search: {len(search['variants'])} of {search['planned']} prompts tried on "
        f"{best['n']:,} validation rows in {duration(search['seconds'])}, the best is "
        f"{best['name']} with {_percent(best['value'])}{beside}"
    )


def learning_curve_text(curve: Mapping[str, Any]) -> str:
    """Return the score on each share of the rows, and what the last rows bought."""
    if not curve:
        return ""
    rows = [
        [
            f"{100 * s['share']:g} %",
            f"{s['rows']:,}",
            _percent(s["value"]),
            f"[{_percent(s['low'])}, {_percent(s['high'])}]",
            f"{s['n']:,}",
        ]
        for s in curve["shares"]
    ]
    heads = ["trained on", "rows", "value", "interval", "n"]
    return f"{table(heads, rows)}\n{curve['finding']}"


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


def estimate_text(found: Mapping[str, Any]) -> str:
    """Return what a training takes: amount, operations, memory, time, and cost here and hosted."""
    if not found:
        return ""
    nested = ("rows", "flops", "memory", "cost")
    flat = {key: value for key, value in found.items() if key not in nested}
    rows = {f"{split} rows": count for split, count in found["rows"].items()}
    flops = {name: f"{value:.3g}" for name, value in found["flops"].items() if value}
    held = {name: value for name, value in found["memory"].items() if value}
    parts = [
        mapping_text(rows | flat),
        mapping_text({"operations (multiplications and additions)": flops}),
        mapping_text({"peak memory by formula": held}),
        _cost_text(found["cost"]),
    ]
    return "\n\n".join(parts)


def _cost_text(cost: Mapping[str, Any]) -> str:
    """Return the costs of a training as lines, what is not known as such."""
    here, rented, energy = cost["here"], cost["rented"], cost["energy"]
    lines = {"this machine": "not known: set report.price_per_hour"}
    if here:
        lines["this machine"] = f"{_money(here)} ({here['source']})"
    if rented:
        lines[f"a rented {rented['machine']}"] = f"{_money(rented)} (list price, {_origin(rented)})"
    lines["energy"] = "not known: set watts in a prices file"
    if energy:
        paid = f", {_money(energy)}" if "amount" in energy else ""
        at = f"at {energy['watts']:g} W ({energy['watts_source']})"
        lines["energy"] = f"{energy['kwh']:.3g} kWh{paid} {at}"
    for offer in cost["hosted"]:
        closed = f"; CLOSED: {offer['closed']}" if offer["closed"] else ""
        name = f"{offer['service']}, {offer['model']}"
        lines[name] = f"{_money(offer)} (list price, {_origin(offer)}{closed})"
    return mapping_text({"cost of the training": lines})


def _money(amount: Mapping[str, Any]) -> str:
    digits = 2 if amount["amount"] >= 0.1 else 4
    return f"{amount['currency']} {amount['amount']:,.{digits}f}"


def _origin(fact: Mapping[str, Any]) -> str:
    return f"{fact['source']}, {fact['date']}, {fact['url']}"


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
    parts = [mapping_text(head | spent), gates_text(run.get("gates", ()))]
    parts.append(measurements_text(run.get("measurements", ()), labels))
    parts.append(comparisons_text(run.get("comparisons", ())))
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
