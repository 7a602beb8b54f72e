import pytest

from postgrad.config import Recipe
from postgrad.keys import describe, nearest, nearest_key

KNOWN = describe(Recipe)


def test_every_key_has_a_type_a_default_and_a_meaning():
    for key, entry in KNOWN.items():
        assert entry["type"], key
        assert "default" in entry, key
        assert len(entry["meaning"]) > 8, key
        assert entry["meaning"][0].isupper() or not entry["meaning"][0].isalpha(), key


def test_keys_of_union_sections_are_listed():
    assert {"model.adapt.r", "model.adapt.kind", "data.columns.prompt"} <= set(KNOWN)
    assert KNOWN["train.early_stopping.patience"]["default"] == 5
    assert KNOWN["model.adapt.kind"]["type"] == "lora | full"


def test_types_are_words_of_users_not_of_python():
    types = " ".join(entry["type"] for entry in KNOWN.values())
    for word in ("str", "int |", "float", "bool", "NoneType", "Annotated", "tuple"):
        assert word not in types


def test_the_number_of_keys_stays_within_the_budget():
    assert len(KNOWN) <= 130


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("train.learing_rate", "train.learning_rate"),
        ("learning_rate", "train.learning_rate"),
        ("train.lr", "train.learning_rate"),
        ("lora_r", "model.adapt.r"),
        ("train.target_modules", "model.adapt.target_modules"),
        ("train.per_device_train_batch_size", "train.tokens_per_batch"),
        ("modle", "model"),
        ("data.vallidation", "data.validation"),
        ("evaluate.limt", "evaluate.limit"),
        ("data.limt", "data.limit"),
        ("trian.limit", "data.limit"),
        ("evaluate.zzzzzz", None),
    ],
)
def test_nearest_key(key, meant):
    assert nearest_key(key, KNOWN) == meant


def test_every_name_from_another_tool_leads_to_a_key_that_exists():
    from postgrad.keys import _ELSEWHERE

    assert set(_ELSEWHERE.values()) <= set(KNOWN)


def test_nearest_is_none_when_nothing_is_close():
    assert nearest("frobnicate", ["run", "train"]) is None
