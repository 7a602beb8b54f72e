"""IFEval's 25 kinds of verifiable instructions, each a pure test of a response.

Written from Zhou et al. 2023, "Instruction-Following Evaluation for Large Language Models"
(arXiv 2311.07911), table 1, with the verdicts of the checkers in lm-evaluation-harness 0.4.13;
`benchmarks/ifeval_parity.py` compares them one by one. Keywords are taken literally.
"""

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from postgrad.errors import DataError
from postgrad.evaluate.tasks.segmentation import (
    Punkt,
    count_capital_words,
    count_words,
    split_sentences,
)

Checker = Callable[..., bool]
DetectLanguage = Callable[[str], str | None]
"""Text -> ISO 639-1 code, None when the text says nothing about its language."""

ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction of a prompt: its name in `CHECKERS` and the arguments of its checker."""

    name: str
    arguments: Mapping[str, Any]


def related(count: int, relation: str, threshold: int) -> bool:
    """Compare as the data set says it: `less than` or `at least`.

    >>> related(3, "at least", 3), related(3, "less than", 3)
    (True, False)
    """
    if relation not in ("less than", "at least"):
        raise DataError(f"unknown relation {relation!r}", "use `less than` or `at least`")
    return count < threshold if relation == "less than" else count >= threshold


def includes_keywords(response: str, *, keywords: Sequence[str]) -> bool:
    """Every keyword occurs, whatever the case, also inside a word."""
    return all(_occurrences(response, word) for word in keywords)


def keyword_frequency(response: str, *, keyword: str, frequency: int, relation: str) -> bool:
    """A keyword occurs so often, whatever the case, also inside words."""
    return related(_occurrences(response, keyword.strip()), relation, frequency)


def forbids_words(response: str, *, forbidden_words: Sequence[str]) -> bool:
    """None of the words occurs as a whole word, whatever the case."""
    words = (rf"\b{re.escape(word)}\b" for word in forbidden_words)
    return not any(re.search(word, response, re.IGNORECASE) for word in words)


def letter_frequency(response: str, *, letter: str, let_frequency: int, let_relation: str) -> bool:
    """A letter (or sign) occurs so often, whatever the case."""
    return related(response.lower().count(letter.strip().lower()), let_relation, let_frequency)


def in_language(response: str, *, language: str, detect: DetectLanguage) -> bool:
    """The response is in this language; one without any language passes."""
    return detect(response) in (language, None)


def number_sentences(response: str, *, num_sentences: int, relation: str, punkt: Punkt) -> bool:
    """So many sentences."""
    return related(len(split_sentences(response, punkt)), relation, num_sentences)


def number_words(response: str, *, num_words: int, relation: str) -> bool:
    """So many words."""
    return related(count_words(response), relation, num_words)


def number_paragraphs(response: str, *, num_paragraphs: int) -> bool:
    """Exactly so many paragraphs divided by `***`, none of them empty."""
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", response)]
    return all(parts[1:-1]) and sum(map(bool, parts)) == num_paragraphs


def nth_paragraph_first_word(
    response: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str
) -> bool:
    """Exactly so many paragraphs divided by empty lines; the n-th begins with this word."""
    parts = [part.strip() for part in response.split("\n\n")]
    if sum(map(bool, parts)) != num_paragraphs or nth_paragraph > num_paragraphs:
        return False
    paragraph = parts[nth_paragraph - 1]
    if not paragraph:
        return False
    word = paragraph.split()[0].lstrip("'").lstrip('"')
    return re.split(r"[.,?!'\"]", word)[0].lower() == first_word.lower()


def number_placeholders(response: str, *, num_placeholders: int) -> bool:
    """At least so many placeholders in square brackets."""
    return len(re.findall(r"\[.*?\]", response)) >= num_placeholders


def postscript(response: str, *, postscript_marker: str) -> bool:
    """A postscript with this marker; `P.S.` and `P.P.S` may have spaces inside."""
    marker = postscript_marker.strip()
    spaced = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return bool(re.search(spaced.get(marker, re.escape(marker.lower())), response.lower()))


def number_bullets(response: str, *, num_bullets: int) -> bool:
    """Exactly so many bullets: lines that begin with `*` (not `**`) or `-`."""
    starred = re.findall(r"^\s*\*[^*].*$", response, re.MULTILINE)
    dashed = re.findall(r"^\s*-.*$", response, re.MULTILINE)
    return len(starred) + len(dashed) == num_bullets


def constrained_response(response: str) -> bool:
    """One of the three allowed answers occurs."""
    return any(answer in response for answer in ANSWERS)


def number_highlights(response: str, *, num_highlights: int) -> bool:
    """At least so many spans between asterisks; a span between two on each side counts again."""
    single = re.findall(r"\*([^\n*]*)\*", response)
    double = re.findall(r"\*\*([^\n*]*)\*\*", response)
    return sum(bool(span.strip()) for span in single + double) >= num_highlights


def number_sections(response: str, *, section_spliter: str, num_sections: int) -> bool:
    """At least so many headings of this word and a number."""
    heading = rf"\s?{re.escape(section_spliter.strip())}\s?\d+\s?"
    return len(re.findall(heading, response)) >= num_sections


def json_format(response: str) -> bool:
    """The whole response is JSON, one Markdown fence around it aside."""
    text = response.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def title(response: str) -> bool:
    """A title in double angular brackets that is not empty."""
    return any(t.lstrip("<").rstrip(">").strip() for t in re.findall(r"<<[^\n]+>>", response))


def two_responses(response: str) -> bool:
    """Two different responses divided by six asterisks, and nothing empty between."""
    parts = [part.strip() for part in response.split("******")]
    filled = [part for part in parts if part]
    return all(parts[1:-1]) and len(filled) == 2 and filled[0] != filled[1]


def repeats_prompt(response: str, *, prompt_to_repeat: str) -> bool:
    """The response begins with the request, whatever the case."""
    return response.strip().lower().startswith(prompt_to_repeat.strip().lower())


def ends_with(response: str, *, end_phrase: str) -> bool:
    """The response ends with this phrase, whatever the case; closing quotes aside."""
    return response.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def capital_word_frequency(
    response: str, *, capital_frequency: int, capital_relation: str, punkt: Punkt
) -> bool:
    """So many words in capitals."""
    return related(count_capital_words(response, punkt), capital_relation, capital_frequency)


def english_capitals(response: str, *, detect: DetectLanguage) -> bool:
    """English, and no letter is lower-case."""
    return response.isupper() and detect(response) in ("en", None)


def english_lowercase(response: str, *, detect: DetectLanguage) -> bool:
    """English, and no letter is upper-case."""
    return response.islower() and detect(response) in ("en", None)


def no_comma(response: str) -> bool:
    """No comma."""
    return "," not in response


def quotation(response: str) -> bool:
    """The whole response is in double quotation marks."""
    text = response.strip()
    return len(text) > 1 and text.startswith('"') and text.endswith('"')


CHECKERS: Mapping[str, Checker] = {
    "keywords:existence": includes_keywords,
    "keywords:frequency": keyword_frequency,
    "keywords:forbidden_words": forbids_words,
    "keywords:letter_frequency": letter_frequency,
    "language:response_language": in_language,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:number_words": number_words,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": number_bullets,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": number_highlights,
    "detectable_format:multiple_sections": number_sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeats_prompt,
    "startend:end_checker": ends_with,
    "change_case:capital_word_frequency": capital_word_frequency,
    "change_case:english_capital": english_capitals,
    "change_case:english_lowercase": english_lowercase,
    "punctuation:no_comma": no_comma,
    "startend:quotation": quotation,
}
"""Name in the data set -> checker."""

_TOOLS = ("detect", "punkt")


def instruction(name: str, arguments: Mapping[str, Any]) -> Instruction:
    """Return a checked instruction; arguments that are None (the hub's padding) are left out.

    Raises:
        DataError: no such instruction, or its arguments are not those of its checker.
    """
    if name not in CHECKERS:
        raise DataError(f"no instruction {name!r}", f"use one of {', '.join(CHECKERS)}")
    given = {key: value for key, value in arguments.items() if value is not None}
    takes = _parameters(name) - set(_TOOLS)
    if given.keys() != takes:
        takes_text = ", ".join(sorted(takes)) or "no arguments"
        raise DataError(f"{name} has {', '.join(given) or 'nothing'}", f"it takes {takes_text}")
    return Instruction(name, given)


def needs(name: str, tool: str) -> bool:
    """Tell whether a checker uses `detect` (language) or `punkt` (sentences)."""
    return tool in _parameters(name)


def _parameters(name: str) -> set[str]:
    return set(inspect.signature(CHECKERS[name]).parameters) - {"response"}


def follows_strictly(response: str, what: Instruction, **tools: Any) -> bool:
    """Tell whether a response follows an instruction; an empty one follows none.

    `tools` are `detect` and `punkt`; only what the checker needs is looked at.
    """
    return bool(response.strip()) and _bound(what, tools)(response)


def follows_loosely(response: str, what: Instruction, **tools: Any) -> bool:
    """Tell whether any of eight variants of the response follows an instruction.

    The first line, the last line or both may be taken away (introduction and closing words), and
    the asterisks of Markdown.
    """
    check = _bound(what, tools)
    return any(text.strip() and check(text) for text in variants(response))


def variants(response: str) -> list[str]:
    """Return the eight texts of the loose criterion."""
    lines = response.split("\n")
    cut = ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    return [text for whole in (response, *cut) for text in (whole, whole.replace("*", ""))]


def _bound(what: Instruction, tools: Mapping[str, Any]) -> Checker:
    used = {tool: tools[tool] for tool in _TOOLS if needs(what.name, tool)}
    return partial(CHECKERS[what.name], **what.arguments, **used)


def _occurrences(text: str, word: str) -> int:
    return len(re.findall(re.escape(word), text, re.IGNORECASE))
