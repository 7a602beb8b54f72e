"""Numbers and sentences: what the reader is told, and what is never claimed."""

from dataclasses import replace

import pytest
from report_runs import (
    CHECKS,
    SHARES,
    answered,
    build_run,
    evidence,
    recipe,
    write_checks,
    write_evaluation,
)

from postgrad.report import words
from postgrad.report.collect import Training, collect
from postgrad.report.curves import Curves, HeldOut
from postgrad.run import create_run
from postgrad.types import Score


def test_figures():
    assert words.percent(0.86349) == "86.3%"
    assert words.points(0.8) == "+80.0"
    assert words.points(-0.0004) == "0.0"
    assert words.points(-0.031) == words.MINUS + "3.1"
    assert words.p_value(0.0004) == "p < 0.001"
    assert words.p_value(0.0423) == "p = 0.042"
    assert words.count(1, "row") == "1 row"
    assert words.count(12345.0, "row") == "12,345 rows"
    assert words.level(0.95) == "95%"
    assert words.level(0.999) == "99.9%"
    assert words.arm_name("base/few-shot-1") == "Base model, 1 example in the prompt"
    nearest = "Base model, 1 nearest example in the prompt"
    assert words.arm_name("base/few-shot-1-retrieved") == nearest
    assert words.arm_name("elsewhere") == "elsewhere"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "not measured"),
        (0.32384, "0.3238"),
        (0, "0"),
        (1e-3, "0.001"),
        (0.0003, "3e-4"),
        (0.00012345, "1.234e-4"),
        (4884480.0, "4.884e6"),
        (12345.6, "12,346"),
        (2.0, "2"),
    ],
)
def test_numbers_keep_their_digits(value, text):
    assert words.number(value) == text


def test_durations_and_sizes():
    assert words.duration(None) == "not measured"
    assert words.duration(59.96) == "1 min 0 s"
    assert words.duration(3599.6) == "1 h 0 min"
    assert words.size(999) == "999 B"
    assert words.size(2_310_000_000) == "2.3 GB"


def test_better(tmp_path):
    said = words.verdict(collect(build_run(tmp_path / "r")))
    assert said.kind == "improved"
    assert said.headline == "The tuned model is better."
    assert "86.0% of 300 held-out test rows" in said.summary
    assert "8 examples in the prompt) 7.0%" in said.summary
    assert "+79.0 points" in said.evidence
    assert "p < 0.001" in said.evidence


def test_prompting_wins_when_it_does(tmp_path):
    shares = {"base/zero-shot": 0.4, "base/few-shot-8": 0.8, "tuned": 0.55}
    report = collect(build_run(tmp_path / "r", shares=shares))
    said = words.verdict(report)
    assert said.kind == "worse"
    assert "Prompting the base model wins: do not ship" in said.summary
    [simple] = [w for w in words.warnings(report) if w.startswith("A simpler model may do: Linear")]
    assert "points apart (reference minus tuned)" in simple


def test_inconclusive_says_what_could_have_been_seen(tmp_path):
    shares = {"base/zero-shot": 0.5, "base/few-shot-8": 0.78, "tuned": 0.8}
    report = collect(build_run(tmp_path / "r", shares=shares, n=60))
    said = words.verdict(report)
    assert said.kind == "inconclusive"
    assert said.summary.startswith("The tuned model answers")
    assert "do not ship" not in said.summary
    detectable = f"{100 * report.evaluation.decisive.detectable:.1f} points"
    assert detectable in words.unknowns(report)[0]


def test_forgetting_and_seed_are_always_named_as_unknown(tmp_path):
    found = words.unknowns(collect(build_run(tmp_path / "r")))
    assert any(s.startswith("Forgetting: not measured") for s in found)
    assert any(s.startswith("Another seed: not measured") for s in found)
    assert any("tuned 10 of 300" in s for s in found)


def test_a_separate_test_file_and_missing_few_shot_change_what_is_unknown(tmp_path):
    own = build_run(tmp_path / "own", data__test="test.jsonl")
    assert not any("same files" in s for s in words.unknowns(collect(own)))
    zero = build_run(tmp_path / "zero", shares={"base/zero-shot": 0.1, "tuned": 0.8})
    assert any(s.startswith("Prompting with examples") for s in words.unknowns(collect(zero)))


def test_no_verdict_without_a_comparison(tmp_path):
    empty = create_run(recipe(), "train", out=tmp_path / "empty")
    assert "Nothing was trained" in words.verdict(collect(empty)).summary
    base = {arm: rows for arm, rows in answered(SHARES, 20).items() if arm != "tuned"}
    write_evaluation(empty, base)
    said = words.verdict(collect(empty))
    assert (said.kind, said.evidence) == ("none", "")
    assert "Only the base model" in said.summary
    write_evaluation(empty, {"tuned": evidence("tuned", 0.5, 20, 1)})
    assert "nothing to compare" in words.verdict(collect(empty)).summary


def test_refused_before_training(tmp_path):
    run = create_run(recipe(), "run", out=tmp_path / "r")
    write_checks(run, (CHECKS[0], replace(CHECKS[4], waived=False)))
    said = words.verdict(collect(run))
    assert said.kind == "refused"
    assert "supervised-fraction" in said.summary


def test_waived_checks_and_unfinished_runs_are_warnings(tmp_path):
    run = build_run(tmp_path / "r")
    run.update(status="interrupted")
    found = words.warnings(collect(run))
    assert found[0].startswith("Not finished")
    assert "supervised-fraction" in found[1]
    assert len(found) == 2


def test_graded_scores_are_not_called_correct_answers(tmp_path):
    run = build_run(tmp_path / "r")
    arms = answered(SHARES, 40)
    graded = {
        arm: [
            replace(row, scores={"f1": Score(0.3 + row.scores["exact_match"].value / 2, True)})
            for row in rows
        ]
        for arm, rows in arms.items()
    }
    write_evaluation(run, graded, metric="f1")
    said = words.verdict(collect(run))
    assert said.summary.startswith("Mean token F1 ")
    assert "correctly" not in said.summary


def held_out(*losses: float) -> Curves:
    rows = tuple(HeldOut(10 * i, loss, None, False) for i, loss in enumerate(losses))
    return Curves((), (), (), rows)


@pytest.mark.parametrize(
    ("losses", "part"),
    [
        ((2.0, 1.0, 0.5), "longer training may help"),
        ((2.0, 2.1, 2.2), "No step improved"),
        ((2.0, 1.0, 1.25), "rose by 0.25 nats"),
    ],
)
def test_the_shape_of_the_curve_in_words(tmp_path, losses, part):
    run = create_run(recipe(), "train", out=tmp_path / "r")
    report = replace(collect(run), curves=held_out(*losses))
    assert part in " ".join(words.training_notes(report))


def test_a_restored_loss_that_differs_is_told(tmp_path):
    run = create_run(recipe(), "train", out=tmp_path / "r")
    training = Training(best_step=5, best_loss=0.5, last_step=9, stopped="end")
    for restored, part in ((0.5, "exactly the same loss"), (0.51, "0.51")):
        report = replace(collect(run), training=replace(training, restored_loss=restored))
        assert part in " ".join(words.training_notes(report))
    assert "measured again" not in " ".join(
        words.training_notes(replace(collect(run), training=training))
    )
