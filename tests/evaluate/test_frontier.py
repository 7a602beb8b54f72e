"""The frontier on made-up answers: what points keep and spare, and which one is chosen."""

from dataclasses import replace

import numpy as np
import pytest

from postgrad.errors import DataError
from postgrad.evaluate.frontier import Place, choose, measure_frontier
from postgrad.types import Evidence, Score

PLACES = (
    Place("base", 0.0),
    Place("lambda-0.5", 0.5),
    Place("lambda-0.8", 0.8),
    Place("tuned", 1.0),
    Place("step-000040", 1.0, 40),
)
TARGET = {"base": 0.1, "lambda-0.5": 0.6, "lambda-0.8": 0.79, "tuned": 0.8, "step-000040": 0.5}
KEPT = {"base": 0.6, "lambda-0.5": 0.59, "lambda-0.8": 0.58, "tuned": 0.48, "step-000040": 0.55}


def answers(shares, n, seed, metric="exact_match", group=None):
    """Evidence of each point; a row that a weaker point gets right a stronger one does too.

    In groups, rows that stand together are equally hard.
    """
    ease = np.arange(n) / n if group else np.random.default_rng(seed).permutation(n) / n
    return {
        name: [
            Evidence(
                f"{seed}-{i}", "q", "r", "c", {metric: Score(float(e < share), bool(e < share))},
                group=None if group is None else str(i // group),
            )
            for i, e in enumerate(ease)
        ]
        for name, share in shares.items()
    }  # fmt: skip


def frontier(margin=3.0, target=TARGET, kept=KEPT, n=300, items=400, **options):
    places = [place for place in PLACES if place.name in target]
    retention = {
        ("piqa", "acc_norm"): answers(kept, items, 1, "acc_norm"),
        ("mmlu", "acc"): answers(kept, items // 2, 2, "acc"),
    }
    return measure_frontier(
        places,
        answers(target, n, 3),
        retention,
        metric="exact_match",
        margin=margin,
        **options,
    )


def test_every_point_is_measured_against_base_and_tuned():
    found = frontier()
    assert [point.place.name for point in found.points] == [place.name for place in PLACES]
    assert (found.n, dict(found.items)) == (300, {"piqa": 400, "mmlu": 200})
    base, tuned = found.point("base"), found.point("tuned")
    assert (base.retention, base.retention_low, base.retention_high) == (0, 0, 0)
    assert base.kept is tuned.kept is base.p is tuned.p is None
    assert tuned.retention == pytest.approx(-0.12)
    assert found.gain.difference == pytest.approx(0.7)
    point = found.point("lambda-0.8")
    assert point.kept == pytest.approx(0.69 / 0.7)
    assert point.kept_low < point.kept < point.kept_high
    assert point.spared == pytest.approx(0.10)
    assert point.spared_low < 0.10 < point.spared_high
    assert [change.task for change in point.changes] == ["piqa", "mmlu"]
    assert point.changes[0].difference == pytest.approx(-0.02)
    for each in found.points:
        assert each.target_low <= each.target <= each.target_high
        if each.p is not None:
            assert each.p <= each.corrected


def test_p_is_corrected_over_the_points_between():
    found = frontier()
    tested = sorted(point.p for point in found.points if point.p is not None)
    assert len(tested) == 3
    smallest = min(p.corrected for p in found.points if p.corrected is not None)
    assert smallest == pytest.approx(3 * tested[0])


def test_a_bargain_is_named_with_its_figures():
    found = frontier()
    assert len(found.findings) == 2
    assert found.findings[0].startswith("\N{GREEK SMALL LETTER LAMDA} = 0.8 keeps 99 % (")
    assert "of the gain at 10.0 points less forgetting (p < 0.001)" in found.findings[0]
    assert "changes the benchmarks by -12.0 points" in found.findings[1]


def test_that_there_is_no_bargain_is_said():
    weaker = {**TARGET, "lambda-0.8": 0.7}
    [none, _] = frontier(target=weaker).findings
    assert none.startswith("no point keeps at least 95 % of the gain at significantly less")
    equal = {**KEPT, "lambda-0.8": 0.485}
    assert frontier(kept=equal).findings[0].startswith("no point keeps")


def test_without_a_gain_there_is_no_share_of_it():
    found = frontier(target=dict.fromkeys(TARGET, 0.5) | {"tuned": 0.503})
    assert all(point.kept is None for point in found.points)
    assert found.findings[0].startswith("no gain over the base model is shown")
    worse = frontier(target={**TARGET, "base": 0.9})
    assert all(point.kept is None for point in worse.points)


def test_the_best_point_within_the_margin_is_chosen():
    found = frontier(margin=3.0)
    assert [p.within_margin for p in found.points] == [True, True, True, False, False]
    assert found.chosen == "lambda-0.8"
    assert "79.0 % of 300 validation rows" in found.choice
    assert frontier(margin=1.5).chosen == "lambda-0.5"
    assert frontier(margin=15).chosen == "tuned"
    assert "the tuned model itself" in frontier(margin=15).choice
    nothing = frontier(margin=0)
    assert nothing.chosen == "base"
    assert "none is exported" in nothing.choice


def test_ties_go_to_the_smaller_lambda():
    points = [replace(p, target=0.5, within_margin=True) for p in frontier().points]
    assert choose(points).place.name == "base"
    assert choose(points[1:]).place.name == "lambda-0.5"
    assert choose(points[3:]).place.name == "tuned"


def test_a_target_no_better_than_the_base_is_not_chosen():
    found = frontier(margin=15, target={**dict.fromkeys(TARGET, 0.05), "base": 0.1})
    assert found.chosen == "base"


def test_other_rows_or_items_are_refused():
    target = answers(TARGET, 50, 3)
    retention = {("piqa", "acc"): answers(KEPT, 60, 1, "acc")}
    options = {"metric": "exact_match", "margin": 1.0}
    assert measure_frontier(PLACES, target, retention, **options)
    other = {**target, "lambda-0.5": target["lambda-0.5"][1:]}
    with pytest.raises(DataError, match="not evaluated on the same rows"):
        measure_frontier(PLACES, other, retention, **options)
    items = retention["piqa", "acc"]
    short = {("piqa", "acc"): {**items, "step-000040": items["step-000040"][:-1]}}
    with pytest.raises(DataError, match="not evaluated on the same rows"):
        measure_frontier(PLACES, target, short, **options)


def test_the_order_of_rows_does_not_matter():
    target, items = answers(TARGET, 80, 3), answers(KEPT, 60, 1, "acc")
    options = {"metric": "exact_match", "margin": 1.0}
    a = measure_frontier(PLACES, target, {("x", "acc"): items}, **options)
    turned = {name: rows[::-1] if name != "base" else rows for name, rows in items.items()}
    b = measure_frontier(PLACES, target, {("x", "acc"): turned}, **options)
    assert [p.spared for p in a.points] == [p.spared for p in b.points]
    assert [p.retention for p in a.points] == [p.retention for p in b.points]


def test_items_in_groups_are_judged_by_group():
    options = {"metric": "exact_match", "margin": 1.0}
    items = answers(KEPT, 300, 1, "acc", 20)
    apart = {name: [replace(row, group=None) for row in rows] for name, rows in items.items()}
    alone, grouped = (
        measure_frontier(PLACES, answers(TARGET, 50, 3), {("x", "acc"): each}, **options).point(
            "tuned"
        )
        for each in (apart, items)
    )
    assert alone.retention == grouped.retention
    assert grouped.retention_high - grouped.retention_low > alone.retention_high - (
        alone.retention_low
    )
