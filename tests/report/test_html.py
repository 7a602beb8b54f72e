"""The page: self-contained, escaped, small, and every number equal to its file."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from report_runs import SHARES, answered, recipe, write_data, write_evaluation, write_training

from postgrad.report.facts import recompute_command
from postgrad.report.html import write_report
from postgrad.run import create_run, read_json
from postgrad.types import Check, Score

VOID = {"meta", "br", "input"}
HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)></details></article>&amp;'


class Page(HTMLParser):
    """Tags, attributes and text of a page; every element must be closed in order."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def page_of(run) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


def test_the_verdict_comes_first_and_the_sections_follow(finished):
    page = page_of(finished)
    parts = ("The tuned model is better.", "86.0% of 300", "What this run does not show", "Before")
    places = [page.words.index(part) for part in parts]
    assert places == sorted(places)
    assert places[0] < 200
    ids = [a["id"] for t, a in page.tags if t in ("header", "section")]
    assert ids == [
        "verdict",
        "evaluation",
        "costs",
        "retention",
        "training",
        "answers",
        "data",
        "preflight",
        "recipe",
        "machine",
        "recompute",
    ]


def test_every_measurement_and_comparison_is_printed_as_in_the_file(finished):
    words = page_of(finished).words
    tree = read_json(finished.measurements_path)
    for m in tree["measurements"]:
        assert f"{100 * m['value']:.1f}%" in words
        assert f"{100 * m['low']:.1f}\N{EN DASH}{100 * m['high']:.1f}%" in words
        assert m["evidence"] in words
    for c in tree["comparisons"]:
        within = f"{100 * c['low']:+.1f} to {100 * c['high']:+.1f}"
        assert f"{100 * c['difference']:+.1f} {within}" in words
        assert f"{c['wins']} / {c['losses']} {c['n']} {100 * c['detectable']:.1f}" in words
    assert "Linear SVM 80.0%" in words


def test_facts_of_training_data_and_machine_are_printed(finished):
    words = page_of(finished).words
    train = finished.record["train"]
    for fact in (
        f"{train['trainable_parameters']:,} of {train['total_parameters']:,}",
        "Tokens per second 1,203",
        "Peak memory 2.3 GB",
        "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "Train 3,000 rows",
        "Not used 40 rows",
        "licences.jsonl:9 : same request (kept: licences.jsonl:3 )",
        "and 26 more in data/dropped.jsonl",
        "Example CPU @ 2.0GHz",
        "train 6 min 11 s 46.5%",
        "USD 0.0886 at USD 0.4 an hour",
        "learning_rate: 0.001",
        "kept: step 112",
        "98.0% of answers equal",
        "Forgetting: not measured in this run.",
    ):
        assert fact in words, fact


def test_waived_checks_are_loud(finished):
    page = page_of(finished)
    assert "Waived: pre-flight check supervised-fraction failed" in page.words
    assert "! WAIVED supervised-fraction" in page.words
    assert "Overruled by train.waive in the recipe." in page.words
    assert ("p", {"class": "alarm", "dir": "auto"}) in page.tags
    assert "112 failures: licences.jsonl:14 , licences.jsonl:15 and 110 more" in page.words


def test_nothing_is_loaded_from_anywhere(finished):
    page = page_of(finished)
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed", "base")
        assert not {"src", "srcset", "action"} & set(attributes)
        assert (attributes.get("href") or "#").startswith("#")
        assert not [name for name in attributes if name.startswith("on")]
    source = finished.report_path.read_text(encoding="utf-8")
    assert not re.search(r"https?://|url\(|@import", source)
    policy = next(a for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"


def test_ids_are_unique_and_labels_point_to_inputs(finished):
    page = page_of(finished)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    inputs = {a["id"] for t, a in page.tags if t == "input"}
    assert {a["for"] for t, a in page.tags if t == "label"} == inputs
    assert len(inputs) == 5


def test_all_drawings_are_xml_with_title_and_description(finished):
    source = write_report(finished).read_text(encoding="utf-8")
    drawings = re.findall(r"<svg.*?</svg>", source, flags=re.S)
    assert len(drawings) == 10
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        assert root.find("title").text
        assert root.find("desc").text


def test_user_text_is_never_markup(make_run):
    run = make_run(data__system=HOSTILE)
    arms = answered(SHARES, 40)
    hostile = {
        arm: [
            replace(row, prompt=HOSTILE + row.prompt, completion=HOSTILE, reference=HOSTILE)
            for row in rows
        ]
        for arm, rows in arms.items()
    }
    write_evaluation(run, hostile)
    run.write_json(
        run.preflight_path,
        {"passed": True, "checks": [{"name": HOSTILE, "passed": True, "detail": HOSTILE}]},
    )
    run.write_jsonl(run.manifest_path, [{"file": HOSTILE, "rows": 1, "format": HOSTILE}])
    dropped = {"id": "x", "source": HOSTILE, "step": HOSTILE, "reason": HOSTILE, "twin": HOSTILE}
    run.write_jsonl(run.dropped_path, [dropped])
    run.update(name=HOSTILE, demo={"attribution": HOSTILE}, hardware={"processor": HOSTILE})
    page = page_of(run)
    assert not [tag for tag, _ in page.tags if tag in ("script", "img")]
    assert page.words.count('<script>alert("x")</script>') > 20


def test_odd_characters_can_be_written(make_run):
    run = make_run()
    arms = answered(SHARES, 12)
    said = "\x00\x07\x1b[0m \u202egnirts\u202c \U0001f600"
    odd = [replace(row, completion=said) for row in arms["tuned"]]
    write_evaluation(run, {**arms, "tuned": odd})
    page = page_of(run)
    assert "\u2400\u2407\u241b[0m" in page.words
    assert "\x00" not in page.words


def test_long_texts_are_folded_and_the_page_stays_small(make_run):
    run = make_run()
    arms = answered(SHARES, 300)
    long = {
        arm: [
            replace(row, prompt=row.example_id + "<é> " * 3000, completion="\u4e2d" * 4000)
            for row in rows
        ]
        for arm, rows in arms.items()
    }
    write_evaluation(run, long)
    page = page_of(run)
    assert run.report_path.stat().st_size < 300_000
    assert "more characters in the file" in page.words
    assert "are in the files" in page.words


def test_the_prompts_shared_start_is_printed_once(finished):
    page = page_of(finished)
    assert page.words.count("Name the licence. Copyright (c)") == 1
    assert "Every prompt starts with" in page.words


def test_each_outcome_is_counted_and_can_be_chosen(finished):
    words = page_of(finished).words
    tree = read_json(finished.measurements_path)
    c = tree["comparisons"][1]
    assert f"Lost {c['losses']} Won {c['wins']} Both wrong" in words
    assert f"Won: {c['wins']}" in words
    source = finished.report_path.read_text(encoding="utf-8")
    for outcome in ("win", "loss", "both-wrong", "both-right"):
        assert f"#show-{outcome}:checked ~ .group:not(.{outcome})" in source


def test_graded_answers_show_their_scores(make_run):
    run = make_run()
    arms = answered(SHARES, 30)
    graded = {
        arm: [
            replace(r, scores={"f1": Score(0.25 + r.scores["exact_match"].value / 2, False)})
            for r in rows
        ]
        for arm, rows in arms.items()
    }
    write_evaluation(run, graded, metric="f1")
    words = page_of(run).words
    assert "Won: the tuned answer scored higher." in words
    assert "Tuned model 0.75" in words
    assert "paired bootstrap" in words


def test_missing_parts_are_said_to_be_missing(tmp_path):
    run = create_run(recipe(report__price_per_hour=None), "run", out=tmp_path / "r")
    words = page_of(run).words
    assert "No verdict." in words
    for part in (
        "Not measured: no arm was evaluated.",
        "Not measured: no model was trained in this run.",
        "Not measured: no manifest of the data was written.",
        "Not measured: no check was run.",
        "Not measured: no stage was timed.",
        "time only",
        "As given: auto not yet resolved.",
    ):
        assert part in words, part
    assert "nan" not in words.lower().split()
    assert "None" not in words


def test_a_run_that_only_trained_shows_its_curves(tmp_path):
    run = create_run(recipe(), "train", out=tmp_path / "r")
    write_data(run)
    write_training(run)
    page = page_of(run)
    assert "No verdict. A model was trained, but no test row was answered" in page.words
    assert "Quality: not measured" in page.words
    assert "kept: step 112" in page.words


def test_a_refused_check_names_rows_and_remedy(tmp_path):
    run = create_run(recipe(), "run", out=tmp_path / "r")
    check = Check("end-token", False, "no stop", "set the template", ("a.jsonl:3",), failures=1)
    tree = {"passed": False, "checks": [{**_plain(check)}]}
    run.write_json(run.preflight_path, tree)
    words = page_of(run).words
    assert "Refused before training. 1 pre-flight check failed: end-token." in words
    assert "1 failure: a.jsonl:3 Remedy: set the template" in words


def _plain(check: Check) -> dict:
    names = ("name", "passed", "detail", "remedy", "rows", "failures")
    return json.loads(json.dumps({name: getattr(check, name) for name in names}))


def test_the_page_depends_on_the_files_only(finished):
    first = write_report(finished).read_bytes()
    assert write_report(finished).read_bytes() == first
    assert not list(finished.path.glob(".*.tmp"))


def test_the_printed_command_gives_the_printed_number(finished):
    arms = answered(SHARES)
    arms["tuned"][3] = replace(arms["tuned"][3], error="timeout", scores={})
    write_evaluation(finished, arms)
    tuned = read_json(finished.measurements_path)["measurements"][-1]
    command = recompute_command(tuned["evidence"], tuned["metric"])
    assert command in page_of(finished).words.replace("  ", " ")
    _, *arguments = shlex.split(command)
    done = subprocess.run(
        [sys.executable, *arguments], cwd=finished.path, capture_output=True, text=True, check=True
    )
    value, n = done.stdout.split()
    assert float(value) == pytest.approx(tuned["value"])
    assert int(n) == tuned["n"]


def test_no_torch_is_imported():
    code = (
        "import sys, postgrad.report.html, postgrad.report.model_card; "
        "sys.exit(bool({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
