"""What the public files of benchmarks have in common: options in a list, answers in many forms."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from postgrad.evaluate.tasks import Row

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ORIGIN = "lm-evaluation-harness 0.4.13"
_LETTERED = re.compile(r"(?:^|\n)[A-Z]\. ")


def index(value: Any, labels: Sequence[str] = LETTERS) -> int:
    """Return which option a gold answer means: a number from 0, or one of the labels.

    >>> index("1"), index("B"), index(True), index("yes", ("no", "yes"))
    (1, 1, 1, 1)

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, int | float):
        return int(value)
    text, known = str(value).strip(), list(labels)
    if text in known:
        return known.index(text)
    if text.isdigit():
        return int(text)
    raise ValueError(f"the answer {value!r} is neither a number nor a label")


def labelled(choices: Any, answer: Any) -> tuple[tuple[str, ...], int]:
    """Return options and gold of {text: [...], label: [...]} or of a plain list of texts."""
    if isinstance(choices, Mapping):
        return tuple(choices["text"]), index(answer, [str(label) for label in choices["label"]])
    return tuple(choices), index(answer)


def lettered(row: Row) -> dict[str, Any]:
    r"""Return question, choices and answer of the wheel's "A. one\nB. two" and "B. two".

    >>> lettered({"question": "q", "options": "\nA. one\nB. two ", "answer": "B. two"})
    {'question': 'q', 'choices': ['one', 'two '], 'answer': 1}
    """
    choices = _LETTERED.split(row["options"])[1:]
    return {"question": row["question"], "choices": choices, "answer": index(row["answer"][0])}


def question(row: Row, *names: str) -> str:
    """Return the first of these columns that the row has, else LLM Foundry's `query`.

    LLM Foundry's files hold the whole prompt: "Question: ...".
    """
    for name in names:
        if name in row:
            return str(row[name])
    return str(row["query"]).removeprefix("Question: ").removesuffix("\n")
