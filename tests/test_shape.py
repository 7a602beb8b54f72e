"""The budgets of CONTRIBUTING.md: what keeps the code small, quick to start and documented."""

import ast
import importlib.util
import json
import os
import re
import resource
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from postgrad.config import parse_recipe
from postgrad.run import create_run

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "postgrad"
SOURCES = sorted(PACKAGE.rglob("*.py"))
CODE = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "docs").glob("*.py"))]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]

FILE_LINES = 500
FUNCTION_LINES = 80
MOST_FUNCTION_LINES = 50
HELP_SECONDS = 0.3
VAGUE = {"util", "utils", "common", "helper", "helpers", "misc", "base", "core", "lib"}
HEAVY = ("torch", "transformers", "peft", "sklearn", "pandas", "pyarrow", "datasets")


def functions(path):
    """Return (name, lines) of every function in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{path.relative_to(ROOT)}:{node.name}", node.end_lineno - node.lineno + 1


def generator():
    """Return the module docs/generate.py."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_longer_than_a_reader_can_hold(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= FILE_LINES


def test_functions_are_short():
    lengths = dict(entry for path in SOURCES for entry in functions(path))
    too_long = {name: lines for name, lines in lengths.items() if lines > FUNCTION_LINES}
    assert not too_long
    ordered = sorted(lengths.values())
    assert ordered[int(0.9 * len(ordered))] <= MOST_FUNCTION_LINES


def test_names_say_what_a_module_knows():
    vague = [path for path in SOURCES if VAGUE & {path.stem, *path.relative_to(PACKAGE).parts}]
    assert not vague


def test_every_module_says_what_it_is():
    for path in SOURCES:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def test_nothing_is_left_to_be_done():
    unfinished = re.compile(r"\b(TODO|FIXME|XXX)\b|raise NotImplementedError")
    for path in SOURCES:
        assert not unfinished.search(path.read_text(encoding="utf-8")), path


def test_every_module_has_a_layer():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contract = settings["tool"]["importlinter"]["contracts"][0]
    layered = {name.strip() for layer in contract["layers"] for name in layer.split("|")}
    present = {
        f"postgrad.{path.stem}"
        for path in PACKAGE.iterdir()
        if (path.suffix == ".py" and not path.name.startswith("__"))
        or (path.is_dir() and (path / "__init__.py").exists())
    }
    assert present == layered


def modules_after(code, *arguments):
    """Run code in a fresh process; return the names of the modules it has loaded."""
    report = "\nimport json, sys; print('\\n' + json.dumps(sorted(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code + report, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(json.loads(result.stdout.splitlines()[-1]))


@pytest.mark.parametrize("code", ["import postgrad", "import postgrad.cli"])
def test_importing_is_light(code):
    loaded = modules_after(code)
    assert not loaded & {*HEAVY, "numpy", "pydantic", "yaml"}


@pytest.mark.parametrize(
    "verb",
    [["--help"], ["train", "--help"], ["explain"], ["runs"], ["report"], ["explain", "seed"]],
)
def test_reading_commands_load_no_torch(verb, tmp_path):
    tree = {"name": "bot", "model": {"base": "m"}, "data": {"train": "rows.jsonl"}}
    run = create_run(parse_recipe(tree), "train", root=tmp_path)
    where = {"runs": [tmp_path], "report": [run.path]}.get(verb[0], [])
    code = "import sys; from postgrad.cli import call; assert call(sys.argv[1:]) == 0"
    assert not modules_after(code, *verb, *where) & set(HEAVY)


def test_an_estimate_loads_no_torch_when_the_speed_is_known(tiny_model_dir, tmp_path, monkeypatch):
    from postgrad import stages
    from postgrad.train import probe
    from training import write_rows

    monkeypatch.setenv("POSTGRAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(probe, "QUIET_SHARE", 0.0)  # a busy machine keeps no probe
    rows = write_rows(tmp_path / "rows.jsonl", 200)
    model = {"base": str(tiny_model_dir), "precision": "fp32"}
    tree = {"name": "bot", "model": model, "data": {"train": str(rows)}}
    stages.estimate(parse_recipe(tree), tmp_path / "none", stages.Options())  # makes the probe
    path = tmp_path / "bot.yaml"
    path.write_text(json.dumps(tree), encoding="utf-8")
    code = "import sys; from postgrad.cli import call; assert call(sys.argv[1:]) == 0"
    assert not modules_after(code, "estimate", path, "--json") & set(HEAVY)


def test_help_is_quick():
    def seconds():
        """Processor time, which a busy machine does not stretch."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "postgrad", "--help"]
        subprocess.run(command, capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(5)) < HELP_SECONDS


def test_every_verb_has_a_page_a_help_block_and_tests():
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    for verb in generator().VERBS:
        page = (ROOT / "docs" / f"{verb}.md").read_text(encoding="utf-8")
        assert f"# postgrad {verb}\n" in page
        assert f"Usage: postgrad {verb}" in page
        assert re.search(rf'\(\["{verb}", |postgrad\("{verb}"', tests), verb


def test_what_is_generated_is_up_to_date():
    result = subprocess.run(
        [sys.executable, ROOT / "docs" / "generate.py", "--check"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    assert result.stderr == ""
    assert result.returncode == 0


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_recipes_say_only_what_differs_from_the_defaults():
    from postgrad.config import load_recipe

    recipes = [*(ROOT / "recipes").glob("*.yaml"), *PACKAGE.rglob("*.yaml")]
    assert recipes
    for path in recipes:
        assert load_recipe(path), path
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 40, path


def test_recipes_in_the_docs_are_recipes():
    from postgrad.strict_yaml import parse_yaml

    found = 0
    for page in PAGES:
        for text in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            found += 1
            assert parse_recipe(parse_yaml(text, page.name), page.name)
    assert found >= 3
