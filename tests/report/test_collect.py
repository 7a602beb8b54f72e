"""The tree says what the files say: nothing invented, nothing lost, damage named."""

import json
from dataclasses import replace

import pytest
from report_runs import SHARES, TASK, answered, recipe, write_data, write_evaluation, write_training

from postgrad.errors import RunError
from postgrad.report.collect import Training, collect
from postgrad.run import create_run


def test_figures_are_those_of_the_files(finished):
    report = collect(finished)
    tree = json.loads(finished.measurements_path.read_text())
    for measured, row in zip(report.evaluation.measurements, tree["measurements"], strict=True):
        assert (measured.arm, measured.value, measured.low, measured.n) == (
            row["arm"],
            row["value"],
            row["low"],
            row["n"],
        )
    assert report.training.tokens_per_second == finished.record["train"]["tokens_per_second"]
    assert report.data.splits == {"train": 3000, "validation": 300, "test": 380}
    assert {step: len(rows) for step, rows in report.data.dropped_by_step.items()} == {
        "duplicate": 31,
        "overlength": 9,
    }
    assert report.resolved
    assert report.recipe.train.learning_rate == 1e-3
    assert report.cost == pytest.approx(0.4 * sum(report.seconds.values()) / 3600)
    assert report.lengths.counts[1] == 1020


def test_the_verdict_rests_on_the_best_base_arm(finished):
    evaluation = collect(finished).evaluation
    assert evaluation.best_base.arm == "base/few-shot-8"
    assert evaluation.decisive.a == "base/few-shot-8"
    assert evaluation.main[-1].arm == "tuned"


def test_pairs_agree_with_the_comparison(finished):
    evaluation = collect(finished).evaluation
    answers, decisive = evaluation.answers, evaluation.decisive
    assert answers.count("win") == decisive.wins
    assert answers.count("loss") == decisive.losses
    assert len(answers.pairs) == decisive.n
    right = answers.count("win") + answers.count("both-right")
    assert right / decisive.n == evaluation.tuned.value


def test_an_answer_that_failed_counts_as_zero_and_shows_its_error(finished):
    arms = answered(SHARES)
    arms["tuned"] = [replace(r, error="out of memory", scores={}) for r in arms["tuned"]]
    write_evaluation(finished, arms)
    evaluation = collect(finished).evaluation
    assert evaluation.tuned.value == 0
    assert evaluation.answers.count("win") == 0
    assert evaluation.answers.pairs[0].tuned.startswith("[error: out of memory]")
    assert [f.errors for f in evaluation.flaws] == [0, 0, 300]


def test_a_run_that_only_trained(tmp_path):
    run = create_run(recipe(), "train", out=tmp_path / "r")
    write_data(run)
    write_training(run)
    report = collect(run)
    assert report.evaluation is None
    assert report.checks is None
    assert report.lengths is None
    assert not report.resolved
    assert report.cost is None
    assert report.training.best_step == 112
    assert len(report.curves.loss) == 160
    assert report.curves.held_out[0].step == 0


def test_an_empty_run(tmp_path):
    report = collect(create_run(recipe(), "run", out=tmp_path / "r"))
    assert (report.training, report.curves, report.data, report.merge) == (None, None, None, None)
    assert report.waived == ()


def test_base_arms_only_have_no_pairs(tmp_path):
    run = create_run(recipe(), "evaluate", out=tmp_path / "r")
    arms = {arm: rows for arm, rows in answered(SHARES, 10).items() if arm != "tuned"}
    write_evaluation(run, arms)
    evaluation = collect(run).evaluation
    assert evaluation.tuned is None
    assert evaluation.decisive is None
    assert evaluation.answers is None
    assert len(evaluation.main) == 2


def test_measurements_without_their_evidence_files(finished):
    finished.evidence_path(TASK, "tuned").unlink()
    evaluation = collect(finished).evaluation
    assert evaluation.tuned.n == 300
    assert evaluation.answers is None


def test_rows_without_a_partner_are_counted(finished):
    path = finished.evidence_path(TASK, "tuned")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-7]))
    answers = collect(finished).evaluation.answers
    assert (len(answers.pairs), answers.unpaired) == (293, 7)


def test_missing_figures_of_training_are_none(finished):
    finished.update(train={"best_step": 3})
    training = collect(finished).training
    assert training.best_step == 3
    assert training.tokens_per_second is None


def test_lengths_without_a_histogram(finished):
    table = {"rows": 9, "median": 80, "p90": 200, "longest": 412, "max_length": 1024, "over": 0}
    check = {"name": "lengths", "passed": True, "detail": "fine", "data": table}
    finished.write_json(finished.preflight_path, {"passed": True, "checks": [check]})
    lengths = collect(finished).lengths
    assert lengths.quantiles == {"median": 80, "p90": 200, "longest": 412, "max_length": 1024}
    assert lengths.counts == ()


def test_non_finite_metrics_are_gaps(tmp_path):
    run = create_run(recipe(), "train", out=tmp_path / "r")
    run.metrics(1, 10, 0.1, **{"train/loss": float("nan"), "train/grad_norm": 1.0})
    run.metrics(2, 20, 0.2, **{"train/loss": 0.5})
    curves = collect(run).curves
    assert curves.loss == ((2, 0.5),)
    assert curves.gradient_norm == ((1, 1.0),)


@pytest.mark.parametrize(
    ("field", "value", "part"),
    [("value", "high", "measurement: value"), ("n", None, "measurement: n")],
)
def test_a_damaged_measurement_names_file_and_field(finished, field, value, part):
    tree = json.loads(finished.measurements_path.read_text())
    tree["measurements"][0][field] = value
    finished.write_json(finished.measurements_path, tree)
    with pytest.raises(RunError, match=part) as caught:
        collect(finished)
    assert "measurements.json" in caught.value.message
    assert caught.value.remedy


def test_evidence_without_the_metric_is_refused(finished):
    path = finished.evidence_path(TASK, "tuned")
    path.write_text(path.read_text().replace('"exact_match"', '"f1"', 1))
    with pytest.raises(RunError, match="1 rows have no exact_match score"):
        collect(finished)


def test_metrics_without_a_step_are_refused(finished):
    finished.metrics_path.write_text('{"loss": 1}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl:1: no step"):
        collect(finished)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"precision": "bfloat16"}, "bfloat16"),
        ({"precision": "bfloat16", "base_precision": "model"}, "bfloat16"),
        ({"precision": None, "base_precision": "int8"}, None),
        (
            {"precision": "bfloat16", "base_precision": "int8"},
            "bfloat16, frozen weights in int8 while training",
        ),
    ],
)
def test_what_training_computed_in(facts, words):
    assert Training(**facts).precision_in_words == words
