"""The retention section: benchmarks of general ability before and after, each with its interval."""

from collections.abc import Sequence

from postgrad.report.abilities import Benchmark, Retention
from postgrad.report.charts import NARROW, WIDE, forest
from postgrad.report.collect import TUNED, Report
from postgrad.report.markup import Content, Html, tag
from postgrad.report.parts import empty, figure, note, section, table
from postgrad.report.words import (
    count,
    interval,
    level,
    metric_name,
    number,
    p_value,
    percent,
    points,
    points_interval,
)
from postgrad.types import Measurement, Verdict

TITLE = "General abilities, before and after"
_TONE = {Verdict.IMPROVED: "good", Verdict.WORSE: "bad", Verdict.INCONCLUSIVE: "open"}


def retention_section(report: Report) -> Html:
    """Return the section; it says so when nothing was measured."""
    retention = report.evaluation.retention if report.evaluation else None
    if retention is None:
        why = "the recipe names no benchmarks in evaluate.retention"
        return section(TITLE, "retention", empty(why))
    within = level(report.recipe.evaluate.confidence)
    drawn = None
    if retention.of_tuned:
        pictures = [
            forest(retention.of_tuned, width=width, name=f"retention-{width}")
            for width in (WIDE, NARROW)
        ]
        caption = f"Tuned minus base in points, with {within} intervals; left of zero is a loss."
        drawn = figure(pictures, caption)
    return section(
        TITLE,
        "retention",
        drawn,
        _table(retention, within),
        _perplexities(retention),
        note(*_remarks(retention)),
    )


def _table(retention: Retention, within: str) -> Html:
    heads = ["Benchmark", "Metric", "#Base", "#Tuned", "#Points", f"#{within} interval", "#p"]
    rows: list[list[Content]] = []
    for benchmark in retention.benchmarks:
        c = retention.compared(benchmark)
        row: list[Content] = [benchmark.label, metric_name(benchmark.metric)]
        row += [_figure(retention.measured(benchmark, arm)) for arm in ("base", TUNED)]
        if c is None:
            row += ["", "", "", ""]
        else:
            badge = tag("span", str(c.verdict), class_=f"badge {_TONE[c.verdict]}")
            row += [tag("b", points(c.difference)), points_interval(c)]
            row += [p_value(c.p).removeprefix("p = ").removeprefix("p "), badge]
        rows.append(row)
    return table([*heads, "Verdict"], rows)


def _figure(m: Measurement | None) -> str:
    return "not measured" if m is None else f"{percent(m.value)} ({interval(m.low, m.high)})"


def _perplexities(retention: Retention) -> Html | None:
    found = [m for m in retention.measurements if m.metric == "perplexity"]
    said = [
        f"{m.task}, {m.arm}: {number(m.value)} ({number(m.low)} to {number(m.high)}, "
        f"n = {count(m.n)})"
        for m in found
    ]
    return tag("p", f"Perplexity of the last word: {'; '.join(said)}.") if said else None


def _remarks(retention: Retention) -> Sequence[Content]:
    said = [f"{_guess(b)}{_prompt(b)} " for b in retention.benchmarks]
    return ["Figures of a part of a benchmark are not its standard score. ", *said]


def _guess(benchmark: Benchmark) -> str:
    chance = "" if benchmark.chance is None else f"guessing gets {percent(benchmark.chance)}, "
    return f"{benchmark.task}: {chance}"


def _prompt(benchmark: Benchmark) -> str:
    asked = "under the chat template" if benchmark.template == "chat" else "without chat template"
    shots = f" with {count(benchmark.shots, 'example')}" if benchmark.shots else ""
    lost = f", {count(benchmark.unusable, 'row')} left out" if benchmark.unusable else ""
    return f"asked {asked}{shots}, prompt of {benchmark.origin}{lost}."
