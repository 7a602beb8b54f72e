import random
import sys

import pytest

from postgrad.evaluate.linear import ARM, WORK, linear_floor, why_no_floor
from postgrad.evaluate.statistics import wilson

TOPICS = {
    "card": ["my card is lost", "the card was stolen", "new card please", "card has not arrived"],
    "rate": ["exchange rate of euros", "which rate today", "bad exchange rate", "rate for dollars"],
    "pin": ["I forgot my pin", "change the pin code", "pin is blocked", "reset pin number"],
}


def requests(rows, seed):
    rng = random.Random(seed)
    labels = [rng.choice(list(TOPICS)) for _ in range(rows)]
    texts = [f"{rng.choice(TOPICS[label])} {rng.randrange(1000)}" for label in labels]
    return texts, labels


def test_an_easy_task_has_a_high_floor():
    train, test = requests(120, 0), requests(40, 1)
    floor = linear_floor(*train, *test)
    assert floor is not None
    assert floor.value > 0.9
    right = sum(a == b for a, b in zip(floor.predictions, test[1], strict=True))
    assert (floor.value, floor.n) == (right / 40, 40)
    assert (floor.low, floor.high) == wilson(right, 40)
    assert (floor.arm, floor.train_rows, floor.given_rows, floor.labels) == (ARM, 120, 120, 3)
    assert "trained on 120 rows with 3 labels" in floor.source
    again = linear_floor(*train, *test)
    assert again is not None
    assert again.predictions == floor.predictions


def test_outer_whitespace_of_labels_does_not_count():
    texts, labels = requests(60, 0)
    floor = linear_floor(texts, [f" {label}\n" for label in labels], texts, labels)
    assert floor is not None
    assert floor.value > 0.95
    assert floor.labels == 3


def test_a_single_label_is_a_constant():
    floor = linear_floor(["a", "b", "c"], ["yes"] * 3, ["d", "e"], ["yes", "no"])
    assert floor is not None
    assert floor.predictions == ("yes", "yes")
    assert floor.value == 0.5


def test_labels_not_seen_in_training_are_misses():
    train = requests(60, 0)
    floor = linear_floor(*train, ["what is a cat"], ["animals"])
    assert floor is not None
    assert floor.value == 0


@pytest.mark.parametrize(
    ("texts", "labels", "why"),
    [
        ([], [], "no training rows"),
        (["a", "b", "c"], ["x", "y", "y"], "the answers are not labels: 2 of 3 are distinct"),
        (["", " ", "", ""], ["x", "y", "y", "x"], "no text"),
    ],
)
def test_why_there_is_no_floor(texts, labels, why):
    assert why in (why_no_floor(texts, labels) or "")
    assert linear_floor(texts, labels, ["t"], ["x"]) is None


def test_without_scikit_learn_there_is_no_floor_and_a_reason(monkeypatch):
    texts, labels = requests(20, 0)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert "pip install 'postgrad[demo]'" in (why_no_floor(texts, labels) or "")
    assert linear_floor(texts, labels, texts, labels) is None


def test_too_much_work_is_sampled_and_said(monkeypatch):
    texts, labels = requests(200, 0)
    monkeypatch.setattr("postgrad.evaluate.linear.WORK", sum(map(len, texts)) * 3 // 2)
    floor = linear_floor(texts, labels, texts, labels)
    assert floor is not None
    assert 80 < floor.train_rows < 120
    assert f"trained on {floor.train_rows} of 200 rows" in floor.source
    assert WORK > 10**6
