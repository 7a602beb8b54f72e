"""General requests: many, different, always the same, and in two halves that share nothing."""

import itertools

from postgrad.data import generic_prompts
from postgrad.data.generic_prompts import all_replay_prompts, probe_prompts, replay_prompts
from postgrad.data.near_duplicates import find_twins, normalise


def test_there_are_a_few_thousand_different_requests():
    prompts = all_replay_prompts()
    assert 2000 < len(prompts) < 5000
    assert len(set(prompts)) == len(prompts)
    assert not any("{" in prompt or "  " in prompt for prompt in prompts)


def test_probe_and_replay_share_no_topic_sentence_or_numbers():
    for name in ("ABOUT", "TOPICS", "REWRITE", "SENTENCES", "COUNT", "NUMBERS"):
        probe, replay = (getattr(generic_prompts, f"{half}_{name}") for half in ("PROBE", "REPLAY"))
        assert not set(probe) & set(replay)
        assert len(set(probe)) == len(probe)
    words = {topic.removeprefix("the ") for topic in generic_prompts.PROBE_TOPICS}
    topics = " ".join(generic_prompts.REPLAY_TOPICS)
    assert not any(word in topics for word in words)
    assert not set(probe_prompts()) & set(all_replay_prompts())


def test_no_probe_prompt_is_nearly_a_replay_prompt():
    probe, replay = (
        [normalise(p) for p in half] for half in (probe_prompts(), all_replay_prompts())
    )
    assert not find_twins(probe, replay, 0.8)


def test_the_probe_set_is_fixed_and_has_every_kind():
    prompts = probe_prompts()
    assert prompts == probe_prompts()
    assert len(set(prompts)) == 24
    for some in (prompts, prompts[:8]):
        assert any("sentence" in prompt for prompt in some)
        assert any(any(character.isdigit() for character in prompt) for prompt in some)
    assert max(map(len, prompts)) < 200


def test_a_smaller_number_of_replay_prompts_is_a_beginning_of_a_larger_one():
    few, many = replay_prompts(10, seed=3), replay_prompts(50, seed=3)
    assert few == many[:10]
    assert len(set(many)) == 50
    assert replay_prompts(10, seed=4) != few
    assert len(replay_prompts(10**6, seed=3)) == len(all_replay_prompts())


def test_arithmetic_has_answers_that_are_not_negative():
    for (a, b, _), template in itertools.product(
        (*generic_prompts.PROBE_NUMBERS, *generic_prompts.REPLAY_NUMBERS),
        (*generic_prompts.PROBE_COUNT, *generic_prompts.REPLAY_COUNT),
    ):
        assert max(a, b + 1) > b > 0, template
