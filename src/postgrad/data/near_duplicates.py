"""Near-duplicate texts, found exactly: Jaccard similarity of 5-gram sets, by a prefix filter.

Two sets of similarity >= t share an element among the first |x| - ceil(t |x|) + 1 of each,
when elements are ordered from rare to frequent (Bayardo, Ma and Srikant, "Scaling up all pairs
similarity search", WWW 2007); positions inside the prefix bound the overlap further (Xiao et al.,
"Efficient similarity joins for near-duplicate detection", WWW 2008). Candidates that survive are
verified, so nothing is missed and nothing is approximate. Where all grams are frequent (sentences
made from templates) comparing the sketches of all pairs is faster, and is done instead.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

GRAM = 5
_CHUNK = 1 << 19
_BLOCK = 1 << 18
_SPARSE_COST = 100
_EPSILON = 1e-9

Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Words = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float64]


class _Fold(dict[int, str]):
    """Translation table, filled on demand: letters, marks and digits stay, all else is a space."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        self[code] = character if unicodedata.category(character)[0] in "LMN" else " "
        return self[code]


_FOLD = _Fold()


def normalise(text: str) -> str:
    """Return the text in lower case with every run of non-word characters as one space.

    Unicode is composed by compatibility (NFKC) first. A text without any word character is
    returned lower-cased, so that "?!" and "..." stay different.

    >>> normalise("  Where's my CARD?! ")
    'where s my card'
    """
    lowered = unicodedata.normalize("NFKC", text).lower()
    return " ".join(lowered.translate(_FOLD).split()) or lowered.strip()


@dataclass(frozen=True, slots=True)
class Grams:
    """Sets of 5-grams, one after another. Smaller number = rarer gram; each set is sorted."""

    grams: Ints
    starts: Ints
    """[texts + 1] where each text's set begins."""
    sizes: Ints
    """[texts] number of different grams."""
    sketches: Words
    """[words, texts] parity of the grams that fall on each bit. The bits in which two sketches
    differ are at most the grams in which the sets differ: a cheap bound that is never wrong."""
    marks: Flags
    """[grams] all false between two uses; scratch space of `_similarities`."""


def gram_sets(texts: Sequence[str]) -> Grams:
    """Return the set of character 5-grams of each text (a shorter text is one gram of its own)."""
    padded = [text.ljust(GRAM, "\0") for text in texts]
    lengths = np.array([len(text) for text in padded], dtype=np.int64)
    numbers, distinct = _number_grams(padded, lengths)
    keys = np.repeat(np.arange(len(texts)), lengths - GRAM + 1)
    keys *= distinct
    keys += numbers
    del numbers, padded
    keys = _distinct(keys)  # text * distinct + gram: one entry for each gram of each text
    places = keys % distinct
    order = np.empty(distinct, dtype=np.int64)
    frequency = np.bincount(places, minlength=distinct)
    order[np.argsort(frequency, kind="stable")] = np.arange(distinct)
    keys -= places
    keys += order[places]
    del places
    keys.sort()
    owner = keys // distinct
    grams = keys
    grams -= owner * distinct
    starts = np.searchsorted(owner, np.arange(len(texts) + 1)).astype(np.int64)
    sketches = _sketches(grams, owner, len(texts))
    return Grams(grams, starts, np.diff(starts), sketches, np.zeros(distinct, dtype=bool))


def _number_grams(padded: Sequence[str], lengths: Ints) -> tuple[npt.NDArray[np.int32], int]:
    """Return the grams of all texts as numbers from 0, one text after another, and how many."""
    joined = "".join(padded).encode("utf-32-le", "surrogatepass")
    characters = np.frombuffer(joined, dtype=np.uint32)
    known = np.zeros(0x110000, dtype=bool)
    known[characters] = True
    inside = np.ones(len(characters) - GRAM + 1, dtype=bool)
    ends = np.cumsum(lengths)[:-1]
    for back in range(1, GRAM):
        inside[ends - back] = False  # a window must not reach into the next text
    letters = (np.cumsum(known, dtype=np.int32) - 1)[characters]
    del joined, characters
    return _rank(_codes(letters, int(known.sum()))[inside])


def _rank(values: Ints) -> tuple[npt.NDArray[np.int32], int]:
    """Return each value's place among the different values, and how many there are."""
    order = np.argsort(values)
    values = values[order]
    new = np.ones(len(values), dtype=bool)
    np.not_equal(values[1:], values[:-1], out=new[1:])
    del values
    places = np.cumsum(new, dtype=np.int32) - 1
    ranks = np.empty(len(order), dtype=np.int32)
    ranks[order] = places
    return ranks, int(places[-1]) + 1


def _sketches(grams: Ints, owner: Ints, texts: int) -> Words:
    """Make parity sketches of about two bits for each gram of a typical text."""
    words = min(max(2 * len(grams) // (64 * texts) + 1, 2), 64)
    bit = grams % (64 * words)
    flat = np.zeros(words * texts, dtype=np.uint64)
    one = np.left_shift(np.uint64(1), (bit % 64).astype(np.uint64))
    np.bitwise_xor.at(flat, (bit // 64) * texts + owner, one)
    return flat.reshape(words, texts)


def _distinct(values: Ints) -> Ints:
    """Return the different values, sorted; np.unique hashes here, which is ten times slower."""
    values = np.sort(values)
    new = np.ones(len(values), dtype=bool)
    np.not_equal(values[1:], values[:-1], out=new[1:])
    return values[new]


def _codes(letters: npt.NDArray[np.int32], base: int) -> Ints:
    """Number every window of 5 letters, exactly: equal windows and only they get equal numbers."""
    count = len(letters) - GRAM + 1
    codes, bound = letters[:count].astype(np.int64), base
    for ahead in range(1, GRAM):
        if bound * base >= 1 << 62:
            ranks, bound = _rank(codes)
            codes = ranks.astype(np.int64)
        codes *= base
        codes += letters[ahead : ahead + count]
        bound *= base
    return codes


@dataclass(frozen=True, slots=True)
class _Postings:
    """Prefix entries sorted by gram, then by size of the set."""

    gram: Ints
    size: Ints
    text: Ints
    place: Ints
    """Position of the gram inside its set."""


def _smallest(size: Ints, threshold: float) -> Ints:
    """Return the smallest size of a set that can be similar enough to one of `size`."""
    smallest: Ints = np.ceil(threshold * size - _EPSILON).astype(np.int64)
    return smallest


def _needed(size_a: Ints, size_b: Ints, threshold: float) -> Ints:
    """Return the smallest overlap with which two sets of these sizes are similar enough."""
    return _smallest(size_a + size_b, threshold / (1 + threshold))


def _postings(sets: Grams, texts: Ints, threshold: float) -> _Postings:
    size = sets.sizes[texts]
    prefix = size - _smallest(size, threshold) + 1
    text = np.repeat(texts, prefix)
    place = np.arange(len(text)) - np.repeat(np.cumsum(prefix) - prefix, prefix)
    gram = sets.grams[sets.starts[text] + place]
    order = np.lexsort((sets.sizes[text], gram))
    return _Postings(gram[order], sets.sizes[text][order], text[order], place[order])


def _pairs(sets: Grams, texts: Ints, others: Ints, threshold: float) -> Iterator[tuple[Ints, Ints]]:
    """Yield candidate pairs (of texts, of others), a bounded number at a time.

    No pair that is similar enough is left out. When both are the same array every unordered pair
    comes once at most.
    """
    itself = texts is others
    entries = _postings(sets, texts, threshold)
    index = entries if itself else _postings(sets, others, threshold)
    width = int(sets.sizes.max()) + 2
    low = entries.gram * width + _smallest(entries.size, threshold)
    low = np.searchsorted(index.gram * width + index.size, low)
    if itself:
        high = np.arange(len(low))
    else:
        largest = np.minimum((entries.size / threshold + _EPSILON).astype(np.int64), width - 1)
        high = entries.gram * width + largest
        high = np.searchsorted(index.gram * width + index.size, high, side="right")
    sparse = int(np.maximum(high - low, 0).sum()) * _SPARSE_COST
    if sparse > len(texts) * len(others) * len(sets.sketches) // (2 if itself else 1):
        yield from _dense(sets, texts, others, threshold)
        return
    for rows, columns in _expand(low, high):
        yield _allowed(sets, entries, rows, index, columns, threshold)


def _expand(low: Ints, high: Ints) -> Iterator[tuple[Ints, Ints]]:
    """Yield (row, column) pairs with low[row] <= column < high[row], a bounded number at a time."""
    counts = np.maximum(high - low, 0)
    totals = np.cumsum(counts)
    begin = 0
    while begin < len(counts):
        done = int(totals[begin - 1]) if begin else 0
        end = max(begin + 1, int(np.searchsorted(totals, done + _CHUNK, side="right")))
        part = counts[begin:end]
        if part.any():
            row = np.repeat(np.arange(begin, end), part)
            before = np.cumsum(part) - part
            column = np.arange(len(row)) - np.repeat(before, part) + np.repeat(low[begin:end], part)
            yield row, column
        begin = end


def _allowed(
    sets: Grams, a: _Postings, rows: Ints, b: _Postings, columns: Ints, threshold: float
) -> tuple[Ints, Ints]:
    """Return the different pairs of texts that positions and sketches allow."""
    size_a, size_b = a.size[rows], b.size[columns]
    place_a, place_b = a.place[rows], b.place[columns]
    most = np.minimum(place_a, place_b) + np.minimum(size_a - place_a, size_b - place_b)
    keep = most >= _needed(size_a, size_b, threshold)
    pairs = _distinct(a.text[rows[keep]] << 32 | b.text[columns[keep]])
    first, second = pairs >> 32, pairs & 0xFFFFFFFF
    size_a, size_b = sets.sizes[first], sets.sizes[second]
    bits = np.zeros(len(first), dtype=np.int64)
    for word in sets.sketches:
        bits += np.bitwise_count(word[first] ^ word[second])
    keep = bits <= size_a + size_b - 2 * _needed(size_a, size_b, threshold)
    return first[keep], second[keep]


def _dense(sets: Grams, texts: Ints, others: Ints, threshold: float) -> Iterator[tuple[Ints, Ints]]:
    """Compare the sketches of all pairs whose sizes allow the similarity, block by block."""
    itself = texts is others
    rows = texts[np.argsort(sets.sizes[texts], kind="stable")]
    columns = rows if itself else others[np.argsort(sets.sizes[others], kind="stable")]
    row_sizes, column_sizes = sets.sizes[rows], sets.sizes[columns]
    sketches = np.ascontiguousarray(sets.sketches[:, columns])
    for begin, end in _runs(row_sizes):
        size = row_sizes[begin : begin + 1]
        low = int(np.searchsorted(column_sizes, _smallest(size, threshold)[0]))
        largest = float(size[0]) / threshold + _EPSILON
        high = end if itself else int(np.searchsorted(column_sizes, largest, side="right"))
        own = sets.sketches[:, rows[begin:end]]
        step = _BLOCK // (end - begin)
        for left in range(low, high, step):
            right = min(left + step, high)
            bits = np.zeros((end - begin, right - left), dtype=np.uint16)
            for word, other in zip(own, sketches, strict=True):
                bits += np.bitwise_count(word[:, None] ^ other[None, left:right])
            limit = size + column_sizes[left:right]
            limit = limit - 2 * _needed(size, column_sizes[left:right], threshold)
            row, column = np.nonzero(bits <= np.minimum(limit, 0xFFFF).astype(np.uint16))
            row, column = row + begin, column + left
            if itself:
                row, column = row[column < row], column[column < row]
            yield rows[row], columns[column]


def _runs(values: Ints) -> Iterator[tuple[int, int]]:
    """Yield the bounds of runs of equal values, at most 64 long."""
    edges = np.flatnonzero(np.diff(values, prepend=-1, append=-1))
    for begin, end in pairwise(edges.tolist()):
        for start in range(begin, end, 64):
            yield start, min(start + 64, end)


def _similarities(sets: Grams, first: Ints, second: Ints) -> Floats:
    """Return the exact Jaccard similarity of each pair; fast when `first` repeats."""
    result = np.empty(len(first))
    order = np.argsort(first, kind="stable")
    edges = np.flatnonzero(np.diff(first[order], prepend=-1, append=-1))
    for begin, end in pairwise(edges.tolist()):
        left = int(first[order[begin]])
        own = sets.grams[sets.starts[left] : sets.starts[left + 1]]
        sets.marks[own] = True
        for start in range(begin, end, 4096):
            part = order[start : min(start + 4096, end)]
            right = second[part]
            spans = zip(sets.starts[right].tolist(), sets.starts[right + 1].tolist(), strict=True)
            hits = np.concatenate([sets.marks[sets.grams[a:b]] for a, b in spans])
            sizes = sets.sizes[right]
            shared = np.add.reduceat(hits, np.cumsum(sizes) - sizes, dtype=np.int64)
            result[part] = shared / (len(own) + sizes - shared)
        sets.marks[own] = False
    return result


def connect(texts: Sequence[str], threshold: float) -> Ints:
    """Return for each text the smallest index in its cluster of near-duplicates.

    A cluster is a connected component of "Jaccard similarity of 5-gram sets >= threshold".

    Args:
        texts: Normalised texts, best without repeats.
        threshold: In (0, 1].
    """
    roots: Ints = np.arange(len(texts))
    if len(texts) < 2:
        return roots
    sets = gram_sets(texts)
    for first, second in _pairs(sets, roots, roots, threshold):
        for few in (True, False):  # one pair of each text first: it often makes the others needless
            apart = roots[first] != roots[second]
            first, second = first[apart], second[apart]
            tried = np.unique(first, return_index=True)[1] if few else np.arange(len(first))
            true = tried[_similarities(sets, first[tried], second[tried]) >= threshold]
            roots = join(roots, first[true], second[true])
    return roots


def join(roots: Ints, first: Ints, second: Ints) -> Ints:
    """Return `roots` (each item -> the smallest of its component) after joining pairs of items."""
    roots = roots.copy()
    while len(first):
        a, b = roots[first], roots[second]
        np.minimum.at(roots, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(shorter := roots[roots], roots):
            roots = shorter
        apart = roots[first] != roots[second]
        first, second = first[apart], second[apart]
    return roots


def find_twins(
    texts: Sequence[str], others: Sequence[str], threshold: float
) -> dict[int, tuple[int, float]]:
    """Return for each text that has a near-duplicate among `others` one of them.

    Args:
        texts: Normalised texts to be judged.
        others: Normalised texts to compare with.
        threshold: Smallest Jaccard similarity of 5-gram sets, in (0, 1].

    Returns:
        {index in texts: (index in others, similarity)}.
    """
    if not texts or not others:
        return {}
    sets = gram_sets([*texts, *others])
    left, right = np.split(np.arange(len(texts) + len(others)), [len(texts)])
    twin = np.full(len(texts), -1)
    similarity = np.zeros(len(texts))
    for first, second in _pairs(sets, left, right, threshold):
        for few in (True, False):
            still = twin[first] < 0
            first, second = first[still], second[still]
            tried = np.unique(first, return_index=True)[1] if few else np.arange(len(first))[::-1]
            values = _similarities(sets, first[tried], second[tried])
            true = values >= threshold
            twin[first[tried[true]]] = second[tried[true]] - len(texts)
            similarity[first[tried[true]]] = values[true]
    found = np.flatnonzero(twin >= 0).tolist()
    return {text: (int(twin[text]), float(similarity[text])) for text in found}
