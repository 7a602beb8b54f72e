"""The frontier in the report: drawn where its figures are, readable on a desk and on a phone."""

from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

from postgrad.evaluate.frontier import Place, measure_frontier, to_tree
from postgrad.report.charts import NARROW, WIDE
from postgrad.report.collect import collect
from postgrad.report.frontier import frontier_section, statement
from postgrad.report.frontier_chart import frontier_chart
from postgrad.report.html import page
from postgrad.report.model_card import card
from postgrad.run import read_json
from postgrad.types import Evidence, Score

SHARES = {
    "base": (0.05, 0.52), "lambda-0.25": (0.31, 0.515), "lambda-0.5": (0.74, 0.51),
    "lambda-0.75": (0.86, 0.485), "tuned": (0.88, 0.45), "step-000040": (0.55, 0.5),
    "step-000120": (0.83, 0.47),
}  # fmt: skip


def place(name):
    if name.startswith("step"):
        return Place(name, 1.0, int(name[5:]))
    scale = {"base": 0.0, "tuned": 1.0}.get(name)
    return Place(name, float(name[7:]) if scale is None else scale)


def answers(which, n, seed, metric):
    ease = np.random.default_rng(seed).random(n)
    noise = np.random.default_rng(seed + 9)
    found = {}
    for name, shares in SHARES.items():
        right = (ease + noise.normal(0, 0.04, n)) < shares[which]
        scores = [{metric: Score(float(r), bool(r))} for r in right]
        found[name] = [Evidence(str(i), "q", "r", "c", s) for i, s in enumerate(scores)]
    return found


def made(margin=2.0, **options):
    retention = {
        ("piqa", "acc_norm"): answers(1, 300, 1, "acc_norm"),
        ("mmlu", "acc"): answers(1, 300, 2, "acc"),
    }
    target = answers(0, 300, 3, "exact_match")
    places = [place(name) for name in SHARES]
    return measure_frontier(
        places, target, retention, metric="exact_match", margin=margin, **options
    )


def with_dial(run, dial):
    tree = read_json(run.measurements_path)
    run.write_json(run.measurements_path, {**tree, "dial": to_tree(dial)})
    return collect(run)


def styled(root, style):
    return [e for e in root.iter() if set(style.split()) <= set(e.get("class", "").split())]


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_points_stand_where_their_figures_are(width):
    dial = made()
    root = ElementTree.fromstring(frontier_chart([("", dial)], width=width, name="d"))
    dots = styled(root, "dot")
    assert len(dots) == len(SHARES)
    by_step = {len(styled(root, f"dot {style}")) for style in ("held-out", "train")}
    assert by_step == {5, 2}
    [ring] = styled(root, "ring")
    chosen = [point.place.name for point in dial.points].index(dial.chosen)
    assert (ring.get("cx"), ring.get("cy")) == (dots[chosen].get("cx"), dots[chosen].get("cy"))
    across = sorted(zip((float(d.get("cx")) for d in dots), dial.points, strict=True),
                    key=lambda pair: pair[0])  # fmt: skip
    retained = [point.retention for _, point in across]
    assert retained == sorted(retained)
    up = sorted(zip((float(d.get("cy")) for d in dots), dial.points, strict=True),
                key=lambda pair: pair[0])  # fmt: skip
    targets = [point.target for _, point in up]
    assert targets == sorted(targets, reverse=True)
    assert len(styled(root, "whisker soft")) == len(SHARES)
    labels = ["".join(e.itertext()) for e in styled(root, "note")]
    lam = "\N{GREEK SMALL LETTER LAMDA}"
    assert set(labels) == {
        f"base {lam} 0", f"{lam} 0.25", f"{lam} 0.5", f"{lam} 0.75", f"tuned {lam} 1",
        "step 40", "step 120",
    }  # fmt: skip
    [margin] = [e for e in styled(root, "reference") if e.tag == "line"]
    zero = styled(root, "grid zero")[0]
    assert float(margin.get("x1")) < float(zero.get("x1"))
    for e in root.iter("text"):
        assert 0 <= float(e.get("x")) <= width


def test_several_runs_stand_in_one_picture():
    other = replace(made(), chosen="tuned")
    root = ElementTree.fromstring(
        frontier_chart([("plain", made()), ("replay", other)], width=WIDE, name="d")
    )
    assert len(styled(root, "ring")) == 2
    assert len(styled(root, "dot held-out")) == len(styled(root, "dot train")) == len(SHARES)
    assert "replay: tuned" in root[1].text


def test_the_section_says_what_was_found_and_chosen(finished):
    dial = made(left_out=("boolq has 3 items besides the 1,000 reported ones",))
    report = with_dial(finished, dial)
    html = frontier_section(report)
    for sentence in statement(dial):
        assert sentence in html.replace("&lt;", "<")
    assert "\N{GREEK CAPITAL LETTER LAMDA}" not in html + card(report)
    assert html.count("<svg") == 2
    assert html.count(">chosen<") == 2  # legend and table
    assert "beyond the margin" in html
    assert "Left out: boolq has 3 items" in html
    assert "mmlu (n = 300)" in html
    assert "The dialled model" not in html
    assert html in page(report)
    assert "How much of the tuning to keep" in card(report)


def test_without_a_dial_nothing_is_said(finished):
    report = collect(finished)
    assert frontier_section(report) is None
    assert 'id="dial"' not in page(report)
    assert "How much of the tuning" not in card(report)


def test_a_dial_that_was_not_measured_is_said_to_be_missing(make_run):
    run = make_run(evaluate__dial={}, evaluate__retention=["piqa"])
    assert "no tuned model was evaluated" in frontier_section(collect(run))
