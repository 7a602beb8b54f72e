"""Held-out loss: a sum for every row, in evaluation mode, whatever the batches look like."""

import numpy as np
import pytest
import torch

from postgrad.config import LoraConfig
from postgrad.model import lora
from postgrad.model.attention import training_attention
from postgrad.train.held_out import Validation
from postgrad.train.sft import SupervisedFineTuning
from training import load_model, make_rows

ROWS = make_rows(11, seed=8, weights=(1.0, 0.5, 2.0))


@pytest.fixture
def model(tiny_model_dir):
    made = load_model(tiny_model_dir, LoraConfig(r=4, lora_dropout=0.5))
    for layer in lora.lora_layers(made).values():
        torch.nn.init.normal_(layer.lora_B, std=0.05)
    return made


def measure(model, rows=ROWS, capacity=80, packed=True):
    with training_attention(model):
        return Validation(rows, capacity, packed)(model, SupervisedFineTuning())


def test_rows_keep_their_place_in_any_layout(model):
    wanted = [measure(model, [row]).sums[0] for row in ROWS]
    for capacity in (1, 60, 10_000):
        for packed in (True, False):
            found = measure(model, capacity=capacity, packed=packed)
            assert found.sums == pytest.approx(wanted, rel=1e-5)
            assert found.weights.tolist() == [row.supervised for row in ROWS]
    assert found.loss == pytest.approx(sum(wanted) / sum(row.supervised for row in ROWS))


def test_dropout_is_off_and_the_mode_and_the_random_state_come_back(model):
    model.train()
    state = torch.get_rng_state()
    first = measure(model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    model.eval()
    assert np.array_equal(measure(model).sums, first.sums)
    assert not model.training


def test_no_gradients_are_made(model):
    measure(model)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_rows_of_one_name_could_not_be_paired():
    with pytest.raises(AssertionError):
        Validation([ROWS[0], ROWS[0]], 100, True)
