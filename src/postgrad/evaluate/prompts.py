"""How an item of a benchmark is put to a model: bare or as a chat; and how many tokens that is.

No torch: what a training will ask is counted before a model is loaded.
"""

from collections.abc import Callable, Sequence
from typing import Any

from postgrad.config import Recipe
from postgrad.data.template import ChatTemplate
from postgrad.estimate import Amount, amount_of
from postgrad.evaluate.benchmarks import Benchmark
from postgrad.evaluate.tasks import Item, Kind, choose_shots, preamble, shot_text
from postgrad.types import Message

Render = Callable[[Sequence[Message]], str]
"""Messages -> text under the chat template, with the opening of the answer."""


def under_template(benchmark: Benchmark, recipe: Recipe) -> bool:
    """Return whether the benchmark is asked under the chat template."""
    wanted = recipe.evaluate.retention_template
    return benchmark.task.chat if wanted == "auto" else wanted == "chat"


def chat_of(benchmark: Benchmark, recipe: Recipe, template: ChatTemplate) -> Render | None:
    """Return what renders the benchmark's messages; None where it is asked bare."""
    if not under_template(benchmark, recipe):
        return None
    return lambda messages: template.render(messages, (), prompt=True)


def contexts(benchmark: Benchmark, item: Item, chat: Render | None) -> tuple[str, ...]:
    """Return what stands before the answer, once or for each option: raw, or as a chat.

    As a chat the description is the system message, examples are earlier turns and the prompt is
    the user's message.
    """
    task = benchmark.task
    prompts = item.contexts or (item.prompt,)
    if chat is None:
        before = preamble(task, item, benchmark.shots)
        return tuple(before + prompt for prompt in prompts)
    turns = [Message("system", item.description)] if item.description else []
    for shot in choose_shots(task, item, benchmark.shots):
        answer = shot.reference.strip()
        asked = shot_text(task, shot).removesuffix(answer).rstrip(" ")
        turns += [Message("user", asked), Message("assistant", answer)]
    return tuple(chat([*turns, Message("user", prompt)]) for prompt in prompts)


def requests(benchmark: Benchmark, item: Item, chat: Render | None) -> list[tuple[str, str]]:
    """Return (context, continuation) of each option; no separator after a chat template."""
    before = contexts(benchmark, item, chat)
    plain = benchmark.task.kind is Kind.CLOZE or chat is not None
    separator = "" if plain else benchmark.task.separator
    count = max(len(before), len(item.options))
    options = item.options * (count // len(item.options))
    return [
        (context, separator + option)
        for context, option in zip(before * (count // len(before)), options, strict=True)
    ]


def amount_asked(
    benchmarks: Sequence[Benchmark], recipe: Recipe, tokenizer: Any, template: ChatTemplate
) -> Amount:
    """Return what a model computes to answer the items of likelihood tasks once.

    A context counts once for all its continuations, as it is read; what several items begin with
    counts in each, so that a benchmark with examples in its prompt is overestimated.
    """
    documents = []
    for benchmark in benchmarks:
        chat = chat_of(benchmark, recipe, template)
        for item in benchmark.items:
            options: dict[str, int] = {}
            for context, continuation in requests(benchmark, item, chat):
                found = tokenizer(continuation, add_special_tokens=False)["input_ids"]
                options[context] = options.get(context, 0) + len(found)
            for context, supervised in options.items():
                read = tokenizer(context, add_special_tokens=chat is None)["input_ids"]
                documents.append((len(read) + supervised, supervised))
    return amount_of(documents)
