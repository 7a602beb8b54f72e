"""The frontier as a picture: right is less forgetting, up is better answers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from postgrad.evaluate.frontier import Frontier, FrontierPoint
from postgrad.evaluate.gates import BASE, TUNED
from postgrad.report.charts import Scale, chart, text, ticks
from postgrad.report.markup import Html, tag
from postgrad.report.words import MINUS, interval, level, metric_name, percent, points

STYLES = ("held-out", "train", "other")
"""CSS classes of the series, in turn; with one run the second is that of its checkpoints."""
_CHARACTER, _LINE = 6.9, 14
"""Pixels that a character and a line of a label take."""


@dataclass(frozen=True, slots=True)
class _Box:
    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: "_Box") -> bool:
        """Whether the two share a pixel."""
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )


def frontier_chart(frontiers: Sequence[tuple[str, Frontier]], *, width: int, name: str) -> Html:
    """Return the points of one run's dial, or of several runs', with both intervals of each.

    Lambda points are joined from the base to the tuned model and beyond, checkpoints by a thin line
    in the order of their steps; the chosen point has a ring, the margin is a line.
    """
    height = 400 if width > 500 else 360
    every = [point for _, frontier in frontiers for point in frontier.points]
    margins = sorted({frontier.margin for _, frontier in frontiers})
    x_ends = [100 * end for p in every for end in (p.retention_low, p.retention_high)]
    y_ends = [100 * end for p in every for end in (p.target_low, p.target_high)]
    low, high = min(0.0, *x_ends, *(-m for m in margins)), max(0.0, *x_ends)
    x_ticks = ticks(low, high, 9 if width > 500 else 6)
    y_ticks = ticks(min(y_ends), max(y_ends), 7)
    x = Scale(x_ticks[0], x_ticks[-1], 44, width - 14)
    y = Scale(y_ticks[0], y_ticks[-1], height - 46, 26)
    parts = [*_axes(x_ticks, y_ticks, x, y, width, height)]
    metric = metric_name(frontiers[0][1].metric)
    parts.append(text(f"{metric} on validation rows", 0, 12, "tick", "start"))
    for margin in margins:
        parts += _margin(margin, x, y)
    for number, (_, frontier) in enumerate(frontiers):
        parts += _series(frontier, number, len(frontiers) > 1, x, y)
    parts += _labels(frontiers, x, y, width)
    facts = "; ".join(
        f"{run}{': ' if run else ''}{_label(p)}: {percent(p.target)}, {points(p.retention)} points"
        + (", chosen" if p.place.name == frontier.chosen else "")
        for run, frontier in frontiers
        for p in frontier.points
    )
    within = level(frontiers[0][1].confidence)
    title = "Answers against forgetting"
    return chart(name, width, height, title, f"Points with {within} intervals. {facts}", parts)


def _axes(
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    x: Scale,
    y: Scale,
    width: int,
    height: int,
) -> Iterator[Html]:
    for value in y_ticks:
        at = y(value)
        yield tag("line", class_="grid", x1=x.start, x2=x.end, y1=at, y2=at)
        yield text(f"{value:g}%", x.start - 7, at + 4, "tick", "end")
    for value in x_ticks:
        at = x(value)
        style = "grid zero" if value == 0 else "grid"
        yield tag("line", class_=style, x1=at, x2=at, y1=y.start, y2=y.end)
        signed = f"{value:+g}".replace("-", MINUS) if value else "0"
        anchor = "end" if at > width - 24 else "middle"
        yield text(signed, at, y.start + 18, "tick", anchor)
    yield text(
        "change of the benchmarks against the base, points", x.end, height - 6, "tick", "end"
    )


def _margin(margin: float, x: Scale, y: Scale) -> Iterator[Html]:
    at = x(-margin)
    yield tag("line", class_="reference", x1=at, x2=at, y1=y.start, y2=y.end)
    yield text(_margin_name(margin), at - 6, y.end + 12, "reference", "end")


def _margin_name(margin: float) -> str:
    return f"margin {MINUS}{margin:g}"


def _series(frontier: Frontier, number: int, several: bool, x: Scale, y: Scale) -> Iterator[Html]:
    """Yield the lines, whiskers, dots and the ring of one run."""
    style = STYLES[number % len(STYLES)]
    other = style if several else STYLES[1]
    for found, colour in zip(_paths(frontier, x, y), (style, f"{other} thin"), strict=False):
        path = " ".join(f"{at},{up}" for at, up in found)
        yield tag("polyline", class_=f"line {colour}", points=path)
    for point in frontier.points:
        yield _whiskers(point, x, y)
    for point in frontier.points:
        dot = other if point.place.step is not None else style
        at, up = x(100 * point.retention), y(100 * point.target)
        tip = tag("title", _tip(point))
        if point.place.name == frontier.chosen:
            yield tag("circle", class_="ring", cx=at, cy=up, r=9)
        yield tag("circle", tip, class_=f"dot {dot}", cx=at, cy=up, r=4.5)


def _paths(frontier: Frontier, x: Scale, y: Scale) -> list[list[tuple[float, float]]]:
    """Return the pixels of the lambda points, and those of the checkpoints, if there are any."""
    steps = [point for point in frontier.points if point.place.step is not None]
    scales = [point for point in frontier.points if point.place.step is None]
    lines = [scales, [*steps, frontier.point(TUNED)]] if steps else [scales]
    return [[(x(100 * p.retention), y(100 * p.target)) for p in line] for line in lines]


def _whiskers(point: FrontierPoint, x: Scale, y: Scale) -> Html:
    at, up = x(100 * point.retention), y(100 * point.target)
    left, right = x(100 * point.retention_low), x(100 * point.retention_high)
    bottom, top = y(100 * point.target_low), y(100 * point.target_high)
    lines = f"M{left},{up}H{right}M{at},{bottom}V{top}"
    return tag("path", class_="whisker soft", d=lines)


def _tip(point: FrontierPoint) -> str:
    return (
        f"{point.place.label}: {percent(point.target)} "
        f"({interval(point.target_low, point.target_high)}), retention {points(point.retention)} "
        f"({points(point.retention_low)} to {points(point.retention_high)})"
    )


def _label(point: FrontierPoint) -> str:
    place = point.place
    if place.step is not None:
        return f"step {place.step}"
    named = f"{place.name} " if place.name in (BASE, TUNED) else ""
    return f"{named}\N{GREEK SMALL LETTER LAMDA} {place.scale:g}"


def _labels(
    frontiers: Sequence[tuple[str, Frontier]], x: Scale, y: Scale, width: int
) -> Iterator[Html]:
    """Yield a label beside every dot where it covers no dot, no other label, no margin's name."""
    marked = [(p, p.place.name == f.chosen) for _, f in frontiers for p in f.points]
    spots = [(x(100 * p.retention), y(100 * p.target)) for p, _ in marked]
    taken = [_Box(at - 8, up - 8, at + 8, up + 8) for at, up in spots]
    for margin in {f.margin for _, f in frontiers}:
        name = _margin_name(margin)
        taken.append(_box(x(-margin) - 6, y.end + 12, "end", len(name) * 1.2 * _CHARACTER))
    crossed = [box for _, f in frontiers for line in _paths(f, x, y) for box in _along(line)]
    for (point, is_chosen), (at, up) in zip(marked, spots, strict=True):
        label = _label(point)
        best: tuple[int, _Box, float, float, str] | None = None
        for across, down, anchor in (
            *((11, -9, "start"), (-11, -9, "end"), (11, 19, "start"), (-11, 19, "end")),
            *((0, -15, "middle"), (0, 26, "middle"), (14, 5, "start"), (-14, 5, "end")),
            *((0, -31, "middle"), (0, 42, "middle")),
        ):
            box = _box(at + across, up + down, anchor, len(label) * _CHARACTER)
            hits = 4 * sum(box.overlaps(other) for other in taken)
            hits += any(box.overlaps(other) for other in crossed)
            hits += 20 * (box.left < x.start or box.right > width or box.top < y.end - 12)
            hits += 20 * (box.bottom > y.start)
            if best is None or hits < best[0]:
                best = hits, box, at + across, up + down, anchor
        assert best is not None
        taken.append(best[1])
        style = "note kept" if is_chosen else "note"
        yield text(label, round(best[2], 1), round(best[3], 1), style, best[4])


def _box(at: float, baseline: float, anchor: str, width: float) -> _Box:
    left = at - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
    return _Box(left, baseline - _LINE + 3, left + width, baseline + 3)


def _along(line: Sequence[tuple[float, float]]) -> Iterator[_Box]:
    """Yield small boxes along a line of pixels."""
    for (left, top), (right, bottom) in pairwise(line):
        count = 1 + int(max(abs(right - left), abs(bottom - top)) / 4)
        for n in range(count + 1):
            at, up = left + (right - left) * n / count, top + (bottom - top) * n / count
            yield _Box(at - 2, up - 2, at + 2, up + 2)
