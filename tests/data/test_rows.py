import json
import tracemalloc

import pytest

from postgrad.config import ColumnsConfig, DataConfig
from postgrad.data.files import Problem
from postgrad.data.rows import read_file, refuse_or_drop
from postgrad.errors import ConfigError, DataError
from postgrad.types import content_id


def write(path, rows):
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def pair(prompt="p", completion="c", **more):
    return {"prompt": prompt, "completion": completion, **more}


def read(path, **options):
    return read_file(path, DataConfig(train=str(path), **options))


def test_good_rows_become_examples_and_bad_rows_problems(tmp_path):
    rows = [pair("a"), "{broken", pair("b", ""), pair("c", note=1), {"prompt": "d"}]
    path = write(tmp_path / "a.jsonl", rows)
    found = read(path)
    assert [example.source for example in found.examples] == [f"{path}:1", f"{path}:4"]
    assert found.examples[0].id == content_id(found.examples[0].conversation)
    assert [str(problem) for problem in found.problems] == [
        f"{path}:2: not JSON: Expecting property name enclosed in double quotes at column 2",
        f"{path}:3: completion: empty",
        f"{path}:5: completion: missing; the row has prompt",
    ]
    assert found.facts["format"] == "prompt-completion"
    assert found.facts["rows"] == 5
    assert len(found.facts["sha256"]) == 64
    assert found.ignored == {"note": 1}


def test_a_file_without_any_known_row_is_one_error_not_many(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "x", "label": "y"}] * 30)
    with pytest.raises(DataError, match=r"a\.jsonl:1: no known format has the keys label, text"):
        read(path)


def test_later_rows_of_another_meaning_are_problems_not_ignored(tmp_path):
    rows = [{"question": "q", "answer": "a"}, {"question": "q", "answer": "a", "context": "c"}]
    path = write(tmp_path / "a.jsonl", rows)
    found = read(path)
    assert "'context'" in found.problems[0].text
    settled = read(path, format="question-answer")
    assert not settled.problems
    assert settled.ignored == {"context": 1}


def test_refusal_lists_all_bad_rows_up_to_twenty(tmp_path):
    path = write(tmp_path / "a.jsonl", [pair(), *[pair("p", 7)] * 25])
    with pytest.raises(DataError) as caught:
        refuse_or_drop(read(path).problems, "refuse")
    lines = caught.value.message.splitlines()
    assert lines[0] == "25 rows cannot be used"
    assert lines[1] == f"  {path}:2: completion: text expected, got a number (7)"
    assert len(lines) == 22
    assert lines[-1] == "  and 5 more"
    assert "data.on_invalid=drop" in caught.value.remedy


def test_drop_writes_every_bad_row_to_the_ledger(tmp_path):
    path = write(tmp_path / "a.jsonl", [pair(), *[pair("p", 7)] * 25])
    dropped = refuse_or_drop(read(path).problems, "drop")
    assert [row.source for row in dropped] == [f"{path}:{line}" for line in range(2, 27)]
    assert {row.step for row in dropped} == {"invalid"}
    assert {row.reason for row in dropped} == {"completion: text expected, got a number (7)"}
    assert len({row.id for row in dropped}) == 25


def test_an_unreadable_file_cannot_be_dropped():
    with pytest.raises(DataError, match="cut off"):
        refuse_or_drop([Problem("a.gz", "", "cut off", fatal=True)], "drop")


def test_groups_come_from_the_raw_row(tmp_path):
    rows = [pair("a", g="x"), pair("b", g=7), pair("c", g=7.0), pair("d", g=" x ")]
    found = read(write(tmp_path / "a.jsonl", rows), group_by="g")
    assert [example.group for example in found.examples] == ["x", "7", "7", "x"]
    assert not found.ignored
    bad = [pair("a"), pair("b", g=None), pair("c", g=""), pair("d", g=["x"])]
    found = read(write(tmp_path / "b.jsonl", bad), group_by="g")
    assert [problem.field for problem in found.problems] == ["g"] * 4
    assert "missing; the row has prompt, completion" in found.problems[0].text


def test_a_group_column_does_not_disturb_detection(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "q", "answer": "a", "document": "d1"}])
    assert read(path, group_by="document").examples[0].group == "d1"


def test_prompt_template_is_refused_where_it_would_be_ignored(tmp_path):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = write(tmp_path / "a.jsonl", [{"messages": messages}])
    with pytest.raises(ConfigError, match="prompt_template applies to single-turn"):
        read(path, prompt_template="Q: {prompt}")


def test_named_columns(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,text,label\n1,hello,greeting\n2,bye,\n")
    columns = ColumnsConfig(prompt="text", completion="label")
    found = read(path, format="columns", columns=columns)
    assert found.examples[0].conversation.answer == "greeting"
    assert str(found.problems[0]) == f"{path}:3: label: empty"
    assert found.ignored == {"id": 2}


def test_rows_are_small_in_memory(tmp_path):
    path = write(tmp_path / "a.jsonl", [pair(f"request {n}", f"answer {n}") for n in range(5000)])
    tracemalloc.start()
    found = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found.examples) == 5000
    assert peak < 5000 * 2000
