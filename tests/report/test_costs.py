"""The cost section: table, break-even against the best prompt, and what is said without figures."""

import dataclasses

from report_runs import build_run

from postgrad.report.collect import collect
from postgrad.report.costs import break_even_sentence, costs_section
from postgrad.report.html import page
from postgrad.report.model_card import write_model_card
from postgrad.run import read_json

SHARES = {"base/zero-shot": 0.1, "base/few-shot-8": 0.3, "base/few-shot-8-retrieved": 0.6}


def test_it_shows_what_each_arm_takes_and_when_tuning_is_cheaper_than_the_best_prompt(tmp_path):
    run = build_run(tmp_path / "run", shares={**SHARES, "tuned": 0.9})
    report = collect(run)
    shown = costs_section(report)
    assert "Against the best prompt: after 928 requests tuning is cheaper than " in shown
    assert "base/few-shot-8-retrieved: 371 s of training / (0.5 s - 0.1 s a request)" in shown
    assert "Base model, 8 nearest examples in the prompt" in shown
    assert "540 (540)" in shown
    assert "never" in shown
    assert shown in page(report)
    write_model_card(run)
    assert "after 928 requests tuning is cheaper" in run.card_path.read_text(encoding="utf-8")


def test_what_was_not_measured_is_said_to_be_so(tmp_path):
    run = build_run(tmp_path / "run")
    tree = read_json(run.measurements_path)
    tree["costs"]["break_even"] = []
    run.write_json(run.measurements_path, tree)
    report = collect(run)
    assert break_even_sentence(report.evaluation).startswith("Break-even: not measured")
    del tree["costs"]
    run.write_json(run.measurements_path, tree)
    assert "Not measured" in costs_section(collect(run))
    assert costs_section(dataclasses.replace(report, evaluation=None)) is None
