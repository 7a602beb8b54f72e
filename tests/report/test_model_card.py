"""The model card: metadata that Hugging Face reads, and Markdown that says what is missing."""

from dataclasses import replace

import pytest
import yaml
from report_runs import SHARES, answered, recipe, write_evaluation

from postgrad.report.model_card import hub_id, write_model_card
from postgrad.run import create_run, read_json


def read_card(run) -> tuple[dict, str]:
    _, front, body = write_model_card(run).read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), body


def test_front_matter(finished):
    front, body = read_card(finished)
    assert front["license"] == "apache-2.0"
    assert front["language"] == ["en"]
    assert front["library_name"] == "peft"
    assert front["pipeline_tag"] == "text-generation"
    assert "base_model" not in front
    assert "pypi:tiny-model==1.0" in body
    result = front["model-index"][0]["results"][0]
    tuned = read_json(finished.measurements_path)["measurements"][-1]
    assert result["metrics"][0]["value"] == tuned["value"]
    assert result["metrics"][0]["type"] == "exact_match"
    low, high = 100 * tuned["low"], 100 * tuned["high"]
    name = f"exact match, 95% interval {low:.1f}\N{EN DASH}{high:.1f}%, n = 300"
    assert result["metrics"][0]["name"] == name


def test_hugging_face_reads_the_results(finished):
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard(write_model_card(finished).read_text(encoding="utf-8"))
    results = card.data.eval_results
    assert [(r.metric_type, r.metric_value, r.dataset_split) for r in results] == [
        ("exact_match", 0.86, "test")
    ]
    assert card.data.pipeline_tag == "text-generation"


@pytest.mark.parametrize(
    ("kind", "library", "relation"),
    [("lora", "peft", "adapter"), ("full", "transformers", "finetune")],
)
def test_hub_models_are_linked(tmp_path, kind, library, relation):
    asked = recipe(model__base="org/model-1B", model__adapt={"kind": kind}, data__train="org/rows")
    front, _ = read_card(create_run(asked, "train", out=tmp_path / "r"))
    assert front["base_model"] == "org/model-1B"
    assert front["base_model_relation"] == relation
    assert front["library_name"] == library
    assert front["datasets"] == ["org/rows"]
    assert "model-index" not in front


def test_local_paths_are_not_hub_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert not hub_id("models/mine")
    assert not hub_id("./org/name")
    assert not hub_id("data/train.jsonl")
    assert hub_id("org/model.v2-1B")


def test_numbers_of_the_tables(finished):
    _, body = read_card(finished)
    tree = read_json(finished.measurements_path)
    for m in tree["measurements"]:
        row = next(line for line in body.splitlines() if f"`{m['evidence']}`" in line)
        assert f"| {100 * m['value']:.1f}% |" in row
        assert "| 300 | Wilson |" in row
    for c in tree["comparisons"]:
        assert f"| {100 * c['difference']:+.1f} | {100 * c['low']:+.1f} to" in body
    assert "Rows per split: train 3,000, validation 300, test 380." in body
    assert "duplicate 31, overlength 9" in body
    assert "5 of 6 passed; waived: `supervised-fraction`" in body
    assert "> **Warning.** Waived:" in body


def test_missing_evidence_is_named(finished, tmp_path):
    _, body = read_card(finished)
    assert "Forgetting: not measured in this run." in body
    assert "Safety, bias and misuse: not measured in this run." in body
    _, bare = read_card(create_run(recipe(report__license="other"), "run", out=tmp_path / "bare"))
    assert "Not measured: no arm was evaluated." in bare
    assert "Not measured: no model was trained in this run." in bare
    assert "Licence: not stated" in bare
    assert "LoRA adapter" not in bare
    assert "None" not in bare


def test_user_text_stays_in_its_cell(finished):
    run = finished
    run.write_jsonl(run.manifest_path, [{"file": "a|b\n`c`<x>.jsonl", "format": "csv", "rows": 2}])
    arms = answered(SHARES, 10)
    arms["tuned"] = [replace(r, completion="# heading") for r in arms["tuned"]]
    write_evaluation(run, arms)
    tree = read_json(run.measurements_path)
    tree["references"] = [{"name": "a | b <b>\n# x", "value": 0.5, "source": "*bold*"}]
    run.write_json(run.measurements_path, tree)
    _, body = read_card(run)
    assert "`` a\\|b `c`<x>.jsonl ``" in body
    assert "| a \\| b \\<b\\> # x |" in body
    assert "\\*bold\\*" in body
    tables = [line for line in body.splitlines() if line.startswith("| ")]
    assert all(line.endswith(" |") for line in tables)


def test_the_card_depends_on_the_files_only(finished):
    first = write_model_card(finished).read_bytes()
    assert write_model_card(finished).read_bytes() == first


def test_attribution_of_demonstration_data(finished):
    finished.update(demo={"attribution": "Rules by Example, CC-BY-4.0"})
    assert "Attribution: Rules by Example, CC-BY-4.0" in read_card(finished)[1]
