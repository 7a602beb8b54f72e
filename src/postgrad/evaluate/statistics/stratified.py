"""Suites of benchmarks as one figure, and the share of a gain that something keeps; both paired."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from postgrad.evaluate.statistics.intervals import (
    BLOCK,
    RESAMPLES,
    Interval,
    Values,
    cluster_sums,
    critical_value,
    error_and_degrees,
    score_array,
    student_critical,
)
from postgrad.evaluate.statistics.paired import PairedResult, randomisation_p

SHARE_LIMIT = 10.0
"""Shares of a gain are given within this bound on either side."""


def stratified_mean(
    differences: Sequence[npt.ArrayLike],
    clusters: Sequence[Sequence[str]],
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> PairedResult:
    """Return the mean over strata of their mean paired difference, its interval and p-value.

    Every stratum (a benchmark) weighs the same, however many rows it has. The variance is that of
    each stratum's mean (over clusters, where its rows have them) over the squared number of strata;
    Student's t with Satterthwaite's degrees of freedom. A stratum's standard error is taken as at
    least z / (n + z^2), half of what n rows without any difference leave open, so that few
    differing rows do not claim certainty. The p-value comes from the randomisation test: each row
    (each cluster) could as well have had the other sign.

    Args:
        differences: b - a of each stratum's rows, in [-1, 1].
        clusters: a name for each of these rows; an empty sequence = all independent.
        confidence: of the interval.
        seed: of the random signs.
        resamples: sign patterns at most.

    Source: Cochran 1977, Sampling Techniques, ch. 5 (strata of equal weight); Satterthwaite 1946,
    Biometrics Bull. 2:110.
    """
    count, z = len(differences), critical_value(confidence)
    assert count == len(clusters) >= 1
    mean, variances, degrees, sums = 0.0, [], [], []
    for values, names in zip(differences, clusters, strict=True):
        x = score_array(values)
        own = names or [str(row) for row in range(len(x))]
        error, freedom = error_and_degrees(x, own)
        mean += float(x.mean()) / count
        variances.append(max(error, z / (len(x) + z * z)) ** 2)
        degrees.append(max(1, freedom))
        sums.append(cluster_sums(x, own) / (count * len(x)))
    total = sum(variances)
    low, high = -1.0, 1.0
    if math.isfinite(total):
        spread = sum(v * v / d for v, d in zip(variances, degrees, strict=True))
        half = student_critical(confidence, max(1, int(total**2 / spread)))
        half *= math.sqrt(total) / count
        low, high = max(-1.0, mean - half), min(1.0, mean + half)
    signed = np.concatenate(sums)
    p = randomisation_p(signed[signed != 0], resamples, np.random.default_rng([seed, 1]))
    return PairedResult(mean, low, high, p)


def kept_share(
    base: npt.ArrayLike,
    full: npt.ArrayLike,
    point: npt.ArrayLike,
    clusters: Sequence[str],
    beside: Interval,
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> tuple[float, Interval]:
    """Return (point - base) / (full - base), the share of a gain that is kept, and its interval.

    All three are scores of the same rows, `full` better than `base` on average. The interval is a
    percentile bootstrap of the ratio, rows (or clusters) drawn together; each end is the one
    further out of it and of 1 + (point - full) / gain, with `beside` the interval of point - full:
    rows that never differ do not prove that they never would. Within +-`SHARE_LIMIT`.

    Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, ch. 25 (ratios).
    """
    b, f, x = score_array(base), score_array(full), score_array(point)
    assert len(b) == len(f) == len(x)
    gain = float((f - b).mean())
    assert gain > 0, gain
    names = list(clusters) or [str(row) for row in range(len(b))]
    parts = np.stack([cluster_sums(x - b, names), cluster_sums(f - b, names)])
    rng, ratios = np.random.default_rng(seed), []
    rows = max(1, BLOCK // parts.shape[1])
    for start in range(0, resamples, rows):
        shape = (min(rows, resamples - start), parts.shape[1])
        drawn = rng.integers(0, parts.shape[1], shape, dtype=np.int32)
        above, below = (parts[side][drawn].sum(axis=1) for side in (0, 1))
        ratios.append(_ratio(above, below))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(ratios), [tail, 1 - tail])
    low, high = min(low, 1 + beside.low / gain), max(high, 1 + beside.high / gain)
    return (
        float((x - b).mean()) / gain,
        Interval(max(-SHARE_LIMIT, float(low)), min(SHARE_LIMIT, float(high))),
    )


def _ratio(above: Values, below: Values) -> Values:
    """Return above / below; where nothing was gained the share has no bound on its side."""
    gained = below > 0
    bound = np.where(above < 0, -SHARE_LIMIT, SHARE_LIMIT)
    return np.asarray(np.where(gained, above / np.where(gained, below, 1.0), bound))
