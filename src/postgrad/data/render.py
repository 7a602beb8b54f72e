"""Examples -> tokens and label weights, by the tokenizer's own chat template, once for all uses.

Training, evaluation and serving go through the same `Renderer`, so they cannot disagree. The loss
mask comes from character positions in one rendering of the whole conversation: an answer begins
where the prompt that serving would send ends, and ends with the token that closes the turn. The
text is tokenised once and each token takes the weight of its characters; the prompt is never
tokenised alone to count its tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from typing import Any

import numpy as np

from postgrad.data.template import TEMPLATE_ERRORS, ChatTemplate
from postgrad.errors import DataError, ModelError
from postgrad.types import Conversation, Example, FloatArray, IntArray, Message, Tokens

CHUNK = 1000
"""Rows tokenised in one call."""
BYTE_LEVEL_SPACE = "Ġ"
"""How byte-level tokenizers spell a space."""


class ProblemKind(StrEnum):
    """What can be wrong with a row once it meets the template and the tokenizer."""

    REFUSED = "refused"
    """The template raised an error; the row has no tokens."""
    PROMPT = "prompt"
    """Serving would send something else before this answer than what training shows."""
    HISTORY = "history"
    """The template shows the answer differently once other messages follow (hidden thoughts)."""
    CONTENT = "content"
    """Text of a message is missing from the rendering or changed by the template."""
    CONTROL = "control"
    """Text of a message holds a special token that structures conversations."""
    BOUNDARY = "boundary"
    """A token holds the end of the prompt and the beginning of the answer."""
    END = "end"
    """No end token closes the answer."""
    WEIGHT = "weight"
    """A weight that cannot be obeyed: not the assistant's message, negative, not a number."""


@dataclass(frozen=True, slots=True)
class RenderProblem:
    """One finding about one message of a row; pre-flight decides what follows from it."""

    kind: ProblemKind
    message: int
    """Index of the message, from 0."""
    detail: str


@dataclass(frozen=True, slots=True)
class Answer:
    """A supervised answer: what the model must produce, up to and including the end token."""

    message: int
    weight: float
    first: int
    """Index of its first token."""
    end: int
    """Index after its last token."""


@dataclass(frozen=True, slots=True)
class Rendering:
    """An example as the model sees it, and everything found on the way."""

    example: Example
    tokens: Tokens | None
    """None when the template refused the row."""
    answers: tuple[Answer, ...] = ()
    problems: tuple[RenderProblem, ...] = ()

    def has(self, *kinds: ProblemKind) -> bool:
        """Return whether a problem of one of these kinds was found."""
        return any(problem.kind in kinds for problem in self.problems)


@dataclass(frozen=True, slots=True)
class _Span:
    """Characters [start, end) of the text that message number `message` must produce."""

    message: int
    weight: float
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class _Encoded:
    """Token ids of a text and the characters [start, end) of each."""

    ids: list[int]
    starts: IntArray
    ends: IntArray


class Renderer:
    """The one way from messages to tokens.

    Args:
        tokenizer: a fast Transformers tokenizer.
        chat_template: Jinja text that replaces the tokenizer's own template.
        eos_token_ids: end tokens of the model's generation config.

    Raises:
        ModelError: the tokenizer has no chat template, an invalid one, or reports no offsets.
    """

    def __init__(
        self,
        tokenizer: Any,
        chat_template: str | None = None,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        """Probe the template; see the class."""
        if not tokenizer.is_fast:
            raise ModelError(
                f"{type(tokenizer).__name__} does not report where its tokens stand in the text, "
                "so the answer cannot be told from the prompt",
                "use a fast tokenizer: put a tokenizer.json beside the model "
                "(Transformers converts most tokenizers: AutoTokenizer.from_pretrained, "
                "then save_pretrained)",
            )
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, chat_template)
        stops = {int(token) for token in eos_token_ids}
        if tokenizer.eos_token_id is not None:
            stops.add(int(tokenizer.eos_token_id))
        self.end_token_id: int | None = None
        """The token that closes an answer; None when the template has none."""
        ending = self.template.ending
        for found in (self.template.tool_ending, ending):
            if found and found.token:
                self.end_token_id = int(tokenizer.convert_tokens_to_ids(found.token))
                stops.add(self.end_token_id)
        added = tokenizer.added_tokens_decoder
        self._special_ids = frozenset(token for token in added if added[token].special)
        self.stop_ids: frozenset[int] = frozenset(stops)
        """Tokens at which generation stops, in evaluation and in serving."""

    def render(self, example: Example) -> Tokens:
        """Return the tokens of one example; raises DataError when the template refuses it."""
        return self.render_all([example])[0]

    def render_all(self, examples: Sequence[Example]) -> list[Tokens]:
        """Return the tokens of many examples, in order.

        Raises DataError naming every row that the template refuses.
        """
        renderings = self.inspect_all(examples)
        refused = [rendering for rendering in renderings if rendering.tokens is None]
        if refused:
            lines = [f"{r.example.source}: {r.problems[0].detail}" for r in refused]
            shown = "\n".join(
                lines[:20] + ([f"... and {len(lines) - 20} more"] * (len(lines) > 20))
            )
            raise DataError(
                f"the chat template refuses {len(refused)} rows:\n{shown}",
                "correct the rows, or set data.on_invalid to drop",
            )
        return [rendering.tokens for rendering in renderings if rendering.tokens is not None]

    def inspect_all(self, examples: Sequence[Example]) -> list[Rendering]:
        """Render many examples and keep what was found wrong with each; raises nothing."""
        renderings: list[Rendering] = []
        for start in range(0, len(examples), CHUNK):
            part = examples[start : start + CHUNK]
            located = [self._locate(example.conversation) for example in part]
            encoded = iter(self._encode([text for text, _, _ in located if text is not None]))
            for example, (text, spans, problems) in zip(part, located, strict=True):
                if text is None:
                    renderings.append(Rendering(example, None, (), tuple(problems)))
                else:
                    renderings.append(self._weigh(example, next(encoded), spans, problems))
        return renderings

    def prompt_ids(self, conversation: Conversation) -> list[int]:
        """Return the tokens that ask the model for the message after `conversation`.

        The whole conversation is taken as given: pass `conversation.prompt` to have its last
        answer left out. Raises DataError when the template refuses it.
        """
        try:
            text = self.template.render(conversation.messages, conversation.tools, prompt=True)
        except TEMPLATE_ERRORS as error:
            raise DataError(
                f"the chat template refuses the conversation: {_reason(error)}",
                "give it the roles and fields that the template of this model knows",
            ) from None
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def end_token_supervised(self, tokens: Tokens) -> bool:
        """Return whether every supervised stretch of tokens ends in a stop token."""
        supervised = np.append(tokens.weights > 0, False)
        last = np.flatnonzero(supervised[:-1] & ~supervised[1:])
        return len(last) > 0 and all(int(token) in self.stop_ids for token in tokens.ids[last])

    def leading_bos(self, ids: Sequence[int] | IntArray) -> int:
        """Count the beginning-of-sequence tokens that `ids` starts with."""
        bos = self.tokenizer.bos_token_id
        count = 0
        while bos is not None and count < len(ids) and int(ids[count]) == bos:
            count += 1
        return count

    def pieces(self, tokens: Tokens) -> list[tuple[str, float]]:
        """Return the text in stretches of equal weight, to show what is learned and what is not."""
        rows = zip(tokens.ids.tolist(), tokens.weights.tolist(), strict=True)
        return [
            (self.tokenizer.decode([token for token, _ in group]), weight)
            for weight, group in groupby(rows, key=lambda row: row[1])
        ]

    def _encode(self, texts: list[str]) -> Iterator[_Encoded]:
        if not texts:
            return
        output = self.tokenizer(
            texts,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            padding=False,
            truncation=False,
            verbose=False,
        )
        for ids, offsets in zip(output["input_ids"], output["offset_mapping"], strict=True):
            array = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
            yield _Encoded(ids, array[:, 0], np.maximum.accumulate(array[:, 1]))

    def _locate(
        self, conversation: Conversation
    ) -> tuple[str | None, list[_Span], list[RenderProblem]]:
        """Render a conversation and find the characters that the model must produce."""
        messages, problems = conversation.messages, list(self._text_problems(conversation))
        try:
            text = self.template.render(messages, conversation.tools)
        except TEMPLATE_ERRORS as error:
            detail = f"the chat template refuses the conversation: {_reason(error)}"
            return None, [], [RenderProblem(ProblemKind.REFUSED, 0, detail)]
        spans = []
        for index, message in enumerate(messages):
            if message.role == "assistant" and 0 < message.supervised_weight < float("inf"):
                found = self._locate_answer(conversation, index, text)
                if isinstance(found, _Span):
                    spans.append(found)
                    problems.extend(self._answer_problems(message, found, text))
                else:
                    problems.append(found)
            elif message.role in ("system", "user") and not _within(message.content, text):
                detail = (
                    f"the template leaves out or changes the text of the {message.role} message"
                )
                problems.append(RenderProblem(ProblemKind.CONTENT, index, detail))
        return text, spans, problems

    def _locate_answer(
        self, conversation: Conversation, index: int, text: str
    ) -> _Span | RenderProblem:
        """Find answer `index` in `text`: from the end of its prompt to the end of its end token."""
        messages, tools = conversation.messages, conversation.tools
        if index == 0:
            detail = "there is no message before the answer, so there is nothing to ask with"
            return RenderProblem(ProblemKind.PROMPT, index, detail)
        try:
            prompt = self.template.render(messages[:index], tools, prompt=True)
            is_last = index == len(messages) - 1
            turn = text if is_last else self.template.render(messages[: index + 1], tools)
        except TEMPLATE_ERRORS as error:
            detail = f"the chat template refuses the prompt of the answer: {_reason(error)}"
            return RenderProblem(ProblemKind.PROMPT, index, detail)
        if not turn.startswith(prompt):
            return RenderProblem(ProblemKind.PROMPT, index, _difference(prompt, turn, "the answer"))
        end, _ = self.template.end_of_answer(turn, len(prompt), bool(messages[index].tool_calls))
        if text[:end] != turn[:end]:
            detail = _difference(turn[:end], text, "later messages")
            return RenderProblem(ProblemKind.HISTORY, index, detail)
        return _Span(index, messages[index].supervised_weight, len(prompt), end)

    def _answer_problems(self, message: Message, span: _Span, text: str) -> Iterator[RenderProblem]:
        answer = text[span.start : span.end]
        if not _within(message.content, answer):
            detail = "the template leaves out or changes the text of the answer"
            yield RenderProblem(ProblemKind.CONTENT, span.message, detail)
        lost = [call.name for call in message.tool_calls if call.name not in answer]
        if lost:
            detail = f"the template does not write the call of {', '.join(lost)}"
            yield RenderProblem(ProblemKind.CONTENT, span.message, detail)

    def _text_problems(self, conversation: Conversation) -> Iterator[RenderProblem]:
        """Find special tokens in the row's own text, and weights that have no effect."""
        for index, message in enumerate(conversation.messages):
            calls = [text for call in message.tool_calls for text in (call.name, call.arguments)]
            for text in (message.content, *calls):
                found = self.template.control.search(text)
                if found:
                    detail = f"the {message.role} text holds the special token {found.group()}"
                    yield RenderProblem(ProblemKind.CONTROL, index, detail)
                    break
            weight = message.supervised_weight
            if not 0 <= weight < float("inf") or (message.role != "assistant" and weight):
                detail = f"the {message.role} message has weight {weight}"
                yield RenderProblem(ProblemKind.WEIGHT, index, detail)

    def _weigh(
        self,
        example: Example,
        encoded: _Encoded,
        spans: Sequence[_Span],
        problems: list[RenderProblem],
    ) -> Rendering:
        """Give each token the weight of its characters; report tokens across a boundary."""
        ids = encoded.ids
        weights: FloatArray = np.zeros(len(ids), np.float32)
        answers = []
        for span in spans:
            first = int(np.searchsorted(encoded.ends, span.start, side="right"))
            end = int(np.searchsorted(encoded.ends, span.end, side="right"))
            if first < end and self._is_across(encoded, first, span.start):
                if ids[first] not in self._special_ids:  # It may swallow the answer's white space.
                    problems.append(self._boundary(span, ids[first], "the prompt and the answer"))
                first += 1
            if end < len(ids) and self._is_across(encoded, end, span.end):
                if ids[end] in self.stop_ids:
                    end += 1  # An end token that swallows the white space after it.
                else:
                    problems.append(self._boundary(span, ids[end], "the answer and what follows"))
            first = max(first, 1)
            if first >= end or ids[end - 1] not in self.stop_ids:
                detail = "no stop token closes the answer"
                problems.append(RenderProblem(ProblemKind.END, span.message, detail))
            if first < end:
                weights[first:end] = span.weight
                answers.append(Answer(span.message, span.weight, first, end))
        if example.unfinished and answers:
            weights[answers[-1].end - 1] = 0
        tokens = Tokens(np.asarray(ids, np.int64), weights, example.id)
        return Rendering(example, tokens, tuple(answers), tuple(problems))

    def _is_across(self, encoded: _Encoded, index: int, position: int) -> bool:
        """Return whether token `index`, which ends after `position`, begins before it.

        Byte-level tokenizers may leave a leading space out of the offsets; the token's own
        spelling tells whether the characters between it and the token before are its own.
        """
        if encoded.starts[index] < position:
            return True
        before = encoded.ends[index - 1] if index else 0
        if before >= position:
            return False
        spelling = str(self.tokenizer.convert_ids_to_tokens(encoded.ids[index]))
        return spelling[:1] == BYTE_LEVEL_SPACE or spelling[:1].isspace()

    def _boundary(self, span: _Span, token: int, between: str) -> RenderProblem:
        text = self.tokenizer.decode([token])
        detail = f"token {text!r} stands across {between}"
        return RenderProblem(ProblemKind.BOUNDARY, span.message, detail)


def _within(content: str, text: str) -> bool:
    """Return whether `content` is in `text`, white space aside."""
    return content.strip() in text or "".join(content.split()) in "".join(text.split())


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _difference(expected: str, text: str, what: str) -> str:
    """Say where two texts part."""
    pairs = enumerate(zip(expected, text, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(expected), len(text)))
    return (
        f"with {what} the template writes {text[at : at + 40]!r} "
        f"where it wrote {expected[at : at + 40]!r} before"
    )
