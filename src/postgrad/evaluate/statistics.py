"""Intervals, paired tests and detectable differences; numpy only, every random draw seeded.

Which method and why: Wilson for shares (Brown, Cai & DasGupta 2001); a bootstrap, widened where it
is known to be too narrow, for means of graded scores; the exact McNemar test with Tango's score
interval for two arms on the same rows with 0/1 scores (Fagerland, Lydersen & Laake 2014); the
paired randomisation test with the bootstrap of the differences for graded scores. All two-sided.
"""

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]

RESAMPLES = 10_000
"""Bootstrap resamples and random sign patterns; the Monte Carlo error of a p near .05 is .002."""
_BLOCK = 1 << 21
"""Numbers drawn at once: bounds the memory of a bootstrap to a few tens of megabytes."""
_NORMAL = NormalDist()


class Interval(NamedTuple):
    """Both ends of a confidence interval."""

    low: float
    high: float


class PairedResult(NamedTuple):
    """Mean of b - a over the same rows, its interval and the p-value of no difference."""

    difference: float
    low: float
    high: float
    p: float


def critical_value(confidence: float) -> float:
    """Return the two-sided standard normal quantile: 1.96 for 0.95."""
    assert 0 < confidence < 1, confidence
    return _NORMAL.inv_cdf(0.5 + confidence / 2)


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Return the Wilson score interval of a share: honest at 0 %, at 100 % and for small n.

    Source: Wilson 1927, JASA 22:209; recommended by Brown, Cai & DasGupta 2001, Stat. Sci. 16:101.
    """
    assert n >= 1, n
    assert 0 <= successes <= n, successes
    z = critical_value(confidence)
    share, scale = successes / n, 1 + z * z / n
    centre = (share + z * z / (2 * n)) / scale
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / scale
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return Interval(low, high)


def bootstrap_mean(
    values: npt.ArrayLike,
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = RESAMPLES,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Interval:
    """Return an interval of a mean of scores within `bounds`: per end, the wider of two methods.

    The two fail in opposite cases, so each end is the one further out. The BCa bootstrap is
    right on one-sided skew (92 % ones, the rest partly right; n = 50: 94 % coverage, percentile
    90 %, normal 90 %), but on sparse differences of either sign it takes the skew of the sample for
    that of the population (87 %). The score interval (the spread is taken about the supposed mean:
    half-width z s / sqrt(n - z^2)) is right there (97 %) and wrong on skew (90 %). Both together
    covered 94 to 98 % in ten such populations with n of 50, 100 and 300 at a nominal 95 %.

    Without any spread a bootstrap would claim certainty. Then the interval allows for the share of
    other values that n equal ones do not rule out, the Wilson limit of 0 of n, all of them at the
    far bound. For equal zeros or ones this is exactly `wilson`.

    Source: Efron 1987, JASA 82:171 (BCa); DiCiccio & Romano 1988, JRSS B 50:338 (a survey).
    """
    x = _array(values)
    mean, z = float(x.mean()), critical_value(confidence)
    if np.ptp(x) < 1e-9:
        unseen = wilson(0, len(x), confidence).high
        return Interval(mean - (mean - bounds[0]) * unseen, mean + (bounds[1] - mean) * unseen)
    if len(x) <= z * z:
        return Interval(*bounds)
    low, high = _bias_corrected(x, z, seed, resamples)
    half = z * float(x.std()) / math.sqrt(len(x) - z * z)
    return Interval(max(bounds[0], min(low, mean - half)), min(bounds[1], max(high, mean + half)))


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
    low, negative_high = _tango_lower(np.array([wins, losses]), np.array([losses, wins]), n, z)
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
    difference = _array(b) - _array(a)
    interval = bootstrap_mean(difference, confidence, seed, resamples, bounds=(-1.0, 1.0))
    p = _randomisation_p(difference[difference != 0], resamples, np.random.default_rng([seed, 1]))
    return PairedResult(float(difference.mean()), interval.low, interval.high, p)


def detectable_share_difference(
    discordance: float, n: int, confidence: float = 0.95, power: float = 0.8
) -> float:
    """Return the smallest true difference of two paired shares that n rows would have shown.

    Shown means: McNemar's exact test significant with probability `power` or more (within a point
    of 0.8 from about 30 discordant rows on, up to 0.92 below). `discordance` is the
    share of rows on which exactly one arm is right; where it is too small for any difference to
    show, the answer is the smallest discordance, all in one direction, that would. 1 means that n
    rows cannot show anything at this confidence.

    Source: Connor 1987, Biometrics 43:207, solved for the difference, with a continuity correction
    of one row for the exact test.
    """
    assert 0 <= discordance <= 1, discordance
    z_level, z_power = critical_value(confidence), _NORMAL.inv_cdf(power)

    def surplus(difference: float, share: float) -> float:
        spread = z_power * math.sqrt(n * max(share - difference * difference, 0.0))
        return n * difference - 1 - z_level * math.sqrt(n * share) - spread

    one_sided = surplus(discordance, discordance) < 0
    if one_sided and surplus(1.0, 1.0) < 0:
        return 1.0
    low, high = (discordance, 1.0) if one_sided else (0.0, discordance)
    for _ in range(60):
        middle = (low + high) / 2
        if surplus(middle, middle if one_sided else discordance) < 0:
            low = middle
        else:
            high = middle
    return high


def detectable_mean_difference(
    deviation: float, n: int, confidence: float = 0.95, power: float = 0.8
) -> float:
    """Return the smallest true difference of two paired means that n rows would have shown.

    `deviation` is the standard deviation of the differences, row by row.

    Source: Miller 2024, arXiv 2411.00640 (the usual normal power formula, paired).
    """
    assert n >= 1, n
    assert deviation >= 0, deviation
    return (critical_value(confidence) + _NORMAL.inv_cdf(power)) * deviation / math.sqrt(n)


def _array(values: npt.ArrayLike) -> Values:
    x = np.asarray(values, dtype=np.float64)
    assert x.ndim == 1, x.shape
    assert len(x) >= 1
    assert np.isfinite(x).all()
    return x


def _bias_corrected(x: Values, z: float, seed: int, resamples: int) -> tuple[float, float]:
    """Return the ends of the bias-corrected and accelerated bootstrap interval of the mean."""
    mean = float(x.mean())
    means = _resampled_means(x, resamples, np.random.default_rng(seed))
    ties = abs(means - mean) <= 1e-12 * max(1.0, abs(mean))
    below = float((means[~ties] < mean).sum() + 0.5 * ties.sum())
    bias = _NORMAL.inv_cdf(min(max(below, 0.5), resamples - 0.5) / resamples)
    deviations = x - mean
    acceleration = float((deviations**3).sum() / (6 * (deviations**2).sum() ** 1.5))
    tails = []
    for shifted in (bias - z, bias + z):
        tails.append(_NORMAL.cdf(bias + shifted / max(1 - acceleration * shifted, 1e-9)))
    low, high = np.quantile(means, tails)
    return float(low), float(high)


def _resampled_means(x: Values, resamples: int, rng: np.random.Generator) -> Values:
    """Return `resamples` means of n values drawn with replacement, in blocks."""
    means = np.empty(resamples)
    rows = max(1, _BLOCK // len(x))
    for start in range(0, resamples, rows):
        stop = min(start + rows, resamples)
        drawn = rng.integers(0, len(x), (stop - start, len(x)), dtype=np.int32)
        means[start:stop] = x[drawn].mean(axis=1)
    return means


def _randomisation_p(x: Values, resamples: int, rng: np.random.Generator) -> float:
    """Return the two-sided p-value of the sum of `x`, none of them 0, under random signs."""
    if len(x) == 0:
        return 1.0
    reached = abs(float(x.sum())) - 1e-9 * float(abs(x).sum())
    exact = 2 ** len(x) <= resamples if len(x) < 63 else False
    patterns = 2 ** len(x) if exact else resamples
    as_large, rows = 0, max(1, _BLOCK // len(x))
    for start in range(0, patterns, rows):
        stop = min(start + rows, patterns)
        if exact:
            signs = np.arange(start, stop)[:, None] >> np.arange(len(x)) & 1
        else:
            signs = rng.integers(0, 2, (stop - start, len(x)), dtype=np.int8)
        sums = 2 * (signs @ x) - x.sum()
        as_large += int((abs(sums) >= reached).sum())
    return as_large / patterns if exact else (as_large + 1) / (patterns + 1)


def _tango_lower(wins: Values, losses: Values, n: int, z: float) -> Values:
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
