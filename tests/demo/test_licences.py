import inspect
import json
from zipfile import ZipFile

import pytest

from postgrad import cli
from postgrad.demo import licences
from postgrad.demo.recipe import FULL_MINUTES, demo_recipe
from postgrad.errors import ConfigError


def rule(expression: str, text: str, extra: str = "") -> str:
    return f"---\nlicense_expression: {expression}\n{extra}---\n\n{text}\n"


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "licensedcode.whl"
    with ZipFile(path, "w") as archive:
        for key, spdx in (("mit", "MIT"), ("gpl-2.0", "GPL-2.0-only"), ("odd", "LicenseRef-odd")):
            archive.writestr(
                f"{licences.LICENCES}{key}.LICENSE",
                f"---\nkey: {key}\nspdx_license_key: {spdx}\n---\ntext of the licence",
            )
        archive.writestr(f"{licences.LICENCES}bare.LICENSE", "no front matter")
        for number in range(16):
            notice = f"licensed under MIT or GPL, file {number}"
            archive.writestr(f"{licences.RULES}a_{number}.RULE", rule("mit OR gpl-2.0", notice))
        archive.writestr(f"{licences.RULES}rare.RULE", rule("mit", "only one row has this label"))
        archive.writestr(f"{licences.RULES}odd.RULE", rule("odd", "a licence outside SPDX, alas"))
        archive.writestr(f"{licences.RULES}short.RULE", rule("mit OR gpl-2.0", "MIT"))
        archive.writestr(
            f"{licences.RULES}false.RULE",
            rule("mit OR gpl-2.0", "this text is a false positive", "is_false_positive: yes\n"),
        )
    return path


def test_rows_are_usable_notices_with_frequent_spdx_labels(wheel):
    with ZipFile(wheel) as archive:
        rows = licences.licence_rows(archive)
    assert len(rows) == 16
    assert {spdx for _, spdx in rows} == {"MIT OR GPL-2.0-only"}
    assert rows[0][0].startswith("licensed under MIT or GPL, file")


def test_expressions_keep_their_parentheses():
    keys = {"mit": "MIT", "gpl-2.0": "GPL-2.0-only", "cp": "Classpath-exception-2.0"}
    found = licences.to_spdx("mit AND (gpl-2.0 WITH cp OR mit)", keys)
    assert found == "MIT AND (GPL-2.0-only WITH Classpath-exception-2.0 OR MIT)"
    assert licences.to_spdx("mit OR unknown", keys) is None


@pytest.fixture
def cached_rows(tmp_path, monkeypatch):
    monkeypatch.setenv("POSTGRAD_CACHE", str(tmp_path))
    file = tmp_path / f"licence-notices-32.1.0-v{licences.VERSION}.jsonl"
    file.write_text(json.dumps({"text": "under MIT", "spdx": "MIT"}) + "\n")
    return file


def test_the_second_demo_needs_no_network(cached_rows, monkeypatch):
    monkeypatch.setattr(licences, "resolve", None)
    assert licences.licence_rows_file() == cached_rows


def test_the_budget_scales_rows_and_evaluation(cached_rows):
    full, half, double = demo_recipe(7), demo_recipe(3.5), demo_recipe(14)
    assert full.data.train == str(cached_rows)
    assert half.data.limit == round(full.data.limit / 2)
    assert half.evaluate.limit < full.evaluate.limit < double.evaluate.limit
    assert full.evaluate.limit >= 300
    with pytest.raises(ConfigError, match="at least one minute"):
        demo_recipe(0.5)


def test_without_a_budget_the_recipe_is_as_it_is_written():
    chosen = inspect.signature(cli.demo).parameters["minutes"].default
    assert chosen == FULL_MINUTES
