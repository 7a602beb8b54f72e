"""Our LoRA layer computes what PEFT's does, and its directory is PEFT's, both ways."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from postgrad.config import LoraConfig
from postgrad.errors import ModelError
from postgrad.model import lora
from postgrad.model.export import open_merged, write_full, write_merged
from postgrad.model.load import load_tokenizer

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # PEFT on Transformers 5
)

IDS = torch.randint(3, 256, (2, 17), generator=torch.Generator().manual_seed(1))


def fresh(directory, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.float()


def stirred(model, config, seed=3):
    """Add our adapter and give B values, as training would."""
    lora.add_lora(model, config, seed)
    torch.manual_seed(seed)
    for layer in lora.lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.05)
    return model


def peft_adapter(base, directory, **settings):
    """Make and save an adapter with PEFT alone; returns the wrapped model."""
    torch.manual_seed(5)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **settings}
    model = peft.get_peft_model(fresh(base), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(directory)
    return model.eval()


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, lora_alpha=32),
        LoraConfig(r=8, lora_alpha=3, use_rslora=True),
        LoraConfig(r=2, target_modules=("q_proj", "v_proj")),
        LoraConfig(r=2, target_modules=("layers.1.mlp.down_proj", "layers.0.self_attn.q_proj")),
        LoraConfig(r=4, lora_dropout=0.3),
    ],
    ids=["all", "rslora", "qv", "named", "dropout"],
)
def test_peft_opens_our_directory_with_equal_logits(tiny_model_dir, tmp_path, config):
    base = logits(fresh(tiny_model_dir))
    model = stirred(fresh(tiny_model_dir), config).eval()
    lora.save_adapter(model, config, tmp_path, str(tiny_model_dir))
    other = peft.PeftModel.from_pretrained(fresh(tiny_model_dir), tmp_path).eval()
    assert (logits(model) - base).abs().max() > 0.05
    torch.testing.assert_close(logits(other), logits(model), atol=1e-5, rtol=0)
    wrapped = [n for n, m in other.named_modules() if hasattr(m, "lora_A")]
    assert len(wrapped) == len(lora.lora_layers(model))
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tiny_model_dir)


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({}, 14),
        ({"r": 3, "lora_alpha": 7, "use_rslora": True}, 14),
        ({"target_modules": ["q_proj", "v_proj"]}, 4),
        ({"target_modules": r".*\.1\.mlp\.(up|down)_proj"}, 2),
        ({"target_modules": ["o_proj"], "layers_to_transform": [1]}, 1),
        ({"exclude_modules": ["o_proj"]}, 12),
        ({"init_lora_weights": "gaussian"}, 14),
    ],
    ids=["all", "rslora", "qv", "expression", "one-layer", "excluded", "gaussian"],
)
def test_an_adapter_made_by_peft_loads_with_equal_logits(
    tiny_model_dir, tmp_path, settings, layers
):
    other = peft_adapter(tiny_model_dir, tmp_path, **settings)
    model = fresh(tiny_model_dir)
    config = lora.attach_adapter(model, tmp_path)
    assert len(lora.lora_layers(model)) == layers
    assert config.r == settings.get("r", 4)
    torch.testing.assert_close(logits(model.eval()), logits(other), atol=1e-5, rtol=0)


def test_an_adapter_comes_back_bit_by_bit(tiny_model_dir, tmp_path):
    config = LoraConfig(r=4, target_modules=("gate_proj",))
    model = stirred(fresh(tiny_model_dir), config)
    lora.save_adapter(model, config, tmp_path, "base")
    again = fresh(tiny_model_dir)
    lora.attach_adapter(again, tmp_path)
    ours, theirs = lora.adapter_state(model), lora.adapter_state(again)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 6), (2, 5, 6)])
def test_gradients_are_those_of_the_plain_formula(bias, shape):
    torch.manual_seed(0)
    layer = lora.LoraLinear(nn.Linear(6, 4, bias=bias), LoraConfig(r=3, lora_alpha=5))
    layer = layer.double()
    nn.init.normal_(layer.lora_B)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(*shape[:-1], 4, dtype=torch.float64)
    wanted = (x, layer.lora_A, layer.lora_B)
    y = layer(x)
    assert y.shape == grad.shape
    plain = functional.linear(x, layer.base.weight, layer.base.bias)
    plain = plain + 5 / 3 * (x @ layer.lora_A.T @ layer.lora_B.T)
    torch.testing.assert_close(y, plain, atol=1e-12, rtol=0)
    ours = torch.autograd.grad(y, wanted, grad)
    theirs = torch.autograd.grad(plain, wanted, grad)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(
        lambda x, a, b: lora._LoraFunction.apply(
            x, layer.base.weight, layer.base.bias, a, b, layer.scale, None
        ),
        wanted,
    )


def test_no_gradient_is_made_for_an_input_that_needs_none():
    layer = lora.LoraLinear(nn.Linear(6, 4), LoraConfig(r=3))
    layer(torch.randn(2, 6)).sum().backward()
    assert layer.lora_B.grad is not None
    assert layer.base.weight.grad is None
    assert layer.base.bias.grad is None


def test_dropout_falls_on_the_adapters_input_in_training_only():
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=6, lora_dropout=0.5)
    layer = lora.LoraLinear(nn.Linear(8, 4), config)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(7, 8, requires_grad=True)
    torch.manual_seed(1)
    y = layer.train()(x)
    torch.manual_seed(1)
    dropped = functional.dropout(x, 0.5)
    plain = layer.base(x) + 2 * dropped @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(y, plain)
    wanted = (x, layer.lora_A, layer.lora_B)
    ours = torch.autograd.grad(y.square().sum(), wanted)
    theirs = torch.autograd.grad(plain.square().sum(), wanted)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
    still = layer.base(x) + 2 * x @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(layer.eval()(x), still)


def test_a_bf16_base_keeps_float32_adapters_and_gradients(tiny_model_dir):
    model = stirred(fresh(tiny_model_dir, torch.bfloat16), LoraConfig(r=4))
    full = stirred(fresh(tiny_model_dir), LoraConfig(r=4))
    for each in (model, full):
        each(IDS, labels=IDS).loss.backward()
    for name, layer in lora.lora_layers(model).items():
        assert layer.lora_A.dtype == layer.lora_A.grad.dtype == torch.float32
        assert layer.base.weight.dtype == torch.bfloat16
        exact = lora.lora_layers(full)[name].lora_B.grad
        assert (layer.lora_B.grad - exact).norm() < 0.1 * exact.norm()


def test_a_new_adapter_changes_nothing_and_is_a_function_of_the_seed(tiny_model_dir):
    base = fresh(tiny_model_dir)
    before = logits(base)
    torch.manual_seed(9)
    state = torch.get_rng_state()
    names = lora.add_lora(base, LoraConfig(r=4), seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits(base), before)
    assert "lm_head" not in names
    trained = [name for name, p in base.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * len(names) == 28
    assert all(".lora_" in name for name in trained)
    other, third = fresh(tiny_model_dir), fresh(tiny_model_dir)
    lora.add_lora(other, LoraConfig(r=4), seed=2)
    lora.add_lora(third, LoraConfig(r=4), seed=3)
    first = names[0]
    a = lora.lora_layers(base)[first].lora_A
    assert torch.equal(a, lora.lora_layers(other)[first].lora_A)
    assert not torch.equal(a, lora.lora_layers(third)[first].lora_A)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_cast_once_compute_the_same_bits(tiny_model_dir, dtype):
    config = LoraConfig(r=4, lora_alpha=6)
    model = stirred(fresh(tiny_model_dir, dtype), config)
    before = logits(model)
    with lora.cast_once(model):
        assert torch.equal(logits(model), before)
    for layer in lora.lora_layers(model).values():
        layer.lora_B.data.mul_(2)
    assert not torch.equal(logits(model), before)


def test_disabled_is_the_base_and_comes_back(tiny_model_dir):
    before = logits(fresh(tiny_model_dir))
    model = stirred(fresh(tiny_model_dir), LoraConfig(r=4)).eval()
    tuned = logits(model)
    with lora.disabled(model):
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), tuned)
    with pytest.raises(RuntimeError, match="inside"), lora.disabled(model):
        raise RuntimeError("inside")
    assert torch.equal(logits(model), tuned)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"peft_type": "LOHA"}, "peft_type"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_adapter_that_computes_something_else_is_refused(
    tiny_model_dir, tmp_path, settings, named
):
    peft_adapter(tiny_model_dir, tmp_path, target_modules=["q_proj"])
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(ModelError, match=f"the adapter uses {named}") as error:
        lora.attach_adapter(fresh(tiny_model_dir), tmp_path)
    assert str(tmp_path) in error.value.message


def test_an_adapter_saved_by_peft_with_dora_is_refused(tiny_model_dir, tmp_path):
    peft_adapter(tiny_model_dir, tmp_path, use_dora=True)
    with pytest.raises(ModelError, match="use_dora"):
        lora.attach_adapter(fresh(tiny_model_dir), tmp_path)


def test_an_adapter_of_another_base_is_refused(tiny_model_dir, tmp_path):
    peft_adapter(tiny_model_dir, tmp_path)
    path = tmp_path / lora.WEIGHTS
    whole = load_file(path)
    first = next(iter(whole))
    save_file({**whole, first: torch.zeros(4, 65)}, path)
    with pytest.raises(ModelError, match=r"is \(4, 65\), the model needs \(4, "):
        lora.attach_adapter(fresh(tiny_model_dir), tmp_path)
    extra = {first.replace("layers.0", "layers.7"): whole[first].clone()}
    save_file({**whole, **extra}, path)
    with pytest.raises(ModelError, match=r"does not fit this model.*layers\.7"):
        lora.attach_adapter(fresh(tiny_model_dir), tmp_path)
    save_file({name: value for name, value in whole.items() if name != first}, path)
    with pytest.raises(ModelError, match="does not fit this model"):
        lora.attach_adapter(fresh(tiny_model_dir), tmp_path)


def test_a_folder_without_an_adapter_is_refused(tiny_model_dir, tmp_path):
    with pytest.raises(ModelError, match="no readable adapter_config"):
        lora.attach_adapter(fresh(tiny_model_dir), tmp_path)
    peft_adapter(tiny_model_dir, tmp_path)
    (tmp_path / lora.WEIGHTS).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors"):
        lora.attach_adapter(fresh(tiny_model_dir), tmp_path)


def test_an_unknown_target_names_the_endings(tiny_model_dir):
    config = LoraConfig(target_modules=("q_proj", "query"))
    with pytest.raises(ModelError, match="no linear layer is called query") as error:
        lora.add_lora(fresh(tiny_model_dir), config, seed=0)
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in error.value.remedy


@pytest.fixture(scope="module")
def merged(tiny_model_dir, tmp_path_factory):
    """(adapted model, folder of the merged one)."""
    adapter, target = (tmp_path_factory.mktemp(name) for name in ("adapter", "merged"))
    config = LoraConfig(r=4)
    model = stirred(fresh(tiny_model_dir), config).eval()
    lora.save_adapter(model, config, adapter, str(tiny_model_dir))
    tokenizer = load_tokenizer(tiny_model_dir)
    write_merged(tiny_model_dir, adapter, target, tokenizer, frozenset({2, 0}))
    return model, target


def test_a_merged_model_opens_in_plain_transformers(tiny_model_dir, merged):
    model, target = merged
    other = fresh(target)
    assert not lora.lora_layers(other)
    assert (logits(other) - logits(fresh(tiny_model_dir))).abs().max() > 0.05
    torch.testing.assert_close(logits(other), logits(model), atol=1e-4, rtol=0)
    settings = {"do_sample": False, "max_new_tokens": 24, "pad_token_id": 2, "eos_token_id": 2}
    ours = model.generate(IDS, attention_mask=torch.ones_like(IDS), **settings)
    theirs = other.generate(IDS, attention_mask=torch.ones_like(IDS), **settings)
    assert torch.equal(ours, theirs)
    assert ours.shape[1] > IDS.shape[1]
    assert torch.equal(logits(open_merged(target, torch.float32)), logits(other))


def test_a_merged_folder_stops_where_training_did_and_renders_as_training_did(
    tiny_model_dir, merged
):
    _, target = merged
    settings = json.loads((target / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [0, 2]
    assert settings.get("do_sample", False) is False
    messages = [{"role": "user", "content": "is this the answer"}]
    ours, theirs = (AutoTokenizer.from_pretrained(d) for d in (tiny_model_dir, target))
    assert theirs.chat_template == ours.chat_template
    assert (
        theirs.apply_chat_template(messages)["input_ids"]
        == (ours.apply_chat_template(messages)["input_ids"])
    )


def test_a_fully_tuned_model_is_written_in_the_precision_of_its_base(tiny_model_dir, tmp_path):
    base, target = tmp_path / "base", tmp_path / "tuned"
    fresh(tiny_model_dir, torch.bfloat16).save_pretrained(base)
    tokenizer = load_tokenizer(tiny_model_dir)
    model = fresh(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    write_full(base, model, target, tokenizer, frozenset({2}))
    tuned = AutoModelForCausalLM.from_pretrained(target, dtype="auto")
    assert tuned.dtype == torch.bfloat16
    assert tuned.generation_config.eos_token_id == 2
    for (name, ours), (other, theirs) in zip(
        model.named_parameters(), tuned.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(ours.to(torch.bfloat16), theirs)
    assert load_tokenizer(target).chat_template == tokenizer.chat_template


@pytest.mark.gpu
def test_a_seed_means_the_same_adapter_on_every_device(cuda, tiny_model_dir):
    found = []
    for device in (torch.device("cpu"), cuda):
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).to(device)
        lora.add_lora(model, LoraConfig(r=4), seed=7)
        found.append(lora.adapter_state(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_scaled_update_lies_between_base_and_tuned(tiny_model_dir):
    base = logits(fresh(tiny_model_dir))
    model = stirred(fresh(tiny_model_dir), LoraConfig(r=4, lora_alpha=32)).eval()
    tuned = logits(model)
    with lora.scaled(model, 0.0):
        assert torch.equal(logits(model), base)
        with lora.cast_once(model):
            assert torch.equal(logits(model), base)
    with lora.scaled(model, 1.0):
        assert torch.equal(logits(model), tuned)
    with lora.scaled(model, 0.5):
        half = logits(model)
    assert 0 < (half - base).abs().max() < (tuned - base).abs().max()
    with pytest.raises(RuntimeError), lora.scaled(model, 0.3):
        raise RuntimeError
    assert torch.equal(logits(model), tuned)


@pytest.mark.parametrize("config", [LoraConfig(r=4), LoraConfig(r=8, use_rslora=True)])
@pytest.mark.parametrize("factor", [0.35, 1.5])
def test_peft_opens_a_scaled_adapter_with_the_scaled_logits(
    tiny_model_dir, tmp_path, config, factor
):
    model = stirred(fresh(tiny_model_dir), config).eval()
    (tmp_path / "scaled").mkdir()
    lora.save_adapter(model, config, tmp_path, str(tiny_model_dir))
    lora.write_scaled(tmp_path, tmp_path / "scaled", factor)
    other = peft.PeftModel.from_pretrained(fresh(tiny_model_dir), tmp_path / "scaled").eval()
    with lora.scaled(model, factor):
        expected = logits(model)
    torch.testing.assert_close(logits(other), expected, atol=1e-5, rtol=0)
    again = fresh(tiny_model_dir)
    lora.attach_adapter(again, tmp_path / "scaled")
    torch.testing.assert_close(logits(again), expected, atol=1e-6, rtol=0)


def test_an_adapter_takes_the_place_of_another(tiny_model_dir, tmp_path):
    found = {}
    for name, config in (("a", LoraConfig(r=4)), ("b", LoraConfig(r=4, lora_alpha=5))):
        model = stirred(fresh(tiny_model_dir), config, seed=len(found)).eval()
        (tmp_path / name).mkdir()
        lora.save_adapter(model, config, tmp_path / name, "base")
        found[name] = logits(model)
    model = fresh(tiny_model_dir)
    lora.attach_adapter(model, tmp_path / "a")
    lora.replace_adapter(model, tmp_path / "b")
    torch.testing.assert_close(logits(model), found["b"], atol=1e-6, rtol=0)
    lora.replace_adapter(model, tmp_path / "a")
    torch.testing.assert_close(logits(model), found["a"], atol=1e-6, rtol=0)
    (tmp_path / "c").mkdir()
    other = stirred(fresh(tiny_model_dir), LoraConfig(r=2))
    lora.save_adapter(other, LoraConfig(r=2), tmp_path / "c", "base")
    with pytest.raises(ModelError, match="the model needs"):
        lora.replace_adapter(model, tmp_path / "c")
