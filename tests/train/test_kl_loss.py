"""The loss that keeps a model near its base: value, gradient and norm are the formula's."""

import pytest
import torch
from torch.nn import functional
from transformers import GraniteConfig, GraniteForCausalLM

from postgrad.config import LoraConfig
from postgrad.data.batches import micro_batches
from postgrad.model import lora
from postgrad.model.attention import training_attention
from postgrad.model.divergence import cross_entropy_and_kl, forward_kl
from postgrad.train import sft
from postgrad.train.optimizer import trainable
from postgrad.train.sft import SupervisedFineTuning, has_plain_head
from training import load_model, make_rows, make_training, weights_of

WEIGHTS = (1.0, 0.25, 3.0, 0.0)
BETA = 0.7


def moved(model, by=0.05):
    """An adapter that has learned something."""
    generator = torch.Generator().manual_seed(3)
    for layer in lora.lora_layers(model).values():
        with torch.no_grad():
            layer.lora_B += by * torch.randn(layer.lora_B.shape, generator=generator)
    return model


def plain(model, rows, beta):
    """(sum with a graph, loss sum, KL sum): a document at a time, all in one autograd graph."""
    loss = kl = torch.zeros((), dtype=torch.float64)
    for row in rows:
        ids = torch.from_numpy(row.ids)
        weights = torch.from_numpy(row.weights[1:])
        with torch.no_grad(), lora.disabled(model):
            p = model(ids[None]).logits[0, :-1].double().log_softmax(-1)
        q = model(ids[None]).logits[0, :-1].double().log_softmax(-1)
        loss = loss + (functional.nll_loss(q, ids[1:], reduction="none") * weights).sum()
        kl = kl + ((p.exp() * (p - q)).sum(-1) * weights).sum()
    return loss + beta * kl, float(loss.detach()), float(kl.detach())


def gradients(model, total):
    model.zero_grad()
    total.backward()
    return {name: p.grad.clone() for name, p in trainable(model).items()}


def close(found, wanted, tolerance=1e-5):
    norm = sum(float(w.double().square().sum()) for w in wanted.values()) ** 0.5
    apart = sum(float((found[n] - w).double().square().sum()) for n, w in wanted.items()) ** 0.5
    assert norm > 0
    assert apart <= tolerance * norm


def granite():
    torch.manual_seed(0)
    small = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 48}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = GraniteConfig(**small, **layers, initializer_range=0.2, logits_scaling=4.0)
    model = GraniteForCausalLM(config)
    lora.add_lora(model, LoraConfig(r=4), 7)
    return model


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("kind", ["fused", "own-head", "logits"])
def test_value_and_gradient_equal_the_formula(tiny_model_dir, packed, kind):
    model = granite() if kind == "own-head" else load_model(tiny_model_dir, LoraConfig(r=4))
    moved(model).train()
    rows = make_rows(9, seed=3, weights=WEIGHTS)
    fused = kind == "fused"
    assert has_plain_head(model) is (kind != "own-head")
    objective = SupervisedFineTuning(fused, kl_weight=BETA)
    exact, loss, kl = plain(model, rows, BETA)
    wanted = gradients(model, exact)
    with training_attention(model):
        [batch] = micro_batches(rows, 10_000, packed)
        found = objective(model, batch)
        assert found.weight == batch.supervised
        assert float(found.total.detach()) == pytest.approx(float(exact.detach()), rel=1e-5)
        assert float(found.terms["loss"]) == pytest.approx(loss, rel=1e-5)
        assert float(found.terms["kl"]) == pytest.approx(kl, rel=1e-4)
        assert kl > 0.01
        close(gradients(model, found.total), wanted)
    assert model.training
    assert all(layer.enabled for layer in lora.lora_layers(model).values())


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_chunk_boundaries_change_nothing(tiny_model_dir, monkeypatch, chunk):
    model = moved(load_model(tiny_model_dir, LoraConfig(r=4)))
    objective = SupervisedFineTuning(kl_weight=BETA)
    [batch] = micro_batches(make_rows(5, seed=4, weights=WEIGHTS), 10_000, True)
    with training_attention(model):
        whole = gradients(model, objective(model, batch).total)
        monkeypatch.setattr(sft, "KL_CHUNK", chunk)
        close(gradients(model, objective(model, batch).total), whole)


def test_scaled_sums_scale_gradients_and_micro_batches_add_up(tiny_model_dir):
    model = moved(load_model(tiny_model_dir, LoraConfig(r=4)))
    objective = SupervisedFineTuning(kl_weight=BETA)
    rows = make_rows(9, seed=3, weights=WEIGHTS)
    with training_attention(model):
        [whole] = micro_batches(rows, 10_000, True)
        wanted = {n: g / 8 for n, g in gradients(model, objective(model, whole).total).items()}
        model.zero_grad()
        total = sum(objective(model, b).total / 8 for b in micro_batches(rows, 60, False))
        close(gradients(model, total), wanted)


def test_a_base_that_has_not_moved_has_no_distance_and_no_pull(tiny_model_dir):
    model = load_model(tiny_model_dir, LoraConfig(r=4))
    [batch] = micro_batches(make_rows(5, seed=4), 10_000, True)
    with training_attention(model):
        found = SupervisedFineTuning(kl_weight=5.0)(model, batch)
        assert float(found.terms["kl"]) == 0.0
        plain_loss = SupervisedFineTuning()(model, batch)
        assert plain_loss.terms == {}
        pulled, free = gradients(model, found.total), gradients(model, plain_loss.total)
        close(pulled, free, 1e-6)


def test_what_is_measured_has_no_distance_in_it(tiny_model_dir):
    model = moved(load_model(tiny_model_dir, LoraConfig(r=4)))
    [batch] = micro_batches(make_rows(5, seed=4), 10_000, True)
    with training_attention(model), torch.no_grad():
        found = SupervisedFineTuning(kl_weight=5.0)(model, batch, per_document=True)
        other = SupervisedFineTuning()(model, batch, per_document=True)
    assert float(found.total) == float(other.total)
    assert torch.equal(found.per_document, other.per_document)


def test_dropout_is_of_the_tuned_model_only(tiny_model_dir):
    """The base is the same whatever dropout draws, and draws nothing itself."""
    model = moved(load_model(tiny_model_dir, LoraConfig(r=4, lora_dropout=0.5))).train()
    [batch] = micro_batches(make_rows(5, seed=4), 10_000, True)
    with training_attention(model):
        totals = []
        for objective in (SupervisedFineTuning(), SupervisedFineTuning(kl_weight=BETA)):
            torch.manual_seed(5)
            found = objective(model, batch)
            totals.append(float(found.terms.get("loss", found.total.detach())))
            state = torch.get_rng_state()
        torch.manual_seed(5)
        SupervisedFineTuning()(model, batch)
    assert totals[0] == pytest.approx(totals[1], rel=1e-6)
    assert torch.equal(state, torch.get_rng_state())


def test_in_bfloat16_it_stays_within_its_rounding(tiny_model_dir):
    rows = make_rows(9, seed=3, weights=WEIGHTS)
    half = moved(load_model(tiny_model_dir, LoraConfig(r=4), torch.bfloat16))
    full = moved(load_model(tiny_model_dir, LoraConfig(r=4)))
    with torch.no_grad():
        for one, other in zip(full.parameters(), half.parameters(), strict=True):
            one.copy_(other)
    [batch] = micro_batches(rows, 10_000, True)
    with training_attention(half):
        found = SupervisedFineTuning(kl_weight=BETA)(half, batch)
        close(gradients(half, found.total), gradients(full, plain(full, rows, BETA)[0]), 5e-2)


def test_the_gradient_by_logits_is_autograds():
    generator = torch.Generator().manual_seed(0)
    base, tuned = (torch.randn(6, 11, generator=generator) for _ in range(2))
    labels, weights = torch.arange(6), torch.rand(6, generator=generator)
    losses, kl, gradient = cross_entropy_and_kl(tuned.clone(), base, labels, weights, BETA)
    tuned.requires_grad_()
    expected = functional.cross_entropy(tuned, labels, reduction="none")
    divergence = forward_kl(base, tuned)
    ((expected + BETA * divergence) * weights).sum().backward()
    assert torch.allclose(losses, expected.detach(), atol=1e-6)
    assert torch.allclose(kl, divergence.detach(), atol=1e-6)
    assert torch.allclose(gradient, tuned.grad, atol=1e-6)
    assert torch.equal(forward_kl(base, base), torch.zeros(6))


def test_training_records_loss_and_distance_apart_and_stays_nearer(tiny_model_dir, tmp_path):
    found = []
    for weight in (0.0, 2.0):
        training = make_training(tiny_model_dir, tmp_path / str(weight), max_steps=8)
        training.objective = SupervisedFineTuning(kl_weight=weight)
        training.go()
        steps = [line for line in training.run.read_metrics() if "train/loss" in line]
        assert all(("train/kl" in line) is (weight > 0) for line in steps)
        found.append((steps, weights_of(training.model)))
    free, held = found[0][0], found[1][0]
    assert held[0]["train/kl"] == 0.0
    assert held[-1]["train/kl"] > 0
    assert held[0]["train/loss"] == pytest.approx(free[0]["train/loss"], rel=1e-6)
    assert held[-1]["train/loss"] > free[-1]["train/loss"]
    assert any(not torch.equal(w, found[1][1][n]) for n, w in found[0][1].items())
