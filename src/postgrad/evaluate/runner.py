"""Ask a model every test row and score the answers: one arm of an evaluation."""

import json
import math
from collections.abc import Sequence
from typing import Any

from postgrad.data.render import Renderer
from postgrad.errors import DataError
from postgrad.evaluate.fewshot import draw, question, require_train, with_shots, with_system
from postgrad.model.generate import generate
from postgrad.progress import Display, SilentDisplay
from postgrad.scoring import reference_problem, score
from postgrad.types import Check, Completion, Conversation, Evidence, Example, Message, Score

SPARE = 1.25
"""An answer may be this much longer than the longest one in TRAIN."""
SHORTEST_LIMIT = 8


def sample_test(examples: Sequence[Example], limit: int | None, seed: int) -> tuple[Example, ...]:
    """Return `limit` rows drawn with `seed`, in their original order; all when there are fewer."""
    return draw(examples, limit, seed) if limit is not None else tuple(examples)


def check_references(examples: Sequence[Example], scorer: str, pattern: str | None = None) -> Check:
    """Check before training that a right answer to every test row could pass at all.

    A reference that is no JSON can never be matched by the `json` scorer, one without a number
    never by `numeric`: such a test would measure nothing.
    """
    found = [(e, reference_problem(scorer, reference(e.conversation), pattern)) for e in examples]
    wrong = [(example, problem) for example, problem in found if problem]
    if not wrong:
        detail = f"every test row's reference can be matched by {scorer}"
        return Check("references-scorable", True, detail)
    return Check(
        "references-scorable",
        False,
        f"{len(wrong)} of {len(examples)} test rows can never pass {scorer}: {wrong[0][1]}",
        "choose another evaluate.scorer, or correct the answers of these rows",
        tuple(example.source for example, _ in wrong[:30]),
        len(wrong),
    )


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


def called_tools(text: str) -> str:
    """Return the tool calls in a model's answer in the form of `tool_calls_text`.

    Templates put different tags around a call, and some say `parameters`: whatever JSON object has
    a name is taken for a call.
    """
    decoder, calls, start = json.JSONDecoder(), [], text.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            end = start + 1
        else:
            if "name" in value:
                arguments = value.get("arguments", value.get("parameters", {}))
                calls.append({"name": value["name"], "arguments": arguments})
        start = text.find("{", end)
    return json.dumps(calls, sort_keys=True, ensure_ascii=False)


def run_arm(
    model: Any,
    renderer: Renderer,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    arm: str,
    shots: Sequence[Sequence[Example]] | None = None,
    system: str | None = None,
    scorer: str,
    pattern: str | None = None,
    max_new_tokens: int,
    batch_tokens: int,
    display: Display | None = None,
) -> list[Evidence]:
    """Generate an answer to every example and score it; evidence comes in the examples' order.

    The model sees exactly `renderer.prompt_ids(conversation.prompt)`, with the row's own `shots` as
    earlier turns and, if given, `system` in place of its system prompt. A request that the chat
    template refuses, or that leaves no room for the answer in the model's context, is recorded as
    an error and scores 0.
    """
    shots = [()] * len(examples) if shots is None else shots
    for chosen in shots:
        require_train(chosen)
    display = display or SilentDisplay()
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = context - max_new_tokens if context else math.inf
    prompts = [
        _prompt(
            renderer, with_shots(with_system(example.conversation.prompt, system), chosen), room
        )
        for example, chosen in zip(examples, shots, strict=True)
    ]
    fitting = [n for n, (_, problem) in enumerate(prompts) if problem is None]
    seconds: dict[int, float] = {}
    with display.track(arm, len(fitting), unit="rows") as bar:

        def finished(rows: Sequence[int], spent: float) -> None:
            seconds.update({fitting[row]: spent / len(rows) for row in rows})
            bar.advance(len(rows))

        completions = generate(
            model,
            [prompts[number][0] for number in fitting],
            max_new_tokens=max_new_tokens,
            stop_ids=renderer.stop_ids,
            batch_tokens=batch_tokens,
            tokenizer=tokenizer,
            on_progress=finished,
        )
    answers = dict(zip(fitting, completions, strict=True))
    return [
        _evidence(example, answers[n], len(ids), scorer, pattern, seconds[n])
        if problem is None
        else _failure(example, problem, len(ids), scorer)
        for n, (example, (ids, problem)) in enumerate(zip(examples, prompts, strict=True))
    ]


def _prompt(renderer: Renderer, asked: Conversation, room: float) -> tuple[list[int], str | None]:
    """Return the tokens of the request and why it cannot be asked, None when it can."""
    try:
        ids = renderer.prompt_ids(asked)
    except DataError as error:
        return [], error.message
    if not ids:
        return ids, "the request has no tokens"
    if len(ids) > room:
        return ids, f"the request of {len(ids)} tokens and the answer exceed the model's context"
    return ids, None


def _failure(example: Example, problem: str, prompt_tokens: int, scorer: str) -> Evidence:
    return Evidence(
        example_id=example.id,
        prompt=question(example),
        reference=reference(example.conversation),
        completion="",
        scores={scorer: Score(0.0, False, problem)},
        prompt_tokens=prompt_tokens,
        error=problem,
        group=example.group,
    )


def _evidence(
    example: Example,
    completion: Completion,
    prompt_tokens: int,
    scorer: str,
    pattern: str | None,
    seconds: float,
) -> Evidence:
    gold = reference(example.conversation)
    calls = example.conversation.messages[-1].tool_calls
    given = called_tools(completion.text) if calls else completion.text
    return Evidence(
        example_id=example.id,
        prompt=question(example),
        reference=gold,
        completion=completion.text,
        scores={scorer: score(scorer, given, gold, pattern)},
        stop_reason=completion.stop_reason,
        prompt_tokens=prompt_tokens,
        completion_tokens=len(completion.ids),
        seconds=seconds,
        group=example.group,
    )
