import json

import pytest

from postgrad.config import ColumnsConfig, DataConfig
from postgrad.data.formats import (
    FORMATS,
    USED_KEYS,
    detect_format,
    format_remedy,
    parse,
    unknown_format,
)
from postgrad.data.messages import BadRow
from postgrad.errors import DataError

SOURCE = "rows.jsonl:1"


def config(**options):
    return DataConfig(train="rows.jsonl", **options)


def turns(conversation):
    return [(message.role, message.content) for message in conversation.messages]


def refused(name, row, **options):
    with pytest.raises(BadRow) as caught:
        parse(name, row, config(**options))
    return f"{caught.value.field}: {caught.value.text}"


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ("messages", "messages"),
        ("messages tools parallel_tool_calls id", "messages"),
        ("messages prompt prompt_id", "messages"),
        ("conversations system tools", "sharegpt"),
        ("instruction input output history", "alpaca"),
        ("instruction output", "alpaca"),
        ("prompt completion", "prompt-completion"),
        ("question answer id", "question-answer"),
    ],
)
def test_formats_are_recognised_by_their_keys(keys, name):
    assert detect_format(keys.split(), SOURCE) == name


@pytest.mark.parametrize(
    ("keys", "problem", "remedy"),
    [
        ("messages prompt completion", "several formats", "data.format=messages"),
        ("prompt chosen rejected", "preference pairs", "one answer"),
        ("question answer context", "'context'", "data.format=question-answer"),
        ("messages label", "thumbs up/down", "data.format=messages"),
        ("question answer choices", "answer options", "data.format=question-answer"),
    ],
)
def test_unclear_formats_are_errors_that_name_the_way_out(keys, problem, remedy):
    with pytest.raises(DataError, match=problem) as caught:
        detect_format(keys.split(), SOURCE)
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("keys", "remedy"),
    [
        ("text label", "data.columns.prompt=text data.columns.completion=label"),
        ("a b", "data.columns.prompt=COLUMN data.columns.completion=COLUMN"),
        ("", "data.format=columns"),
        ("text", "plain text has no request"),
    ],
)
def test_unknown_keys_are_answered_with_how_to_name_them(keys, remedy):
    assert detect_format(keys.split(), SOURCE) is None
    assert remedy in format_remedy(keys.split())
    assert unknown_format(["b", "a"]) == "no known format has the keys a, b"


def test_every_recognised_key_is_read():
    for name, keys in FORMATS.items():
        assert set(keys) <= set(USED_KEYS[name])


def test_sharegpt():
    row = {
        "system": "S",
        "tools": json.dumps([{"name": "add", "parameters": {}}]),
        "conversations": [
            {"from": "human", "value": "1+2?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1, "b": "é"}}'},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "3", "weight": 0.5},
        ],
    }
    found = parse("sharegpt", row, config())
    assert turns(found) == [
        ("system", "S"),
        ("user", "1+2?"),
        ("assistant", ""),
        ("tool", "3"),
        ("assistant", "3"),
    ]
    call = found.messages[2].tool_calls[0]
    assert (call.name, call.arguments, call.id) == ("add", '{"a": 1, "b": "é"}', None)
    assert found.messages[-1].weight == 0.5
    assert found.tools[0] == {"type": "function", "function": {"name": "add", "parameters": {}}}


def test_sharegpt_parallel_calls_and_openai_turns():
    call = '[{"name": "f", "arguments": {}}, {"name": "g", "arguments": "{\\"x\\": 1}"}]'
    row = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": call},
            {"from": "observation", "value": "1"},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "a"},
        ]
    }
    found = parse("sharegpt", row, config())
    assert [c.arguments for c in found.messages[1].tool_calls] == ["{}", '{"x": 1}']
    row = {
        "conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    }
    assert turns(parse("sharegpt", row, config())) == [("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize(
    ("turn", "problem"),
    [
        ({"from": "robot", "value": "x"}, "conversations[0].from: one of"),
        ({"from": "function_call", "value": "add(1)"}, "not JSON"),
        (
            {"from": "function_call", "value": '{"arguments": {}}'},
            '{"name": ..., "arguments": ...}',
        ),
        ({"from": "human", "value": 3}, "text expected, got a number (3)"),
        ("hello", "from and value expected"),
    ],
)
def test_bad_sharegpt_turns(turn, problem):
    assert problem in refused("sharegpt", {"conversations": [turn]})


def test_alpaca_joins_input_and_reads_history():
    row = {
        "instruction": "Translate",
        "input": "chat",
        "output": "cat",
        "system": "",
        "history": [["Translate\nchien", "dog"]],
    }
    found = parse("alpaca", row, config(prompt_template="<{prompt}>"))
    assert turns(found) == [
        ("user", "<Translate\nchien>"),
        ("assistant", "dog"),
        ("user", "<Translate\nchat>"),
        ("assistant", "cat"),
    ]
    found = parse("alpaca", {"instruction": "a", "input": " ", "output": "b"}, config())
    assert turns(found)[0] == ("user", "a")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"instruction": 1}, "instruction: text expected"),
        ({"output": "  "}, "output: empty"),
        ({"history": "x"}, "history: a list"),
        ({"history": [["a"]]}, "history[0]: [request, answer] expected"),
        ({"history": [["a", ""]]}, "history[0][1]: empty"),
        ({"input": ["x"]}, "input: text expected"),
    ],
)
def test_bad_alpaca_rows(change, problem):
    row = {"instruction": "a", "output": "b", **change}
    assert problem in refused("alpaca", row)


def test_prompt_completion_as_text_or_messages():
    row = {"prompt": "p", "completion": " c", "system": "s"}
    assert turns(parse("prompt-completion", row, config(prompt_template="Q: {prompt}"))) == [
        ("system", "s"),
        ("user", "Q: p"),
        ("assistant", " c"),
    ]
    row = {
        "prompt": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ],
        "completion": [{"role": "assistant", "content": "d"}],
    }
    found = parse("prompt-completion", row, config())
    assert [message.supervised_weight for message in found.messages] == [0, 0, 0, 1]
    assert "text only" in refused("prompt-completion", row, prompt_template="Q: {prompt}")


def test_question_answer_and_columns():
    row = {"question": "q", "answer": "a"}
    assert turns(parse("question-answer", row, config())) == [("user", "q"), ("assistant", "a")]
    columns = ColumnsConfig(prompt="text", completion="label", system="rule")
    options = {"format": "columns", "columns": columns, "system": "default"}
    row = {"text": "t", "label": "l", "rule": "own"}
    expected = [("system", "own"), ("user", "t"), ("assistant", "l")]
    assert turns(parse("columns", row, config(**options))) == expected
    row["rule"] = ""
    assert turns(parse("columns", row, config(**options)))[0] == ("system", "default")
    assert "rule: missing" in refused("columns", {"text": "t", "label": "l"}, **options)
    assert "label: missing; the row has text, rule" in refused(
        "columns", {"text": "t", "rule": ""}, **options
    )
    assert "label: text expected, got a number (3)" in refused(
        "columns", {"text": "t", "label": 3, "rule": ""}, **options
    )


def test_system_prompt_of_the_recipe_yields_to_the_rows_own():
    own = [{"role": "system", "content": ""}, {"role": "user", "content": "q"}]
    answer = {"role": "assistant", "content": "a"}
    options = config(system="S")
    assert turns(parse("messages", {"messages": [*own, answer]}, options))[0] == ("system", "")
    assert turns(parse("messages", {"messages": [own[1], answer]}, options))[0] == ("system", "S")
    row = {"system": "x", "conversations": [{"from": "system", "value": "y"}]}
    assert "two system prompts" in refused("sharegpt", row)
