from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from postgrad.data.batches import micro_batches, plan_epoch
from postgrad.types import Tokens


def tokens(ids, weights, example_id="e"):
    return Tokens(np.array(ids, np.int64), np.array(weights, np.float32), example_id)


@st.composite
def documents(draw):
    rows = []
    for number in range(draw(st.integers(1, 12))):
        length = draw(st.integers(1, 20))
        weights = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=length, max_size=length))
        # A token's value tells its document and place, so a label that crosses would be seen.
        ids = [1 + number * 100 + place for place in range(length)]
        rows.append(tokens(ids, [0.0, *weights[1:]], f"example-{number}"))
    return rows


@given(documents(), st.integers(1, 64), st.booleans())
def test_every_supervised_pair_appears_exactly_once_whatever_the_capacity(rows, capacity, packed):
    expected = Counter(
        (row.example_id, int(row.ids[place]), float(row.weights[place]))
        for row in rows
        for place in range(len(row))
        if row.weights[place]
    )
    found: Counter = Counter()
    for batch in micro_batches(rows, capacity, packed):
        for at in zip(*np.nonzero(batch.weights), strict=True):
            document = batch.example_ids[batch.documents[at]]
            found[document, int(batch.labels[at]), float(batch.weights[at])] += 1
    assert found == expected


@given(documents(), st.integers(1, 64), st.booleans())
def test_labels_are_the_next_token_of_the_same_document(rows, capacity, packed):
    for batch in micro_batches(rows, capacity, packed):
        for at in zip(*np.nonzero(batch.weights), strict=True):
            after = (at[0], at[1] + 1)
            assert batch.documents[after] == batch.documents[at]
            assert batch.ids[after] == batch.labels[at]
            assert batch.positions[after] == batch.positions[at] + 1
        assert not batch.labels[batch.weights == 0].any()


@given(documents(), st.integers(1, 64), st.booleans())
def test_documents_arrive_whole_with_positions_from_zero(rows, capacity, packed):
    by_id = {row.example_id: row for row in rows}
    seen = []
    for batch in micro_batches(rows, capacity, packed):
        assert batch.lengths == tuple(len(by_id[example]) for example in batch.example_ids)
        for index, example in enumerate(batch.example_ids):
            here = batch.documents == index
            assert batch.ids[here].tolist() == by_id[example].ids.tolist()
            assert batch.positions[here].tolist() == list(range(len(by_id[example])))
            seen.append(example)
    assert sorted(seen) == sorted(by_id)


@given(documents(), st.integers(1, 64), st.booleans())
def test_weights_and_tokens_add_up_and_batches_respect_the_capacity(rows, capacity, packed):
    batches = micro_batches(rows, capacity, packed)
    assert sum(b.supervised for b in batches) == pytest.approx(sum(r.supervised for r in rows))
    assert sum(b.tokens for b in batches) == sum(len(row) for row in rows)
    for batch in batches:
        assert batch.packed == packed
        assert batch.ids.size <= capacity or len(batch.example_ids) == 1
        assert packed is False or batch.ids.shape[0] == 1
        assert list(batch.lengths) == sorted(batch.lengths, reverse=True)
    longest = [max(batch.lengths) for batch in batches]
    assert longest[0] == max(len(row) for row in rows)


def test_arrays_have_the_types_that_the_loop_expects():
    for packed in (True, False):
        (batch,) = micro_batches([tokens([5, 6, 7], [0, 0, 1]), tokens([8], [0])], 16, packed)
        for array in (batch.ids, batch.labels, batch.positions, batch.documents):
            assert array.dtype == np.int64
        assert batch.weights.dtype == np.float32


def test_padding_is_marked_and_similar_lengths_share_a_batch():
    rows = [tokens(range(1, n + 1), [0] * n, str(n)) for n in (2, 9, 3, 10)]
    first, second = micro_batches(rows, 20, packed=False)
    assert first.example_ids == ("10", "9")
    assert second.example_ids == ("3", "2")
    assert second.documents.tolist() == [[0, 0, 0], [1, 1, -1]]
    assert second.ids.tolist() == [[1, 2, 3], [1, 2, 0]]


plans = st.tuples(
    st.lists(st.integers(1, 50), max_size=60), st.integers(1, 200), st.integers(0, 2**32 - 1)
)


@given(plans)
def test_an_epoch_holds_every_row_once_within_the_budget(plan):
    lengths, budget, seed = plan
    steps = plan_epoch(lengths, budget, seed, epoch=0)
    assert sorted(row for step in steps for row in step) == list(range(len(lengths)))
    for step in steps:
        assert step
        assert len(step) == 1 or sum(lengths[row] for row in step) <= budget


@given(plans)
def test_steps_are_as_full_as_the_order_allows(plan):
    lengths, budget, seed = plan
    steps = plan_epoch(lengths, budget, seed, epoch=0)
    totals = [sum(lengths[row] for row in step) for step in steps]
    for number in range(len(steps) - 2):
        assert totals[number] + lengths[steps[number + 1][0]] > budget


@given(st.lists(st.integers(1, 10), min_size=1, max_size=200), st.integers(0, 1000))
def test_no_step_is_tiny(lengths, seed):
    steps = plan_epoch(lengths, 100, seed, epoch=3)
    if len(steps) > 1:
        assert min(sum(lengths[row] for row in step) for step in steps) >= 40


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else():
    lengths = [3] * 50
    assert plan_epoch(lengths, 30, 7, 0) == plan_epoch(lengths, 30, 7, 0)
    assert plan_epoch(lengths, 30, 7, 0) != plan_epoch(lengths, 30, 7, 1)
    assert plan_epoch(lengths, 30, 7, 0) != plan_epoch(lengths, 30, 8, 0)
    # Pinned: a change here would change the order of a run that is resumed.
    assert plan_epoch([1] * 8, 8, 7, 0) == [[6, 3, 4, 0, 2, 7, 5, 1]]


def test_a_row_above_the_budget_is_a_step_of_its_own():
    steps = plan_epoch([5, 500, 5], 10, 0, 0)
    assert [1] in steps
    assert plan_epoch([], 10, 0, 0) == []
    assert plan_epoch([500], 10, 0, 0) == [[0]]
