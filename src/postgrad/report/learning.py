"""The learning curve: the tuned model's score over the rows it was trained on."""

from postgrad.evaluate.learning_curve import LearningCurve
from postgrad.report.charts import NARROW, WIDE, Axes, Line, Span, line_chart
from postgrad.report.collect import Report
from postgrad.report.markup import Html, tag
from postgrad.report.parts import figure, note, section, table
from postgrad.report.words import (
    capital,
    count,
    duration,
    interval,
    level,
    metric_name,
    p_value,
    percent,
)

_AXES = Axes(
    x="training rows",
    start=0.0,
    tick=lambda value: f"{100 * value:.0f}%",
    point=lambda x, y: f"{count(x, 'row')}: {percent(y)}",
)


def learning_section(report: Report) -> Html | None:
    """Return the section; None when the recipe asks for no learning curve."""
    evaluation = report.evaluation
    curve = evaluation.learning_curve if evaluation else None
    if evaluation is None or curve is None:
        return None
    within = level(evaluation.confidence)
    drawings = [_chart(curve, width) for width in (WIDE, NARROW)]
    caption = (
        f"{capital(metric_name(evaluation.metric))} on the test rows, with {within} intervals."
    )
    rows = [
        [
            f"{100 * s.share:g}%",
            count(s.rows),
            percent(s.value),
            interval(s.low, s.high),
            count(s.n),
            count(s.steps),
            duration(s.train_seconds),
        ]
        for s in curve.shares
    ]
    heads = ["#Share", "#Training rows", "#Value", f"#{within} interval", "#n", "#Steps"]
    return section(
        "Would more rows help?",
        "learning-curve",
        tag("p", f"{capital(curve.finding)} ({p_value(curve.comparison.p)})."),
        figure(drawings, caption),
        table([*heads, "#Training time"], rows),
        note(
            "Each share is a part of the next. Passes over the rows, learning rate, validation and "
            "test rows are the same, so that a share takes fewer steps. One training each: the "
            "intervals cover the choice of test rows, not that of the seed or of the share."
        ),
    )


def _chart(curve: LearningCurve, width: int) -> Html:
    facts = "; ".join(
        f"{count(s.rows, 'row')}: {percent(s.value)} ({interval(s.low, s.high)})"
        for s in curve.shares
    )
    return line_chart(
        [Line([(s.rows, s.value) for s in curve.shares], "held-out", dots=True)],
        title="Learning curve",
        description=f"Score of the tuned model over training rows. {facts}.",
        width=width,
        height=260 if width > 500 else 230,
        name=f"learning-{width}",
        spans=[Span(s.rows, s.low, s.high) for s in curve.shares],
        axes=_AXES,
    )
