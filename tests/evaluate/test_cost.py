"""Cost of a request from evidence, and the request from which tuning is cheaper."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postgrad.evaluate.cost import (
    ArmCost,
    Typical,
    arm_cost,
    break_even,
    measure_costs,
    tuning_seconds,
)
from postgrad.types import Evidence


def row(prompt_tokens, completion_tokens, seconds, error=None):
    return Evidence(
        "id", "q", "a", "a", {}, None, prompt_tokens, completion_tokens, seconds, error=error
    )


def cost(arm, seconds):
    any_tokens = Typical(10.0, 10.0)
    return ArmCost(arm, 5, any_tokens, any_tokens, Typical(seconds, seconds))


def test_it_is_mean_and_median_of_the_answered_requests():
    rows = [row(10, 1, 0.1), row(20, 2, 0.2), row(60, 6, 0.6), row(9000, 0, 0.0, "too long")]
    found = arm_cost("tuned", rows)
    assert (found.arm, found.n) == ("tuned", 3)
    assert found.prompt_tokens == Typical(30.0, 20.0)
    assert found.completion_tokens == Typical(3.0, 2.0)
    assert found.seconds == Typical(pytest.approx(0.3), 0.2)
    assert arm_cost("tuned", rows[3:]) is None


def test_every_prompting_arm_is_held_against_the_tuned_model():
    failed = [row(9000, 0, 0.0, "too long")]
    rows = {"a": [row(90, 1, 0.9)], "b": failed, "c": [row(9, 1, 0.1)], "tuned": [row(9, 1, 0.2)]}
    found = measure_costs(rows, "tuned", 60.0)
    assert [c.arm for c in found.arms] == ["a", "c", "tuned"]
    assert [(b.arm, b.requests) for b in found.break_even] == [("a", 86), ("c", None)]
    assert found.against("c") == found.break_even[1]
    assert found.against("b") is None
    assert measure_costs(rows, "tuned", None).break_even == ()
    assert measure_costs({"a": rows["a"]}, "tuned", 60.0).break_even == ()


def test_the_break_even_is_training_over_the_seconds_saved():
    found = break_even(cost("base/few-shot-8", 0.5), cost("tuned", 0.3), 370.0)
    assert found.requests in (1850, 1851)
    assert found.finding.startswith(f"after {found.requests:,} requests tuning is cheaper than ")
    assert "370 s of training / (0.5 s - 0.3 s a request)" in found.finding


@pytest.mark.parametrize("seconds", [0.2, 0.3])
def test_tuning_never_pays_when_it_saves_nothing(seconds):
    found = break_even(cost("base/zero-shot", seconds), cost("tuned", 0.3), 370.0)
    assert found.requests is None
    assert found.finding.startswith("tuning never pays in time against base/zero-shot")


@given(st.floats(0.01, 10), st.floats(0.01, 10), st.floats(0, 1e5))
def test_before_it_prompting_is_cheaper_and_from_it_tuning_is(prompting, tuned, training):
    found = break_even(cost("base/few-shot-8", prompting), cost("tuned", tuned), training)
    if found.requests is None:
        assert prompting <= tuned
        return
    spare = 1e-9 * (1 + training + found.requests * prompting)
    assert training + found.requests * tuned <= found.requests * prompting + spare
    before = found.requests - 1
    assert training + before * tuned >= before * prompting - spare


def test_tuning_is_all_that_would_not_have_been_done_without_it():
    spent = {"data": 1.0, "preflight": 2.0, "train": 90.0, "evaluate": 50.0}
    assert tuning_seconds({"seconds": spent}) == 90
    assert tuning_seconds({"seconds": {**spent, "learning_rate_probe": 20.0}}) == 110
    assert tuning_seconds({"seconds": {**spent, "replay": 7.0}}) == 97
    assert tuning_seconds({"seconds": {"replay": 7.0}}) is None
    assert tuning_seconds({}) is None
