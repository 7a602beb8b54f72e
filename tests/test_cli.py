"""The command line as users and other programs meet it: mostly real processes."""

import json
import os
import subprocess
import sys

import pytest

from postgrad import cli, errors
from postgrad.config import parse_recipe
from postgrad.run import create_run

VERBS = (
    *("demo", "run", "estimate", "train", "evaluate", "compare"),
    *("report", "export", "runs", "explain", "doctor"),
)
RECIPE = "name: bot\nmodel: {base: some/model}\ndata: {train: rows.jsonl}\n"


def postgrad(*arguments, **environment):
    """Run the real command; return (exit code, stdout, stderr)."""
    result = subprocess.run(
        [sys.executable, "-m", "postgrad", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "100", **environment},
    )
    return result.returncode, result.stdout, result.stderr


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_help_lists_exactly_the_verbs_that_work():
    code, out, err = postgrad("--help")
    listed = [
        line.split()[0] for line in out.partition("Commands:")[2].splitlines() if line.strip()
    ]
    assert (code, err) == (0, "")
    assert tuple(listed) == VERBS


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_and_speaks_json(verb, capsys):
    assert cli.call([verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert "--json" in out
    assert f"Usage: postgrad {verb}" in out


def test_version():
    code, out, _ = postgrad("--version")
    assert (code, out) == (0, "postgrad 0.1.0\n")


def test_no_arguments_shows_the_help_on_stderr_and_is_a_usage_error():
    code, out, err = postgrad()
    assert (code, out) == (2, "")
    assert "Commands:" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rnu", "x"], "Did you mean 'run'"),
        (["evalute", "x"], "Did you mean 'evaluate'"),
        (["run"], "Missing argument 'RECIPE'"),
        (["run", "x", "--ot", "y"], "--out"),
        (["run", "x", "--out"], "requires an argument"),
        (["demo", "--minutes", "0"], "--minutes"),
        (["demo", "--minutes", "soon"], "--minutes"),
        (["explain", "--row", "0", "x"], "--row"),
        (["explain", "--row", "1"], "--row needs a recipe"),
        (["explain", "seed", "name"], "explain takes one key"),
        (["doctor", "--verify-resume"], "needs a recipe"),
    ],
)
def test_a_wrong_command_line_is_exit_2_with_a_remedy(arguments, message, capsys):
    assert cli.call(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert "\n  -> " in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learing_rate=1", "did you mean train.learning_rate?"),
        ("train.num_train_epochs=-1", "must be greater than 0, not -1"),
        ("rows.jsonl", "is not KEY=VALUE"),
    ],
)
def test_a_wrong_override_is_exit_2(override, message, recipe, capsys):
    for verb in ("run", "train", "evaluate"):
        assert cli.call([verb, str(recipe), override]) == 2
        assert message in capsys.readouterr().err


def test_a_wrong_recipe_is_exit_2_and_names_the_line(recipe, capsys):
    recipe.write_text(RECIPE + "train:\n\tseed: 1\n")
    assert cli.call(["train", str(recipe)]) == 2
    err = capsys.readouterr().err
    assert "recipe.yaml:5: a tab character" in err
    assert "-> indent with spaces" in err


def test_errors_with_json_are_one_document_on_stdout(recipe):
    for arguments, kind in (
        (["train", recipe, "train.lr=1"], "ConfigError"),
        (["trian", recipe], "UsageError"),
    ):
        code, out, err = postgrad(*arguments, "--json")
        error = json.loads(out)["error"]
        assert code == error["exit_code"] == 2
        assert error["kind"] == kind
        assert error["message"] in err
        assert error["remedy"]


def test_every_kind_of_error_has_its_exit_code(monkeypatch, capsys, tmp_path):
    codes = {
        errors.ConfigError: 2,
        errors.DataError: 3,
        errors.PreflightError: 3,
        errors.Interrupted: 130,
        errors.RunError: 1,
        errors.ModelError: 1,
        errors.TrainingError: 1,
    }
    for kind, code in codes.items():

        def fail(*_, kind=kind):
            raise kind("what is wrong", "what to do")

        monkeypatch.setattr("postgrad.listing.list_summaries", fail)
        assert cli.call(["runs", str(tmp_path)]) == code
        captured = capsys.readouterr()
        assert captured.err == "error: what is wrong\n  -> what to do\n"
        assert captured.out == ""


def test_debug_adds_the_traceback(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("POSTGRAD_DEBUG", "1")
    assert cli.call(["report", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("  -> see `postgrad runs`\n")


def test_a_bug_shows_its_traceback_and_says_that_it_is_one(monkeypatch, capsys, tmp_path):
    def fail(*_):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("postgrad.listing.list_summaries", fail)
    assert cli.call(["runs", str(tmp_path), "--json"]) == 1
    captured = capsys.readouterr()
    assert "Traceback" in captured.err
    assert "this is a bug in postgrad" in captured.err
    assert json.loads(captured.out)["error"]["message"] == "ZeroDivisionError: oops"


def test_an_interrupt_is_130(monkeypatch, capsys, tmp_path):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("postgrad.listing.list_summaries", fail)
    assert cli.call(["runs", str(tmp_path), "--json"]) == 130
    captured = capsys.readouterr()
    assert "interrupted" in captured.err
    assert json.loads(captured.out)["error"]["exit_code"] == 130


def test_explain_prints_type_default_and_the_evidence():
    code, out, err = postgrad("explain", "train.learning_rate")
    assert (code, err) == (0, "")
    assert "type     number | auto" in out
    assert "default  auto" in out
    assert "medians over 35 models" in out


def test_explain_lists_every_key(capsys):
    from postgrad.config import fields

    assert cli.call(["explain"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert listed == list(fields())
    assert cli.call(["explain", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["keys"]) == list(fields())


def test_explain_a_section_lists_its_keys(capsys):
    assert cli.call(["explain", "model.adapt", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "model.adapt.r" in found["keys"]
    assert found["type"] == "section"


def test_explain_a_wrong_key_names_the_nearest(capsys):
    assert cli.call(["explain", "train.lr"]) == 2
    assert "did you mean train.learning_rate?" in capsys.readouterr().err
    assert cli.call(["explain", "qqqqqq"]) == 2
    assert "for all keys" in capsys.readouterr().err


def test_the_schema_accepts_what_the_recipe_accepts(capsys):
    assert cli.call(["explain", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["required"] == ["name", "model", "data"]


def test_runs_of_a_directory_and_of_one_run(tmp_path, capsys):
    tree = {"name": "bot", "model": {"base": "m"}, "data": {"train": "rows.jsonl"}}
    run = create_run(parse_recipe(tree), "train", root=tmp_path)
    assert cli.call(["runs", str(tmp_path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["runs"]
    assert [(row["name"], row["verb"], row["status"]) for row in rows] == [
        ("bot", "train", "stopped")
    ]
    assert cli.call(["runs", str(run.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe_hash"] == run.record["recipe_hash"]
    assert cli.call(["runs", str(run.path)]) == 0
    assert "not sealed" in capsys.readouterr().out


def test_runs_without_any_are_no_error_but_a_wrong_place_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.call(["runs"]) == 0
    assert capsys.readouterr().out == "no runs in runs\n"
    assert cli.call(["runs", "nowhere"]) == 1
    assert "no directory nowhere" in capsys.readouterr().err


def test_a_run_cannot_be_evaluated_under_another_recipe(tmp_path, capsys):
    tree = {"name": "bot", "model": {"base": "m"}, "data": {"train": "rows.jsonl"}}
    run = create_run(parse_recipe(tree), "train", root=tmp_path)
    assert cli.call(["evaluate", str(run.path), "evaluate.limit=3"]) == 2
    assert "recipe.yaml" in capsys.readouterr().err
    assert cli.call(["evaluate", str(run.path), "--out", "elsewhere"]) == 2
    assert "leave out --out" in capsys.readouterr().err


def test_json_is_valid_whatever_is_in_it(tmp_path, capsys):
    from pathlib import Path

    from postgrad.types import StopReason, Verdict

    document = {"nan": float("nan"), "path": Path("a"), "kind": Verdict.WORSE, "list": (1, 2.5)}
    document |= {"inf": [float("-inf")], "text": "é \u2028 \ud800", 3: StopReason.STOP, "no": None}
    assert json.loads(json.dumps(cli._jsonable(document), allow_nan=False)) == {
        "nan": None,
        "path": "a",
        "kind": "worse",
        "list": [1, 2.5],
        "inf": [None],
        "text": "é \u2028 \ud800",
        "3": "stop",
        "no": None,
    }


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m postgrad explain | head -1; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert result.stdout.splitlines()[0].split() == ["key", "default", "takes"]
    assert result.stdout.splitlines()[-1] == "0"
    assert result.stderr == ""


def test_output_survives_a_terminal_without_unicode(recipe):
    recipe.write_text("name: café\n", encoding="utf-8")
    code, out, err = postgrad("run", recipe, "--json", PYTHONIOENCODING="ascii")
    assert code == 2
    assert "café" in json.loads(out)["error"]["message"]
    assert "caf\\xe9" in err


def test_ranks_other_than_0_print_nothing():
    assert postgrad("explain", "seed", RANK="1")[:2] == (0, "")


def test_the_installed_completion_completes_verbs():
    code, out, _ = postgrad(
        _POSTGRAD_COMPLETE="complete_bash", COMP_WORDS="postgrad ex", COMP_CWORD="1"
    )
    assert "explain" in out
    assert code == 0


def test_doctor_reports_every_part_of_the_machine(capsys):
    code = cli.call(["doctor", "--json"])
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert [check["name"] for check in checks] == [
        "python",
        "packages",
        "processor",
        "accelerator",
        "disk",
    ]
    assert code == (0 if all(check["passed"] for check in checks) else 3)
