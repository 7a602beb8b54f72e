"""Clusters, margins, suites, seeds and the planner, against scipy and statsmodels."""

import math

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests

from postgrad.evaluate.statistics import (
    Interval,
    chance_adjusted,
    clustered_error,
    clustered_interval,
    clustered_p,
    detectable_mean_difference,
    detectable_share_difference,
    holm,
    items_needed,
    items_to_certify,
    mcnemar_exact,
    non_inferior,
    one_sided,
    paired_share_interval,
    student_critical,
    student_within,
    two_levels,
)
from postgrad.types import GateStatus

levels = st.sampled_from([0.8, 0.9, 0.95, 0.99])
shares = st.floats(0.001, 1)


def clustered_scores(seed, clusters=12, most=9):
    """Scores and the names of their clusters, of unequal sizes, alike within a cluster."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, most + 1, clusters)
    names = [f"c{index}" for index, size in enumerate(sizes) for _ in range(size)]
    means = np.repeat(rng.random(clusters), sizes)
    order = rng.permutation(len(names))
    return (0.5 * means + 0.5 * rng.random(len(names)))[order], [names[i] for i in order]


@given(st.integers(0, 10**6), st.integers(2, 30))
def test_clustered_errors_are_those_of_the_jackknife(seed, clusters):
    values, names = clustered_scores(seed, clusters)
    names = np.array(names)
    moved = [values[names != name].mean() - values.mean() for name in set(names)]
    expected = math.sqrt((clusters - 1) / clusters * sum(m * m for m in moved))
    assert clustered_error(values, names) == pytest.approx(expected, rel=1e-9)


@given(st.integers(0, 10**6), st.integers(2, 30), st.integers(1, 9))
def test_clustered_errors_equal_those_of_statsmodels_when_sizes_are_equal(seed, clusters, size):
    values = np.random.default_rng(seed).random(clusters * size)
    index = np.arange(clusters * size) % clusters
    fitted = sm.OLS(values, np.ones(len(values))).fit(
        cov_type="cluster", cov_kwds={"groups": index}
    )
    assert clustered_error(values, index) == pytest.approx(float(fitted.bse[0]), rel=1e-9)


def test_clusters_of_one_row_have_the_usual_error_and_repeated_rows_that_of_the_cluster():
    values = np.random.default_rng(1).random(40)
    alone = [str(index) for index in range(40)]
    assert clustered_error(values, alone) == pytest.approx(stats.sem(values))
    repeated = clustered_error(np.repeat(values, 5), np.repeat(alone, 5).tolist())
    assert repeated == pytest.approx(stats.sem(values))
    assert math.isinf(clustered_error(values, ["one"] * 40))


@given(st.integers(0, 10**6), levels)
def test_a_clustered_interval_is_students_and_never_narrower_than_that_of_the_rows(seed, level):
    values, names = clustered_scores(seed)
    mean, error = values.mean(), clustered_error(values, names)
    sizes = np.unique(names, return_counts=True)[1]
    effective = int(len(values) ** 2 / (sizes**2).sum() + 1e-9)
    expected = stats.t.interval(level, max(1, effective - 1), mean, error)
    inside = Interval(mean, mean)
    assert clustered_interval(values, names, level, inside, (-9, 9)) == pytest.approx(expected)
    low, high = clustered_interval(values, names, level, Interval(-2, 2), (-9, 9))
    assert (low, high) == (min(-2, expected[0]), max(2, expected[1]))
    assert clustered_interval(values, ["one"] * len(names), level, inside) == (0, 1)


def test_the_clustered_test_is_the_exact_one_when_every_cluster_is_a_row():
    difference = np.array([1.0] * 9 + [-1.0] * 2 + [0.0] * 20)
    names = [str(index) for index in range(len(difference))]
    assert clustered_p(difference, names) == pytest.approx(mcnemar_exact(9, 2))
    assert clustered_p(difference, ["one"] * 31) == 1
    halves = clustered_p(np.ones(12), [str(index // 2) for index in range(12)])
    assert halves == pytest.approx(2 * 0.5**6)


@given(st.integers(1, 20_000), levels)
def test_student_equals_scipy(degrees, level):
    expected = stats.t.ppf(0.5 + level / 2, degrees)
    assert student_critical(level, degrees) == pytest.approx(expected, rel=2e-4)
    assert student_within(expected, degrees) == pytest.approx(level, abs=1e-4)
    if degrees < 10_000:
        assert student_critical(level, degrees) == pytest.approx(expected, rel=1e-8)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_holm_equals_statsmodels(p_values):
    assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1])
    assert all(after >= before for before, after in zip(p_values, holm(p_values), strict=True))


@given(st.integers(1, 500), st.integers(0, 500), st.integers(0, 500), st.floats(0.001, 0.2))
def test_the_margin_test_follows_its_bounds(same, wins, losses, margin):
    n = same + wins + losses
    bounds = paired_share_interval(wins, losses, n, one_sided(0.95))
    status = non_inferior(*bounds, margin)
    assert (status is GateStatus.PASS) == (bounds.low > -margin)
    assert (status is GateStatus.FAIL) == (bounds.high < -margin)
    wider = paired_share_interval(wins, losses, n, 0.95)
    assert wider.low < bounds.low < bounds.high < wider.high
    if status is GateStatus.PASS:
        assert non_inferior(*bounds, 2 * margin) is GateStatus.PASS


def test_the_margin_test_of_known_cases():
    assert non_inferior(-0.01, 0.02, 0.015) is GateStatus.PASS
    assert non_inferior(-0.02, 0.02, 0.015) is GateStatus.UNDECIDED
    assert non_inferior(-0.05, -0.02, 0.015) is GateStatus.FAIL
    assert non_inferior(-1.0, 1.0, 0.5) is GateStatus.UNDECIDED
    assert one_sided(0.95) == pytest.approx(0.9)


@given(shares, shares, levels, st.floats(0.6, 0.95))
@settings(max_examples=60)
def test_the_planner_is_the_inverse_of_the_detectable_difference(difference, share, level, power):
    share = max(share, difference)
    n = items_needed(difference, discordance=share, confidence=level, power=power)
    assert detectable_share_difference(share, n, level, power) <= difference * (1 + 1e-6)
    if n > 1:
        assert detectable_share_difference(share, n - 1, level, power) > difference * (1 - 1e-6)
    n = items_needed(difference, deviation=share, confidence=level, power=power)
    assert detectable_mean_difference(share, n, level, power) <= difference * (1 + 1e-9)
    if n > 1:
        assert detectable_mean_difference(share, n - 1, level, power) > difference * (1 - 1e-9)


def test_the_planner_says_what_the_tables_say():
    assert items_needed(0.0083, discordance=0.12) == pytest.approx(14_042, rel=0.04)
    assert items_needed(0.02, discordance=0.15) == pytest.approx(3_000, rel=0.03)
    assert items_needed(0.05, discordance=0) == items_needed(0.05, discordance=0.05)


@pytest.mark.parametrize(("margin", "discordance"), [(0.02, 0.1), (0.05, 0.2), (0.03, 0.0)])
def test_as_many_rows_as_planned_certify_a_margin(margin, discordance):
    n = items_to_certify(margin, discordance=discordance)
    rng = np.random.default_rng(4)
    draws = rng.multinomial(n, [discordance / 2, discordance / 2, 1 - discordance], 400)
    passed = [
        paired_share_interval(int(wins), int(losses), n, one_sided(0.95)).low > -margin
        for wins, losses, _ in draws
    ]
    assert np.mean(passed) >= 0.75
    assert items_to_certify(margin, deviation=0.3) == pytest.approx(
        ((1.645 + 0.842) * 0.3 / margin) ** 2, rel=2e-3
    )


def test_accuracy_beyond_chance():
    assert chance_adjusted(0.2, 0.25) == pytest.approx(-1 / 15)
    assert chance_adjusted(0.7, 0.0) == 0.7


def crossed(rng, seeds, rows, seed_sd, row_sd, rest_sd):
    """Scores [seeds, rows] about 0 with a part of each seed, of each row, and a rest."""
    return (
        rng.normal(0, seed_sd, (seeds, 1))
        + rng.normal(0, row_sd, (1, rows))
        + rng.normal(0, rest_sd, (seeds, rows))
    )


def test_seeds_and_rows_are_kept_apart():
    rng = np.random.default_rng(2)
    scores = (rng.random((3, 400)) < 0.8).astype(float)
    found = two_levels(scores)
    means = scores.mean(axis=1)
    assert found.mean == pytest.approx(scores.mean())
    assert found.seed_deviation == pytest.approx(means.std(ddof=1))
    assert found.over_seeds == pytest.approx(
        stats.t.interval(0.95, 2, means.mean(), stats.sem(means))
    )
    assert found.row_error == pytest.approx(stats.sem(scores.mean(axis=0)))
    assert found.over_both.low <= found.over_rows.low < found.over_rows.high <= found.over_both.high


def test_two_levels_agree_with_the_analysis_of_variance():
    rng = np.random.default_rng(5)
    scores = crossed(rng, 4, 50, 0.1, 0.3, 0.2)
    found = two_levels(scores, bounds=(-9, 9))
    rest = scores - scores.mean(1, keepdims=True) - scores.mean(0) + scores.mean()
    squares = (
        50 * scores.mean(1).var(ddof=1),
        4 * scores.mean(0).var(ddof=1),
        (rest**2).sum() / (3 * 49),
    )
    variance = (squares[0] + squares[1] - squares[2]) / 200
    degrees = int(
        (200 * variance) ** 2 / (squares[0] ** 2 / 3 + squares[1] ** 2 / 49 + squares[2] ** 2 / 147)
    )
    low, high = stats.t.interval(0.95, degrees, scores.mean(), math.sqrt(variance))
    assert found.over_both.low == pytest.approx(min(low, found.over_rows.low))
    assert found.over_both.high == pytest.approx(max(high, found.over_rows.high))
    t = abs(scores.mean()) / math.sqrt(variance)
    assert found.p == pytest.approx(2 * stats.t.sf(t, degrees))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_scores_of_all_seeds_do_not_claim_certainty(value):
    found = two_levels(np.full((3, 100), value))
    assert (found.mean, found.seed_deviation, found.row_error) == (value, 0, 0)
    assert found.over_both.high - found.over_both.low > 0.03


@pytest.mark.parametrize("parts", [(0.05, 0.3, 0.2), (0.0, 0.4, 0.3), (0.1, 0.1, 0.3)])
def test_the_two_level_interval_covers_the_truth(parts):
    rng = np.random.default_rng(6)
    found = (
        two_levels(crossed(rng, 3, 100, *parts), resamples=300, bounds=(-9, 9)) for _ in range(150)
    )
    covered = np.mean([f.over_both.low <= 0 <= f.over_both.high for f in found])
    assert covered >= 0.9
