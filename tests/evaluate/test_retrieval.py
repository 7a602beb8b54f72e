"""BM25 equals its formula, and finds what a reader would."""

import math
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from postgrad.evaluate.retrieval import Bm25, words

TEXTS = [
    "Licensed under the Apache License, Version 2.0",
    "GNU General Public License, version 2 or later",
    "Permission is hereby granted, free of charge",
    "the the the",
    "",
]
vocabulary = st.lists(st.sampled_from("abcdef"), max_size=12).map(" ".join)


def by_the_formula(texts, query, k1=1.2, b=0.75):
    documents = [Counter(words(text)) for text in texts]
    mean = sum(d.total() for d in documents) / len(documents)
    scores = [0.0] * len(texts)
    for word in words(query):
        holders = sum(word in d for d in documents)
        for i, d in enumerate(documents):
            if word in d:
                idf = math.log(1 + (len(texts) - holders + 0.5) / (holders + 0.5))
                length = k1 * (1 - b + b * d.total() / mean)
                scores[i] += idf * d[word] * (k1 + 1) / (d[word] + length)
    return scores


@given(st.lists(vocabulary, min_size=1, max_size=8), vocabulary)
def test_scores_are_those_of_the_formula(texts, query):
    np.testing.assert_allclose(Bm25(texts).scores(query), by_the_formula(texts, query))


@given(st.lists(vocabulary, min_size=1, max_size=8), vocabulary, st.integers(0, 10))
def test_the_nearest_are_the_best_in_order(texts, query, count):
    index = Bm25(texts)
    found, scores = index.nearest(query, count), index.scores(query)
    assert len(found) == len(set(found)) == min(count, len(texts))
    assert found == sorted(range(len(texts)), key=lambda i: (-scores[i], i))[:count]
    assert (scores >= 0).all()


def test_it_finds_what_a_reader_would():
    index = Bm25(TEXTS)
    assert [index.nearest(text, 1) for text in TEXTS[:3]] == [[0], [1], [2]]
    assert index.nearest("The software is granted to you free, with permission", 1) == [2]
    assert index.nearest("nothing in common", 2) == [0, 1]
    assert Bm25([]).nearest("x", 3) == []
