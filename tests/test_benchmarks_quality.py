"""What the benchmarks of quality say: loss curves, precisions, seeds, errors of estimates."""

import math
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks_importable(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


def test_the_distance_of_two_curves():
    from loss_curves import distance

    found = distance([2.0, 1.0], [2.0, 1.5])
    assert found == {"max": 0.5, "mean": 0.25, "relative": 0.142857, "signed_mean": -0.25}


def test_loss_curves_are_judged_against_the_reference():
    from loss_curves import judge, text

    reference = [4.0, 2.0, 1.0, 1.0]
    curves = {
        "TRL fp32": reference,
        "TRL bf16": [4.01, 1.99, 1.01, 0.99],
        "postgrad fp32": [4.001, 2.0, 1.0, 1.0],
        "postgrad bf16": [3.985, 2.015, 0.985, 1.015],
        "postgrad int8": [3.985, 2.015, 0.985, 1.015],
    }
    found = judge(curves)
    assert [row["holds"] for row in found["tolerances"]] == [True] * 5
    assert found["last_quarter_mean"]["postgrad bf16"] == 1.015
    shown = text({**found, "steps": 4, "rows_per_step": 4, "learning_rate": 1e-3})
    assert shown.count("yes") == 5
    higher = judge({**curves, "postgrad bf16": [loss + 0.03 for loss in reference]})
    assert [row["holds"] for row in higher["tolerances"]] == [True, False, True, False, True]


def test_a_precision_is_shown_to_cost_nothing_or_is_not():
    from precisions import compare, mean_interval, paired, verdict

    a = {"1": True, "2": True, "3": False, "4": False}
    b = {"1": True, "2": False, "3": True, "4": False}
    assert paired(a, b) == (4, 1, 1)
    with pytest.raises(SystemExit, match="different rows"):
        paired(a, {"1": True})
    low, high = mean_interval([0.0, 0.01, 0.02])
    # Student's t for two degrees of freedom is 4.3027; the standard error is 0.01 / sqrt(3).
    assert (low, high) == pytest.approx((0.01 - 0.024842, 0.01 + 0.024842), abs=1e-6)
    close = compare([(0.5, 0.501), (0.6, 0.6), (0.55, 0.551)], [(240, 2, 2)] * 3)
    assert (close["loss_shown"], close["accuracy_shown"]) == (True, True)
    assert verdict("bf16", close).endswith("bf16 costs no quality: shown")
    worse = compare([(0.5, 0.6), (0.6, 0.7), (0.5, 0.55)], [(240, 30, 2)] * 3)
    assert (worse["loss_shown"], worse["accuracy_shown"]) == (False, False)
    assert worse["accuracy"]["difference"] == pytest.approx(-84 / 720)
    alone = compare([(0.5, 0.5)], [(240, 0, 0)])
    assert (alone["held_out_loss"]["high"], alone["loss_shown"]) == (None, False)
    assert "no interval from one seed" in verdict("int8", alone)


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


def test_errors_of_an_estimate_are_relative_to_what_was_measured():
    import estimate_accuracy

    estimate = {"train_seconds": 300, "tokens": 1000, "peak_memory_bytes": 90}
    stopped_early = {"seconds": 100, "tokens": 500, "peak_memory_bytes": 100}
    found = estimate_accuracy.errors(estimate, stopped_early)
    assert found == {"seconds": 0.5, "peak_memory_bytes": -0.1}
    tasks = {
        "demo": {"measured": stopped_early, "estimates": {"probe": {**estimate, "errors": found}}}
    }
    line = estimate_accuracy.accuracy_table(tasks).splitlines()[-1].split()
    assert line == ["demo", "probe", "150", "100", "+50%", "0.00", "0.00", "-10%"]
