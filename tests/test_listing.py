import pytest

from postgrad.config import parse_recipe
from postgrad.errors import RunError
from postgrad.listing import describe_run, list_summaries, summarize
from postgrad.run import create_run

RECIPE = parse_recipe({"name": "bot", "model": {"base": "m"}, "data": {"train": "rows.jsonl"}})
TUNED = {
    "task": "bot",
    "metric": "f1",
    "arm": "tuned",
    "value": 0.8,
    "low": 0.7,
    "high": 0.9,
    "n": 9,
}


@pytest.fixture
def run(tmp_path):
    return create_run(RECIPE, "run", root=tmp_path)


def test_a_run_is_running_only_while_a_process_holds_it(run):
    with run.lock():
        assert summarize(run)["status"] == "running"
    assert summarize(run)["status"] == "stopped"


def test_a_failed_run_says_why_until_somebody_resumes_it(run):
    run.update(status="failed", error="the disk is full")
    assert summarize(run)["status"] == "failed"
    assert summarize(run)["problem"] == "the disk is full"
    with run.lock():
        assert summarize(run)["status"] == "running"


def test_a_finished_run_shows_verdict_tuned_value_and_seconds(run):
    base = {**TUNED, "arm": "base/zero-shot", "value": 0.0}
    run.measurements_path.parent.mkdir()
    comparisons = [
        {"a": "base/zero-shot", "b": "tuned", "difference": 0.8, "verdict": "improved"},
        {"a": "base/few-shot-8", "b": "tuned", "difference": 0.01, "verdict": "inconclusive"},
    ]
    results = {"measurements": [base, TUNED], "comparisons": comparisons}
    run.write_json(run.measurements_path, results)
    run.update(verdict="inconclusive: 9 rows")
    run.add_seconds("train", 2)
    run.add_seconds("data", 1)
    run.seal()
    found = summarize(run)
    assert (found["status"], found["tuned"]) == ("done", TUNED)
    assert (found["verdict"], found["outcome"]) == ("inconclusive: 9 rows", "inconclusive")
    assert found["seconds"] == 3


def test_a_damaged_run_is_listed_with_its_problem(run, tmp_path):
    run.record_path.write_text("{")
    other = create_run(RECIPE, "run", root=tmp_path)
    found = list_summaries(tmp_path)
    assert [row["run"] for row in found] == [str(run.path), str(other.path)]
    assert found[0]["status"] == "unreadable"
    assert "not JSON" in found[0]["problem"]


def test_changes_after_the_seal_are_found(run):
    run.report_path.write_text("report")
    assert describe_run(run.path)["changed"] is None
    run.seal()
    assert describe_run(run.path)["changed"] == []
    run.report_path.write_text("better numbers")
    run.recipe_path.unlink()
    assert describe_run(run.path)["changed"] == ["recipe.yaml", "report.html"]


def test_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(RunError, match="not a run directory"):
        describe_run(tmp_path)
