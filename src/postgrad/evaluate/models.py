"""The base and the tuned model of a run, loaded when first asked for; one copy when it is LoRA."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from postgrad.config import LoraConfig, Recipe
from postgrad.data.render import Renderer
from postgrad.model import lora
from postgrad.model.load import Loaded, load, load_model
from postgrad.run import Run

TUNED = "tuned"


class Models:
    """Gives out the model of an arm; nothing is loaded before."""

    def __init__(self, run: Run, recipe: Recipe) -> None:
        """Take the run whose export folder holds the tuned model."""
        self._run, self._recipe = run, recipe
        self._adapted = False

    @property
    def has_tuned(self) -> bool:
        """Whether the run has a tuned model."""
        return any((self._run.export / name).exists() for name in ("adapter", "model"))

    @cached_property
    def base(self) -> Loaded:
        """The base model as loaded; with LoRA the adapter may be attached: use `arm`."""
        return load(self._recipe.model)

    @cached_property
    def renderer(self) -> Renderer:
        """The chat template with the base model's stop tokens."""
        eos = self.base.model.generation_config.eos_token_id
        eos_ids = [eos] if isinstance(eos, int) else list(eos or [])
        return Renderer(self.base.tokenizer, eos_token_ids=eos_ids)

    @cached_property
    def _full(self) -> Any:
        return load_model(self._run.export / "model", self.base.dtype)

    @contextmanager
    def arm(self, name: str) -> Iterator[Any]:
        """Yield the tuned model for the arm `tuned`, the base model for every other."""
        if name != TUNED:
            with lora.disabled(self.base.model):
                yield self.base.model
        elif isinstance(self._recipe.model.adapt, LoraConfig):
            if not self._adapted:
                lora.attach_adapter(self.base.model, self._run.export / "adapter")
                self.base.model.eval()
                self._adapted = True
            yield self.base.model
        else:
            yield self._full
