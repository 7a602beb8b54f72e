"""The cost section: what a request takes in each arm, and when tuning is cheaper than prompting."""

from postgrad.evaluate.cost import ArmCost, Costs, Typical
from postgrad.report.collect import Evaluation, Report
from postgrad.report.markup import Content, Html, tag
from postgrad.report.parts import empty, note, section, table
from postgrad.report.words import arm_name, capital, count, number

TITLE = "Cost of a request"
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
