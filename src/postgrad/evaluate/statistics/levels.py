"""Two sources of chance, kept apart: which seed trained the model, and which rows tested it."""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from postgrad.evaluate.statistics.intervals import (
    RESAMPLES,
    Interval,
    bootstrap_mean,
    student_critical,
    student_within,
)


class TwoLevels(NamedTuple):
    """The mean over seeds and rows, with the spread from each of them and from both."""

    mean: float
    seed_deviation: float
    """Standard deviation of the seeds' means: how far one more training may land."""
    row_error: float
    """Standard error from the choice of rows, seeds taken as they are."""
    error: float
    """Standard error of the mean from both."""
    over_seeds: Interval
    """Of new seeds on these very rows: Student's t over the seeds' means."""
    over_rows: Interval
    """Of new rows for these very models."""
    over_both: Interval
    """Of new seeds on new rows: what may be said about the recipe."""
    p: float
    """Two-sided, of a mean of zero, for new seeds and new rows."""


def two_levels(
    scores: npt.ArrayLike,
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = RESAMPLES,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> TwoLevels:
    """Return the mean of `scores` [seeds, rows] (every seed on the same rows) and its intervals.

    Crossed random effects: score = mean + seed + row + rest. With the mean squares S between seeds,
    R between rows and E of the rest, the variance of the mean over K seeds and N rows is
    (S + R - E) / (K N); it is taken as at least S / (K N) and R / (K N). Degrees of freedom by
    Satterthwaite, rounded down. `over_both` is never narrower than `over_rows`, so that few or
    equal scores do not claim certainty.

    Source: Searle, Casella & McCulloch 1992, Variance Components, ch. 4; Brennan 2001,
    Generalizability Theory, ch. 6; Satterthwaite 1946, Biometrics Bull. 2:110.
    """
    x = np.asarray(scores, dtype=np.float64)
    assert x.ndim == 2, x.shape
    seeds, rows = x.shape
    assert seeds >= 2, "one seed has no spread"
    mean, seed_means, row_means = float(x.mean()), x.mean(axis=1), x.mean(axis=0)
    deviation = float(seed_means.std(ddof=1))
    over_rows = bootstrap_mean(row_means, confidence, seed, resamples, bounds)
    squares = (
        rows * deviation**2,
        seeds * float(row_means.var(ddof=1)) if rows > 1 else 0.0,
        float(((x - seed_means[:, None] - row_means + mean) ** 2).sum())
        / max(1, (seeds - 1) * (rows - 1)),
    )
    variance, degrees = _satterthwaite(squares, seeds, rows)
    error = math.sqrt(variance)
    low, high = _around(mean, student_critical(confidence, degrees) * error, bounds)
    return TwoLevels(
        mean=mean,
        seed_deviation=deviation,
        row_error=math.sqrt(squares[1] / (seeds * rows)),
        error=error,
        over_seeds=_around(
            mean, student_critical(confidence, seeds - 1) * deviation / math.sqrt(seeds), bounds
        ),
        over_rows=over_rows,
        over_both=Interval(min(low, over_rows.low), max(high, over_rows.high)),
        p=1 - student_within(mean / error, degrees) if error else float(mean == 0),
    )


def _satterthwaite(squares: tuple[float, float, float], seeds: int, rows: int) -> tuple[float, int]:
    """Return the variance of the mean and its degrees of freedom."""
    between_seeds, between_rows, rest = squares
    total = max(between_seeds + between_rows - rest, between_seeds, between_rows)
    freedom = (seeds - 1, max(1, rows - 1), max(1, (seeds - 1) * (rows - 1)))
    spread = sum(square**2 / degrees for square, degrees in zip(squares, freedom, strict=True))
    degrees = int(total**2 / spread) if spread else min(freedom)
    return total / (seeds * rows), max(1, degrees)


def _around(mean: float, half: float, bounds: tuple[float, float]) -> Interval:
    return Interval(max(bounds[0], mean - half), min(bounds[1], mean + half))
