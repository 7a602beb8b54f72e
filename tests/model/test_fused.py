"""Fused layers: every realisation equals its definition, forward and backward."""

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig

from postgrad.model import fused, kernels
from postgrad.model.attention import training_attention
from postgrad.model.layout import Layout
from postgrad.train.sft import _FusedCrossEntropy

ROWS = (1, 2, 7, 130)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


@pytest.fixture(params=["compiled", "tensors"])
def realisation(request, monkeypatch):
    """Run a test with the compiled kernels and with tensor operations."""
    if request.param == "tensors":
        monkeypatch.setattr(kernels, "kernels", lambda: kernels.Kernels(None, "off"))
    else:
        assert kernels.kernels().library is not None, kernels.kernels().detail
    return request.param


def values(*shape, dtype, seed, grad=True, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    made = (torch.randn(*shape, generator=generator) * scale).to(dtype)
    return made.requires_grad_(grad)


def close(ours, definition, dtype):
    ours, definition = ours.detach().double(), definition.detach()
    size = float(definition.abs().max()) + 1e-12
    assert float((ours - definition).abs().max()) <= TOLERANCE[dtype] * size


def compare(operation, definition, inputs, dtype):
    """Compare outputs and gradients with the definition in float64 on the same rounded inputs."""
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    ours, theirs = operation(*inputs), definition(*wide)
    assert ours.dtype == dtype
    close(ours, theirs, dtype)
    direction = values(*ours.shape, dtype=dtype, seed=9, grad=False)
    ours.backward(direction)
    theirs.backward(direction.double())
    for x, y in zip(inputs, wide, strict=True):
        if x.requires_grad:
            close(x.grad, y.grad, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_rms_norm_is_its_definition(realisation, rows, dtype, scale):
    x = values(1, rows, 37, dtype=dtype, seed=1, scale=scale)
    weight = values(37, dtype=dtype, seed=2)
    compare(
        lambda x, w: fused.rms_norm(x, w, 1e-5),
        lambda x, w: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * w,
        [x, weight],
        dtype,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", ROWS)
def test_swiglu_is_its_definition(realisation, rows, dtype):
    gate, up = (values(rows, 37, dtype=dtype, seed=s, scale=4.0) for s in (1, 2))
    compare(fused.swiglu, lambda g, u: functional.silu(g) * u, [gate, up], dtype)


@pytest.mark.parametrize("gate", [-1e4, -90.0, -30.0, 0.0, 30.0, 90.0, 1e4])
def test_swiglu_is_right_far_out(realisation, gate):
    g, u = torch.full((1, 5), gate), torch.full((1, 5), 2.0)
    assert torch.allclose(fused.swiglu(g, u), functional.silu(g) * u, atol=1e-30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", ROWS)
def test_rotary_is_its_definition(realisation, rows, dtype):
    x = values(rows, 3, 16, dtype=dtype, seed=1)
    angles = torch.randn(rows, 8, generator=torch.Generator().manual_seed(2)).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def definition(x, cos, sin):
        first, second = x.chunk(2, -1)
        turned = torch.cat((-second, first), -1)
        return x * cos.unsqueeze(1) + turned * sin.unsqueeze(1)

    compare(fused.rotary, definition, [x, cos, sin], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", ROWS)
def test_cross_entropy_is_its_definition(realisation, rows, dtype):
    logits = values(rows, 101, dtype=dtype, seed=1, grad=False, scale=5.0)
    labels = torch.arange(rows) * 7 % 101
    weights = values(rows, dtype=torch.float32, seed=3, grad=False).abs()
    wide = logits.double().requires_grad_()
    expected = functional.cross_entropy(wide, labels, reduction="none")
    (expected * weights.double()).sum().backward()
    losses, delta = fused.cross_entropy(logits.clone(), labels, weights, gradient=True)
    assert torch.allclose(losses.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    close(delta, wide.grad, dtype)
    again, nothing = fused.cross_entropy(logits.clone(), labels, weights, gradient=False)
    assert torch.equal(again, losses)
    assert nothing is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 101, 2500])
def test_log_sum_exp_is_its_definition(realisation, width, dtype):
    logits = values(5, width, dtype=dtype, seed=1, grad=False, scale=5.0)
    logits[3, width // 2 :] = 40.0  # a tie: the first counts
    sums, best = fused.log_sum_exp(logits)
    assert torch.allclose(sums.double(), logits.double().logsumexp(-1), rtol=1e-5, atol=1e-5)
    assert best[:3].tolist() == logits[:3].float().argmax(-1).tolist()
    assert int(best[3]) == width // 2
    logits[2, 0] = float("nan")
    logits[4, width - 1] = float("inf")
    finite = torch.isfinite(fused.log_sum_exp(logits)[0])
    assert finite.tolist() == [True, True, False, True, False]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_so(realisation, bad, dtype):
    x = values(3, 33, dtype=dtype, seed=1, grad=False)
    x[1, 5] = bad
    weight = torch.ones(33, dtype=dtype)
    assert not torch.isfinite(fused.rms_norm(x, weight, 1e-5)[1]).all()
    assert not torch.isfinite(fused.swiglu(x, x)[1]).all()
    losses, _ = fused.cross_entropy(
        x.clone(), torch.zeros(3, dtype=torch.long), torch.ones(3), True
    )
    assert torch.isfinite(losses).tolist() == [True, False, True]


def test_the_number_of_threads_changes_no_bit():
    x, weight = (
        values(130, 64, dtype=torch.float32, seed=1),
        values(64, dtype=torch.float32, seed=2),
    )
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            x.grad = weight.grad = None
            y = fused.rms_norm(x, weight, 1e-5)
            y.backward(torch.ones_like(y))
            found.append((y.detach(), x.grad, weight.grad))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.fixture(scope="module")
def llama():
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def test_a_models_layers_are_replaced_inside_the_block_only(llama):
    ids = torch.arange(12).unsqueeze(0)
    before = llama(input_ids=ids, use_cache=False).logits
    with fused.fused_layers(llama) as count:
        inside = llama(input_ids=ids, use_cache=False).logits
        with fused.own_layers(llama):
            own = llama(input_ids=ids, use_cache=False).logits
        with fused.fused_layers(llama) as nested:
            assert nested == {"rotary": 0}
        assert torch.equal(llama(input_ids=ids, use_cache=False).logits, inside)
    after = llama(input_ids=ids, use_cache=False).logits
    assert count == {"rms_norm": 5, "swiglu": 2, "rotary": 1}
    assert torch.equal(own, before)
    assert torch.equal(after, before)
    assert torch.allclose(inside, before, atol=1e-6)


def test_layers_that_compute_something_else_keep_their_code():
    config = GemmaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    for module in model.modules():  # a norm of (1 + w): w is zero at first, where both agree on 0
        if type(module).__name__.endswith("RMSNorm"):
            torch.nn.init.normal_(module.weight)
    with fused.fused_layers(model) as count:
        assert count == {"rotary": 1}


def test_gradients_of_a_whole_model_are_those_of_its_own_code(llama, realisation):
    ids, lengths = torch.arange(20).unsqueeze(0), (8, 12)
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    found = []
    for inside in (training_attention, fused.own_layers):
        llama.zero_grad()
        with inside(llama):
            more = {"layout": Layout(lengths)} if inside is training_attention else {}
            out = llama(input_ids=ids, position_ids=positions, use_cache=False, **more)
            out.logits.square().sum().backward()
        found.append({name: p.grad.clone() for name, p in llama.named_parameters()})
    for name, gradient in found[1].items():
        assert torch.allclose(found[0][name], gradient, rtol=1e-4, atol=1e-5), name


def test_the_loss_over_chunks_is_the_loss(llama, realisation):
    hidden, weight = values(50, 32, dtype=torch.float32, seed=1), llama.lm_head.weight
    labels, w = torch.arange(50), torch.linspace(0, 1, 50)
    total, _ = _FusedCrossEntropy.apply(hidden, weight, None, labels, w)
    total.backward()
    other = hidden.detach().clone().requires_grad_()
    losses = functional.cross_entropy(other @ weight.t(), labels, reduction="none")
    (losses * w).sum().backward()
    assert float(total.detach()) == pytest.approx(float((losses * w).sum().detach()), rel=1e-6)
    assert torch.allclose(hidden.grad, other.grad, atol=1e-6)


def test_without_a_compiler_nothing_breaks(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CC", "no-such-compiler")
    found = kernels.kernels.__wrapped__()
    assert found.library is None
    assert "compiler" in found.detail


def test_a_compiler_that_fails_is_named(monkeypatch, tmp_path):
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho broken: no space left >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setenv("POSTGRAD_CACHE", str(tmp_path / "cache"))
    found = kernels.kernels.__wrapped__()
    assert found.library is None
    assert "no space left" in found.detail


def test_kernels_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("POSTGRAD_KERNELS", "off")
    assert kernels.kernels.__wrapped__() == kernels.Kernels(
        None, "switched off by POSTGRAD_KERNELS"
    )
