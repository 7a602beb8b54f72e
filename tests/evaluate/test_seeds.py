from dataclasses import asdict

import numpy as np
import pytest
from report_runs import recipe

from postgrad.errors import DataError
from postgrad.evaluate.compare import compare, measure
from postgrad.evaluate.evidence import read_evidence, write_evidence
from postgrad.evaluate.seeds import combine, reuse_base_evidence
from postgrad.evaluate.statistics import clustered_error, two_levels
from postgrad.run import Run, create_run, read_json
from postgrad.types import Evidence, Score

METRIC = "exact_match"
ARMS = ("base/zero-shot", "tuned")


def rows(scores, group=None):
    return [
        Evidence(
            f"id{i}", "q", "r", "c", {METRIC: Score(float(s), bool(s))},
            group=None if group is None else str(i // group),
        )
        for i, s in enumerate(scores)
    ]  # fmt: skip


def seeds(folder, base, tuned, group=None):
    """A parent run and a member for each row of `tuned` [seeds, rows]."""
    asked = recipe()
    parent = create_run(asked, "seeds", out=folder)
    members = []
    for number, scores in enumerate(tuned):
        member = create_run(asked.with_seed(7 + number), "run", out=parent.seeds / str(7 + number))
        arms = dict(zip(ARMS, (rows(base, group), rows(scores, group)), strict=True))
        for arm, found in arms.items():
            write_evidence(member, "bot", arm, found)
        tree = {
            "task": "bot",
            "metric": METRIC,
            "measurements": [asdict(measure(arms[a], "bot", METRIC, a)) for a in ARMS],
            "comparisons": [asdict(compare(*arms.values(), "bot", METRIC, *ARMS))],
            "references": [],
        }
        member.write_json(member.measurements_path, tree)
        members.append(member)
    return parent, members


@pytest.fixture
def scores():
    rng = np.random.default_rng(1)
    return (rng.random(200) < 0.4) * 1.0, (rng.random((3, 200)) < 0.7) * 1.0


def test_figures_are_those_of_both_levels(tmp_path, scores):
    base, tuned = scores
    parent, members = seeds(tmp_path / "out", base, tuned)
    document = combine(parent, members)
    expected = two_levels(tuned, seed=7)
    measured = document["measurements"][1]
    assert (measured["value"], measured["low"], measured["high"]) == (
        expected.mean,
        *expected.over_both,
    )
    gap = two_levels(tuned - base, seed=7, bounds=(-1.0, 1.0))
    (c,) = document["comparisons"]
    assert (c["difference"], c["low"], c["high"], c["p"]) == (gap.mean, *gap.over_both, gap.p)
    assert c["low"] <= c["lower"] <= c["difference"] <= c["upper"] <= c["high"]
    assert (c["verdict"], c["method"], c["n"]) == ("improved", "two-level", 200)
    assert [s["against"] for s in document["seeds"]] == ["", "base/zero-shot"]
    assert document["seeds"][0]["values"] == pytest.approx(tuple(tuned.mean(axis=1)))
    assert parent.record["verdict"].startswith("over 3 seeds: tuned beats zero-shot prompting by")
    assert read_json(parent.measurements_path)["task"] == "bot"


def test_rows_in_groups_have_clustered_errors(tmp_path, scores):
    base, tuned = scores
    parent, members = seeds(tmp_path / "out", base, tuned, group=10)
    (spread, _) = combine(parent, members)["seeds"]
    groups = [str(i // 10) for i in range(200)]
    assert spread["row_error"] == pytest.approx(clustered_error(tuned.mean(axis=0), groups))
    assert spread["mean"] == pytest.approx(tuned.mean())


def test_seeds_on_other_rows_are_refused(tmp_path, scores):
    base, tuned = scores
    parent, members = seeds(tmp_path / "out", base, tuned)
    write_evidence(members[1], "bot", "tuned", rows(tuned[1][:150]))
    with pytest.raises(DataError, match="50 examples only in seed 7"):
        combine(parent, members)


def test_only_what_the_base_model_answered_is_reused(tmp_path, scores):
    base, tuned = scores
    _, members = seeds(tmp_path / "out", base, tuned)
    new = Run(tmp_path / "new")
    reuse_base_evidence(members[0], new)
    assert [p.name for p in (new.path / "evidence").iterdir()] == ["bot.base-zero-shot.jsonl"]
    assert read_evidence(new, "bot", "base/zero-shot") == rows(base)


def with_benchmarks(members, names, metric="acc"):
    """Give every member benchmarks that are a little worse after tuning, and a perplexity each."""
    for number, member in enumerate(members):
        tree = read_json(member.measurements_path)
        for name in names:
            rng = np.random.default_rng(number)
            base = np.arange(400) % 2 == 0
            tuned = base & (rng.random(400) > 0.04)
            arms = {
                arm: [
                    Evidence(f"{name}{i}", "q", "r", "c", {metric: Score(float(s), bool(s))})
                    for i, s in enumerate(scores)
                ]
                for arm, scores in (("base", base), ("tuned", tuned))
            }
            for arm, found in arms.items():
                write_evidence(member, name, arm, found)
                measured = asdict(measure(found, name, metric, arm))
                tree["measurements"] += [measured, {**measured, "metric": "perplexity"}]
            tree["comparisons"].append(
                asdict(compare(*arms.values(), name, metric, "base", "tuned"))
            )
        member.write_json(member.measurements_path, tree)


def test_benchmarks_over_seeds_are_a_suite_and_a_perplexity_is_left_out(tmp_path, scores):
    base, tuned = scores
    parent, members = seeds(tmp_path / "out", base, tuned)
    with_benchmarks(members, ("lambada_openai", "piqa"))
    document = combine(parent, members)
    assert {m["metric"] for m in document["measurements"]} == {METRIC, "acc"}
    target, *suite = document["comparisons"]
    assert target["corrected"] is None
    assert [c["task"] for c in suite] == ["lambada_openai", "piqa"]
    assert all(c["corrected"] == pytest.approx(min(1.0, 2 * c["p"])) for c in suite)
