"""The training rows that are most like a request, for its prompt: by words (BM25), by vectors.

Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond" (2009), with the
inverse document frequency that Lucene uses, which is never negative. Words are enough here: test
rows of a narrow task share them with the rows that have the same answer.
"""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from postgrad.types import FloatArray

SATURATION = 1.2
"""k1: how soon more occurrences of a word stop to count."""
LENGTH_PENALTY = 0.75
"""b: 0 = long texts are not held back, 1 = fully by their length."""
_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """Return the words of a text in lower case.

    >>> words("GPL-2.0, or later")
    ['gpl', '2', '0', 'or', 'later']
    """
    return _WORD.findall(text.lower())


class Bm25:
    """An index of texts; for each word the texts that hold it and what it adds to their score."""

    def __init__(self, texts: Sequence[str]) -> None:
        """Count the words of all texts."""
        self.size = len(texts)
        counts = [Counter(words(text)) for text in texts]
        lengths = [count.total() for count in counts]
        mean = sum(lengths) / max(1, self.size) or 1.0
        places: dict[str, list[tuple[int, float]]] = {}
        for number, count in enumerate(counts):
            norm = 1 - LENGTH_PENALTY + LENGTH_PENALTY * lengths[number] / mean
            for word, times in count.items():
                weight = times * (SATURATION + 1) / (times + SATURATION * norm)
                places.setdefault(word, []).append((number, weight))
        self._weights: dict[str, tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]] = {}
        for word, found in places.items():
            rarity = np.log1p((self.size - len(found) + 0.5) / (len(found) + 0.5))
            numbers = np.array([number for number, _ in found], dtype=np.intp)
            self._weights[word] = numbers, rarity * np.array([weight for _, weight in found])

    def scores(self, query: str) -> npt.NDArray[np.float64]:
        """Return the score of every text, [texts]; a word counts as often as the query says it."""
        scores = np.zeros(self.size)
        for word, times in Counter(words(query)).items():
            if word in self._weights:
                numbers, weights = self._weights[word]
                scores[numbers] += times * weights
        return scores

    def nearest(self, query: str, count: int) -> list[int]:
        """Return the places of the `count` best texts, the best first; of equals the earlier."""
        order = np.argsort(-self.scores(query), kind="stable")[:count]
        return [int(number) for number in order]


def nearest_rows(index: FloatArray, queries: FloatArray, count: int) -> list[list[int]]:
    """Return for each query the places of the `count` rows of `index` with the largest cosine.

    Index [rows, H] and queries [queries, H] -> best first; of equals the earlier. Each dimension is
    standardised over the index first: a few of a model's dimensions are so large that they would
    decide alone (Timkey and van Schijndel 2021, arXiv 2109.04404).
    """
    centre, spread = index.mean(0), index.std(0)
    spread = np.where(spread > 0, spread, 1)
    rows, asked = _unit((index - centre) / spread), _unit((queries - centre) / spread)
    return [
        [int(number) for number in np.argsort(-(rows @ query), kind="stable")[:count]]
        for query in asked
    ]


def _unit(vectors: FloatArray) -> FloatArray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: FloatArray = (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32)
    return unit
