"""Int8 products are exact sums of what was quantised, and never silently wrong."""

import pytest
import torch
from torch import nn

from postgrad import estimate
from postgrad.config import LoraConfig
from postgrad.model import int8, lora
from postgrad.model.frozen import SharedInput
from postgrad.model.int8 import Int8Weight, dequantised, quantised

torch.set_num_threads(1)

ROUNDING = 0.012
"""Relative norm of the rounding of normal numbers, whose largest of a few hundred is at 3 to 4."""
PRODUCT = 0.02
"""The same of a product of two such matrices."""
DTYPES = [torch.float32, torch.bfloat16]


def error(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def made(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def plain(matrix):
    return matrix.values.float() * matrix.scales.unsqueeze(1)


@pytest.fixture(params=["compiled", "definition"])
def realisation(request, monkeypatch):
    """Both realisations: the kernel in C, and tensor operations."""
    if request.param == "definition":
        monkeypatch.setattr(int8, "usable", lambda *_: False)
    else:
        request.getfixturevalue("c_kernels")
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (2, 7), (37, 96), (64, 1536)])
@pytest.mark.parametrize("columns", [False, True])
def test_the_kernels_are_their_definitions(c_kernels, dtype, shape, columns):
    x, factors = made(*shape, dtype=dtype), None
    if columns:
        factors = made(shape[1], seed=1, dtype=torch.float32).abs()
    found = quantised(x, factors)
    values, scales = int8.quantise_definition(x, factors)
    torch.testing.assert_close(found.scales, scales, rtol=1e-6, atol=0)
    apart = (found.values.int() - values.int()).abs()
    assert apart.max() <= 1  # halves may fall on either side: the factor is a quotient
    assert (apart > 0).float().mean() < 0.01
    sums = torch.randint(-(10**6), 10**6, shape, dtype=torch.int32)
    for bias in (None, made(shape[1], seed=2, dtype=dtype)):
        y = dequantised(sums, scales, factors, bias, dtype)
        wanted = int8.dequantise_definition(sums, scales, factors, bias)
        torch.testing.assert_close(y, wanted.to(dtype), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_come_back_within_the_rounding_whatever_their_size(realisation, dtype):
    x = made(40, 576, dtype=torch.float32) * torch.logspace(-20, 20, 40).unsqueeze(1)
    x = x.to(dtype)
    found = quantised(x)
    assert (found.values.int().abs().amax(1) == int8.LARGEST).all()
    for row, wanted in zip(plain(found), x, strict=True):
        assert error(row, wanted) < ROUNDING
    assert torch.equal(quantised(-x).values, -found.values)


def test_a_row_of_zeros_stays_one(realisation):
    x = made(32, 512)
    x[3] = 0
    x[4] = 1e-38
    assert (plain(quantised(x))[3:5] == 0).all()
    y = Int8Weight.of(made(128, 512, seed=1), SharedInput()).forward(x, None)
    assert (y[3:5] == 0).all()
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_is_not_clipped(realisation, bad):
    x = made(32, 512)
    x[5, 7] = bad
    weight = Int8Weight.of(made(128, 512, seed=1), SharedInput())
    y = weight.forward(x, None)
    assert not torch.isfinite(y[5]).any()
    assert torch.isfinite(y[[*range(5), *range(6, 32)]]).all()
    grad = made(32, 128)
    grad[2, 0] = bad
    assert not torch.isfinite(weight.backward(grad)[2]).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 16, 37, 300])
@pytest.mark.parametrize("bias", [False, True])
def test_products_of_any_number_of_rows(realisation, dtype, rows, bias):
    weight = made(192, 576, dtype=dtype)
    x, grad = made(rows, 576, seed=1, dtype=dtype), made(rows, 192, seed=2, dtype=dtype)
    b = made(192, seed=3, dtype=dtype) if bias else None
    eight = Int8Weight.of(weight, SharedInput())
    forward, backward = eight.forward(x, b), eight.backward(grad)
    assert (forward.dtype, forward.shape) == (dtype, (rows, 192))
    assert (backward.dtype, backward.shape) == (dtype, (rows, 576))
    wanted = nn.functional.linear(x.float(), weight.float(), None if b is None else b.float())
    assert error(forward, wanted) < PRODUCT
    assert error(backward, grad.float() @ weight.float()) < PRODUCT
    exact = plain(quantised(x)) @ plain(eight.weight).t()
    assert error(forward, exact if b is None else exact + b.float()) < 3e-3
    one_by_one = [Int8Weight.of(weight, SharedInput()).forward(row, b) for row in x.split(1)]
    assert torch.equal(torch.cat(one_by_one), forward)  # a row does not depend on the others


def test_the_largest_sums_are_exact():
    assert int8.why_not(torch.device("cpu")) == ""
    assert int8.WIDEST * int(int8.LARGEST) ** 2 < 2**31


def test_a_processor_whose_sums_overflow_is_not_used(monkeypatch):
    exact = torch._int_mm

    def overflowing(a, b):
        return exact(a, b).clamp(-(2**15), 2**15 - 1)

    int8._inexact.cache_clear()
    monkeypatch.setattr(torch, "_int_mm", overflowing)
    assert "overflow" in int8.why_not(torch.device("cpu"))
    int8._inexact.cache_clear()
    monkeypatch.delattr(torch, "_int_mm")
    assert "has no int8 products" in int8.why_not(torch.device("cpu"))
    int8._inexact.cache_clear()
    assert int8.why_not(torch.device("cuda")) == "int8 products are made on CPUs only"


@pytest.mark.parametrize(("shape", "taken"), [((128, 511), False), ((128, 512), True)])
def test_small_layers_are_left_alone(shape, taken):
    assert (Int8Weight.of(made(*shape), SharedInput()) is not None) == taken


def test_a_layer_that_is_too_wide_for_exact_sums_is_left_alone():
    assert Int8Weight.of(torch.ones(1, int8.WIDEST), SharedInput()) is not None
    assert Int8Weight.of(torch.ones(1, int8.WIDEST + 1), SharedInput()) is None


def test_the_estimate_counts_the_layers_that_are_quantised():
    assert estimate.INT8_SMALLEST == int8.SMALLEST


def test_an_input_of_several_layers_is_quantised_once(monkeypatch):
    seen, real = [], int8.quantised
    monkeypatch.setattr(int8, "quantised", lambda x, columns=None: seen.append(x) or real(x))
    config = LoraConfig(r=4)
    layers = nn.ModuleList(
        lora.LoraLinear(nn.Linear(512, n, bias=False).bfloat16(), config) for n in (128, 256, 128)
    )
    lora.use_eight_bit(layers.train(), "int8")
    of_weights = len(seen)
    x = made(2, 16, 512).requires_grad_()
    sum(layer(x).float().sum() for layer in layers).backward()
    assert len(seen) - of_weights == 1 + len(layers)  # the input once, each gradient


def test_the_largest_channels_are_kept_apart():
    """An input with channels of 30 times the size, as language models have them."""
    x, weight = made(64, 576, dtype=torch.float32), made(192, 576, seed=1)
    large = [3, 77, 78, 400]
    x[:, large] *= 30
    x = x.bfloat16()
    layers = nn.ModuleDict({"a": nn.Linear(576, 192), "b": nn.Linear(576, 10)})
    with int8.watched_inputs(layers) as largest:
        for part in x.float().split(16):
            layers["a"](part)
            layers["b"](part)
    layers["a"](100 * x.float())  # nobody watches any more
    assert torch.equal(largest["a"], x.abs().amax(0).float())
    split = int8.split_of(largest["a"], int8.Split())
    assert int8.split_of(largest["b"], split) is split
    assert int8.split_of(largest["b"].flip(0), split) is not split
    assert int8.split_of(torch.ones(64), split).apart.shape == (int8.APART,)
    assert set(large) < set(split.apart.tolist())
    assert split.columns.nonzero().numel() == 576 - int8.APART
    exact = x.float() @ weight.float().t()
    together = Int8Weight.of(weight, SharedInput())
    apart = Int8Weight.of(weight, SharedInput(), split)
    assert error(together.forward(x, None), exact) > 2 * PRODUCT
    assert error(apart.forward(x, None), exact) < PRODUCT / 2
    grad = made(64, 192, seed=2)
    assert torch.equal(apart.backward(grad), together.backward(grad))
    x[5, 77] = float("nan")
    assert apart.forward(x, None)[5].isnan().all()


def step(model, x):
    """Output, and the gradients of the input, A and B."""
    torch.manual_seed(1)
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(made(*y.shape, seed=9, dtype=y.dtype))
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def adapted(bias=False, dropout=0.0, dtype=torch.bfloat16):
    """A layer [512 -> 192] with an adapter whose B is not zero, in training mode."""
    torch.manual_seed(0)
    base = nn.Linear(512, 192, bias=bias).to(dtype)
    layer = lora.LoraLinear(base, LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout))
    nn.init.normal_(layer.lora_B, std=0.1)
    return nn.Sequential(layer).train()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("bias", [False, True])
def test_a_training_step_of_a_layer(dtype, bias, dropout):
    model, x = adapted(bias, dropout, dtype), made(3, 7, 512, seed=4, dtype=dtype)
    exact = step(adapted(bias, dropout, torch.float32), x.float())
    before = step(model, x)
    served = step(model.eval(), x)
    lora.use_eight_bit(model, "int8")
    assert lora.eight_bit_weights(model) == 512 * 192
    assert all(torch.equal(a, b) for a, b in zip(step(model, x), served, strict=True))
    found = step(model.train(), x)
    for ours, other, wanted in zip(found, before, exact, strict=True):
        assert ours.dtype == other.dtype
        assert error(ours, wanted) < PRODUCT
    assert not torch.equal(found[0], before[0])
    assert all(torch.equal(a, b) for a, b in zip(found[2:], before[2:], strict=True))
    with lora.without_eight_bit(model):
        assert all(torch.equal(a, b) for a, b in zip(step(model, x), before, strict=True))
    lora.drop_eight_bit(model)
    assert lora.eight_bit_weights(model) == 0


def test_threads_change_no_bit():
    weight, x = made(192, 576), made(301, 576, seed=1)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        eight = Int8Weight.of(weight, SharedInput())
        found.append((eight.forward(x, None), eight.backward(made(301, 192, seed=2))))
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("faster", [True, False])
def test_a_trial_decides_by_time(c_kernels, monkeypatch, faster):
    """Of a clock that says how long each of the two takes."""
    now = [0.0]
    monkeypatch.setattr(int8.time, "perf_counter", lambda: now[0])
    plain_seconds, eight_seconds = (2.0, 1.0) if faster else (1.0, 1.0)
    linear, forward = int8.functional.linear, Int8Weight.forward

    def slow_linear(*given):
        now[0] += plain_seconds
        return linear(*given)

    def slow_forward(self, x, bias):
        now[0] += eight_seconds
        return forward(self, x, bias)

    monkeypatch.setattr(int8.functional, "linear", slow_linear)
    monkeypatch.setattr(Int8Weight, "forward", slow_forward)
    assert int8.pays(made(512, 512)) == faster
    assert not int8.pays(made(64, 64))
