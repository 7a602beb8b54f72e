import json
import shutil
from dataclasses import asdict, replace

import pytest
from report_runs import TASK, answered, evidence, recipe, write_evaluation

from postgrad import cli
from postgrad.errors import DataError, RunError
from postgrad.evaluate.compare import compare, measure
from postgrad.evaluate.compare_runs import compare_runs, plan_rows
from postgrad.evaluate.evidence import read_evidence, write_evidence
from postgrad.evaluate.statistics import items_needed
from postgrad.run import Run, read_json
from test_shape import modules_after


def build(path, tuned, *, n=200, retention=(0.5, 0.45), **changes):
    """An evaluated run: its test rows and one benchmark on base and tuned model."""
    from postgrad.run import create_run

    run = create_run(recipe(**changes), "run", out=path)
    arms = answered({"base/zero-shot": 0.2, "tuned": 0.5}, n)
    arms["tuned"] = evidence(f"tuned-{path.name}", tuned, n, seed=1)
    write_evaluation(run, arms)
    document = read_json(run.measurements_path)
    names = ("base", "tuned")
    for task in ("piqa", "boolq"):
        rows = {
            arm: evidence(f"{arm}{path.name}{task}", share, 400, 2)
            for arm, share in zip(names, retention, strict=True)
        }
        for arm, found in rows.items():
            write_evidence(run, task, arm, found)
            measured = asdict(measure(found, task, "exact_match", arm))
            document["measurements"] += [measured, {**measured, "metric": "perplexity"}]
        c = compare(rows["base"], rows["tuned"], task, "exact_match", "base", "tuned")
        document["comparisons"].append(asdict(c))
    run.write_json(run.measurements_path, document)
    return run


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    return build(folder / "small", 0.5), build(folder / "large", 0.8, train__num_train_epochs=3)


def test_shared_arms_are_compared_on_shared_tasks(pair):
    found = compare_runs(*pair)
    assert found["runs"] == [str(run.path) for run in pair]
    assert [(c["task"], c["a"], c["b"]) for c in found["comparisons"]] == [
        (TASK, "small:base/zero-shot", "large:base/zero-shot"),
        (TASK, "small:tuned", "large:tuned"),
        ("piqa", "small:base", "large:base"),
        ("piqa", "small:tuned", "large:tuned"),
        ("boolq", "small:base", "large:base"),
        ("boolq", "small:tuned", "large:tuned"),
    ]
    tuned = found["comparisons"][1]
    a, b = (read_evidence(run, TASK, "tuned") for run in pair)
    expected = compare(a, b, TASK, "exact_match", "x", "y")
    assert (tuned["difference"], tuned["p"], tuned["low"]) == (
        expected.difference,
        expected.p,
        expected.low,
    )
    assert found["verdict"].startswith("large:tuned beats small:tuned by ")
    assert found["recipe"] == {"train.num_train_epochs": [2.0, 3.0]}
    assert found["unshared"] == []
    assert found["comparisons"][0]["difference"] == 0
    assert [c["corrected"] is None for c in found["comparisons"]] == [True] * 2 + [False] * 4


def test_a_run_equals_itself_and_the_other_order_is_the_mirror(pair):
    same = compare_runs(pair[0], pair[0])
    assert {c["difference"] for c in same["comparisons"]} == {0}
    one, other = compare_runs(*pair), compare_runs(*reversed(pair))
    for a, b in zip(one["comparisons"], other["comparisons"], strict=True):
        assert a["difference"] == -b["difference"]
        assert a["p"] == b["p"]


def test_other_rows_are_refused_by_name(pair, tmp_path):
    short = build(tmp_path / "short", 0.5, n=150)
    with pytest.raises(DataError, match=r"50 examples only in small:base/zero-shot"):
        compare_runs(pair[0], short)


def changed(run, path, task, arm, **fields):
    """A copy of a run whose first row of one arm is another."""
    copy = Run(shutil.copytree(run.path, path))
    first, *rest = read_evidence(copy, task, arm)
    write_evidence(copy, task, arm, [replace(first, **fields), *rest])
    return copy


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reference": "another"}, "1 examples with another reference"),
        ({"prompt": "Which?"}, "were not asked the same: 1 of 400 requests differ"),
    ],
)
def test_changed_rows_are_refused_by_name(pair, tmp_path, fields, message):
    with pytest.raises(DataError, match=message):
        compare_runs(pair[0], changed(pair[1], tmp_path / "copy", "piqa", "tuned", **fields))


def test_another_scorer_no_shared_arm_and_no_evaluation_are_refused(pair, tmp_path):
    copy = Run(shutil.copytree(pair[1].path, tmp_path / "copy"))
    document = read_json(copy.measurements_path)
    for m in document["measurements"]:
        m["metric"] = "f1"
    copy.write_json(copy.measurements_path, {**document, "metric": "f1"})
    with pytest.raises(DataError, match="exact_match in small, f1 in copy"):
        compare_runs(pair[0], copy)
    own = [m for m in read_json(pair[1].measurements_path)["measurements"] if m["task"] != TASK]
    copy.write_json(copy.measurements_path, {**document, "metric": "exact_match"})
    copy.write_json(
        copy.measurements_path, {"task": TASK, "metric": "exact_match", "measurements": own}
    )
    with pytest.raises(DataError, match=r"tuned in small, no arm in copy"):
        compare_runs(pair[0], copy)
    copy.measurements_path.unlink()
    with pytest.raises(RunError, match="was not evaluated"):
        compare_runs(pair[0], copy)
    (copy.path / "seeds").mkdir()
    with pytest.raises(RunError, match="several seeds"):
        compare_runs(pair[0], copy)


def test_the_command(pair, tmp_path, capsys):
    a, b = (str(run.path) for run in pair)
    assert cli.call(["compare", a, b]) == 0
    out = capsys.readouterr().out
    assert "verdict: large:tuned beats small:tuned" in out
    assert "train.num_train_epochs  2.0 -> 3.0" in out
    assert cli.call(["compare", a, b, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["comparisons"]) == 6
    short = build(tmp_path / "short", 0.5, n=150)
    assert cli.call(["compare", a, str(short.path), "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "DataError"
    assert cli.call(["compare", a]) == 2
    assert cli.call(["compare", a, b, a]) == 2
    assert cli.call(["compare", a, str(tmp_path)]) == 1


def test_the_planner_with_and_without_a_run(pair, capsys):
    rows = plan_rows(2)["plan"]["rows"]
    assert [row["discordance"] for row in rows] == [0.05, 0.1, 0.15, 0.2, 0.3]
    assert rows[1]["rows_to_show"]["0.8"] == items_needed(0.02, discordance=0.1)
    assert min(row["discordance"] for row in plan_rows(20)["plan"]["rows"]) == 0.2
    planned = plan_rows(2, pair[:1])["plan"]["rows"]
    c = read_json(pair[0].measurements_path)["comparisons"][0]
    assert planned[0]["discordance"] == (c["wins"] + c["losses"]) / c["n"]
    assert [row["task"] for row in planned] == [TASK, "piqa", "boolq"]
    assert len(plan_rows(2, pair)["plan"]["rows"]) == 6
    assert cli.call(["compare", "--plan", "2"]) == 0
    assert "show: a true difference of 2 points" in capsys.readouterr().out
    assert cli.call(["compare", "--plan", "2", str(pair[0].path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["rows"] == planned
    assert cli.call(["compare", "--plan", "0"]) == 2


def test_clustered_and_graded_comparisons_are_planned_by_their_deviation(pair, tmp_path):
    copy = Run(shutil.copytree(pair[0].path, tmp_path / "copy"))
    rows = [read_evidence(copy, "piqa", arm) for arm in ("base", "tuned")]
    grouped = [[replace(row, group=str(i // 20)) for i, row in enumerate(found)] for found in rows]
    document = read_json(copy.measurements_path)
    for found in (rows, grouped):
        c = compare(*found, "piqa", "exact_match", "base", "tuned")
        document["comparisons"] = [asdict(c)]
        copy.write_json(copy.measurements_path, document)
        (row,) = plan_rows(c.detectable * 100, [copy])["plan"]["rows"]
        assert row["rows_to_show"]["0.8"] == pytest.approx(400, abs=2)


def test_comparing_loads_no_torch(pair):
    code = "import sys; from postgrad.cli import call; assert call(sys.argv[1:]) == 0"
    loaded = modules_after(code, "compare", *(run.path for run in pair))
    assert "torch" not in loaded
