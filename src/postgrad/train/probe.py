"""Timing a real micro-batch: of the whole model for the dry run, of a few layers for a probe."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from postgrad.config import Recipe
from postgrad.data.dataset import Dataset
from postgrad.estimate import NOTHING, Amount, Method, Speed, amount_of, read_shape
from postgrad.model.load import Loaded, compute_dtype, device, load_tokenizer, quiet_transformers
from postgrad.model.lora import eight_bit_weights
from postgrad.train.forecast import Forecast, count, document, row_counts
from postgrad.train.memory import peak_memory
from postgrad.train.optimizer import make_optimizer, trainable
from postgrad.train.session import Session, open_session
from postgrad.types import Split

REPETITIONS = 3
QUIET_SHARE = 0.6
"""Share of the processor time its threads ask for that a timing gets at least when alone."""
ROWS = {Split.TRAIN: 256, Split.VALIDATION: 8}
"""Rows that a probe renders."""
DEPTHS = (1, 4)
"""Layers of the two models whose difference gives the time of a layer."""


@dataclass(frozen=True, slots=True)
class Timing:
    """One micro-batch and one step of the optimizer."""

    tokens: int
    seconds: float
    """Forward and backward, the best of several."""
    step_seconds: float
    peak_bytes: int
    processor_share: float
    """Processor time of all threads, of what they would have had alone."""

    def speed(self, source: str, detail: str, seconds: float, step_seconds: float) -> Speed:
        """Return the speed at `seconds` a micro-batch; says so when the machine was busy."""
        busy = device().type == "cpu" and self.processor_share < QUIET_SHARE
        if busy:
            detail += f"; BUSY machine, {self.processor_share:.0%} of the processor: too slow"
        return Speed(self.tokens / seconds, source, detail, step_seconds, busy)


def time_session(session: Session) -> Timing:
    """Run the first micro-batch of a session, forward, backward and optimizer; nothing moves.

    The optimizer runs with learning rate zero, so that its state is allocated and its time counted.
    """
    batch = session.stream(packed=True).step(0)[0]
    optimizer = make_optimizer(session.model, session.recipe.train, 0.0)
    seconds, steps = [], []
    session.model.train()
    began, spent = time.perf_counter(), time.process_time()
    with session.attention(), peak_memory(device()) as memory:
        for _ in range(REPETITIONS):
            optimizer.zero_grad(set_to_none=True)
            seconds.append(
                _seconds(lambda: session.objective(session.model, batch).total.backward())
            )
            steps.append(_seconds(optimizer.step))
    session.model.eval()
    optimizer.zero_grad(set_to_none=True)
    wanted = (time.perf_counter() - began) * torch.get_num_threads()
    share = (time.process_time() - spent) / wanted
    return Timing(batch.tokens, min(seconds), min(steps), memory.bytes, share)


def _seconds(work: Any) -> float:
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def dry_run(session: Session, dataset: Dataset, watched: Amount = NOTHING) -> dict[str, Any]:
    """Return what this session takes, without training: counted, and measured on a real batch.

    `watched` is what train.early_stopping.retention_floor asks at one evaluation.
    """
    trained = sum(p.numel() for p in trainable(session.model).values())
    recipe, full = session.recipe, session.recipe.model.adapt.kind == "full"
    recompute, eight_bit = bool(recipe.train.gradient_checkpointing), recipe.train.base_precision
    work = count(
        recipe,
        session.training,
        amount_of((len(row), int((row.weights > 0).sum())) for row in session.validation),
        read_shape(session.model.config.to_dict()),
        Method(
            trained,
            full,
            session.loaded.dtype.itemsize,
            recompute,
            recipe.train.kl_weight > 0,
            eight_bit_bytes=eight_bit_weights(session.model) * (2 if eight_bit == "fp8" else 1),
        ),
        parameters=session.loaded.parameters - (0 if full else trained),
        rows=row_counts(dataset),
        on_gpu=device().type == "cuda",
        watched=watched,
    )
    timing = time_session(session)
    what = f"one real micro-batch of {timing.tokens} tokens, timed just now"
    speed = timing.speed("micro-batch", what, timing.seconds, timing.step_seconds)
    return document(work, speed, timing.peak_bytes)


def probe(work: Forecast, dataset: Dataset, directory: Path) -> Speed:
    """Time models of one and of four layers with random weights; return the speed of the whole.

    Everything else is real: shape, adapter, precision, attention, loss, rows. What a layer adds is
    multiplied by the layers of the model; embedding, head and loss are counted once.
    """
    layers = work.shape.layers
    shallow, deep = (min(depth, layers) for depth in DEPTHS)
    examples = tuple(e for s, n in ROWS.items() for e in dataset.of(s)[:n])
    few = replace(dataset, examples=examples, replay=())
    deeper, recipe = _timed(work.recipe, few, directory, deep)
    base, _ = _timed(recipe, few, directory, shallow)
    spread = max(1, deep - shallow)
    seconds = base.seconds + (layers - shallow) * (deeper.seconds - base.seconds) / spread
    optimizer = (
        base.step_seconds + (layers - shallow) * (deeper.step_seconds - base.step_seconds) / spread
    )
    seconds, optimizer = max(seconds, deeper.seconds), max(optimizer, deeper.step_seconds)
    what = (
        f"{shallow} and {deep} layers of this shape with random weights, {base.tokens} tokens, "
        f"{recipe.train.threads} thread(s), scaled to {layers} layers"
    )
    return deeper.speed("probe", what, seconds, optimizer)


def _timed(recipe: Recipe, few: Dataset, directory: Path, layers: int) -> tuple[Timing, Recipe]:
    """Return the timing, and the recipe with the threads that were found to be fastest."""
    session = open_session(recipe, few, _random_model(recipe, directory, layers)).settled(())
    return time_session(session), session.recipe


def _random_model(recipe: Recipe, directory: Path, layers: int) -> Loaded:
    config = AutoConfig.from_pretrained(directory)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    dtype = compute_dtype(recipe.model.precision)
    full = recipe.model.adapt.kind == "full"
    with quiet_transformers():
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32 if full else dtype, attn_implementation="sdpa"
        )
    model.requires_grad_(full)
    tokenizer = load_tokenizer(directory, recipe.model.chat_template)
    return Loaded(model.to(device()).eval(), tokenizer, directory, dtype)
