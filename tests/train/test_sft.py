"""The fused loss is the plain cross-entropy, values and gradients, on any batch."""

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from postgrad.config import LoraConfig
from postgrad.data.batches import micro_batches
from postgrad.model import lora
from postgrad.model.attention import training_attention
from postgrad.train import sft
from postgrad.train.optimizer import trainable
from postgrad.train.sft import (
    SupervisedFineTuning,
    has_plain_head,
    model_inputs,
    row_multiple,
    shared_prefix,
    why_apart,
)
from postgrad.types import Tokens
from training import load_model, make_rows

WEIGHTS = (1.0, 0.25, 3.0, 0.0)
"""Per-message weights; every fourth row is context only."""


def gradients(model, total):
    """Gradients of a loss sum, by name; those are removed from the model."""
    model.zero_grad()
    total.backward()
    found = {name: p.grad.float().clone() for name, p in trainable(model).items()}
    model.zero_grad()
    return found


def value(total):
    return float(total.detach())


def plain(model, rows):
    """The definition, a document at a time: loss sums [rows] that carry a graph."""
    sums = []
    for row in rows:
        ids = torch.from_numpy(row.ids)
        logits = model(ids[None]).logits[0].float()
        losses = functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
        sums.append((losses * torch.from_numpy(row.weights[1:])).sum())
    return torch.stack(sums)


def ours(model, rows, packed=True, capacity=10_000, objective=None, per_document=False):
    objective = objective or SupervisedFineTuning()
    with training_attention(model):
        return [
            (batch, objective(model, batch, per_document=per_document))
            for batch in micro_batches(rows, capacity, packed)
        ]


def close(found, wanted, tolerance):
    """Norm of the difference of two sets of gradients, as a share of the norm."""
    assert found.keys() == wanted.keys()
    norm = sum(float(w.double().square().sum()) for w in wanted.values()) ** 0.5
    apart = sum(float((found[n] - w).double().square().sum()) for n, w in wanted.items()) ** 0.5
    assert norm > 0
    assert apart <= tolerance * norm, apart / norm
    for name, value in wanted.items():
        limit = 10 * tolerance * float(value.norm()) + tolerance * norm
        assert float((found[name] - value).norm()) <= limit, name


def untied():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config)


def biased_head():
    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.1,
        resid_pdrop=0.0,
    )
    model = PhiForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.bias)
    return model


@pytest.fixture(params=["lora", "tied", "untied", "biased-head"])
def model(request, tiny_model_dir):
    if request.param == "lora":
        made = load_model(tiny_model_dir, LoraConfig(r=4))
        for layer in lora.lora_layers(made).values():
            torch.nn.init.normal_(layer.lora_B, std=0.05)
    elif request.param == "tied":
        made = load_model(tiny_model_dir)
        assert made.lm_head.weight is made.model.embed_tokens.weight
    else:
        made = untied() if request.param == "untied" else biased_head()
    return made.train()


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "logits"])
def test_loss_and_gradients_equal_the_definition(model, packed, fused):
    rows = make_rows(9, seed=3, weights=WEIGHTS)
    objective = SupervisedFineTuning(fused=fused)
    [(batch, loss)] = ours(model, rows, packed, objective=objective)
    exact = plain(model, rows)
    assert loss.weight == batch.supervised == pytest.approx(sum(row.supervised for row in rows))
    assert value(loss.total) == pytest.approx(value(exact.sum()), rel=1e-5)
    close(gradients(model, loss.total), gradients(model, exact.sum()), 1e-5)


def with_beginning(rows, beginning):
    """The same rows with unsupervised tokens in front of each."""
    front = np.array(beginning, dtype=np.int64)
    return [
        Tokens(
            np.concatenate([front, row.ids]),
            np.concatenate([np.zeros(len(front), np.float32), row.weights]),
            row.example_id,
        )
        for row in rows
    ]


@pytest.mark.parametrize("capacity", [10_000, 90])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "logits"])
def test_a_shared_beginning_changes_no_loss_and_no_gradient(model, fused, capacity):
    rows = with_beginning(make_rows(9, seed=3, weights=WEIGHTS), range(40, 53))
    assert why_apart(model) == ""
    objective = SupervisedFineTuning(fused=fused, share_prefix=True)
    found = ours(model, rows, capacity=capacity, objective=objective, per_document=True)
    for batch, loss in found:
        shared = shared_prefix(batch)
        assert shared >= 13 or len(batch.example_ids) == 1
        inputs, place = model_inputs(batch, torch.device("cpu"), share=True)
        least = batch.tokens - shared * (len(batch.example_ids) - 1)
        assert least <= inputs["input_ids"].shape[1] < least + row_multiple(least)
        assert (inputs["input_ids"][0].numpy()[place] == batch.ids).all()
        by_name = {row.example_id: row for row in rows}
        exact = plain(model, [by_name[name] for name in batch.example_ids])
        torch.testing.assert_close(loss.per_document.float(), exact.float(), rtol=1e-4, atol=1e-4)
    total = sum(loss.total for _, loss in found)
    exact = plain(model, rows).sum()
    assert value(total) == pytest.approx(value(exact), rel=1e-5)
    close(gradients(model, total), gradients(model, exact), 1e-5)


def test_what_is_supervised_is_never_shared():
    same = [1, 2, 3, 4, 5, 6, 7, 8]
    weights = np.array([0, 0, 0, 0, 1, 1, 1, 1], np.float32)
    rows = [Tokens(np.array(same), weights, str(n)) for n in range(4)]
    [batch] = micro_batches(rows, 100, packed=True)
    assert shared_prefix(batch) == 3  # position 3 predicts the first supervised token
    unlike = [Tokens(np.array([n, *same]), np.append(0, weights), str(n)) for n in range(4)]
    assert shared_prefix(micro_batches(unlike, 100, packed=True)[0]) == 0


@pytest.mark.parametrize("why", ["lora", "attention", "hidden", "layout"])
def test_no_beginning_is_shared_where_it_would_change_something(tiny_model_dir, why):
    if why == "lora":
        model = load_model(tiny_model_dir, LoraConfig(r=4, lora_dropout=0.1))
    elif why == "attention":
        model = load_model(tiny_model_dir)
        model.config.attention_dropout = 0.1
    elif why == "hidden":
        model = biased_head()
        model.base_model.layers[0].resid_dropout.p = 0.1
    else:
        model = StableLmForCausalLM(
            StableLmConfig(
                vocab_size=97,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
            )
        )
    assert why_apart(model)


@pytest.mark.parametrize("chunk", [1, 3, 7, 64])
def test_chunk_boundaries_change_nothing(tiny_model_dir, monkeypatch, chunk):
    model = load_model(tiny_model_dir)
    rows = make_rows(5, seed=4, weights=WEIGHTS)
    [(_, whole)] = ours(model, rows)
    wanted = gradients(model, whole.total)
    monkeypatch.setattr(sft, "CHUNK", chunk)
    [(batch, parts)] = ours(model, rows)
    assert np.count_nonzero(batch.weights) > chunk or chunk == 64
    assert value(parts.total) == pytest.approx(value(whole.total), rel=1e-6)
    close(gradients(model, parts.total), wanted, 1e-5)


def test_a_scaled_loss_scales_its_gradients(tiny_model_dir):
    model = load_model(tiny_model_dir)
    [(_, one)] = ours(model, make_rows(4))
    wanted = {name: value / 8 for name, value in gradients(model, one.total).items()}
    [(_, other)] = ours(model, make_rows(4))
    close(gradients(model, other.total / 8), wanted, 1e-6)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_document_sums_add_up_to_the_total_and_are_those_of_each_alone(tiny_model_dir, packed):
    model = load_model(tiny_model_dir).eval()
    rows = make_rows(9, seed=3, weights=WEIGHTS)
    with torch.no_grad():
        exact = dict(zip((row.example_id for row in rows), plain(model, rows), strict=True))
    for batch, loss in ours(model, rows, packed, capacity=70, per_document=True):
        assert not loss.per_document.requires_grad
        assert float(loss.per_document.sum()) == pytest.approx(value(loss.total), rel=1e-6)
        for name, document in zip(batch.example_ids, loss.per_document, strict=True):
            assert float(document) == pytest.approx(float(exact[name]), rel=1e-5)
    [(_, quiet)] = ours(model, rows)
    assert quiet.per_document is None


def test_only_supervised_positions_count(tiny_model_dir):
    """Another token in place of an unsupervised label moves nothing but what comes after it."""
    model = load_model(tiny_model_dir).eval()
    ids = np.arange(10, 20)
    weights = np.array([0, 0, 0, 1, 1, 0, 0, 0, 0, 0], np.float32)
    changed = np.concatenate([ids[:5], ids[5:] + 40])
    sums = [
        value(ours(model, [Tokens(some, weights, "row")])[0][1].total) for some in (ids, changed)
    ]
    assert sums[0] == sums[1]
    other = ids.copy()
    other[4] += 40
    assert value(ours(model, [Tokens(other, weights, "row")])[0][1].total) != sums[0]


def test_a_batch_without_supervised_tokens_is_zero_and_not_a_number_never(tiny_model_dir):
    model = load_model(tiny_model_dir, LoraConfig(r=4))
    [(_, loss)] = ours(model, make_rows(3, weights=(0.0,)), per_document=True)
    assert (value(loss.total), loss.weight) == (0.0, 0.0)
    assert loss.per_document.tolist() == [0, 0, 0]
    assert all(not value.any() for value in gradients(model, loss.total).values())


def test_nothing_but_the_loss_is_computed_without_gradients(tiny_model_dir):
    model = load_model(tiny_model_dir)
    rows = make_rows(4)
    [(_, trained)] = ours(model, rows)
    with torch.no_grad():
        [(_, measured)] = ours(model, rows)
    assert value(trained.total) == value(measured.total)
    assert not measured.total.requires_grad


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "logits"])
def test_bfloat16_stays_within_its_rounding(tiny_model_dir, fused):
    """Loss within 1 %, gradient within 5 % of float32 on the same (rounded) weights."""
    rows = make_rows(9, seed=3, weights=WEIGHTS)
    half = load_model(tiny_model_dir, LoraConfig(r=4), torch.bfloat16)
    full = load_model(tiny_model_dir, LoraConfig(r=4))
    with torch.no_grad():
        for one, other in zip(full.parameters(), half.parameters(), strict=True):
            one.copy_(other)
    [(_, loss)] = ours(half, rows, objective=SupervisedFineTuning(fused=fused))
    exact = plain(full, rows).sum()
    assert value(loss.total) == pytest.approx(value(exact), rel=1e-2)
    close(gradients(half, loss.total), gradients(full, exact), 5e-2)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "logits"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_full_tuning_in_bfloat16_keeps_float32_weights_and_gradients(tiny_model_dir, packed, fused):
    rows = make_rows(9, seed=3, weights=WEIGHTS)
    model = load_model(tiny_model_dir)
    objective = SupervisedFineTuning(fused=fused, autocast=True)
    [(_, loss)] = ours(model, rows, packed, objective=objective)
    found = gradients(model, loss.total)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    exact = plain(model, rows).sum()
    assert value(loss.total) == pytest.approx(value(exact), rel=1e-2)
    close(found, gradients(model, exact), 5e-2)


SMALL = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    ("kind", "plain_head", "settings"),
    [
        ("Llama", True, {}),
        ("Qwen3", True, {"head_dim": 8}),
        ("Granite", False, {"logits_scaling": 4.0}),
        ("Cohere", False, {}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_models_that_scale_their_logits_go_through_their_own_head(
    kind, plain_head, settings, dtype
):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SMALL, **settings)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype)
    assert has_plain_head(model) is plain_head
    rows = make_rows(5, seed=3)
    [(_, loss)] = ours(model, rows, objective=SupervisedFineTuning(has_plain_head(model)))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    exact = plain(model, rows)
    assert value(loss.total) == pytest.approx(value(exact.sum()), rel=tolerance)
    close(gradients(model, loss.total), gradients(model, exact.sum()), 10 * tolerance)


@pytest.mark.parametrize("half", [False, True])
def test_the_result_is_deterministic(tiny_model_dir, half):
    model = load_model(tiny_model_dir, LoraConfig(r=4), torch.bfloat16 if half else torch.float32)
    rows = make_rows(9, seed=3)
    runs = []
    for _ in range(2):
        [(_, loss)] = ours(model, rows)
        runs.append((value(loss.total), gradients(model, loss.total)))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(runs[0][1][name], runs[1][1][name]) for name in runs[0][1])
