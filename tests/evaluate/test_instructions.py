"""IFEval's 25 checkers: for each a response that follows and one that almost does."""

import json

import pytest

from postgrad.errors import DataError
from postgrad.evaluate.tasks.instructions import (
    CHECKERS,
    follows_loosely,
    follows_strictly,
    instruction,
    related,
    variants,
)
from postgrad.evaluate.tasks.segmentation import Punkt

PUNKT = Punkt(frozenset({"dr"}), frozenset(), frozenset(), {})


def detect(text):
    """Tell three languages by a letter: enough to see what the checkers do with the answer."""
    if not any(character.isalpha() for character in text):
        return None
    return "de" if "ü" in text.lower() else "en"


TOOLS = {"punkt": PUNKT, "detect": detect}

CASES = [
    ("keywords:existence", {"keywords": ["cat", "dog"]}, "Cats and DOGS.", "Cats only."),
    (
        "keywords:frequency",
        {"keyword": "cat", "frequency": 2, "relation": "at least"},
        "Cat, concatenate.",
        "Cat.",
    ),
    (
        "keywords:frequency",
        {"keyword": "c++", "frequency": 2, "relation": "less than"},
        "C++ and cc.",
        "C++, c++.",
    ),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "Concatenate.", "The CAT."),
    (
        "keywords:letter_frequency",
        {"letter": "E", "let_frequency": 2, "let_relation": "at least"},
        "Even",
        "Evn",
    ),
    (
        "keywords:letter_frequency",
        {"letter": "#", "let_frequency": 2, "let_relation": "at least"},
        "## a",
        "# a",
    ),
    ("language:response_language", {"language": "de"}, "Grün.", "Green."),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "at least"},
        "Dr. No is here. Really?",
        "Dr. No is here",
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        "***\none\n***\ntwo\n***",
        "one\n\ntwo",
    ),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a***b", "a\n***\n***\nb"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "a b", "a-b c"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Two"},
        "one\n\n'two, indeed",
        "one\n\nand two",
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 1, "nth_paragraph": 1, "first_word": "one"},
        'One."two',
        "one\n\ntwo",
    ),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        "[a] and [b]",
        "[a and b]",
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.P.S"},
        "Bye\np. p. s more",
        "Bye\nP.S. more",
    ),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "P. S. more", "PS more"),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        "* one\n- two",
        "* one\n** two",
    ),
    ("detectable_format:constrained_response", {}, "So: My answer is no.", "My answer is no"),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        "*a* and *b*",
        "*a* and * *",
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 1},
        "**a**",
        "****",
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION ", "num_sections": 2},
        "SECTION 1\na\nSECTION 2",
        "Section 1\na\nSection 2",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{'a': 1}"),
    ("detectable_format:title", {}, "<<A title>>\ntext", "<< >>\ntext"),
    ("combination:two_responses", {}, "one\n******\ntwo", "one\n******\none"),
    ("combination:two_responses", {}, "******one******two", "one******\n******two"),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": " Say this. "},
        "say THIS. Done.",
        "Sure: Say this.",
    ),
    ("startend:end_checker", {"end_phrase": "The end."}, '"So: the END."\n', "The end. Bye"),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "less than"},
        "ONE word",
        "TWO WORDS",
    ),
    ("change_case:english_capital", {}, "ALL 3 OF IT!", "ALL 3 of it!"),
    ("change_case:english_lowercase", {}, "all of it", "grün"),
    ("punctuation:no_comma", {}, "so; it is", "so, it is"),
    ("startend:quotation", {}, ' "whole" ', '"'),
]


@pytest.mark.parametrize(("name", "arguments", "good", "bad"), CASES)
def test_a_checker_tells_following_from_almost_following(name, arguments, good, bad):
    wanted = instruction(name, arguments)
    assert follows_strictly(good, wanted, **TOOLS)
    assert not follows_strictly(bad, wanted, **TOOLS)


def test_every_checker_has_a_case():
    assert {name for name, *_ in CASES} == set(CHECKERS)
    assert len(CHECKERS) == 25


@pytest.mark.parametrize("text", ["", " \n\t "])
def test_an_empty_response_follows_nothing(text):
    for name, arguments, *_ in CASES:
        wanted = instruction(name, arguments)
        assert not follows_strictly(text, wanted, **TOOLS)
        assert not follows_loosely(text, wanted, **TOOLS)


def test_a_text_without_language_passes_the_language_checkers():
    assert follows_strictly("123 !", instruction("language:response_language", {"language": "de"}),
                            **TOOLS)  # fmt: skip
    assert not follows_strictly("123", instruction("change_case:english_capital", {}), **TOOLS)


def test_loosely_the_first_and_last_line_and_asterisks_do_not_count():
    assert variants("a\n*b*\nc") == [
        "a\n*b*\nc", "a\nb\nc", "*b*\nc", "b\nc", "a\n*b*", "a\nb", "*b*", "b",
    ]  # fmt: skip
    wanted = instruction("detectable_format:json_format", {})
    wrapped = f"Here it is:\n{json.dumps([1])}\nHave fun!"
    assert not follows_strictly(wrapped, wanted, **TOOLS)
    assert follows_loosely(wrapped, wanted, **TOOLS)
    quoted = instruction("startend:quotation", {})
    assert follows_loosely('**"bold"**', quoted, **TOOLS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_what_follows_strictly_follows_loosely(case):
    name, arguments, good, _ = case
    assert follows_loosely(good, instruction(name, arguments), **TOOLS)


def test_instructions_that_do_not_exist_or_lack_arguments_are_refused():
    with pytest.raises(DataError, match="no instruction 'keywords:none'"):
        instruction("keywords:none", {})
    with pytest.raises(DataError, match="it takes num_words, relation"):
        instruction("length_constraints:number_words", {"num_words": 3})
    with pytest.raises(DataError, match="it takes no arguments"):
        instruction("punctuation:no_comma", {"num_words": 3})
    padded = instruction("punctuation:no_comma", {"num_words": None, "relation": None})
    assert padded.arguments == {}
    with pytest.raises(DataError, match="unknown relation"):
        related(1, "more than", 2)
