import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from postgrad.data import near_duplicates
from postgrad.data.near_duplicates import connect, find_twins, gram_sets, join, normalise


def grams(text):
    return {text[i : i + 5] for i in range(len(text) - 4)} or {text}


def jaccard(a, b):
    return len(grams(a) & grams(b)) / len(grams(a) | grams(b))


def brute_clusters(texts, threshold):
    roots = list(range(len(texts)))
    for i in range(len(texts)):
        for j in range(i):
            if jaccard(texts[i], texts[j]) >= threshold and roots[i] != roots[j]:
                low, high = sorted((roots[i], roots[j]))
                roots = [low if root == high else root for root in roots]
    return roots


@st.composite
def similar_texts(draw):
    """Texts that are edits of a few others, so that similarities fall on both sides."""
    letters = draw(st.sampled_from(["ab ", "abcdefgh ", "aé漢字🙂\u0301 "]))
    bases = draw(st.lists(st.text(letters, max_size=40), min_size=1, max_size=4))
    texts = []
    for _ in range(draw(st.integers(1, 20))):
        text = list(draw(st.sampled_from(bases)))
        for place in draw(st.lists(st.integers(0, 39), max_size=3)):
            text[place : place + 1] = draw(st.sampled_from(letters))
        texts.append("".join(text))
    return list(dict.fromkeys(texts))


thresholds = st.sampled_from([0.2, 0.5, 2 / 3, 0.8, 0.9, 1.0])


@pytest.fixture(params=["sparse", "dense"])
def strategy(request, monkeypatch):
    monkeypatch.setattr(near_duplicates, "_SPARSE_COST", 0 if request.param == "sparse" else 10**9)
    monkeypatch.setattr(near_duplicates, "_CHUNK", 7)
    monkeypatch.setattr(near_duplicates, "_BLOCK", 256)


@settings(deadline=None, max_examples=150)
@given(similar_texts(), thresholds)
def check_clusters(texts, threshold):
    assert connect(texts, threshold).tolist() == brute_clusters(texts, threshold)


@settings(deadline=None, max_examples=150)
@given(similar_texts(), similar_texts(), thresholds)
def check_twins(texts, others, threshold):
    found = find_twins(texts, others, threshold)
    for index, text in enumerate(texts):
        similar = {i: jaccard(text, other) for i, other in enumerate(others)}
        assert (index in found) == (max(similar.values()) >= threshold)
        if index in found:
            twin, value = found[index]
            assert value == similar[twin] >= threshold


def test_clusters_equal_brute_force(strategy):
    check_clusters()


def test_twins_equal_brute_force(strategy):
    check_twins()


def test_many_near_identical_texts_form_one_cluster():
    texts = [f"the quick brown fox jumps over the lazy dog, order number {n}" for n in range(3000)]
    assert set(connect(texts, 0.7).tolist()) == {0}
    assert len(find_twins(texts[:1500], texts[1500:], 0.7)) == 1500


def test_large_alphabets_are_numbered_exactly():
    texts = ["".join(chr(0x4E00 + (i * 7 + k) % 8000) for k in range(60)) for i in range(300)]
    texts += [text[:-1] + "x" for text in texts[:10]]
    roots = connect(texts, 0.9).tolist()
    assert roots[300:] == roots[:10] == list(range(10))
    assert roots[:300] == list(range(300))
    assert [len(grams(text)) for text in texts] == gram_sets(texts).sizes.tolist()


def test_short_and_empty_inputs():
    assert connect([], 0.8).tolist() == []
    assert connect(["a"], 0.8).tolist() == [0]
    assert connect(["a", "b", "", "ab"], 0.1).tolist() == [0, 1, 2, 3]
    assert find_twins([], ["a"], 0.5) == {}
    assert find_twins(["a"], ["b", "a"], 0.5) == {0: (1, 1.0)}


@given(st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=60))
def test_join_gives_smallest_members_of_components(pairs):
    expected = list(range(30))
    for a, b in pairs:
        low, high = sorted((expected[a], expected[b]))
        expected = [low if root == high else root for root in expected]
    edges = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    assert join(np.arange(30), edges[:, 0], edges[:, 1]).tolist() == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Where's my CARD?!", "where s my card"),
        ("  a_b\t\nC ", "a b c"),
        ("\ufb01ne \uff21\uff22", "fine ab"),
        ("हिन्दी", "हिन्दी"),
        ("?!", "?!"),
        ("", ""),
    ],
)
def test_normalise(text, expected):
    assert normalise(text) == expected


@given(st.text(max_size=30))
def test_normalise_is_idempotent(text):
    once = normalise(text)
    assert normalise(once) == once
