"""Files to raw rows, streamed, with the file and line of every row.

JSONL, CSV, TSV and Parquet are read row by row; a JSON array is held as text while its elements are
decoded one at a time. All but Parquet may be gzip-compressed (`.gz`). Text must be UTF-8.
"""

import codecs
import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn, cast

from postgrad.errors import DataError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_METADATA = ("dataset_info.json", "dataset_infos.json")
_GZIP = b"\x1f\x8b"
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as it stands in the file; `source` is file:line."""

    source: str
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a row cannot be used. `fatal`: the rest of the file cannot be read either."""

    source: str
    field: str
    text: str
    fatal: bool = False

    def __str__(self) -> str:
        """Return `file:line: field: what is wrong`."""
        return ": ".join(part for part in (self.source, self.field, self.text) if part)


class _Unreadable(Exception):
    """The rest of a file cannot be read; carries the line, if there is one, and the reason."""

    def __init__(self, text: str, line: int | None = None) -> None:
        super().__init__(text)
        self.text = text
        self.line = line


def data_files(path: Path, uri: str) -> list[Path]:
    """Return the data files at a path: the file itself, or all in a folder, sorted, recursively.

    Raises:
        DataError: Nothing there that can be read as rows.
    """
    if path.is_file():
        _suffix(path)
        return [path]
    files = sorted(
        file
        for file in path.rglob("*")
        if file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
        and _plain_suffix(file) in SUFFIXES
        and file.name not in _METADATA
    )
    if not files:
        saved = any(path.rglob("*.arrow"))
        raise DataError(
            f"{uri}: no data files in this folder ({', '.join(SUFFIXES)}, each also .gz)",
            "export it with Dataset.to_parquet or to_json" if saved else "check data.train",
        )
    return files


def _plain_suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _suffix(path: Path) -> str:
    suffix = _plain_suffix(path)
    if suffix not in SUFFIXES:
        raise DataError(
            f"{path}: rows cannot be read from a {suffix or 'file without suffix'}",
            f"save it as one of {', '.join(SUFFIXES)} (each but .parquet also .gz)",
        )
    if suffix == ".parquet" and path.name.lower().endswith(".gz"):
        raise DataError(f"{path}: Parquet is compressed inside", "unpack the .gz")
    return suffix


def read_rows(path: Path) -> Iterator[RawRow | Problem]:
    """Yield the rows of a file in order; what cannot be read comes as a `Problem` in its place."""
    suffix = _suffix(path)
    found = False
    try:
        for row in _READERS[suffix](path):
            found = True
            yield row
        if not found:
            yield Problem(str(path), "", "the file is empty: no rows", fatal=True)
    except _Unreadable as error:
        where = str(path) if error.line is None else f"{path}:{error.line}"
        yield Problem(where, "", error.text, fatal=True)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        reason = "cut off" if isinstance(error, EOFError) else f"damaged or not gzip ({error})"
        yield Problem(str(path), "", f"the .gz file is {reason}; compress it again", fatal=True)
    except OSError as error:
        yield Problem(str(path), "", f"cannot be read: {error.strerror or error}", fatal=True)


def _open(path: Path) -> IO[bytes]:
    """Open for reading bytes, unpacking .gz; refuse what is visibly not UTF-8 text."""
    packed = path.name.lower().endswith(".gz")
    with path.open("rb") as file:
        head = file.read(4)
    if not packed and head.startswith(_GZIP):
        raise _Unreadable("this is a gzip file: give it a name that ends in .gz")
    if not packed and head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise _Unreadable("this is UTF-16 text: save it as UTF-8")
    return cast(IO[bytes], gzip.open(path, "rb")) if packed else path.open("rb")


def _not_utf8(error: UnicodeDecodeError, start: int) -> str:
    byte = error.object[error.start]
    return f"not UTF-8: byte 0x{byte:02x} at offset {start + error.start}; save the file as UTF-8"


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys)


def _decode(text: str) -> Any:
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("not usable: nested too deeply") from None


def _row(source: str, value: Any) -> RawRow | Problem:
    if isinstance(value, dict):
        return RawRow(source, value)
    return Problem(source, "", f"a JSON object expected, got {describe(value)}")


def describe(value: Any) -> str:
    """Return a value as messages show it: its JSON kind and the beginning of it."""
    if value is None:
        return "nothing"
    kinds = {bool: "true/false", int: "a number", float: "a number", str: "text", list: "a list"}
    kinds[dict] = "an object"
    kind = kinds.get(type(value), type(value).__name__)
    shown = repr(value)
    return f"{kind} ({shown if len(shown) <= 40 else shown[:37] + '...'})"


def _read_jsonl(path: Path) -> Iterator[RawRow | Problem]:
    offset = 0
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            start, offset = offset, offset + len(line)
            if number == 1 and line.startswith(codecs.BOM_UTF8):
                line, start = line[3:], 3
            if not line.strip():
                continue
            source = f"{path}:{number}"
            try:
                yield _row(source, _decode(line.decode("utf-8").strip()))
            except UnicodeDecodeError as error:
                yield Problem(source, "", _not_utf8(error, start))
            except ValueError as error:
                yield Problem(source, "", str(error))


def _read_json(path: Path) -> Iterator[RawRow | Problem]:
    """Yield the elements of an array, of {"data": [...]}, or of JSON lines under a .json name."""
    with _open(path) as file:
        data = file.read().removeprefix(codecs.BOM_UTF8)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _Unreadable(_not_utf8(error, 0), data.count(b"\n", 0, error.start) + 1) from None
    del data
    start = _skip(text, 0)
    if start == len(text):
        return
    if text[start] != "[" and _is_json_lines(text, start):
        yield from _read_jsonl(path)
        return
    array = start if text[start] == "[" else _find_data(text, start)
    end = yield from _read_array(path, text, array)
    closing = _skip(text, end)
    if text[start] == "{":
        closing = _finish_object(text, closing)
    if closing != len(text):
        raise _Unreadable("not JSON: more text after the end", _line(text, closing))


def _skip(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def _value(text: str, position: int) -> tuple[Any, int]:
    try:
        value, end = _DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        raise _Unreadable(f"not JSON: {error.msg} at column {error.colno}", error.lineno) from None
    except (ValueError, RecursionError) as error:
        raise _Unreadable(f"not usable: {error}", _line(text, position)) from None
    return value, _skip(text, end)


def _is_json_lines(text: str, start: int) -> bool:
    """Whether the first line is an object of its own that is not the {"data": [...]} wrapper."""
    end = text.find("\n", start)
    try:
        first = _decode(text[start : None if end < 0 else end].strip())
    except ValueError:
        return False
    return isinstance(first, dict) and not isinstance(first.get("data"), list)


def _wrong_top(text: str, position: int) -> NoReturn:
    raise _Unreadable('a JSON array of rows or {"data": [rows]} expected', _line(text, position))


def _member(text: str, position: int) -> tuple[str, int]:
    """Read `"key" :` of an object; return the key and where its value starts."""
    if text[position : position + 1] != '"':
        _wrong_top(text, position)
    key, position = _value(text, position)
    if text[position : position + 1] != ":":
        raise _Unreadable("not JSON: ':' expected", _line(text, position))
    return key, _skip(text, position + 1)


def _find_data(text: str, start: int) -> int:
    """Return where the array of {"data": [...]} starts."""
    if text[start] != "{":
        _wrong_top(text, start)
    position = _skip(text, start + 1)
    while True:
        key, position = _member(text, position)
        if key == "data" and text[position : position + 1] == "[":
            return position
        _, position = _value(text, position)
        if text[position : position + 1] != ",":
            _wrong_top(text, start)
        position = _skip(text, position + 1)


def _finish_object(text: str, position: int) -> int:
    """Check the members after the array and return where the file should end."""
    while text[position : position + 1] == ",":
        _, position = _member(text, _skip(text, position + 1))
        _, position = _value(text, position)
    if text[position : position + 1] != "}":
        raise _Unreadable("not JSON: the file ends inside an object", _line(text, position))
    return _skip(text, position + 1)


def _read_array(path: Path, text: str, start: int) -> Generator[RawRow | Problem, None, int]:
    """Yield the rows of an array one by one; return the position after it."""
    position, line, counted = _skip(text, start + 1), 1, 0
    if text[position : position + 1] == "]":
        return position + 1
    while True:
        line += text.count("\n", counted, position)
        counted = position
        value, position = _value(text, position)
        yield _row(f"{path}:{line}", value)
        mark = text[position : position + 1]
        if mark == "]":
            return position + 1
        if mark != ",":
            raise _Unreadable("not JSON: ',' or ']' expected", _line(text, position))
        position = _skip(text, position + 1)


class _Lines:
    """The lines of a table as text, remembering which of them are not UTF-8."""

    def __init__(self, file: Iterable[bytes]) -> None:
        self._file = file
        self._bad: dict[int, str] = {}

    def __iter__(self) -> Iterator[str]:
        offset = 0
        for number, line in enumerate(self._file, 1):
            start, offset = offset, offset + len(line)
            if number == 1 and line.startswith(codecs.BOM_UTF8):
                line, start = line[3:], 3
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                self._bad[number] = _not_utf8(error, start)
                yield line.decode("utf-8", "replace")

    def problem(self, first: int, last: int) -> str | None:
        """Return what is wrong with the first bad line among `first` to `last`."""
        return next((self._bad[n] for n in range(first, last + 1) if n in self._bad), None)


def _read_table(path: Path, delimiter: str) -> Iterator[RawRow | Problem]:
    csv.field_size_limit(1 << 30)
    with _open(path) as file:
        lines = _Lines(file)
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        last = 0
        try:
            for cells in reader:
                first, last = last + 1, reader.line_num
                if not any(cell.strip() for cell in cells):
                    continue
                bad = lines.problem(first, last)
                if header is None:
                    header = _header(cells, bad, delimiter)
                elif bad:
                    yield Problem(f"{path}:{first}", "", bad)
                elif len(cells) != len(header):
                    text = f"{len(cells)} cells, but the header has {len(header)}"
                    yield Problem(f"{path}:{first}", "", text)
                else:
                    yield RawRow(f"{path}:{first}", dict(zip(header, cells, strict=True)))
        except csv.Error as error:
            raise _Unreadable(f"not a table: {error} (check the quotes)", last + 1) from None


def _header(cells: Sequence[str], bad: str | None, delimiter: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    if bad:
        raise _Unreadable(bad, 1)
    if len(names) == 1 and delimiter == "," and any(mark in names[0] for mark in ";\t"):
        raise _Unreadable("one column only: separate the cells by commas, or name it .tsv", 1)
    if len(set(names)) != len(names) or not all(names):
        raise _Unreadable(f"the header has empty or repeated names: {', '.join(names)}", 1)
    return names


def _read_parquet(path: Path) -> Iterator[RawRow | Problem]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            f"{path}: reading Parquet needs the package `pyarrow`",
            "pip install 'postgrad[scale]', or convert the file to JSONL",
        ) from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1000):
                for values in batch.to_pylist():
                    number += 1
                    yield RawRow(f"{path}:{number}", values)
    except (ValueError, OSError) as error:
        raise _Unreadable(f"not a whole Parquet file: {error}") from None


_READERS: Mapping[str, Callable[[Path], Iterator[RawRow | Problem]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": lambda path: _read_table(path, ","),
    ".tsv": lambda path: _read_table(path, "\t"),
    ".parquet": _read_parquet,
}
