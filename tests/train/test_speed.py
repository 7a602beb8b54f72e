"""The speed of this machine comes from runs under equal conditions, or from the cache."""

import pytest

from postgrad.estimate import Method, Speed
from postgrad.run import create_run
from postgrad.train import speed
from training import make_recipe

METHOD = Method(trainable=1, full=False, compute_bytes=4)


def steps(count, rate=100.0, evaluated=(), pause=7.0):
    """Lines of metrics.jsonl at `rate` tokens/s; an evaluation takes `pause` seconds."""
    lines, seconds = [], 50.0
    for step in range(1, count + 1):
        seconds += 200 / rate + (pause if step - 1 in evaluated else 0)
        line = {"step": step, "tokens": 200 * step, "seconds": seconds}
        lines.append({**line, "train/loss": 1.0})
        if step in evaluated:
            lines.append({**line, "validation/loss": 1.0})
    return lines


def test_evaluations_and_the_first_step_are_no_part_of_the_rate():
    assert speed.training_rate(steps(30, 80.0, evaluated={10, 20})) == pytest.approx(80.0)


def test_a_run_of_few_steps_says_nothing():
    assert speed.training_rate(steps(speed.FEWEST_STEPS)) is None
    assert speed.training_rate([]) is None


def record(recipe, folder, rate, precision="float32", **facts):
    run = create_run(recipe, "train", folder)
    run.update(train={"precision": precision}, **facts)
    for line in steps(20, rate):
        values = {k: v for k, v in line.items() if "/" in k}
        run.metrics(line["step"], line["tokens"], line["seconds"], **values)
    return run


def test_the_newest_run_under_equal_conditions_counts(tmp_path):
    recipe = make_recipe("model", train={"threads": 1})
    record(recipe, tmp_path / "2026-01-01-a", 100.0)
    newest = record(recipe, tmp_path / "2026-01-02-b", 140.0)
    record(recipe, tmp_path / "2026-01-03-c", 1.0, precision="bfloat16")
    record(recipe, tmp_path / "2026-01-04-d", 1.0, hardware={"processor": "another"})
    other = make_recipe("model", model={"adapt": {"r": 8}}, train={"threads": 1})
    record(other, tmp_path / "2026-01-05-e", 1.0)
    held = make_recipe("model", train={"threads": 1, "kl_weight": 0.1})
    record(held, tmp_path / "2026-01-06-f", 1.0)
    eight = make_recipe(
        "model", model={"precision": "bf16"}, train={"threads": 1, "base_precision": "fp8"}
    )
    record(eight, tmp_path / "2026-01-07-g", 1.0)
    found = speed.recorded_speed(recipe, METHOD, tmp_path)
    assert (found.source, found.detail) == ("recorded run", str(newest.path))
    assert found.tokens_per_second == pytest.approx(140.0, rel=1e-3)
    two = make_recipe("model", train={"threads": 2})
    assert speed.recorded_speed(two, METHOD, tmp_path) is None
    assert speed.recorded_speed(recipe, METHOD, tmp_path / "none") is None


def test_a_damaged_run_is_passed_over(tmp_path):
    recipe = make_recipe("model")
    good = record(recipe, tmp_path / "a", 100.0)
    bad = record(recipe, tmp_path / "b", 100.0)
    bad.record_path.write_text("{", encoding="utf-8")
    assert speed.recorded_speed(recipe, METHOD, tmp_path).detail == str(good.path)


def test_a_probe_is_kept_for_its_conditions(tmp_path, monkeypatch):
    monkeypatch.setenv("POSTGRAD_CACHE", str(tmp_path))
    recipe = make_recipe("model", train={"micro_batch_tokens": 1000})
    key = speed.probe_key(recipe, METHOD, 50.0)
    assert speed.cached_speed(key) is None
    probed = Speed(123.0, "probe", "four layers", step_seconds=0.1)
    speed.keep_speed(key, probed)
    assert speed.cached_speed(key) == probed
    assert speed.probe_key(recipe, METHOD, 51.0) == key
    others = [
        speed.probe_key(recipe, METHOD, 500.0),
        speed.probe_key(recipe, Method(1, False, 2), 50.0),
        speed.probe_key(make_recipe("other", train={"micro_batch_tokens": 1000}), METHOD, 50.0),
    ]
    assert key not in others
