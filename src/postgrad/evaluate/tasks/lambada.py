"""LAMBADA, OpenAI's variant: the last word of a passage (Paperno et al. 2016, arXiv 1606.06031)."""

from postgrad.evaluate.tasks import Item, Kind, Row, Samples, Task, item_id
from postgrad.evaluate.tasks.rows import ORIGIN


def read(row: Row) -> Item:
    """Return the item of a row."""
    if "text" in row:
        prompt, _, word = row["text"].rpartition(" ")
    else:
        prompt, word = row["context"], row["continuation"]
    return Item(item_id(prompt, word), prompt, f" {word}", options=(f" {word}",))


TASKS = (
    Task(
        name="lambada_openai",
        kind=Kind.CLOZE,
        metrics=("acc",),
        chance=None,
        origin=f"{ORIGIN} lambada_openai 1.0",
        samples=Samples(
            names=("lambada_openai", "lambada_test"),
            hub="EleutherAI/lambada_openai#config=default&split=test",
            standard=5_153,
            split="test",
        ),
        read=read,
    ),
)
