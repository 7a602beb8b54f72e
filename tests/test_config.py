import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postgrad.config import (
    FullConfig,
    LoraConfig,
    Recipe,
    json_schema,
    load_recipe,
    parse_recipe,
)
from postgrad.errors import ConfigError
from postgrad.strict_yaml import apply_overrides, parse_yaml

TREE = {"name": "bot", "model": {"base": "some/model"}, "data": {"train": "rows.jsonl"}}
TEXT = "name: bot\nmodel: {base: some/model}\ndata: {train: rows.jsonl}\n"


@pytest.fixture
def recipe_file(tmp_path):
    def write(text, encoding="utf-8"):
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
        return path

    return write


def problem(*overrides):
    with pytest.raises(ConfigError) as caught:
        parse_recipe(apply_overrides(TREE, overrides))
    assert caught.value.exit_code == 2
    return caught.value.message


def test_the_smallest_recipe_is_complete(recipe_file):
    recipe = load_recipe(recipe_file(TEXT))
    assert recipe.name == "bot"
    assert recipe.model.adapt == LoraConfig(r=16, lora_alpha=32)
    assert recipe.evaluate.fewshot == (0, 8)


def test_adapt_without_a_kind_is_lora():
    assert parse_recipe(apply_overrides(TREE, ["model.adapt={r: 8}"])).model.adapt == LoraConfig(
        r=8
    )
    assert parse_recipe(apply_overrides(TREE, ["model.adapt.r=8"])).model.adapt == LoraConfig(r=8)
    full = parse_recipe(apply_overrides(TREE, ["model.adapt.kind=full"]))
    assert full.model.adapt == FullConfig()


def test_errors_inside_adapt_name_the_right_key():
    assert "unknown key model.adapt.rr (did you mean model.adapt.r?)" in problem(
        "model.adapt={rr: 8}"
    )
    assert "model.adapt.r must be greater than 0, not -1" in problem("model.adapt.r=-1")
    assert "{kind: lora, ...} or {kind: full}" in problem("model.adapt.kind=qlora")
    assert "model.adapt.r is not read by this kind of model.adapt" in problem(
        "model.adapt={kind: full, r: 8}"
    )


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.num_train_epochs=-1", "train.num_train_epochs must be greater than 0, not -1"),
        (
            "train.learning_rate=fast",
            "train.learning_rate must be number or auto or probe, not 'fast'",
        ),
        ("train.learning_rate=.inf", "train.learning_rate must be finite"),
        ("train.weight_decay=.nan", "train.weight_decay must be finite"),
        ("data.validation=1.5", "data.validation must be less than 1, not 1.5"),
        ("data.train=[]", "data.train must not be empty"),
        ("data.train=", "data.train must be text or list of text, not null"),
        ("evaluate.fewshot=8", "evaluate.fewshot must be list of integer, not 8"),
        ("evaluate.fewshot=[0, -2]", "evaluate.fewshot must be at least 0, not -2"),
        ("evaluate.fewshot=[8, 8]", "twice"),
        ("evaluate.fewshot_examples=[static, static]", "twice"),
        ("evaluate.fewshot_examples=[]", "must not be empty"),
        ("evaluate.pattern=a(", "go together"),
        ("evaluate={scorer: regex, pattern: 'a('}", "not a regular expression"),
        ("data.format=columns", "go together"),
        ("data.prompt_template=hello", "must contain {prompt}"),
        ("data={train: a, validation: 0.5, test: 0.5}", "leave no rows"),
        ("data.limit_sampling=varied", "chooses the rows of data.limit: set it"),
        ("data.columns={prompt: a}", "data.columns.completion is required"),
        ("model=", "model must be a section of keys (base, revision"),
        ("name=a b", "name must be letters"),
        ("seed=-1", "seed must be at least 0"),
        ("train.learing_rate=1", "unknown key train.learing_rate (did you mean"),
        ("train.early_stopping.patience=0", "train.early_stopping.patience must be greater than 0"),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_rule(override, expected):
    assert expected in problem(override)


def test_all_problems_are_listed_at_once_each_with_its_line(recipe_file):
    text = TEXT + "train:\n  learing_rate: 1\n  num_train_epochs: -1\nevaluate: {limit: 0}\n"
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe_file(text))
    lines = caught.value.message.splitlines()
    assert len(lines) == 3
    assert "recipe.yaml:5: unknown key train.learing_rate" in caught.value.message
    assert "recipe.yaml:6: train.num_train_epochs" in caught.value.message
    assert "recipe.yaml:7: evaluate.limit" in caught.value.message


def test_missing_sections_are_named(recipe_file):
    with pytest.raises(ConfigError, match=r"model is required\n.*data is required"):
        load_recipe(recipe_file("name: a\n"))


def test_a_dotted_key_in_the_file_is_told_to_nest(recipe_file):
    with pytest.raises(ConfigError, match=r"must be nested: train: \{max_steps: \.\.\.\}"):
        load_recipe(recipe_file(TEXT + "train.max_steps: 3\n"))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (b"# only a comment\n", "is empty"),
        (b"- a\n- b\n", "not a recipe"),
        (b"just text\n", "not a recipe"),
        (b"name: caf\xe9\n", "not UTF-8"),
        (b"model:\n\tbase: x\n", "tab"),
        (b"name: a\nname: b\n", "duplicate key 'name'"),
    ],
)
def test_files_that_are_no_recipe(recipe_file, content, expected):
    with pytest.raises(ConfigError, match=expected):
        load_recipe(recipe_file(content))


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(ConfigError, match="no recipe at"):
        load_recipe(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        load_recipe(tmp_path)


def test_a_byte_order_mark_is_harmless(recipe_file):
    assert load_recipe(recipe_file(TEXT, "utf-8-sig")).name == "bot"


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", ".0001", "1E-04", "'1e-4'"])
def test_a_learning_rate_may_be_written_in_any_way(recipe_file, text):
    recipe = load_recipe(recipe_file(TEXT + f"train: {{learning_rate: {text}}}\n"))
    assert recipe.train.learning_rate == 1e-4
    overridden = load_recipe(recipe_file(TEXT), [f"train.learning_rate={text}"])
    assert overridden == recipe
    assert overridden.hash() == recipe.hash()


def test_on_and_off_are_words(recipe_file):
    recipe = load_recipe(recipe_file(TEXT + "train: {packing: off}\nreport: {language: no}\n"))
    assert recipe.train.packing == "off"
    assert recipe.report.language == "no"


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("data.system=Answer: yes or no", "system", "Answer: yes or no"),
        ("data.system=@you", "system", "@you"),
        ("data.system='null'", "system", "null"),
        ("data.system=null", "system", None),
        ("data.system=", "system", None),
        ("data.system=a=b", "system", "a=b"),
        ("data.train=[a, b]", "train", ("a", "b")),
        ("data.validation=0.2", "validation", 0.2),
    ],
)
def test_override_values(override, key, value):
    assert getattr(parse_recipe(apply_overrides(TREE, [override])).data, key) == value


@pytest.mark.parametrize("override", ["train", "=1", "train.=1", ".a=1", ""])
def test_an_override_must_be_key_value(override):
    with pytest.raises(ConfigError, match="is not KEY=VALUE"):
        apply_overrides(TREE, [override])


def test_an_override_into_a_value_is_refused():
    with pytest.raises(ConfigError, match="name is not a section"):
        apply_overrides(TREE, ["name.x=1"])
    with pytest.raises(ConfigError, match=r"override model\.base"):
        apply_overrides(TREE, ["model.base=[a"])


def test_overrides_win_over_the_file_and_the_last_one_wins(recipe_file):
    path = recipe_file(TEXT + "train: {max_steps: 5, weight_decay: 0.1}\n")
    recipe = load_recipe(path, ["train.max_steps=6", "train.max_steps=7"])
    assert (recipe.train.max_steps, recipe.train.weight_decay) == (7, 0.1)


def test_the_input_tree_is_not_changed():
    tree = {"train": {"max_steps": 1}}
    apply_overrides(tree, ["train.max_steps=2", "train.seed=3"])
    assert tree == {"train": {"max_steps": 1}}


recipes = st.builds(
    lambda name, seed, rate, rank, system, fewshot, stop: {
        **TREE,
        "name": name,
        "seed": seed,
        "train": {"learning_rate": rate, "early_stopping": stop},
        "model": {"base": "m", "adapt": {"r": rank}},
        "data": {"train": "x", "system": system},
        "evaluate": {"fewshot": fewshot},
    },
    st.sampled_from(["a", "1e5", "no", "2024-01-01", "a.b-c_d", "0x10"]),
    st.integers(0, 2**32 - 1),
    st.just("auto") | st.floats(1e-8, 1),
    st.integers(1, 512),
    st.none() | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00")),
    st.lists(st.integers(0, 64), unique=True, max_size=3),
    st.none() | st.builds(dict, patience=st.integers(1, 9)),
)


@given(recipes)
def test_a_recipe_survives_its_own_yaml(tree):
    recipe = parse_recipe(tree)
    again = parse_recipe(parse_yaml(recipe.to_yaml(), "resolved"))
    assert again == recipe
    assert again.hash() == recipe.hash()


def test_the_hash_depends_on_the_content_only():
    recipe = parse_recipe(TREE)
    assert parse_recipe(dict(reversed(TREE.items()))).hash() == recipe.hash()
    spelled_out = parse_recipe(apply_overrides(TREE, ["model.adapt.lora_alpha=32", "seed=7"]))
    assert spelled_out.hash() == recipe.hash()
    assert parse_recipe(apply_overrides(TREE, ["seed=8"])).hash() != recipe.hash()


def test_the_hash_is_the_same_in_another_process():
    code = f"from postgrad.config import parse_recipe;print(parse_recipe({TREE!r}).hash())"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert found == parse_recipe(TREE).hash()


def test_a_recipe_cannot_be_changed():
    recipe = parse_recipe(TREE)
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1


def test_the_json_schema_refuses_unknown_keys_and_describes_every_field():
    schema = json_schema()
    assert schema["additionalProperties"] is False
    for name, definition in schema["$defs"].items():
        for key, value in definition["properties"].items():
            assert value.get("description"), (name, key)
    assert set(schema["properties"]) == set(Recipe.model_fields)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.kl_probe=null", r"max_kl is measured on train\.kl_probe"),
        ("model.adapt.kind=full", r"train\.kl_weight needs LoRA"),
        ("data.replay=null", r"data\.replay_share says how much of data\.replay"),
    ],
)
def test_protection_that_cannot_be_obeyed_is_refused(override, message):
    wanted = ["train.early_stopping.max_kl=0.1", "train.kl_weight=0.5"]
    wanted += ["data.replay=self", "data.replay_share=0.2"]
    recipe = parse_recipe(apply_overrides(TREE, wanted))
    assert (recipe.train.early_stopping.max_kl, recipe.train.kl_probe) == (0.1, "auto")
    assert (recipe.data.replay, recipe.data.replay_share) == ("self", 0.2)
    with pytest.raises(ConfigError, match=message):
        parse_recipe(apply_overrides(TREE, [*wanted, override]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.adapt.kind=full", r"train\.base_precision is {}, which needs LoRA"),
        ("model.precision=fp32", r"is {}, which contradicts model\.precision: fp32"),
        ("train.kl_weight=0.5", r"is {}, which excludes train\.kl_weight"),
    ],
)
@pytest.mark.parametrize("choice", ["int8", "fp8"])
def test_products_in_8_bits_that_cannot_be_had_on_any_machine_are_refused(
    choice, override, message
):
    chosen = f"train.base_precision={choice}"
    assert parse_recipe(apply_overrides(TREE, [chosen])).train.base_precision == choice
    with pytest.raises(ConfigError, match=message.format(choice)):
        parse_recipe(apply_overrides(TREE, [chosen, override]))
    for other in ("auto", "model"):
        tree = apply_overrides(TREE, [f"train.base_precision={other}", override])
        assert parse_recipe(tree).train.base_precision == other
    with pytest.raises(ConfigError, match=r"train\.base_precision must be .*e4m3"):
        parse_recipe(apply_overrides(TREE, ["train.base_precision=e4m3"]))


def test_a_retention_floor_is_said_like_a_gate():
    floor = ["evaluate.retention=[piqa, mmlu]"]
    floor += ["train.early_stopping.retention_floor={piqa: 2, all: 3.5}"]
    stopping = parse_recipe(apply_overrides(TREE, floor)).train.early_stopping
    assert stopping.retention_floor == {"piqa": 2.0, "all": 3.5}
    assert stopping.retention_items == 200


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["train.early_stopping.retention_floor={piqa: 2}"],
            r"evaluate\.retention, which is empty",
        ),
        (["train.early_stopping.retention_items=50"], r"retention_floor asks, which is empty"),
        (
            ["evaluate.retention=[piqa]", "train.early_stopping.retention_floor={piqa: 0}"],
            r"retention_floor must be greater than 0",
        ),
    ],
)
def test_a_retention_floor_that_cannot_be_watched_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        parse_recipe(apply_overrides(TREE, overrides))
