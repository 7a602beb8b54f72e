"""The prompt search: which prompts were tried on validation rows, and what that took."""

from postgrad.evaluate.prompt_search import PromptSearch, Tried
from postgrad.report.collect import Report
from postgrad.report.markup import Content, Html, tag
from postgrad.report.parts import note, section, table
from postgrad.report.words import (
    arm_name,
    count,
    duration,
    interval,
    level,
    number,
    percent,
)


def prompts_section(report: Report) -> Html | None:
    """Return the section; None when the recipe asks for no search."""
    search = report.evaluation.prompt_search if report.evaluation else None
    if search is None:
        return None
    within = level(report.recipe.evaluate.confidence)
    heads = ["Prompt", "System prompt", "#Validation", f"#{within} interval", "#Prompt tokens"]
    order = sorted(search.variants, key=lambda t: (-t.value, t.prompt_tokens, t.name))
    return section(
        "Prompts tried",
        "prompts",
        tag("p", effort_sentence(search)),
        table([*heads, "#Time"], [_row(t, search) for t in order]),
        note(
            "Scores on validation rows, by which the best was chosen: of so many tries the best "
            "looks better than it is. Its figure on the test rows, above, does not have that fault."
        ),
    )


def effort_sentence(search: PromptSearch) -> str:
    """Say what was tried, in which time, and how long the training took."""
    (best,) = (t for t in search.variants if t.name == search.best)
    tried = f"{count(len(search.variants))} of {count(search.planned, 'prompt')}"
    text = (
        f"{tried} tried on {count(best.n, 'validation row')} in {duration(search.seconds)}"
        f"{_limit(search)}. Best: {prompt_name(best)}, {percent(best.value)}."
    )
    if search.training_seconds is not None:
        text += f" The training took {duration(search.training_seconds)}."
    return text


def _limit(search: PromptSearch) -> str:
    limit = search.limit_seconds
    return ", without a limit" if limit is None else f" of {duration(limit)}"


def prompt_name(tried: Tried) -> str:
    """Return a variant in words, its system prompt left out."""
    ending = "" if tried.kind == "static" else f"-{tried.kind}"
    arm = f"base/few-shot-{tried.shots}{ending}" if tried.shots else "base/zero-shot"
    name = arm_name(arm).removeprefix("Base model, ").removesuffix(" in the prompt")
    return f"{name}, draw {tried.draw + 1}" if tried.shots and tried.kind == "static" else name


def _row(tried: Tried, search: PromptSearch) -> list[Content]:
    name: Content = prompt_name(tried)
    if tried.name == search.best:
        name = tag("b", name)
    system: Content = tag("i", "the rows' own")
    if tried.system is not None:
        system = tag("span", tried.system, dir="auto")
    return [
        name,
        system,
        percent(tried.value),
        interval(tried.low, tried.high),
        number(tried.prompt_tokens, 3),
        duration(tried.seconds),
    ]
