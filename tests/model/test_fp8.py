"""Float8 products are those of bf16 within the rounding of 8 bits, and never silently wrong."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from postgrad import estimate
from postgrad.config import LoraConfig
from postgrad.model import compiled, fp8, lora
from postgrad.model.fp8 import Fp8Weight, quantised
from postgrad.model.frozen import SharedInput
from training import load_model

torch.set_num_threads(1)

ROUNDING = 0.03
"""Relative norm of the rounding of e4m3: a step is an eighth, so 2^-4 at most and 0.026 in the mean
of squares."""
PRODUCT = 0.05
"""The same of a product of two such matrices."""


def error(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def made(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def plain(matrix):
    return matrix.values.float() * matrix.scales


def test_rows_come_back_within_the_rounding_whatever_their_size():
    x = made(40, 96, dtype=torch.float32) * torch.logspace(-20, 20, 40).unsqueeze(1)
    found = quantised(x)
    assert found.values.dtype == torch.float8_e4m3fn
    assert found.scales.shape == (40, 1)
    assert (found.values.float().abs().amax(1) == fp8.LARGEST).all()
    for row, wanted in zip(plain(found), x, strict=True):
        assert error(row, wanted) < ROUNDING


def test_the_estimate_counts_the_layers_that_are_quantised():
    assert estimate.FP8_MULTIPLE == fp8.MULTIPLE


def test_a_row_of_zeros_stays_one():
    x = made(32, 64)
    x[3] = 0
    weight = made(48, 64, seed=1)
    assert (plain(quantised(x))[3] == 0).all()
    y = Fp8Weight.of(weight, SharedInput()).forward(x, None)
    assert (y[3] == 0).all()
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_is_not_clipped(bad):
    x = made(32, 64)
    x[5, 7] = bad
    weight = Fp8Weight.of(made(48, 64, seed=1), SharedInput())
    y = weight.forward(x, None)
    assert not torch.isfinite(y[5]).any()
    assert torch.isfinite(y[[*range(5), *range(6, 32)]]).all()
    grad = made(32, 48)
    grad[2, 0] = bad
    assert not torch.isfinite(weight.backward(grad)[2]).any()


def test_a_product_is_that_of_the_quantised_matrices():
    a, b = quantised(made(48, 96)), quantised(made(64, 96, seed=1))
    assert error(a.product(b), plain(a) @ plain(b).t()) < 4e-3  # bf16, and its sums


@pytest.mark.parametrize("rows", [1, 2, 16, 37])
@pytest.mark.parametrize("bias", [False, True])
def test_products_of_any_number_of_rows(rows, bias):
    weight, x, grad = made(48, 64), made(rows, 64, seed=1), made(rows, 48, seed=2)
    b = made(48, seed=3) if bias else None
    found = Fp8Weight.of(weight, SharedInput())
    forward, backward = found.forward(x, b), found.backward(grad)
    assert (forward.dtype, forward.shape) == (torch.bfloat16, (rows, 48))
    assert backward.shape == (rows, 64)
    wanted = nn.functional.linear(x.float(), weight.float(), None if b is None else b.float())
    assert error(forward, wanted) < PRODUCT
    assert error(backward, grad.float() @ weight.float()) < PRODUCT
    same = Fp8Weight.of(weight, SharedInput()).forward(x.t().contiguous().t(), b)
    assert torch.equal(same, forward)


@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (8, 8)])
def test_widths_that_the_product_does_not_take_are_left_alone(shape):
    assert Fp8Weight.of(made(*shape), SharedInput()) is None


def test_an_input_of_several_layers_is_quantised_once(monkeypatch):
    seen, definition = [], fp8.quantise_definition
    monkeypatch.setattr(fp8, "quantise_definition", lambda x: seen.append(x) or definition(x))
    inputs, x = SharedInput(), made(2, 16, 64)
    first = inputs(x, fp8.padded_rows)
    assert inputs(x, fp8.padded_rows) is first
    assert len(seen) == 1
    x.mul_(2)
    assert torch.equal(inputs(x, fp8.padded_rows).scales, 2 * first.scales)
    inputs(x.clone(), fp8.padded_rows)
    assert len(seen) == 3


def adapted(bias=False, dropout=0.0, dtype=torch.bfloat16, outputs=96):
    """A layer [64 -> outputs] with an adapter whose B is not zero, in training mode."""
    torch.manual_seed(0)
    base = nn.Linear(64, outputs, bias=bias).to(dtype)
    layer = lora.LoraLinear(base, LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout))
    nn.init.normal_(layer.lora_B, std=0.1)
    return nn.Sequential(layer).train()


def step(model, x):
    """Output, and the gradients of the input, A and B."""
    torch.manual_seed(1)
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(made(*y.shape, seed=9, dtype=y.dtype))
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [(2, 16), (3, 7)])
def test_a_training_step_of_a_layer(bias, dropout, rows):
    model, x = adapted(bias, dropout), made(*rows, 64, seed=4)
    exact = step(adapted(bias, dropout, torch.float32), x.float())
    in_bf16 = step(model, x)
    lora.use_eight_bit(model, "fp8")
    found = step(model, x)
    for ours, bf16, wanted in zip(found, in_bf16, exact, strict=True):
        assert ours.dtype == bf16.dtype
        assert error(ours, wanted) < PRODUCT
    assert not torch.equal(found[0], in_bf16[0])
    assert all(torch.equal(a, b) for a, b in zip(found[2:], in_bf16[2:], strict=True))


def test_without_it_every_bit_is_as_it_was():
    model, x = adapted(), made(2, 16, 64)
    before = step(model, x)
    lora.use_eight_bit(model, "fp8")
    with lora.without_eight_bit(model):
        assert all(torch.equal(a, b) for a, b in zip(step(model, x), before, strict=True))
    with pytest.raises(RuntimeError), lora.without_eight_bit(model):
        raise RuntimeError
    assert model[0].eight_bit is not None


def test_evaluation_is_what_is_served():
    model, x = adapted(), made(2, 16, 64)
    served = step(model.eval(), x)
    base = model[0].base(x)
    lora.use_eight_bit(model, "fp8")
    assert all(torch.equal(a, b) for a, b in zip(step(model, x), served, strict=True))
    with torch.no_grad(), lora.cast_once(model):
        assert torch.equal(model(x), served[0])
    with lora.disabled(model.train()):
        assert torch.equal(model(x), base)


def test_a_layer_of_other_widths_stays_in_bf16():
    model, x = adapted(outputs=40), made(2, 16, 64)
    before = step(model, x)
    lora.use_eight_bit(model, "fp8")
    assert all(torch.equal(a, b) for a, b in zip(step(model, x), before, strict=True))


def test_activations_computed_again_are_the_same():
    model, x = adapted(), made(2, 16, 64)
    lora.use_eight_bit(model, "fp8")
    kept = step(model, x)
    again = x.clone().requires_grad_()
    model.zero_grad()
    y = checkpoint(model, again, use_reentrant=False)
    y.backward(made(*y.shape, seed=9, dtype=y.dtype))
    assert torch.equal(y, kept[0])
    assert torch.equal(again.grad, kept[1])


def test_a_model_with_copies_has_the_same_weights(tiny_model_dir):
    config = LoraConfig(r=4)
    one, other = (load_model(tiny_model_dir, config, torch.bfloat16) for _ in range(2))
    lora.use_eight_bit(other, "fp8")
    assert all(layer.eight_bit is not None for layer in lora.lora_layers(other).values())
    assert one.state_dict().keys() == other.state_dict().keys()
    assert len(list(one.parameters())) == len(list(other.parameters()))
    ids = torch.arange(3, 60).unsqueeze(0)
    losses = [model.train()(ids, labels=ids).loss for model in (one, other)]
    assert 0 < abs(losses[0] - losses[1]) < 0.02 * losses[0]


def test_where_it_cannot_be_had(monkeypatch):
    assert fp8.why_not(torch.device("cpu")) == "there is no CUDA device here"
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    for capability, expected in {
        (8, 0): "A100 has compute capability 8.0",
        (8, 9): "",
        (9, 0): "",
        (12, 0): "",
    }.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert fp8.why_not(device) == expected
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "AMD" in fp8.why_not(device)


@pytest.fixture
def device(cuda):
    """A CUDA device with float8 products."""
    if fp8.why_not(cuda):
        pytest.skip(fp8.why_not(cuda))
    return cuda


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself
@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("width", [64, 4096])
def test_rows_are_quantised_on_a_device_as_on_a_cpu(device, compiling, width):
    compiled.switch(compiling)
    try:
        for rows in (1, 7, 64, 1000):
            x = made(rows, width, seed=rows)
            x[rows // 2, 3] = 100
            wanted, found = quantised(x), quantised(x.to(device))
            torch.testing.assert_close(found.scales.cpu(), wanted.scales, rtol=1e-5, atol=0)
            assert error(plain(found).cpu(), plain(wanted)) < 5e-3  # a quotient on an edge
        for bad in (float("nan"), float("inf")):
            x[0, 0] = bad
            weight = Fp8Weight.of(made(48, width).to(device), SharedInput())
            y = weight.forward(x.to(device), None)
            assert not torch.isfinite(y[0]).any()
            assert torch.isfinite(y[1:]).all()
    finally:
        compiled.switch(False)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 7, 16, 130, 4096])
@pytest.mark.parametrize("shape", [(48, 64), (1024, 4096), (4096, 1024), (576, 1536)])
def test_products_on_a_device(device, rows, shape):
    weight, x, grad = made(*shape), made(rows, shape[1], seed=1), made(rows, shape[0], seed=2)
    copies = Fp8Weight.of(weight.to(device), SharedInput())
    a, b = quantised(x.to(device)), copies.by_output
    forward = copies.forward(x.to(device), None)
    assert error(forward, plain(a) @ plain(b).t()) < 2e-2  # fast accumulation
    assert error(forward.cpu(), x.float() @ weight.float().t()) < PRODUCT
    backward = copies.backward(grad.to(device))
    assert error(backward.cpu(), grad.float() @ weight.float()) < PRODUCT


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_training_step_of_a_layer_on_a_device(device, dropout):
    model, x = adapted(bias=True, dropout=dropout).to(device), made(3, 7, 64, seed=4).to(device)
    in_bf16 = step(model, x)
    lora.use_eight_bit(model, "fp8")
    for ours, wanted in zip(step(model, x), in_bf16, strict=True):
        assert error(ours, wanted) < PRODUCT
