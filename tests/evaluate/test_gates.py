import pytest
from hypothesis import given
from hypothesis import strategies as st

from postgrad.config import GatesConfig, parse_recipe
from postgrad.errors import ConfigError
from postgrad.evaluate.compare import compare, measure
from postgrad.evaluate.gates import judge_gates, unmet
from postgrad.types import Evidence, GateStatus, Score

METRIC = "exact_match"
FAIL, PASS, UNDECIDED = GateStatus.FAIL, GateStatus.PASS, GateStatus.UNDECIDED


def rows(scores):
    return [
        Evidence(f"id{i}", "q", "r", "c", {METRIC: Score(float(s), bool(s))})
        for i, s in enumerate(scores)
    ]


def change(n, wins, losses, task="bot", a="base/few-shot-8"):
    """A comparison of n rows, half of the others right in both arms."""
    same = [i % 2 for i in range(n - wins - losses)]
    base, tuned = [0] * wins + [1] * losses + same, [1] * wins + [0] * losses + same
    return compare(rows(base), rows(tuned), task, METRIC, a, "tuned")


def judge(gates, comparisons=(), measurements=()):
    return judge_gates(GatesConfig(**gates), "bot", METRIC, measurements, comparisons)


def recipe(**evaluate):
    tree = {"name": "bot", "model": {"base": "m"}, "data": {"train": "rows.jsonl"}}
    return parse_recipe({**tree, "evaluate": evaluate})


@pytest.mark.parametrize(
    ("rule", "wins", "losses", "status"),
    [
        (">= few-shot", 40, 10, PASS),
        (">= few-shot", 20, 20, UNDECIDED),
        (">= few-shot", 10, 40, FAIL),
        (">= few-shot - 10", 20, 20, PASS),
        (">= few-shot - 2", 20, 20, UNDECIDED),
        ("> few-shot", 40, 10, PASS),
        ("> few-shot", 20, 20, UNDECIDED),
        ("> few-shot", 10, 40, FAIL),
    ],
)
def test_the_target_against_prompting(rule, wins, losses, status):
    (gate,) = judge({"target": rule}, [change(300, wins, losses)])
    assert (gate.name, gate.rule, gate.status) == ("target", rule, status)
    assert "against base/few-shot-8" in gate.finding
    assert "n = 300" in gate.finding
    assert ("undecided counts as not met" in gate.finding) == (status is UNDECIDED)
    assert bool(unmet([gate])) == (status is not PASS)


def test_at_least_as_good_needs_less_than_better():
    c = change(300, 14, 6)  # one-sided bound above zero, two-sided interval not
    assert c.lower > 0 > c.low
    assert [judge({"target": rule}, [c])[0].status for rule in (">= few-shot", "> few-shot")] == [
        PASS,
        UNDECIDED,
    ]


def test_every_prompting_arm_must_be_reached():
    zero, few = change(300, 90, 5, a="base/zero-shot"), change(300, 20, 18)
    (gate,) = judge({"target": "> few-shot"}, [zero, few])
    assert gate.status is UNDECIDED
    assert "base/few-shot-8" in gate.finding
    retrieved = change(300, 10, 40, a="base/few-shot-8-retrieved")
    (gate,) = judge({"target": "> few-shot"}, [zero, few, retrieved])
    assert gate.status is FAIL
    assert "against base/few-shot-8-retrieved" in gate.finding


@pytest.mark.parametrize(("right", "status"), [(280, PASS), (240, UNDECIDED), (200, FAIL)])
def test_a_level_is_met_when_the_interval_is_above_it(right, status):
    own = measure(rows([1] * right + [0] * (300 - right)), "bot", METRIC, "tuned")
    (gate,) = judge({"target": ">= 0.80"}, measurements=[own])
    assert gate.status is status


def test_retention_by_benchmark_and_for_all_others():
    suite = [
        change(2000, 60, 60, "hellaswag", "base"),
        change(2000, 20, 160, "arc_easy", "base"),
        change(100, 5, 5, "piqa", "base"),
        change(300, 40, 10),
    ]
    judged = judge({"retention": {"hellaswag": 1.5, "all": 2.0, "boolq": 2.0}}, suite)
    assert {gate.name: gate.status for gate in judged} == {
        "retention.hellaswag": PASS,
        "retention.boolq": UNDECIDED,
        "retention.arc_easy": FAIL,
        "retention.piqa": UNDECIDED,
    }
    findings = {gate.name: gate.finding for gate in judged}
    assert "not measured" in findings["retention.boolq"]
    assert "rows would show it" in findings["retention.piqa"]
    assert "exact_match -7.0 points" in findings["retention.arc_easy"]
    assert [gate.name for gate in unmet(judged)] == [n for n in findings if "hellaswag" not in n]


def test_what_was_not_measured_is_not_met():
    judged = judge({"target": ">= few-shot", "retention": {"all": 2.0}})
    assert [(g.name, g.status) for g in judged] == [
        ("target", UNDECIDED),
        ("retention.all", UNDECIDED),
    ]
    assert judge({"target": ">= .5"})[0].status is UNDECIDED
    assert judge({}) == []


@given(st.integers(0, 60), st.integers(0, 60), st.floats(0.1, 9), st.floats(0.1, 9))
def test_a_wider_margin_never_judges_harder(wins, losses, one, other):
    order = [FAIL, UNDECIDED, PASS]
    c = change(400, wins, losses, "hellaswag", "base")
    narrow, wide = (
        order.index(judge({"retention": {"hellaswag": points}}, [c])[0].status)
        for points in sorted((one, other))
    )
    assert narrow <= wide


@pytest.mark.parametrize("target", ["better", ">= few shot", "> 0.8", "> few-shot - 2", ">= 80"])
def test_a_target_that_says_nothing_is_refused(target):
    with pytest.raises(ConfigError, match="write '>= few-shot'"):
        recipe(gates={"target": target})


def test_gates_in_a_recipe():
    gates = {"target": ">= few-shot - 1.5", "retention": {"hellaswag": 1.5, "all": 2}}
    assert recipe(gates=gates).evaluate.gates.retention == {"hellaswag": 1.5, "all": 2}
    with pytest.raises(ConfigError, match="no number above 0"):
        recipe(gates={"target": "> few-shot"}, fewshot=[0])
    assert recipe(gates={"target": ">= 0.8"}, fewshot=[0])
    with pytest.raises(ConfigError, match=r"gates.retention must be greater than 0, not -1"):
        recipe(gates={"retention": {"hellaswag": -1}})
