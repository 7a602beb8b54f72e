"""The section of the dial: the frontier drawn, its table, what it shows and what was chosen."""

from collections.abc import Sequence

from postgrad.evaluate.frontier import Change, Frontier, FrontierPoint
from postgrad.evaluate.gates import BASE, DIALLED, TUNED
from postgrad.report.charts import NARROW, WIDE
from postgrad.report.collect import Evaluation, Report
from postgrad.report.frontier_chart import STYLES, frontier_chart
from postgrad.report.markup import Content, Html, join, tag
from postgrad.report.parts import empty, figure, note, section, table
from postgrad.report.words import (
    EN_DASH,
    arm_name,
    capital,
    count,
    interval,
    level,
    metric_name,
    p_value,
    percent,
    points,
    points_interval,
)
from postgrad.types import Verdict

TITLE = "How much of the tuning to keep"
_TONE = {Verdict.IMPROVED: "good", Verdict.WORSE: "bad", Verdict.INCONCLUSIVE: "open"}


def frontier_section(report: Report) -> Html | None:
    """Return the section; None when the recipe has no dial."""
    evaluation = report.evaluation
    dial = evaluation.dial if evaluation else None
    if dial is None or evaluation is None:
        if report.recipe.evaluate.dial is None:
            return None
        seeds = bool(evaluation and evaluation.seeds)
        why = "each seed has its own, on its page in seeds/" if seeds else "no tuned model was"
        return section(TITLE, "dial", empty(why if seeds else f"{why} evaluated"))
    drawn = [
        frontier_chart([("", dial)], width=width, name=f"dial-{width}") for width in (WIDE, NARROW)
    ]
    caption = (
        f"{capital(metric_name(dial.metric))} on {count(dial.n, 'validation row')} against the "
        f"mean change of {', '.join(dial.items)}, with {level(dial.confidence)} intervals. "
        "Right is less forgetting, up is better answers."
    )
    return section(
        TITLE,
        "dial",
        *(tag("p", said) for said in statement(dial)),
        figure(drawn, caption, _legend(dial)),
        _table(dial),
        note(*_remarks(dial)),
        _changes(dial),
        _dialled(evaluation, dial) if dial.exported else None,
    )


def frontiers_section(frontiers: Sequence[tuple[str, Frontier]]) -> Html:
    """Return the dials of several runs, which asked the same rows and items, in one picture."""
    drawn = [
        frontier_chart(frontiers, width=width, name=f"dials-{width}") for width in (WIDE, NARROW)
    ]
    _, first = frontiers[0]
    caption = (
        f"{capital(metric_name(first.metric))} on {count(first.n, 'validation row')} against the "
        f"mean change of {', '.join(first.items)}, with {level(first.confidence)} intervals. "
        "Right is less forgetting, up is better answers. The chosen point of each run has a ring."
    )
    keys = (
        tag("span", tag("i", class_=STYLES[number % len(STYLES)]), run)
        for number, (run, _) in enumerate(frontiers)
    )
    tables: list[Content] = []
    for run, dial in frontiers:
        tables += [tag("h3", run), *(tag("p", said) for said in statement(dial)), _table(dial)]
    return section(TITLE, "dial", figure(drawn, caption, tag("p", *keys, class_="legend")), *tables)


def statement(dial: Frontier) -> list[str]:
    """Return what the frontier shows and what was chosen, a sentence each."""
    where = f"; exported to {dial.exported}" if dial.exported else ""
    return [f"{_begun(said)}." for said in (*dial.findings, dial.choice + where)]


def _begun(text: str) -> str:
    """Return the text as a sentence begins; a λ stays small."""
    return text if text.startswith("\N{GREEK SMALL LETTER LAMDA}") else capital(text)


def _legend(dial: Frontier) -> Html:
    items = [(STYLES[0], "\N{GREEK SMALL LETTER LAMDA}, from the base to the tuned model")]
    if any(point.place.step is not None for point in dial.points):
        items.append((STYLES[1], "earlier checkpoints of the same training"))
    items.append(("margin", f"margin: at most {dial.margin:g} lost"))
    items.append(("chosen", "chosen"))
    keys = (tag("span", tag("i", class_=style), words) for style, words in items)
    return tag("p", *keys, class_="legend")


def _table(dial: Frontier) -> Html:
    heads = ["Point", "#Validation", "#Gain kept", "#Retention, points"]
    heads += ["#Less forgetting than tuned", "#p, corrected"]
    return table(heads, [_row(point, dial) for point in dial.points])


def _row(point: FrontierPoint, dial: Frontier) -> list[Content]:
    kept = spared = p = EN_DASH
    if point.kept is not None and point.kept_low is not None and point.kept_high is not None:
        kept = f"{percent(point.kept)} ({interval(point.kept_low, point.kept_high)})"
    if point.spared is not None and point.spared_low is not None and point.spared_high is not None:
        low, high = points(point.spared_low), points(point.spared_high)
        spared = f"{points(point.spared)} ({low} to {high})"
        p = p_value(1.0 if point.corrected is None else point.corrected)
    lost = points(point.retention)
    if point.place.name != BASE:
        lost += f" ({points(point.retention_low)} to {points(point.retention_high)})"
    return [
        _name(point, dial),
        f"{percent(point.target)} ({interval(point.target_low, point.target_high)})",
        kept,
        lost,
        spared,
        p.removeprefix("p = ").removeprefix("p "),
    ]


def _name(point: FrontierPoint, dial: Frontier) -> Html:
    """Return the point's place, and whether it is chosen or out of the question."""
    name, badge = _begun(point.place.label), None
    if not point.within_margin:
        badge = tag("span", "beyond the margin", class_="badge open")
    if point.place.name == dial.chosen:
        return join([tag("b", name), " ", tag("span", "chosen", class_="badge good")])
    return join([name, " ", badge])


def _remarks(dial: Frontier) -> list[Content]:
    left = "".join(f"Left out: {reason}. " for reason in dial.left_out)
    return [
        "\N{GREEK SMALL LETTER LAMDA} scales what was learned: 0 is the base model, 1 the tuned "
        "one. Measured on validation rows and on benchmark items that are reported nowhere else, "
        "so that the choice leaves the other figures of this page unspoilt. Retention is the mean "
        "over the benchmarks of the change against the base model, paired by item; p is corrected "
        f"by Holm's method over the points. {left}",
        "The margin is judged by the estimate; what the chosen point loses on the reported items "
        "stands below."
        if dial.exported
        else "The margin is judged by the estimate.",
    ]


def _changes(dial: Frontier) -> Html:
    rows: list[list[Content]] = [
        [_begun(point.place.label), *(_change(change) for change in point.changes)]
        for point in dial.points
        if point.changes
    ]
    heads = [f"#{task} (n = {count(n)})" for task, n in dial.items.items()]
    return tag(
        "details",
        tag("summary", "Each benchmark at each point, points against the base model"),
        table(["Point", *heads], rows),
    )


def _change(change: Change) -> str:
    return f"{points(change.difference)} ({points(change.low)} to {points(change.high)})"


def _dialled(evaluation: Evaluation, dial: Frontier) -> Html:
    """Return the chosen point on test rows and reported items, against base and tuned model."""
    general = evaluation.retention.comparisons if evaluation.retention else ()
    rows: list[list[Content]] = [
        [
            c.task,
            f"{arm_name(c.b)} against {_short(c.a)}",
            tag("b", points(c.difference)),
            points_interval(c),
            p_value(c.p if c.corrected is None else c.corrected).removeprefix("p = "),
            count(c.n),
            tag("span", str(c.verdict), class_=f"badge {_TONE[c.verdict]}"),
        ]
        for c in (*evaluation.comparisons, *general)
        if c.b == DIALLED
    ]
    heads = ["Task", "Compared", "#Points", f"#{level(dial.confidence)} interval", "#p", "#n"]
    place = dial.point(dial.chosen).place.label
    return join(
        [
            tag("h3", f"The dialled model ({place}) on test rows and reported items"),
            table([*heads, "Verdict"], rows),
            note("p of benchmarks is corrected by Holm's method over the suite."),
        ]
    )


def _short(arm: str) -> str:
    return "the tuned model" if arm == TUNED else "the base model" if arm == BASE else arm
