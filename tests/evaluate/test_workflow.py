"""The rivals of a tuned model in one run on the tiny model: prompts searched, rows shared out."""

import json
import shutil

import pytest

from postgrad import cli, stages
from postgrad.config import load_recipe
from postgrad.data.dataset import read_dataset
from postgrad.errors import ConfigError
from postgrad.evaluate.fewshot import choose_shots
from postgrad.run import Run, read_json, read_jsonl
from postgrad.types import Split
from training import write_rows

SEARCH = {"fewshot": [0, 2], "draws": 2, "systems": ["Be brief."], "rows": 6, "minutes": None}
VARIANTS = 2 * (1 + 2 + 1 + 1)


def write_recipe(folder, model):
    write_rows(folder / "rows.jsonl", 200)
    tree = {
        "name": "tiny",
        "model": {"base": str(model), "precision": "fp32", "adapt": {"r": 4}},
        "data": {"train": str(folder / "rows.jsonl"), "validation": 0.2, "test": 0.2},
        "train": {"num_train_epochs": 1, "threads": 1, "learning_rate": 1e-2},
        "evaluate": {
            "fewshot": [0, 3],
            "fewshot_examples": ["static", "embedded"],
            "limit": 8,
            "prompt_search": SEARCH,
            "learning_curve": [0.5, 0.25],
        },
    }
    path = folder / "tiny.yaml"
    path.write_text(json.dumps(tree), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(tiny_model_dir, tmp_path_factory):
    """(recipe, run, document) of a whole run with a prompt search and a learning curve."""
    folder = tmp_path_factory.mktemp("rivals")
    path = write_recipe(folder, tiny_model_dir)
    document = stages.run(load_recipe(path), stages.Options(out=folder / "out"))
    return path, Run(folder / "out"), document


def test_the_best_prompt_is_one_more_arm_on_the_same_test_rows(finished):
    _, run, document = finished
    arms = ["base/zero-shot", "base/few-shot-3", "base/few-shot-3-embedded", "base/best-prompt"]
    assert [m["arm"] for m in document["measurements"]] == [*arms, "tuned"]
    assert [c["a"] for c in document["comparisons"]] == arms
    assert [c["arm"] for c in document["costs"]["arms"]] == [*arms, "tuned"]
    asked = [[row["example_id"] for row in read_jsonl(run.evidence_path("tiny", a))] for a in arms]
    assert asked[0] == asked[1] == asked[2] == asked[3]


def test_prompts_are_tried_on_validation_rows_and_recorded(finished):
    _, run, document = finished
    search = document["prompt_search"]
    assert search == read_json(run.measurements_path)["prompt_search"]
    assert len(search["variants"]) == search["planned"] == VARIANTS
    assert search["training_seconds"] == document["seconds"]["train"]
    validation = {example.id for example in read_dataset(run).of(Split.VALIDATION)}
    for variant in search["variants"]:
        rows = read_jsonl(run.path / variant["evidence"])
        assert len(rows) == variant["n"] == 6
        assert {row["example_id"] for row in rows} <= validation
        assert variant["value"] == sum(r["scores"]["exact_match"]["value"] for r in rows) / 6
    tokens = {v["name"]: v["prompt_tokens"] for v in search["variants"]}
    assert tokens["zero-shot"] < tokens["zero-shot-system-1"] < tokens["few-shot-2-system-1"]


def test_the_winner_answers_the_test_rows_as_it_answered_the_validation_rows(finished):
    _, run, document = finished
    search = document["prompt_search"]
    [best] = [v for v in search["variants"] if v["name"] == search["best"]]
    assert best["value"] == max(v["value"] for v in search["variants"])
    rows = read_jsonl(run.evidence_path("tiny", "base/best-prompt"))
    zero = read_jsonl(run.evidence_path("tiny", "base/zero-shot"))
    longer = {a["prompt_tokens"] - b["prompt_tokens"] for a, b in zip(rows, zero, strict=True)}
    assert (longer == {0}) == (best["name"] == "zero-shot")


def test_a_lost_winner_is_found_again_without_a_new_search(finished, tmp_path):
    path, run, document = finished
    copy = Run(shutil.copytree(run.path, tmp_path / "copy", symlinks=True))
    lost = copy.evidence_path("tiny", "base/best-prompt")
    before = [{**row, "seconds": 0} for row in read_jsonl(lost)]
    lost.unlink()
    stamps = {p: p.stat().st_mtime_ns for p in (copy.path / "evidence").glob("*search*")}
    again = stages.run(load_recipe(path), stages.Options(out=copy.path, resume=True))
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    assert [{**row, "seconds": 0} for row in read_jsonl(lost)] == before
    assert again["measurements"] == document["measurements"]


def test_shares_are_nested_and_all_else_is_the_same(finished):
    _, run, document = finished
    assert [s["share"] for s in document["learning_curve"]["shares"]] == [0.25, 0.5, 1.0]
    members = [run.inside("shares", "25"), run.inside("shares", "50"), run]
    kept = [read_dataset(member) for member in members]
    train = [{e.id for e in data.of(Split.TRAIN)} for data in kept]
    assert [len(ids) for ids in train] == [30, 60, 120]
    assert train[0] < train[1] < train[2]
    for split in (Split.VALIDATION, Split.TEST):
        assert len({data.of(split) for data in kept}) == 1
    same = ("learning_rate", "tokens_per_batch", "num_train_epochs", "eval_rows", "threads")
    assert len({tuple(getattr(m.config.train, name) for name in same) for m in members}) == 1
    assert {m.record["train"]["epochs"] for m in members} == {1}
    assert len({m.record["train"]["best_loss"] for m in members}) == 3


def test_the_curve_holds_measurements_and_a_paired_comparison(finished):
    _, run, document = finished
    curve = document["learning_curve"]
    for share in curve["shares"]:
        rows = read_jsonl(run.path / share["evidence"])
        assert len(rows) == share["n"] == 8
        assert share["value"] == sum(r["scores"]["exact_match"]["value"] for r in rows) / 8
        assert share["low"] <= share["value"] <= share["high"]
    c = curve["comparison"]
    assert (c["a"], c["b"], c["n"]) == ("tuned on 50% of the rows", "tuned", 8)
    half, whole = curve["shares"][1:]
    assert c["difference"] == pytest.approx(whole["value"] - half["value"])
    assert curve["finding"].startswith("doubling the rows (60 to 120) bought ")
    assert document["seconds"]["learning_curve"] > 0


def test_only_a_share_that_is_not_done_is_trained_again(finished, tmp_path, capsys):
    path, run, document = finished
    copy = Run(shutil.copytree(run.path, tmp_path / "copy", symlinks=True))
    shutil.rmtree(copy.inside("shares", "50").path)
    kept = copy.inside("shares", "25").metrics_path
    stamp = kept.stat().st_mtime_ns
    assert cli.call(["run", str(path), "--out", str(copy.path), "--resume", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert kept.stat().st_mtime_ns == stamp
    values = [
        [(s["rows"], s["value"]) for s in d["learning_curve"]["shares"]] for d in (again, document)
    ]
    assert values[0] == values[1]
    assert copy.changed_files() == []


def test_the_report_and_the_card_tell_it(finished, capsys):
    _, run, document = finished
    page = run.report_path.read_text(encoding="utf-8")
    card = run.card_path.read_text(encoding="utf-8")
    assert f"{VARIANTS} of {VARIANTS} prompts tried on 6 validation rows" in page
    assert "Base model, best prompt found" in page
    assert "Be brief." in page
    assert "Doubling the rows (60 to 120)" in page
    assert "Doubling the rows" in card
    assert "prompts tried on 6 validation rows" in card
    assert cli.call(["report", str(run.path)]) == 0
    said = capsys.readouterr().out
    assert "prompt search: " in said
    assert document["learning_curve"]["finding"] in said


def test_without_a_training_prompts_are_searched_and_a_curve_is_refused(finished, tmp_path):
    path, _, document = finished
    with pytest.raises(ConfigError, match="learning_curve"):
        stages.evaluate(load_recipe(path), stages.Options(out=tmp_path / "refused"))
    assert not (tmp_path / "refused").exists()
    recipe = load_recipe(
        path, ["evaluate.learning_curve=[]", "evaluate.prompt_search.max_variants=2"]
    )
    alone = stages.evaluate(recipe, stages.Options(out=tmp_path / "base"))
    assert alone["prompt_search"]["training_seconds"] is None
    names = [v["name"] for v in document["prompt_search"]["variants"]]
    assert [v["name"] for v in alone["prompt_search"]["variants"]] == names[:2]
    assert alone["measurements"][-1]["arm"] == "base/best-prompt"
    assert alone["learning_curve"] is None


def test_each_draw_has_its_own_examples(finished):
    run = finished[1]
    train = read_dataset(run).of(Split.TRAIN)
    assert choose_shots(train, 2, 7) != choose_shots(train, 2, (7, 1))


def test_of_several_seeds_the_first_searches_and_draws_the_curve(finished, tmp_path):
    few = ["evaluate.prompt_search.max_variants=2", "evaluate.learning_curve=[0.5]"]
    recipe = load_recipe(finished[0], [*few, "train.max_steps=2"])
    document = stages.run_seeds(recipe, 2, stages.Options(out=tmp_path / "out"))
    group = Run(tmp_path / "out")
    first, second = (Run(group.seeds / seed) for seed in ("7", "8"))
    assert first.inside("shares", "50").record["train"]["steps"] == 1
    assert not second.inside("shares").path.exists()
    for entry in (*document["learning_curve"]["shares"], *document["prompt_search"]["variants"]):
        assert (group.path / entry["evidence"]).is_file()
    searches = [m.evidence_path("tiny", "prompt-search").read_bytes() for m in (first, second)]
    assert searches[0] == searches[1]
    assert "Doubling the rows" in group.report_path.read_text(encoding="utf-8")
