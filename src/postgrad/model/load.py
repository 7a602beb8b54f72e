"""Hub id, directory, GGUF file or package URI -> a Transformers model and its tokenizer.

A GGUF file is dequantised once into a plain model directory in the cache; from there on it is a
model like any other.
"""

import contextlib
import io
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from postgrad import machine
from postgrad.config import ModelConfig
from postgrad.errors import ModelError
from postgrad.model.directory import converted_directory, find_directory, template_text
from postgrad.run import disk_errors, sha256_file
from postgrad.sources import resolve


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in evaluation mode, its tokenizer and where both came from."""

    model: Any
    """A Transformers causal language model."""
    tokenizer: Any
    """A fast Transformers tokenizer with a chat template."""
    directory: Path
    """The local model directory: what PEFT and Transformers open."""
    dtype: torch.dtype
    """Precision of the frozen weights and of the matrix products."""

    @property
    def parameters(self) -> int:
        """Number of parameters, adapters included."""
        return sum(p.numel() for p in self.model.parameters())


def model_directory(base: str, revision: str | None = None) -> Path:
    """Return a local Transformers directory for `base`; fetches and converts when needed."""
    found = find_directory(base, revision)
    return convert_gguf(resolve(base, "model", revision=revision)) if found is None else found


def load_tokenizer(directory: Path, chat_template: str | None = None) -> Any:
    """Load the tokenizer and its chat template, or say which file or setting is missing."""
    present = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    if not any((directory / name).exists() for name in present):
        raise ModelError(
            f"{directory} has no tokenizer (none of {', '.join(present)})",
            "copy the tokenizer files of the base model into it",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except Exception as error:  # the Rust tokenizers raise nothing more specific
        raise ModelError(
            f"{directory}: the tokenizer does not load: {error}", "check its files"
        ) from error
    if chat_template is not None:
        tokenizer.chat_template = template_text(chat_template)
    if not tokenizer.chat_template:
        raise ModelError(
            f"{directory}: the tokenizer has no chat template",
            "set model.chat_template to a Jinja template (text or file); for a base model the "
            "template of its instruct sibling is the usual choice",
        )
    return tokenizer


def load_model(directory: Path, dtype: torch.dtype) -> Any:
    """Load the weights in `dtype` on the best device; every weight must be in the files."""
    try:
        with quiet_transformers():
            model, info = AutoModelForCausalLM.from_pretrained(
                directory, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{directory}: the model does not load: {first}", "check its files"
        ) from error
    if info.get("missing_keys"):
        missing = sorted(info["missing_keys"])
        raise ModelError(
            f"{directory}: {len(missing)} weights are missing ({missing[0]}, ...)",
            "they would be random; fetch the model again",
        )
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter.sum(dtype=torch.float32)):
            raise ModelError(
                f"{directory}: weight {name} holds NaN or infinity", "fetch the model again"
            )
    return model.to(device()).eval()


def load(config: ModelConfig, *, trained: bool = True) -> Loaded:
    """Load model and tokenizer as a recipe's `model` section says (adapters come later).

    With full tuning the weights are in float32, unless the model is not to be `trained`.
    """
    directory = model_directory(config.base, config.revision)
    tokenizer = load_tokenizer(directory, config.chat_template)
    dtype = compute_dtype(config.precision)
    full = trained and config.adapt.kind == "full"
    model = load_model(directory, torch.float32 if full else dtype)
    return Loaded(model, tokenizer, directory, dtype)


def device() -> torch.device:
    """Return the CUDA device of this process when there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def compute_dtype(precision: str) -> torch.dtype:
    """Resolve model.precision: auto is bf16 where the processor multiplies bf16 natively."""
    if precision == "fp32" or (precision == "auto" and not has_native_bf16()):
        return torch.float32
    return torch.bfloat16


def has_native_bf16() -> bool:
    """Return whether bf16 matrix products run in hardware (AMX, AVX512-BF16, Arm BF16, CUDA 8+)."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return machine.has_native_bf16()


def convert_gguf(path: Path) -> Path:
    """Dequantise a GGUF file into a float32 Transformers directory in the cache, once.

    What Transformers returns refuses `save_pretrained` until the GGUF quantisation config is gone;
    the weights are moved into a plain model of the same class.
    """
    final = converted_directory(path)
    if (final / "config.json").exists():
        return final
    temporary = final.with_name(f".{final.name}.{os.getpid()}")
    with disk_errors(final):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            _convert(path, temporary)
            if not (final / "config.json").exists():
                temporary.replace(final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return final


def _convert(path: Path, target: Path) -> None:
    # the GGUF reader has a bar of its own that no setting of Transformers switches off
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
        source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
        tokenizer = AutoTokenizer.from_pretrained(**source)
        quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        config = quantised.config
        del config.quantization_config
        config._name_or_path = ""
        plain = type(quantised)(config)
        plain.load_state_dict(quantised.state_dict(), strict=True)
        plain.tie_weights()
        plain.generation_config = GenerationConfig.from_model_config(config)
        plain.save_pretrained(target)
        tokenizer.save_pretrained(target)
    origin = {
        "source": path.name,
        "sha256": sha256_file(path),
        "transformers": transformers.__version__,
    }
    (target / "origin.json").write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence Transformers' own progress bars and log lines: ours are the only ones."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.ERROR)
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
        transformers.logging.enable_progress_bar()
