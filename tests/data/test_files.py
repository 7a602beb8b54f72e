import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from postgrad.data.files import Problem, RawRow, data_files, read_rows
from postgrad.errors import DataError

ROWS = [{"prompt": "héllo", "completion": "1"}, {"prompt": "b\nc", "completion": "2"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def write(path, content):
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


def values(path):
    rows = list(read_rows(path))
    assert all(isinstance(row, RawRow) for row in rows), rows
    return [row.values for row in rows]


def problems(path):
    return [row for row in read_rows(path) if isinstance(row, Problem)]


CSV = 'prompt,completion\r\nhéllo,1\r\n"b\nc",2\r\n'


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.ndjson", LINES.replace("\n", "\r\n") + "\n  \n"),
        ("a.json", json.dumps(ROWS)),
        ("a.json", json.dumps(ROWS, indent=2, ensure_ascii=False)),
        ("a.json", json.dumps({"version": [1], "data": ROWS, "note": "x"}, indent=1)),
        ("a.json", json.dumps({"data": ROWS})),
        ("a.json", LINES),
        ("a.csv", CSV),
        ("a.tsv", CSV.replace(",", "\t")),
    ],
)
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_every_file_kind_gives_the_same_rows(tmp_path, name, content, packed, bom):
    assert values(write(tmp_path / (name + packed), bom + content.encode())) == ROWS


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    messages = [[{"role": "user", "content": "x"}]] * 2500
    pyarrow.parquet.write_table(pyarrow.table({"messages": messages}), path)
    rows = list(read_rows(path))
    assert len(rows) == 2500
    assert rows[2400].values == {"messages": messages[0]}
    assert rows[2400].source == f"{path}:2401"
    write(path, path.read_bytes()[:-20])
    assert "not a whole Parquet file" in problems(path)[0].text


@pytest.mark.parametrize("extension", ["jsonl", "json", "csv"])
def test_sources_name_the_line(tmp_path, extension):
    content = {
        "jsonl": "\n" + LINES,
        "json": json.dumps(ROWS, indent=2),
        "csv": 'prompt,completion\n\n"b\nc",2\nx,3\n',
    }[extension]
    path = write(tmp_path / f"a.{extension}", content)
    expected = {"jsonl": [2, 3], "json": [2, 6], "csv": [3, 5]}[extension]
    assert [row.source for row in read_rows(path)] == [f"{path}:{line}" for line in expected]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"prompt": "x"', "not JSON"),
        (b"[1, 2]", "a JSON object expected, got a list"),
        (b'"text"', "a JSON object expected, got text ('text')"),
        (b"null", "got nothing"),
        (b'{"prompt": "a", "prompt": "b"}', "the key 'prompt' stands twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"prompt": "\xff"}', "byte 0xff at offset 54"),
    ],
)
def test_bad_lines_are_reported_in_place_and_the_rest_is_read(tmp_path, line, problem):
    first = LINES.encode().split(b"\n")[0].ljust(41) + b"\n"
    path = write(tmp_path / "a.jsonl", first + line + b"\n" + first)
    rows = list(read_rows(path))
    assert [type(row) for row in rows] == [RawRow, Problem, RawRow]
    assert rows[1].source == f"{path}:2"
    assert problem in rows[1].text
    assert not rows[1].fatal


def test_utf8_errors_in_tables_and_arrays(tmp_path):
    path = write(tmp_path / "a.csv", b"prompt,completion\na,1\n\xe9,2\nb,3\n")
    found = list(read_rows(path))
    assert [type(row) for row in found] == [RawRow, Problem, RawRow]
    assert str(found[1]).startswith(f"{path}:3: not UTF-8: byte 0xe9 at offset 22")
    path = write(tmp_path / "a.json", b'[\n{"prompt":\n"\xe9"}]')
    assert str(problems(path)[0]).startswith(f"{path}:3: not UTF-8: byte 0xe9 at offset 14")
    path = write(tmp_path / "b.jsonl", LINES.encode("utf-16"))
    assert "UTF-16" in problems(path)[0].text


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz"])
@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff"])
def test_empty_files_are_fatal(tmp_path, name, content):
    found = list(read_rows(write(tmp_path / name, content)))
    assert [problem.text for problem in found] == ["the file is empty: no rows"]
    assert found[0].fatal


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('[{"a": 1}, {"a": 2}', "not JSON: ',' or ']' expected"),
        ('[{"a": 1} {"a": 2}]', "not JSON: ',' or ']' expected"),
        ('[{"a": 1}] x', "more text after the end"),
        ('{\n"data": [{"a": 1}]', "ends inside an object"),
        ('{\n"rows": [{"a": 1}]}', 'a JSON array of rows or {"data": [rows]} expected'),
        ('"x"', "a JSON array of rows"),
        ("[nope]", "not JSON"),
    ],
)
def test_broken_json_files_say_what_is_wrong(tmp_path, content, problem):
    found = problems(write(tmp_path / "a.json", content))
    assert len(found) == 1
    assert problem in found[0].text
    assert found[0].fatal


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("prompt;completion\na;b\n", "separate the cells by commas"),
        ("prompt,prompt\na,b\n", "empty or repeated names"),
        (",prompt\na,b\n", "empty or repeated names"),
        ('prompt,completion\n"a,b\nc,d\n', "not a table"),
        ("prompt,completion\na,b,c\n", "3 cells, but the header has 2"),
    ],
)
def test_broken_tables_say_what_is_wrong(tmp_path, content, problem):
    assert problem in problems(write(tmp_path / "a.csv", content))[0].text


def test_wrong_gzip_files(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(LINES.encode())
    assert "not gzip" in problems(path)[0].text
    path.write_bytes(gzip.compress(LINES.encode() * 99)[:-30])
    cut = [row for row in read_rows(path) if isinstance(row, Problem)]
    assert "cut off" in cut[-1].text
    assert cut[-1].fatal
    plain = tmp_path / "a.jsonl"
    plain.write_bytes(gzip.compress(LINES.encode()))
    assert "name that ends in .gz" in problems(plain)[0].text


def test_folders_hold_all_their_data_files_sorted(tmp_path):
    for name in ("b.jsonl", "a.csv", "deep/c.json.gz", ".hidden/d.jsonl", "dataset_info.json"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    (tmp_path / "notes.txt").write_text("")
    found = [str(path.relative_to(tmp_path)) for path in data_files(tmp_path, "x")]
    assert found == ["a.csv", "b.jsonl", "deep/c.json.gz"]


def test_paths_that_hold_no_rows(tmp_path):
    with pytest.raises(DataError, match="no data files"):
        data_files(tmp_path, "x")
    (tmp_path / "data-00000.arrow").write_text("")
    with pytest.raises(DataError, match="to_parquet"):
        data_files(tmp_path, "x")
    for name, problem in (
        ("a.xlsx", "cannot be read from a .xlsx"),
        ("README", "without suffix"),
        ("a.parquet.gz", "compressed inside"),
    ):
        path = tmp_path / name
        path.write_text("x")
        with pytest.raises(DataError, match=problem):
            data_files(path, "x")


def test_unreadable_file_is_a_problem_not_a_crash(tmp_path):
    found = problems(tmp_path / "gone.jsonl")
    assert "No such file" in found[0].text
    assert found[0].fatal
