"""A whole recipe on the tiny model, in one process: what lies in the run directory afterwards."""

import itertools
import json
import shutil

import pytest

from postgrad import cli, stages
from postgrad.config import load_recipe
from postgrad.data.dataset import read_dataset
from postgrad.errors import RunError
from postgrad.model import int8
from postgrad.run import Run, create_run, find_resumable, read_json, read_jsonl, verify_checksums
from postgrad.strict_yaml import parse_yaml
from postgrad.types import Split
from training import write_rows


def write_recipe(folder, model, count=200, **train):
    write_rows(folder / "rows.jsonl", count)
    tree = {
        "name": "tiny",
        "model": {"base": str(model), "precision": "fp32", "adapt": {"r": 4, "lora_dropout": 0.1}},
        "data": {"train": str(folder / "rows.jsonl"), "validation": 0.2, "test": 0.2},
        "train": {"max_steps": 2, "threads": 1, "learning_rate": 1e-2, **train},
        "evaluate": {"fewshot": [0, 3], "limit": 8, "max_new_tokens": 6},
    }
    path = folder / "tiny.yaml"
    path.write_text(json.dumps(tree), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(tiny_model_dir, tmp_path_factory):
    """(recipe, out, document) of a run that trained, merged, evaluated and reported."""
    folder = tmp_path_factory.mktemp("stages")
    path = write_recipe(folder, tiny_model_dir, merge=True)
    recipe = load_recipe(path)
    return path, folder / "out", stages.run(recipe, stages.Options(out=folder / "out"))


def test_it_leaves_a_report_a_card_and_a_seal(finished):
    _, out, document = finished
    run = Run(out)
    assert run.report_path.stat().st_size > 10_000
    assert "model-index" in run.card_path.read_text(encoding="utf-8")
    assert document["report"] == str(run.report_path)
    assert run.record["status"] == "done"
    assert run.changed_files() == []
    assert not run.in_use
    assert not list(out.rglob("*.tmp"))


def test_every_arm_is_measured_on_the_same_test_rows(finished):
    _, out, document = finished
    arms = ["base/zero-shot", "base/few-shot-3", "base/few-shot-3-retrieved", "tuned"]
    assert [m["arm"] for m in document["measurements"]] == arms
    tests = {example.id for example in read_dataset(Run(out)).of(Split.TEST)}
    asked = []
    for measured in document["measurements"]:
        rows = read_jsonl(out / measured["evidence"])
        assert measured["n"] == len(rows) == 8
        assert measured["low"] <= measured["value"] <= measured["high"]
        asked.append([row["example_id"] for row in rows])
    assert asked[0] == asked[1] == asked[2] == asked[3]
    assert set(asked[0]) <= tests
    assert [(c["a"], c["b"]) for c in document["comparisons"]] == [
        (arms[0], "tuned"),
        (arms[1], "tuned"),
        (arms[2], "tuned"),
    ]


def test_the_cost_of_a_request_and_the_break_even_are_in_the_document(finished):
    _, out, document = finished
    costs, arms = document["costs"], [m["arm"] for m in document["measurements"]]
    assert costs == read_json(Run(out).measurements_path)["costs"]
    assert [c["arm"] for c in costs["arms"]] == arms
    zero, *few, tuned = (c["prompt_tokens"]["mean"] for c in costs["arms"])
    assert zero == tuned < min(few)
    assert [b["arm"] for b in costs["break_even"]] == arms[:-1]
    assert {b["training_seconds"] for b in costs["break_even"]} == {document["seconds"]["train"]}


def test_no_row_and_no_request_is_in_two_splits(finished):
    _, out, _ = finished
    rows = read_jsonl(Run(out).kept_path)
    seen = {split: [row for row in rows if row["split"] == split] for split in Split}
    assert [len(seen[s]) for s in (Split.TRAIN, Split.VALIDATION, Split.TEST)] == [120, 40, 40]
    assert len({row["id"] for row in rows}) == len(rows) == 200
    requests = [{row["messages"][0]["content"] for row in seen[split]} for split in Split]
    assert sum(map(len, requests)) == len(set().union(*requests))


def test_the_deliverables_are_whole_and_measured(finished):
    _, out, document = finished
    run = Run(out)
    for name in ("adapter", "merged"):
        verify_checksums(run.export / name)
    merge = run.record["merge"]
    assert abs(merge["loss_after"] - merge["loss_before"]) < 1e-5
    assert document["train"]["restored_loss"] == document["train"]["best_loss"]
    assert set(document["seconds"]) >= {"data", "preflight", "train", "evaluate", "report"}
    assert read_json(run.preflight_path)["passed"] is True


def test_the_written_recipes_are_the_given_and_the_resolved_one(finished):
    path, out, _ = finished
    run = Run(out)
    assert run.recipe == load_recipe(path)
    train = run.config.train.model_dump()
    assert "auto" not in (train["learning_rate"], train["tokens_per_batch"], train["eval_steps"])
    assert run.config.hash() != run.recipe.hash()


def test_resuming_a_finished_run_trains_nothing_again(finished, capsys):
    path, out, document = finished
    run = Run(out)
    before = run.metrics_path.read_bytes()
    evidence = run.evidence_path("tiny", "tuned").stat().st_mtime_ns
    assert cli.call(["run", str(path), "--out", str(out), "--resume", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert run.metrics_path.read_bytes() == before
    assert run.evidence_path("tiny", "tuned").stat().st_mtime_ns == evidence
    assert again["measurements"] == document["measurements"]
    assert again["train"] == document["train"]


def test_only_the_missing_arm_is_evaluated_again(finished):
    path, out, document = finished
    run = Run(out)
    lost, kept = run.evidence_path("tiny", "tuned"), run.evidence_path("tiny", "base/zero-shot")
    before = [{**row, "seconds": 0} for row in read_jsonl(lost)]
    lost.unlink()
    stamp = kept.stat().st_mtime_ns
    again = stages.run(load_recipe(path), stages.Options(out=out, resume=True))
    assert kept.stat().st_mtime_ns == stamp
    assert [{**row, "seconds": 0} for row in read_jsonl(lost)] == before
    assert again["measurements"] == document["measurements"]


def test_a_second_run_in_the_same_directory_is_refused(finished, capsys):
    path, out, _ = finished
    assert cli.call(["run", str(path), "--out", str(out)]) == 1
    assert "--resume" in capsys.readouterr().err
    changed = ["run", str(path), "train.max_steps=3", "--out", str(out), "--resume"]
    assert cli.call(changed) == 1
    assert "train.max_steps: 2 there, 3 here" in capsys.readouterr().err
    with Run(out).lock():
        assert cli.call(["run", str(path), "--out", str(out), "--resume"]) == 1
    assert "in use by another process" in capsys.readouterr().err


def test_a_kill_while_the_directory_was_made_does_not_block_it(finished, tmp_path):
    recipe = load_recipe(finished[0])
    (tmp_path / ".lock").touch()
    (tmp_path / ".run.json.4711.tmp").write_text("{")
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert find_resumable(recipe, "run", tmp_path) is None
    assert create_run(recipe, "run", tmp_path).record["status"] == "running"


def test_someone_elses_recipe_in_the_directory_is_not_overwritten(finished, tmp_path):
    mine = tmp_path / "recipe.yaml"
    mine.write_text("name: mine\n", encoding="utf-8")
    with pytest.raises(RunError, match="not empty"):
        create_run(load_recipe(finished[0]), "run", tmp_path)
    assert mine.read_text(encoding="utf-8") == "name: mine\n"


def test_a_refused_run_says_why_and_goes_on_once_waived(tiny_model_dir, tmp_path, capsys):
    path = write_recipe(tmp_path, tiny_model_dir, count=30)
    assert cli.call(["run", str(path), "--out", str(tmp_path / "out")]) == 3
    assert "held-out-size" in capsys.readouterr().err
    assert Run(tmp_path / "out").record["status"] == "failed"
    waived = ["run", str(path), "train.waive=[held-out-size]", "--out", str(tmp_path / "waived")]
    assert cli.call([*waived, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["train"]["steps"] == 2
    [check] = [
        check
        for check in read_json(Run(tmp_path / "waived").preflight_path)["checks"]
        if check["name"] == "held-out-size"
    ]
    assert (check["passed"], check["waived"]) == (False, True)


def test_too_few_rows_for_the_prompt_are_found_before_training(tiny_model_dir, tmp_path, capsys):
    path = write_recipe(tmp_path, tiny_model_dir)
    out = tmp_path / "out"
    for change in ("evaluate.fewshot=[0, 121]", "evaluate.prompt_search={fewshot: [0, 121]}"):
        for verb in ("run", "evaluate"):
            assert cli.call([verb, str(path), change, "--out", str(out)]) == 2
            assert "121 examples in the prompt, TRAIN has 120 rows" in capsys.readouterr().err
            assert set(Run(out).record["seconds"]) == {"data"}
            shutil.rmtree(out)
        assert cli.call(["doctor", str(path), change]) == 2
        assert "TRAIN has 120 rows" in capsys.readouterr().err
    found = load_recipe(path, ["evaluate.fewshot=[0, 120]"])
    assert stages.doctor(found)["checks"]


def test_a_gate_that_is_not_met_is_told_and_ends_with_4(finished, tmp_path, capsys):
    _, out, _ = finished
    copy = Run(shutil.copytree(out, tmp_path / "copy", symlinks=True))
    gates = {"target": ">= 0.99"}
    for recipe_path in (copy.recipe_path, copy.config_path):
        tree = parse_yaml(recipe_path.read_text(encoding="utf-8"), "recipe")
        tree["evaluate"]["gates"] = gates
        recipe_path.write_text(json.dumps(tree), encoding="utf-8")
    assert cli.call(["evaluate", str(copy.path), "--json"]) == 4
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert [g["name"] for g in document["gates"]] == ["target"]
    assert document["gates"][0]["status"] == "FAIL"
    assert "gate not met: target" in captured.err
    assert cli.call(["evaluate", str(copy.path)]) == 4
    assert "gates: 0 of 1 met" in capsys.readouterr().out
    assert cli.call(["report", str(copy.path)]) == 0
    assert "&gt;= 0.99" in copy.report_path.read_text(encoding="utf-8")
    assert copy.record["status"] == "done"


@pytest.fixture(scope="module")
def seeded(tiny_model_dir, tmp_path_factory):
    """(recipe, out, document, err) of three seeds, the first time stopped after the second."""
    folder = tmp_path_factory.mktemp("seeds")
    path = write_recipe(folder, tiny_model_dir)
    options = stages.Options(out=folder / "out")
    stages.run_seeds(load_recipe(path), 2, options)
    stamps = {p: p.stat().st_mtime_ns for p in (folder / "out" / "seeds").rglob("*.jsonl")}
    code = cli.call(["run", str(path), "--seeds", "3", "--out", str(folder / "out"), "--resume"])
    assert code == 0
    return path, folder / "out", stages.document(Run(folder / "out")), stamps


def test_seeds_share_the_rows_and_differ_in_training(seeded):
    path, out, document, _ = seeded
    members = [Run(out / "seeds" / seed) for seed in ("7", "8", "9")]
    assert [m.recipe.seed for m in members] == [7, 8, 9]
    assert {m.recipe.data_seed for m in members} == {7}
    assert load_recipe(path).data_seed == 7
    kept = {m.kept_path.read_bytes() for m in members}
    assert len(kept) == 1
    asked = {
        tuple(row["example_id"] for row in read_jsonl(m.evidence_path("tiny", arm)))
        for m in members
        for arm in ("base/zero-shot", "base/few-shot-3", "base/few-shot-3-retrieved", "tuned")
    }
    assert len(asked) == 1
    base = {m.evidence_path("tiny", "base/few-shot-3").read_bytes() for m in members}
    assert len(base) == 1
    losses = {m.record["train"]["best_loss"] for m in members}
    assert len(losses) == 3
    assert document["verdict"].startswith("over 3 seeds: ")
    assert Run(out).record["seeds"] == [7, 8, 9]


def test_finished_seeds_are_not_run_again(seeded):
    _, out, _, stamps = seeded
    assert stamps
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    assert Run(out).record["status"] == "done"
    assert Run(out).changed_files() == []


def test_the_combined_document_keeps_seeds_and_rows_apart(seeded, capsys):
    path, out, document, _ = seeded
    spread = {s["against"]: s for s in document["seeds"]}
    retrieved = "base/few-shot-3-retrieved"
    assert set(spread) == {"", "base/zero-shot", "base/few-shot-3", retrieved}
    own = spread[""]
    values = [
        [row["scores"]["exact_match"]["value"] for row in read_jsonl(
            Run(out / "seeds" / seed).evidence_path("tiny", "tuned"))]
        for seed in ("7", "8", "9")
    ]  # fmt: skip
    means = [sum(v) / len(v) for v in values]
    assert own["values"] == pytest.approx(means)
    tuned = document["measurements"][-1]
    assert (tuned["arm"], tuned["method"], tuned["n"]) == ("tuned", "two-level", 8)
    assert [tuned["low"], tuned["high"]] == own["over_both"]
    assert [c["method"] for c in document["comparisons"]] == ["two-level"] * 3
    assert "Seeds and rows apart" in Run(out).report_path.read_text(encoding="utf-8")
    assert "Another seed: not measured" not in Run(out).report_path.read_text(encoding="utf-8")
    assert cli.call(["report", str(out)]) == 0
    assert "over 3 seeds:" in capsys.readouterr().out
    assert cli.call(["run", str(path), "--out", str(out), "--resume"]) == 1
    assert "another command" in capsys.readouterr().err
    assert cli.call(["run", str(path), "--seeds", "1"]) == 2


def test_seeds_are_all_trained_in_the_precision_of_the_first(tiny_model_dir, tmp_path, monkeypatch):
    """A trial by time decides once: the spread over seeds must hold nothing else."""
    turn = itertools.cycle([True, False])
    monkeypatch.setattr(int8, "SMALLEST", 1)
    monkeypatch.setattr(int8, "pays", lambda weight: next(turn))
    recipe = load_recipe(
        write_recipe(tmp_path, tiny_model_dir, max_steps=6, eval_steps=3),
        ["model.precision=bf16", "evaluate.fewshot=[]"],
    )
    stages.run_seeds(recipe, 3, stages.Options(out=tmp_path / "out"))
    members = [Run(path) for path in (tmp_path / "out" / "seeds").iterdir()]
    assert [m.config.train.base_precision for m in members] == ["int8"] * 3
    assert [m.record["train"]["base_precision"] for m in members] == ["int8"] * 3
