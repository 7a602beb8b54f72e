"""What the comparison with lm-evaluation-harness makes of its measurements."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SIDE = """
import json, sys
for task in ("a", "b"):
    with open(sys.argv[2], "a") as out:
        out.write(json.dumps({"task": task}) + "\\n")
sys.exit(int(json.load(open(sys.argv[1]))["code"]))
"""


@pytest.fixture(autouse=True)
def _benchmarks_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def written(*logprobs, **metrics):
    return {"items": [{"logprobs": each, **metrics} for each in logprobs]}


def run(seconds, tokens):
    return {"cpu_seconds": seconds, "seconds": 2 * seconds, "tokens": tokens, "rows_of_logits": 10}


def test_figures_differ_where_a_log_likelihood_or_a_verdict_does():
    import lm_eval_parity

    ours = written([-1.0, -2.0], [-3.0, -4.0], acc=1.0, acc_norm=0.0)
    close = written([-1.0005, -2.0], [-3.0, -4.0], acc=1.0, acc_norm=0.0)
    found = lm_eval_parity.agreement(ours, close)
    assert found["largest_difference"] == pytest.approx(5e-4)
    assert found["log_likelihoods"] == 4
    assert lm_eval_parity.same(found)
    far = written([-1.002, -2.0], [-3.0, -4.0], acc=1.0, acc_norm=0.0)
    assert not lm_eval_parity.same(lm_eval_parity.agreement(ours, far))
    other = written([-1.0, -2.0], [-3.0, -4.0], acc=1.0, acc_norm=1.0)
    found = lm_eval_parity.agreement(ours, other)
    assert found["differing"] == {"acc_norm": 2}
    assert not lm_eval_parity.same(found)
    assert "NO {'acc_norm': 2}" in lm_eval_parity.parity_table({"made": {"float32": found}})


def test_speeds_are_medians_with_the_range_of_the_repetitions():
    import lm_eval_parity

    tasks = {
        "one": {"items": 10, "runs": {"ours": [run(1, 100), run(1, 100)],
                                      "lm_eval": [run(4, 300), run(3, 300)]}},
        "two": {"items": 5, "runs": {"ours": [run(2, 50)], "lm_eval": [run(2, 60)]}},
    }  # fmt: skip
    document = {
        "bound": {"seconds_per_token": 0.005, "seconds_per_row_of_logits": 0.01},
        "tasks": {name: {"bfloat16": task} for name, task in tasks.items()},
    }
    lines = lm_eval_parity.speed_table(document).splitlines()[2:]
    one, two, whole = (line.split() for line in lines)
    assert one[:5] == ["one", "yes", "10.00", "2.86", "3.50"]
    assert one[5:8] == ["3.00", "to", "4.00"]
    assert one[11:13] == ["10", "30"]
    assert one[13:15] == ["60", "%"]  # (100 tokens, 10 rows of logits) in 1 second
    assert two[:5] == ["two", "no", "2.50", "2.50", "1.00"]
    assert whole[:5] == ["all", "no", "5.00", "2.50", "2.00"]  # the complete repetition only


def test_lines_are_recorded_as_they_come_and_a_failure_is_told(tmp_path, monkeypatch):
    import lm_eval_parity

    monkeypatch.setattr(lm_eval_parity, "HERE", tmp_path)
    (tmp_path / "side.py").write_text(SIDE, encoding="utf-8")
    seen = []
    lm_eval_parity.run_side(sys.executable, "side.py", {"code": 0}, tmp_path / "x", seen.append)
    assert [line["task"] for line in seen] == ["a", "b"]
    with pytest.raises(SystemExit, match="exit code 3"):
        lm_eval_parity.run_side(sys.executable, "side.py", {"code": 3}, tmp_path / "y", seen.append)
    assert len(seen) == 4
