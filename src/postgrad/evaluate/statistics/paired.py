"""Two arms on the same rows: the difference, its interval and its p-value; the margin test."""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from postgrad.evaluate.statistics.intervals import (
    BLOCK,
    RESAMPLES,
    Interval,
    Values,
    bootstrap_mean,
    cluster_sums,
    critical_value,
    score_array,
)
from postgrad.types import GateStatus


class PairedResult(NamedTuple):
    """Mean of b - a over the same rows, its interval and the p-value of no difference."""

    difference: float
    low: float
    high: float
    p: float


def mcnemar_exact(wins: int, losses: int) -> float:
    """Return the two-sided p-value of McNemar's exact test: are wins as likely as losses?

    `wins` and `losses` are the rows on which exactly one of two arms was right. The p-value is
    twice the smaller binomial(wins + losses, 1/2) tail, at most 1; 1 when there are no such rows.

    Source: McNemar 1947, Psychometrika 12:153; Fagerland et al. 2013, BMC Med. Res. Meth. 13:91.
    """
    assert min(wins, losses) >= 0, (wins, losses)
    n, k = wins + losses, min(wins, losses)
    if wins == losses:
        return 1.0
    log_point = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2)
    ratios = np.arange(k, 0, -1) / np.arange(n - k + 1, n + 1)  # P(k-1)/P(k), P(k-2)/P(k-1), ...
    tail = math.exp(log_point) * (1 + float(np.cumprod(ratios).sum()))
    return min(1.0, 2 * tail)


def paired_share_interval(wins: int, losses: int, n: int, confidence: float = 0.95) -> Interval:
    """Return Tango's score interval of the difference of two shares on the same n rows.

    The difference is (wins - losses) / n. The interval inverts the score test whose value at zero
    is McNemar's, so it leaves out zero whenever the exact test is significant at the same level
    (the exact test is the stricter of the two). Never empty, never beyond ±1, and of positive width
    when there are no discordant rows.

    Source: Tango 1998, Stat. Med. 17:891; recommended by Fagerland, Lydersen & Laake 2014, Stat.
    Med. 33:2850.
    """
    assert n >= 1, n
    assert wins >= 0 <= losses, (wins, losses)
    assert wins + losses <= n, (wins, losses, n)
    z = critical_value(confidence)
    low, negative_high = tango_lower(np.array([wins, losses]), np.array([losses, wins]), n, z)
    return Interval(float(low), -float(negative_high))


def paired_bootstrap(
    a: npt.ArrayLike,
    b: npt.ArrayLike,
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> PairedResult:
    """Compare two arms by graded scores in [0, 1] on the same rows: mean of b - a.

    The interval is `bootstrap_mean` of the differences, row by row. The p-value
    comes from the paired randomisation test: if the arms were interchangeable, each difference
    could as well have had the other sign. All sign patterns are tried when there are at most
    `resamples` of them (the p-value is then exact, and for 0/1 scores equals `mcnemar_exact`),
    else a seeded sample, counted with the observed one so that p is never 0.

    Source: Fisher 1935, The Design of Experiments; Noreen 1989; Dror et al. 2018, ACL, "The
    Hitchhiker's Guide to Testing Statistical Significance in Natural Language Processing".
    """
    difference = score_array(b) - score_array(a)
    interval = bootstrap_mean(difference, confidence, seed, resamples, bounds=(-1.0, 1.0))
    p = randomisation_p(difference[difference != 0], resamples, np.random.default_rng([seed, 1]))
    return PairedResult(float(difference.mean()), interval.low, interval.high, p)


def clustered_p(
    difference: npt.ArrayLike, clusters: npt.ArrayLike, seed: int = 0, resamples: int = RESAMPLES
) -> float:
    """Return the two-sided p-value of no difference when rows of a cluster go together.

    The paired randomisation test with whole clusters: if the arms were interchangeable, the sum of
    the differences of each cluster could as well have had the other sign. Needs no law of large
    numbers; six clusters is the least that can be significant at 0.05.

    Source: Edgington & Onghena 2007, Randomization Tests; Canay, Romano & Shaikh 2017,
    Econometrica 85:1013 (few clusters).
    """
    sums = cluster_sums(score_array(difference), clusters)
    return randomisation_p(sums[sums != 0], resamples, np.random.default_rng([seed, 1]))


def non_inferior(lower: float, upper: float, margin: float) -> GateStatus:
    """Judge whether a difference is not below -margin, from its one-sided bounds.

    PASS when the lower bound is above -margin: it is shown that no more than the margin was lost.
    FAIL when even the upper bound is below: it is shown that more was lost. Else UNDECIDED. Each
    is wrong with at most 1 - confidence. One-sided bounds are the ends of a two-sided interval of
    level 2 * confidence - 1. Of several tasks that must all pass, each may be judged at the full
    level (an intersection-union test needs no correction).

    Source: Schuirmann 1987, J. Pharmacokinet. Biopharm. 15:657 (one of the two one-sided tests);
    Berger 1982, Technometrics 24:295 (several tasks).
    """
    if lower > -margin:
        return GateStatus.PASS
    return GateStatus.FAIL if upper < -margin else GateStatus.UNDECIDED


def one_sided(confidence: float) -> float:
    """Return the level of the two-sided interval whose ends are one-sided bounds: 0.9 for 0.95."""
    return 2 * confidence - 1


def randomisation_p(x: Values, resamples: int, rng: np.random.Generator) -> float:
    """Return the two-sided p-value of the sum of `x`, none of them 0, under random signs."""
    if len(x) == 0:
        return 1.0
    reached = abs(float(x.sum())) - 1e-9 * float(abs(x).sum())
    exact = 2 ** len(x) <= resamples if len(x) < 63 else False
    patterns = 2 ** len(x) if exact else resamples
    as_large, rows = 0, max(1, BLOCK // len(x))
    for start in range(0, patterns, rows):
        stop = min(start + rows, patterns)
        if exact:
            signs = np.arange(start, stop)[:, None] >> np.arange(len(x)) & 1
        else:
            signs = rng.integers(0, 2, (stop - start, len(x)), dtype=np.int8)
        sums = 2 * (signs @ x) - x.sum()
        as_large += int((abs(sums) >= reached).sum())
    return as_large / patterns if exact else (as_large + 1) / (patterns + 1)


def tango_lower(wins: Values, losses: Values, n: int, z: float) -> Values:
    """Return the lower limits, by bisection between -1 and the observed difference."""
    low, high = np.full(len(wins), -1.0), (wins - losses) / n
    for _ in range(60):
        middle = (low + high) / 2
        # Maximum-likelihood probability of a loss when the difference is `middle`.
        linear = (2 * n - wins + losses) * middle - wins - losses
        constant = losses * middle * (1 - middle)
        root = np.sqrt(np.maximum(linear * linear + 8 * n * constant, 0))
        loss = (root - linear) / (4 * n)
        variance = n * np.maximum(2 * loss + middle * (1 - middle), 0)
        above = wins - losses - n * middle > z * np.sqrt(variance)
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return np.asarray((low + high) / 2)
