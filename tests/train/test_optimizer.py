"""AdamW over what is trained: decay on matrices only, moments that come back bit by bit."""

import pytest
import torch

from postgrad.config import LoraConfig, TrainConfig
from postgrad.errors import CheckpointError
from postgrad.train.optimizer import (
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
    trainable,
)
from training import load_model

CONFIG = TrainConfig(weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-6)


def give_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in trainable(model).values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def train(model, optimizer, seeds):
    for seed in seeds:
        give_gradients(model, seed)
        optimizer.step()


def test_only_the_adapter_is_trained(tiny_model_dir):
    model = load_model(tiny_model_dir, LoraConfig(r=4))
    optimizer = make_optimizer(model, CONFIG, 1e-2)
    owned = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in owned} == {id(p) for p in trainable(model).values()}
    assert len(owned) == 28
    assert all(".lora_" in name for name in trainable(model))


def test_decay_falls_on_matrices_only(tiny_model_dir):
    model = load_model(tiny_model_dir)
    optimizer = make_optimizer(model, CONFIG, 1e-2)
    matrices, vectors = optimizer.param_groups
    assert {p.ndim for p in matrices["params"]} == {2}
    assert {p.ndim for p in vectors["params"]} == {1}
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["lr"]) == ((0.8, 0.9), 1e-6, 1e-2)


def test_a_step_is_adamw_by_hand(tiny_model_dir):
    model = load_model(tiny_model_dir, LoraConfig(r=4))
    optimizer = make_optimizer(model, CONFIG, 1e-2)
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    train(model, optimizer, [1])
    for name, parameter in trainable(model).items():
        gradient = parameter.grad
        step = gradient / (gradient.abs() + 1e-6)
        wanted = before[name] * (1 - 1e-2 * 0.1) - 1e-2 * step
        torch.testing.assert_close(parameter.detach(), wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("adapt", [LoraConfig(r=4), None], ids=["lora", "full"])
def test_saved_moments_continue_bit_by_bit(tiny_model_dir, adapt):
    model, other = (load_model(tiny_model_dir, adapt) for _ in range(2))
    optimizer, resumed = (make_optimizer(m, CONFIG, 1e-2) for m in (model, other))
    train(model, optimizer, [1, 2, 3])
    state = optimizer_state(model, optimizer)
    assert set(state) == {
        f"{kind}/{name}" for name in trainable(model) for kind in ("step", "exp_avg", "exp_avg_sq")
    }
    assert {float(value) for key, value in state.items() if key.startswith("step/")} == {3.0}
    other.load_state_dict(model.state_dict())
    load_optimizer_state(other, resumed, state)
    for each, its in ((model, optimizer), (other, resumed)):
        train(each, its, [4, 5])
    ours, theirs = trainable(model), trainable(other)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_before_the_first_step_there_is_nothing_to_save_or_restore(tiny_model_dir):
    model = load_model(tiny_model_dir, LoraConfig(r=4))
    optimizer = make_optimizer(model, CONFIG, 1e-2)
    assert optimizer_state(model, optimizer) == {}
    load_optimizer_state(model, optimizer, {})
    train(model, optimizer, [1])


def test_moments_of_another_model_are_refused(tiny_model_dir):
    model = load_model(tiny_model_dir)
    optimizer = make_optimizer(model, CONFIG, 1e-2)
    train(model, optimizer, [1])
    adapted = load_model(tiny_model_dir, LoraConfig(r=4))
    with pytest.raises(CheckpointError, match="not trained here"):
        load_optimizer_state(
            adapted, make_optimizer(adapted, CONFIG, 1e-2), optimizer_state(model, optimizer)
        )
