import time

from hypothesis import given
from hypothesis import strategies as st

from postgrad.data.packing import pack

lengths_and_capacity = st.tuples(st.lists(st.integers(0, 60), max_size=80), st.integers(1, 50))


@given(lengths_and_capacity)
def test_nothing_is_lost_or_duplicated_and_no_bin_overflows(case):
    lengths, capacity = case
    bins = pack(lengths, capacity)
    assert sorted(index for group in bins for index in group) == list(range(len(lengths)))
    for group in bins:
        assert group
        assert sum(lengths[index] for index in group) <= capacity or len(group) == 1


@given(lengths_and_capacity)
def test_documents_of_a_bin_are_longest_first_then_in_order(case):
    lengths, capacity = case
    for group in pack(lengths, capacity):
        assert group == sorted(group, key=lambda index: (-lengths[index], index))


@given(lengths_and_capacity)
def test_best_fit_leaves_no_two_bins_that_could_be_one(case):
    lengths, capacity = case
    totals = sorted(sum(lengths[i] for i in group) for group in pack(lengths, capacity))
    assert len(totals) < 2 or totals[0] + totals[1] > capacity or totals[0] == 0


def test_the_fullest_bin_that_fits_is_chosen():
    assert pack([7, 6, 3, 4], capacity=10) == [[0, 2], [1, 3]]


def test_oversize_documents_stand_alone_and_empty_input_gives_no_bin():
    assert pack([11, 1, 25], capacity=10) == [[2], [0], [1]]
    assert pack([], capacity=10) == []


def test_a_hundred_thousand_documents_pack_in_seconds():
    lengths = [(index * 7919) % 1900 + 1 for index in range(100_000)]
    start = time.perf_counter()
    bins = pack(lengths, 2048)
    assert time.perf_counter() - start < 5
    assert sum(lengths) / (len(bins) * 2048) > 0.99
