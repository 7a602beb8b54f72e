"""Which prompts are tried, in which order, for how long, and which is taken."""

import pytest

from postgrad.config import PromptSearchConfig, parse_recipe
from postgrad.errors import ConfigError
from postgrad.evaluate.prompt_search import (
    Tried,
    best_of,
    limit_seconds,
    plan_variants,
    read_tried,
    search_outcome,
    search_prompts,
)
from postgrad.progress import SilentDisplay
from postgrad.run import create_run
from postgrad.types import Evidence, Score

TREE = {"name": "bot", "model": {"base": "some/model"}, "data": {"train": "rows.jsonl"}}


def recipe(**search):
    return parse_recipe({**TREE, "evaluate": {"prompt_search": search}})


def tried(name, value, tokens=10.0, errors=0):
    return Tried(name, 0, "static", 0, None, value, 0.0, 1.0, 4, tokens, 1.0, "", errors)


def test_every_variant_is_planned_once_in_a_seeded_order():
    settings = PromptSearchConfig(fewshot=(0, 2, 4), draws=2, systems=("be brief", "think"))
    plan = plan_variants(settings, 7)
    names = [variant.name for variant in plan]
    assert len(names) == len(set(names)) == 3 * (1 + 2 * (2 + 1 + 1))
    assert {"zero-shot", "few-shot-2", "few-shot-4-draw-1", "few-shot-2-embedded-system-2"} <= {
        *names
    }
    assert {v.system for v in plan} == {None, "be brief", "think"}
    assert all(v.kind == "static" or v.draw == 0 for v in plan)
    assert plan_variants(settings, 7) == plan
    assert plan_variants(settings, 8) != plan
    fewer = settings.model_copy(update={"max_variants": 5})
    assert plan_variants(fewer, 7) == plan[:5]


def test_the_best_score_is_taken_and_of_equals_the_shorter_prompt():
    found = [tried("long", 0.5, 90.0), tried("b", 0.5), tried("a", 0.5), tried("low", 0.4, 1.0)]
    assert best_of(found).name == "a"
    assert best_of([*found, tried("high", 0.6, 900.0)]).name == "high"


def test_a_prompt_that_could_not_be_asked_does_not_win_by_being_short():
    found = [tried("refused", 0.0, 0.0, errors=4), tried("asked", 0.0, 90.0)]
    assert best_of(found).name == "asked"
    assert best_of([*found, tried("half", 0.1, 0.0, errors=2)]).name == "half"


def test_errors_are_counted_in_the_ledger(tmp_path):
    found = recipe(fewshot=[0, 1], examples=["static"], draws=1, minutes=None)
    run = create_run(found, "evaluate", tmp_path / "run")

    def ask(variant, rows, label):
        failed = "the template refuses it" if variant.shots else None
        return [
            Evidence(f"row-{n}", "q", "a", "", {"exact_match": Score(0.0, False)}, error=failed)
            for n in range(4)
        ]

    assert search_prompts(run, found, (), ask, SilentDisplay()).name == "zero-shot"
    assert {t.name: t.errors for t in read_tried(run, "bot")} == {"zero-shot": 0, "few-shot-1": 4}


@pytest.fixture
def searched(tmp_path):
    """A function that searches with answers right as often as there are examples; and its run."""
    found = recipe(fewshot=[0, 1, 3], examples=["static"], draws=1, minutes=None)
    run = create_run(found, "evaluate", tmp_path / "run")
    asked = []

    def ask(variant, rows, label):
        asked.append(variant.name)
        return [
            Evidence(
                f"row-{n}", "q", "a", "a", {"exact_match": Score(float(n < variant.shots), True)}
            )
            for n in range(4)
        ]

    def search(recipe=found):
        return search_prompts(run, recipe, (), ask, SilentDisplay())

    return search, run, asked, found


def test_the_winner_and_the_ledger(searched):
    search, run, asked, found = searched
    assert search().name == "few-shot-3"
    assert sorted(asked) == ["few-shot-1", "few-shot-3", "zero-shot"]
    outcome = search_outcome(run, found)
    assert [t.name for t in outcome.variants] == asked
    assert (outcome.best, outcome.planned, outcome.limit_seconds) == ("few-shot-3", 3, None)
    assert outcome.seconds == pytest.approx(sum(t.seconds for t in outcome.variants))
    for entry in outcome.variants:
        assert entry.value == entry.shots / 4
        assert entry.low <= entry.value <= entry.high
        assert (run.path / entry.evidence).read_text(encoding="utf-8").count("\n") == entry.n == 4


def test_a_stopped_search_goes_on_where_it_was(searched):
    search, run, asked, _ = searched
    search()
    first = read_tried(run, "bot")
    ledger = run.evidence_path("bot", "prompt-search")
    lines = ledger.read_text(encoding="utf-8").splitlines(keepends=True)
    ledger.write_text("".join(lines[:2]), encoding="utf-8")
    del asked[:]
    assert search().name == "few-shot-3"
    assert asked == [first[2].name]
    assert read_tried(run, "bot")[:2] == first[:2]


def test_no_variant_is_begun_after_the_budget_but_one_is_always_tried(searched):
    search, run, asked, _ = searched
    search(recipe(fewshot=[0, 1, 3], examples=["static"], draws=1, minutes=1e-9))
    assert len(asked) == 1
    assert len(read_tried(run, "bot")) == 1


def test_the_budget_is_that_of_the_training_unless_said(searched):
    run = searched[1]
    assert limit_seconds(run, PromptSearchConfig()) is None
    run.add_seconds("replay", 30.0)
    run.add_seconds("learning_rate_probe", 20.0)
    assert limit_seconds(run, PromptSearchConfig()) is None
    run.add_seconds("train", 90.0)
    run.add_seconds("preflight", 5.0)
    assert limit_seconds(run, PromptSearchConfig()) == 140
    assert limit_seconds(run, PromptSearchConfig(minutes=2)) == 120
    assert limit_seconds(run, PromptSearchConfig(minutes=None)) is None


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"fewshot": []}, "must not be empty"),
        ({"fewshot": [2, 2]}, "fewshot names the same value twice"),
        ({"examples": ["embedded", "embedded"]}, "examples names the same value twice"),
        ({"systems": ["a", "a"]}, "systems names the same value twice"),
        ({"draws": 0}, "greater than 0"),
        ({"minutes": 0}, "minutes"),
        ({"seeds": 3}, "unknown key"),
    ],
)
def test_what_makes_no_sense_is_refused(search, message):
    with pytest.raises(ConfigError, match=message):
        recipe(**search)


def test_a_gate_against_prompting_needs_a_prompt_with_examples_or_a_search():
    gates = {"fewshot": [0], "gates": {"target": ">= few-shot"}}
    with pytest.raises(ConfigError, match="no number above 0"):
        parse_recipe({**TREE, "evaluate": gates})
    parse_recipe({**TREE, "evaluate": {**gates, "prompt_search": {}}})
