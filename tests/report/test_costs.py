"""The cost section: table, break-even against the best prompt, and what is said without figures."""

import dataclasses
import re
from xml.etree import ElementTree

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


def test_the_picture_starts_at_the_training_and_crosses_at_the_break_even(tmp_path):
    run = build_run(tmp_path / "run", shares={**SHARES, "tuned": 0.9})
    shown = costs_section(collect(run))
    wide = ElementTree.fromstring(re.search(r"<svg.*?</svg>", shown, re.S)[0])
    lines = [e.get("points").split() for e in wide.iter("polyline")]
    assert len(lines) == 4
    *prompting, tuned = [[tuple(map(float, p.split(","))) for p in line] for line in lines]
    assert all(line[0][1] > tuned[0][1] for line in prompting)
    ring = next(e for e in wide.iter("circle") if e.get("class") == "ring")
    x = float(ring.get("cx"))
    assert abs(x - (tuned[0][0] + tuned[1][0]) / 2) < 1
    for line in (tuned, prompting[2]):
        assert abs(float(ring.get("cy")) - (line[0][1] + line[1][1]) / 2) < 1
    said = ["".join(e.itertext()) for e in wide.iter("text")]
    assert {"928 requests", "requests", "Tuned model"} <= set(said)
    ends = [e for e in wide.iter("text") if e.get("class") in ("note base", "note tuned")]
    places = [float(e.get("y")) for e in ends]
    assert len(places) == 4
    assert min(abs(a - b) for a in places for b in places if a != b) >= 12
    assert "Minutes of machine time" in shown


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
