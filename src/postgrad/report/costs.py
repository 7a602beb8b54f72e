"""The cost section: what a request takes in each arm, and when tuning is cheaper than prompting."""

from postgrad.evaluate.cost import ArmCost, Costs, Typical
from postgrad.report.charts import NARROW, WIDE, Axes, Line, Mark, line_chart, short_arm
from postgrad.report.collect import TUNED, Evaluation, Report
from postgrad.report.markup import Content, Html, tag
from postgrad.report.parts import empty, figure, note, section, table
from postgrad.report.words import arm_name, capital, count, number

TITLE = "Cost of a request"
UNITS = ((7200, 3600, "Hours"), (120, 60, "Minutes"), (0, 1, "Seconds"))
"""From how many seconds on a chart is drawn in which unit."""
NO_LATENCY = (
    "Measured on this machine, in batches: a request's seconds are its share of its batch, not how "
    "long one caller waits. A prompt beginning that all requests share was computed once, as in a "
    "server with a prefix cache. Training is the time of this one run; labour is not in it."
)


def costs_section(report: Report) -> Html | None:
    """Return the section; None when nothing was evaluated."""
    evaluation = report.evaluation
    if evaluation is None:
        return None
    costs = evaluation.costs
    if costs is None or not costs.arms:
        return section(TITLE, "costs", empty("the evidence holds no cost of a request"))
    heads = ["Arm", "#Prompt tokens", "#Answer tokens", "#Seconds", "#n", "#Break-even requests"]
    return section(
        TITLE,
        "costs",
        tag("p", break_even_sentence(evaluation)),
        _break_even_figure(evaluation, costs),
        table(heads, [_row(cost, costs) for cost in costs.arms]),
        note("Mean, with the median in brackets. ", NO_LATENCY),
    )


def break_even_sentence(evaluation: Evaluation) -> str:
    """Say after how many requests tuning is cheaper than the best way of prompting."""
    best, costs = evaluation.best_base, evaluation.costs
    found = costs.against(best.arm) if costs and best else None
    if found is None:
        return "Break-even: not measured; it needs a trained model and a prompting arm."
    return f"Against the best prompt: {found.finding}."


def _break_even_figure(evaluation: Evaluation, costs: Costs) -> Html | None:
    """Draw the machine time of each arm over the number of requests; None without a break-even."""
    best = evaluation.best_base
    tuned = next((cost for cost in costs.arms if cost.arm == TUNED), None)
    if not costs.break_even or best is None or tuned is None or not tuned.seconds.mean:
        return None
    decisive, training = costs.against(best.arm), costs.break_even[0].training_seconds
    known = [b.requests for b in costs.break_even if b.requests is not None]
    crossing = decisive.requests if decisive and decisive.requests is not None else None
    most = 2 * (crossing or max(known, default=training / tuned.seconds.mean))
    ends = {cost.arm: most * cost.seconds.mean for cost in costs.arms}
    ends[TUNED] += training
    _, unit, name = next(entry for entry in UNITS if max(ends.values()) >= entry[0])
    starts = {TUNED: training / unit}
    ring = None
    if crossing is not None:
        ring = crossing, (training + crossing * tuned.seconds.mean) / unit
    drawings = [
        line_chart(
            [
                Line(
                    [(0, starts.get(arm, 0.0)), (most, end / unit)],
                    "tuned" if arm == TUNED else "base",
                    label=short_arm(arm, NARROW),
                )
                for arm, end in ends.items()
            ],
            title="Break-even",
            description=f"{name} of machine time over requests. "
            + "; ".join(found.finding for found in costs.break_even),
            width=width,
            height=320 if width > 500 else 280,
            name=f"break-even-{width}",
            marks=[Mark(*ring, count(ring[0], "request" if width == WIDE else ""))] if ring else [],
            axes=Axes(x="requests"),
        )
        for width in (WIDE, NARROW)
    ]
    caption = f"{name} of machine time over the number of requests, training included."
    return figure(drawings, caption)


def _row(cost: ArmCost, costs: Costs) -> list[Content]:
    found = costs.against(cost.arm)
    requests = "" if found is None else "never" if found.requests is None else count(found.requests)
    return [
        capital(arm_name(cost.arm)),
        _typical(cost.prompt_tokens),
        _typical(cost.completion_tokens),
        _typical(cost.seconds),
        count(cost.n),
        requests,
    ]


def _typical(value: Typical) -> str:
    return f"{number(value.mean, 3)} ({number(value.median, 3)})"
