import json
import random
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postgrad.config import ScorerName
from postgrad.errors import ConfigError
from postgrad.scoring import BINARY, SCORERS, normalize, reference_problem, score

PATTERN = r"answer: (\w+)"
texts = st.text(max_size=40)
scalars = st.none() | st.booleans() | st.integers(-99, 99) | st.text(max_size=5)
values = st.recursive(
    scalars,
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=3), children, max_size=3)
    ),
    max_leaves=8,
)


def pattern_for(name):
    return PATTERN if name == "regex" else None


def test_the_table_has_exactly_the_scorers_of_the_recipe():
    assert tuple(SCORERS) == get_args(ScorerName)
    assert set(SCORERS) > BINARY


@pytest.mark.parametrize("name", SCORERS)
@given(completion=texts, reference=texts)
def test_any_text_gets_a_score_within_bounds_and_a_reason(name, completion, reference):
    result = score(name, completion, reference, pattern_for(name))
    assert 0 <= result.value <= 1
    assert result.passed == (result.value == 1)
    assert bool(result.explanation) != result.passed
    assert name not in BINARY or result.value in (0, 1)


@pytest.mark.parametrize("name", ["exact_match", "normalized_match", "f1"])
@given(text=texts)
def test_a_text_equals_itself(name, text):
    assert score(name, text, text).passed
    assert score(name, f"\n {text}\t", text).passed


@pytest.mark.parametrize(
    ("completion", "reference", "passed"),
    [
        (" MIT\n", "MIT", True),
        ("mit", "MIT", False),
        ("MIT.", "MIT", False),
        ("Apache  2.0", "Apache 2.0", False),
        ("", "", True),
        ("", "MIT", False),
    ],
)
def test_exact_match_forgives_outer_whitespace_only(completion, reference, passed):
    assert score("exact_match", completion, reference).passed is passed


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  “Apache-2.0” license.", "apache2.0 license"),
        ("ﬁne Straße", "fine strasse"),
        ("**`MIT`**", "mit"),
        ("it's a cat, an owl; the end", "its cat owl end"),
        ("A", "a"),
        ("?!", "?!"),
        ("3.5", "3.5"),
        ("35.", "35"),
        (".5", ".5"),
        ("-5 (\u22125)", "-5 -5"),
        ("1,000", "1000"),
        ("10:30 on 3/4", "10:30 on 3/4"),
        ("C++", "c++"),
        ("$5 ", "$5"),
    ],
)
def test_normalize(text, normal):
    assert normalize(text) == normal


def test_normalized_match_keeps_what_changes_the_meaning():
    assert score("normalized_match", "The answer, probably", "answer probably").passed
    for given_text, wanted in [("3.5", "35"), ("-5", "5"), ("C++", "C"), ("", "A"), ("the", "A")]:
        assert not score("normalized_match", given_text, wanted).passed, (given_text, wanted)


@pytest.mark.parametrize(
    ("completion", "reference"),
    [
        ("She has 3 apples, so 12 in all.", "12"),
        ("The total is 1,234.50.", "1234.5"),
        ("1\u202f000\u202f000", "1_000_000"),
        ("1'000", "1000"),
        ("$1,200", "1200"),
        ("-$3", "$-3"),
        ("\u22127", "-7"),
        ("10-5", "5"),
        ("- 5", "5"),
        ("GPL-2", "2"),
        ("3/4", "0.75"),
        ("1 1/2 cups", "1.5"),
        (r"\frac{3}{4}", ".75"),
        ("0.33333333", "1/3"),
        ("due 3/4/2024", "2024"),
        ("45%", "45"),
        ("45 percent", "0.45"),
        (r"50\%", "0.5"),
        ("6.02e23", "602,000,000,000,000,000,000,000"),
        ("1,2", "2"),
        ("9" * 6000, "9" * 6000),
        ("1e999", "1e999"),
    ],
)
def test_numeric_reads_the_last_number(completion, reference):
    assert score("numeric", completion, reference).passed


@pytest.mark.parametrize(
    ("completion", "reference", "why"),
    [
        ("-5", "5", "the last number is -5, expected 5"),
        ("12345679", "12345678", "expected 12345678"),
        ("2.67", "2.6666667", "expected 2.6666667"),
        ("45%", "45.1", "expected 45.1"),
        ("0.45", "45", "expected 45"),
        ("none", "3", "no number in 'none'"),
        ("3", "three", "the reference has no number in it"),
        ("1e999999999", "1", "999999999"),
    ],
)
def test_numeric_says_why_not(completion, reference, why):
    result = score("numeric", completion, reference)
    assert not result.passed
    assert why in result.explanation


@given(st.integers(), st.decimals(-(10**9), 10**9, places=3))
def test_numbers_survive_thousands_separators(whole, decimal):
    assert score("numeric", f"so it is {whole:,}.", str(whole)).passed
    assert score("numeric", f"so it is {decimal:,}!", str(decimal)).passed
    assert not score("numeric", str(whole), str(whole + 1)).passed


@pytest.mark.parametrize(
    ("completion", "reference", "passed"),
    [
        ("The answer is: No.", "no", True),
        ("I know nothing", "no", False),
        ("42", "4", False),
        ("nothing, no", "no", True),
        ("we use C++ here", "c++", True),
        ("答案是北京市", "北京", True),
        ("new\n  york", "New York", True),
        ("anything", " ", False),
    ],
)
def test_contains_finds_whole_words(completion, reference, passed):
    assert score("contains", completion, reference).passed is passed


def test_regex_compares_the_first_group_or_the_match():
    steps = "2 + 2, so\n#### 42 and no more"
    assert score("regex", steps, "42", r"#### (\d+)").passed
    assert score("regex", steps, "because #### 42", r"#### (\d+)").passed
    assert score("regex", "id AB12 x", "AB12", r"[A-Z]+\d+").passed
    assert score("regex", "43", "42", r"\d+").explanation == "got '43', expected '42'"
    assert "does not occur" in score("regex", "no idea", "42", r"\d+").explanation
    assert not score("regex", "b", "b", r"(a)?b").passed


def test_a_bad_pattern_is_a_config_error():
    with pytest.raises(ConfigError, match=r"evaluate\.pattern '\(' is not a regular expression"):
        score("regex", "a", "a", "(")
    with pytest.raises(ConfigError, match="needs a pattern"):
        score("regex", "a", "a")
    with pytest.raises(ConfigError, match="takes no pattern"):
        score("f1", "a", "a", "a")
    with pytest.raises(ConfigError, match="no scorer 'bleu'") as caught:
        score("bleu", "a", "a")
    assert "exact_match" in caught.value.remedy


@pytest.mark.parametrize(
    ("completion", "reference", "value"),
    [
        ("the cat sat", "cat sat down", 0.8),
        ("cat cat", "cat", 2 / 3),
        ("dog", "cat", 0),
        ("sat cat", "cat sat", 1),
        ("北京市", "北京", 0.8),
        ("", "cat", 0),
    ],
)
def test_f1(completion, reference, value):
    assert score("f1", completion, reference).value == pytest.approx(value)


@given(texts, texts)
def test_f1_is_symmetric(a, b):
    assert score("f1", a, b).value == score("f1", b, a).value


@pytest.mark.parametrize(
    ("completion", "reference", "value"),
    [
        ('{"b": [1, 2], "a": 1.0}', '{"a": 1, "b": [1, 2]}', 1),
        ('```json\n{"a": 1}\n```', '{"a": 1}', 1),
        ('{"a": 1, "b": 2, "c": 9}', '{"a": 1, "b": 2, "c": 3}', 2 / 3),
        ('{"a": 1, "extra": 2}', '{"a": 1}', 1 / 2),
        ('{"a": 1}', '{"a": 1, "b": 2, "c": 3}', 1 / 3),
        ('{"a": {"x": 1, "y": 2}, "b": [1, 5]}', '{"a": {"x": 1, "y": 3}, "b": [1, 2]}', 1 / 2),
        ('{"a": true}', '{"a": 1}', 0),
        ('{"a": {}}', '{"a": []}', 0),
        ("{}", "{}", 1),
        ("[]", "{}", 0),
        ('"a"', '"a"', 1),
    ],
)
def test_json_gives_credit_for_each_field(completion, reference, value):
    assert score("json", completion, reference).value == pytest.approx(value)


@pytest.mark.parametrize(
    ("completion", "why"),
    [
        ("I think {}", "not JSON: Expecting value at line 1 column 1"),
        ("{} as asked", "Extra data"),
        ('{"a": 1, "a": 2}', "the key 'a' occurs twice"),
        ("NaN", "NaN is not a JSON value"),
        ("-1e999", "too large a number"),
        ("[" * 10**5, "nested too deeply"),
        ("9" * 5000, "not JSON"),
    ],
)
def test_what_is_not_json_scores_zero_and_says_why(completion, why):
    result = score("json", completion, "{}")
    assert result.value == 0
    assert why in result.explanation


def test_json_names_the_first_wrong_field():
    result = score("json", '{"a": 1, "b": {"c": "x"}}', '{"a": 1, "b": {"c": "y"}}')
    assert result.explanation == "1 of 2 fields differ; b.c: 'x', expected 'y'"


@given(values, values, st.randoms(use_true_random=False))
def test_json_equality_ignores_key_order_and_is_symmetric(a, b, shuffle: random.Random):
    def shuffled(value):
        if isinstance(value, dict):
            items = [(key, shuffled(child)) for key, child in value.items()]
            shuffle.shuffle(items)
            return dict(items)
        return [shuffled(child) for child in value] if isinstance(value, list) else value

    x, y = json.dumps(a), json.dumps(b)
    assert score("json", json.dumps(shuffled(a)), x).passed
    assert score("json", x, y).value == score("json", y, x).value


def test_references_that_cannot_be_met_are_named():
    assert reference_problem("numeric", "twelve") == "the reference has no number in it"
    assert "not JSON" in (reference_problem("json", "{a: 1}") or "")
    assert reference_problem("contains", " ") == "the reference is empty"
    assert reference_problem("exact_match", "anything") is None
    assert reference_problem("regex", "42", r"#### (\d+)") is None
