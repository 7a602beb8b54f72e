"""Suites as one figure and the share of a gain: against simpler tests, and by simulation."""

import numpy as np
import pytest

from postgrad.evaluate.statistics import (
    Interval,
    kept_share,
    mcnemar_exact,
    paired_share_interval,
    stratified_mean,
)


def differences(rng, n, wins, losses):
    return rng.choice([1.0, -1.0, 0.0], n, p=[wins, losses, 1 - wins - losses])


def test_one_stratum_is_mcnemars_test():
    x = np.array([1.0] * 9 + [-1.0] * 2 + [0.0] * 60)
    found = stratified_mean([x], [()])
    assert found.difference == pytest.approx(7 / 71)
    assert found.p == pytest.approx(mcnemar_exact(9, 2))
    tango = paired_share_interval(9, 2, 71)
    assert (found.low, found.high) == pytest.approx(tuple(tango), abs=0.03)


def test_strata_weigh_the_same_whatever_their_size():
    large, small = np.array([1.0] * 50 + [0.0] * 950), np.array([0.0] * 40 + [-1.0] * 10)
    found = stratified_mean([large, small], [(), ()])
    assert found.difference == pytest.approx((0.05 - 0.2) / 2)
    same = stratified_mean([large, large], [(), ()])
    assert same.difference == pytest.approx(0.05)
    assert (
        same.high - same.low
        < stratified_mean([large], [()]).high - stratified_mean([large], [()]).low
    )


def test_equal_answers_do_not_claim_certainty():
    found = stratified_mean([np.zeros(300), np.zeros(200)], [(), ()])
    assert (found.difference, found.p) == (0.0, 1.0)
    assert found.low < -0.005 < 0.005 < found.high


def test_rows_of_one_cluster_are_one_piece_of_evidence():
    x = np.repeat([1.0, 1.0, 1.0, -1.0, 0.0, 0.0], 20)
    alone = stratified_mean([x], [()])
    names = [str(row // 20) for row in range(len(x))]
    together = stratified_mean([x], [names])
    assert together.difference == alone.difference
    assert together.p > 0.5 > alone.p
    assert together.high - together.low > 2 * (alone.high - alone.low)
    lonely = stratified_mean([x, x], [(), ["only"] * len(x)])
    assert (lonely.low, lonely.high) == (-1.0, 1.0)


@pytest.mark.parametrize(("wins", "losses"), [(0.1, 0.05), (0.02, 0.01), (0.05, 0.25)])
def test_intervals_of_a_suite_cover_what_they_say(wins, losses):
    rng, truth, hits, trials = np.random.default_rng(1), wins - losses, 0, 400
    for _ in range(trials):
        strata = [differences(rng, n, wins, losses) for n in (60, 150, 300)]
        found = stratified_mean(strata, [(), (), ()], resamples=50)
        hits += found.low <= truth <= found.high
    assert 0.92 <= hits / trials <= 0.995


def test_false_alarms_of_a_suite_are_rare():
    rng, alarms, trials = np.random.default_rng(2), 0, 300
    for _ in range(trials):
        strata = [differences(rng, n, 0.08, 0.08) for n in (60, 120)]
        alarms += stratified_mean(strata, [(), ()], resamples=400).p < 0.05
    assert alarms / trials <= 0.085


def answers(rng, n, base, full, point):
    """Three arms on rows of different difficulty."""
    ease = rng.random(n)
    return [(ease < share).astype(float) for share in (base, full)] + [
        np.where(rng.random(n) < 0.05, rng.random(n) < point, ease < point).astype(float)
    ]


def kept(base, full, point, clusters=(), **options):
    wins, losses = int((point > full).sum()), int((point < full).sum())
    beside = paired_share_interval(wins, losses, len(base))
    return kept_share(base, full, point, clusters, beside, **options)


def test_the_share_kept_is_the_ratio_of_the_gains():
    base, full = np.zeros(100), np.repeat([1.0, 0.0], [80, 20])
    point = np.repeat([1.0, 0.0], [60, 40])
    share, (low, high) = kept(base, full, point)
    assert share == pytest.approx(0.75)
    assert 0.6 < low < share < high < 0.9
    assert kept(base, full, base)[0] == 0
    share, (low, high) = kept(base, full, full)
    assert share == 1
    assert low < 1 < high  # rows that never differed may differ next time
    assert kept(base, full, point, [str(n // 10) for n in range(100)])[1].low < low


def test_a_gain_that_is_hardly_there_bounds_nothing():
    base, full = np.zeros(60), np.repeat([1.0, 0.0], [1, 59])
    point = np.repeat([0.0, 1.0], [58, 2])
    share, (low, high) = kept_share(base, full, point, (), Interval(-0.1, 0.1))
    assert share == pytest.approx(2)
    assert -10 <= low < 0 < high == 10


def test_intervals_of_the_share_cover_what_they_say():
    rng, hits, trials = np.random.default_rng(3), 0, 200
    large = answers(rng, 400_000, 0.1, 0.7, 0.6)
    truth = (large[2].mean() - large[0].mean()) / (large[1].mean() - large[0].mean())
    for _ in range(trials):
        _, (low, high) = kept(*answers(rng, 150, 0.1, 0.7, 0.6), resamples=600)
        hits += low <= truth <= high
    assert 0.91 <= hits / trials <= 1.0
