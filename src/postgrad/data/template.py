"""A tokenizer's chat template: conversation -> text, and what the template adds around an answer.

Nothing about a template is assumed. How it closes a turn, whether it opens the answer when asked
to, in which form it wants the arguments of a tool call: all is found by rendering a short probe.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from postgrad.errors import ModelError
from postgrad.types import Message, ToolCall

TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
)
"""What running a template can raise: its own refusals, and operations that do not fit the row."""

_QUESTION, _ANSWER = "Postgradprobequestion", "Postgradprobeanswer"
_TOOL = "postgrad_probe_tool"
_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": _TOOL,
        "description": "A probe.",
        "parameters": {
            "type": "object",
            "properties": {"probe_key": {"type": "string", "description": "A probe."}},
            "required": ["probe_key"],
        },
    },
}
_PROBE_CALL = ToolCall(_TOOL, '{"probe_key": "probe_value"}', "abcdefghi")


@dataclass(frozen=True, slots=True)
class Ending:
    """How a template closes the last answer of a conversation."""

    tail: str
    """All text after the answer, for example the end token and a newline."""
    token: str | None
    """The first special token in `tail`: what the model must learn to stop with."""

    @property
    def length(self) -> int:
        """Characters of `tail` up to and including the end token."""
        return self.tail.index(self.token) + len(self.token) if self.token else 0


class ChatTemplate:
    """The chat template of a tokenizer, or one given as text in its place.

    Raises ModelError when there is none or when it is not valid Jinja.
    """

    def __init__(self, tokenizer: Any, text: str | None = None) -> None:
        """Probe the template of `tokenizer`, or `text`."""
        self._tokenizer = tokenizer
        self.override = text
        try:
            self.source: str = tokenizer.get_chat_template(text)
        except ValueError as error:
            raise ModelError(
                f"the tokenizer has no chat template ({str(error).splitlines()[0][:120]})",
                "set model.chat_template to a Jinja template (text or file); for a base model "
                "the template of its instruct sibling is the usual choice",
            ) from None
        tokens = _added_tokens(tokenizer)
        self._added = _alternatives(tokens)
        special = [token for token, is_special in tokens.items() if is_special]
        self._special = _alternatives(special)
        self._closing = re.compile(
            f"(?:{self._special.pattern})(?:\\s|{self._special.pattern})*\\Z"
        )
        self.arguments_as_text = False
        self.ending: Ending | None = None
        self.tool_ending: Ending | None = None
        self.opens_answer = True
        self._written = self.source
        self._probe()
        ends = {str(token) for token in (tokenizer.bos_token, tokenizer.eos_token) if token}
        self.control = _alternatives(
            [token for token in special if token in ends or token in self._written]
        )
        """Matches the special tokens that give a conversation its structure: those the template
        writes, and the tokenizer's own first and last token."""

    @property
    def prints_the_date(self) -> bool:
        """Whether the rendering changes from day to day."""
        return "strftime_now" in self.source

    def render(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], prompt: bool = False
    ) -> str:
        """Return the text of `messages`; `prompt` appends the opening of the next answer.

        Raises one of TEMPLATE_ERRORS when the template refuses the conversation.
        """
        return self._tokenizer.apply_chat_template(  # type: ignore[no-any-return]
            self.to_dicts(messages),
            tools=[dict(tool) for tool in tools] or None,
            chat_template=self.override,
            add_generation_prompt=prompt,
            tokenize=False,
        )

    def to_dicts(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Return the messages as the template expects them.

        An answer with tool calls keeps its content, "" when it has none: templates print it as
        nothing. Arguments become an object, the form that Transformers documents and that
        templates turn into JSON themselves, unless the probe showed that this template only works
        with a JSON string.
        """
        return [self._to_dict(message) for message in messages]

    def _to_dict(self, message: Message) -> dict[str, Any]:
        row: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.tool_calls:
            row["tool_calls"] = [self._call(call) for call in message.tool_calls]
        if message.tool_call_id is not None:
            row["tool_call_id"] = message.tool_call_id
        if message.name is not None:
            row["name"] = message.name
        return row

    def _call(self, call: ToolCall) -> dict[str, Any]:
        arguments: Any = call.arguments
        if not self.arguments_as_text:
            try:
                arguments = json.loads(call.arguments) if call.arguments.strip() else {}
            except ValueError:
                arguments = call.arguments
        row = {"type": "function", "function": {"name": call.name, "arguments": arguments}}
        return row if call.id is None else {**row, "id": call.id}

    def end_of_answer(self, text: str, start: int, tool_calls: bool) -> tuple[int, bool]:
        """Find where the answer that ends the rendering `text` is complete.

        Args:
            text: a rendering whose last message is the answer.
            start: where the answer begins.
            tool_calls: whether the answer calls tools.

        Returns:
            The position after the end token, and whether there is an end token.
        """
        endings = (self.tool_ending, self.ending) if tool_calls else (self.ending, self.tool_ending)
        for ending in endings:
            if ending and ending.token and text.endswith(ending.tail):
                position = len(text) - len(ending.tail)
                if position >= start:
                    return position + ending.length, True
        found = self._closing.search(text, start)
        if found:
            first = self._special.match(text, found.start())
            assert first is not None
            return first.end(), True
        return max(start, len(text.rstrip())), False

    def _probe(self) -> None:
        question = Message("user", _QUESTION)
        try:
            bare = self.render([question], ())
            prompt = self.render([question], (), prompt=True)
            text = self.render([question, Message("assistant", _ANSWER)], ())
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(
                f"the chat template is not valid Jinja: line {error.lineno}: {error.message}",
                "correct the template in the tokenizer or in model.chat_template",
            ) from None
        except TEMPLATE_ERRORS:
            return  # It wants other roles first; each row is then closed by what it ends in.
        self._written += text + prompt
        before, found, tail = text.rpartition(_ANSWER)
        if found:
            self.ending = Ending(tail, _first(self._added, tail))
            self.opens_answer = prompt != bare or not before[len(bare) :].strip()
        if "tool_calls" in self.source:
            self._probe_tool_call(question)

    def _probe_tool_call(self, question: Message) -> None:
        messages = [question, Message("assistant", "", (_PROBE_CALL,))]
        for as_text, broken in ((False, "{'probe_key'"), (True, '\\"probe_key')):
            self.arguments_as_text = as_text
            try:
                text = self.render(messages, [_PROBE_TOOL])
            except TEMPLATE_ERRORS:
                continue
            answer = text[text.rfind(_TOOL) :]
            if broken in answer or "probe_value" not in answer:
                continue
            self._written += text
            found = self._closing.search(text)
            if found:
                tail = found.group()
                self.tool_ending = Ending(tail, _first(self._added, tail))
            return
        self.arguments_as_text = False


def _added_tokens(tokenizer: Any) -> dict[str, bool]:
    """Added tokens that are not white space -> whether they are special."""
    tokens = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
    tokens |= {str(token): True for token in tokenizer.all_special_tokens}
    return {token: special for token, special in tokens.items() if token.strip()}


def _alternatives(tokens: Iterable[str]) -> re.Pattern[str]:
    """Match any of the tokens, the longest first; nothing when there are none."""
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _first(pattern: re.Pattern[str], text: str) -> str | None:
    found = pattern.search(text)
    return found.group() if found else None
