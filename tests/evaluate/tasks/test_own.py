"""Tasks of the user's own: ten lines of YAML."""

import json

import pytest

from postgrad.errors import ConfigError, DataError
from postgrad.evaluate.benchmarks import load_benchmark
from postgrad.evaluate.tasks import Kind
from postgrad.evaluate.tasks.own import read_task

CHOICE = """
name: capitals
file: capitals.jsonl
prompt: "Question: {question}\\nAnswer:"
choices: options
answer: gold
chance: 0.5
"""


def write(folder, text, rows=()):
    (folder / "task.yaml").write_text(text, encoding="utf-8")
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "capitals.jsonl").write_text(lines, encoding="utf-8")
    return folder / "task.yaml"


@pytest.mark.parametrize("gold", [1, "1", "B", "Rome"])
def test_the_right_option_by_number_letter_or_text(tmp_path, gold):
    row = {"question": "Italy?", "options": ["Oslo", "Rome"], "gold": gold}
    path = write(tmp_path, CHOICE, [row])
    found = load_benchmark(str(path), None, None, 7)
    (item,) = found.items
    assert (item.prompt, item.gold, item.reference) == ("Question: Italy?\nAnswer:", 1, "Rome")
    assert found.task.metrics == ("acc_norm", "acc")
    assert found.chance == 0.5
    assert found.label == "capitals (1 of 1 own items)"


def test_fixed_options_and_groups(tmp_path):
    text = CHOICE.replace("choices: options", "choices: [no, 'yes']\ngroup: land")
    row = {"question": "Big?", "gold": "yes", "land": "Italy"}
    (item,) = load_benchmark(str(write(tmp_path, text, [row])), None, None, 7).items
    assert (item.options, item.gold, item.group) == (("no", "yes"), 1, "Italy")


def test_a_written_answer_is_scored(tmp_path):
    text = CHOICE.replace("choices: options", "scorer: normalized_match").replace("chance: 0.5", "")
    row = {"question": "Italy?", "gold": "Rome"}
    found = load_benchmark(str(write(tmp_path, text, [row])), None, None, 7)
    assert found.task.kind is Kind.GENERATION
    assert found.task.generation.score(" rome. ", found.items[0])["normalized_match"].passed


def test_without_options_or_scorer_the_answer_itself_is_measured(tmp_path):
    text = CHOICE.replace("choices: options\n", "").replace("chance: 0.5", "")
    row = {"question": "Italy?", "gold": "Rome"}
    found = load_benchmark(str(write(tmp_path, text, [row])), None, None, 7)
    assert (found.task.kind, found.items[0].options) == (Kind.CLOZE, (" Rome",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("chance: 0.5", "chnace: 0.5"), "chnace"),
        (("chance: 0.5", "scorer: exact_match"), "exclude each other"),
        (("name: capitals", "name: a/b"), "name"),
        (("choices: options", "scorer: regex"), "go together"),
    ],
)
def test_a_wrong_task_file_says_what_is_wrong(tmp_path, change, message):
    path = write(tmp_path, CHOICE.replace(*change))
    with pytest.raises(ConfigError, match=message):
        read_task(path)


def test_a_row_without_the_column_is_named(tmp_path):
    path = write(tmp_path, CHOICE, [{"question": "Italy?", "options": ["a", "b"]}])
    with pytest.raises(
        DataError, match=r"capitals.jsonl:1: not a row of capitals: no column 'gold'"
    ):
        load_benchmark(str(path), None, None, 7)


def test_no_such_task_file(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load_benchmark(str(tmp_path / "none.yaml"), None, None, 7)
