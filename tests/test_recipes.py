import json
from pathlib import Path

import pytest

from postgrad import stages
from postgrad.config import Recipe, load_recipe
from postgrad.evaluate.workflow import base_arms
from postgrad.strict_yaml import parse_yaml

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
FILES = [*RECIPES, *sorted((ROOT / "benchmarks").glob("*.yaml"))]
INTENTS = ("card arrival", "lost card", "exchange rate")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_is_short_and_valid(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 40
    assert load_recipe(path).name == path.stem.replace("_", "-")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_says_only_what_differs_from_the_defaults(path):
    tree = parse_yaml(path.read_text(encoding="utf-8"), path.name)
    defaults = Recipe.model_validate(
        {"name": "n", "model": {"base": "b"}, "data": {"train": "t"}}
    ).model_dump(mode="json")
    said = {
        (section, key): value
        for section, keys in tree.items()
        if isinstance(keys, dict)
        for key, value in keys.items()
    }
    assert said
    for (section, key), value in said.items():
        assert value != defaults[section][key], f"{section}.{key} is the default"


def questions(count, first=0):
    """Return (question, intent) pairs that differ enough to be no near-duplicates."""
    words = ("where", "when", "please", "my", "new", "old", "bank", "today", "help", "still")
    rows = []
    for number in range(first, first + count):
        digits = " ".join(words[int(digit)] for digit in f"{number:03d}")
        intent = INTENTS[number % len(INTENTS)]
        rows.append((f"{number * 7919} {digits} {intent}", intent))
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def banking77(folder):
    parts = {"train": (90, 0), "validation": (30, 300), "test": (40, 600)}
    return [
        f"data.{split}="
        + str(
            write(
                folder / f"{split}.jsonl",
                [{"text": text, "label": label} for text, label in questions(count, first)],
            )
        )
        for split, (count, first) in parts.items()
    ]


def support_bot(folder):
    rows = [
        {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ],
            "customer_id": number,
        }
        for number, (question, answer) in enumerate(questions(400))
    ]
    return [f"data.train={write(folder / 'support.jsonl', rows)}"]


def full_tuning(folder):
    rows = [{"prompt": question, "completion": answer} for question, answer in questions(500)]
    return [f"data.train={write(folder / 'rows.jsonl', rows)}"]


DATA = {"banking77": banking77, "support_bot": support_bot, "full_tuning": full_tuning}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_from_data_to_report(path, tmp_path, tiny_model_dir):
    overrides = [
        *DATA[path.stem](tmp_path),
        f"model.base={tiny_model_dir}",
        "data.near_duplicate=null",
        "train.max_steps=2",
        "train.threads=1",
        "train.eval_rows=10",
        "evaluate.limit=4",
        "evaluate.max_new_tokens=4",
    ]
    recipe = load_recipe(path, overrides)
    result = stages.run(recipe, stages.Options(out=tmp_path / "run"))
    assert result["train"]["last_step"] == 2
    arms = {row["arm"]: row["n"] for row in result["measurements"]}
    assert arms["tuned"] == 4
    assert arms.keys() == {*base_arms(recipe.evaluate), "tuned"}
    assert Path(result["report"]).is_file()
