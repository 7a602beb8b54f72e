"""The run directory: create, append, point, seal. The only module that knows its file names.

Everything is written to a temporary name and renamed, or appended as one JSON line; a directory is
resumed only by an equal recipe and never overwritten.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from postgrad.config import Recipe, parse_recipe
from postgrad.errors import CheckpointError, Interrupted, RunError
from postgrad.machine import hardware, versions
from postgrad.strict_yaml import parse_yaml

CHECKSUMS = "checksums.json"
LOCK = ".lock"


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals (disk full, read-only) into a `RunError`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunError(
            f"cannot write {path}: {reason}",
            "free space or fix permissions, then run again with --resume; "
            "what was written before is intact",
        ) from error


def write_atomic(path: Path, data: bytes) -> None:
    """Write a whole file or nothing: temporary name in the same folder, fsync, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read JSONL; a last line cut off by a kill is left out, any other damage is an error."""
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number == len(lines):
                break
            raise RunError(f"{path}:{number}: not JSON", "restore the file or rerun") from None
    return rows


def to_json(value: Any) -> str:
    """Return pretty JSON with sorted keys off and non-ASCII kept."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


@dataclass(frozen=True, slots=True)
class Run:
    """A run directory. Cheap to make; every method reads or writes files."""

    path: Path

    @property
    def record_path(self) -> Path:
        """run.json: identity, status, versions, hardware, hashes."""
        return self.path / "run.json"

    @property
    def metrics_path(self) -> Path:
        """metrics.jsonl: a line per optimizer step and per evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def events_path(self) -> Path:
        """events.jsonl: created, resumed, best, stopped, saved, interrupted, sealed."""
        return self.path / "events.jsonl"

    @property
    def config_path(self) -> Path:
        """config.yaml: the resolved recipe; every `auto` is a value."""
        return self.path / "config.yaml"

    @property
    def recipe_path(self) -> Path:
        """recipe.yaml: the recipe as given, defaults filled in, `auto` kept."""
        return self.path / "recipe.yaml"

    @property
    def kept_path(self) -> Path:
        """data/kept.jsonl: every used row with id, split, source and messages."""
        return self.path / "data" / "kept.jsonl"

    @property
    def dropped_path(self) -> Path:
        """data/dropped.jsonl: id, step, reason, the kept twin."""
        return self.path / "data" / "dropped.jsonl"

    @property
    def manifest_path(self) -> Path:
        """data/manifest.jsonl: the source files, their hashes and formats; counts per split."""
        return self.path / "data" / "manifest.jsonl"

    @property
    def replay_path(self) -> Path:
        """data/replay.jsonl: the general chats mixed into the training rows."""
        return self.path / "data" / "replay.jsonl"

    @property
    def probe_path(self) -> Path:
        """data/probe.jsonl: the answers on which the distance to the base is measured."""
        return self.path / "data" / "probe.jsonl"

    @property
    def preflight_path(self) -> Path:
        """preflight.json: every check with its verdict."""
        return self.path / "preflight.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of step-NNNNNN checkpoints and the pointers best and last."""
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        """Folder of the deliverables: adapter, merged."""
        return self.path / "export"

    @property
    def seeds(self) -> Path:
        """Folder of the runs of each seed, when there are several: a run directory each."""
        return self.path / "seeds"

    def inside(self, *names: str) -> "Run":
        """Return a run inside this one: shares/PERCENT, learning-rate/RATE."""
        return Run(self.path.joinpath(*names))

    @property
    def report_path(self) -> Path:
        """report.html."""
        return self.path / "report.html"

    @property
    def card_path(self) -> Path:
        """MODEL_CARD.md."""
        return self.path / "MODEL_CARD.md"

    def evidence_path(self, task: str, arm: str) -> Path:
        """Return the path of evidence/<task>.<arm>.jsonl (slashes in the arm become dashes)."""
        return self.path / "evidence" / f"{task}.{arm.replace('/', '-')}.jsonl"

    @property
    def measurements_path(self) -> Path:
        """evidence/measurements.json: all measurements and comparisons."""
        return self.path / "evidence" / "measurements.json"

    @property
    def record(self) -> dict[str, Any]:
        """The content of run.json."""
        record: dict[str, Any] = read_json(self.record_path)
        return record

    @property
    def recipe(self) -> Recipe:
        """The recipe as given."""
        return _read_recipe(self.recipe_path)

    @property
    def config(self) -> Recipe:
        """The resolved recipe when resolution has happened, else the recipe as given."""
        return _read_recipe(self.config_path if self.config_path.exists() else self.recipe_path)

    def update(self, **fields: Any) -> None:
        """Merge fields into run.json."""
        self.write_json(self.record_path, {**self.record, **fields})

    def add_seconds(self, stage: str, seconds: float) -> None:
        """Add wall time to a stage's account (a resumed stage adds up)."""
        spent = dict(self.record.get("seconds", {}))
        spent[stage] = round(spent.get(stage, 0.0) + seconds, 3)
        self.update(seconds=spent)

    def fail(self, error: BaseException) -> None:
        """Record in run.json how an unfinished run ended."""
        stopped = isinstance(error, Interrupted | KeyboardInterrupt)
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        with contextlib.suppress(RunError):
            self.update(status="interrupted" if stopped else "failed", error=message)

    def add_dropped(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows to data/dropped.jsonl, each once (a resumed run finds them again)."""
        ledger = read_jsonl(self.dropped_path)
        self.write_jsonl(self.dropped_path, [*ledger, *(r for r in rows if r not in ledger)])

    def write_text(self, path: Path, text: str) -> None:
        """Write a text file atomically."""
        write_atomic(path, text.encode())

    def write_json(self, path: Path, value: Any) -> None:
        """Write JSON atomically."""
        write_atomic(path, to_json(value).encode())

    def write_jsonl(self, path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write a whole JSONL file atomically."""
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        write_atomic(path, "".join(line + "\n" for line in lines).encode("utf-8", "replace"))

    def event(self, kind: str, **data: Any) -> None:
        """Append a line to events.jsonl."""
        self._append(self.events_path, {"time": _now(), "event": kind, **data})

    def metrics(self, step: int, tokens: int, seconds: float, **values: float) -> None:
        """Append a line to metrics.jsonl; `tokens` and `seconds` are totals since step 0."""
        line = {"step": step, "tokens": tokens, "seconds": round(seconds, 3), **values}
        self._append(self.metrics_path, line)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl."""
        return read_jsonl(self.metrics_path)

    def rewind_metrics(self, step: int) -> None:
        """Keep the lines up to `step`: what came after it will be computed again."""
        self.write_jsonl(self.metrics_path, [m for m in self.read_metrics() if m["step"] <= step])

    def _append(self, path: Path, line: Mapping[str, Any]) -> None:
        text = json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        with disk_errors(path), path.open("ab+") as file:
            _cut_unfinished_line(file)
            file.write(text)

    @contextlib.contextmanager
    def publish(self, final: Path) -> Iterator[Path]:
        """Yield a temporary folder; on success hash its files and rename it to `final` at once."""
        temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
        with disk_errors(final):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        try:
            with disk_errors(final):
                yield temporary
                sums = {str(p.relative_to(temporary)): sha256_file(p) for p in _files(temporary)}
                write_atomic(temporary / CHECKSUMS, to_json(sums).encode())
                for file in _files(temporary):
                    _fsync(file)
                shutil.rmtree(final, ignore_errors=True)
                temporary.replace(final)
                _fsync(final.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def delete(self, folder: Path) -> None:
        """Delete a published folder so that a kill in between leaves no half of it behind."""
        doomed = folder.with_name(f".{folder.name}.doomed")
        with disk_errors(folder):
            folder.replace(doomed)
            shutil.rmtree(doomed)

    def point(self, name: str, target: Path) -> None:
        """Make checkpoints/<name> a relative link to a checkpoint, atomically."""
        link = self.checkpoints / name
        temporary = self.checkpoints / f".{name}.{os.getpid()}.tmp"
        with disk_errors(link):
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(target.name)
            temporary.replace(link)

    def pointed(self, name: str) -> Path | None:
        """Return the checkpoint that checkpoints/<name> points to, if there is one."""
        link = self.checkpoints / name
        return link.resolve() if link.exists() else None

    def seal(self) -> None:
        """Write the hash of every file into run.json: the run is finished and can be verified."""
        skip = {self.record_path, self.events_path, self.path / LOCK}
        files = [p for p in _files(self.path) if p not in skip and not p.is_symlink()]
        hashes = {str(p.relative_to(self.path)): sha256_file(p) for p in files}
        self.event("sealed", files=len(hashes))
        self.update(status="done", sealed=hashes, finished=_now())

    def changed_files(self) -> list[str] | None:
        """Return the files that are missing or differ from the seal; None when not sealed."""
        sealed = self.record.get("sealed")
        if sealed is None:
            return None
        return [
            name
            for name, digest in sealed.items()
            if not (self.path / name).is_file() or sha256_file(self.path / name) != digest
        ]

    @property
    def in_use(self) -> bool:
        """Whether a process holds the directory right now."""
        try:
            with (self.path / LOCK).open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except FileNotFoundError:
            return False
        return False

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the directory: a second process gets an error instead of a mixed run."""
        with disk_errors(self.path):
            file: IO[str] = (self.path / LOCK).open("w")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RunError(
                    f"{self.path} is in use by another process", "wait for it, or use another --out"
                ) from None
            yield


def verify_checksums(folder: Path) -> None:
    """Raise `CheckpointError` unless every file of a published folder is whole."""
    try:
        sums = json.loads((folder / CHECKSUMS).read_bytes())
        bad = [n for n, s in sums.items() if sha256_file(folder / n) != s]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is incomplete: {error}", "use an older one") from None
    if bad:
        raise CheckpointError(f"{folder} is damaged: {', '.join(bad)}", "use an older one")


def create_run(recipe: Recipe, verb: str, out: Path | None = None, root: Path | None = None) -> Run:
    """Make a new run directory: `out`, or a free runs/<date>-<name>-<verb>-<hash>[-2, -3 ...].

    Raises RunError when `out` is not empty, cannot be written, or another process takes it.
    """
    taken = RunError(
        f"{out} exists and is not empty", "choose another --out, remove it, or add --resume"
    )
    with disk_errors(out or root or Path("runs")):
        if out is not None and out.exists() and not _is_free(out, recipe):
            raise taken
        path = out or _free_directory(root or Path("runs"), recipe, verb)
        path.mkdir(parents=True, exist_ok=True)
    run = Run(path)
    identity = {"id": path.name, "name": recipe.name, "verb": verb, "status": "running"}
    with run.lock():
        if run.record_path.exists():
            raise taken
        write_atomic(run.recipe_path, recipe.to_yaml().encode())
        run.write_json(
            run.record_path,
            {**identity, "created": _now(), "seed": recipe.seed, "recipe_hash": recipe.hash()}
            | {"versions": versions(), "hardware": hardware(), "seconds": {}},
        )
    run.event("created", verb=verb)
    return run


def open_run(path: Path) -> Run:
    """Return an existing run, or say what is missing."""
    if not (path / "run.json").exists():
        raise RunError(f"{path} is not a run directory (no run.json)", "see `postgrad runs`")
    return Run(path)


def find_resumable(
    recipe: Recipe, verb: str, out: Path | None, root: Path | None = None
) -> Run | None:
    """Return the run to resume: `out`, or the newest of this recipe and verb; None if none exists.

    Raises RunError when `out` holds a run of another recipe, naming the first field that differs.
    """
    if out is not None:
        if not (out / "run.json").exists():
            return None
        run = Run(out)
        if run.record["recipe_hash"] != recipe.hash():
            differs = run.recipe.differences(recipe).items()
            said = (f"{key}: {there!r} there, {here!r} here" for key, (there, here) in differs)
            raise RunError(
                f"{out} belongs to another recipe ({next(said, 'different hash')})",
                "resume with the recipe it was started with, or use another --out",
            )
        if (run.record["verb"] == "seeds") != (verb == "seeds"):
            raise RunError(
                f"{out} was made by another command", "give --seeds as before, or another --out"
            )
        return run
    suffix = f"-{recipe.name}-{verb}-{recipe.hash()[:6]}"
    found = [run for run in list_runs(root or Path("runs")) if suffix in run.path.name]
    return found[-1] if found else None


def list_runs(root: Path) -> list[Run]:
    """Return the runs below `root`, oldest first; one whose run.json is damaged comes first."""

    def age(run: Run) -> tuple[str, str]:
        try:
            return str(run.record.get("created", "")), run.path.name
        except RunError:
            return "", run.path.name

    return sorted((Run(path.parent) for path in root.glob("*/run.json")), key=age)


def read_json(path: Path) -> Any:
    """Read a JSON file of a run."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise RunError(f"{path} is missing", "run the stage that writes it") from None
    except ValueError:
        raise RunError(f"{path} is not JSON", "restore it or rerun") from None


def _is_free(path: Path, recipe: Recipe) -> bool:
    """Whether a directory holds nothing, or only what a killed `create_run` of this recipe left."""

    def ours(entry: Path) -> bool:
        if entry.name == Run(path).recipe_path.name:
            return entry.read_bytes() == recipe.to_yaml().encode()
        return entry.name == LOCK or (entry.name.startswith(".") and entry.suffix == ".tmp")

    return path.is_dir() and all(ours(entry) for entry in path.iterdir())


def _free_directory(root: Path, recipe: Recipe, verb: str) -> Path:
    """Make and return a directory that nobody else has, whatever else starts this second."""
    base = f"{time.strftime('%Y-%m-%d')}-{recipe.name}-{verb}-{recipe.hash()[:6]}"
    root.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        path = root / (base if number == 1 else f"{base}-{number}")
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            return path
    raise AssertionError("unreachable")


def _cut_unfinished_line(file: IO[bytes]) -> None:
    """Cut off a last line that a kill left unfinished, so that the next one stays readable."""
    end = file.seek(0, os.SEEK_END)
    if end == 0:
        return
    file.seek(end - 1)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)


def _read_recipe(path: Path) -> Recipe:
    return parse_recipe(parse_yaml(path.read_text(encoding="utf-8"), str(path)), where=str(path))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
