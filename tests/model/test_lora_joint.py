"""Adapted layers with one input, computed together: as each by itself, where they may be."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from postgrad.config import LoraConfig
from postgrad.model import lora, lora_joint
from postgrad.model.attention import training_attention
from postgrad.model.fp8 import Fp8Weight
from postgrad.model.frozen import SharedInput


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(lora_joint, "DEVICES", ("cpu",))


def made(widths=(24, 8, 8), rank=4, dtype=torch.float32, **settings):
    """Adapted layers of 16 inputs with an update that is not zero."""
    torch.manual_seed(1)
    layers = []
    for number, width in enumerate(widths):
        config = LoraConfig(r=rank + number, **settings)
        layer = lora.LoraLinear(nn.Linear(16, width, bias=False, dtype=dtype), config)
        nn.init.normal_(layer.lora_B)
        layers.append(layer)
    return layers


def gradients(outputs, layers, x):
    torch.manual_seed(2)
    total = sum((y.float() * torch.randn(y.shape)).sum() for y in outputs)
    parameters = [p for layer in layers for p in (layer.lora_A, layer.lora_B)]
    return torch.autograd.grad(total, [x, *parameters])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 16), (2, 7, 16), (1, 1, 16)])
def test_together_is_each_by_itself(shape, dtype):
    layers = made(dtype=dtype)
    x = torch.randn(shape).to(dtype).requires_grad_()
    ours, apart = lora_joint.together(layers, x), [layer(x) for layer in layers]
    close = 1e-5 if dtype == torch.float32 else 2e-2
    pairs = zip(gradients(ours, layers, x), gradients(apart, layers, x), strict=True)
    for one, other in [*zip(ours, apart, strict=True), *pairs]:
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        assert (one - other).norm() <= close * other.norm()


def test_adapters_that_are_cast_once_are_taken_as_they_are():
    model = nn.ModuleList(made(dtype=torch.bfloat16))
    x = torch.randn(3, 16, dtype=torch.bfloat16, requires_grad=True)
    with lora.cast_once(model):
        ours = lora_joint.together(list(model), x)
        assert ours is not None
    for one, other in zip(ours, lora_joint.together(list(model), x), strict=True):
        assert one.equal(other)


def test_what_is_more_than_plain_is_computed_one_by_one():
    x = torch.randn(3, 16, requires_grad=True)
    assert lora_joint.together(made(lora_dropout=0.1), x) is None
    assert lora_joint.together([*made(), nn.Linear(16, 4)], x) is None
    assert lora_joint.together(made(), x.to(torch.bfloat16)) is None
    biased = lora.LoraLinear(nn.Linear(16, 4), LoraConfig(r=2))
    assert lora_joint.together([*made(), biased], x) is None
    with torch.no_grad():
        assert lora_joint.together(made(), x) is None
    layers = made((16, 16))
    layers[1].eight_bit = Fp8Weight.of(layers[1].base.weight, SharedInput())
    assert lora_joint.together(layers, x) is None
    layers = made()
    with lora.disabled(nn.ModuleList(layers)):
        assert lora_joint.together(layers, x) is None
    assert lora_joint.together(layers, x) is not None


def test_the_first_layer_asked_computes_the_others(monkeypatch):
    layers = made()
    calls, together = [], lora_joint.together
    monkeypatch.setattr(lora_joint, "together", lambda *a: calls.append(1) or together(*a))
    ahead = lora_joint.Ahead(layers)
    first, second, third = (ahead.of(number) for number in range(3))
    x = torch.randn(3, 16)
    for one, layer in zip((first(x), third(x), second(x)), (layers[0], layers[2], layers[1]),
                          strict=True):  # fmt: skip
        torch.testing.assert_close(one, layer(x))
    assert calls == [1]
    assert ahead.x is None
    assert ahead.ready == {}
    first(x)
    other = torch.randn(3, 16)
    torch.testing.assert_close(second(other), layers[1](other))  # another input: not what is ready
    torch.testing.assert_close(second(x), layers[1](x))


def test_a_model_trains_the_same():
    config = LlamaConfig(
        vocab_size=31, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    lora.add_lora(model, LoraConfig(r=4), seed=3)
    for layer in lora.lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    ids = torch.randint(31, (1, 9))

    def losses():
        with training_attention(model):
            model.zero_grad()
            loss = model(ids, labels=ids).loss
            loss.backward()
            return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]

    ours = losses()
    lora_joint.DEVICES = ()
    for one, other in zip(ours, losses(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    lora_joint.DEVICES = ("cpu",)
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora_joint._Joint, "apply", lambda *a: calls.append(len(a[1])) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            losses()
    assert calls == [3]
