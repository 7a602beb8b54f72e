"""Ask a model every test row and score the answers: one arm of an evaluation."""

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from postgrad.data.render import Renderer
from postgrad.errors import ConfigError
from postgrad.model.generate import generate
from postgrad.progress import Display, SilentDisplay
from postgrad.scoring import score
from postgrad.types import Completion, Conversation, Evidence, Example, Message, Score, Split

SPARE = 1.25
"""An answer may be this much longer than the longest one in TRAIN."""
SHORTEST_LIMIT = 8


def sample_test(examples: Sequence[Example], limit: int | None, seed: int) -> tuple[Example, ...]:
    """Return `limit` rows drawn with `seed`, in their original order; all when there are fewer."""
    return _draw(examples, limit, seed) if limit is not None else tuple(examples)


def choose_shots(train: Sequence[Example], count: int, seed: int) -> tuple[Example, ...]:
    """Return `count` examples for the prompt: a simple seeded sample of TRAIN, and of TRAIN only.

    Raises ConfigError when there are fewer rows than asked for.
    """
    assert all(example.split is Split.TRAIN for example in train)
    if count > len(train):
        raise ConfigError(
            f"evaluate.fewshot asks for {count} examples, TRAIN has {len(train)} rows",
            "ask for fewer",
        )
    return _draw(train, count, seed)


def _draw(examples: Sequence[Example], count: int, seed: int) -> tuple[Example, ...]:
    if count >= len(examples):
        return tuple(examples)
    generator = np.random.default_rng(seed)
    chosen = generator.choice(len(examples), count, replace=False)
    return tuple(examples[index] for index in sorted(chosen.tolist()))


def resolve_max_new_tokens(
    wanted: int | str, renderer: Renderer, train: Sequence[Example], max_length: int
) -> int:
    """Return evaluate.max_new_tokens; auto = the longest answer of TRAIN and a quarter more."""
    if isinstance(wanted, int):
        return wanted
    longest = 0
    for rendering in renderer.inspect_all(train):
        if rendering.answers:
            longest = max(longest, rendering.answers[-1].end - rendering.answers[-1].first)
    return max(SHORTEST_LIMIT, min(max_length, math.ceil(longest * SPARE)))


def with_shots(prompt: Conversation, shots: Sequence[Example]) -> Conversation:
    """Put examples between the system message and the request, as earlier turns."""
    turns = [
        message
        for shot in shots
        for message in shot.conversation.messages
        if message.role != "system"
    ]
    head = [message for message in prompt.messages[:1] if message.role == "system"]
    return Conversation((*head, *turns, *prompt.messages[len(head) :]), prompt.tools)


def reference(conversation: Conversation) -> str:
    """Return what a right answer says: the last message's text, or its tool calls as JSON."""
    last = conversation.messages[-1]
    if last.role == "assistant" and last.tool_calls:
        return tool_calls_text(last)
    return conversation.answer


def tool_calls_text(message: Message) -> str:
    """Return the calls as a JSON list of {name, arguments}, keys sorted."""
    calls = [{"name": c.name, "arguments": json.loads(c.arguments)} for c in message.tool_calls]
    return json.dumps(calls, sort_keys=True, ensure_ascii=False)


def run_arm(
    model: Any,
    renderer: Renderer,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    arm: str,
    shots: Sequence[Example] = (),
    scorer: str,
    pattern: str | None = None,
    max_new_tokens: int,
    batch_tokens: int,
    display: Display | None = None,
) -> list[Evidence]:
    """Generate an answer to every example and score it; evidence comes in the examples' order.

    The model sees exactly `renderer.prompt_ids(conversation.prompt)`, with the shots as earlier
    turns. A request longer than the model's context is recorded as an error and scores 0.
    """
    display = display or SilentDisplay()
    prompts = [renderer.prompt_ids(with_shots(e.conversation.prompt, shots)) for e in examples]
    context = getattr(model.config, "max_position_embeddings", None) or math.inf
    fitting = [n for n, ids in enumerate(prompts) if len(ids) + max_new_tokens <= context]
    seconds: dict[int, float] = {}
    with display.track(arm, len(fitting), unit="rows") as bar:

        def finished(rows: Sequence[int], spent: float) -> None:
            seconds.update({fitting[row]: spent / len(rows) for row in rows})
            bar.advance(len(rows))

        completions = generate(
            model,
            [prompts[number] for number in fitting],
            max_new_tokens=max_new_tokens,
            stop_ids=renderer.stop_ids,
            batch_tokens=batch_tokens,
            tokenizer=tokenizer,
            on_progress=finished,
        )
    answers = dict(zip(fitting, completions, strict=True))
    return [
        _evidence(example, answers.get(n), len(prompts[n]), scorer, pattern, seconds.get(n, 0.0))
        for n, example in enumerate(examples)
    ]


def _evidence(
    example: Example,
    completion: Completion | None,
    prompt_tokens: int,
    scorer: str,
    pattern: str | None,
    seconds: float,
) -> Evidence:
    users = [m.content for m in example.conversation.messages if m.role == "user"]
    gold = reference(example.conversation)
    prompt = users[-1] if users else ""
    if completion is None:
        problem = f"the request of {prompt_tokens} tokens exceeds the model's context"
        scores = {scorer: Score(0.0, False, problem)}
        return Evidence(
            example.id, prompt, gold, "", scores, prompt_tokens=prompt_tokens, error=problem
        )
    return Evidence(
        example_id=example.id,
        prompt=prompt,
        reference=gold,
        completion=completion.text,
        scores={scorer: score(scorer, completion.text, gold, pattern)},
        stop_reason=completion.stop_reason,
        prompt_tokens=prompt_tokens,
        completion_tokens=len(completion.ids),
        seconds=seconds,
    )
