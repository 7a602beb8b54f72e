"""One arm of an evaluation: what is asked, what is recorded, and where the examples come from."""

import io
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from postgrad.data.render import Renderer
from postgrad.evaluate.fewshot import ExampleFinder, choose_shots, with_shots
from postgrad.evaluate.runner import (
    called_tools,
    check_references,
    reference,
    resolve_max_new_tokens,
    run_arm,
    sample_test,
)
from postgrad.progress import LineDisplay
from postgrad.types import Conversation, Example, Message, Split, StopReason, ToolCall, content_id

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def renderer(tokenizer):
    return Renderer(tokenizer)


def example(question, answer, split=Split.TEST, system=None):
    head = (Message("system", system),) if system else ()
    conversation = Conversation((*head, Message("user", question), Message("assistant", answer)))
    return Example(content_id(conversation), conversation, "rows.jsonl:1", split=split)


def rows(split, count, system=None):
    return [
        example(f"{split} question {n}" + " the" * n, "yes" if n % 2 else "no", split, system)
        for n in range(count)
    ]


TRAIN, TEST = rows(Split.TRAIN, 12), rows(Split.TEST, 6)


def arm(model, renderer, tokenizer, examples, **changes):
    options = {"arm": "tuned", "scorer": "exact_match", "max_new_tokens": 6, "batch_tokens": 2048}
    return run_arm(model, renderer, tokenizer, examples, **(options | changes))


def test_evidence_is_what_the_model_says_to_the_rendered_prompt(model, renderer, tokenizer):
    for row, evidence in zip(TEST, arm(model, renderer, tokenizer, TEST), strict=True):
        ids = renderer.prompt_ids(row.conversation.prompt)
        output = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False,
            max_new_tokens=6,
            eos_token_id=sorted(renderer.stop_ids),
            pad_token_id=0,
        )[0, len(ids) :]
        assert evidence.completion == tokenizer.decode(output, skip_special_tokens=True)
        assert (evidence.prompt_tokens, evidence.completion_tokens) == (len(ids), len(output))
        assert evidence.example_id == row.id
        assert evidence.prompt == row.conversation.messages[0].content
        assert evidence.reference == row.conversation.answer
        assert set(evidence.scores) == {"exact_match"}
        assert evidence.stop_reason in StopReason
        assert evidence.seconds > 0
        assert evidence.error is None


def test_a_right_answer_passes(model, renderer, tokenizer):
    [said] = arm(model, renderer, tokenizer, TEST[:1])
    question = TEST[0].conversation.messages[0].content
    [evidence] = arm(model, renderer, tokenizer, [example(question, said.completion)])
    assert evidence.scores["exact_match"].passed
    assert not said.scores["exact_match"].passed


def test_shots_reach_the_model(model, renderer, tokenizer):
    shots = [TRAIN[n : n + 3] for n in range(len(TEST))]
    found = arm(model, renderer, tokenizer, TEST, shots=shots)
    for row, chosen, evidence in zip(TEST, shots, found, strict=True):
        asked = renderer.prompt_ids(with_shots(row.conversation.prompt, chosen))
        assert evidence.prompt_tokens == len(asked)


def test_another_system_prompt_reaches_the_model(model, renderer, tokenizer):
    found = arm(model, renderer, tokenizer, TEST, system="be brief")
    for row, evidence in zip(TEST, found, strict=True):
        messages = (Message("system", "be brief"), *row.conversation.prompt.messages)
        assert evidence.prompt_tokens == len(renderer.prompt_ids(Conversation(messages)))


@pytest.mark.parametrize("split", [Split.VALIDATION, Split.TEST, Split.RETENTION, None])
def test_shots_come_from_train_only(model, renderer, tokenizer, split):
    foreign = [*TRAIN, example("leak", "yes", split)]
    with pytest.raises(AssertionError, match="TRAIN"):
        choose_shots(foreign, 2, seed=1)
    with pytest.raises(AssertionError, match="TRAIN"):
        ExampleFinder(foreign, None, 1)
    with pytest.raises(AssertionError, match="TRAIN"):
        arm(model, renderer, tokenizer, TEST, shots=[foreign[-1:]] * len(TEST))


def test_sample_keeps_the_order_and_all_rows_when_there_are_few():
    sample = sample_test(TRAIN, 5, seed=3)
    assert len(sample) == 5
    assert sorted(sample, key=TRAIN.index) == list(sample)
    assert sample == sample_test(TRAIN, 5, seed=3)
    assert sample_test(TRAIN, None, seed=3) == sample_test(TRAIN, 99, seed=3) == tuple(TRAIN)


def test_the_answer_limit_is_a_quarter_above_the_longest_train_answer(renderer, tokenizer):
    answer = "number " * 20
    train = [*TRAIN, example("count", answer, Split.TRAIN)]
    tokens = len(tokenizer(answer + "<|im_end|>", add_special_tokens=False)["input_ids"])
    assert tokens > 20
    assert resolve_max_new_tokens("auto", renderer, train, 1024) == -(-tokens * 5 // 4)
    assert resolve_max_new_tokens("auto", renderer, train, 10) == 10
    assert resolve_max_new_tokens("auto", renderer, [example("a", "b")], 1024) == 8
    assert resolve_max_new_tokens(33, renderer, train, 10) == 33


def test_a_request_beyond_the_context_is_an_error_in_the_data(model, renderer, tokenizer):
    long = example("the question " * 1500, "yes")
    good, bad = arm(model, renderer, tokenizer, [TEST[0], long])
    assert good.error is None
    assert bad.error is not None
    assert "context" in bad.error
    assert bad.prompt_tokens > 2048
    assert (bad.completion, bad.stop_reason, bad.scores["exact_match"].value) == ("", None, 0)
    assert arm(model, renderer, tokenizer, [long])[0] == bad


def test_a_request_that_the_template_refuses_is_an_error_in_the_data(model, tokenizer):
    strict = "{{ raise_exception('no such role') if messages | length > 3 }}" + (
        tokenizer.chat_template
    )
    refusing = Renderer(tokenizer, chat_template=strict)
    turns = [Message(role, "yes") for role in ("user", "assistant") * 3]
    conversation = Conversation(tuple(turns))
    long = Example(content_id(conversation), conversation, "rows.jsonl:9", split=Split.TEST)
    good, bad = arm(model, refusing, tokenizer, [TEST[0], long])
    assert good.error is None
    assert "no such role" in (bad.error or "")


def test_tool_calls_are_compared_as_json():
    call = ToolCall("find", json.dumps({"b": 1, "a": [2]}))
    messages = (Message("user", "x"), Message("assistant", "", tool_calls=(call,)))
    wanted = '[{"arguments": {"a": [2], "b": 1}, "name": "find"}]'
    assert reference(Conversation(messages)) == wanted
    inner = '{"name": "find", "arguments": {"b": 1, "a": [2]}}'
    assert called_tools(f"<tool_call>\n{inner}\n</tool_call>") == wanted
    assert called_tools(inner.replace("arguments", "parameters")) == wanted
    assert called_tools(f"[{inner}]") == wanted
    assert called_tools("I {cannot} do {that") == "[]"


def test_progress_counts_the_rows(model, renderer, tokenizer):
    stream = io.StringIO()
    arm(model, renderer, tokenizer, TEST, display=LineDisplay(stream))
    assert "tuned: 6 of 6 rows" in stream.getvalue()


def test_references_that_no_answer_could_match_are_found_before_training():
    conversation = Conversation((Message("user", "q"), Message("assistant", "no json")))
    prose = Example("a", conversation, "f:1")
    found = check_references([prose], "json")
    assert not found.passed
    assert found.rows == ("f:1",)
    assert "json" in found.detail
    assert check_references([prose], "exact_match").passed
