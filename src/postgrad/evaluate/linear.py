"""The linear floor: what a support vector machine on character n-grams gets on the same rows.

An honest report says when a model of a few megabytes, trained in seconds, would do. The floor is
made from TRAIN and TEST alone and never touches a language model. It needs scikit-learn (the `demo`
extra); without it, or where answers are not labels, there is no floor and `why_no_floor` says why.
"""

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np

from postgrad.evaluate.statistics import wilson

ARM = "linear-svm"
"""Name of the floor beside `base/...` and `tuned`."""
WORK = 80_000_000
"""Characters times labels trained on at most: 10 to 20 seconds on one core."""


@dataclass(frozen=True, slots=True)
class LinearFloor:
    """Share of test rows the linear model labels exactly right, with its Wilson interval."""

    value: float
    low: float
    high: float
    n: int
    """Test rows."""
    train_rows: int
    """Rows trained on: fewer than given when all would exceed `WORK`."""
    given_rows: int
    """Training rows given."""
    labels: int
    """Distinct answers among the rows trained on."""
    seconds: float
    predictions: tuple[str, ...]
    """The label given to each test row: evidence for a paired comparison."""
    arm: str = ARM

    @property
    def source(self) -> str:
        """What the figure was made with, in words for the report."""
        rows = f"{self.train_rows:,}"
        if self.train_rows < self.given_rows:
            rows += f" of {self.given_rows:,}"
        return (
            f"linear support vector machine on character 1- to 5-grams, trained on {rows} rows "
            f"with {self.labels:,} labels in {self.seconds:.0f} s"
        )


def why_no_floor(train_texts: Sequence[str], train_labels: Sequence[str]) -> str | None:
    """Return why there can be no linear floor, or None when there can.

    Answers count as labels when at most half of them are distinct.
    """
    distinct = len({label.strip() for label in train_labels})
    if not train_labels:
        return "there are no training rows"
    if 2 * distinct > len(train_labels):
        return f"the answers are not labels: {distinct} of {len(train_labels)} are distinct"
    if not any(text.strip() for text in train_texts):
        return "the training rows have no text"
    if find_spec("sklearn") is None:
        return "scikit-learn is not installed (pip install 'postgrad[demo]')"
    return None


def linear_floor(
    train_texts: Sequence[str],
    train_labels: Sequence[str],
    test_texts: Sequence[str],
    test_labels: Sequence[str],
    *,
    confidence: float = 0.95,
    seed: int = 7,
) -> LinearFloor | None:
    """Train on the training rows, label the test rows, count exact matches; None = `why_no_floor`.

    TF-IDF of lower-cased character 1- to 5-grams, one linear support vector machine per label (Fan
    et al. 2008, LIBLINEAR). Answers are compared with
    outer whitespace stripped, as by the scorer `exact_match`. Deterministic for a given `seed`.
    """
    assert len(train_texts) == len(train_labels)
    assert len(test_texts) == len(test_labels) > 0
    if why_no_floor(train_texts, train_labels) is not None:
        return None
    start = time.perf_counter()
    kept = _sample(train_texts, train_labels, seed)
    texts = [train_texts[i] for i in kept]
    labels = [train_labels[i].strip() for i in kept]
    if len(set(labels)) == 1:
        predictions = tuple(labels[:1] * len(test_texts))
    else:
        predictions = _fit_and_predict(texts, labels, test_texts, seed)
    right = sum(p == label.strip() for p, label in zip(predictions, test_labels, strict=True))
    interval = wilson(right, len(test_texts), confidence)
    return LinearFloor(
        value=right / len(test_texts),
        low=interval.low,
        high=interval.high,
        n=len(test_texts),
        train_rows=len(kept),
        given_rows=len(train_texts),
        labels=len(set(labels)),
        seconds=time.perf_counter() - start,
        predictions=predictions,
    )


def _sample(texts: Sequence[str], labels: Sequence[str], seed: int) -> list[int]:
    """Return the rows to train on: all, or a seeded sample that keeps the work within `WORK`."""
    order = np.random.default_rng(seed).permutation(len(texts))
    sizes = np.array([len(texts[i]) for i in order]) * len({label.strip() for label in labels})
    within = int((np.cumsum(sizes) <= WORK).sum())
    return sorted(int(i) for i in order[: max(within, 1)])


def _fit_and_predict(
    texts: Sequence[str], labels: Sequence[str], test_texts: Sequence[str], seed: int
) -> tuple[str, ...]:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.svm import LinearSVC

    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 5))
    features = vectorizer.fit_transform(texts)
    model = LinearSVC(tol=1e-2, random_state=seed)
    with warnings.catch_warnings():
        # Many labels for few rows, or a solver short of full convergence: still a fair floor.
        warnings.simplefilter("ignore", UserWarning)
        model.fit(features, labels)
    return tuple(str(label) for label in model.predict(vectorizer.transform(test_texts)))
