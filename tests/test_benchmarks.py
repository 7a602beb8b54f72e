import json
import math
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


CONTENDER = """
import json, sys, time
steps, pause = int(sys.argv[2]), float(sys.argv[3])
with open(sys.argv[1], "a") as file:
    file.write(json.dumps({"threads": 3}) + "\\n")
    for step in range(1, steps + 1):
        time.sleep(pause)
        line = {"step": step, "tokens": 100 * step, "seconds": 10.0 * step, "supervised": 7}
        file.write(json.dumps(line) + "\\n")
        file.flush()
if len(sys.argv) > 4:
    sys.exit(sys.argv[4])
"""


def watch(tmp_path, timing, *arguments):
    """Watch a small program that writes what a contender writes, with made-up times."""
    import harness

    program = tmp_path / "contender.py"
    program.write_text(CONTENDER)
    metrics, log = tmp_path / "metrics.jsonl", tmp_path / "log"
    command = [sys.executable, program, metrics, *map(str, arguments)]
    return harness.watch(command, metrics, timing, log, harness.contender_environment())


def test_a_contender_is_timed_after_its_warm_up_and_then_ended(tmp_path):
    import harness

    timing = harness.Timing(warmup_steps=2, seconds=30, least_steps=3)
    found = watch(tmp_path, timing, 100_000, 0.05)
    assert 3 <= found.steps < 1000
    assert found.tokens == 100 * found.steps
    assert found.supervised == 7 * found.steps
    assert found.tokens_per_second == 10
    assert found.supervised_per_second == pytest.approx(0.7)
    assert found.peak_memory_bytes is None or found.peak_memory_bytes > 1_000_000
    assert found.row()["threads"] == 3


def test_a_contender_that_fails_is_reported_with_its_last_words(tmp_path):
    import harness

    timing = harness.Timing(warmup_steps=2, seconds=30, least_steps=3)
    with pytest.raises(harness.ContenderError, match=r"3 steps, exit code 1(.|\n)*out of rows"):
        watch(tmp_path, timing, 3, 0.0, "out of rows")


def test_a_contender_that_is_too_slow_is_given_up(tmp_path):
    import harness

    timing = harness.Timing(warmup_steps=1, seconds=1, least_steps=1, limit_seconds=0.5)
    with pytest.raises(harness.ContenderError, match="0 steps"):
        watch(tmp_path, timing, 1, 30.0)


def test_rows_are_made_from_the_seed_alone_and_never_twice(tmp_path):
    import rows

    for kind in rows.KINDS:
        one = rows.write_rows(tmp_path / "one.jsonl", kind, 200, 7).read_text()
        assert rows.write_rows(tmp_path / "two.jsonl", kind, 200, 7).read_text() == one
        assert rows.write_rows(tmp_path / "two.jsonl", kind, 200, 8).read_text() != one
        assert len(set(one.splitlines())) == 200


def test_given_conversations_keep_their_last_answer_to_learn(tmp_path):
    import rows

    turns = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]
    source = tmp_path / "source.jsonl"
    source.write_text(json.dumps({"messages": turns, "id": 1}) + "\n\n")
    copied = json.loads(rows.copy_rows(source, tmp_path / "rows.jsonl").read_text())
    assert copied == {"prompt": turns[:3], "completion": turns[3:]}
    source.write_text(json.dumps({"text": "plain"}) + "\n")
    with pytest.raises(SystemExit, match=r"source\.jsonl:1: neither messages"):
        rows.copy_rows(source, tmp_path / "rows.jsonl")


def test_the_bound_counts_the_products_of_a_lora_step(tiny_model_dir):
    import machine_bound
    import torch

    counts, head = machine_bound.linear_shapes(tiny_model_dir)
    # Two layers: q and o 64x64, k and v 32x64, gate and up 128x64, down 64x128.
    assert counts == {(64, 64): 4, (32, 64): 4, (128, 64): 4, (64, 128): 2}
    assert head[1] == 64
    found = machine_bound.measure(counts, head, torch.float32)
    weights = 4 * 64 * 64 + 4 * 32 * 64 + 6 * 128 * 64
    low_rank = 16 * (4 * 128 + 4 * 96 + 6 * 192)
    assert found["frozen_flops_per_token"] == 4 * weights
    assert found["adapter_flops_per_token"] == 6 * low_rank
    assert found["head_flops_per_supervised_token"] == 4 * 64 * head[0]
    seconds = found["frozen_seconds_per_token"]
    assert seconds == pytest.approx(4 * weights / found["gflops"] / 1e9)


def test_the_bound_falls_with_the_share_of_supervised_tokens():
    from train_speed import bound_tokens_per_second

    bound = {
        "frozen_seconds_per_token": 3e-4,
        "adapter_seconds_per_token": 1e-4,
        "head_seconds_per_supervised_token": 2e-4,
    }
    assert bound_tokens_per_second(bound, 0.0) == pytest.approx(2500)
    assert bound_tokens_per_second(bound, 0.5) == pytest.approx(2000)


def test_a_summary_gives_medians_spread_and_ratios():
    from train_speed import BEST, DEFAULTS, OURS, speed_table, summarise

    def run(contender, rate):
        return {
            "contender": contender,
            "tokens": 1000,
            "supervised_tokens": 500,
            "tokens_per_second": rate,
            "supervised_tokens_per_second": rate / 2,
            "peak_memory_bytes": 2_000_000_000,
        }

    rates = {OURS: (900, 1000, 1300), DEFAULTS: (90, 100, 130), BEST: (180, 200, 260)}
    runs = [run(name, rate) for name, found in rates.items() for rate in found]
    products = {
        "gflops": 900.0,
        "frozen_seconds_per_token": 3e-4,
        "adapter_seconds_per_token": 1e-4,
        "head_seconds_per_supervised_token": 2e-4,
    }
    summary = summarise(runs, [{"bf16": products, "fp32": products}])
    ours = summary["contenders"][OURS]
    assert (ours["lowest"], ours["tokens_per_second"], ours["highest"]) == (900, 1000, 1300)
    assert summary["bound_tokens_per_second"] == 2000
    assert ours["share_of_bound"] == 0.5
    shown = speed_table([{"kind": "chat", "rows": {"mean_tokens": 170.0}, "summary": summary}])
    line = next(line for line in shown.splitlines() if OURS in line)
    assert line.split()[-5:] == ["GB", "50", "%", "10.0", "5.0"]


def test_the_distance_of_two_curves():
    from loss_curves import distance

    found = distance([2.0, 1.0], [2.0, 1.5])
    assert found == {"max": 0.5, "mean": 0.25, "relative": 0.142857, "signed_mean": -0.25}


def test_hardware_names_are_fit_for_file_names():
    from harness import hardware_slug

    xeon = {"processor": "Intel(R) Xeon(R) Processor @ 2.10GHz", "cores": 2}
    ryzen = {"processor": "AMD Ryzen 9 7950X 16-Core Processor", "cores": 32}
    assert hardware_slug(xeon) == "xeon-2-cores"
    assert hardware_slug(ryzen) == "ryzen-9-7950x-32-cores"


def test_seeds_below_the_linear_model_are_named_with_the_gap():
    from quality import misses, summarise

    def run(seed, tuned, difference):
        return {
            "seed": seed,
            "tuned": tuned,
            "linear": {"value": tuned - difference},
            "tuned_minus_linear": {"difference": difference},
            "seconds": {"train": 60.0},
        }

    runs = [run(7, 0.9, 0.01), run(8, 0.86, -0.03)]
    summary = summarise(runs)
    assert summary["seeds_above_linear"] == 1
    assert math.isclose(summary["difference_mean"], -0.01)
    text = misses({"banking77": {"runs": runs}})
    assert text == "banking77, seed 8: 3.0 points below the linear model"


def test_rows_for_a_gpu_are_full_or_like_a_chat():
    from gpu_shapes import FULL_ROW, MEAN_CHAT, make_rows

    full = make_rows("full", 2, 1000)
    assert [(len(row), row.supervised) for row in full] == [(FULL_ROW, FULL_ROW - 1)] * 2
    chat = make_rows("chat", 2000, 1000)
    mean = sum(len(row) for row in chat) / len(chat)
    assert mean == pytest.approx(MEAN_CHAT, rel=0.05)
    assert sum(row.supervised for row in chat) / sum(len(row) for row in chat) == pytest.approx(
        0.5, abs=0.01
    )


def test_the_labels_that_the_peer_gets_are_ours(tmp_path):
    from gpu_shapes import make_rows, write_tokens

    rows = make_rows("chat", 3, 1000)
    lines = write_tokens(tmp_path / "rows.jsonl", rows).read_text().splitlines()
    for row, line in zip(rows, map(json.loads, lines), strict=True):
        assert line["input_ids"] == row.ids.tolist()
        assert sum(label != -100 for label in line["labels"]) == row.supervised


def test_a_measurement_that_failed_has_no_share_and_stands_in_the_table():
    from gpu_train_speed import share_of_bound, speed_table

    products = {
        "frozen_seconds_per_token": 3e-4,
        "adapter_seconds_per_token": 1e-4,
        "head_seconds_per_supervised_token": 2e-4,
    }
    assert share_of_bound({"failed": "out of memory"}, products, "full") == {}
    share = share_of_bound({"tokens_per_second": 1000.0}, products, "full")
    assert share["share_of_bound"] == pytest.approx(0.6, abs=1e-3)
    base = {"model": "llama-3-8b", "case": "full"}
    measured = [
        {**base, "trainer": "postgrad", "tokens_per_second": 15000.0, **share},
        {**base, "trainer": "TRL defaults", "failed": "out of memory"},
        {**base, "trainer": "TRL tuned", "tokens_per_second": 5000.0},
    ]
    checks = {"loss curves": {"passed": False, "failed": "no time left"}}
    text = speed_table({"measured": measured, "checks": checks, "peer": {}})
    ours, failed, *_ = text.splitlines()[2:]
    assert "15,000" in ours
    assert ours.split()[-3:] == ["3.0", "16,000", "tok/s"]
    assert "out of memory" in failed
    assert "loss curves: FAILED: no time left" in text
