"""Batches are a pure function of the step; every row comes once an epoch."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from postgrad.train.stream import Stream
from training import make_rows

ROWS = make_rows(40, seed=5)


def stream(rows=ROWS, **settings):
    defaults = {"epochs": 2.0, "tokens_per_batch": 150, "micro_batch_tokens": 90, "packed": True}
    return Stream(rows, **{**defaults, "seed": 7, **settings})


def ids_of(batches):
    return [name for batch in batches for name in batch.example_ids]


@settings(max_examples=30, deadline=None)
@given(
    epochs=st.integers(1, 3),
    per_step=st.integers(10, 400),
    capacity=st.integers(5, 400),
    packed=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_every_epoch_holds_every_row_once(epochs, per_step, capacity, packed, seed):
    made = stream(
        epochs=float(epochs),
        tokens_per_batch=per_step,
        micro_batch_tokens=capacity,
        packed=packed,
        seed=seed,
    )
    seen = Counter(name for step in range(len(made)) for name in ids_of(made.step(step)))
    assert seen == {row.example_id: epochs for row in ROWS}
    assert made.tokens == epochs * sum(len(row) for row in ROWS)
    assert made.tokens == sum(b.tokens for step in range(len(made)) for b in made.step(step))


def test_a_step_is_the_same_whenever_it_is_asked_for():
    one, other = stream(), stream()
    for step in reversed(range(len(one))):
        for a, b in zip(one.step(step), other.step(step), strict=True):
            assert a.example_ids == b.example_ids
            assert np.array_equal(a.ids, b.ids)
            assert np.array_equal(a.weights, b.weights)


def test_a_step_laid_out_ahead_is_the_same_step(monkeypatch):
    made, plain = stream(), stream()
    for step in range(len(made)):
        for a, b in zip(made.step(step), plain.step(step), strict=True):
            assert a.example_ids == b.example_ids
            assert np.array_equal(a.ids, b.ids)
        made.prepare(step + 1)
    assert ids_of(made.step(0)) == ids_of(plain.step(0))
    made.prepare(3)
    monkeypatch.setattr(made, "_lay_out", None)
    assert ids_of(made.step(3)) == ids_of(plain.step(3))


def test_epochs_differ_and_seeds_differ():
    both, one = stream(epochs=2.0), stream(epochs=1.0)
    assert both.plan[: len(one)] == one.plan
    assert both.plan[len(one)] != one.plan[0]
    assert one.plan != stream(epochs=1.0, seed=8).plan


def test_the_size_of_a_micro_batch_changes_no_step():
    for step in range(5):
        rows = {tuple(sorted(ids_of(stream(micro_batch_tokens=c).step(step)))) for c in (40, 1000)}
        assert len(rows) == 1


def test_part_of_an_epoch_is_that_share_of_its_steps():
    one, two = len(stream(epochs=1.0)), len(stream(epochs=2.0))
    part = one + round((two - one) * 0.5)
    assert stream(epochs=1.5).plan == stream(epochs=2.0).plan[:part]
    assert len(stream(epochs=0.5)) == round(one / 2)
    assert len(stream(epochs=1e-6)) == 1


def test_max_steps_cuts_the_plan_and_never_lengthens_it():
    assert stream(max_steps=3).plan == stream().plan[:3]
    assert stream(max_steps=10_000).plan == stream().plan
