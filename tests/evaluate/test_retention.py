"""Benchmarks in whole runs of the tiny model: both arms, resumed, reported, and a reference."""

import json
import math
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from postgrad import console, stages
from postgrad.config import load_recipe
from postgrad.errors import ConfigError
from postgrad.evaluate.benchmarks import load_benchmark
from postgrad.evaluate.evidence import read_evidence
from postgrad.evaluate.prompts import requests
from postgrad.report.collect import collect
from postgrad.run import Run, read_jsonl
from postgrad.types import Message
from training import write_rows

NAMES = ("mmlu", "winogrande", "lambada_openai", "words")
TASK = """
name: words
file: words.jsonl
prompt: "{question}"
answer: answer
scorer: contains
max_new_tokens: 3
until: ["\\n"]
"""


def write_benchmarks(folder):
    """Small made rows in the public files' forms."""
    folder.mkdir()
    words = ("yes", "no", "maybe", "number", "answer")
    rows = {
        "mmlu": [
            {
                "subject": ("anatomy", "virology")[n % 2],
                "question": f"question {n}",
                "choices": [f"{word} {n}" for word in words[:4]],
                "answer": n % 4,
            }
            for n in range(16)
        ],
        "winogrande": [
            {"sentence": f"{n} _ is the answer.", "option1": "yes", "option2": "no", "answer": "1"}
            for n in range(6)
        ],
        "lambada_openai": [{"text": f"the answer {n} is {words[n]}"} for n in range(5)],
        "words": [{"question": f"say {word}: ", "answer": word} for word in words],
    }
    rows["lambada_openai"].append({"text": f"{'word ' * 3000}end"})
    for name, made in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in made)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    (folder / "words.yaml").write_text(TASK, encoding="utf-8")
    return folder


def write_recipe(folder, model, **evaluate):
    write_rows(folder / "rows.jsonl", 160)
    named = [*NAMES[:3], str(folder / "benchmarks" / "words.yaml")]
    tree = {
        "name": "tiny",
        "model": {"base": str(model), "precision": "fp32", "adapt": {"r": 4}},
        "data": {"train": str(folder / "rows.jsonl"), "validation": 0.2, "test": 0.2},
        "train": {"max_steps": 2, "threads": 1, "learning_rate": 0.5},
        "evaluate": {
            "fewshot": [0],
            "limit": 4,
            "max_new_tokens": 2,
            "retention": named,
            "benchmarks": str(folder / "benchmarks"),
            **evaluate,
        },
    }
    path = folder / "tiny.yaml"
    path.write_text(json.dumps(tree), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(tiny_model_dir, tmp_path_factory):
    """(folder, run, document) of a whole run with four benchmarks."""
    folder = tmp_path_factory.mktemp("retention")
    write_benchmarks(folder / "benchmarks")
    recipe = load_recipe(write_recipe(folder, tiny_model_dir))
    document = stages.run(recipe, stages.Options(out=folder / "out"))
    return folder, Run(folder / "out"), document


def test_both_arms_answer_the_same_items_with_intervals(finished):
    _, run, document = finished
    general = [m for m in document["measurements"] if m["task"] in NAMES]
    assert {(m["task"], m["arm"]) for m in general} == {
        (name, arm) for name in NAMES for arm in ("base", "tuned")
    }
    for m in general:
        rows = read_jsonl(run.path / m["evidence"])
        asked = [row for row in rows if row["error"] is None]
        assert m["n"] == len(asked if m["metric"] == "perplexity" else rows)
        assert m["low"] <= m["value"] <= m["high"]
    for name in NAMES:
        base, tuned = (read_evidence(run, name, arm) for arm in ("base", "tuned"))
        assert [row.example_id for row in base] == [row.example_id for row in tuned]
    compared = [c["task"] for c in document["comparisons"] if c["a"] == "base"]
    assert compared == list(NAMES)
    assert {row.group for row in read_evidence(run, "mmlu", "base")} == {"anatomy", "virology"}


def test_likelihoods_and_choices_are_those_of_a_plain_model(finished, tiny_model_dir):
    folder, run, _ = finished
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    for name in NAMES[:3]:
        benchmark = load_benchmark(name, folder / "benchmarks", None, 7)
        rows = {row.example_id: row for row in read_evidence(run, name, "base")}
        for item in benchmark.items:
            row = rows[item.id]
            if row.error:
                continue
            asked = requests(benchmark, item, None)
            expected = [plain(model, tokenizer, *pair) for pair in asked]
            assert list(row.logprobs) == pytest.approx([total for total, _ in expected], abs=1e-3)
            right = expected[0][1]
            if name != "lambada_openai":
                totals = [total for total, _ in expected]
                right = totals.index(max(totals)) == item.gold
            assert row.scores["acc"].passed == right


def plain(model, tokenizer, context, continuation):
    before = tokenizer(context)["input_ids"]
    whole = tokenizer(context + continuation)["input_ids"]
    with torch.no_grad():
        logprobs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    pairs = [(position, whole[position]) for position in range(len(before), len(whole))]
    total = sum(float(logprobs[position - 1, token]) for position, token in pairs)
    return total, all(int(logprobs[p - 1].argmax()) == token for p, token in pairs)


def test_an_item_beyond_the_context_is_an_error_that_counts_as_wrong(finished):
    _, run, document = finished
    failed = [row for row in read_evidence(run, "lambada_openai", "base") if row.error]
    assert len(failed) == 1
    assert "the model's context has 2048" in failed[0].error
    figures = [m for m in document["measurements"] if m["task"] == "lambada_openai"]
    found = {m["metric"]: (m["n"], m["errors"]) for m in figures if m["arm"] == "base"}
    assert found == {"acc": (6, 1), "perplexity": (5, 0)}  # what was not asked has no likelihood
    perplexity = next(m for m in figures if m["metric"] == "perplexity")
    rows = [r for r in read_evidence(run, "lambada_openai", "base") if not r.error]
    mean = -sum(row.logprobs[0] for row in rows) / len(rows)
    assert perplexity["value"] == pytest.approx(math.exp(mean))


def test_a_subset_is_never_called_by_the_benchmarks_name_alone(finished):
    _, run, document = finished
    labels = [task["label"] for task in document["retention"]]
    assert labels[0].startswith("mmlu (16 of 14,042 test items, ")
    assert labels[3] == "words (5 of 5 own items)"
    shown = console.result_text(document) + run.card_path.read_text(encoding="utf-8")
    shown += run.report_path.read_text(encoding="utf-8")
    assert shown.count("mmlu (16 of 14,042 test items") >= 4


def test_the_target_keeps_its_verdict_and_its_own_table(finished):
    _, run, document = finished
    evaluation = collect(run).evaluation
    assert {m.task for m in evaluation.measurements} == {"tiny"}
    assert evaluation.decisive.task == "tiny"
    assert [b.task for b in evaluation.retention.benchmarks] == list(NAMES)
    assert "zero-shot prompting" in document["verdict"]


def test_what_was_answered_is_not_asked_again(finished, monkeypatch):
    _, run, document = finished
    kept = {p.name: p.stat().st_mtime_ns for p in (run.path / "evidence").glob("*.jsonl")}
    monkeypatch.setattr("postgrad.evaluate.models.load", lambda *_: pytest.fail("loaded a model"))
    again = stages.evaluate(run, stages.Options())
    assert again["measurements"] == document["measurements"]
    assert kept == {p.name: p.stat().st_mtime_ns for p in (run.path / "evidence").glob("*.jsonl")}


def test_an_arm_that_is_missing_is_measured_again_and_equal(finished, tmp_path):
    _, run, _ = finished
    copy = Run(shutil.copytree(run.path, tmp_path / "copy"))
    for arm in ("base", "tuned"):
        copy.evidence_path("mmlu", arm).unlink()
    stages.evaluate(copy, stages.Options())
    for arm in ("base", "tuned"):
        old, new = (read_evidence(r, "mmlu", arm) for r in (run, copy))
        assert [row.scores for row in old] == [row.scores for row in new]
    differ = [
        a.logprobs != b.logprobs
        for a, b in zip(
            *(read_evidence(copy, "mmlu", arm) for arm in ("base", "tuned")), strict=True
        )
    ]
    assert all(differ)


def test_under_the_chat_template_the_prompt_is_a_message(tmp_path):
    benchmark = load_benchmark("mmlu", write_benchmarks(tmp_path / "b"), 1, 7)
    turns = []

    def chat(messages):
        turns.extend(messages)
        return "<rendered>"

    found = requests(benchmark, benchmark.items[0], chat)
    assert found == [("<rendered>", letter) for letter in "ABCD"]
    item = benchmark.items[0]
    assert turns == [Message("system", item.description), Message("user", item.prompt)]


def test_a_missing_benchmark_stops_the_run_before_training(tiny_model_dir, tmp_path):
    write_benchmarks(tmp_path / "benchmarks")
    recipe = load_recipe(write_recipe(tmp_path, tiny_model_dir, retention=["mmluu"]))
    with pytest.raises(ConfigError, match="no task mmluu"):
        stages.run(recipe, stages.Options(out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
