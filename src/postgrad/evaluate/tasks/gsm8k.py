"""GSM8K: school arithmetic in words, with the way to the answer.

Source: Cobbe et al. 2021, arXiv 2110.14168. lm-evaluation-harness draws five examples anew for
every question; here they are the first five of the training rows, as with its `first_n` sampler.
"""

import re

from postgrad.evaluate.tasks import Generation, Item, Kind, Row, Samples, Task, item_id
from postgrad.evaluate.tasks.rows import ORIGIN
from postgrad.scoring import numeric
from postgrad.types import Score

_FINAL = re.compile(r"#### (-?[0-9.,]+)")
_ANY = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


def read(row: Row) -> Item:
    """Return the item of a row."""
    prompt, answer = f"Question: {row['question']}\nAnswer:", str(row["answer"])
    if "#### " not in answer:
        raise ValueError("the answer has no line `#### NUMBER`")
    return Item(item_id(prompt, answer), prompt, answer)


def score(completion: str, item: Item) -> dict[str, Score]:
    """Return `strict_match`, `flexible_extract` and `numeric`.

    Strict: the first number after `####`; flexible: the last number; both compared as text without
    commas, dollar signs and a final full stop, like lm-evaluation-harness. `numeric` compares the
    last numbers as numbers (18.00 is 18).
    """
    final, numbers = _FINAL.search(completion), _ANY.findall(completion)
    wanted = _plain(item.reference)
    return {
        "strict_match": _match(final and final[1], wanted),
        "flexible_extract": _match(numbers[-1] if numbers else None, wanted),
        "numeric": numeric(completion, wanted),
    }


def _match(found: str | None, wanted: str) -> Score:
    if found is None:
        return Score(0.0, False, "no number where it is looked for")
    if _plain(found) == wanted:
        return Score(1.0, True)
    return Score(0.0, False, f"found {found}, expected {wanted}")


def _plain(text: str) -> str:
    """Return the text after `#### `, without commas, dollar signs and a final full stop."""
    text = text.replace(",", "").replace("$", "")
    return re.sub(r"\.$", "", text.rpartition("#### ")[2]).lower()


TASKS = (
    Task(
        name="gsm8k",
        kind=Kind.GENERATION,
        metrics=("strict_match", "flexible_extract", "numeric"),
        chance=None,
        origin=f"{ORIGIN} gsm8k 3.0, examples: the first five",
        samples=Samples(
            names=("gsm8k", "gsm8k_test", "gsm8k/test"),
            hub="openai/gsm8k#config=main&split=test",
            standard=1_319,
            split="test",
            shot_names=("gsm8k_train", "gsm8k/train"),
            shot_hub="openai/gsm8k#config=main&split=train",
        ),
        read=read,
        shots=5,
        generation=Generation(
            score=score, max_new_tokens=256, until=("Question:", "</s>", "<|im_end|>")
        ),
    ),
)
