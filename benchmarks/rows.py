"""Rows to measure speed on: made from word lists and a seed, with the lengths of real chat rows.

`chat` rows are a request and an answer of about 170 tokens together, the lengths log-normal as in
support conversations; `short` rows are a question and a label, about 60 tokens. The words matter
little to speed, but the answers follow from the requests, so that a loss curve falls.
"""

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path

Row = dict[str, list[dict[str, str]]]

SUBJECTS = (
    "order", "invoice", "delivery", "refund", "password", "account", "subscription", "payment",
    "contract", "router", "booking", "ticket", "licence", "warranty", "address", "newsletter",
)  # fmt: skip
PROBLEMS = (
    "is missing", "arrived late", "was charged twice", "cannot be found", "has expired",
    "does not match", "was cancelled", "shows an error", "is still pending", "went to someone else",
)  # fmt: skip
TIMES = ("yesterday", "last week", "this morning", "two days ago", "on Monday", "in March")
ASIDES = (
    "I have tried the website and the app on my phone.",
    "Nobody answered when I called the number on the letter.",
    "My colleague had the same trouble and it took her a month.",
    "Please tell me what you need from me to put this right.",
    "The reference in my mail is different from the one on the page.",
    "I would rather not wait for another working day.",
    "The page says that everything is fine, which it is not.",
    "It worked before the last change that you announced.",
    "I can send a picture of the screen if that is of any use.",
    "We are a small business and depend on this every day.",
)
STEPS = (
    "Open the overview and choose the entry with the number above.",
    "Check that the name and the date are the ones in your mail.",
    "Then press the button at the end of the page and wait for the message.",
    "If the message does not come within an hour, write to us again.",
    "We have told the team and they will look at it today.",
    "There is nothing to pay for this and no form to sign.",
    "You can follow the state of the case on the same page.",
    "Keep the old papers until the new ones are with you.",
    "For your safety we never ask for the whole number by mail.",
    "Should it happen a second time, ask for a call and we will stay on the line.",
)


def chat_row(generator: random.Random, number: int) -> Row:
    """Return a support request and its answer; the lengths of both are log-normal."""
    subject, problem = generator.choice(SUBJECTS), generator.choice(PROBLEMS)
    request = f"My {subject} {number} {problem}, I saw it {generator.choice(TIMES)}."
    request = _extended(request, ASIDES, _words(generator, median=28, most=260), generator)
    answer = f"I am sorry that your {subject} {number} {problem}. Here is what to do."
    answer = _extended(answer, STEPS, _words(generator, median=50, most=400), generator)
    return _row("You are the support desk of a shop. Answer politely.", request, answer)


def short_row(generator: random.Random, number: int) -> Row:
    """Return a one-line question and its label."""
    subject, problem = generator.choice(SUBJECTS), generator.choice(PROBLEMS)
    question = f"Why is it that my {subject} {number} {problem} {generator.choice(TIMES)}?"
    question = _extended(question, ASIDES, _words(generator, median=14, most=60), generator)
    return _row("Name the intent.", question, f"{subject}: {problem}")


KINDS: Mapping[str, Callable[[random.Random, int], Row]] = {"chat": chat_row, "short": short_row}


def write_rows(path: Path, kind: str, count: int, seed: int) -> Path:
    """Write `count` rows as prompt/completion message lists, a format that both sides read."""
    generator = random.Random(f"{kind}-{seed}")
    rows = [KINDS[kind](generator, 100_000 + number) for number in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def copy_rows(source: Path, path: Path) -> Path:
    """Write a file of rows with `messages`, or with `prompt` and `completion`, in the same form.

    Of a conversation only the last answer is learned, on both sides.
    """
    rows = []
    for number, line in enumerate(source.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        row = json.loads(line)
        if "messages" in row:
            row = {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}
        if not all(isinstance(row.get(key), list) for key in ("prompt", "completion")):
            raise SystemExit(f"{source}:{number}: neither messages nor prompt and completion lists")
        rows.append({"prompt": row["prompt"], "completion": row["completion"]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _row(system: str, request: str, answer: str) -> Row:
    return {
        "prompt": [
            {"role": "system", "content": system},
            {"role": "user", "content": request},
        ],
        "completion": [{"role": "assistant", "content": answer}],
    }


def _words(generator: random.Random, median: float, most: int) -> int:
    return min(most, round(median * generator.lognormvariate(0, 0.8)))


def _extended(text: str, sentences: tuple[str, ...], words: int, generator: random.Random) -> str:
    """Append sentences until the text has about `words` words."""
    while len(text.split()) < words:
        text += " " + generator.choice(sentences)
    return text
