"""Scorers: pure functions from a completion and a reference to a `Score` in [0, 1].

Metrics, rewards and gates share them, so a number means the same everywhere. Every score that did
not pass says why in `explanation`. Nothing here reads a file, draws a random number or loads a
model.
"""

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from typing import Any, NamedTuple

from postgrad.errors import ConfigError
from postgrad.types import Score

RELATIVE_TOLERANCE = Decimal("1e-6")
"""How far `numeric` lets two numbers differ, as a share of the larger, unless both are whole."""

Scorer = Callable[[str, str], Score]

_ARTICLES = frozenset({"a", "an", "the"})
_UNSPACED = re.compile("([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])")
_FENCE = re.compile(r"```[\w-]*[ \t]*\n(.*?)\n?[ \t]*```", re.DOTALL)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}")
_NUMBER = re.compile(
    r"""
    (?P<sign>(?<![\w)])[-+](?=[$€£¥]?\.?[0-9])[$€£¥]?)?
    (?:
      (?<![0-9/.,])(?:(?P<whole>[0-9]+)[ ]+)?
        (?P<top>[0-9]+)/(?P<bottom>0*[1-9][0-9]*)(?![0-9]|/[0-9])
      |
      (?P<number>
        (?:
          (?:[0-9]{1,3}(?P<mark>[,_'\u2019\u00a0\u2009\u202f])[0-9]{3}(?:(?P=mark)[0-9]{3})*(?![0-9])
            |[0-9]+)
          (?:\.[0-9]+)?
          |(?<![0-9.])\.[0-9]+
        )
        (?:[eE][-+]?[0-9]{1,3}(?![0-9]))?
      )
    )
    (?P<percent>[ ]?(?:%|percent\b|per[ ]cent\b))?
    """,
    re.VERBOSE,
)


def exact_match(completion: str, reference: str) -> Score:
    """Pass when both texts are equal but for outer whitespace; nothing else is forgiven."""
    return _verdict(completion.strip() == reference.strip(), completion, reference)


def normalize(text: str) -> str:
    """Return the text without what people do not count as a difference.

    In this order: Unicode NFKC; case folding; punctuation and spacing accents out (Unicode classes
    P and Sk; currency and mathematical signs stay, so `C++` is not `C`); the articles a, an, the
    out; whitespace collapsed. As in SQuAD's evaluation script (Rajpurkar et al. 2016), except that
    `.`, `/` and `:` between digits, a leading decimal point and a minus sign before a number stay:
    3.5 is not 35, and -5 is not 5. What would leave nothing is not done: the label `A` stays `a`.

    >>> normalize("The  “Apache-2.0” license.")
    'apache2.0 license'
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    folded = folded.replace("\u2212", "-")
    kept = "".join(folded[i] for i in range(len(folded)) if _stays(folded, i))
    words = kept.split() or folded.split()
    return " ".join([word for word in words if word not in _ARTICLES] or words)


def normalized_match(completion: str, reference: str) -> Score:
    """Pass when both texts are equal after `normalize`."""
    return _verdict(normalize(completion) == normalize(reference), completion, reference)


def numeric(completion: str, reference: str) -> Score:
    r"""Pass when the last number of the completion equals the last number of the reference.

    Numbers are read in English notation: `1,234.5` (also with `_`, an apostrophe or a hard or thin
    space between groups of three digits), `.5`, `-7`, `$-3`, `6.02e23`, `3/4`, `1 1/2`,
    `\frac{3}{4}`. A comma that does not separate thousands separates two numbers; a hyphen after a
    word or a digit is not a sign. Whole numbers must be equal; others may differ by one part in a
    million (`RELATIVE_TOLERANCE`). A percent sign is a unit: 45 % equals 45, and where only one
    side has it, it also equals 0.45.
    """
    wanted, given = _last_number(reference), _last_number(completion)
    if wanted is None:
        return Score(0.0, False, "the reference has no number in it")
    if given is None:
        return Score(0.0, False, f"no number in {_show(completion)}")
    equal = _close(given.value, wanted.value)
    if not equal and given.percent != wanted.percent:
        equal = _close(given.fraction, wanted.fraction)
    if equal:
        return Score(1.0, True)
    return Score(0.0, False, f"the last number is {given.text}, expected {wanted.text}")


def contains(completion: str, reference: str) -> Score:
    """Pass when the reference occurs in the completion as whole words, whatever the case.

    Both are NFKC-normalised and case-folded and their whitespace is collapsed. A match must not
    begin or end inside a word or number (`no` is not in `nothing`, `4` is not in `42`); scripts
    without upper and lower case, such as Chinese, match anywhere.
    """
    text, sought = _fold(completion), _fold(reference)
    if not sought:
        return Score(0.0, False, "the reference is empty")
    start = text.find(sought)
    while start >= 0:
        end = start + len(sought)
        if not (_inside_word(text, start) or _inside_word(text, end)):
            return Score(1.0, True)
        start = text.find(sought, start + 1)
    return Score(0.0, False, f"{_show(reference)} is not in {_show(completion)}")


def regex_match(completion: str, reference: str, pattern: str) -> Score:
    """Pass when what `pattern` finds in the completion equals what it finds in the reference.

    The first occurrence counts: its first group, or the whole match when there is no group, outer
    whitespace stripped. A reference in which the pattern does not occur is compared as a whole.

    Raises:
        ConfigError: the pattern is not a regular expression.
    """
    expression = _compile(pattern)
    wanted, found = _extract(expression, reference), _extract(expression, completion)
    if found is None:
        return Score(0.0, False, f"the pattern does not occur in {_show(completion)}")
    return _verdict(found == (reference.strip() if wanted is None else wanted), found, reference)


def token_f1(completion: str, reference: str) -> Score:
    """Score the overlap of words: harmonic mean of precision and recall, as in SQuAD.

    Words are those of `normalize`, counted with repeats; each Chinese or Japanese character is a
    word. Two texts without words are equal. Passed only when the words are the same.
    """
    given, wanted = _words(completion), _words(reference)
    if not given or not wanted:
        return _verdict(given == wanted, completion, reference)
    common = (Counter(given) & Counter(wanted)).total()
    value = 2 * common / (len(given) + len(wanted))
    if value == 1:
        return Score(1.0, True)
    counts = f"{common} of {len(given)} words are right, {len(wanted)} expected"
    return Score(value, False, counts)


def json_match(completion: str, reference: str) -> Score:
    """Score equality of two JSON values with credit for each field; passed when fully equal.

    The value is the number of equal leaves over the number of leaves that occur in either, so a
    missing, wrong or extra field each costs its share. A leaf is a number, string, true, false,
    null or empty container together with its path; lists are compared position by position, keys
    in any order, 1 equals 1.0 but not true. One Markdown code fence around the whole answer is
    taken off; any other text around it, duplicate keys, NaN and Infinity are errors: score 0.
    """
    try:
        wanted = dict(_leaves(_parse_json(reference)))
    except ValueError as error:
        return Score(0.0, False, f"the reference is not JSON: {error}")
    try:
        given = dict(_leaves(_parse_json(completion)))
    except ValueError as error:
        return Score(0.0, False, f"not JSON: {error}")
    paths = wanted.keys() | given.keys()
    wrong = [p for p in paths if p not in given or p not in wanted or given[p] != wanted[p]]
    if not wrong:
        return Score(1.0, True)
    first = min(wrong, key=lambda path: [(str(type(key)), key) for key in path])
    name = ".".join(str(key) for key in first) or "value"
    there = _show(given[first][1]) if first in given else "missing"
    expected = _show(wanted[first][1]) if first in wanted else "nothing"
    why = f"{len(wrong)} of {len(paths)} fields differ; {name}: {there}, expected {expected}"
    return Score(1 - len(wrong) / len(paths), False, why)


SCORERS: Mapping[str, Scorer | Callable[[str, str, str], Score]] = {
    "exact_match": exact_match,
    "normalized_match": normalized_match,
    "numeric": numeric,
    "contains": contains,
    "regex": regex_match,
    "f1": token_f1,
    "json": json_match,
}
"""Name in the recipe -> function. `regex` alone takes a third argument, the pattern."""

BINARY = frozenset({"exact_match", "normalized_match", "numeric", "contains", "regex"})
"""Scorers whose value is always 0 or 1."""


def score(name: str, completion: str, reference: str, pattern: str | None = None) -> Score:
    """Apply the scorer called `name`.

    Raises:
        ConfigError: no such scorer, a pattern that is missing, not wanted or not a regular
            expression.
    """
    if name not in SCORERS:
        raise ConfigError(
            f"evaluate.scorer: there is no scorer {name!r}", f"use one of {', '.join(SCORERS)}"
        )
    if name == "regex":
        if not pattern:
            raise ConfigError("evaluate.scorer regex needs a pattern", "set evaluate.pattern")
        return regex_match(completion, reference, pattern)
    if pattern is not None:
        raise ConfigError(f"evaluate.scorer {name} takes no pattern", "remove evaluate.pattern")
    scorer: Any = SCORERS[name]
    result: Score = scorer(completion, reference)
    return result


def reference_problem(name: str, reference: str, pattern: str | None = None) -> str | None:
    """Return why no completion could ever pass against this reference, or None when one could.

    An answer that repeats the reference must pass; if even that fails, the data do not fit the
    scorer, and every arm would score 0. (`regex` may extract from the completion only.)
    """
    result = score(name, reference, reference, pattern)
    return None if result.passed or name == "regex" else result.explanation


def _verdict(passed: bool, given: str, wanted: str) -> Score:
    if passed:
        return Score(1.0, True)
    return Score(0.0, False, f"got {_show(given)}, expected {_show(wanted)}")


def _show(value: Any, limit: int = 60) -> str:
    text = value.strip() if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if not text:
        return "an empty text"
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    return repr(text) if isinstance(value, str) else text


def _fold(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _stays(text: str, i: int) -> bool:
    """Tell whether the character at `i` survives `normalize`."""
    character = text[i]
    category = unicodedata.category(character)
    if not (category.startswith("P") or category == "Sk"):
        return True
    if not text[i + 1 : i + 2].isdigit():
        return False
    before = text[i - 1] if i else " "
    if character == "-":
        return not before.isalnum()
    return character == "." if before.isspace() else character in "./:" and before.isdigit()


def _words(text: str) -> list[str]:
    return _UNSPACED.sub(r" \1 ", normalize(text)).split()


def _inside_word(text: str, i: int) -> bool:
    """Tell whether the boundary before index `i` is in the middle of a word or number."""
    return 0 < i < len(text) and all(
        c.isdigit() or c.lower() != c.upper() for c in (text[i - 1], text[i])
    )


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(
            f"evaluate.pattern {pattern!r} is not a regular expression: {error}",
            "correct it; in YAML put it in single quotes so that backslashes stay",
        ) from None


def _extract(expression: re.Pattern[str], text: str) -> str | None:
    match = expression.search(text)
    if match is None:
        return None
    found: str | None = match[1] if expression.groups else match[0]
    return None if found is None else found.strip()


class _Number(NamedTuple):
    value: Decimal
    percent: bool
    text: str

    @property
    def fraction(self) -> Decimal:
        return self.value / 100 if self.percent else self.value


def _last_number(text: str) -> _Number | None:
    text = text.replace("\u2212", "-").replace("\\%", "%")
    matches = list(_NUMBER.finditer(_LATEX_FRACTION.sub(r" \1/\2", text)))
    if not matches:
        return None
    match = matches[-1]
    if match["number"]:
        digits = match["number"].replace(match["mark"], "") if match["mark"] else match["number"]
        value = Decimal(digits)
    else:
        value = Decimal(match["whole"] or 0) + Decimal(match["top"]) / Decimal(match["bottom"])
    if (match["sign"] or "").startswith("-"):
        value = value.copy_negate()  # unary minus would round to the context
    return _Number(value, match["percent"] is not None, match[0].strip())


def _close(a: Decimal, b: Decimal) -> bool:
    if a == b or (a == a.to_integral_value() and b == b.to_integral_value()):
        return a == b
    return abs(a - b) <= RELATIVE_TOLERANCE * max(abs(a), abs(b))


def _parse_json(text: str) -> Any:
    """Return the JSON value of a text; raises ValueError with a reason for people."""
    text = text.strip()
    fenced = _FENCE.fullmatch(text)
    try:
        return json.loads(
            fenced[1] if fenced else text,
            object_pairs_hook=_without_duplicates,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at line {error.lineno} column {error.colno}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        twice = next(key for key, times in Counter(k for k, _ in pairs).items() if times > 1)
        raise ValueError(f"the key {_show(twice)} occurs twice")
    return result


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is too large a number")
    return value


def _leaves(root: Any) -> Iterator[tuple[tuple[str | int, ...], tuple[bool, Any]]]:
    """Yield (path, (is a truth value, value)) of each leaf, without recursion."""
    stack: list[tuple[tuple[str | int, ...], Any]] = [((), root)]
    while stack:
        path, node = stack.pop()
        if isinstance(node, dict) and node:
            stack.extend(((*path, key), child) for key, child in node.items())
        elif isinstance(node, list) and node:
            stack.extend(((*path, i), child) for i, child in enumerate(node))
        else:
            yield path, (isinstance(node, bool), node)
