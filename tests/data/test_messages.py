import math

import pytest

from postgrad.config import DataConfig
from postgrad.data.formats import parse
from postgrad.data.messages import BadRow

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


def call(identifier="1", arguments="{}", name="f"):
    function = {"name": name, "arguments": arguments}
    return {"id": identifier, "type": "function", "function": function}


def calls(*items, content=None):
    return {"role": "assistant", "content": content, "tool_calls": list(items)}


def result(identifier="1", content="r"):
    return {"role": "tool", "tool_call_id": identifier, "content": content}


def read(messages, **row):
    return parse("messages", {"messages": messages, **row}, DataConfig(train="x"))


def refused(messages, **row):
    with pytest.raises(BadRow) as caught:
        read(messages, **row)
    return f"{caught.value.field}: {caught.value.text}"


def test_parallel_tool_calls_are_answered_in_any_order():
    found = read(
        [
            {"role": "system", "content": "s"},
            USER,
            calls(call("1"), call("2", '{"x": [1]}', "g"), content="let me see"),
            result("2", "two"),
            result("1", ""),
            ANSWER,
            USER,
            calls(call("3")),
        ],
        tools=[
            {"type": "function", "function": {"name": "f"}},
            {"type": "function", "function": {"name": "g"}},
        ],
        parallel_tool_calls=True,
    )
    assert [message.role[0] for message in found.messages] == list("suattaua")
    assert found.messages[2].tool_calls[1].arguments == '{"x": [1]}'
    assert [message.tool_call_id for message in found.messages[3:5]] == ["2", "1"]
    assert found.messages[-1].content == ""


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "messages: an empty list"),
        ("hi", "messages: a list of messages expected, got text"),
        (["hi"], "messages[0]: an object"),
        ([USER], "messages: ends with user: the last turn must be the assistant's answer"),
        ([{"role": "system", "content": "s"}], "ends with system"),
        ([ANSWER], "messages[0]: assistant turn after the start: user expected"),
        ([USER, USER, ANSWER], "messages[1]: user turn after user: assistant expected"),
        ([USER, ANSWER, ANSWER], "messages[2]: assistant turn after assistant: user expected"),
        ([USER, {"role": "system", "content": "s"}, ANSWER], "system message may only stand first"),
        ([USER, result(), ANSWER], "messages[1]: a tool result that no call asked for"),
        ([USER, calls(call()), ANSWER], "before the result of every tool call (1 missing)"),
        ([USER, calls(call()), USER], "before the result of every tool call"),
        ([USER, calls(call()), result("9"), ANSWER], "tool_call_id: text ('9'); open calls: 1"),
        ([USER, calls(call()), result(), result(), ANSWER], "no call asked for"),
        ([USER, calls(call("1"), call("1")), ANSWER], "two calls have the same id"),
        ([USER, calls(call("1"), call(None)), ANSWER], "some calls have an id"),
        ([USER, calls(call(None)), result("1"), ANSWER], "the calls have no ids"),
    ],
)
def test_order_and_pairing(messages, problem):
    assert problem in refused(messages)


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ({"role": "bot", "content": "a"}, "role: write assistant"),
        ({"role": "developer", "content": "a"}, "role: write system"),
        ({"role": 3, "content": "a"}, "role: one of system, user, assistant, tool expected, got"),
        ({"content": "a"}, "role: one of system, user, assistant, tool expected, got nothing"),
        ({"role": "assistant", "content": ""}, "content: empty, and no tool calls"),
        ({"role": "assistant", "content": " \n"}, "content: empty, and no tool calls"),
        ({"role": "assistant", "content": None}, "content: text expected, got nothing"),
        ({"role": "assistant", "content": 5}, "content: text expected, got a number (5)"),
        ({"role": "assistant", "content": [{"type": "image_url"}]}, "content[0]: only parts"),
        ({"role": "assistant", "content": "\ud83d!"}, "unpaired surrogate \\ud83d at character 0"),
        ({**ANSWER, "weight": math.nan}, "weight: a number from 0 to 1 expected, got nan"),
        ({**ANSWER, "weight": 1.5}, "weight: a number from 0 to 1 expected, got 1.5"),
        ({**ANSWER, "weight": -1}, "weight: a number from 0 to 1 expected"),
        ({**ANSWER, "weight": True}, "got true/false"),
        ({**ANSWER, "weight": "1"}, "got text ('1')"),
        ({**ANSWER, "weight": 0}, "messages: every assistant turn has weight 0"),
        ({**ANSWER, "tool_call_id": "1"}, "tool_call_id: a text in tool messages only"),
        ({**ANSWER, "function_call": {"name": "f"}}, "function_call: is the old form"),
        ({**ANSWER, "reasoning_content": "hm"}, "reasoning_content: is not read"),
        ({**ANSWER, "train": False}, "train: is not read: write weight"),
        (calls(call(arguments={"x": 1})), "arguments: a JSON string expected, as in the OpenAI"),
        (calls(call(arguments="{x}")), "arguments: not JSON"),
        (calls(call(arguments="[1]")), "arguments: a JSON object expected inside"),
        (calls(call(arguments=None)), "arguments: text expected, got nothing"),
        (calls(call(name="")), "function.name: empty"),
        (calls({"name": "f"}), 'tool_calls[0]: an object {"id", "type", "function"'),
        (calls({**call(), "type": "custom"}), "only 'function' can be read"),
        ({**ANSWER, "tool_calls": "f"}, "tool_calls: a list expected"),
    ],
)
def test_bad_messages_are_named_by_field(message, problem):
    found = refused([USER, message])
    assert problem in found
    assert found.startswith("messages")


def test_only_the_assistant_calls_tools_and_is_learned():
    assert "only the assistant calls tools" in refused([{**USER, "tool_calls": [call()]}, ANSWER])
    assert "only assistant turns are learned" in refused([{**USER, "weight": 1}, ANSWER])
    assert read([{**USER, "weight": 0}, ANSWER]).messages[0].weight == 0


def test_text_parts_are_joined_and_weights_kept():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    found = read([USER, {"role": "assistant", "content": parts, "weight": 0.25, "name": "n"}])
    assert found.messages[1].content == "ab"
    assert (found.messages[1].weight, found.messages[1].name) == (0.25, "n")


@pytest.mark.parametrize(
    ("tools", "problem"),
    [
        ("{", "tools: not JSON"),
        ({"name": "f"}, "tools: a list"),
        ([{"type": "function"}], "tools[0]: an object with function.name"),
        ([{"name": "g"}], "calls 'f', which is not among tools"),
        ([{"name": "f", "x": b"bytes"}], "tools: not usable as JSON"),
    ],
)
def test_bad_tools(tools, problem):
    assert problem in refused([USER, calls(call())], tools=tools)


@pytest.mark.parametrize("tools", [None, "", [], '[{"name": "f"}]', [{"function": {"name": "f"}}]])
def test_tools_may_be_absent_a_list_or_its_json(tools):
    found = read([USER, calls(call())], tools=tools)
    assert [tool["function"]["name"] for tool in found.tools] == (["f"] if tools else [])
