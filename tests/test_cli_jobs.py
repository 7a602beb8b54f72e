"""Whole jobs from the command line, on a real tiny model: what users run and what they get."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from postgrad import cli
from postgrad.run import Run, open_run

WORDS = ("yes", "no", "maybe", "number", "answer", "question", "system", "user")


def write_rows(path, count=200, **extra):
    """Write question/answer rows; every question is unlike the others."""
    lines = []
    for i in range(count):
        words = " ".join(WORDS[(i * (j + 3) + i // 8 + j) % 8] for j in range(6))
        row = {"question": f"{i * 7919} {words} {i}?", "answer": WORDS[i % 4], **extra}
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_recipe(folder, model, **sections):
    """Write a recipe of a few quick steps; return its path."""
    tree = {
        "name": "tiny",
        "model": {"base": str(model), "precision": "fp32", "adapt": {"r": 4}},
        "data": {
            "train": str(folder / "rows.jsonl"),
            "validation": 0.2,
            "test": 0.2,
            "near_duplicate": None,
            "max_length": 128,
        },
        "train": {"max_steps": 4, "learning_rate": 1e-3, "threads": 1, "tokens_per_batch": 256},
        "evaluate": {"fewshot": [0], "limit": 8, "max_new_tokens": 4},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    path = folder / "tiny.yaml"
    path.write_text(json.dumps(tree), encoding="utf-8")  # JSON is YAML
    return path


@pytest.fixture
def recipe(tmp_path, tiny_model_dir):
    write_rows(tmp_path / "rows.jsonl")
    return write_recipe(tmp_path, tiny_model_dir)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model_dir):
    """A whole run by the real command; (run, JSON document, stderr)."""
    folder = tmp_path_factory.mktemp("job")
    write_rows(folder / "rows.jsonl")
    path = write_recipe(folder, tiny_model_dir)
    result = subprocess.run(
        [sys.executable, "-m", "postgrad", "run", path, "--out", folder / "out", "--json"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return open_run(folder / "out"), json.loads(result.stdout), result.stderr


def test_a_run_prints_one_document_with_figures_that_have_an_interval_and_n(finished):
    run, document, _ = finished
    assert document["run"] == str(run.path)
    assert document["verdict"]
    arms = {m["arm"]: m for m in document["measurements"]}
    assert list(arms) == ["base/zero-shot", "tuned"]
    for measured in arms.values():
        assert 0 <= measured["low"] <= measured["value"] <= measured["high"] <= 1
        assert measured["n"] == 8
        assert (run.path / measured["evidence"]).exists()
    (compared,) = document["comparisons"]
    assert (compared["a"], compared["b"]) == ("base/zero-shot", "tuned")
    assert {"data", "preflight", "train", "evaluate", "report"} <= set(document["seconds"])


def test_a_run_tells_people_about_its_stages_on_stderr(finished):
    _, _, err = finished
    for stage in ("data", "preflight", "train", "evaluate", "report"):
        assert f"] {stage}\n" in err
    assert "Warning" not in err


def test_a_finished_run_is_sealed_and_listed(finished, capsys):
    run, document, _ = finished
    assert cli.call(["runs", str(run.path.parent), "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)["runs"]
    assert (listed["status"], listed["verdict"]) == ("done", document["verdict"])
    assert listed["tuned"] == document["measurements"][-1]
    assert cli.call(["runs", str(run.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["changed"] == []


def test_a_report_can_be_written_again(finished, tmp_path, capsys):
    copy = Run(shutil.copytree(finished[0].path, tmp_path / "copy", symlinks=True))
    before = copy.report_path.read_bytes()
    copy.report_path.unlink()
    assert cli.call(["report", str(copy.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["report"] == str(copy.report_path)
    assert copy.report_path.read_bytes() == before


def test_a_finished_run_is_not_overwritten(finished, capsys):
    run = finished[0]
    recipe = run.path.parent / "tiny.yaml"
    assert cli.call(["run", str(recipe), "--out", str(run.path)]) == 1
    err = capsys.readouterr().err
    assert "is not empty" in err
    assert "--resume" in err


def test_a_run_of_another_recipe_is_not_resumed(finished, capsys):
    run = finished[0]
    recipe = run.path.parent / "tiny.yaml"
    arguments = ["run", str(recipe), "seed=8", "--out", str(run.path), "--resume"]
    assert cli.call(arguments) == 1
    assert "seed: 7 there, 8 here" in capsys.readouterr().err


def test_training_first_and_evaluating_later(recipe, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.call(["train", str(recipe), "train.max_steps=2", "--out", str(out)]) == 0
    assert "training went to the end: 2 steps" in capsys.readouterr().out
    assert cli.call(["evaluate", str(out), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [m["arm"] for m in document["measurements"]] == ["base/zero-shot", "tuned"]


def test_evaluating_a_recipe_measures_the_base_model(recipe, tmp_path, capsys):
    assert cli.call(["evaluate", str(recipe), "--out", str(tmp_path / "out"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [m["arm"] for m in document["measurements"]] == ["base/zero-shot"]


def test_a_dry_run_plans_and_writes_nothing(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert cli.call(["run", str(recipe), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert plan["steps"] == 4
    assert plan["tokens"] > 0
    assert plan["rows"]["train"] == 120
    assert sorted(tmp_path.rglob("*")) == before


def test_an_estimate_takes_the_speed_of_an_earlier_run(finished, recipe, tmp_path, capsys):
    document = finished[1]
    runs = tmp_path / "runs"
    out = ["--out", str(runs / "a")]
    assert cli.call(["train", str(recipe), "train.max_steps=14", "train.eval_steps=20", *out]) == 0
    capsys.readouterr()
    given = [str(recipe), "--runs", str(runs), "report.price_per_hour=36"]
    assert cli.call(["estimate", *given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["estimate"]
    assert found["time_source"] == "recorded run"
    assert found["steps"] == 4
    assert found["trainable_parameters"] == document["train"]["trainable_parameters"]
    assert found["cost"]["here"]["amount"] == pytest.approx(
        found["train_seconds"] / 100,
        rel=0.01,
        abs=6e-4,  # seconds are rounded to a tenth
    )
    assert cli.call(["estimate", *given]) == 0
    text = capsys.readouterr().out
    assert "operations (multiplications and additions)" in text
    assert "CLOSED: no new jobs for new users" in text
    assert cli.call(["estimate", *given, "report.prices=none.toml"]) == 2
    assert "report.prices: none.toml" in capsys.readouterr().err


def test_a_row_is_shown_as_the_model_sees_it(recipe, capsys):
    assert cli.call(["explain", "--row", "3", str(recipe)]) == 0
    out = capsys.readouterr().out
    assert "<|im_start|>user" in out
    assert "<|im_end|>]]" in out
    assert cli.call(["explain", "--row", "3", str(recipe), "--json"]) == 0
    pieces = json.loads(capsys.readouterr().out)["pieces"]
    supervised = "".join(piece["text"] for piece in pieces if piece["weight"])
    assert supervised.removesuffix("<|im_end|>") in WORDS
    assert cli.call(["explain", "--row", "999", str(recipe)]) == 2
    assert "there is no training row 999" in capsys.readouterr().err


def test_doctor_makes_every_check_of_a_recipe(recipe, capsys):
    cli.call(["doctor", str(recipe), "--json"])
    names = {check["name"] for check in json.loads(capsys.readouterr().out)["checks"]}
    assert {"python", "disk", "rows-render", "packing-isolation", "fits-in-memory"} <= names


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "rows.jsonl"),
        ('{"question": "a", "answer": "b"}\n', "row"),
        ('{"question": "a", "answer": "b"}\n' * 50, "row"),
        ('{"messages": [{"role": "user", "content": "hello"}]}\n' * 3, "assistant"),
        ('{"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", '
         '"content": ""}]}\n', "empty"),
        ('{"question": "a"\n', "rows.jsonl:1"),
        ("\xff", "rows.jsonl"),
    ],
    ids=["empty", "one row", "identical", "only a user", "empty answer", "not JSON", "latin"],
)  # fmt: skip
def test_data_that_cannot_be_used_are_refused_with_3(content, message, recipe, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text(content, encoding="latin-1")
    assert cli.call(["train", str(recipe), "--out", str(tmp_path / "out"), "--json"]) == 3
    captured = capsys.readouterr()
    error = json.loads(captured.out)["error"]
    assert message in error["message"]
    assert error["remedy"]
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("override", "code", "message"),
    [
        ("data.max_length=3", 3, "max_length"),
        ("data.train=nowhere.jsonl", 1, "nowhere.jsonl"),
        ("model.base=./no-such-model", 1, "no-such-model"),
        ("data.format=alpaca", 3, "instruction"),
        ("train.waive=[no-such-check]", 2, "no-such-check"),
    ],
)
def test_what_cannot_work_is_refused_before_training(
    override, code, message, recipe, tmp_path, capsys
):
    out = tmp_path / "out"
    assert cli.call(["train", str(recipe), override, "--out", str(out)]) == code
    err = capsys.readouterr().err
    assert message in err
    assert "-> " in err
    assert "Traceback" not in err
    assert not (out / "checkpoints").exists()


def test_a_model_without_its_tokenizer_is_an_error(recipe, tmp_path, tiny_model_dir, capsys):
    bare = shutil.copytree(tiny_model_dir, tmp_path / "bare")
    for file in bare.glob("*token*"):
        file.unlink()
    code = cli.call(["train", str(recipe), f"model.base={bare}", "--out", str(tmp_path / "out")])
    err = capsys.readouterr().err
    assert code == 1
    assert "tokenizer" in err
    assert "Traceback" not in err


def test_a_full_disk_is_told_and_leaves_nothing_half_done(recipe, tmp_path):
    code = (
        "import resource, signal, sys\n"
        "from postgrad import cli, stages\n"
        "import torch, transformers\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "sys.exit(cli.call(sys.argv[1:]))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "train", recipe, "--out", tmp_path / "out"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "cannot write" in result.stderr
    assert "File too large" in result.stderr
    assert "Traceback" not in result.stderr
    checkpoints = tmp_path / "out" / "checkpoints"
    assert not checkpoints.exists() or not any(checkpoints.iterdir())


def test_ctrl_c_saves_and_the_run_goes_on_to_the_same_end(recipe, tmp_path, capsys):
    long = ["train.max_steps=80", "train.num_train_epochs=100", "train.eval_steps=40"]
    out = tmp_path / "out"
    command = [sys.executable, "-m", "postgrad", "train", recipe, *long, "--out", out, "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while time.monotonic() < until and not (len(Run(out).read_metrics()) > 5):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    error = json.loads(stdout)["error"]
    assert error["exit_code"] == 130
    assert "saved" in error["message"]
    stopped = len(Run(out).read_metrics())
    assert cli.call(["runs", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "interrupted"
    resumed = [*command[2:], "--resume"][1:]
    assert cli.call([str(argument) for argument in resumed]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["train"]["last_step"] >= 1
    assert len(Run(out).read_metrics()) > stopped


@pytest.mark.slow
def test_torchrun_starts_it_too(recipe, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1"]
    result = subprocess.run(
        [*command, "-m", "postgrad", "train", recipe, "--out", tmp_path / "out", "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["train"]["steps"] == 4


def test_several_processes_are_refused(recipe, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.call(["train", str(recipe)]) == 2
    assert "one process" in capsys.readouterr().err
