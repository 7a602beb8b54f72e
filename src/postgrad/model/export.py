"""Write models that others open: the adapter as a PEFT folder, merged weights as Transformers'."""

import gc
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from postgrad.model import lora
from postgrad.model.load import load_model, quiet_transformers


def write_merged(
    base: Path, adapter: Path, target: Path, tokenizer: Any, stop_ids: frozenset[int]
) -> None:
    """Add the adapter to the base weights *on disk*, in their own precision, and save the result.

    The sum is made in float32. `target` becomes a plain Transformers directory with tokenizer, chat
    template and a generation config that stops where training taught the model to stop.
    """
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", device_map=None)
        lora.attach_adapter(model, adapter)
        for name, layer in lora.lora_layers(model).items():
            parent, _, child = name.rpartition(".")
            merged = layer.base.weight.detach().float() + layer.delta()
            layer.base.weight.data = merged.to(layer.base.weight.dtype)
            setattr(model.get_submodule(parent), child, layer.base)
        _save(model, target, tokenizer, stop_ids)
    del model
    gc.collect()


def write_full(
    base: Path, model: Any, target: Path, tokenizer: Any, stop_ids: frozenset[int]
) -> None:
    """Save fully tuned weights as a plain Transformers directory in the precision of the base."""
    with quiet_transformers():
        plain = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
        plain.load_state_dict(model.state_dict())
        _save(plain, target, tokenizer, stop_ids)


def _save(model: Any, target: Path, tokenizer: Any, stop_ids: frozenset[int]) -> None:
    stops = sorted(stop_ids)
    model.generation_config.eos_token_id = stops if len(stops) > 1 else stops[0]
    model.generation_config.do_sample = False
    model.generation_config.temperature = None
    model.generation_config.top_p = None
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def open_merged(directory: Path, dtype: torch.dtype) -> Any:
    """Load what `write_merged` wrote, for checking it."""
    return load_model(directory, dtype)
