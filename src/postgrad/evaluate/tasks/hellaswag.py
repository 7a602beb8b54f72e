"""HellaSwag: the most plausible ending (Zellers et al. 2019, arXiv 1905.07830)."""

import re

from postgrad.evaluate.tasks import Item, Kind, Row, Samples, Task, item_id
from postgrad.evaluate.tasks.rows import ORIGIN, index

_LAST_SENTENCE = re.compile(r"(?s)(.*[.!?]['\"]?) ([a-z].*)")


def clean(text: str) -> str:
    """Take WikiHow's marks out of a text, as lm-evaluation-harness does."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def context(row: Row) -> tuple[str, str]:
    """Return the context's beginning and its unfinished last sentence.

    A file that has only both in one (`ctx`) is cut before a last sentence in lower case, which is
    how such contexts are made.
    """
    if "ctx_a" in row:
        return row["ctx_a"], row["ctx_b"]
    cut = _LAST_SENTENCE.fullmatch(row["ctx"])
    return (cut.group(1), cut.group(2)) if cut else (row["ctx"], "")


def read(row: Row) -> Item:
    """Return the item of a row."""
    first, last = context(row)
    prompt = clean(f"{row['activity_label']}: {first} {last.capitalize()}")
    options = tuple(clean(ending) for ending in row["endings"])
    gold = index(row["label"])
    return Item(item_id(prompt, *options), prompt, options[gold], options=options, gold=gold)


TASKS = (
    Task(
        name="hellaswag",
        kind=Kind.CHOICE,
        metrics=("acc_norm", "acc"),
        chance=0.25,
        origin=f"{ORIGIN} hellaswag 1.0",
        samples=Samples(
            names=("hellaswag", "hellaswag_val", "hellaswag/validation"),
            hub="Rowan/hellaswag#split=validation",
            standard=10_042,
            split="validation",
        ),
        read=read,
    ),
)
