"""WinoGrande: who is meant (Sakaguchi et al. 2019, arXiv 1907.10641).

Partial evaluation: the options stand in the context, and the likelihood is that of the sentence's
end, the same for both (Trinh & Le 2018, arXiv 1806.02847).
"""

from postgrad.evaluate.tasks import Item, Kind, Row, Samples, Task, item_id
from postgrad.evaluate.tasks.rows import ORIGIN, index


def read(row: Row) -> Item:
    """Return the item of a row."""
    if "sentence" in row:
        before, _, after = row["sentence"].partition("_")
        contexts = (before + row["option1"], before + row["option2"])
        end, gold = after.strip(), index(row["answer"], ("1", "2"))
    else:
        contexts, end = tuple(row["context_options"]), row["continuation"]
        gold = index(row["gold"])
    return Item(item_id(*contexts, end), contexts[0], contexts[gold], contexts, (end,), gold)


TASKS = (
    Task(
        name="winogrande",
        kind=Kind.CHOICE,
        metrics=("acc",),
        chance=0.5,
        origin=f"{ORIGIN} winogrande 1.0",
        samples=Samples(
            names=("winogrande", "winogrande/dev", "winogrande_1.1/dev"),
            hub="allenai/winogrande#config=winogrande_xl&split=validation",
            standard=1_267,
            split="validation",
        ),
        read=read,
    ),
)
