"""kill -9 at any moment of a whole run, then --resume: bit by bit what would have been anyway."""

import json
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from postgrad import stages
from postgrad.config import load_recipe
from postgrad.errors import TrainingError
from postgrad.progress import SilentDisplay
from postgrad.run import Run, read_json, read_jsonl, sha256_file
from postgrad.train import verify_resume as proof
from test_stages import write_recipe


def command(recipe: Path, out: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "postgrad", "run", str(recipe), "--out", str(out), *flags]


@dataclass
class Straight:
    """An uninterrupted run and its recipe."""

    recipe: Path
    run: Run


@pytest.fixture(scope="module")
def straight(tiny_model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    recipe = write_recipe(folder, tiny_model_dir, max_steps=30, eval_steps=4)
    stages.run(load_recipe(recipe), stages.Options(out=folder / "out"))
    return Straight(recipe, Run(folder / "out"))


@pytest.fixture(scope="module")
def span(straight, tmp_path_factory):
    """Seconds from the first file to the end of a run in a process of its own."""
    out = tmp_path_factory.mktemp("span") / "out"
    with subprocess.Popen(command(straight.recipe, out), stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (out / "run.json").exists():
            time.sleep(0.01)
        began = time.monotonic()
    assert process.returncode == 0
    return time.monotonic() - began


def kill_after(seconds: float, recipe: Path, out: Path, *flags: str) -> None:
    """Start a run and kill it `seconds` after its directory is there, unless it is done by then."""
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command(recipe, out, *flags), **silent) as process:
        while process.poll() is None and not (out / "run.json").exists():
            time.sleep(0.002)
        time.sleep(seconds)
        process.kill()


def content(run: Run):
    """Everything that must be equal: all but clocks, paths and machine facts."""
    volatile = {"seconds", "tokens_per_second", "peak_memory_bytes"}

    def timeless(line):
        return {key: value for key, value in line.items() if key not in volatile}

    measured = read_json(run.measurements_path)
    del measured["costs"]  # seconds, all of it
    for reference in measured["references"]:
        reference["source"] = re.sub(r" in \d+ s\b", "", reference["source"])
    weights = sorted(run.export.rglob("*.safetensors"))
    assert weights
    return {
        "metrics": [timeless(line) for line in run.read_metrics()],
        "weights": {str(path.relative_to(run.path)): sha256_file(path) for path in weights},
        "evidence": {
            path.name: [timeless(row) for row in read_jsonl(path)]
            for path in sorted(run.path.glob("evidence/*.jsonl"))
        },
        "measurements": measured,
        "train": timeless(run.record["train"]),
        "rows": run.kept_path.read_bytes(),
        "config": run.config_path.read_bytes(),
        "dropped": run.dropped_path.read_bytes(),
    }


def assert_resumes(straight: Straight, out: Path, delays: list[float]):
    flags: tuple[str, ...] = ()
    for delay in delays:
        kill_after(delay, straight.recipe, out, *flags)
        flags = ("--resume",)
    done = subprocess.run(
        command(straight.recipe, out, "--resume"), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    found, wanted = content(Run(out)), content(straight.run)
    for key, value in wanted.items():
        assert found[key] == value, key
    assert Run(out).changed_files() == []


def test_a_run_killed_in_training_and_resumed_is_the_same(straight, tmp_path):
    """The moment: when the metrics of a random step appear."""
    out = tmp_path / "out"
    step = random.Random(0).randrange(2, 28)
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command(straight.recipe, out), **silent) as process:
        while process.poll() is None and proof.last_step(Run(out)) < step:
            time.sleep(0.002)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert step <= proof.last_step(Run(out)) < 30
    assert_resumes(straight, out, [])


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(20))
def test_a_run_killed_at_a_random_moment_and_resumed_is_the_same(straight, span, tmp_path, trial):
    """One or two kills, anywhere between the first file and the last."""
    generator = random.Random(trial)
    delays = [generator.uniform(0, span) for _ in range(generator.choice([1, 2]))]
    assert_resumes(straight, tmp_path / "out", delays)


def test_the_proof_for_users_passes_and_names_what_differs(tiny_model_dir, tmp_path):
    recipe = load_recipe(write_recipe(tmp_path, tiny_model_dir))
    folder = tmp_path / "proof"
    folder.mkdir()
    found = proof.verify_resume(recipe, folder, SilentDisplay())
    assert found["exact"] is True
    assert proof.STEPS // 2 <= found["killed_after_step"] < proof.STEPS
    one, other = Run(folder / "straight"), Run(folder / "killed")
    assert proof.first_difference(one, other) is None
    assert one.record["train"]["steps"] == proof.STEPS
    assert any(line["event"] == "resumed" for line in read_jsonl(other.events_path))
    weights = next(other.export.rglob("*.safetensors"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "weights in adapter_model.safetensors" in proof.first_difference(one, other)
    lines = other.read_metrics()
    lines[5]["train/loss"] = 0.5
    other.write_jsonl(other.metrics_path, lines)
    assert "metrics at step" in proof.first_difference(one, other)
    other.write_jsonl(other.metrics_path, one.read_metrics()[:-1])
    assert "lines of metrics" in proof.first_difference(one, other)


def test_the_proof_tells_why_training_fails(tiny_model_dir, tmp_path):
    path = write_recipe(tmp_path, tiny_model_dir)
    tree = json.loads(path.read_text())
    tree["data"]["train"] = str(tmp_path / "nowhere.jsonl")
    path.write_text(json.dumps(tree))
    with pytest.raises(TrainingError, match=r"(?s)exit code 1: .*nowhere\.jsonl"):
        proof.verify_resume(load_recipe(path), tmp_path, SilentDisplay())
    with pytest.raises(TrainingError, match="ended with exit code 1 before it could be killed"):
        proof.kill_midway(path, tmp_path / "out", after_step=1)
