"""ARC: grade-school science questions (Clark et al. 2018, arXiv 1803.05457)."""

from postgrad.evaluate.tasks import Item, Kind, Row, Samples, Task, item_id
from postgrad.evaluate.tasks.rows import ORIGIN, labelled, question


def read(row: Row) -> Item:
    """Return the item of a row."""
    prompt = f"Question: {question(row, 'question')}\nAnswer:"
    answer = row["answerKey"] if "answerKey" in row else row["gold"]
    options, gold = labelled(row["choices"], answer)
    return Item(item_id(prompt, *options), prompt, options[gold], options=options, gold=gold)


def _task(name: str, config: str, standard: int) -> Task:
    return Task(
        name=name,
        kind=Kind.CHOICE,
        metrics=("acc_norm", "acc"),
        chance=0.25,
        origin=f"{ORIGIN} {name} 1.0",
        samples=Samples(
            names=(name, f"{config}-Test"),
            hub=f"allenai/ai2_arc#config={config}&split=test",
            standard=standard,
            split="test",
        ),
        read=read,
    )


TASKS = (_task("arc_easy", "ARC-Easy", 2_376), _task("arc_challenge", "ARC-Challenge", 1_172))
