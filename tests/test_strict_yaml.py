import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postgrad.errors import ConfigError
from postgrad.strict_yaml import dump_yaml, key_lines, parse_yaml

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"))
    | st.sampled_from(
        ["on", "no", "~", "1e-4", "010", "12:30", "2024-01-01", "<<", "=", "0x1f", ""]
    )
)
trees = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text("ab.-1"), inner), max_leaves=12
)


@given(trees)
def test_what_is_dumped_reads_back_the_same(tree):
    back = parse_yaml(dump_yaml(tree), "recipe")
    assert back == tree
    assert repr(back) == repr(tree)  # 1 is not 1.0 and not True


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("on", "on"),
        ("no", "no"),
        ("yes", "yes"),
        ("true", True),
        ("~", None),
        ("null", None),
        ("", None),
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("-1", -1),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("1_000", 1000),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("1.2.3", "1.2.3"),
        ("-.inf", -math.inf),
        ("'1'", "1"),
    ],
)
def test_scalars_mean_what_they_look_like(text, value):
    found = parse_yaml(f"key: {text}", "recipe")["key"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message", "remedy"),
    [
        ("a: 1\ntrain:\n\tx: 1", "r.yaml:3: a tab character", "spaces"),
        ("a: 1\nb: 2\na: 3", "r.yaml:3: duplicate key 'a'", "keep one"),
        ("1: a\n'1': b", "r.yaml:2: duplicate key '1'", "keep one"),
        ("a: {{ value }}", "r.yaml:1: a key must be text", "quotes"),
        ("a: b: c", "r.yaml:1: mapping values", "indent"),
        ("a: [1, 2", "r.yaml:1: ", "fix the YAML"),
        ("a: *nowhere", "undefined alias", "fix the YAML"),
        ("!!python/object:os.system x", "could not determine a constructor", "fix the YAML"),
        ("a: \x00", "unacceptable character", "fix the YAML"),
        ("[" * 3000, "nested too deeply", "flatten"),
        ("a: " + "9" * 5000, "digits", "quotes"),
    ],
)
def test_bad_yaml_names_the_line_and_the_remedy(text, message, remedy):
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "r.yaml")
    assert message in caught.value.message
    assert remedy in caught.value.remedy


def test_anchors_and_merges_work_and_own_keys_win():
    text = "base: &base {r: 8, kind: lora}\nadapt: {<<: *base, r: 16}"
    assert parse_yaml(text, "recipe")["adapt"] == {"r": 16, "kind": "lora"}


def test_key_lines_are_dotted_and_start_at_one():
    lines = key_lines("# comment\nname: a\n\nmodel:\n  adapt: {r: 8}\n  base: b\n")
    assert lines == {"name": 2, "model": 4, "model.adapt": 5, "model.adapt.r": 5, "model.base": 6}
