"""The base and the tuned models of a run, loaded when first asked for; one copy when it is LoRA.

A tuned model may be taken in part: with LoRA the update is scaled by lambda; for full tuning the
weights are base + lambda (tuned - base). 0 is the base, 1 the tuned model. Source: Wortsman et al.
2022, arXiv 2109.01903 (WiSE-FT).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from postgrad.config import LoraConfig, Recipe
from postgrad.data.render import Renderer
from postgrad.evaluate.gates import TUNED
from postgrad.model import lora
from postgrad.model.load import Loaded, load, load_model
from postgrad.run import Run
from postgrad.train.checkpoint import load_weights


@dataclass(frozen=True, slots=True)
class Weights:
    """Tuned weights and how much of them is taken."""

    folder: Path
    """A PEFT directory, a Transformers directory, or a checkpoint of full tuning."""
    scale: float = 1.0
    """Lambda."""


class Models:
    """Gives out the model of an arm; nothing is loaded before."""

    def __init__(self, run: Run, recipe: Recipe) -> None:
        """Take the run whose export folder holds the tuned model."""
        self._recipe = recipe
        self._adapted = isinstance(recipe.model.adapt, LoraConfig)
        self._arms: dict[str, Weights] = {}
        self._attached: Path | None = None
        self._whole: tuple[Weights, Any] | None = None
        exported = run.export / ("adapter" if self._adapted else "model")
        if exported.exists():
            self.define(TUNED, Weights(exported))

    def define(self, arm: str, weights: Weights) -> None:
        """Say which weights an arm has; arms that are not defined are the base model."""
        self._arms[arm] = weights

    def has(self, arm: str) -> bool:
        """Whether the arm has tuned weights."""
        return arm in self._arms

    @property
    def has_tuned(self) -> bool:
        """Whether the run has a tuned model."""
        return self.has(TUNED)

    @cached_property
    def base(self) -> Loaded:
        """The base model as loaded; with LoRA the adapter may be attached: use `arm`."""
        return load(self._recipe.model, trained=False)

    @cached_property
    def renderer(self) -> Renderer:
        """The chat template with the base model's stop tokens."""
        eos = self.base.model.generation_config.eos_token_id
        eos_ids = [eos] if isinstance(eos, int) else list(eos or [])
        return Renderer(self.base.tokenizer, eos_token_ids=eos_ids)

    @contextmanager
    def arm(self, name: str) -> Iterator[Any]:
        """Yield the model of an arm: its tuned weights where it is defined, else the base model."""
        weights = self._arms.get(name)
        if weights is None:
            assert name.startswith("base"), name
            with lora.disabled(self.base.model):
                yield self.base.model
        elif self._adapted:
            self._attach(weights.folder)
            with lora.scaled(self.base.model, weights.scale):
                yield self.base.model
        else:
            yield self._whole_model(weights)

    def _attach(self, folder: Path) -> None:
        """Put an adapter on the base model, or in place of the one that is there."""
        if self._attached is None:
            lora.attach_adapter(self.base.model, folder)
            self.base.model.eval()
        elif self._attached != folder:
            lora.replace_adapter(self.base.model, folder)
        self._attached = folder

    def _whole_model(self, weights: Weights) -> Any:
        """Return a fully tuned model; one at a time is kept."""
        if self._whole is None or self._whole[0] != weights:
            self._whole = None
            exported = (weights.folder / "config.json").exists()
            if exported and weights.scale == 1:
                model = load_model(weights.folder, self.base.dtype)
            else:
                model = self.interpolated(weights)
                for parameter in model.parameters():  # buffers keep theirs, as when it is loaded
                    parameter.data = parameter.data.to(self.base.dtype)
            self._whole = weights, model
        return self._whole[1]

    def interpolated(self, weights: Weights) -> Any:
        """Return a fully tuned model with base + lambda (tuned - base), in float32."""
        if (weights.folder / "config.json").exists():
            model = load_model(weights.folder, torch.float32)
        else:
            model = load_model(self.base.directory, torch.float32)
            load_weights(model, weights.folder)
        if weights.scale == 1:
            return model
        plain = self.base.model
        if self.base.dtype != torch.float32:
            plain = load_model(self.base.directory, torch.float32)
        base = dict(plain.named_parameters())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(torch.lerp(base[name], parameter, weights.scale))
        return model
