"""How often the verdicts and intervals are wrong, by simulation on known populations.

    python benchmarks/error_rates.py [--quick] [--out FILE]

Draws many data sets from populations whose truth is known, has postgrad's own statistics judge them
at 95 %, and counts: how often `improved` or `worse` is said of two arms that do not differ (at most
5 % allowed), how often the interval holds the truth (93 to 97 % wanted), how often a margin gate
passes when exactly the margin was lost (at most 5 % allowed). Needs numpy alone; one thread.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from postgrad.evaluate.statistics import (
    RESAMPLES,
    clustered_interval,
    clustered_p,
    critical_value,
    mcnemar_exact,
    one_sided,
    two_levels,
    wilson,
)
from postgrad.evaluate.statistics.intervals import Interval, widened_bootstrap
from postgrad.evaluate.statistics.paired import tango_lower

CONFIDENCE = 0.95
Z = critical_value(CONFIDENCE)
SIZES = (50, 100, 300, 1000, 5000)
BAND = (0.93, 0.97)
BOOTSTRAP_RESAMPLES = 2000
"""Fewer than the product's 10,000, for time; the tests of no difference use all."""
SEED_RESAMPLES = 500
"""For the study of seeds, where rows are resampled anew for every data set."""
Cell = dict[str, Any]


# --- 0/1 scores ---------------------------------------------------------------------------------


def share_cells() -> Iterator[Cell]:
    """One arm, 0/1 scores: the exact coverage of the Wilson interval, by summing the binomial."""
    for n in SIZES:
        k = np.arange(n + 1)
        logs = np.array([math.lgamma(i + 1) for i in range(n + 1)])
        choose = logs[n] - logs - logs[::-1]
        ends = np.array([wilson(int(i), n, CONFIDENCE) for i in k])
        for rate in (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99):
            probability = np.exp(choose + k * math.log(rate) + (n - k) * math.log1p(-rate))
            covered = float(probability[(ends[:, 0] <= rate) & (rate <= ends[:, 1])].sum())
            yield {
                "study": "share",
                "n": n,
                "population": f"rate {rate}",
                "expected": round(n * min(rate, 1 - rate), 1),
                "coverage": covered,
            }


def paired_share_cells(draws: int) -> Iterator[Cell]:
    """Two arms, 0/1 scores: Tango's interval, the exact McNemar test, the margin gate."""
    rng = np.random.default_rng(1)
    for n in SIZES:
        for discordance in (0.02, 0.05, 0.1, 0.2, 0.4):
            for part in (0.0, 0.25, 0.5, 0.9):
                true = part * discordance
                wins, losses = _discordant(rng, n, discordance, true, draws)
                low, high = _tango(wins, losses, n, Z)
                p = _mcnemar(wins, losses)
                says = (p < 1 - CONFIDENCE) & ((low > 0) | (high < 0))
                # The mirror image: exactly `true` was lost, and that is the margin.
                bound = tango_lower(losses, wins, n, critical_value(one_sided(CONFIDENCE)))
                yield {
                    "study": "paired share",
                    "n": n,
                    "population": f"discordance {discordance}, difference {true:.4g}",
                    "expected": round(n * discordance, 1),
                    "coverage": float(((low <= true) & (true <= high)).mean()),
                    "false_verdicts": float(says.mean()) if part == 0 else None,
                    "false_pass": float((bound > -true).mean()) if part else None,
                }


def _discordant(
    rng: np.random.Generator, n: int, discordance: float, difference: float, draws: int
) -> tuple[np.ndarray, np.ndarray]:
    win, loss = (discordance + difference) / 2, (discordance - difference) / 2
    counts = rng.multinomial(n, [win, loss, 1 - win - loss], draws).astype(float)
    return counts[:, 0], counts[:, 1]


def _tango(wins: np.ndarray, losses: np.ndarray, n: int, z: float) -> tuple[np.ndarray, np.ndarray]:
    return tango_lower(wins, losses, n, z), -tango_lower(losses, wins, n, z)


def _mcnemar(wins: np.ndarray, losses: np.ndarray) -> np.ndarray:
    pairs, index = np.unique(np.stack([wins, losses], 1), axis=0, return_inverse=True)
    return np.array([mcnemar_exact(int(a), int(b)) for a, b in pairs])[index.ravel()]


# --- graded scores ------------------------------------------------------------------------------


def f1_like(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Scores of a good model under F1: 92 % ones, the rest partly right; mean 0.96."""
    return np.where(rng.random(shape) < 0.92, 1.0, rng.beta(2, 2, shape))


def mostly_zero(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Scores of a poor model: 85 % zeros; mean 0.075."""
    return np.where(rng.random(shape) < 0.85, 0.0, rng.beta(2, 2, shape))


def even(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Scores spread evenly; mean 0.5."""
    return rng.random(shape)


def two_humps(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Scores near 0 or near 1; mean 0.5."""
    return rng.beta(0.3, 0.3, shape)


def same_skew(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Differences of two good models that share nothing; mean 0."""
    return f1_like(rng, shape) - f1_like(rng, shape)


def sparse(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Differences that are 0 on 95 % of the rows; mean 0."""
    return np.where(rng.random(shape) < 0.95, 0.0, 2 * rng.random(shape) - 1)


def lopsided(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Many small losses, few large gains; mean 0, not symmetric: the hardest null."""
    return np.where(rng.random(shape) < 0.9, -0.08, 0.72) * rng.random(shape) * 2


def shifted(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Half of the rows gain evenly; mean 0.1."""
    return np.where(rng.random(shape) < 0.5, 0.0, 0.4 * rng.random(shape))


MEANS = {f1_like: 0.96, mostly_zero: 0.075, even: 0.5, two_humps: 0.5}
DIFFERENCES = {same_skew: 0.0, sparse: 0.0, lopsided: 0.0, shifted: 0.1}


def graded_cells(sets: int) -> Iterator[Cell]:
    """Graded scores: the widened bootstrap; of differences also the randomisation test."""
    rng = np.random.default_rng(2)
    for n in SIZES:
        counts = _resample_counts(n)
        signs = rng.integers(0, 2, (RESAMPLES, n), dtype=np.int8).astype(np.float32) * 2 - 1
        for draw, mean in {**MEANS, **DIFFERENCES}.items():
            paired = draw in DIFFERENCES
            x = draw(rng, (n, sets))
            bounds = (-1.0, 1.0) if paired else (0.0, 1.0)
            ends = np.array(_graded_intervals(x, counts, bounds))
            covered = (ends[:, 0] <= mean + 1e-12) & (mean <= ends[:, 1] + 1e-12)
            cell: Cell = {
                "study": "paired graded" if paired else "graded",
                "n": n,
                "population": draw.__name__,
                "coverage": float(covered.mean()),
            }
            if paired and mean == 0:
                reached = abs(x.sum(axis=0)) - 1e-9
                sums = signs @ x.astype(np.float32)
                p = ((abs(sums) >= reached - 1e-4).sum(axis=0) + 1) / (RESAMPLES + 1)
                excluded = (ends[:, 0] > 0) | (ends[:, 1] < 0)
                cell["false_verdicts"] = float(((p < 1 - CONFIDENCE) & excluded).mean())
            yield cell


def _resample_counts(n: int) -> np.ndarray:
    """Return how often each row is drawn in each resample [resamples, n], as often as any other."""
    rng = np.random.default_rng(0)
    counts = np.empty((BOOTSTRAP_RESAMPLES, n))
    for index in range(BOOTSTRAP_RESAMPLES):
        counts[index] = np.bincount(rng.integers(0, n, n, dtype=np.int32), minlength=n)
    return counts


def _graded_intervals(
    x: np.ndarray, counts: np.ndarray, bounds: tuple[float, float]
) -> list[Interval]:
    """Return the interval of every data set (column), by the product's own rule."""
    means = counts @ x / len(x)  # in double precision: the bias counts ties
    return [
        widened_bootstrap(column, resampled, Z, bounds)
        if np.ptp(column) > 1e-9
        else Interval(*_flat(column, bounds))
        for column, resampled in zip(x.T, means.T, strict=True)
    ]


def _flat(x: np.ndarray, bounds: tuple[float, float]) -> tuple[float, float]:
    unseen = wilson(0, len(x), CONFIDENCE).high
    return x[0] - (x[0] - bounds[0]) * unseen, x[0] + (bounds[1] - x[0]) * unseen


# --- clusters -----------------------------------------------------------------------------------

CLUSTERINGS = ((10, 5), (10, 30), (25, 12), (57, 50), (100, 10), (1000, 5))
"""Clusters and mean rows in each; sizes are uneven, from a third of the mean to five thirds."""


def clustered_cells(sets: int) -> Iterator[Cell]:
    """0/1 scores in clusters: the clustered interval, and the test that flips whole clusters."""
    rng = np.random.default_rng(3)
    for clusters, size in CLUSTERINGS:
        sizes = rng.integers(max(1, size // 3), 2 * size - max(1, size // 3) + 1, clusters)
        names = np.repeat(np.arange(clusters), sizes)
        n = len(names)
        for strength, spread in (("none", 0.0), ("moderate", 0.1), ("strong", 0.25)):
            shared = {"n": n, "clusters": clusters, "population": f"cluster effect {strength}"}
            rates = _clustered(rng, 0.7, spread, clusters, sets)[names]
            x = (rng.random((n, sets)) < rates).astype(float)
            rows = [wilson(int(k), n, CONFIDENCE) for k in x.sum(axis=0)]
            covered = [
                low <= 0.7 <= high
                for low, high in (
                    clustered_interval(column, names, CONFIDENCE, row)
                    for column, row in zip(x.T, rows, strict=True)
                )
            ]
            yield {"study": "clustered share", **shared, "coverage": float(np.mean(covered))}
            yield {"study": "clustered paired", **shared} | _clustered_pairs(
                rng, names, spread, sets
            )


def _clustered_pairs(rng: np.random.Generator, names: np.ndarray, spread: float, sets: int) -> Cell:
    """Differences of 0/1 scores, 15 % discordant, whose balance varies by cluster; mean 0."""
    n, clusters = len(names), int(names.max()) + 1
    wins = _clustered(rng, 0.5, 2 * spread if spread else 0.0, clusters, sets)[names]
    discordant = rng.random((n, sets)) < 0.15
    x = np.where(discordant, np.where(rng.random((n, sets)) < wins, 1.0, -1.0), 0.0)
    low, high = _tango((x > 0).sum(axis=0) * 1.0, (x < 0).sum(axis=0) * 1.0, n, Z)
    covered, said = 0, 0
    for column, *row in zip(x.T, low, high, strict=True):
        ends = clustered_interval(column, names, CONFIDENCE, Interval(*row), (-1.0, 1.0))
        covered += ends.low <= 0 <= ends.high
        if not ends.low <= 0 <= ends.high:
            said += clustered_p(column, names) < 1 - CONFIDENCE
    return {"coverage": int(covered) / sets, "false_verdicts": int(said) / sets}


def _clustered(
    rng: np.random.Generator, mean: float, spread: float, clusters: int, sets: int
) -> np.ndarray:
    """Return rates [clusters, sets] from the beta distribution of this mean and deviation."""
    if not spread:
        return np.full((clusters, sets), mean)
    size = mean * (1 - mean) / spread**2 - 1
    if size <= 0:  # more spread than rates can have: all or nothing
        return (rng.random((clusters, sets)) < mean).astype(float)
    return rng.beta(mean * size, (1 - mean) * size, (clusters, sets))


# --- seeds --------------------------------------------------------------------------------------


def seed_cells(sets: int) -> Iterator[Cell]:
    """Three seeds on the same rows, 0/1 scores: the interval for new seeds on new rows."""
    rng = np.random.default_rng(4)
    for n in (50, 300, 1000):
        for strength, spread in (("none", 0.0), ("2 points", 0.02), ("5 points", 0.05)):
            covered, false, seeds_alone, rows_alone = 0, 0, 0, 0
            for _ in range(sets):
                ability = rng.beta(1.4, 0.6, n) * 0.8 + 0.1
                effect = rng.normal(0, spread, (3, 1))
                x = (rng.random((3, n)) < ability + effect * 0.999).astype(float)
                found = two_levels(x, CONFIDENCE, 0, SEED_RESAMPLES)
                covered += found.over_both.low <= 0.66 <= found.over_both.high
                seeds_alone += found.over_seeds.low <= 0.66 <= found.over_seeds.high
                rows_alone += found.over_rows.low <= 0.66 <= found.over_rows.high
                other = (rng.random((3, n)) < ability + rng.normal(0, spread, (3, 1))).astype(float)
                gap = two_levels(x - other, CONFIDENCE, 0, SEED_RESAMPLES, (-1.0, 1.0))
                excluded = not gap.over_both.low <= 0 <= gap.over_both.high
                false += gap.p < 1 - CONFIDENCE and excluded
            yield {
                "study": "three seeds",
                "n": n,
                "population": f"seed deviation {strength}",
                "coverage": covered / sets,
                "coverage_of_seeds_alone": seeds_alone / sets,
                "coverage_of_rows_alone": rows_alone / sets,
                "false_verdicts": false / sets,
            }


# --- the table ----------------------------------------------------------------------------------


def summary(cells: list[Cell]) -> str:
    """Return one line per study and n: the worst false verdict, coverage from and to."""
    lines = [f"{'study':<18}{'n':>7}{'false verdicts':>16}{'false pass':>12}{'coverage':>18}"]
    keys = list(dict.fromkeys((cell["study"], cell["n"]) for cell in cells))
    for study, n in keys:
        here = [cell for cell in cells if (cell["study"], cell["n"]) == (study, n)]
        covered = [cell["coverage"] for cell in here]
        lines.append(
            f"{study:<18}{n:>7,}{_worst(here, 'false_verdicts'):>16}"
            f"{_worst(here, 'false_pass'):>12}{f'{min(covered):.1%} to {max(covered):.1%}':>18}"
        )
    outside = [cell for cell in cells if not BAND[0] <= cell["coverage"] <= BAND[1]]
    narrow = [cell for cell in outside if cell["coverage"] < BAND[0]]
    lines.append(
        f"\n{len(cells)} populations; coverage below 93 %: {len(narrow)}, "
        f"above 97 %: {len(outside) - len(narrow)}"
    )
    for cell in narrow:
        lines.append(
            f"  below: {cell['study']}, n = {cell['n']:,}, {cell['population']}: "
            f"{cell['coverage']:.1%}"
        )
    return "\n".join(lines)


def _worst(cells: list[Cell], key: str) -> str:
    found = [cell[key] for cell in cells if cell.get(key) is not None]
    return f"{max(found):.1%}" if found else ""


def main() -> None:
    """Run every study, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="few draws: the figures mean nothing")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    options = parser.parse_args()
    began = time.perf_counter()
    draws, sets = (400, 20) if options.quick else (20_000, 2000)
    cells = [*share_cells(), *paired_share_cells(draws), *graded_cells(sets)]
    cells += [*clustered_cells(sets), *seed_cells(sets)]
    document = {
        "date": date.today().isoformat(),
        "confidence": CONFIDENCE,
        "draws": {
            "share": "exact",
            "paired share": draws,
            "graded": sets,
            "clustered": sets,
            "three seeds": sets,
        },
        "seconds": round(time.perf_counter() - began, 1),
        "cells": cells,
    }
    here = Path(__file__).resolve().parent / "results"
    path = options.out or here / f"{document['date']}-error-rates.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(summary(cells))
    print(f"\n{document['seconds']:.0f} seconds; written to {path}")


if __name__ == "__main__":
    main()
