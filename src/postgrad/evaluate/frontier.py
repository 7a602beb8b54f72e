"""The frontier of a dial: what each point keeps of the gain, and what it spares of the forgetting.

From evidence alone. Every point has answered the same validation rows and the same benchmark items,
none of which are reported elsewhere, so that a point can be chosen here and judged on the others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from postgrad.evaluate import statistics
from postgrad.evaluate.compare import compare, measure, require_pairs, row_groups, row_scores
from postgrad.evaluate.gates import BASE, TUNED
from postgrad.types import Comparison, Evidence

FOLDER = "dial/"
"""Where below evidence/ the answers are kept."""
ENOUGH = 0.95
"""Share of the gain that a point must keep to be named as the better bargain."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a point stands between the base and a tuned model."""

    name: str
    """Of its evidence: base, tuned, lambda-0.5, step-000040."""
    scale: float
    """Lambda: 0 is the base, 1 the tuned weights."""
    step: int | None = None
    """Of a checkpoint; None = the best one, which is the tuned model."""

    @property
    def label(self) -> str:
        """Return the place in words."""
        if self.name in (BASE, TUNED):
            return f"\N{GREEK SMALL LETTER LAMDA} = {self.scale:g} ({self.name})"
        if self.step is not None:
            return f"step {self.step}"
        return f"\N{GREEK SMALL LETTER LAMDA} = {self.scale:g}"


@dataclass(frozen=True, slots=True)
class Change:
    """One benchmark at one point, minus the base model, paired by item."""

    task: str
    metric: str
    difference: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, slots=True)
class FrontierPoint:
    """One point: its answers, and what it lost of other abilities. Shares, not points."""

    place: Place
    target: float
    """Mean score on the validation rows."""
    target_low: float
    target_high: float
    retention: float
    """Mean over the benchmarks of the change against the base model; below zero is a loss."""
    retention_low: float
    retention_high: float
    within_margin: bool
    changes: tuple[Change, ...]
    """The same for each benchmark."""
    kept: float | None = None
    """Share of the tuned model's gain; None for the ends, and where no gain is shown."""
    kept_low: float | None = None
    kept_high: float | None = None
    spared: float | None = None
    """Retention minus that of the tuned model; above zero is less forgetting. None for the ends."""
    spared_low: float | None = None
    spared_high: float | None = None
    p: float | None = None
    """Of no difference in forgetting to the tuned model."""
    corrected: float | None = None
    """p after Holm's correction over the points."""


@dataclass(frozen=True, slots=True)
class Frontier:
    """The `dial` entry of measurements.json."""

    metric: str
    confidence: float
    margin: float
    """Points of mean retention that may be lost."""
    n: int
    """Validation rows."""
    items: Mapping[str, int]
    """Benchmark -> items."""
    left_out: tuple[str, ...]
    """Benchmarks without enough items of their own for this, and why."""
    gain: Comparison
    """The tuned model against the base on the validation rows."""
    points: tuple[FrontierPoint, ...]
    """By lambda from the base on; checkpoints, by step, last."""
    chosen: str
    """Name of the point with the best answers within the margin."""
    findings: tuple[str, ...]
    """In words: points that keep almost all of the gain and forget less, or that there is none."""
    choice: str
    """In words: what was chosen and why."""
    exported: str | None = None
    """Path inside the run directory; None = there was nothing to dial back."""

    def point(self, name: str) -> FrontierPoint:
        """Return the point of that name."""
        return next(point for point in self.points if point.place.name == name)


Answers = Mapping[str, Sequence[Evidence]]
"""Name of a point -> its evidence."""


def measure_frontier(
    places: Sequence[Place],
    target: Answers,
    retention: Mapping[tuple[str, str], Answers],
    *,
    metric: str,
    margin: float,
    left_out: Sequence[str] = (),
    confidence: float = 0.95,
    seed: int = 7,
) -> Frontier:
    """Return the frontier and what is chosen on it.

    Args:
        places: the points, base and tuned among them.
        target: answers to the validation rows.
        retention: (benchmark, metric) -> answers to its items, as rows whose mean is the metric.
        metric: scorer of the target.
        margin: points of mean retention that may be lost.
        left_out: benchmarks that could not be asked, and why.
        confidence: of every interval and test.
        seed: of every random draw.

    Raises:
        DataError: points that did not answer the same rows or items.
    """
    gain = compare(target[BASE], target[TUNED], "validation", metric, BASE, TUNED, confidence, seed)
    points = [
        _point(place, target, retention, metric, margin / 100, confidence, seed) for place in places
    ]
    between = [n for n, place in enumerate(places) if place.name not in (BASE, TUNED)]
    for n in between:
        points[n] = _against_tuned(points[n], target, retention, metric, gain, confidence, seed)
    corrected = statistics.holm([points[n].p or 0.0 for n in between])
    for n, p in zip(between, corrected, strict=True):
        points[n] = replace(points[n], corrected=p)
    best = choose(points)
    return Frontier(
        metric=metric,
        confidence=confidence,
        margin=margin,
        n=len(target[BASE]),
        items={task: len(rows[BASE]) for (task, _), rows in retention.items()},
        left_out=tuple(left_out),
        gain=gain,
        points=tuple(points),
        chosen=best.place.name,
        findings=tuple(_findings(points, gain, confidence)),
        choice=_choice(best, margin, len(target[BASE])),
    )


def choose(points: Sequence[FrontierPoint]) -> FrontierPoint:
    """Return the point with the best answers within the margin; of equals the smallest lambda.

    The base model loses nothing, so there always is one. Checkpoints have lambda 1; of equal ones
    the tuned model comes first, then the earlier step.
    """
    allowed = [point for point in points if point.within_margin]
    return min(allowed, key=lambda p: (-p.target, p.place.scale, p.place.step or 0))


def _point(
    place: Place,
    target: Answers,
    retention: Mapping[tuple[str, str], Answers],
    metric: str,
    margin: float,
    confidence: float,
    seed: int,
) -> FrontierPoint:
    """Return a point with its target and its retention against the base model."""
    rows = target[place.name]
    require_pairs(target[BASE], rows, BASE, place.name)
    measured = measure(rows, "validation", metric, place.name, confidence, seed)
    lost = statistics.PairedResult(0.0, 0.0, 0.0, 1.0)
    changes: list[Change] = []
    if place.name != BASE:
        lost = _suite(retention, BASE, place.name, confidence, seed)
        for (task, name), answers in retention.items():
            pair = (answers[BASE], answers[place.name])
            c = compare(*pair, task, name, BASE, place.name, confidence, seed)
            changes.append(Change(task, name, c.difference, c.low, c.high, c.n))
    return FrontierPoint(
        place=place,
        target=measured.value,
        target_low=measured.low,
        target_high=measured.high,
        retention=lost.difference,
        retention_low=lost.low,
        retention_high=lost.high,
        within_margin=lost.difference >= -margin - 1e-12,
        changes=tuple(changes),
    )


def _against_tuned(
    point: FrontierPoint,
    target: Answers,
    retention: Mapping[tuple[str, str], Answers],
    metric: str,
    gain: Comparison,
    confidence: float,
    seed: int,
) -> FrontierPoint:
    """Return the point with its share of the gain and with what it spares."""
    name = point.place.name
    spared = _suite(retention, TUNED, name, confidence, seed)
    point = replace(
        point,
        spared=spared.difference,
        spared_low=spared.low,
        spared_high=spared.high,
        p=spared.p,
    )
    if gain.difference <= 0 or gain.low <= 0 or gain.p >= 1 - confidence:
        return point
    beside = compare(target[TUNED], target[name], "validation", metric, TUNED, name, confidence)
    order = target[BASE]
    kept, (low, high) = statistics.kept_share(
        _scores(order, order, metric, BASE),
        _scores(target[TUNED], order, metric, TUNED),
        _scores(target[name], order, metric, name),
        row_groups(order),
        statistics.Interval(beside.low, beside.high),
        confidence,
        seed,
    )
    return replace(point, kept=kept, kept_low=low, kept_high=high)


def _suite(
    retention: Mapping[tuple[str, str], Answers], a: str, b: str, confidence: float, seed: int
) -> statistics.PairedResult:
    """Return the mean over the benchmarks of b - a, paired by item."""
    differences, groups = [], []
    for (_, metric), answers in retention.items():
        require_pairs(answers[a], answers[b], a, b)
        order = answers[a]
        x, y = (_scores(answers[arm], order, metric, arm) for arm in (a, b))
        differences.append(y - x)
        groups.append(row_groups(order))
    return statistics.stratified_mean(differences, groups, confidence, seed)


def _scores(
    rows: Sequence[Evidence], order: Sequence[Evidence], metric: str, arm: str
) -> statistics.Values:
    scores = row_scores(rows, metric, arm)
    return np.array([scores[row.example_id] for row in order])


def _findings(points: Sequence[FrontierPoint], gain: Comparison, confidence: float) -> list[str]:
    """Say which points keep almost all of the gain at less forgetting, or that none does."""
    tuned = next(point for point in points if point.place.name == TUNED)
    lost = (
        f"the tuned model changes the benchmarks by {_points(tuned.retention)} points in the mean "
        f"({_points(tuned.retention_low)} to {_points(tuned.retention_high)})"
    )
    if all(point.kept is None for point in points):
        said = (
            "no gain over the base model is shown on the validation rows "
            f"({_points(gain.difference)} points, {_points(gain.low)} to {_points(gain.high)}), so "
            "there is no share of it to keep"
        )
        return [said, lost]
    found = [
        _bargain(point)
        for point in points
        if point.kept is not None
        and point.kept >= ENOUGH
        and (point.corrected or 0.0) < 1 - confidence
        and (point.spared_low or 0.0) > 0
    ]
    none = (
        f"no point keeps at least {100 * ENOUGH:g} % of the gain at significantly less forgetting "
        "than the tuned model"
    )
    return [*(found or [none]), lost]


def _bargain(point: FrontierPoint) -> str:
    assert point.kept is not None
    assert point.kept_low is not None
    assert point.kept_high is not None
    assert point.spared is not None
    doubt = (
        "" if point.kept_low >= ENOUGH else "; the interval does not rule out that it keeps less"
    )
    return (
        f"{point.place.label} keeps {100 * point.kept:.0f} % ({100 * point.kept_low:.0f} to "
        f"{100 * point.kept_high:.0f}) of the gain at {100 * point.spared:.1f} points less "
        f"forgetting ({_p(point.corrected or 0.0)}){doubt}"
    )


def _choice(best: FrontierPoint, margin: float, n: int) -> str:
    allowed = f"at most {margin:g} point{'' if margin == 1 else 's'} of mean retention"
    if best.place.name == BASE:
        return f"no point that loses {allowed} answers better than the base model: none is exported"
    answers = f"{100 * best.target:.1f} % of {n:,} validation rows"
    if best.place.name == TUNED:
        return f"the tuned model itself loses {allowed} and answers best ({answers})"
    return (
        f"chosen: {best.place.label}, which answers best ({answers}) of the points that lose "
        f"{allowed} ({_points(best.retention)}, {_points(best.retention_low)} to "
        f"{_points(best.retention_high)})"
    )


def _points(share: float) -> str:
    text = f"{100 * share:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def _p(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def to_tree(frontier: Frontier) -> dict[str, Any]:
    """Return the frontier as plain JSON values."""
    return asdict(frontier)
