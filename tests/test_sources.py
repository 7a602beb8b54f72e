import hashlib
import http.server
import importlib.util
import json
import logging
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from postgrad.errors import SourceError
from postgrad.sources import cache_directory, parse_package_uri, resolve

ROWS = b'{"prompt": "2+2", "completion": "4"}\n'
MEMBERS = {
    "tiny_data/__init__.py": b"",
    "tiny_data/rows.jsonl": ROWS,
    "tiny_data/rules/a.txt": b"a",
    "tiny_data/rules/deep/b.txt": b"bb",
}
METADATA = {
    "tiny_data-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n",
    "tiny_data-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nTag: py3-none-any\n",
    "tiny_data-1.0.dist-info/RECORD": b"",
}
URI = "pypi:tiny-data==1.0/tiny_data/rows.jsonl"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def build_wheel(folder: Path, members: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "tiny_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in {**members, **METADATA}.items():
            archive.writestr(name, data)
    return path


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A package index that is a folder with one wheel, and an empty cache."""
    path = build_wheel(tmp_path / "index", MEMBERS)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    monkeypatch.setenv("POSTGRAD_CACHE", str(tmp_path / "cache"))
    return path


def forbid_pip(wheel: Path) -> None:
    """Take the index away: any further pip call fails."""
    wheel.unlink()


def leftovers(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache").rglob("*.tmp"))


def test_cache_directory_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("POSTGRAD_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "own"
    monkeypatch.delenv("POSTGRAD_CACHE")
    assert cache_directory() == tmp_path / "xdg" / "postgrad"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "postgrad"


def test_local_paths_come_back_as_they_are(tmp_path, monkeypatch):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(ROWS)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve(str(file), "data") == file
    assert resolve("~/rows.jsonl", "data") == file
    assert resolve(str(tmp_path), "model") == tmp_path


@pytest.mark.parametrize("name", ["trian.jsonl", "./trian", "sub/dir/trian", "/no/such/x", "trian"])
def test_missing_path_is_not_looked_up_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_bytes(ROWS)
    with pytest.raises(SourceError, match="file not found") as caught:
        resolve(name, "data")
    assert ("train.jsonl" in caught.value.remedy) == name.endswith("trian.jsonl")


def test_missing_path_names_near_matches_for_what_could_be_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "support").mkdir()
    with pytest.raises(SourceError, match="no such local path") as caught:
        resolve("models/suport", "model")
    assert "models/support" in caught.value.remedy


@pytest.mark.parametrize(
    ("uri", "problem"),
    [
        ("s3://bucket/rows.jsonl", "not supported"),
        ("https://example.org/rows.jsonl", "not supported"),
        ("", "empty"),
        ("pypi:tiny-data", "not a package URI"),
        ("pypi:tiny-data>=1/x", "not a package URI"),
        ("pypi:tiny-data==1.*/x", "not a package URI"),
        ("pypi:--index-url=evil==1.0/x", "not a package URI"),
        ("pypi:tiny-data==1.0/../../etc/passwd", "leaves the package"),
        ("pypi:tiny-data==1.0//etc/passwd", "leaves the package"),
        ("pypi:tiny-data==1.0/x#sha256=abc", "64 hexadecimal digits"),
        ("pypi:tiny-data==1.0/x#md5=abc", "cannot read"),
        (f"pypi:tiny-data==1.0/rules/#sha256={'a' * 64}", "one file"),
    ],
)
def test_bad_addresses_are_refused_with_a_remedy(uri, problem):
    with pytest.raises(SourceError, match=problem) as caught:
        resolve(uri, "data")
    assert caught.value.remedy


def test_package_uri_parts():
    uri = parse_package_uri(f"pypi:A.b==1!2.0+x/f/g.txt#wheel={'AB' * 32}&sha256={'cd' * 32}")
    assert (uri.name, uri.version, uri.member) == ("A.b", "1!2.0+x", "f/g.txt")
    assert (uri.wheel_sha256, uri.sha256) == ("ab" * 32, "cd" * 32)
    assert parse_package_uri("pypi:a==1").member is None
    assert parse_package_uri("pypi:a==1/").is_folder


def test_member_is_fetched_verified_and_works_without_pip_afterwards(wheel, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    pinned = f"{URI}#sha256={sha256(ROWS)}&wheel={sha256(wheel.read_bytes())}"
    path = resolve(pinned, "data")
    assert path.read_bytes() == ROWS
    assert path.name == "rows.jsonl"
    assert path.is_relative_to(tmp_path / "cache")
    assert "fetching" in caplog.text
    forbid_pip(wheel)
    assert resolve(pinned, "data") == path
    assert resolve(URI, "data") == path
    with pytest.raises(SourceError, match="but the URI says"):
        resolve(f"{URI}#sha256={'0' * 64}", "data")
    assert leftovers(tmp_path) == []


def test_folder_and_whole_wheel(wheel):
    folder = resolve("pypi:tiny-data==1.0/tiny_data/rules/", "data")
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*.txt")} == {
        "a.txt",
        "deep/b.txt",
    }
    whole = resolve("pypi:tiny-data==1.0", "data")
    assert whole.name == wheel.name
    assert whole.read_bytes() == wheel.read_bytes()


def test_damaged_cache_is_fetched_again_with_a_message(wheel, caplog):
    path = resolve(URI, "data")
    path.write_bytes(ROWS[:-2] + b"x\n")
    assert resolve(URI, "data").read_bytes() == ROWS
    assert "damaged cache" in caplog.text
    path.unlink()
    assert resolve(URI, "data").read_bytes() == ROWS


@pytest.mark.parametrize("part", ["sha256", "wheel"])
def test_wrong_checksum_caches_nothing(wheel, tmp_path, part):
    with pytest.raises(SourceError, match="but the URI says") as caught:
        resolve(f"{URI}#{part}={'0' * 64}", "data")
    assert "do not use it" in caught.value.remedy
    assert not list((tmp_path / "cache").rglob("rows.jsonl"))
    assert leftovers(tmp_path) == []


def test_missing_member_and_missing_package(wheel, tmp_path):
    with pytest.raises(SourceError, match=r"has no tiny_data/row\.jsonl") as caught:
        resolve("pypi:tiny-data==1.0/tiny_data/row.jsonl", "data")
    assert "tiny_data/rows.jsonl" in caught.value.remedy
    with pytest.raises(SourceError, match="No matching distribution found for tiny-data==9"):
        resolve("pypi:tiny-data==9/x", "data")
    assert leftovers(tmp_path) == []


def test_paths_of_a_hostile_wheel_stay_inside(tmp_path, wheel):
    build_wheel(wheel.parent, {**MEMBERS, "tiny_data/rules/../../../escaped.txt": b"!"})
    with pytest.raises(SourceError, match="unsafe path"):
        resolve("pypi:tiny-data==1.0/tiny_data/rules/", "data")
    assert not list(tmp_path.rglob("escaped.txt"))


def test_unwritable_cache_names_the_remedy(wheel, tmp_path, monkeypatch):
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.setenv("POSTGRAD_CACHE", str(blocker / "cache"))
    with pytest.raises(SourceError, match="cannot write the cache") as caught:
        resolve(URI, "data")
    assert "POSTGRAD_CACHE" in caught.value.remedy


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_at_once_fetch_once(wheel):
    code = (
        "import logging; logging.basicConfig(level=logging.INFO);"
        f"from postgrad.sources import resolve; print(resolve({URI!r}, 'data').read_bytes())"
    )
    outputs = [process.communicate() for process in [run_python(code), run_python(code)]]
    assert [out.strip() for out, _ in outputs] == [repr(ROWS)] * 2
    assert sum(err.count("fetching") for _, err in outputs) == 1


REPOSITORIES = {
    "models/org/tiny": {"config.json": b"{}", "model.safetensors": b"W", "pytorch_model.bin": b"P"},
    "models/org/pickled": {"config.json": b"{}", "pytorch_model.bin": b"P"},
}


README = b"""---
configs:
- config_name: default
  data_files:
  - {split: train, path: train.jsonl}
  - {split: test, path: test.jsonl}
dataset_info:
  features:
  - {name: text, dtype: string}
  - {name: label, dtype: {class_label: {names: {'0': neg, '1': pos}}}}
---
"""
REPOSITORIES["datasets/org/rows"] = {
    "README.md": README,
    "train.jsonl": b'{"text": "a", "label": 1}\n{"text": "b", "label": null}\n',
    "test.jsonl": b'{"text": "c", "label": 0}\n',
}


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub's HTTP interface that downloads need."""

    commit = "c" * 40

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[0] == "api":
            files = REPOSITORIES.get("/".join(parts[1:4]))
            body = self.describe("/".join(parts[2:4]), files or {}, "tree" in parts)
        else:
            kind = [] if parts[0] == "datasets" else ["models"]
            repository = "/".join([*kind, *parts][:3])
            files = REPOSITORIES.get(repository)
            body = (files or {}).get(parts[-1])
        self.send_response(404 if body is None or not files else 200)
        if body is None or not files:
            self.send_header("X-Error-Code", "EntryNotFound" if files else "RepoNotFound")
        body = body or b""
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("ETag", f'"{sha256(body)[:40]}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def describe(self, name, files, tree):
        if tree:
            rows = [
                {"type": "file", "path": path, "size": len(data), "oid": sha256(data)[:40]}
                for path, data in files.items()
            ]
            return json.dumps(rows).encode()
        siblings = [{"rfilename": path} for path in files]
        return json.dumps({"id": name, "sha": self.commit, "siblings": siblings}).encode()

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture
def hub(tmp_path):
    """A hub on this machine; yields the environment that points to it."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "POSTGRAD_CACHE": str(tmp_path / "cache"),
    }
    server.shutdown()
    server.server_close()


RESOLVE = """
import sys
from postgrad.sources import resolve
kind, *names = sys.argv[1:]
for name in names:
    try:
        path = resolve(name, kind)
        print(sorted(p.name for p in path.iterdir()) if path.is_dir() else path.read_text())
    except ValueError as error:
        print(error)
"""


def resolve_apart(environment, kind, *names):
    """Resolve in a process of its own: the hub client reads its environment when imported."""
    return run_python(RESOLVE, kind, *names, **environment).communicate()


def test_hub_models_download_then_work_offline(hub):
    names = ("org/tiny", "org/pickled", "org/nothing")
    out, err = resolve_apart({**hub, "HF_HUB_OFFLINE": "0"}, "model", *names)
    expected = ["['config.json', 'model.safetensors']", "['config.json', 'pytorch_model.bin']"]
    assert out.splitlines()[:2] == expected, err
    assert "org/nothing: neither a local path nor a model on the hub" in out
    out, err = resolve_apart({**hub, "HF_HUB_OFFLINE": "1"}, "model", *names)
    assert out.splitlines()[:2] == expected, err
    assert "HF_HUB_OFFLINE is set" in out


@pytest.mark.skipif(not importlib.util.find_spec("datasets"), reason="needs postgrad[hub]")
def test_hub_data_sets_become_jsonl_with_class_names_and_work_offline(hub):
    names = ("org/rows#split=train", "org/rows#split=test", "org/rows#split=x", "org/none")
    for offline in "01":
        out, err = resolve_apart({**hub, "HF_HUB_OFFLINE": offline}, "data", *names)
        train = '{"text": "a", "label": "pos"}\n{"text": "b", "label": null}\n\n'
        assert out.startswith(train + '{"text": "c", "label": "neg"}\n'), err
        assert "which split? It has train, test" in out
        assert "org/none: " in out


@pytest.mark.skipif(bool(importlib.util.find_spec("datasets")), reason="postgrad[hub] is here")
def test_hub_data_sets_need_an_extra(hub):
    out, _ = resolve_apart({**hub, "HF_HUB_OFFLINE": "1"}, "data", "org/rows")
    assert "pip install 'postgrad[hub]'" in out


def test_importing_sources_loads_nothing_heavy():
    code = (
        "import sys, postgrad.sources;"
        "print({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules))"
    )
    assert run_python(code).communicate()[0].strip() == "set()"
