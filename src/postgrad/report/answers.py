"""Wins and losses side by side: what the best base arm and the tuned model answered, row by row."""

from collections.abc import Sequence

from postgrad.report.collect import TUNED, Answers, Evaluation, Outcome, Pair, Report
from postgrad.report.markup import Html, join, tag
from postgrad.report.parts import empty, folded, note, section
from postgrad.report.words import arm_name, count

_GROUPS: tuple[tuple[Outcome, str, str, int], ...] = (
    ("loss", "Lost", "The base model was right and the tuned model was not.", 55_000),
    ("win", "Won", "The tuned model was right and the base model was not.", 55_000),
    ("both-wrong", "Both wrong", "Neither was right.", 40_000),
    ("both-right", "Both right", "Training changed nothing here.", 20_000),
)
"""Outcome, name, meaning, and bytes of the page it may take (what is left over goes on)."""

_MOST = 60
"""Rows shown of one outcome."""
_OPEN = 5
"""Rows of one outcome that stand open."""


def answers_section(report: Report) -> Html:
    """Return the section of paired answers, with a filter that needs no script."""
    evaluation = report.evaluation
    answers = evaluation.answers if evaluation else None
    if evaluation is None or answers is None or not answers.pairs:
        why = "the rows answered by a base arm and by the tuned model are not both there"
        return section("Wins and losses", "answers", empty(why))
    graded = any(value not in (0.0, 1.0) for p in answers.pairs for value in _values(p))
    prefix = shared_start([pair.prompt for pair in answers.pairs])
    filters = [*_filter("all", f"All {count(len(answers.pairs))}", checked=True)]
    groups, spare = [], 0
    for outcome, name, meaning, budget in _GROUPS:
        total = answers.count(outcome)
        filters += _filter(outcome, f"{name} {count(total)}")
        cards = _cards(answers, outcome, len(prefix), budget + spare)
        spare += budget - sum(len(card.encode()) for card in cards)
        sense = f"{name}: the tuned answer scored {_SCORED[outcome]}." if graded else meaning
        groups.append(_group(outcome, f"{name}: {count(total)}", sense, total, cards))
    return section(
        "Wins and losses",
        "answers",
        note(
            f"{arm_name(answers.base_arm)} against the tuned model, row by row on the test rows. "
            "Rows stand in the order of their content hash: nobody picked them. ",
            f"{count(answers.unpaired, 'row')} without a partner left out. "
            if answers.unpaired
            else None,
            "All of them: ",
            *_paths(evaluation, answers),
            ".",
        ),
        _start(prefix) if prefix else None,
        tag("div", *filters, *groups, class_="answers"),
    )


_SCORED: dict[Outcome, str] = {
    "loss": "lower",
    "win": "higher",
    "both-wrong": "the same and did not pass",
    "both-right": "the same and passed",
}


def shared_start(prompts: Sequence[str], least: int = 12) -> str:
    """Return the words that two or more prompts all start with, up to a space; "" when short.

    >>> shared_start(["Name the licence: MIT.", "Name the licence: BSD."])
    'Name the licence: '
    """
    first, last = min(prompts), max(prompts)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), 0)
    start = first[:same]
    cut = max(start.rfind(" "), start.rfind("\n")) + 1
    return start[:cut] if cut >= least else ""


def _start(prefix: str) -> Html:
    title = tag("h4", "Every prompt starts with")
    return tag("div", title, folded(prefix.strip(), 300, 1500), class_="prefix")


def _values(pair: Pair) -> tuple[float, float]:
    return pair.base_value, pair.tuned_value


def _paths(evaluation: Evaluation, answers: Answers) -> list[Html]:
    arms = (answers.base_arm, TUNED)
    files = [tag("code", m.evidence) for m in evaluation.main if m.arm in arms and m.evidence]
    return [join(files, " and ")] if files else [Html("evidence/")]


def _filter(outcome: str, label: str, *, checked: bool = False) -> list[Html]:
    name = f"show-{outcome}"
    return [
        tag("input", type="radio", name="show", id=name, checked="" if checked else None),
        tag("label", label, for_=name),
    ]


def _cards(answers: Answers, outcome: Outcome, prefix: int, budget_bytes: int) -> list[Html]:
    cards: list[Html] = []
    for pair in answers.pairs:
        if pair.outcome != outcome:
            continue
        card = _card(pair, answers.base_arm, prefix)
        budget_bytes -= len(card.encode())
        if len(cards) == _MOST or (cards and budget_bytes < 0):
            break
        cards.append(card)
    return cards


def _group(outcome: Outcome, title: str, meaning: str, total: int, cards: list[Html]) -> Html:
    shown, more = cards[:_OPEN], cards[_OPEN:]
    left_out = total - len(cards)
    ending = f"; the other {count(left_out)} are in the files" if left_out else ""
    return tag(
        "div",
        tag("h3", title),
        note(meaning),
        *shown,
        tag("details", tag("summary", f"{count(len(more))} more{ending}"), *more, class_="more")
        if more
        else None,
        class_=f"group {outcome}",
    )


def _card(pair: Pair, base_arm: str, prefix: int) -> Html:
    short = arm_name(base_arm).removesuffix(" in the prompt")
    return tag(
        "article",
        tag("div", tag("h4", "Prompt"), folded(pair.prompt[prefix:], 300, 1500), class_="prompt"),
        _answer("Reference", pair.reference, None, "reference"),
        _answer(short, pair.base, pair.base_value, "base"),
        _answer("Tuned model", pair.tuned, pair.tuned_value, "tuned"),
        class_="case",
        id=f"row-{pair.example_id}",
    )


def _answer(title: str, text: str, value: float | None, style: str) -> Html:
    mark = None
    if value is not None:
        right = value >= 1
        words = "right" if right else "wrong" if value <= 0 else f"{value:.2f}"
        sign = {"right": "✓ ", "wrong": "✗ "}.get(words, "")
        mark = tag("span", f"{sign}{words}", class_=f"mark {'good' if right else 'bad'}")
    return tag(
        "div", tag("h4", title, " ", mark), folded(text, 200, 1200), class_=f"answer {style}"
    )
