"""Sentences by a few made-up parameters (ifeval_parity.py has the real ones), and words."""

import pytest

from postgrad.errors import SourceError
from postgrad.evaluate.tasks.segmentation import (
    Punkt,
    count_capital_words,
    count_words,
    read_punkt,
    split_sentences,
)

PUNKT = Punkt(
    abbreviations=frozenset({"dr", "e.g", "u.s", "p.m", "no"}),
    collocations=frozenset({("##number##", "may")}),
    starters=frozenset({"then", "the"}),
    contexts={"then": 2 | 32, "smith": 4, "car": 32 | 16, "the": 2 | 4 | 32, "he": 2 | 32},
)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("", []),
        ("  ", []),
        ("no stop at all", ["no stop at all"]),
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ("Dr. Smith came. He left.", ["Dr. Smith came.", "He left."]),
        ("At 5 p.m. Then he left.", ["At 5 p.m.", "Then he left."]),
        ("He came at 5 p.m. and left.", ["He came at 5 p.m. and left."]),
        ('"Go." (Yes.) Done.', ['"Go."', "(Yes.)", "Done."]),
        ("Wait... what? No!! Yes.", ["Wait... what?", "No!!", "Yes."]),
        ("It costs 3.50 today. Fine.", ["It costs 3.50 today.", "Fine."]),
        ("A title\n\nA text. More", ["A title\n\nA text.", "More"]),
        ("J. Smith said so.", ["J. Smith said so."]),
        ("On the 5. may it rained.", ["On the 5. may it rained."]),
    ],
)
def test_sentences(text, sentences):
    assert split_sentences(text, PUNKT) == sentences


def test_nothing_but_white_space_between_sentences_is_lost():
    text = ' He said: "Go now!" Then, e.g. at 5 p.m. [note] they left... Why?! \n\nNo. 7. '
    joined = "".join("".join(split_sentences(text, PUNKT)).split())
    assert joined == "".join(text.split())


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("I'm HERE. No SHOUTING please", 3),
        ("DON'T and JOHN'S", 4),
        ("NASA/ESA and U.S. A-B", 3),
        ("ONE,TWO:THREE 1,000 3:30", 3),
        ("CANNOT GONNA", 4),
        ("“LOUD” *WORDS* (IN) <<ALL>> [FORMS]", 5),
        ("lower Title Mixed-CASE", 0),
        ("YES. NO.", 2),
    ],
)
def test_words_in_capitals(text, count):
    assert count_capital_words(text, PUNKT) == count


def test_words_are_runs_of_word_characters():
    assert count_words("") == 0
    assert count_words("well-known *words*, it's 3.5 café_au_lait") == 8
    assert count_words("सुबह मौसम अच्छा था") == 4  # vowel signs do not divide words


def test_parameters_are_read_as_nltk_writes_them(tmp_path):
    (tmp_path / "abbrev_types.txt").write_text("dr\ne.g", encoding="utf-8")
    (tmp_path / "collocations.tab").write_text("##number##\tmay", encoding="utf-8")
    (tmp_path / "sent_starters.txt").write_text("the\nthen", encoding="utf-8")
    (tmp_path / "ortho_context.tab").write_text("smith\t4\nthe\t38", encoding="utf-8")
    punkt = read_punkt(tmp_path)
    assert punkt.abbreviations == {"dr", "e.g"}
    assert punkt.collocations == {("##number##", "may")}
    assert punkt.starters == {"the", "then"}
    assert punkt.contexts == {"smith": 4, "the": 38}


def test_a_folder_without_parameters_is_refused(tmp_path):
    with pytest.raises(SourceError, match="does not hold the parameters"):
        read_punkt(tmp_path)
