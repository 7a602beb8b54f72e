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


def test_error_rates_are_counted_with_the_methods_of_the_product(monkeypatch, tmp_path, capsys):
    import error_rates
    import numpy as np

    from postgrad.evaluate.statistics import bootstrap_mean, wilson

    monkeypatch.setattr(error_rates, "SIZES", (50,))
    monkeypatch.setattr(error_rates, "CLUSTERINGS", ((10, 5),))
    monkeypatch.setattr(error_rates, "BOOTSTRAP_RESAMPLES", 10_000)
    x = error_rates.f1_like(np.random.default_rng(1), (50, 3))
    counts = error_rates._resample_counts(50)
    assert (counts.sum(axis=1) == 50).all()
    for column, found in zip(x.T, error_rates._graded_intervals(x, counts, (0, 1)), strict=True):
        assert tuple(found) == pytest.approx(tuple(bootstrap_mean(column)), abs=0.008)
    exact = {cell["population"]: cell["coverage"] for cell in error_rates.share_cells()}
    rng = np.random.default_rng(2)
    ends = [wilson(int(k), 50) for k in rng.binomial(50, 0.3, 4000)]
    assert exact["rate 0.3"] == pytest.approx(np.mean([a <= 0.3 <= b for a, b in ends]), abs=0.015)
    cells = list(error_rates.paired_share_cells(4000))
    assert max(cell["false_verdicts"] or 0 for cell in cells) < 0.06
    assert max(cell["false_pass"] or 0 for cell in cells) < 0.07
    out = tmp_path / "rates.json"
    monkeypatch.setattr(sys, "argv", ["error_rates.py", "--quick", "--out", str(out)])
    error_rates.main()
    studies = {cell["study"] for cell in json.loads(out.read_text())["cells"]}
    assert len(studies) == 7
    printed = capsys.readouterr().out
    assert all(study in printed for study in studies)
