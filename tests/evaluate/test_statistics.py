import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from postgrad.evaluate.statistics import (
    bootstrap_mean,
    critical_value,
    detectable_mean_difference,
    detectable_share_difference,
    mcnemar_exact,
    paired_bootstrap,
    paired_share_interval,
    wilson,
)
from postgrad.evaluate.statistics.paired import tango_lower

levels = st.sampled_from([0.8, 0.9, 0.95, 0.99])


@st.composite
def discordant_pairs(draw):
    n = draw(st.integers(1, 2000))
    wins = draw(st.integers(0, n))
    return wins, draw(st.integers(0, n - wins)), n


def outcomes(n, win, loss):
    """All (wins, losses) of n rows with their probabilities, the negligible ones left out."""
    wins, losses = (axis.ravel() for axis in np.mgrid[: n + 1, : n + 1])
    p = stats.multinomial.pmf(
        np.stack([wins, losses, np.maximum(n - wins - losses, 0)], axis=1)[wins + losses <= n],
        n,
        [win, loss, 1 - win - loss],
    )
    wins, losses = wins[wins + losses <= n], losses[wins + losses <= n]
    kept = p > 1e-9
    return wins[kept].astype(float), losses[kept].astype(float), p[kept]


def significant(wins, losses):
    return [mcnemar_exact(int(a), int(b)) < 0.05 for a, b in zip(wins, losses, strict=True)]


@given(st.integers(1, 5000), st.floats(0, 1), levels)
def test_wilson_equals_statsmodels(n, share, confidence):
    successes = round(share * n)
    expected = proportion_confint(successes, n, 1 - confidence, method="wilson")
    assert wilson(successes, n, confidence) == pytest.approx(expected, abs=1e-12)


def test_wilson_is_honest_at_the_ends():
    assert wilson(0, 1).low == 0
    assert wilson(0, 1).high == pytest.approx(0.793, abs=1e-3)
    assert wilson(300, 300).high == 1
    assert wilson(300, 300).low == pytest.approx(0.9874, abs=1e-4)


@given(st.integers(0, 3000), st.integers(0, 3000))
def test_mcnemar_equals_scipy_and_is_symmetric(wins, losses):
    p = mcnemar_exact(wins, losses)
    expected = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert p == pytest.approx(expected, rel=1e-9, abs=1e-290)
    assert p == mcnemar_exact(losses, wins)


def test_mcnemar_equals_statsmodels_and_holds_for_many_rows():
    for wins, losses in [(0, 5), (0, 6), (12, 30), (7, 7), (400, 350)]:
        expected = mcnemar([[9, wins], [losses, 9]], exact=True).pvalue
        assert mcnemar_exact(wins, losses) == pytest.approx(expected, rel=1e-9)
    expected = stats.binomtest(49_500, 100_000).pvalue
    assert mcnemar_exact(49_500, 50_500) == pytest.approx(expected, rel=1e-8)
    assert mcnemar_exact(0, 100_000) == 0.0


def test_paired_interval_of_a_published_example():
    # Airway hyper-responsiveness before and after transplantation, Fagerland et al. 2014.
    interval = paired_share_interval(1, 7, 21)
    assert interval == pytest.approx((-0.517, -0.026), abs=5e-4)


@pytest.mark.parametrize(("wins", "losses", "n"), [(1, 7, 21), (40, 20, 160), (30, 0, 80)])
def test_paired_interval_inverts_the_score_test(wins, losses, n):
    def constrained_likelihood(loss, difference):
        shares = np.array([loss + difference, loss, 1 - 2 * loss - difference])
        counts = np.array([wins, losses, n - wins - losses])
        return -float((counts * np.log(np.maximum(shares, 1e-300))).sum())

    for limit in paired_share_interval(wins, losses, n):
        bounds = (max(0.0, -limit), (1 - limit) / 2)
        options = {"xatol": 1e-12}
        loss = optimize.minimize_scalar(
            constrained_likelihood, args=(limit,), bounds=bounds, method="bounded", options=options
        ).x
        deviation = math.sqrt(n * (2 * loss + limit - limit**2))
        z = (wins - losses - n * limit) / deviation
        assert abs(z) == pytest.approx(critical_value(0.95), rel=1e-4)


@given(discordant_pairs(), levels)
def test_paired_interval_agrees_with_itself_and_with_the_test(pairs, confidence):
    wins, losses, n = pairs
    low, high = paired_share_interval(wins, losses, n, confidence)
    assert -1 <= low < high <= 1
    assert low - 1e-12 <= (wins - losses) / n <= high + 1e-12
    mirrored = paired_share_interval(losses, wins, n, confidence)
    assert (-mirrored.high, -mirrored.low) == pytest.approx((low, high), abs=1e-9)
    if mcnemar_exact(wins, losses) < 1 - confidence:
        assert low > 0 or high < 0
    if wins == 0:
        same_scale = wilson(losses, n, confidence)
        assert low == pytest.approx(-same_scale.high, abs=0.1 + 4 / n)


def test_paired_interval_without_discordant_rows_has_the_width_of_what_was_not_seen():
    low, high = paired_share_interval(0, 0, 300)
    assert high == pytest.approx(wilson(0, 300).high)
    assert low == pytest.approx(-high)


@pytest.mark.parametrize("n", [50, 100, 300])
@pytest.mark.parametrize(("win", "loss"), [(0.1, 0.1), (0.2, 0.05), (0.6, 0.02), (0.3, 0.2)])
def test_exact_coverage_and_error_rate_of_the_paired_methods(n, win, loss):
    wins, losses, p = outcomes(n, win, loss)
    z = critical_value(0.95)
    low, high = tango_lower(wins, losses, n, z), -tango_lower(losses, wins, n, z)
    covered = p[(low <= win - loss) & (win - loss <= high)].sum()
    assert 0.93 <= covered <= 0.97
    if win == loss:
        assert p[significant(wins, losses)].sum() <= 0.05


def skewed(rng, n):
    """Scores like those of a good model under F1: 92 % ones, the rest partly right; mean 0.96."""
    return np.where(rng.random(n) < 0.92, 1.0, rng.beta(2, 2, n))


def sparse(rng, n):
    """Differences of two such models: mostly 0, of either sign; mean 0."""
    return skewed(rng, n) - skewed(rng, n)


@pytest.mark.parametrize(("draw", "mean"), [(skewed, 0.96), (sparse, 0.0)])
@pytest.mark.parametrize("n", [50, 200])
def test_bootstrap_covers_the_mean_of_awkward_scores(draw, mean, n):
    rng = np.random.default_rng(3)
    intervals = [bootstrap_mean(draw(rng, n), 0.95, 1, 1000, (-1, 1)) for _ in range(600)]
    covered = sum(low <= mean <= high for low, high in intervals)
    assert 0.93 <= covered / 600 <= 0.985


def test_bootstrap_contains_that_of_scipy_and_is_hardly_wider():
    x = skewed(np.random.default_rng(5), 120)
    low, high = bootstrap_mean(x, 0.9, 1)
    theirs = stats.bootstrap(
        (x,), np.mean, confidence_level=0.9, n_resamples=9999, method="BCa", rng=2
    ).confidence_interval
    assert low == pytest.approx(theirs.low, abs=2e-3)
    assert theirs.high - 2e-3 <= high <= theirs.high + 0.006


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(0, 9), levels)
@settings(deadline=None, max_examples=50)
def test_bootstrap_is_seeded_bounded_and_contains_the_mean(values, seed, confidence):
    low, high = bootstrap_mean(values, confidence, seed, 300)
    assert (low, high) == bootstrap_mean(values, confidence, seed, 300)
    assert -1e-12 <= low <= high <= 1 + 1e-12
    assert low - 1e-12 <= np.mean(values) <= high + 1e-12


@pytest.mark.parametrize("n", [1, 2, 300])
def test_scores_without_spread_do_not_claim_certainty(n):
    assert bootstrap_mean([1.0] * n) == pytest.approx(wilson(n, n))
    assert bootstrap_mean([0.0] * n) == pytest.approx(wilson(0, n))
    low, high = bootstrap_mean([0.5] * n)
    assert 0.5 - low == pytest.approx(high - 0.5)
    assert 0.5 - low == pytest.approx(wilson(0, n).high / 2)


def test_memory_stays_bounded():
    values = np.random.default_rng(0).random(100_000)
    tracemalloc.start()
    try:
        paired_bootstrap(values, values[::-1], resamples=100)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 60 * 2**20


@given(st.integers(0, 6), st.integers(0, 6), st.integers(0, 20))
def test_randomisation_of_zeros_and_ones_is_the_exact_mcnemar_test(wins, losses, ties):
    a = np.array([0] * wins + [1] * losses + [1] * (ties + 1))
    b = np.array([1] * wins + [0] * losses + [1] * (ties + 1))
    result = paired_bootstrap(a, b, resamples=4096)
    assert result.p == pytest.approx(mcnemar_exact(wins, losses))
    assert result.difference == pytest.approx((wins - losses) / len(a))


def test_sampled_randomisation_is_close_to_the_exact_test():
    a, b = np.zeros(200), np.zeros(200)
    b[:30], a[30:45] = 1, 1
    assert paired_bootstrap(a, b).p == pytest.approx(mcnemar_exact(30, 15), abs=0.006)


def test_paired_bootstrap_under_no_difference_and_under_a_clear_one():
    rng = np.random.default_rng(11)
    false_alarms, covered = 0, 0
    for _ in range(400):
        a, b = skewed(rng, 60), skewed(rng, 60)
        result = paired_bootstrap(a, b, resamples=500)
        false_alarms += result.p < 0.05 and (result.low > 0 or result.high < 0)
        covered += result.low <= 0 <= result.high
    assert false_alarms / 400 <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 400)
    assert covered / 400 >= 0.93
    a = rng.random(200) * 0.8
    clear = paired_bootstrap(a, a + 0.1 + 0.05 * rng.random(200))
    assert clear.p < 0.001
    assert 0.12 < clear.low < clear.difference < clear.high < 0.13


def test_two_equal_arms_do_not_differ():
    result = paired_bootstrap([0.2, 0.7, 1.0], [0.2, 0.7, 1.0])
    assert result.difference == 0
    assert result.p == 1
    assert result.low == -result.high < 0


@pytest.mark.parametrize("n", [50, 300, 1000])
@pytest.mark.parametrize("discordance", [0.05, 0.1, 0.3])
def test_the_detectable_difference_has_the_power_it_says(n, discordance):
    difference = detectable_share_difference(discordance, n)
    either = max(discordance, difference)
    wins, losses, p = outcomes(n, (either + difference) / 2, max(either - difference, 0) / 2)
    power = p[significant(wins, losses)].sum()
    assert 0.79 <= power <= 0.94
    if n * discordance >= 50:
        assert power <= 0.83


@given(st.floats(0, 1), st.integers(1, 5000), levels)
def test_more_rows_detect_less(discordance, n, confidence):
    few = detectable_share_difference(discordance, n, confidence)
    many = detectable_share_difference(discordance, 2 * n, confidence)
    assert 0 < many <= few <= 1
    assert detectable_share_difference(discordance, n, confidence, power=0.9) >= few


def test_detectable_differences_of_known_sizes():
    assert detectable_share_difference(0.5, 5) == 1
    assert detectable_share_difference(0.12, 14_042) == pytest.approx(0.008, abs=5e-4)
    assert detectable_share_difference(0.15, 3080) == pytest.approx(0.020, abs=5e-4)
    assert detectable_mean_difference(0.3, 400) == pytest.approx(2.8016 * 0.015, rel=1e-4)
