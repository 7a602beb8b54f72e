"""The sections of record: data and ledger, pre-flight, recipe, machine and cost, recomputing."""

import shlex
from typing import Any

import yaml

from postgrad.report import charts
from postgrad.report.charts import NARROW, WIDE
from postgrad.report.collect import TUNED, Data, Lengths, Report
from postgrad.report.markup import Content, Html, join, tag
from postgrad.report.parts import empty, facts_list, figure, note, section, table
from postgrad.report.words import (
    NOT_MEASURED,
    count,
    duration,
    method_name,
    number,
    percent,
    size,
)
from postgrad.types import Check

_EXAMPLES = 5
"""Rows named under a ledger entry or a failed check; the files hold all."""

_STEPS = {
    "invalid": "malformed",
    "duplicate": "the same request as a kept row",
    "overlap": "too like a row of another split",
    "overlength": "longer than max_length",
    "truncated": "cut to max_length (kept)",
    "replay": "a general chat that could not be trained on as it is",
    "limit": "over the limit asked for",
}


def data_section(report: Report) -> Html:
    """Return source files, rows per split, lengths and the ledger of dropped rows."""
    data = report.data
    if data is None:
        return section("Data", "data", empty("no manifest of the data was written"))
    files = [
        [
            tag("span", file.file, class_="break"),
            file.format or "not recorded",
            count(file.rows) if file.rows is not None else "not recorded",
            tag("code", file.sha256, class_="hash") if file.sha256 else "not recorded",
        ]
        for file in data.files
    ]
    splits = [(name.capitalize(), count(rows, "row")) for name, rows in data.splits.items()]
    demo = report.record.get("demo")
    return section(
        "Data",
        "data",
        facts_list([*splits, ("Not used", _not_used(data))]),
        table(["File", "Format", "#Rows", "SHA-256"], files) if files else None,
        facts_list((str(k).replace("_", " ").capitalize(), _plain(v)) for k, v in demo.items())
        if isinstance(demo, dict)
        else None,
        _lengths(report.lengths) if report.lengths else None,
        _ledger(data),
    )


def _lengths(lengths: Lengths) -> Html:
    words = {"median": "Median row", "longest": "Longest row", "max_length": "Limit"}
    counted = facts_list(
        (words.get(name, f"{name.removeprefix('p')}% of rows up to"), count(tokens, "token"))
        for name, tokens in lengths.quantiles.items()
    )
    drawn = None
    if lengths.counts:
        drawings = [charts.length_chart(lengths, width=w, name=f"rows-{w}") for w in (WIDE, NARROW)]
        drawn = figure(drawings, "Rows by their length in tokens.")
    return join([tag("h3", "Tokens per row"), counted if lengths.quantiles else None, drawn])


def _not_used(data: Data) -> str:
    unused = [row for row in data.dropped if row.step != "truncated"]
    return count(len(unused), "row")


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True)


def _ledger(data: Data) -> Html:
    title = tag("h3", "Ledger: every row that was not used, and why")
    if not data.dropped:
        return join([title, note("No row was dropped.")])
    rows = []
    for step, dropped in data.dropped_by_step.items():
        reasons = [
            tag(
                "li",
                tag("code", row.source),
                f": {row.reason}",
                join([" (kept: ", tag("code", row.twin), ")"]) if row.twin else None,
                dir="auto",
            )
            for row in dropped[:_EXAMPLES]
        ]
        left = len(dropped) - len(reasons)
        if left:
            reasons.append(
                tag("li", f"and {count(left)} more in ", tag("code", "data/dropped.jsonl"))
            )
        rows.append(
            [
                tag("b", step),
                count(len(dropped)),
                join([_STEPS.get(step, ""), tag("ul", *reasons, class_="rows")]),
            ]
        )
    return join([title, table(["Step", "#Rows", "Reason"], rows)])


def preflight_section(report: Report) -> Html:
    """Return every check with its verdict; what was waived stands out."""
    checks = report.checks
    if checks is None:
        return section("Pre-flight", "preflight", empty("no check was run"))
    order = sorted(checks, key=lambda c: (c.passed, not c.waived))
    passed = sum(check.passed for check in checks)
    counts = [(passed, "passed"), (len(report.waived), "waived"), (len(report.refused), "refused")]
    summary = ", ".join(f"{count(n)} {word}" for n, word in counts if n)
    rows = [[_state(c), tag("b", c.name), _finding(c)] for c in order]
    return section(
        "Pre-flight",
        "preflight",
        tag("p", f"Checked on these rows and this model before the first step: {summary}."),
        table(["Result", "Check", "Finding"], rows),
    )


def _state(check: Check) -> Html:
    if check.passed:
        return tag("span", "✓ passed", class_="badge good")
    if check.waived:
        return tag("span", "! WAIVED", class_="badge waived")
    return tag("span", "✗ refused", class_="badge bad")


def _finding(check: Check) -> Html:
    parts: list[Content] = [tag("span", check.detail, dir="auto")]
    if not check.passed:
        failures = count(check.failures, "failure") if check.failures else ""
        named = [tag("code", row) for row in check.rows[:_EXAMPLES]]
        left = max(check.failures, len(check.rows)) - len(named)
        if failures or named:
            more = f" and {count(left)} more" if named and left > 0 else ""
            before = f"{failures}{': ' if failures and named else ''}"
            parts.append(tag("p", before, join(named, ", "), more, class_="note"))
        if check.remedy:
            parts.append(tag("p", f"Remedy: {check.remedy}", class_="note", dir="auto"))
        if check.waived:
            parts.append(
                tag("p", tag("b", "Overruled by train.waive in the recipe."), class_="note")
            )
    return join(parts)


def training_facts(report: Report) -> Html | None:
    """Return what was trained on what and how fast."""
    t = report.training
    if t is None:
        return None
    trained: Content = NOT_MEASURED
    if t.trainable_parameters is not None and t.total_parameters:
        share = percent(t.trainable_parameters / t.total_parameters)
        trained = f"{count(t.trainable_parameters)} of {count(t.total_parameters)} ({share})"
    steps = NOT_MEASURED if t.steps is None else count(t.steps)
    return facts_list(
        [
            ("Parameters trained", trained),
            ("Optimizer steps", steps),
            ("Passes over the rows", number(t.epochs, 3)),
            ("Tokens", _count(t.tokens)),
            ("Supervised tokens", _count(t.supervised_tokens)),
            ("Tokens per second", _count(t.tokens_per_second)),
            (
                "KL to the base",
                None if t.probe_kl is None else f"{number(t.probe_kl)} nats a token",
            ),
            ("Peak memory", size(t.peak_memory_bytes)),
            ("Peak learning rate", number(t.learning_rate)),
            ("Tokens per batch", _count(t.tokens_per_batch)),
            ("Tokens per forward pass", _count(t.micro_batch_tokens)),
            ("Precision", t.precision_in_words or NOT_MEASURED),
            ("Attention in batches up to", _tokens(t.attention_bucket_tokens)),
            ("Packed", {True: "yes", False: "no", None: NOT_MEASURED}[t.packed]),
        ]
    )


def _tokens(value: int | None) -> str:
    return NOT_MEASURED if value is None else f"{count(value)} tokens"


def _count(value: float | None) -> str:
    return NOT_MEASURED if value is None else count(value)


def recipe_section(report: Report) -> Html:
    """Return what was asked for, with every `auto` resolved where that happened."""
    recipe = report.recipe
    adapt = recipe.model.adapt
    kind = (
        "full tuning" if adapt.kind == "full" else f"LoRA, r {adapt.r}, alpha {adapt.lora_alpha:g}"
    )
    train = recipe.train
    resolved = "Every auto is resolved." if report.resolved else "As given: auto not yet resolved."
    return section(
        "Recipe",
        "recipe",
        facts_list(
            [
                ("Base model", recipe.model.base),
                ("Method", kind),
                ("Learning rate", _setting(train.learning_rate)),
                ("Schedule", f"{train.lr_scheduler_type}, {percent(train.warmup_ratio)} warm-up"),
                ("Passes, at most", number(train.num_train_epochs)),
                ("Longest row", count(recipe.data.max_length, "token")),
                ("Seed", str(recipe.seed)),
                ("Recipe hash", str(report.record.get("recipe_hash", ""))[:16]),
            ]
        ),
        tag(
            "details",
            tag("summary", f"The whole recipe. {resolved}"),
            tag("pre", tag("code", recipe.to_yaml())),
        ),
    )


def _setting(value: float | str) -> str:
    return value if isinstance(value, str) else number(value)


def money(report: Report) -> str:
    """Return the cost of the recorded time, or say that no price was given."""
    if report.recipe.report.price_per_hour is None:
        return "no price given (report.price_per_hour): time only"
    if report.cost is None:
        return NOT_MEASURED
    settings = report.recipe.report
    digits = 2 if report.cost >= 0.1 else 4
    return f"{settings.currency} {report.cost:,.{digits}f}"


def machine_section(report: Report) -> Html:
    """Return hardware, versions, time per stage and cost."""
    hardware = dict(report.record.get("hardware") or {})
    versions = dict(report.record.get("versions") or {})
    total = sum(report.seconds.values())
    stages = [
        [stage, duration(spent), percent(spent / total) if total else ""]
        for stage, spent in report.seconds.items()
    ]
    price = report.recipe.report.price_per_hour
    at = "" if price is None else f" at {report.recipe.report.currency} {price:g} an hour"
    features = ", ".join(hardware.get("features") or [])
    known = ("system", "processor", "features", "cores", "memory_bytes")
    others = [(str(k).capitalize(), _plain(v)) for k, v in hardware.items() if k not in known]
    return section(
        "Machine, time and cost",
        "machine",
        facts_list(
            [
                ("Processor", f"{hardware.get('processor', NOT_MEASURED)}"),
                ("Cores", str(hardware.get("cores", NOT_MEASURED))),
                ("Instructions", features or None),
                ("Memory", size(hardware.get("memory_bytes"))),
                ("System", hardware.get("system")),
                *others,
                ("Time", duration(total) if total else NOT_MEASURED),
                ("Cost", money(report) + (at if report.cost is not None else "")),
            ]
        ),
        table(["Stage", "#Time", "#Share"], stages) if stages else empty("no stage was timed"),
        note("Versions: ", ", ".join(f"{name} {version}" for name, version in versions.items())),
    )


def recompute_section(report: Report) -> Html:
    """Return the commands that give these numbers again."""
    run = str(report.record.get("id", report.path.name))
    several = report.record.get("seeds") or ()
    seeds = f" --seeds {len(several)}" if several else ""
    chosen = report.training.base_precision if report.training else None
    same = f" train.base_precision={chosen}" if chosen else ""
    lines = [
        f"RUN={shlex.quote(run)}  # the folder of this page",
        "# this page and the model card again, from the files of the run",
        'postgrad report "$RUN"',
        "# the whole run again, in the folder where it was started",
        f'postgrad run "$RUN/recipe.yaml"{same} --out again{seeds}',
    ]
    evaluation = report.evaluation
    tuned = evaluation.tuned if evaluation else None
    if tuned and tuned.evidence and not several:
        lines += [
            f"# {TUNED}: {tuned.value:.6g} on {tuned.n} rows, from its evidence alone",
            'cd "$RUN"',
            recompute_command(tuned.evidence, tuned.metric),
        ]
    method = f" Intervals: {method_name(tuned.method)}." if tuned else ""
    return section(
        "Recompute",
        "recompute",
        tag("pre", tag("code", "\n".join(lines))),
        note(
            "Every number above is in run.json, metrics.jsonl, preflight.json, data/ or evidence/; "
            f"a finished run holds the SHA-256 of each file in run.json.{method}"
        ),
    )


def recompute_command(evidence: str, metric: str) -> str:
    """Return a shell line that prints mean and n of a metric from an evidence file."""
    return (
        'python -c "import json; '
        f"r = [json.loads(line) for line in open('{evidence}')]; "
        f"v = [0 if x['error'] else x['scores']['{metric}']['value'] for x in r]; "
        'print(sum(v) / len(v), len(v))"'
    )
