"""Vectors of texts: means of the last hidden states, whatever shares their pass."""

import contextlib

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from postgrad.evaluate import embedding
from postgrad.evaluate.embedding import LONGEST, Embedder, embed
from postgrad.evaluate.retrieval import nearest_rows
from postgrad.progress import SilentDisplay

torch.set_num_threads(1)
TEXTS = ["the answer", "number " * 30, "yes", "", "the question is this: maybe", "x" * 500]


@pytest.fixture(scope="module")
def loaded(tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.mark.parametrize("packed", [True, False])
def test_vectors_are_means_of_last_hidden_states(loaded, monkeypatch, packed):
    model, tokenizer = loaded
    if not packed:
        monkeypatch.setattr(embedding, "can_share", lambda model: False)
    model.train()
    found = embed(model, tokenizer, TEXTS, SilentDisplay())
    assert model.training
    model.eval()
    for text, vector in zip(TEXTS, found, strict=True):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            assert not vector.any()
            continue
        with torch.no_grad():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
        np.testing.assert_allclose(vector, states.mean(0).numpy(), atol=1e-4)


def test_the_neighbours_in_a_pass_and_the_order_change_nothing(loaded):
    model, tokenizer = loaded
    together = embed(model, tokenizer, TEXTS, SilentDisplay())
    alone = [embed(model, tokenizer, [text], SilentDisplay())[0] for text in TEXTS]
    np.testing.assert_allclose(together, alone, atol=1e-4)
    again = embed(model, tokenizer, TEXTS, SilentDisplay())
    np.testing.assert_array_equal(together, again)
    turned = embed(model, tokenizer, TEXTS[::-1], SilentDisplay())[::-1]
    np.testing.assert_allclose(together, turned, atol=1e-4)


def test_of_a_long_text_the_beginning_is_read(loaded):
    model, tokenizer = loaded
    start, more = "\u00e9" * (LONGEST // 2), "\u00e9" * LONGEST
    assert len(tokenizer(start, add_special_tokens=False)["input_ids"]) == LONGEST
    one, other = embed(model, tokenizer, [start, more], SilentDisplay())
    np.testing.assert_allclose(one, other, atol=1e-4)


def test_each_text_is_read_once_and_no_gradient_is_kept(loaded):
    model, tokenizer = loaded
    opened = []

    @contextlib.contextmanager
    def opening():
        opened.append(1)
        yield model

    embedder = Embedder(opening, lambda: tokenizer, SilentDisplay())
    first = embedder(["a", "b", "a"])
    np.testing.assert_array_equal(first[0], first[2])
    np.testing.assert_array_equal(embedder(["b", "a"]), first[[1, 0]])
    assert opened == [1]
    embedder(["c"])
    assert opened == [1, 1]
    assert all(p.grad is None for p in model.parameters())


def test_the_nearest_have_the_largest_cosine_of_standardised_vectors():
    generator = np.random.default_rng(0)
    index = generator.normal(size=(20, 5)).astype(np.float32) + 3
    queries = generator.normal(size=(4, 5)).astype(np.float32) + 3
    index[:, 2] *= 1000
    queries[:, 2] *= 1000
    for query, found in zip(queries, nearest_rows(index, queries, 6), strict=True):
        a, b = ((x - index.mean(0)) / index.std(0) for x in (index, query))
        cosine = a @ b / np.linalg.norm(a, axis=1) / np.linalg.norm(b)
        assert found == np.argsort(-cosine, kind="stable")[:6].tolist()
    same = np.ones((3, 2), np.float32)
    assert nearest_rows(same, same[:1], 2) == [[0, 1]]
