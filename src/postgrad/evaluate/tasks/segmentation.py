"""Sentences and words of English text, counted as IFEval counts them; pure.

Sentences come from Punkt (Kiss and Strunk 2006, "Unsupervised Multilingual Sentence Boundary
Detection") with the parameters of the English model that NLTK distributes as `punkt_tab`; words are
runs of word characters; words in capitals are tokens of the Penn Treebank as NLTK splits them. The
counts equal those of NLTK 3.10, which `benchmarks/ifeval_parity.py` proves.
"""

import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path

from postgrad.errors import SourceError

PUNKT_ENGLISH = (
    "pypi:llama-index-core==0.14.25/llama_index/core/_static/nltk_cache/tokenizers/punkt_tab/english/"
    "#wheel=caa7d9c5ac9b13dc33400cf8d5e92e689b6d1e4497eb9bfa50d6f52ca2eb22a1"
)
"""Where the parameters come from: a wheel that carries NLTK's files unchanged."""

_QUOTES = "\u2018\u2019\u201c\u201d\xab\xbb"
_SEPARATOR = rf"[)\";}}\]*:@'({{\[?!{_QUOTES}]"
_MANY = r"(?:-{2,}|\.{2,}|(?:\.\s){2,}\.)"
_TOKEN = re.compile(
    rf"{_MANY}"
    r"|(?=[^(\"`{\[:;&#*@)}\]\-,])\S+?"
    rf"(?=\s|$|{_SEPARATOR}|{_MANY}|,(?=$|\s|{_SEPARATOR}|{_MANY}))"
    r"|\S"
)
_CANDIDATE = re.compile(rf"[.?!](?=(?P<after>{_SEPARATOR}|\s+(?P<next>\S+)))")
_CLOSING = re.compile(rf"[\"')\]}}{_QUOTES}]+?(?:\s+|(?=--)|$)", re.MULTILINE)
_SPACE = re.compile(r"[ \t\n\r\x0b\x0c]")
_NUMBER = re.compile(r"^-?[.,]?\d[\d,.-]*\.?$")
_INITIAL = re.compile(r"[^\W\d]\.$")

_UPPER_INSIDE = 4
_UPPER = 2 | _UPPER_INSIDE | 8
_LOWER_FIRST = 16
_LOWER = _LOWER_FIRST | 32 | 64
"""Bits of a word's contexts in training: upper or lower case, first, inside or unknown."""


@dataclass(frozen=True, slots=True)
class Punkt:
    """What Punkt learnt about a language; words are in lower case."""

    abbreviations: frozenset[str]
    collocations: frozenset[tuple[str, str]]
    """Pairs around a full stop that is no boundary."""
    starters: frozenset[str]
    contexts: Mapping[str, int]


@dataclass(slots=True)
class _Token:
    text: str
    ends: bool = False
    """Whether a sentence ends here."""
    shortened: bool = False
    """An abbreviation or an ellipsis."""

    @property
    def kind(self) -> str:
        """The word in lower case; all numbers are one word."""
        return _NUMBER.sub("##number##", self.text.lower())

    @property
    def bare(self) -> str:
        """The kind without a final full stop."""
        kind = self.kind
        return kind[:-1] if len(kind) > 1 and kind.endswith(".") else kind

    @property
    def known_as(self) -> str:
        """The kind as the parameters list it: without the full stop of a sentence."""
        return self.bare if self.ends else self.kind


def read_punkt(folder: Path) -> Punkt:
    """Read the four files of a language of NLTK's `punkt_tab`.

    Raises:
        SourceError: a file is missing or not as expected.
    """
    try:
        texts = {
            name: (folder / name).read_text(encoding="utf-8").splitlines()
            for name in ("abbrev_types.txt", "collocations.tab", "sent_starters.txt")
        }
        table = (folder / "ortho_context.tab").read_text(encoding="utf-8").splitlines()
        pairs = [line.split("\t") for line in texts["collocations.tab"]]
        return Punkt(
            abbreviations=frozenset(texts["abbrev_types.txt"]),
            collocations=frozenset((first, second) for first, second in pairs),
            starters=frozenset(texts["sent_starters.txt"]),
            contexts={word: int(bits) for word, bits in (line.split("\t") for line in table)},
        )
    except (OSError, ValueError) as error:
        raise SourceError(
            f"{folder} does not hold the parameters of Punkt: {error}",
            "give a language folder of NLTK's punkt_tab",
        ) from None


def split_sentences(text: str, punkt: Punkt) -> list[str]:
    """Return the sentences of a text; closing quotes and brackets stay with their sentence."""
    spans = list(_spans(text, punkt))
    found, moved = [], 0
    for here, there in [*pairwise(spans), (spans[-1], None)]:
        start, end = here[0] + moved, here[1]
        moved = 0
        if there is not None and (closing := _CLOSING.match(text[slice(*there)])):
            end = there[0] + len(closing[0].rstrip())
            moved = closing.end()
        if text[start:end] or moved:
            found.append(text[start:end])
    return found


def _spans(text: str, punkt: Punkt) -> Iterator[tuple[int, int]]:
    begin = 0
    for match, context in _candidates(text):
        if _has_boundary(context, punkt):
            yield begin, match.end()
            begin = match.start("next") if match["next"] else match.end()
    yield begin, len(text.rstrip())


def _candidates(text: str) -> Iterator[tuple[re.Match[str], str]]:
    """Yield the last possible boundary of each run without spaces, with the words around it."""
    waiting: tuple[re.Match[str], int] | None = None
    start = end = 0
    for match in _CANDIDATE.finditer(text):
        spaces = list(_SPACE.finditer(text, end + 1, match.start()))
        start = spaces[-1].end() if spaces else start
        if waiting and end <= start:
            yield waiting[0], _context(text, *waiting)
        waiting, end = (match, start), match.start()
    if waiting:
        yield waiting[0], _context(text, *waiting)


def _context(text: str, match: re.Match[str], start: int) -> str:
    return text[start : match.end()] + match["after"]


def _has_boundary(context: str, punkt: Punkt) -> bool:
    """Tell whether a sentence ends at a token other than the last."""
    tokens = [_Token(word) for line in context.split("\n") for word in _TOKEN.findall(line)]
    for token in tokens:
        _judge_alone(token, punkt)
    for token, following in pairwise(tokens):
        _judge_pair(token, following, punkt)
    return any(token.ends for token in tokens[:-1])


def _judge_alone(token: _Token, punkt: Punkt) -> None:
    """Decide by the token itself: an abbreviation, an ellipsis or the end of a sentence."""
    text = token.text
    if text in (".", "?", "!"):
        token.ends = True
    elif text.startswith("..") and not text.strip("."):
        token.shortened = True
    elif text.endswith(".") and not text.endswith(".."):
        word = text[:-1].lower()
        known = {word, word.split("-")[-1]} & punkt.abbreviations
        token.shortened, token.ends = bool(known), not known


def _judge_pair(token: _Token, following: _Token, punkt: Punkt) -> None:
    """Correct the decision by what follows (section 4 of the paper)."""
    if not token.text.endswith("."):
        return
    following_word = following.known_as
    if (token.bare, following_word) in punkt.collocations:
        token.ends, token.shortened = False, True
        return
    initial = bool(_INITIAL.match(token.text))
    starts = _starts_sentence(following, punkt)
    capital = following.text[0].isupper()
    starter = starts or (capital and following_word in punkt.starters)
    if token.shortened and not initial and starter:
        token.ends = True
        return
    if not (initial or token.bare == "##number##"):
        return
    lower = punkt.contexts.get(following_word, 0) & _LOWER
    if starts is False or (starts is None and initial and capital and not lower):
        token.ends, token.shortened = False, True


def _starts_sentence(token: _Token, punkt: Punkt) -> bool | None:
    """Tell by its case in training whether a word begins a sentence; None when unknown."""
    if token.text in tuple(";:,.!?"):
        return False
    seen = punkt.contexts.get(token.known_as, 0)
    first = token.text[0]
    if first.isupper() and seen & _LOWER and not seen & _UPPER_INSIDE:
        return True
    if first.islower() and (seen & _UPPER or not seen & _LOWER_FIRST):
        return False
    return None


def count_words(text: str) -> int:
    """Return the number of runs of letters with their marks, digits and underscores.

    >>> count_words("It's a well-known fact.")
    6
    """
    return sum(inside for inside, _ in groupby(text, _in_word))


def _in_word(character: str) -> bool:
    """Tell whether a character is part of a word: as in UTS 18; `re` leaves marks out."""
    kind = unicodedata.category(character)
    return kind[0] in "LM" or kind in ("Nd", "Nl", "Pc") or character in "\u200c\u200d"


_BREAKS = re.compile(
    rf"[{_QUOTES}\u201e`\";@#$%&?!*\[\](){{}}<>\u2012-\u2015]|''|\.{{2,}}|--|[:,](?=\D|$)"
    r"|(?<!\w)'(?!(?:re|ve|ll|m|t|s|d|n)\b)(?=\w)"
    r"|(?<!\.)\.(?=[\])}>\"'\xbb\u201d\u2019 ]*\s*$)",
    re.IGNORECASE,
)
_CLITICS = tuple(
    re.compile(rf"(?<=[^' ])({form})(?= )")
    for form in ("'[SsMmDd]?", "'ll|'LL|'re|'RE|'ve|'VE|n't|N'T")
)
_CONTRACTION = re.compile(
    r"\b(can(?=not)|d(?='ye)|gim(?=me)|gon(?=na)|got(?=ta)|lem(?=me)|more(?='n)|wan(?=na\s))"
    r"(not|'ye|me|na|ta|'n)\b",
    re.IGNORECASE,
)


def count_capital_words(text: str, punkt: Punkt) -> int:
    """Return the number of tokens without a lower-case letter and with an upper-case one.

    Clitics are tokens: `DON'T` counts twice, `I'm` once.
    """
    count = 0
    for sentence in split_sentences(text, punkt):
        words = " " + re.sub(r"\s+", " ", _BREAKS.sub(" ", sentence)) + " "
        for clitic in _CLITICS:
            words = clitic.sub(r" \1", words)
        count += sum(token.isupper() for token in _CONTRACTION.sub(r" \1 \2 ", words).split())
    return count
