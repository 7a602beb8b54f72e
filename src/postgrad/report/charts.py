"""Charts as inline SVG: no library, no script. Colours are CSS classes, so they follow the theme.

Each chart takes its width in pixels and is drawn for that width; a page that must also be read on a
phone draws it twice and lets CSS choose (text in a scaled-down SVG would be too small).
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

from postgrad.report.collect import Lengths, Reference
from postgrad.report.curves import Curves, HeldOut, Point
from postgrad.report.markup import Html, join, tag
from postgrad.report.words import (
    arm_name,
    count,
    interval,
    level,
    number,
    percent,
    points,
    points_interval,
)
from postgrad.types import Comparison, Measurement

WIDE, NARROW = 860, 320
"""Pixels for which a page draws its charts: on a desk and on a phone."""
_MOST_POINTS = 300
"""Points of a line; longer series are averaged in equal pieces."""


@dataclass(frozen=True, slots=True)
class Line:
    """One series of a line chart."""

    points: Sequence[tuple[float, float]]
    style: str
    """CSS class."""
    dots: bool = False
    label: str = ""
    """Stands at its last point, in the colour of the line."""


@dataclass(frozen=True, slots=True)
class Level:
    """A horizontal line with its label."""

    value: float
    label: str
    style: str


@dataclass(frozen=True, slots=True)
class Mark:
    """A ringed point with its label."""

    x: float
    y: float
    label: str


@dataclass(frozen=True, slots=True)
class Span:
    """An interval of the value at a point."""

    x: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Axes:
    """What a line chart's axes stand for."""

    x: str = "optimizer step"
    start: float | None = None
    """Where the x axis begins; None = at the first point."""
    tick: Callable[[float], str] = lambda value: _tick(value)
    """How a value is said beside the y axis."""
    point: Callable[[float, float], str] = lambda x, y: f"step {count(x)}: {number(y)}"
    """How a point is said where it is pointed at."""


STEPS = Axes()


@dataclass(frozen=True, slots=True)
class Scale:
    """A linear map from data to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the pixel of a value; values outside end at the edge."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + min(1.0, max(0.0, share)) * (self.end - self.start), 1)


def ticks(low: float, high: float, most: int) -> list[float]:
    """Return at most `most` round values that span low..high; the outer ones include both.

    >>> ticks(0, 2.3, 6)
    [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    """
    size = max(abs(low), abs(high))
    if high - low <= max(1e-8 * size, 1e-300):
        half = size / 2 if size > 1e-300 else 0.5
        low, high = low - half, low + half
    step = 10.0 ** floor(log10((high - low) / most))
    for factor in (1, 2, 5, 10, 20, 50, 100):
        width = step * factor
        first, last = floor(low / width + 1e-9), ceil(high / width - 1e-9)
        if last - first + 1 <= most:
            break
    digits = max(0, -floor(log10(width)))
    return [round(i * width, digits) for i in range(first, last + 1)]


def bars(
    measurements: Sequence[Measurement],
    references: Sequence[Reference],
    *,
    confidence: float,
    width: int,
    name: str,
) -> Html:
    """Return before/after bars: one per arm, its interval as a whisker, references as lines."""
    labels_top = 18 * len(references) + (10 if references else 0)
    row, bar = 58, 20
    bottom = labels_top + row * len(measurements)
    scale = Scale(0, 1, 1, width - 1)
    parts = [_share_axis(scale, labels_top, bottom)]
    tops = [labels_top + row * i for i in range(len(measurements))]
    parts += [
        _bar(m, scale, top + 24, bar, width) for m, top in zip(measurements, tops, strict=True)
    ]
    parts += [_reference(r, scale, 13 + 18 * i, bottom) for i, r in enumerate(references)]
    parts += [_bar_label(m, top + 16, width) for m, top in zip(measurements, tops, strict=True)]
    facts = [f"{arm_name(m.arm)}: {percent(m.value)} ({_range(m)})" for m in measurements]
    facts += [f"{reference.name}: {percent(reference.value)}" for reference in references]
    description = f"Bars with {level(confidence)} intervals. " + "; ".join(facts)
    return chart(name, width, bottom + 22, "Before and after", description, parts)


def forest(comparisons: Sequence[Comparison], *, width: int, name: str) -> Html:
    """Return differences in points, one row each with its interval, around a line at zero."""
    row = 44
    bottom = row * len(comparisons)
    ends = [100 * x for c in comparisons for x in (c.low, c.high)]
    marks = ticks(min(0.0, *ends), max(0.0, *ends), 7 if width > 500 else 5)
    scale = Scale(marks[0], marks[-1], 14, width - 14)
    parts = []
    for value in marks:
        x = scale(value)
        style = "grid zero" if value == 0 else "grid"
        parts.append(tag("line", class_=style, x1=x, x2=x, y1=0, y2=bottom))
        parts.append(text(f"{value:+g}" if value else "0", x, bottom + 16, "tick", "middle"))
    for top, c in zip(range(0, bottom, row), comparisons, strict=True):
        x, low, high = (scale(100 * value) for value in (c.difference, c.low, c.high))
        y = top + 30
        whisker = f"M{low},{y}H{high}M{low},{y - 5}v10M{high},{y - 5}v10"
        tip = tag("title", f"{points(c.difference)} ({points_interval(c)}), n = {count(c.n)}")
        parts += [
            tag("path", class_="whisker", d=whisker),
            tag("circle", tip, class_="dot held-out", cx=x, cy=y, r=5),
            text(c.task, 0, top + 16, "label base", "start"),
            text(points(c.difference), width, top + 16, "label", "end"),
        ]
    facts = "; ".join(
        f"{c.task}: {points(c.difference)} ({points_interval(c)})" for c in comparisons
    )
    return chart(name, width, bottom + 22, "Change of general abilities in points", facts, parts)


def _range(m: Measurement) -> str:
    return f"{interval(m.low, m.high)}, n = {count(m.n)}"


def _share_axis(scale: Scale, top: float, bottom: float) -> Html:
    parts = []
    for value in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = scale(value)
        parts.append(tag("line", class_="grid", x1=x, x2=x, y1=top, y2=bottom))
        anchor = "start" if value == 0 else "end" if value == 1 else "middle"
        parts.append(text(f"{100 * value:.0f}%", x, bottom + 16, "tick", anchor))
    return join(parts)


def _bar(m: Measurement, scale: Scale, top: float, height: float, width: int) -> Html:
    style = "base" if m.arm.startswith("base") else "tuned"
    middle = top + height / 2
    low, high, end = scale(m.low), scale(m.high), scale(m.value)
    whisker = f"M{low},{middle}H{high}M{low},{middle - 5}v10M{high},{middle - 5}v10"
    size = {"y": top, "height": height, "rx": 2}
    return tag(
        "g",
        tag("title", f"{arm_name(m.arm)}: {percent(m.value)}, {_range(m)}"),
        tag("rect", class_="track", x=1, width=width - 2, **size),
        tag("rect", class_=f"bar {style}", x=1, width=round(end - 1, 1), **size),
        tag("path", class_="halo", d=whisker),
        tag("path", class_="whisker", d=whisker),
    )


def _bar_label(m: Measurement, y: float, width: int) -> Html:
    style = "label base" if m.arm.startswith("base") else "label tuned"
    value = tag("tspan", percent(m.value), class_="value")
    within = tag("tspan", f"  {interval(m.low, m.high)}", class_="range")
    name = text(short_arm(m.arm, width), 0, y, style, "start")
    return join([name, text(join([value, within]), width, y, "label", "end")])


def short_arm(arm: str, width: int) -> str:
    """Return the arm in words that fit a chart of this width."""
    name = arm_name(arm)
    if width > 500:
        return name
    short = name.removesuffix(" in the prompt").replace(" model,", ",")
    return re.sub(r" nearest examples?( \(embedded\))?$", r" nearest\1", short)


def _reference(reference: Reference, scale: Scale, y: float, bottom: float) -> Html:
    x = scale(reference.value)
    right = reference.value < 0.5
    label = f"{reference.name} {percent(reference.value)}"
    return tag(
        "g",
        tag("title", f"{label}. {reference.source}".strip()),
        tag("line", class_="reference", x1=x, x2=x, y1=y - 10, y2=bottom),
        text(label, x + (6 if right else -6), y, "reference", "start" if right else "end"),
    )


def loss_chart(curves: Curves, best_step: int | None, *, width: int, name: str) -> Html:
    """Return training loss (raw and smoothed), held-out loss, the kept checkpoint and the base."""
    lines = []
    if curves.loss:
        lines.append(Line(_thin(curves.loss), "train raw"))
        lines.append(Line(_thin(smooth(curves.loss)), "train"))
    if curves.held_out:
        lines.append(Line([(e.step, e.loss) for e in curves.held_out], "held-out", dots=True))
    best = chosen(curves, best_step)
    marks = []
    base = next((e for e in curves.held_out if e.step == 0), None)
    levels = [Level(base.loss, f"base model {number(base.loss)}", "base")] if base else []
    description = "Loss in nats per token against optimizer steps."
    if base:
        description += f" Base model, held out: {number(base.loss)}."
    if best:
        label = f"kept: step {count(best.step)}, {number(best.loss)}"
        marks = [Mark(best.step, best.loss, label)]
        description += f" Kept: step {best.step}, held-out loss {number(best.loss)}."
    return line_chart(
        lines,
        title="Training and held-out loss",
        description=description,
        width=width,
        height=300 if width > 500 else 260,
        name=name,
        levels=levels,
        marks=marks,
    )


def chosen(curves: Curves, best_step: int | None) -> HeldOut | None:
    """Return the evaluation of the kept checkpoint, else the last one marked best."""
    kept = [e for e in curves.held_out if e.step == best_step]
    found = kept or [e for e in curves.held_out if e.best]
    return found[-1] if found else None


def smooth(points: Sequence[Point], share: float = 0.05) -> list[tuple[float, float]]:
    """Return a centred moving average over `share` of the series (at least 3 points, if there are).

    >>> smooth([(1, 3.0), (2, 0.0), (3, 3.0)])
    [(1, 1.5), (2, 2.0), (3, 1.5)]
    """
    half = max(1, int(len(points) * share / 2))
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    found: list[tuple[float, float]] = []
    for i, (step, _) in enumerate(points):
        first, last = max(0, i - half), min(len(points), i + half + 1)
        found.append((step, (sums[last] - sums[first]) / (last - first)))
    return found


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    size = ceil(len(points) / _MOST_POINTS)
    if size <= 1:
        return list(points)
    pieces = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in p) / len(p), sum(y for _, y in p) / len(p)) for p in pieces]


def small_chart(
    points: Sequence[Point], title: str, *, width: int, name: str, levels: Sequence[Level] = ()
) -> Html:
    """Return a small line chart of one training metric."""
    first, last = points[0], points[-1]
    description = (
        f"{title} against optimizer steps: {number(first[1])} at step {first[0]}, "
        f"{number(last[1])} at step {last[0]}, at most {number(max(y for _, y in points))}."
    )
    return line_chart(
        [Line(_thin(points), "train")],
        title=title,
        description=description,
        width=width,
        height=150,
        name=name,
        levels=levels,
    )


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    description: str,
    width: int,
    height: int,
    name: str,
    levels: Sequence[Level] = (),
    marks: Sequence[Mark] = (),
    spans: Sequence[Span] = (),
    axes: Axes = STEPS,
) -> Html:
    """Return a line chart over optimizer steps, or what `axes` says; values start at zero."""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points] + [item.value for item in levels]
    ys += [span.high for span in spans]
    first = min(xs) if axes.start is None else axes.start
    y_ticks = ticks(min(0.0, *ys), max(ys), 6 if height > 200 else 4)
    x_ticks = [x for x in ticks(first, max(xs), 7 if width > 500 else 5) if x <= max(xs)]
    left = 12 + 7 * max(len(axes.tick(y)) for y in y_ticks)
    x_scale = Scale(first, max(max(xs), first + 1), left, width - 8)
    y_scale = Scale(y_ticks[0], y_ticks[-1], height - 40, 10)
    parts = [_axes(x_ticks, y_ticks, x_scale, y_scale, width, height, axes)]
    for item in levels:
        y = y_scale(item.value)
        parts.append(tag("line", class_=f"level {item.style}", x1=left, x2=width - 8, y1=y, y2=y))
        parts.append(text(item.label, width - 10, y - 6, f"note {item.style}", "end"))
    for span in spans:
        x, low, high = x_scale(span.x), y_scale(span.low), y_scale(span.high)
        ends = f"M{x},{low}V{high}M{x - 5},{low}h10M{x - 5},{high}h10"
        parts.append(tag("path", class_="whisker", d=ends))
    for line in lines:
        parts.append(_polyline(line, x_scale, y_scale, axes))
    parts += _line_labels(lines, x_scale, y_scale)
    for mark in marks:
        parts.append(_mark(mark, lines, x_scale, y_scale, width))
    return chart(name, width, height, title, description, parts)


def _line_labels(lines: Sequence[Line], x_scale: Scale, y_scale: Scale) -> list[Html]:
    """Return the labels of lines at their ends, from the bottom up, none on another."""
    ends = [(y_scale(line.points[-1][1]), line) for line in lines if line.label]
    parts, free = [], y_scale.start
    for y, line in sorted(ends, key=lambda end: -end[0]):
        free = min(free, y - 8)
        x = x_scale(line.points[-1][0]) - 4
        parts.append(text(line.label, x, round(free, 1), f"note {line.style}", "end"))
        free -= 16
    return parts


def _axes(
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    x_scale: Scale,
    y_scale: Scale,
    width: int,
    height: int,
    axes: Axes,
) -> Html:
    parts = []
    for value in y_ticks:
        y = y_scale(value)
        parts.append(tag("line", class_="grid", x1=x_scale.start, x2=width - 8, y1=y, y2=y))
        parts.append(text(axes.tick(value), x_scale.start - 7, y + 4, "tick", "end"))
    for value in x_ticks:
        anchor = "end" if x_scale(value) > width - 20 else "middle"
        parts.append(text(_tick(value), x_scale(value), height - 23, "tick", anchor))
    parts.append(text(axes.x, width - 8, height - 5, "tick", "end"))
    return join(parts)


def _tick(value: float) -> str:
    return count(value) if abs(value) >= 1000 and value == round(value) else f"{value:g}"


def _polyline(line: Line, x_scale: Scale, y_scale: Scale, axes: Axes) -> Html:
    pixels = [(x_scale(x), y_scale(y)) for x, y in line.points]
    parts = [
        tag("polyline", class_=f"line {line.style}", points=" ".join(f"{x},{y}" for x, y in pixels))
    ]
    if line.dots or len(pixels) == 1:
        for (x, y), (step, value) in zip(pixels, line.points, strict=True):
            tip = tag("title", axes.point(step, value))
            parts.append(tag("circle", tip, class_=f"dot {line.style}", cx=x, cy=y, r=3.5))
    return join(parts)


def _mark(mark: Mark, lines: Sequence[Line], x_scale: Scale, y_scale: Scale, width: int) -> Html:
    x, y = x_scale(mark.x), y_scale(mark.y)
    half = 3.7 * len(mark.label)
    middle = min(max(x, x_scale.start + half), width - 8 - half)
    under = [
        y_scale(value)
        for line in lines
        for step, value in line.points
        if abs(x_scale(step) - middle) <= half + 12
    ]
    above = min([y, *under]) - 16
    label_y = above if above > 16 else y + 26
    return tag(
        "g",
        tag("line", class_="drop", x1=x, x2=x, y1=round(label_y + 6, 1), y2=y_scale.start),
        tag("circle", class_="ring", cx=x, cy=y, r=7),
        text(mark.label, round(middle, 1), round(label_y, 1), "note kept", "middle"),
    )


def length_chart(data: Lengths, *, width: int, name: str) -> Html:
    """Return the histogram of tokens per row."""
    height = 190
    y_ticks = ticks(0, max(*data.counts, 1), 4)
    left = 12 + 7 * max(len(_tick(y)) for y in y_ticks)
    x_scale = Scale(data.edges[0], data.edges[-1], left, width - 8)
    y_scale = Scale(0, y_ticks[-1], height - 26, 10)
    parts = []
    for value in y_ticks:
        y = y_scale(value)
        parts.append(tag("line", class_="grid", x1=left, x2=width - 8, y1=y, y2=y))
        parts.append(text(_tick(value), left - 7, y + 4, "tick", "end"))
    for value in ticks(data.edges[0], data.edges[-1], 6):
        if data.edges[0] <= value <= data.edges[-1]:
            anchor = "end" if x_scale(value) > width - 20 else "middle"
            parts.append(text(_tick(value), x_scale(value), height - 8, "tick", anchor))
    for low, high, rows in zip(data.edges, data.edges[1:], data.counts, strict=False):
        x, y = x_scale(low), y_scale(rows)
        size = {"width": max(1.0, round(x_scale(high) - x - 1, 1)), "height": y_scale.start - y}
        tip = tag("title", f"{low:g} to {high:g}: {count(rows, 'row')}")
        parts.append(tag("rect", tip, class_="bar tuned", x=x, y=y, **size))
    peak = max(range(len(data.counts)), key=lambda i: data.counts[i])
    description = (
        f"{count(sum(data.counts), 'row')} of {data.edges[0]:g} to {data.edges[-1]:g} tokens; "
        f"most between {data.edges[peak]:g} and {data.edges[peak + 1]:g}."
    )
    return chart(name, width, height, "Tokens per row", description, parts)


def text(content: str, x: float, y: float, style: str, anchor: str) -> Html:
    """Return a text at (x, y) pixels; `anchor` is start, middle or end."""
    anchor_or_none = None if anchor == "start" else anchor
    return tag("text", content, class_=style, x=x, y=y, text_anchor=anchor_or_none)


def chart(
    name: str, width: int, height: int, title: str, description: str, parts: Sequence[Html]
) -> Html:
    """Return the drawing with its title and, for those who cannot see it, its description."""
    return tag(
        "svg",
        tag("title", title, id=f"{name}-title"),
        tag("desc", description, id=f"{name}-desc"),
        *parts,
        class_="chart",
        viewBox=f"0 0 {width} {height}",
        width=width,
        height=height,
        role="img",
        aria_labelledby=f"{name}-title {name}-desc",
    )
