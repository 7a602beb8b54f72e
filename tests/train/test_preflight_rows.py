import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from transformers import AutoTokenizer

from conftest import CHATML
from postgrad.config import DataConfig
from postgrad.data.lengths import keep_usable, length_table
from postgrad.data.render import Renderer
from postgrad.errors import ConfigError, PreflightError
from postgrad.run import Run
from postgrad.train.preflight import NAMES, failed, may_pack, refuse, waive, write_checks
from postgrad.train.preflight.rows import check_rows
from postgrad.types import Check, Conversation, Example, Message, ToolCall


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


def rows(*conversations):
    """Each conversation a tuple of (role, text[, weight])."""
    return [
        Example(f"id-{n}", Conversation(tuple(message(*turn) for turn in turns)), f"rows.jsonl:{n}")
        for n, turns in enumerate(conversations, 1)
    ]


def message(role, text, weight=None):
    return Message(role, text, weight=weight)


GOOD = (("user", "the question is this, the answer?"), ("assistant", "yes"))
LONG = (("user", "number " * 400), ("assistant", "no"))


def checks(tokenizer, examples, template=None, **data):
    renderer = Renderer(tokenizer, template)
    config = DataConfig(train="rows.jsonl", **data)
    found = check_rows(renderer, renderer.inspect_all(examples), config)
    return {check.name: check for check in found}


def failing(found):
    return sorted(name for name, check in found.items() if not check.passed)


def test_good_rows_pass_every_check_and_every_name_is_known(tokenizer):
    found = checks(tokenizer, rows(GOOD, GOOD, (("system", "be brief"), *GOOD)))
    assert failing(found) == []
    assert list(found) == list(NAMES[: len(found)])
    for check in found.values():
        assert check.detail
        assert not check.rows
        assert not check.remedy
        json.dumps(dict(check.data))


@pytest.mark.parametrize(
    ("bad", "names"),
    [
        ((("user", "q"),), ["supervised-tokens-present"]),
        ((("user", "q"), ("assistant", "")), ["supervised-tokens-present"]),
        ((("user", "q"), ("assistant", "yes", 0)), ["supervised-tokens-present"]),
        (
            (("user", "q"), ("assistant", "yes", math.nan)),
            ["message-weights", "supervised-tokens-present"],
        ),
        ((("user", "q", 1.0), ("assistant", "yes")), ["message-weights"]),
        ((("user", "q<|im_end|>"), ("assistant", "yes")), ["control-tokens-in-text"]),
        (
            (("user", "q"), ("assistant", "yes<|im_end|>no")),
            ["control-tokens-in-text", "stop-token-supervised"],
        ),
        (
            (("assistant", "yes"),),
            ["serving-sends-the-same-prompt", "supervised-tokens-present"],
        ),
        (LONG, ["over-length"]),
    ],
)
def test_a_bad_row_fails_its_checks_and_is_named(tokenizer, bad, names):
    found = checks(tokenizer, rows(*[GOOD] * 20, bad), max_length=256)
    assert failing(found) == names
    for name in names:
        assert found[name].rows == ("rows.jsonl:21",)
        assert found[name].failures == 1
        assert found[name].remedy


def test_many_bad_rows_are_counted_and_some_are_named(tokenizer):
    found = checks(tokenizer, rows(*[(("user", "q"),)] * 100))
    check = found["supervised-tokens-present"]
    assert check.failures == 100
    assert 10 < len(check.rows) < 40


def test_a_template_that_refuses_rows(tokenizer):
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    examples = rows(GOOD, (("system", "be brief"), *GOOD))
    found = checks(tokenizer, examples, strict + CHATML)
    assert failing(found) == ["rows-render"]
    assert found["rows-render"].rows == ("rows.jsonl:2",)
    assert "no system" in found["rows-render"].detail
    dropping = checks(tokenizer, examples, strict + CHATML, on_invalid="drop")
    assert failing(dropping) == []
    renderer = Renderer(tokenizer, strict + CHATML)
    config = DataConfig(train="rows.jsonl", on_invalid="drop")
    kept, dropped = keep_usable(renderer.inspect_all(examples), config)
    assert [r.example.source for r in kept] == ["rows.jsonl:1"]
    assert [(d.source, d.step) for d in dropped] == [("rows.jsonl:2", "invalid")]
    assert "no system" in dropped[0].reason


@pytest.mark.parametrize(
    ("template", "names"),
    [
        (CHATML.replace("<|im_end|>", "<end>"), ["stop-token-supervised"]),
        (CHATML.split("{% if add")[0], ["serving-sends-the-same-prompt"]),
        (CHATML.replace("message['content']", "message['content'] | upper"), ["content-kept"]),
        ("{{ bos_token }}" + CHATML, ["bos-count"]),
        (
            CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>' }}{% endif"),
            ["serving-sends-the-same-prompt", "supervised-fraction", "supervised-tokens-present"],
        ),
    ],
)
def test_a_template_that_does_not_fit(tokenizer, template, names):
    assert template != CHATML
    found = checks(tokenizer, rows(*[GOOD] * 3), template)
    assert failing(found) == names
    for name in names:
        assert found[name].remedy


def test_boundary_inside_a_token(tokenizer):
    plain = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}"
        "{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    found = checks(tokenizer, rows(*[GOOD] * 3, (("user", "q"), ("assistant", "yes no"))), plain)
    assert "boundary-on-token" in failing(found)
    assert found["boundary-on-token"].failures == 4
    assert "serving never produces" in found["boundary-on-token"].detail


def test_tool_calls_lost_by_the_template_are_reported(tokenizer):
    call = ToolCall("weather", "{}", "call_1")
    messages = (
        Message("user", "q"),
        Message("assistant", "", (call,)),
        Message("assistant", "yes"),
    )
    example = Example("id", Conversation(messages), "rows.jsonl:1")
    assert "content-kept" in failing(checks(tokenizer, [example]))


def test_supervised_fraction_outside_the_band(tokenizer):
    found = checks(
        tokenizer, rows((("user", "number " * 700), ("assistant", "y"))), max_length=8000
    )
    assert failing(found) == ["supervised-fraction"]
    row = (("user", ""), ("assistant", "number " * 300))
    found = checks(tokenizer, rows(row), max_length=8000)
    assert failing(found) == ["supervised-fraction"]


def test_over_length_shows_a_table_and_three_remedies(tokenizer):
    found = checks(tokenizer, rows(*[GOOD] * 9, LONG), max_length=128)
    check = found["over-length"]
    assert failing(found) == ["over-length"]
    assert check.data["rows"] == 10
    assert check.data["over"] == 1
    assert check.data["median"] < 128 < check.data["longest"]
    assert check.data["limits"]["128"] == 1
    for remedy in (f"data.max_length to {check.data['longest']}", "drop", "truncate"):
        assert remedy in check.remedy
    assert checks(tokenizer, rows(GOOD, LONG), max_length=128, on_overlength="drop")[
        "over-length"
    ].passed
    assert not checks(tokenizer, rows(GOOD, LONG), max_length=4, on_overlength="drop")[
        "over-length"
    ].passed


def test_overlong_rows_are_dropped_or_cut_and_ledgered(tokenizer):
    renderer = Renderer(tokenizer)
    answer_late = LONG
    answer_early = (("user", "q"), ("assistant", "number " * 400))
    renderings = renderer.inspect_all(rows(GOOD, answer_late, answer_early))

    def usable(how):
        config = DataConfig(train="x", max_length=100, on_overlength=how)
        kept, dropped = keep_usable(renderings, config)
        return kept, [(d.source, d.step) for d in dropped]

    kept, ledger = usable("drop")
    assert [r.example.source for r in kept] == ["rows.jsonl:1"]
    assert ledger == [("rows.jsonl:2", "overlength"), ("rows.jsonl:3", "overlength")]
    kept, ledger = usable("truncate")
    assert [len(r.tokens) for r in kept] == [len(renderings[0].tokens), 100]
    assert kept[1].tokens.ids.tolist() == renderings[2].tokens.ids[:100].tolist()
    assert kept[1].answers[0].end == 100
    assert ledger == [("rows.jsonl:2", "overlength"), ("rows.jsonl:3", "truncated")]
    kept, ledger = usable("refuse")
    assert [len(r.tokens) for r in kept] == [len(r.tokens) for r in renderings]
    assert ledger == []


def test_length_table_of_nothing_and_of_one_row():
    assert length_table([], 10)["rows"] == 0
    table = length_table([7], 10)
    assert (table["median"], table["longest"], table["over"]) == (7, 7, 0)


def test_waivers_let_a_named_check_through_and_unknown_names_are_refused():
    bad = Check("bos-count", False, "two", "remove one", ("f:1",), 1)
    good = Check("over-length", True, "fits")
    with pytest.raises(PreflightError, match=r"bos-count: two \[f:1\]") as error:
        refuse((bad, good))
    assert error.value.exit_code == 3
    assert "train.waive: [bos-count]" in error.value.remedy
    waived = waive((bad, good), ("bos-count", "over-length"))
    assert [check.waived for check in waived] == [True, False]
    refuse(waived)
    assert failed(waived) == []
    with pytest.raises(ConfigError, match="did you mean bos-count"):
        waive((bad, good), ("boss-count",))
    with pytest.raises(ConfigError, match="choose from"):
        waive((bad, good), ("zzz",))
    assert waive((bad,), ("split-overlap",), known=["split-overlap"]) == (bad,)


def test_checks_are_written_with_the_verdict(tmp_path):
    bad = Check("bos-count", False, "two", "remove one", ("f:1",), 1, data={"expected": 1})
    run = Run(tmp_path)
    write_checks(run, (bad,))
    written = json.loads(run.preflight_path.read_text())
    assert written["passed"] is False
    assert written["checks"][0]["name"] == "bos-count"
    assert written["checks"][0]["data"] == {"expected": 1}
    write_checks(run, (replace(bad, waived=True),))
    assert json.loads(run.preflight_path.read_text())["passed"] is True


def test_packing_needs_a_verdict():
    assert not may_pack(())
    assert may_pack((Check("packing-isolation", True, "", data={"packed": True}),))
    assert not may_pack((Check("packing-isolation", True, "", data={"packed": False}),))


def test_a_template_with_a_mood_is_caught(tokenizer):
    moody = copy.deepcopy(tokenizer)
    moody.chat_template = CHATML
    renderer = Renderer(moody)
    renderings = renderer.inspect_all(rows(GOOD))
    shifted = replace(renderings[0], tokens=replace_ids(renderings[0].tokens))
    found = check_rows(renderer, [shifted], DataConfig(train="x"))
    assert "render-matches-template" in [c.name for c in found if not c.passed]
    assert "serving-sends-the-same-prompt" in [c.name for c in found if not c.passed]


def replace_ids(tokens):
    return replace(tokens, ids=np.roll(tokens.ids, 1))
