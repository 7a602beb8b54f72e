"""Charts: valid XML, accessible, and drawn where the numbers are."""

import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postgrad.report import charts
from postgrad.report.charts import NARROW, WIDE
from postgrad.report.collect import Lengths, Reference, collect
from postgrad.report.curves import Curves, HeldOut
from postgrad.types import Measurement


def parse(svg: str) -> ElementTree.Element:
    root = ElementTree.fromstring(svg)
    assert root.tag == "svg"
    names = root.attrib["aria-labelledby"].split()
    assert [root[0].attrib["id"], root[1].attrib["id"]] == names
    assert root[0].text
    assert root[1].text
    return root


def styled(root: ElementTree.Element, style: str) -> list[ElementTree.Element]:
    return [e for e in root.iter() if set(style.split()) <= set(e.get("class", "").split())]


def texts(root: ElementTree.Element) -> list[str]:
    return ["".join(e.itertext()) for e in root.iter("text")]


def arm(name: str, value: float, low: float, high: float) -> Measurement:
    return Measurement("t", "exact_match", name, value, low, high, 300)


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_bars_are_as_long_as_their_values(width):
    arms = [arm("base/zero-shot", 0.0, 0.0, 0.013), arm("tuned", 0.86, 0.816, 0.895)]
    svm = Reference("Linear <SVM>", 0.8, 300)
    root = parse(charts.bars(arms, [svm], confidence=0.95, width=width, name="b"))
    assert root.attrib["viewBox"].split()[2] == str(width)
    lengths = [float(bar.attrib["width"]) for bar in styled(root, "bar")]
    assert lengths == pytest.approx([0, 0.86 * (width - 2)], abs=0.2)
    low, high = re.match(r"M([\d.]+),[\d.]+H([\d.]+)", styled(root, "whisker")[1].get("d")).groups()
    assert float(low) == pytest.approx(1 + 0.816 * (width - 2), abs=0.2)
    assert float(high) == pytest.approx(1 + 0.895 * (width - 2), abs=0.2)
    line = next(e for e in styled(root, "reference") if e.tag == "line")
    assert float(line.attrib["x1"]) == pytest.approx(1 + 0.8 * (width - 2), abs=0.2)
    assert "Linear <SVM> 80.0%" in texts(root)
    assert any(t.startswith("86.0%") and "81.6" in t for t in texts(root))
    assert "Tuned model: 86.0% (81.6" in root[1].text


@given(
    st.floats(-1e6, 1e6),
    st.floats(0, 1e6),
    st.integers(3, 9),
)
def test_ticks_are_few_even_and_cover_the_range(low, span, most):
    found = charts.ticks(low, low + span, most)
    assert 2 <= len(found) <= most + 1
    steps = [b - a for a, b in pairwise(found)]
    assert max(steps) == pytest.approx(min(steps), rel=1e-6)
    slack = 1e-6 * max(1.0, abs(low), span)
    if span > slack:
        assert found[0] <= low + slack
        assert found[-1] >= low + span - slack


def test_loss_chart_marks_the_kept_checkpoint_and_the_base(finished):
    curves = collect(finished).curves
    for width in (WIDE, NARROW):
        root = parse(charts.loss_chart(curves, 112, width=width, name="l"))
        kept = next(e for e in curves.held_out if e.step == 112)
        dots = styled(root, "dot held-out")
        assert len(dots) == len(curves.held_out)
        ring = styled(root, "ring")[0]
        dot = dots[curves.held_out.index(kept)]
        assert (ring.attrib["cx"], ring.attrib["cy"]) == (dot.attrib["cx"], dot.attrib["cy"])
        assert f"kept: step 112, {kept.loss:.4g}" in texts(root)
        level = styled(root, "level base")[0]
        assert level.attrib["y1"] == dots[0].attrib["cy"]
        ys = [float(e.attrib["cy"]) for e in dots]
        losses = [e.loss for e in curves.held_out]
        order = sorted(range(len(ys)), key=lambda i: losses[i])
        assert all(ys[a] >= ys[b] for a, b in pairwise(order))


def test_labels_of_the_kept_checkpoint_stay_inside(finished):
    curves = collect(finished).curves
    for step in (0, 16, 112, 160):
        root = parse(charts.loss_chart(curves, step, width=NARROW, name="l"))
        label = styled(root, "note kept")[0]
        half = 3.7 * len(label.text)
        assert float(label.attrib["x"]) - half >= 0
        assert float(label.attrib["x"]) + half <= NARROW


def test_the_last_best_is_marked_when_the_step_is_not_known():
    rows = tuple(HeldOut(i, 3.0 - i, None, i < 3) for i in range(5))
    assert charts.chosen(Curves((), (), (), rows), None).step == 2
    assert charts.chosen(Curves((), (), (), ()), 4) is None


def test_long_runs_are_averaged_not_cut():
    points = tuple((i, 1.0 + i / 10_000) for i in range(10_000))
    root = parse(charts.small_chart(points, "Gradient norm", width=360, name="n"))
    drawn = styled(root, "line")[0].attrib["points"].split()
    assert 200 <= len(drawn) <= 300
    assert len(charts.smooth(points)) == len(points)


def test_one_point_and_constant_series_can_be_drawn():
    for points in (((5, 0.0),), ((1, 2.0), (2, 2.0))):
        root = parse(charts.small_chart(points, "Learning rate", width=360, name="n"))
        assert styled(root, "line")
        assert "nan" not in ElementTree.tostring(root, encoding="unicode")


def test_a_moving_average_keeps_a_constant_and_the_mean():
    assert charts.smooth([(i, 2.0) for i in range(100)]) == [(i, 2.0) for i in range(100)]


def test_length_chart_counts():
    lengths = Lengths({"longest": 300}, (0, 100, 200, 300), (10, 40, 20))
    root = parse(charts.length_chart(lengths, width=NARROW, name="h"))
    heights = [float(bar.attrib["height"]) for bar in styled(root, "bar")]
    assert heights[1] == pytest.approx(4 * heights[0], abs=0.3)
    assert "70 rows" in root[1].text
    assert "most between 100 and 200" in root[1].text
