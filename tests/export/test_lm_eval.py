"""A recipe's test set as a task of lm-evaluation-harness, and its sample logs back as evidence."""

import json

import pytest
import yaml

from postgrad import cli
from postgrad.config import load_recipe, parse_recipe
from postgrad.data.dataset import load_dataset, save_dataset
from postgrad.errors import DataError
from postgrad.evaluate.runner import sample_test
from postgrad.export.lm_eval import import_samples, read_samples
from postgrad.run import create_run, read_jsonl
from postgrad.types import Split


def write_recipe(folder, **evaluate):
    rows = [{"question": f"What is {n} and {n * n}?", "answer": f"{2 * n}"} for n in range(60)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(lines, encoding="utf-8")
    tree = {
        "name": "sums",
        "model": {"base": "model"},
        "data": {"train": str(folder / "rows.jsonl"), "validation": 0.2, "test": 0.5,
                 "near_duplicate": None, "system": "Add."},
        "evaluate": {"scorer": "numeric", "limit": 12, **evaluate},
    }  # fmt: skip
    path = folder / "sums.yaml"
    path.write_text(json.dumps(tree), encoding="utf-8")
    return path


def sample(number, row, completion, **fields):
    """A line as lm-evaluation-harness 0.4.13 logs it."""
    return {
        "doc_id": number,
        "doc": row,
        "target": row["answer"],
        "arguments": {"gen_args_0": {"arg_0": f"<user>{row['prompt']}", "arg_1": {"until": []}}},
        "resps": [[completion]],
        "filtered_resps": [completion],
        "filter": "none",
        "metrics": ["exact_match"],
        "doc_hash": f"hash-{number}",
        "exact_match": float(completion == row["answer"]),
        **fields,
    }


def write_log(folder, model, samples):
    path = folder / model / "samples_sums_2026.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(line) + "\n" for line in samples), encoding="utf-8")
    return path


@pytest.fixture
def exported(tmp_path, monkeypatch, capsys):
    """(recipe path, folder of the task, its test rows)."""
    monkeypatch.chdir(tmp_path)
    path = write_recipe(tmp_path)
    assert cli.call(["export", "lm-eval", str(path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["export"] == "sums-lm-eval"
    return path, tmp_path / "sums-lm-eval", read_jsonl(tmp_path / document["files"][1])


def test_the_task_asks_the_rows_that_evaluate_asks(exported):
    path, folder, rows = exported
    recipe = load_recipe(path)
    dataset = load_dataset(recipe.data, recipe.seed)
    asked = sample_test(dataset.of(Split.TEST), recipe.evaluate.limit, recipe.seed)
    assert [row["id"] for row in rows] == [example.id for example in asked]
    first = asked[0].conversation.messages
    assert rows[0] == {
        "id": asked[0].id,
        "system": "Add.",
        "prompt": first[1].content,
        "answer": first[2].content,
    }
    train = read_jsonl(folder / "sums.train.jsonl")
    assert {row["id"] for row in train} == {example.id for example in dataset.of(Split.TRAIN)}


def test_the_task_file_names_its_rows_and_how_to_ask_them(exported):
    _, folder, _ = exported
    task = yaml.safe_load((folder / "sums.yaml").read_text(encoding="utf-8"))
    files = task["dataset_kwargs"]["data_files"]
    assert files == {"test": "sums.test.jsonl", "train": "sums.train.jsonl"}
    assert (task["task"], task["output_type"]) == ("sums", "generate_until")
    assert (task["doc_to_text"], task["doc_to_target"]) == ("prompt", "answer")
    assert task["description"] == "{{system}}"
    assert task["generation_kwargs"] == {"until": [], "do_sample": False, "max_gen_toks": 8}


def test_a_run_gets_its_task_among_its_deliverables(tmp_path, capsys):
    recipe = load_recipe(write_recipe(tmp_path, max_new_tokens=30))
    run = create_run(recipe, "train", tmp_path / "run")
    save_dataset(load_dataset(recipe.data, recipe.seed), run)
    assert cli.call(["export", "lm-eval", str(run.path)]) == 0
    assert str(run.export / "lm-eval") in capsys.readouterr().out
    task = yaml.safe_load((run.export / "lm-eval" / "sums.yaml").read_text(encoding="utf-8"))
    assert task["generation_kwargs"]["max_gen_toks"] == 30
    assert cli.call(["export", "lm-eval", str(run.path), "seed=1"]) == 2


def test_sample_logs_are_scored_by_the_recipe_and_compared(exported, tmp_path, capsys):
    path, folder, rows = exported
    worse = [sample(n, row, f"it is {row['answer']}" if n < 6 else "0.5") for n, row in
             enumerate(rows)]  # fmt: skip
    better = [sample(n, row, f"It must be {row['answer']}.0") for n, row in enumerate(rows)]
    logs = [write_log(tmp_path, "small", worse), write_log(tmp_path, "org__large", better)]
    options = [part for log in logs for part in ("--samples", str(log))]
    assert cli.call(["export", "lm-eval", str(path), *options, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    small, large = document["measurements"]
    assert (small["arm"], small["metric"], small["value"]) == ("lm-eval/small", "numeric", 0.5)
    assert (large["arm"], large["value"], large["n"]) == ("lm-eval/org__large", 1.0, 12)
    (compared,) = document["comparisons"]
    assert (compared["a"], compared["b"]) == ("lm-eval/small", "lm-eval/org__large")
    assert (compared["method"], compared["wins"], compared["losses"]) == ("mcnemar-exact", 6, 0)
    evidence = read_jsonl(folder / large["evidence"])
    assert [row["example_id"] for row in evidence] == [row["id"] for row in rows]


def test_logs_of_other_rows_are_not_compared(exported, tmp_path):
    path, folder, rows = exported
    samples = [sample(n, row, row["answer"]) for n, row in enumerate(rows)]
    logs = [write_log(tmp_path, "a", samples), write_log(tmp_path, "b", samples[1:])]
    with pytest.raises(DataError, match="not evaluated on the same rows"):
        import_samples(logs, load_recipe(path), folder)
    assert not (folder / "evidence").exists()


def test_logs_of_the_harness_s_own_tasks_keep_their_scores(tmp_path):
    settings = load_recipe(write_recipe(tmp_path)).evaluate
    choice = {
        "doc_id": 0, "doc": {"question": "q", "choices": ["x", "y"]}, "target": "1",
        "arguments": {"gen_args_0": {"arg_0": "q", "arg_1": " x"}, "gen_args_1": {}},
        "resps": [[[-2.5, False]], [[-1.5, True]]], "filtered_resps": [[-2.5, False], [-1.5, True]],
        "filter": "none", "metrics": ["acc", "acc_norm", "bits"], "doc_hash": "h",
        "acc": 1.0, "acc_norm": 0.0, "bits": 7.2,
    }  # fmt: skip
    log = write_log(tmp_path, "model", [choice, {**choice, "doc_id": 1}])
    first, second = read_samples(log, settings)
    assert {name: score.value for name, score in first.scores.items()} == {"acc": 1, "acc_norm": 0}
    assert (first.prompt, first.reference) == ("q", "1")
    assert json.loads(first.completion) == [[-2.5, False], [-1.5, True]]
    assert (first.example_id, second.example_id) == ("h", "h-2")


def test_several_filters_become_several_metrics(tmp_path):
    settings = load_recipe(write_recipe(tmp_path)).evaluate
    row = {"prompt": "q", "answer": "1"}
    lines = [sample(0, row, "1", filter="strict"), sample(0, row, "2", filter="flexible")]
    (found,) = read_samples(write_log(tmp_path, "model", lines), settings)
    scores = {name: score.value for name, score in found.scores.items()}
    assert scores == {"exact_match,strict": 1, "exact_match,flexible": 0}


def test_what_is_no_sample_log_is_refused(tmp_path):
    settings = load_recipe(write_recipe(tmp_path)).evaluate
    with pytest.raises(DataError, match="not a sample log"):
        read_samples(tmp_path / "rows.jsonl", settings)
    with pytest.raises(DataError, match="has no samples"):
        read_samples(tmp_path / "missing.jsonl", settings)


def test_rows_of_several_turns_are_refused(tmp_path, capsys):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    lines = "".join(
        json.dumps({"messages": [{"role": "user", "content": f"{n}"}, turns[1], *turns]}) + "\n"
        for n in range(20)
    )
    (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8")
    data = {"train": str(tmp_path / "rows.jsonl"), "validation": 0.2, "test": 0.4,
            "near_duplicate": None}  # fmt: skip
    tree = {"name": "talk", "model": {"base": "m"}, "data": data}
    path = tmp_path / "talk.yaml"
    path.write_text(json.dumps(tree), encoding="utf-8")
    assert parse_recipe(tree)
    assert cli.call(["export", "lm-eval", str(path), "--out", str(tmp_path / "out")]) == 3
    assert "several turns or tools" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
