"""Messages and the rules of a conversation: order of turns, tool calls and their results, weights.

An assistant's `arguments` given as an object are refused, not converted: which JSON text the model
is to write (spacing, key order, nulls that a table added) is the author's decision.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from postgrad.data.files import describe
from postgrad.types import ROLES, Conversation, Message, ToolCall

_ROLES = {role: role for role in ROLES}
_ROLE_HINTS = {
    "developer": "write system",
    "function": "write tool, with the call's tool_call_id",
    "human": "write user",
    "gpt": "write assistant",
    "bot": "write assistant",
}
_THINKING = "is not read: put it into content as the chat template expects, or remove it"
_REFUSED_KEYS = {
    "function_call": "is the old form of tool_calls: write tool_calls",
    "train": "is not read: write weight: 0 or 1",
    "training": "is not read: write weight: 0 or 1",
    "reasoning_content": _THINKING,
    "reasoning": _THINKING,
    "thinking": _THINKING,
    "refusal": "is not read: put it into content, or remove it",
    "audio": "is not read: only text is",
}


class BadRow(Exception):
    """The first thing that is wrong with a row."""

    def __init__(self, field: str, text: str) -> None:
        super().__init__(field, text)
        self.field = field
        self.text = text


def bad(field: str, text: str) -> NoReturn:
    """Refuse the row that is being read."""
    raise BadRow(field, text)


def value_of(values: Mapping[str, Any], key: str) -> Any:
    """Return a column of a row; a missing one is a bad row that names the columns it has."""
    if key not in values:
        bad(key, f"missing; the row has {', '.join(map(str, values)) or 'no keys'}")
    return values[key]


def field_text(value: Any, field: str, *, empty: bool = False) -> str:
    """Return a value that must be text, not blank unless `empty`, and valid Unicode."""
    if not isinstance(value, str):
        bad(field, f"text expected, got {describe(value)}")
    if not empty and not value.strip():
        bad(field, "empty")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(value[error.start])
            bad(field, f"unpaired surrogate \\u{code:04x} at character {error.start}")
    return value


def read_messages(value: Any, field: str) -> tuple[Message, ...]:
    """Read a list of OpenAI messages."""
    if not isinstance(value, list):
        bad(field, f"a list of messages expected, got {describe(value)}")
    if not value:
        bad(field, "an empty list")
    return tuple(_message(item, f"{field}[{index}]") for index, item in enumerate(value))


def refuse_keys(value: Mapping[str, Any], field: str) -> None:
    """Refuse keys of a message that change its meaning but are not read, unless they are empty."""
    for key in value.keys() & _REFUSED_KEYS.keys():
        if value[key] not in (None, "", [], {}):
            bad(f"{field}.{key}", _REFUSED_KEYS[key])


def _message(value: Any, field: str) -> Message:
    if not isinstance(value, Mapping):
        bad(field, f"an object with role and content expected, got {describe(value)}")
    refuse_keys(value, field)
    role = value.get("role")
    if role not in _ROLES:
        hint = _ROLE_HINTS.get(role, "") if isinstance(role, str) else ""
        known = ", ".join(ROLES)
        bad(f"{field}.role", hint or f"one of {known} expected, got {describe(role)}")
    role = _ROLES[role]
    calls = _tool_calls(value.get("tool_calls"), f"{field}.tool_calls")
    if calls and role != "assistant":
        bad(f"{field}.tool_calls", f"only the assistant calls tools, not {role}")
    content = read_content(value.get("content"), f"{field}.content", role, calls)
    reference = value.get("tool_call_id")
    if reference is not None and (role != "tool" or not isinstance(reference, str)):
        bad(f"{field}.tool_call_id", f"a text in tool messages only, got {describe(reference)}")
    name = value.get("name")
    if name is not None:
        name = field_text(name, f"{field}.name")
    return Message(role, content, calls, reference, name, read_weight(value, field, role))


def read_content(value: Any, field: str, role: str, calls: tuple[ToolCall, ...]) -> str:
    """Read a message's text, or join its parts of type text."""
    if value is None and calls:
        return ""
    if isinstance(value, list):
        parts = []
        for index, part in enumerate(value):
            if not isinstance(part, Mapping) or part.get("type") != "text":
                bad(f"{field}[{index}]", "only parts of type text can be read")
            parts.append(field_text(part.get("text"), f"{field}[{index}].text", empty=True))
        value = "".join(parts)
    text = field_text(value, field, empty=True)
    if not text.strip() and not calls and role in ("user", "assistant"):
        bad(field, "empty" if role == "user" else "empty, and no tool calls: nothing to learn")
    return text


def read_weight(value: Mapping[str, Any], field: str, role: str) -> float | None:
    """Read the weight of an assistant turn: None, or a finite number from 0 to 1."""
    weight = value.get("weight")
    if weight is None:
        return None
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        bad(f"{field}.weight", f"a number from 0 to 1 expected, got {describe(weight)}")
    if not 0 <= weight <= 1:  # also catches NaN
        bad(f"{field}.weight", f"a number from 0 to 1 expected, got {weight}")
    if weight and role != "assistant":
        bad(f"{field}.weight", f"only assistant turns are learned, not {role}")
    return float(weight)


def _tool_calls(value: Any, field: str) -> tuple[ToolCall, ...]:
    if value is None or value == []:
        return ()
    if not isinstance(value, list):
        bad(field, f"a list expected, got {describe(value)}")
    calls = tuple(_tool_call(item, f"{field}[{index}]") for index, item in enumerate(value))
    ids = [call.id for call in calls]
    if None in ids and any(ids):
        bad(field, "some calls have an id and some have none")
    if None not in ids and len(set(ids)) != len(ids):
        bad(field, "two calls have the same id")
    return calls


def _tool_call(value: Any, field: str) -> ToolCall:
    if not isinstance(value, Mapping) or not isinstance(value.get("function"), Mapping):
        bad(field, 'an object {"id", "type", "function": {"name", "arguments"}} expected')
    if value.get("type") not in (None, "function"):
        bad(f"{field}.type", f"only 'function' can be read, got {describe(value['type'])}")
    function = value["function"]
    arguments = function.get("arguments")
    where = f"{field}.function.arguments"
    if isinstance(arguments, Mapping):
        bad(where, "a JSON string expected, as in the OpenAI format: json.dumps(arguments)")
    identifier = value.get("id")
    if identifier is not None:
        identifier = field_text(identifier, f"{field}.id")
    name = field_text(function.get("name"), f"{field}.function.name")
    return ToolCall(name, read_arguments(arguments, where), identifier)


def read_arguments(value: Any, field: str) -> str:
    """Read the arguments of a tool call: the JSON text of an object."""
    text = field_text(value, field)
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        bad(field, f"not JSON: {error}")
    if not isinstance(parsed, dict):
        bad(field, f"a JSON object expected inside, got {describe(parsed)}")
    return text


def read_tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    """Read tool definitions: a list, or that list as a JSON string; bare schemas are wrapped."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(field_text(value, "tools"))
        except (ValueError, RecursionError) as error:
            bad("tools", f"not JSON: {error}")
    if value in (None, "", []):
        return ()
    if not isinstance(value, list):
        bad("tools", f"a list of tool definitions expected, got {describe(value)}")
    tools = []
    for index, tool in enumerate(value):
        if isinstance(tool, Mapping) and "function" not in tool and "name" in tool:
            tool = {"type": "function", "function": tool}
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            bad(f"tools[{index}]", "an object with function.name expected")
        tools.append(tool)
    try:
        text = json.dumps(tools, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        bad("tools", f"not usable as JSON: {error}")
    field_text(text, "tools")
    return tuple(tools)


# --- rules for the whole conversation -----------------------------------------------------------


def check_conversation(
    messages: Sequence[Message], tools: tuple[Mapping[str, Any], ...], field: str
) -> Conversation:
    """Check order, pairing of tool results and that something is learned."""
    pending: list[str | None] = []
    before: str | None = None
    for index, message in enumerate(messages):
        where, role = f"{field}[{index}]", message.role
        if role == "system":
            if index:
                bad(where, "a system message may only stand first")
            continue
        if pending:
            _pair(message, pending, where)
        elif role == "tool":
            bad(where, "a tool result that no call asked for")
        else:
            expected = "user" if before in (None, "assistant") else "assistant"
            if role != expected:
                bad(where, f"{role} turn after {before or 'the start'}: {expected} expected")
            pending = [call.id for call in message.tool_calls]
        before = role
    if before != "assistant":
        bad(field, f"ends with {before or 'system'}: the last turn must be the assistant's answer")
    if not any(message.supervised_weight for message in messages):
        bad(field, "every assistant turn has weight 0: nothing to learn")
    if tools:
        known = {tool["function"]["name"] for tool in tools}
        for index, message in enumerate(messages):
            for call in message.tool_calls:
                if call.name not in known:
                    bad(f"{field}[{index}]", f"calls {call.name!r}, which is not among tools")
    return Conversation(tuple(messages), tools)


def _pair(message: Message, pending: list[str | None], where: str) -> None:
    """Take the call that a tool result answers off `pending`."""
    if message.role != "tool":
        calls = ", ".join(str(call) for call in pending if call) or len(pending)
        bad(where, f"{message.role} turn before the result of every tool call ({calls} missing)")
    if message.tool_call_id not in pending:
        asked = ", ".join(str(call) for call in pending if call) or "none (the calls have no ids)"
        bad(f"{where}.tool_call_id", f"{describe(message.tool_call_id)}; open calls: {asked}")
    pending.remove(message.tool_call_id)
