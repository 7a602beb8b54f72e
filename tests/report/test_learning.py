"""The learning curve on the page: a point with its interval for each share, and the finding."""

import re
from xml.etree import ElementTree

import pytest
from report_runs import add_rivals

from postgrad.report.collect import collect
from postgrad.report.html import page
from postgrad.report.learning import learning_section
from postgrad.report.words import training_notes


def test_it_shows_the_finding_the_points_and_the_table(finished):
    assert learning_section(collect(finished)) is None
    add_rivals(finished)
    report = collect(finished)
    shown = learning_section(report)
    assert "Doubling the rows (1,500 to 3,000) bought +" in shown
    assert "Exact match on the test rows, with 95% intervals." in shown
    assert "3 min 8 s" in shown
    assert shown in page(report)
    drawings = re.findall(r"<svg.*?</svg>", shown, re.S)
    assert len(drawings) == 2
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        dots = list(root.iter("circle"))
        spans = [e for e in root.iter("path") if e.get("class") == "whisker"]
        assert len(dots) == len(spans) == 3
        x = [float(e.get("cx")) for e in dots]
        assert x[2] - x[1] == pytest.approx(2 * (x[1] - x[0]), abs=0.3)
        for dot, span in zip(dots, spans, strict=True):
            at, low, high = re.match(r"M([\d.]+),([\d.]+)V([\d.]+)", span.get("d")).groups()
            assert at == dot.get("cx")
            assert float(high) < float(dot.get("cy")) < float(low)
        assert "1,500 rows: 79.0%" in [e.text for e in root.iter("title")]
        said = ["".join(e.itertext()) for e in root.iter("text")]
        assert {"training rows", "80%", "0%"} <= set(said)


def test_a_probed_learning_rate_is_told_with_the_training(finished):
    add_rivals(finished)
    [said] = [note for note in training_notes(collect(finished)) if "probed" in note]
    assert said.startswith("The learning rate 0.001 was probed for 20 steps each")
    assert "0.000333" in said or "3.33e-4" in said
    assert "0.61 (0.2 worse, ± 0.03)" in said
    assert "0.003: broke down" in said
