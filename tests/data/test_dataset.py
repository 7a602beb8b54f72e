import json
import subprocess
import sys
from collections import Counter

import pytest

from postgrad.config import DataConfig, ModelConfig, Recipe
from postgrad.data.dataset import (
    example_from_row,
    example_to_row,
    load_dataset,
    read_dataset,
    save_dataset,
)
from postgrad.errors import DataError, SourceError
from postgrad.run import create_run, read_jsonl
from postgrad.types import Conversation, Example, Message, Split, ToolCall, content_id

DIGITS = str.maketrans("0123456789", "qwxzjkvybg")


def rows(count, start=0):
    texts = [str((n + 1) * 7_368_787).translate(DIGITS) for n in range(start, start + count)]
    return [{"prompt": f"{text} {text[::-1]}", "completion": f"answer {text}"} for text in texts]


def write(path, items):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return str(path)


def load(train, **options):
    return load_dataset(DataConfig(train=train, **options), seed=7)


def check(dataset, name):
    return next(check for check in dataset.checks if check.name == name)


def new_run(tmp_path, train):
    recipe = Recipe(name="t", model=ModelConfig(base="x"), data=DataConfig(train=train))
    return create_run(recipe, "train", out=tmp_path / "run")


def test_one_file_becomes_three_splits_and_three_checks(tmp_path):
    path = write(tmp_path / "a.jsonl", rows(400))
    dataset = load(path)
    assert {split: len(dataset.of(split)) for split in Split} == {
        Split.TRAIN: 320,
        Split.VALIDATION: 40,
        Split.TEST: 40,
        Split.RETENTION: 0,
    }
    assert [check.name for check in dataset.checks] == [
        "rows-well-formed",
        "split-overlap",
        "held-out-size",
    ]
    assert all(check.passed for check in dataset.checks)
    assert dataset.checks[0].detail == "400 rows in 1 file(s), read as prompt-completion"
    (file,) = dataset.files
    assert (file["path"], file["uri"], file["given_as"]) == (path, path, "train")
    assert (file["format"], file["rows"], len(file["sha256"])) == ("prompt-completion", 400, 64)


def test_lists_of_files_of_several_formats(tmp_path):
    one = write(tmp_path / "a.jsonl", rows(40))
    two = write(
        tmp_path / "b.jsonl",
        [{"question": r["prompt"], "answer": "x", "id": 1} for r in rows(40, 40)],
    )
    dataset = load((one, two))
    assert len(dataset.examples) == 80
    found = dataset.checks[0]
    assert found.data["formats"] == {"prompt-completion": 1, "question-answer": 1}
    assert "columns not read: id (40)" in found.detail


def test_bad_rows_of_all_files_are_refused_together_or_dropped(tmp_path):
    one = write(tmp_path / "a.jsonl", [*rows(40), {"prompt": "x", "completion": 1}])
    two = write(tmp_path / "b.jsonl", [{"prompt": "x"}, *rows(60, 40)])
    with pytest.raises(DataError, match="2 rows cannot be used") as caught:
        load(one, test=two)
    assert f"{one}:41: completion" in caught.value.message
    assert f"{two}:1: no known format has the keys prompt" in caught.value.message
    dataset = load(one, test=two, on_invalid="drop")
    assert Counter(row.step for row in dataset.dropped) == {"invalid": 2}
    assert len(dataset.of(Split.TEST)) == 60
    assert "2 malformed rows were dropped" in dataset.checks[0].detail
    assert f"{one}:41: completion: text expected" in dataset.checks[0].rows[0]


def test_all_rows_dropped_is_an_error(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "x", "completion": ""}] * 3)
    with pytest.raises(DataError, match=r"data\.train has no usable rows"):
        load(path, on_invalid="drop")


def test_a_training_folder_leaves_out_files_that_are_given_as_held_out(tmp_path):
    write(tmp_path / "d" / "train.jsonl", rows(40))
    write(tmp_path / "d" / "more.jsonl", rows(40, 40))
    valid = write(tmp_path / "d" / "valid.jsonl", rows(30, 80))
    test = write(tmp_path / "d" / "test-00000-of-00001.jsonl", rows(30, 110))
    dataset = load(str(tmp_path / "d"), validation=valid, test=test)
    assert [len(dataset.of(s)) for s in (Split.TRAIN, Split.VALIDATION, Split.TEST)] == [80, 30, 30]
    with pytest.raises(DataError, match="held out by its name") as caught:
        load(str(tmp_path / "d"), validation=valid)
    assert "data.test=" in caught.value.remedy
    with pytest.raises(DataError, match="no training files"):
        load(str(tmp_path / "e"), test=write(tmp_path / "e" / "test.jsonl", rows(3)))


def test_one_file_cannot_be_two_splits(tmp_path):
    path = write(tmp_path / "a.jsonl", rows(40))
    other = write(tmp_path / "b.jsonl", rows(40, 40))
    with pytest.raises(DataError, match="given twice, as train and as test"):
        load(path, test=path)
    with pytest.raises(DataError, match="share a file"):
        load(other, test=path, validation=path)


def test_missing_files_and_empty_files(tmp_path):
    with pytest.raises(SourceError, match="file not found"):
        load(str(tmp_path / "a.jsonl"))
    with pytest.raises(DataError, match="the file is empty"):
        load(write(tmp_path / "a.jsonl", []))


def test_overlap_of_given_files_fails_the_check_but_returns_the_rows(tmp_path):
    train = write(tmp_path / "a.jsonl", rows(60))
    test = write(tmp_path / "b.jsonl", rows(40, 50))
    dataset = load(train, test=test)
    found = check(dataset, "split-overlap")
    assert not found.passed
    assert found.failures == 10
    assert any(row.endswith(f": same request as {test}:1") for row in found.rows)
    ids = {row.id for row in dataset.examples}
    assert len(ids) == len(dataset.examples)


def test_round_trip_through_a_run_directory(tmp_path):
    messages = [
        {"role": "user", "content": "add é 🙂"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "function": {"name": "add", "arguments": '{"a": 1}'}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "3"},
        {"role": "assistant", "content": "3", "weight": 0.5},
    ]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    items = [{"messages": messages, "tools": tools, "k": "g"}]
    for row in rows(80):
        turns = [("user", row["prompt"]), ("assistant", row["completion"])]
        chat = [{"role": role, "content": content} for role, content in turns]
        items.append({"messages": chat, "k": row["prompt"][:2]})
    items += [items[1], {"messages": [], "k": "x"}]
    train = write(tmp_path / "a.jsonl", items)
    dataset = load(train, group_by="k", on_invalid="drop", limit=20, system="S")
    assert {row.step for row in dataset.dropped} == {"invalid", "duplicate", "limit"}
    run = new_run(tmp_path, train)
    save_dataset(dataset, run)
    assert read_dataset(run) == dataset
    manifest = read_jsonl(run.manifest_path)
    assert manifest[0]["file"] == train
    splits = {line["split"]: line["rows"] for line in manifest if "split" in line}
    assert splits == {split.value: len(dataset.of(split)) for split in Split if dataset.of(split)}
    assert read_jsonl(run.kept_path)[0]["messages"][0] == {"role": "system", "content": "S"}
    lines = len(items) - 2 + 1
    assert len(dataset.examples) + len(dataset.dropped) == lines + 1


def test_examples_become_openai_rows_and_back():
    conversation = Conversation(
        (
            Message("user", "q", name="ann"),
            Message("assistant", "", (ToolCall("f", "{}", "1"), ToolCall("g", "{}", "2"))),
            Message("tool", "", tool_call_id="1"),
            Message("tool", "r", tool_call_id="2"),
            Message("assistant", "a", weight=0.0),
        )
    )
    example = Example(content_id(conversation), conversation, "a:1", None, Split.TEST)
    row = example_to_row(example)
    assert example_from_row(json.loads(json.dumps(row))) == example
    assert "tools" not in row
    assert row["messages"][1]["tool_calls"][0] == {
        "id": "1",
        "type": "function",
        "function": {"name": "f", "arguments": "{}"},
    }
    assert row["messages"][4]["weight"] == 0.0


def test_reading_a_run_without_data_says_so(tmp_path):
    with pytest.raises(DataError, match="has no data/kept"):
        read_dataset(new_run(tmp_path, "x"))


def test_no_torch():
    code = "import sys, postgrad.data.dataset; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
