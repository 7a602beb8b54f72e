"""Row formats: how each is recognised from its keys, and how its rows become conversations.

Nothing is repaired by guessing. What is converted is exact: content parts of type text are joined,
ShareGPT function calls become tool calls, bare function schemas are wrapped as OpenAI has them.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from postgrad.config import DataConfig
from postgrad.data.files import describe
from postgrad.data.messages import (
    bad,
    check_conversation,
    field_text,
    read_arguments,
    read_content,
    read_messages,
    read_tools,
    read_weight,
    refuse_keys,
    value_of,
)
from postgrad.errors import DataError
from postgrad.types import ROLES, Conversation, Message, ToolCall

FORMATS: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
    "question-answer": ("question", "answer"),
}
"""Format -> the keys by which it is recognised."""

USED_KEYS: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages", "tools", "parallel_tool_calls"),
    "sharegpt": ("conversations", "tools", "system"),
    "alpaca": ("instruction", "input", "output", "system", "history"),
    "prompt-completion": ("prompt", "completion", "system", "tools"),
    "question-answer": ("question", "answer", "system"),
}
"""Format -> every key it reads; other columns are ignored and counted."""

_TELLING = {
    "choices": "the answer options",
    "options": "the answer options",
    "context": "a text that the question is about",
    "passage": "a text that the question is about",
    "document": "a text that the question is about",
    "label": "a class or a thumbs up/down",
    "chosen": "the better of two answers: preference data",
    "rejected": "the worse of two answers: preference data",
    "tools": "tool definitions",
    "system": "a system prompt",
}


_SHAREGPT_ROLES = {
    **{role: role for role in ROLES},
    **dict.fromkeys(("human",), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "model"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
    **dict.fromkeys(("observation", "function_response", "tool_response"), "tool"),
}


_REQUESTS = ("text", "input", "query", "question", "request", "prompt", "instruction")
_ANSWERS = ("label", "output", "response", "answer", "completion", "target")


def detect_format(keys: Iterable[str], source: str) -> str | None:
    """Return the format that a row's keys name, None when there is none; never guess between two.

    Raises:
        DataError: Several fit, or there is a column that changes what a row means but that the
            format does not read (`context` beside question/answer). The remedy names data.format,
            which settles it.
    """
    present = set(keys)
    fitting = [name for name, needed in FORMATS.items() if present.issuperset(needed)]
    if len(fitting) > 1:
        raise DataError(
            f"{source}: rows fit several formats ({', '.join(fitting)}): {_shown(present)}",
            f"say which: data.format={fitting[0]}",
        )
    if {"chosen", "rejected"} <= present:
        raise DataError(
            f"{source}: these are preference pairs (chosen, rejected), not examples to imitate",
            "give rows with one answer each",
        )
    if not fitting:
        return None
    name = fitting[0]
    if extra := telling_key(name, present):
        raise DataError(
            f"{source}: rows look like {name}, but also have {extra}, which {name} does not read",
            f"put it into the request, or ignore it with data.format={name}",
        )
    return name


def telling_key(name: str, keys: Iterable[str]) -> str | None:
    """Return a key that the format does not read although it changes what a row means."""
    for key in sorted(keys):
        if key in _TELLING and key not in USED_KEYS[name]:
            return f"{key!r} ({_TELLING[key]})"
    return None


def _shown(keys: Iterable[str]) -> str:
    return ", ".join(sorted(keys)) or "none"


def unknown_format(keys: Iterable[str]) -> str:
    """Return what is wrong with a row whose keys no format knows."""
    return f"no known format has the keys {_shown(keys)}"


def format_remedy(keys: Iterable[str]) -> str:
    """Return how to name the columns of rows that no format knows."""
    present = set(keys)
    if present == {"text"}:
        return "plain text has no request and answer: give rows with a prompt and a completion"
    request = next((name for name in _REQUESTS if name in present), "COLUMN")
    answer = next((name for name in _ANSWERS if name in present - {request}), "COLUMN")
    return (
        f"name the columns: data.format=columns data.columns.prompt={request} "
        f"data.columns.completion={answer}; or use {', '.join(FORMATS)}"
    )


def _with_system(conversation: Conversation, config: DataConfig) -> Conversation:
    if config.system is None or conversation.messages[0].role == "system":
        return conversation
    system = Message("system", config.system)
    return replace(conversation, messages=(system, *conversation.messages))


def _parse_messages(values: Mapping[str, Any], config: DataConfig) -> Conversation:
    messages = read_messages(value_of(values, "messages"), "messages")
    return check_conversation(messages, read_tools(values.get("tools")), "messages")


def _parse_sharegpt(values: Mapping[str, Any], config: DataConfig) -> Conversation:
    field = "conversations"
    turns = value_of(values, field)
    if not isinstance(turns, list) or not turns:
        bad(field, f"a list of turns expected, got {describe(turns)}")
    if isinstance(turns[0], Mapping) and "role" in turns[0] and "from" not in turns[0]:
        messages = list(read_messages(turns, field))
    else:
        messages = [_turn(turn, f"{field}[{index}]") for index, turn in enumerate(turns)]
    messages = _own_system(values, "system", messages)
    return check_conversation(messages, read_tools(values.get("tools")), field)


def _turn(value: Any, field: str) -> Message:
    if not isinstance(value, Mapping):
        bad(field, f"an object with from and value expected, got {describe(value)}")
    speaker = value.get("from")
    role = _SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        known = ", ".join(_SHAREGPT_ROLES)
        bad(f"{field}.from", f"one of {known} expected, got {describe(speaker)}")
    refuse_keys(value, field)
    calls: tuple[ToolCall, ...] = ()
    if role == "call":
        role, calls = "assistant", _calls_in_text(value.get("value"), f"{field}.value")
    text = None if calls else value.get("value")
    content = read_content(text, f"{field}.value", role, calls)
    return Message(role, content, calls, weight=read_weight(value, field, role))


def _calls_in_text(value: Any, field: str) -> tuple[ToolCall, ...]:
    """Read ShareGPT's function call: JSON text of {"name", "arguments"} or of a list of them."""
    try:
        parsed = json.loads(field_text(value, field))
    except (ValueError, RecursionError) as error:
        bad(field, f"not JSON: {error}")
    calls = []
    for item in parsed if isinstance(parsed, list) and parsed else [parsed]:
        if not isinstance(item, Mapping) or not isinstance(item.get("name"), str):
            bad(field, '{"name": ..., "arguments": ...} expected')
        arguments = item.get("arguments")
        if isinstance(arguments, Mapping):  # part of a JSON text: its text form is already decided
            arguments = json.dumps(arguments, ensure_ascii=False)
        calls.append(ToolCall(item["name"], read_arguments(arguments, f"{field}.arguments")))
    return tuple(calls)


def _own_system(
    values: Mapping[str, Any], column: str | None, messages: list[Message]
) -> list[Message]:
    """Put the row's own system prompt first; an empty one counts as none."""
    value = values.get(column) if column else None
    if value in (None, ""):
        return messages
    if messages[0].role == "system":
        bad(str(column), "two system prompts: this column and the first message")
    return [Message("system", field_text(value, str(column))), *messages]


def _user(request: str, config: DataConfig) -> Message:
    return Message("user", config.prompt_template.replace("{prompt}", request))


def _parse_alpaca(values: Mapping[str, Any], config: DataConfig) -> Conversation:
    """Join instruction and input by a line break; history holds earlier [request, answer]s."""
    instruction = field_text(value_of(values, "instruction"), "instruction")
    extra = values.get("input")
    extra = field_text(extra, "input", empty=True) if extra is not None else ""
    messages: list[Message] = []
    history = values.get("history")
    if not isinstance(history, list | None) and history != "":
        bad("history", f"a list of [request, answer] expected, got {describe(history)}")
    for index, pair in enumerate(history or ()):
        where = f"history[{index}]"
        if not isinstance(pair, list) or len(pair) != 2:
            bad(where, f"[request, answer] expected, got {describe(pair)}")
        messages.append(_user(field_text(pair[0], f"{where}[0]"), config))
        messages.append(Message("assistant", field_text(pair[1], f"{where}[1]")))
    request = f"{instruction}\n{extra}" if extra.strip() else instruction
    messages.append(_user(request, config))
    messages.append(Message("assistant", field_text(value_of(values, "output"), "output")))
    return check_conversation(_own_system(values, "system", messages), (), "history")


def _parse_prompt_completion(values: Mapping[str, Any], config: DataConfig) -> Conversation:
    """Text or message lists; assistant turns inside the prompt are context, not learned."""
    prompt, completion = value_of(values, "prompt"), value_of(values, "completion")
    if isinstance(prompt, list):
        if config.prompt_template != "{prompt}":
            bad("prompt", "data.prompt_template works on text only, but this is a message list")
        before = [
            replace(message, weight=0.0)
            if message.role == "assistant" and message.weight is None
            else message
            for message in read_messages(prompt, "prompt")
        ]
    else:
        before = [_user(field_text(prompt, "prompt"), config)]
    if isinstance(completion, list):
        after = list(read_messages(completion, "completion"))
    else:
        after = [Message("assistant", field_text(completion, "completion"))]
    before = _own_system(values, "system", before)
    return check_conversation(
        [*before, *after], read_tools(values.get("tools")), "prompt+completion"
    )


def _parse_pair(
    values: Mapping[str, Any], config: DataConfig, columns: tuple[str, str, str | None]
) -> Conversation:
    prompt, completion, system = columns
    request = field_text(value_of(values, prompt), prompt)
    answer = Message("assistant", field_text(value_of(values, completion), completion))
    messages = _own_system(values, system, [_user(request, config), answer])
    return check_conversation(messages, (), prompt)


def _parse_question_answer(values: Mapping[str, Any], config: DataConfig) -> Conversation:
    return _parse_pair(values, config, ("question", "answer", "system"))


def _parse_columns(values: Mapping[str, Any], config: DataConfig) -> Conversation:
    assert config.columns is not None
    if config.columns.system is not None:
        value_of(values, config.columns.system)
    return _parse_pair(
        values,
        config,
        (config.columns.prompt, config.columns.completion, config.columns.system),
    )


_PARSERS: Mapping[str, Callable[[Mapping[str, Any], DataConfig], Conversation]] = {
    "messages": _parse_messages,
    "sharegpt": _parse_sharegpt,
    "alpaca": _parse_alpaca,
    "prompt-completion": _parse_prompt_completion,
    "question-answer": _parse_question_answer,
    "columns": _parse_columns,
}


def parse(name: str, values: Mapping[str, Any], config: DataConfig) -> Conversation:
    """Return the conversation of one row of format `name`, with data.system and prompt_template.

    Raises:
        BadRow: The row breaks a rule of the format or of conversations.
    """
    return _with_system(_PARSERS[name](values, config), config)
