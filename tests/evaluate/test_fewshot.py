"""Examples in a prompt: which rows of TRAIN, the same for all, near by words or near by vectors."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from postgrad.errors import ConfigError
from postgrad.evaluate.embedding import Embedder
from postgrad.evaluate.fewshot import (
    ExampleFinder,
    choose_shots,
    question,
    with_shots,
    with_system,
)
from postgrad.evaluate.retrieval import nearest_rows
from postgrad.progress import SilentDisplay
from postgrad.types import Conversation, Example, Message, Split, content_id

torch.set_num_threads(1)


def example(question, answer, split=Split.TRAIN, system=None):
    head = (Message("system", system),) if system else ()
    conversation = Conversation((*head, Message("user", question), Message("assistant", answer)))
    return Example(content_id(conversation), conversation, "rows.jsonl:1", split=split)


TRAIN = [example(f"question {n}" + " the" * n, "yes" if n % 2 else "no") for n in range(12)]
NEAR = [
    example(text, "x")
    for text in ("red apple pie", "blue sea", "red apple tree in the garden", "sky")
]
TESTS = [
    example("a red apple in the garden", "tree", Split.TEST),
    example("the blue sea today", "sea", Split.TEST),
]


@pytest.fixture(scope="module")
def embedder(tiny_model_dir):
    import contextlib

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    return Embedder(lambda: contextlib.nullcontext(model), lambda: tokenizer, SilentDisplay())


def unasked():
    raise AssertionError("the model is not needed")


WITHOUT = Embedder(unasked, unasked, SilentDisplay())


def test_shots_are_earlier_turns_after_the_system_message():
    test = example("what", "yes", system="be brief")
    asked = with_shots(test.conversation.prompt, [example("a", "b", system="be long")] * 2)
    assert [m.role for m in asked.messages] == ["system", *["user", "assistant"] * 2, "user"]
    assert asked.messages[0].content == "be brief"
    assert asked.messages[-1].content == "what"
    assert with_shots(test.conversation.prompt, ()) == test.conversation.prompt


def test_a_system_prompt_is_replaced_or_put_first():
    own = example("what", "yes", system="be brief").conversation.prompt
    bare = example("what", "yes").conversation.prompt
    for prompt in (own, bare):
        said = [(m.role, m.content) for m in with_system(prompt, "be kind").messages]
        assert said == [("system", "be kind"), ("user", "what")]
        assert with_system(prompt, None) == prompt


def test_static_examples_are_seeded_and_distinct():
    assert choose_shots(TRAIN, 4, seed=1) == choose_shots(TRAIN, 4, seed=1)
    assert len({choose_shots(TRAIN, 4, seed=seed) for seed in range(5)}) > 1
    assert len({shot.id for shot in choose_shots(TRAIN, 12, seed=1)}) == 12
    assert choose_shots((), 0, seed=1) == ()
    with pytest.raises(ConfigError, match="13 examples"):
        choose_shots(TRAIN, 13, seed=1)


def test_draws_differ_and_the_first_is_that_of_the_seed():
    finder = ExampleFinder(TRAIN, WITHOUT, 7)
    draws = [finder.find("static", 4, TESTS, draw) for draw in range(4)]
    assert draws[0] == [choose_shots(TRAIN, 4, 7)] * 2
    assert all(one == other for one, other in draws)
    assert len({shots[0] for shots in draws}) == 4
    assert finder.find("static", 4, TESTS, 2) == draws[2]


@pytest.mark.parametrize("kind", ["retrieved", "embedded"])
def test_the_nearest_of_each_request_stand_last(kind, embedder):
    finder = ExampleFinder(NEAR, embedder, 7)
    found = finder.find(kind, 2, TESTS)
    if kind == "retrieved":
        assert [shots[-1] for shots in found] == [NEAR[2], NEAR[1]]
    else:
        vectors = embedder([row.conversation.messages[0].content for row in NEAR])
        places = nearest_rows(vectors, embedder([question(row) for row in TESTS]), 2)
        assert found == [(NEAR[second], NEAR[first]) for first, second in places]
    assert finder.find(kind, 0, TESTS) == [(), ()]
    other = [example("a red apple in the garden", "grey sky", Split.TEST), TESTS[1]]
    assert finder.find(kind, 2, other) == found
    with pytest.raises(ConfigError, match="5 examples"):
        finder.find(kind, 5, TESTS)


def test_retrieval_by_words_needs_no_model():
    assert ExampleFinder(NEAR, WITHOUT, 7).find("retrieved", 2, TESTS)[0] == (NEAR[0], NEAR[2])
