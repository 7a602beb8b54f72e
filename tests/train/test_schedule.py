"""The learning rate: warm-up, shape, end, and nothing that depends on more than its arguments."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postgrad.train.schedule import learning_rate

kinds = st.sampled_from(["linear", "cosine", "constant"])
steps = st.integers(1, 500)
ratios = st.floats(0, 0.99)


def rates(count, kind="linear", warmup=0.03, peak=1.0):
    return [learning_rate(step, count, peak, kind, warmup) for step in range(count)]


@given(count=steps, kind=kinds, ratio=ratios)
def test_it_rises_to_the_peak_and_never_after(count, kind, ratio):
    found = rates(count, kind, ratio)
    warmup = math.ceil(count * ratio)
    assert all(0 < rate <= 1 for rate in found)
    assert all(a < b for a, b in pairwise(found[:warmup]))
    assert all(a >= b for a, b in pairwise(found[warmup:]))
    if warmup < count:
        assert found[warmup] == max(found) == 1.0


@given(count=steps, kind=kinds, ratio=ratios, peak=st.floats(1e-7, 1))
def test_it_is_proportional_to_the_peak(count, kind, ratio, peak):
    for one, other in zip(rates(count, kind, ratio), rates(count, kind, ratio, peak), strict=True):
        assert other == pytest.approx(one * peak, rel=1e-12)


@given(count=st.integers(2, 500), ratio=ratios)
def test_linear_falls_by_equal_steps_that_would_reach_zero_next(count, ratio):
    warmup = math.ceil(count * ratio)
    found = [*rates(count, "linear", ratio)[warmup:], 0.0]
    for one, other in pairwise(found):
        assert one - other == pytest.approx(1 / (len(found) - 1), abs=1e-12)


def test_cosine_is_half_way_at_half_time():
    found = rates(100, "cosine", 0.0)
    assert found[50] == pytest.approx(0.5)
    assert found[25] + found[75] == pytest.approx(1.0)


def test_constant_stays():
    assert set(rates(50, "constant", 0.1)[5:]) == {1.0}


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_one_step_trains_at_the_peak_without_warmup(kind):
    assert rates(1, kind, 0.0) == [1.0]
    assert 0 < rates(1, kind, 0.03)[0] < 1


def test_warmup_rounds_up_and_its_first_step_is_not_zero():
    assert rates(100, warmup=0.03)[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates(10, warmup=0.03)[:2] == [0.5, 1.0]


def test_linear_is_that_of_transformers():
    from torch import nn, optim
    from transformers import get_linear_schedule_with_warmup

    optimizer = optim.SGD([nn.Parameter(nn.init.ones_(nn.Linear(1, 1).weight))], lr=1.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, 20)
    theirs = []
    for _ in range(20):
        theirs.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates(20, warmup=0.0) == pytest.approx(theirs)
