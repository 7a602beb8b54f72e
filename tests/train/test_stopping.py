"""Early stopping: the paired standard error is right, improvement never stops, noise does."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from postgrad.train.stopping import HeldOut, Retained, observe, paired_difference

weights = arrays(np.float64, st.shared(st.integers(2, 30), key="n"), elements=st.floats(0.5, 50))
sums = arrays(np.float64, st.shared(st.integers(2, 30), key="n"), elements=st.floats(0, 100))


def held_out(loss, rows=20, noise=0.0, seed=0):
    """Rows of 10 tokens whose mean loss is `loss`."""
    wobble = np.random.default_rng(seed).normal(0, noise, rows)
    return HeldOut((loss + wobble - wobble.mean()) * 10, np.full(rows, 10.0))


def observe_all(evaluations, patience=3, min_delta="1se"):
    """Every state until it stops, from (loss, ...) or HeldOut."""
    state, states = None, []
    for step, evaluation in enumerate(evaluations):
        given_rows = isinstance(evaluation, HeldOut)
        row = evaluation if given_rows else held_out(evaluation)
        state, _ = observe(state, step, row, patience, min_delta)
        states.append(state)
        if state.stopped:
            break
    return states


def test_the_loss_is_weighted_by_token_not_by_row():
    both = HeldOut(np.array([10.0, 1.0]), np.array([10.0, 0.5]))
    assert both.loss == pytest.approx(11 / 10.5)


@given(before=sums, after=sums, weight=weights)
def test_the_improvement_is_the_difference_of_the_losses(before, after, weight):
    a, b = HeldOut(before, weight), HeldOut(after, weight)
    improvement, error = paired_difference(a, b)
    assert improvement == pytest.approx(a.loss - b.loss, abs=1e-9)
    assert error >= 0
    back, same = paired_difference(b, a)
    assert back == pytest.approx(-improvement, abs=1e-9)
    assert same == pytest.approx(error, abs=1e-9)


@given(before=sums, after=sums, weight=weights, factor=st.floats(0.1, 10))
def test_the_standard_error_scales_with_the_losses_not_with_the_weights(
    before, after, weight, factor
):
    _, error = paired_difference(HeldOut(before, weight), HeldOut(after, weight))
    _, scaled = paired_difference(
        HeldOut(before * factor, weight * factor), HeldOut(after * factor, weight * factor)
    )
    assert scaled == pytest.approx(error, rel=1e-6, abs=1e-9)


def test_rows_of_equal_weight_give_the_textbook_standard_error():
    generator = np.random.default_rng(0)
    before, after = generator.gamma(2, 5, 40), generator.gamma(2, 4, 40)
    weight = np.full(40, 8.0)
    improvement, error = paired_difference(HeldOut(before, weight), HeldOut(after, weight))
    per_token = (before - after) / 8
    assert improvement == pytest.approx(per_token.mean())
    assert error == pytest.approx(per_token.std(ddof=1) / math.sqrt(40))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_standard_error_agrees_with_a_bootstrap_of_rows(seed):
    generator = np.random.default_rng(seed)
    rows = 300
    weight = generator.integers(1, 60, rows).astype(float)
    before = weight * generator.gamma(4, 0.5, rows)
    after = before - weight * generator.normal(0.1, 0.4, rows)
    _, error = paired_difference(HeldOut(before, weight), HeldOut(after, weight))
    chosen = generator.integers(0, rows, (4000, rows))
    resampled = (before - after)[chosen].sum(1) / weight[chosen].sum(1)
    assert error == pytest.approx(resampled.std(), rel=0.1)


def test_pairing_removes_what_rows_have_in_common():
    generator = np.random.default_rng(3)
    hard = generator.gamma(2, 10, 200)
    weight = np.full(200, 10.0)
    change = generator.normal(1.0, 0.5, 200)
    improvement, error = paired_difference(HeldOut(hard, weight), HeldOut(hard - change, weight))
    unpaired = math.sqrt(2) * (hard / 10).std(ddof=1) / math.sqrt(200)
    assert error < unpaired / 10
    assert improvement > 10 * error


def test_the_first_evaluation_is_the_reference():
    state, error = observe(None, 0, held_out(2.0), 3)
    assert (state.best_step, state.best_loss, state.waited, error) == (0, 2.0, 0, 0.0)
    assert not state.stopped


@given(
    drops=st.lists(st.floats(1e-3, 1), min_size=1, max_size=40),
    patience=st.integers(1, 4),
    min_delta=st.sampled_from(["1se", 0.0, 1e-4]),
)
def test_steady_improvement_never_stops(drops, patience, min_delta):
    losses = 100 - np.cumsum([0, *drops])
    states = observe_all(losses, patience, min_delta)
    assert len(states) == len(losses)
    assert not states[-1].stopped
    assert states[-1].best_step == len(drops)
    assert states[-1].waited == 0


@given(patience=st.integers(1, 6), loss=st.floats(0.1, 10))
def test_a_constant_loss_stops_after_patience(patience, loss):
    states = observe_all([loss] * 20, patience)
    assert states[-1].stopped
    assert len(states) == patience + 1
    assert states[-1].best_step == 0


def test_patience_none_never_stops():
    assert not observe_all([1, *range(2, 30)], patience=None)[-1].stopped


def test_an_improvement_inside_the_noise_is_best_but_does_not_reset_patience():
    evaluations = [held_out(2.0 - 1e-4 * n, noise=0.5, seed=n) for n in range(4)]
    states = observe_all(evaluations, patience=3)
    assert [state.best_step for state in states] == [0, 1, 2, 3]
    assert [state.waited for state in states] == [0, 1, 2, 3]
    assert states[-1].stopped
    assert states[-1].reference is evaluations[0]


def test_small_improvements_add_up_against_one_reference():
    """Each is below min_delta; together they are not, so training goes on."""
    states = observe_all([2.0 - 0.004 * n for n in range(30)], patience=3, min_delta=0.01)
    assert len(states) == 30
    assert max(state.waited for state in states) == 2


@given(losses=st.lists(st.floats(0.1, 10), min_size=1, max_size=30), patience=st.integers(1, 5))
def test_the_best_step_is_the_first_of_the_lowest_losses(losses, patience):
    for count, state in enumerate(observe_all(losses, patience), 1):
        seen = [held_out(loss).loss for loss in losses[:count]]
        assert state.best_loss == min(seen)
        assert state.best_step == seen.index(min(seen))


def test_one_row_has_no_standard_error_and_counts_as_it_is():
    """Without an estimate of the noise any improvement counts: training is not cut short."""
    rows = [HeldOut(np.array([10.0 - n]), np.array([5.0])) for n in range(8)]
    states = observe_all(rows, patience=3)
    assert len(states) == 8
    assert not states[-1].stopped
    assert observe(states[0], 1, rows[1], 3)[1] == 0.0


# --- staying near the base ----------------------------------------------------------------------


def observe_near(pairs, patience=3, max_kl=0.1, min_delta=0.0):
    """States after each (loss, kl), until it stops."""
    states = []
    for step, (loss, kl) in enumerate(pairs):
        state = states[-1] if states else None
        measured = replace(held_out(loss), kl=kl)
        states.append(observe(state, step, measured, patience, min_delta, max_kl)[0])
        if states[-1].stopped:
            break
    return states


def test_a_checkpoint_beyond_the_limit_is_never_best_and_no_improvement():
    states = observe_near([(3, 0), (2.5, 0.05), (2, 0.2), (2.4, 0.1), (1.5, 0.11)])
    assert [state.best_step for state in states] == [0, 1, 1, 3, 3]
    assert [state.waited for state in states] == [0, 0, 1, 0, 1]
    assert [state.beyond for state in states] == [0, 0, 1, 0, 1]


def test_patience_beyond_the_limit_stops_and_says_so():
    states = observe_near([(3, 0), (2.5, 0.05), (2, 0.2), (1.9, 0.3), (1.8, 0.4), (1.7, 0.5)])
    assert len(states) == 5
    assert states[-1].stopped
    assert states[-1].reason == (
        "the last 3 evaluations were further than max_kl=0.1 nats per token from the base"
    )
    assert all(state.reason == "" for state in states[:-1])


def test_the_reason_tells_loss_from_distance():
    flat = observe_near([(3, 0), (3, 0.01), (3, 0.02), (3, 0.03)])[-1]
    assert flat.reason == "held-out loss no longer improves"
    both = observe_near([(3, 0), (3, 0.01), (3, 0.02), (2, 0.3)])[-1]
    assert both.reason == (
        "held-out loss no longer improves within max_kl=0.1 nats per token of the base"
    )


def test_a_distance_that_is_no_number_is_beyond_every_limit():
    states = observe_near([(3, 0), (2, math.nan), (2, None)])
    assert [state.best_step for state in states] == [0, 0, 0]


def test_without_a_limit_the_distance_decides_nothing():
    losses = [3, 2, 2.5, 1, 1, 1, 1]
    free = observe_near([(loss, 100.0) for loss in losses], max_kl=None)
    assert [s.best_step for s in free] == [s.best_step for s in observe_all(losses, 3, 0.0)]


@given(
    pairs=st.lists(st.tuples(st.floats(0.1, 10), st.floats(0, 1)), min_size=1, max_size=30),
    max_kl=st.floats(0.01, 1),
)
def test_the_best_is_the_first_of_the_lowest_losses_within_the_limit(pairs, max_kl):
    pairs = [(5.0, 0.0), *pairs]
    state = observe_near(pairs, None, max_kl)[-1]
    allowed = [(held_out(loss).loss, step) for step, (loss, kl) in enumerate(pairs) if kl <= max_kl]
    assert (state.best_loss, state.best_step) == min(allowed)


# --- keeping what the base could do -------------------------------------------------------------


def observe_kept(pairs, patience=3, max_kl=None, margin=2.0):
    """States after each (loss, points against the base), until it stops; KL is the loss / 100."""
    states = []
    for step, (loss, change) in enumerate(pairs):
        state = states[-1] if states else None
        left = {"piqa": Retained(0.7 + change / 100, change / 100, 200, margin)}
        measured = replace(held_out(loss), kl=loss / 100, retention=left)
        states.append(observe(state, step, measured, patience, 0.0, max_kl)[0])
        if states[-1].stopped:
            break
    return states


def test_the_floor_decides_which_step_is_the_best():
    pairs = [(3, 0), (2.5, -1), (2, -2.5), (2.4, -2), (1.5, -4)]
    states = observe_kept(pairs)
    assert [state.best_step for state in states] == [0, 1, 1, 3, 3]
    assert [state.waited for state in states] == [0, 0, 1, 0, 1]
    assert [state.beyond for state in states] == [0, 0, 1, 0, 1]
    free = observe_kept(pairs, margin=5.0)
    assert [state.best_step for state in free] == [0, 1, 2, 2, 4]


def test_a_gain_or_exactly_the_margin_is_above_the_floor():
    assert not Retained(0.68, -4 / 200, 200, 2.0).below
    assert not Retained(0.9, 0.2, 200, 2.0).below
    assert Retained(0.675, -5 / 200, 200, 2.0).below


def test_patience_below_the_floor_stops_and_says_what_was_lost():
    states = observe_kept([(3, 0), (2.5, -1), (2, -3), (1.9, -3), (1.8, -3.5), (1.7, 0)])
    assert len(states) == 5
    assert states[-1].best_step == 1
    assert states[-1].reason == (
        "the last 3 evaluations were below retention_floor (in the last one piqa lost 3.5 points "
        "of 2 allowed)"
    )


def test_the_reason_names_every_limit():
    mixed = observe_kept([(3, 0), (3, 0), (3, 0), (2, -3)])[-1]
    assert mixed.reason == "held-out loss no longer improves above retention_floor"
    flat = observe_kept([(3, 0)] * 4)[-1]
    assert flat.reason == "held-out loss no longer improves"
    far = observe_kept([(3, 0), (2, 0), (2, -3), (2, 0)], max_kl=0.001)[-1]
    assert far.reason == (
        "the last 3 evaluations were further than max_kl=0.001 nats per token from the base or "
        "below retention_floor"
    )
    both = observe_kept([(3, 0), (3, 0), (3, 0), (2, -3)], max_kl=0.1)[-1]
    assert both.reason == (
        "held-out loss no longer improves within max_kl=0.1 nats per token of the base and above "
        "retention_floor"
    )


@given(
    pairs=st.lists(st.tuples(st.floats(0.1, 10), st.floats(-9, 9)), min_size=1, max_size=30),
    margin=st.floats(0.1, 5),
)
def test_the_best_is_the_first_of_the_lowest_losses_above_the_floor(pairs, margin):
    pairs = [(5.0, 0.0), *pairs]
    state = observe_kept(pairs, None, None, margin)[-1]
    allowed = [
        (held_out(loss).loss, step)
        for step, (loss, change) in enumerate(pairs)
        if change >= -margin - 1e-9
    ]
    assert (state.best_loss, state.best_step) == min(allowed)
