import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postgrad.errors import DataError
from postgrad.evaluate.compare import best_base, compare, correct, headline, measure
from postgrad.evaluate.statistics import mcnemar_exact, wilson
from postgrad.types import Evidence, Measurement, Score, Verdict

METRIC = "f1"
zeros_and_ones = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


def evidence(scores, **changes):
    """One row per score; None is a row that failed."""
    return [
        Evidence(
            example_id=f"id{i}",
            prompt="question",
            reference=f"answer {i}",
            completion="completion",
            scores={} if value is None else {METRIC: Score(float(value), value == 1)},
            error="out of memory" if value is None else None,
            **changes,
        )
        for i, value in enumerate(scores)
    ]


def judge(a, b, name="base/few-shot-8", **options):
    return compare(evidence(a), evidence(b), "task", METRIC, name, "tuned", **options)


def test_a_share_gets_the_wilson_interval():
    m = measure(evidence([1, 0, 1, 1]), "task", METRIC, "tuned", 0.9, evidence_path="e.jsonl")
    assert (m.value, m.n, m.method, m.errors) == (0.75, 4, "wilson", 0)
    assert (m.low, m.high) == wilson(3, 4, 0.9)
    assert (m.task, m.metric, m.arm, m.evidence) == ("task", METRIC, "tuned", "e.jsonl")


def test_graded_scores_get_a_seeded_bootstrap():
    rows = evidence([random.Random(i).random() ** 8 for i in range(50)])
    m = measure(rows, "task", METRIC, "tuned", seed=3)
    assert m.method == "bootstrap"
    assert 0 < m.low < m.value < m.high < 1
    assert m == measure(rows, "task", METRIC, "tuned", seed=3)
    assert m != measure(rows, "task", METRIC, "tuned", seed=4)
    assert m.high - m.low < (n := measure(rows, "task", METRIC, "tuned", 0.99)).high - n.low


def test_failed_rows_count_as_zero_and_are_reported():
    m = measure(evidence([1, None, 1, None]), "task", METRIC, "tuned")
    assert (m.value, m.n, m.errors) == (0.5, 4, 2)
    c = judge([1, 1, 0, 0], [1, None, None, 1])
    assert (c.n, c.wins, c.losses, c.difference) == (4, 1, 1, 0)


@given(zeros_and_ones, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_comparison_of_zeros_and_ones(pairs, shuffle):
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    wins = sum(y > x for x, y in pairs)
    losses = sum(y < x for x, y in pairs)
    c = judge(a, b)
    assert (c.wins, c.losses, c.n, c.method) == (wins, losses, len(pairs), "mcnemar-exact")
    assert c.p == mcnemar_exact(wins, losses)
    assert c.low <= c.difference <= c.high
    if c.verdict is Verdict.INCONCLUSIVE:
        assert c.p >= 0.05
    else:
        assert (c.low > 0) if c.verdict is Verdict.IMPROVED else (c.high < 0)
    shuffled = evidence(b)
    shuffle.shuffle(shuffled)
    assert compare(evidence(a), shuffled, "task", METRIC, c.a, "tuned") == c
    mirrored = judge(b, a)
    opposite = {Verdict.IMPROVED: Verdict.WORSE, Verdict.WORSE: Verdict.IMPROVED}
    assert mirrored.verdict is opposite.get(c.verdict, Verdict.INCONCLUSIVE)
    assert (mirrored.low, mirrored.high) == pytest.approx((-c.high, -c.low), abs=1e-9)


def test_comparison_of_graded_scores():
    rng = random.Random(1)
    a = [rng.random() * 0.8 for _ in range(100)]
    c = judge(a, [x + 0.05 + 0.1 * rng.random() for x in a])
    assert (c.method, c.verdict, c.wins) == ("paired-bootstrap", Verdict.IMPROVED, 100)
    assert 0.08 < c.low < c.difference < c.high < 0.12
    assert 0 < c.detectable < 0.02
    assert judge(a, a).verdict is Verdict.INCONCLUSIVE
    assert judge([x + 0.1 for x in a], a).verdict is Verdict.WORSE


def test_the_confidence_decides():
    a, b = [0] * 8 + [1] * 20, [1] * 8 + [1] * 20
    assert judge(a, b).verdict is Verdict.IMPROVED
    assert judge(a, b, confidence=0.999).verdict is Verdict.INCONCLUSIVE


@pytest.mark.parametrize("n", [1, 3, 300])
@pytest.mark.parametrize("value", [0, 0.5, 1])
def test_equal_arms_are_inconclusive_with_a_real_interval(n, value):
    c = judge([value] * n, [value] * n)
    assert (c.verdict, c.difference, c.p) == (Verdict.INCONCLUSIVE, 0, 1)
    assert c.low < 0 < c.high
    assert 0 < c.detectable <= 1


def grouped(scores, size):
    """Rows in groups of `size` that stand one after another."""
    return [replace(row, group=str(i // size)) for i, row in enumerate(evidence(scores))]


def test_rows_of_one_group_count_for_less():
    a, b = [0] * 60, [1] * 20 + [0] * 40
    alone = judge(a, b)
    together = compare(grouped(a, 10), grouped(b, 10), "task", METRIC, "base", "tuned")
    assert (alone.verdict, together.verdict) == (Verdict.IMPROVED, Verdict.INCONCLUSIVE)
    assert together.method == "paired-clustered"
    assert together.low < alone.low < alone.high < together.high
    assert together.detectable > alone.detectable
    assert compare(grouped(a, 1), grouped(b, 1), "task", METRIC, alone.a, "tuned") == alone
    share, clustered = (measure(rows, "t", METRIC, "x") for rows in (evidence(b), grouped(b, 10)))
    assert (share.method, clustered.method) == ("wilson", "clustered")
    assert clustered.low < share.low < share.high < clustered.high


@given(zeros_and_ones)
@settings(deadline=None)
def test_one_sided_bounds_lie_inside_the_interval(pairs):
    c = judge([x for x, _ in pairs], [y for _, y in pairs])
    assert c.low <= c.lower <= c.difference <= c.upper <= c.high


def test_a_suite_is_judged_as_a_whole():
    suite = [judge([0] * 6 + [1] * 20, [1] * 26)] * 3
    assert {c.verdict for c in suite} == {Verdict.IMPROVED}
    corrected = correct(suite)
    assert [c.corrected for c in corrected] == pytest.approx([3 * suite[0].p] * 3)
    assert {c.verdict for c in corrected} == {Verdict.INCONCLUSIVE}
    assert correct(suite[:1])[0].verdict is Verdict.IMPROVED
    assert [(c.p, c.low, c.high) for c in corrected] == [(c.p, c.low, c.high) for c in suite]


def test_few_rows_cannot_show_anything():
    c = judge([0] * 5, [1] * 5)
    assert (c.verdict, c.detectable) == (Verdict.INCONCLUSIVE, 1)
    assert judge([0.0, 0.1], [0.9, 0.8]).verdict is Verdict.INCONCLUSIVE


def test_unpaired_rows_are_refused():
    rows = evidence([1, 0, 1])
    with pytest.raises(DataError, match="1 examples only in base: id2") as caught:
        compare(rows, rows[:2], "task", METRIC, "base", "tuned")
    assert "same test rows" in caught.value.remedy
    with pytest.raises(DataError, match="7 examples only in tuned: id3, id4, id5, id6, id7 and 2"):
        compare(rows, evidence([1] * 10), "task", METRIC, "base", "tuned")
    other = [*rows[:2], Evidence("id2", "question", "?", "", rows[2].scores)]
    with pytest.raises(DataError, match="1 examples with another reference: id2"):
        compare(rows, other, "task", METRIC, "base", "tuned")


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([], "tuned: no rows"),
        (evidence([1, 0]) + evidence([1]), "tuned: 1 examples occur more than once: id0"),
        (evidence([1, 0.5, 1.5]), "1 f1 scores are not within 0 to 1: id2"),
        (evidence([float("nan")]), "not within 0 to 1: id0"),
        ([Evidence("x", "", "", "", {"json": Score(1, True)})], "1 rows have no f1 score: x"),
    ],
)
def test_rows_that_cannot_be_measured_are_refused(rows, why):
    with pytest.raises(DataError, match=why):
        measure(rows, "task", METRIC, "tuned")
    with pytest.raises(DataError, match=why):
        compare(evidence([1]), rows, "task", METRIC, "base/zero-shot", "tuned")


def test_the_best_base_arm():
    def arm(name, value):
        return Measurement("task", METRIC, name, value, 0, 1, 10)

    arms = [arm("base/zero-shot", 0.2), arm("base/few-shot-8", 0.2), arm("tuned", 0.9)]
    best = best_base(arms)
    assert best is not None
    assert best.arm == "base/zero-shot"
    assert best_base([*arms, arm("base/few-shot-16", 0.3)]) == arm("base/few-shot-16", 0.3)
    assert best_base(arms[2:]) is None


def test_headline_names_the_strongest_rival():
    zero = judge([0] * 300, [1] * 250 + [0] * 50, "base/zero-shot")
    few = judge([0] * 280 + [1] * 20, [1] * 250 + [0] * 50)
    assert headline([zero, few]) == (
        "tuned beats the best prompt (few-shot-8) by 76.7 points "
        "(95 % interval 69.5 to 82.2, n = 300, p < 0.001)"
    )
    assert headline([zero]).startswith("tuned beats zero-shot prompting by 83.3 points")
    near = judge([0] * 200 + [1] * 100, [1] * 300, "base/few-shot-8-retrieved")
    text = headline([zero, few, near])
    assert text.startswith("tuned beats the best prompt (few-shot-8-retrieved) by 66.7 points")
    assert "90 % interval" in headline([zero], 0.9)


def test_headline_admits_that_prompting_wins():
    c = judge([1] * 20 + [0] * 80, [0] * 18 + [1] * 4 + [0] * 78)
    assert c.verdict is Verdict.WORSE
    text = headline([c])
    assert text.startswith("prompting wins: few-shot-8 beats tuned by 16.0 points (95 % interval ")
    assert f"{-100 * c.high:.1f} to {-100 * c.low:.1f}" in text


def test_headline_of_an_inconclusive_comparison_says_what_would_have_been_needed():
    c = judge([1] * 10 + [0] * 90, [0] * 2 + [1] * 12 + [0] * 86)
    text = headline([c])
    assert text.startswith("inconclusive: tuned differs from few-shot-8 prompting by 2.0 points")
    assert "p = 0.688" in text
    assert text.endswith(
        f"100 rows would have needed a difference of {100 * c.detectable:.1f} points"
    )
    assert headline([judge([0] * 3, [1] * 3)]).endswith("3 rows are too few to show any difference")
    assert "does not confirm the interval" in headline([judge([0] * 30, [1] * 5 + [0] * 25)])


def test_headline_of_other_arms_and_of_nothing():
    c = judge([1] * 30, [0] * 30, "linear-svm")
    assert headline([c]).startswith("linear-svm beats tuned by 100.0 points")
    assert headline([]) == "nothing was compared"
