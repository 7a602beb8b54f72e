"""A recipe, its rows and its model together: what training, doctor and the dry run share."""

import functools
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from postgrad.config import FullConfig, LoraConfig, Recipe, TrainConfig, why_not_eight_bit
from postgrad.data.batches import micro_batches
from postgrad.data.dataset import Dataset
from postgrad.data.lengths import first_reason, keep_chats, keep_usable
from postgrad.data.render import Renderer, Rendering
from postgrad.errors import DataError, TrainingError
from postgrad.estimate import activation_bytes_per_token
from postgrad.machine import available_cores
from postgrad.model import compiled, fp8, int8, lora
from postgrad.model.attention import training_attention
from postgrad.model.attention_probe import AttentionProbe, probe_attention
from postgrad.model.load import Loaded, device, load
from postgrad.train.base_answers import renderer_of
from postgrad.train.held_out import Validation
from postgrad.train.memory import available_bytes
from postgrad.train.plan import (
    auto_eval_steps,
    evaluation_tokens,
    resolve_train,
    with_eval_rows,
)
from postgrad.train.preflight import near_in_eight_bits, preflight
from postgrad.train.sft import SupervisedFineTuning, has_plain_head, why_apart
from postgrad.train.stream import Stream
from postgrad.types import Batch, Check, Dropped, Split, Tokens

PROBE_TOKENS = 1024
"""Tokens that are timed to choose threads, fewer where a step has fewer."""
PROBE_TURNS = 3
CALIBRATION_ROWS, CALIBRATION_TOKENS = 8, 512
"""Training rows, and tokens of each at most, on which the largest inputs of layers are found."""


@dataclass(frozen=True, slots=True)
class Session:
    """Everything `fit` needs, with every `auto` resolved but the packing verdict."""

    recipe: Recipe
    """Resolved."""
    loaded: Loaded
    """The model, adapters attached, every trained parameter in float32."""
    renderer: Renderer
    renderings: tuple[Rendering, ...]
    """Training and validation rows as rendered, nothing left out yet."""
    training: tuple[Tokens, ...]
    validation: tuple[Tokens, ...]
    dropped: tuple[Dropped, ...]
    """Rows cut or left out because of their length or template."""
    objective: SupervisedFineTuning
    apart: str = ""
    """Why a common beginning is not computed once; "" when it is, or the recipe says off."""
    not_eight_bit: str = ""
    """Why frozen weights are not multiplied in 8 bits; "" when they are, or the recipe says so."""
    attention_probe: AttentionProbe | None = None
    """What was measured at this start; None where the recipe says it or on a GPU."""

    @property
    def model(self) -> Any:
        """The Transformers model."""
        return self.loaded.model

    def attention(self) -> AbstractContextManager[None]:
        """Return a block inside which the model runs with packed attention."""
        limit = self.recipe.train.attention_bucket_tokens
        return training_attention(self.model, None if limit == "auto" else limit)

    def checks(self, data_checks: Sequence[Check]) -> tuple[Check, ...]:
        """Run pre-flight on this session."""
        micro = self.recipe.train.micro_batch_tokens
        assert isinstance(micro, int)
        with self.attention():
            return preflight(
                self.recipe,
                self.renderer,
                self.renderings,
                data_checks,
                self.model,
                self.objective,
                micro_batch_tokens=micro,
                precision=self.loaded.dtype,
            )

    def settled(self, checks: Sequence[Check]) -> "Session":
        """Return this session with `train.base_precision` decided by what was found in checks."""
        choice = self.recipe.train.base_precision
        if choice != "auto":
            return self
        reason = self.not_eight_bit
        if not near_in_eight_bits(checks):
            lora.drop_eight_bit(self.model)
            reason = "the check eight-bit-near found loss or gradient too far off"
        found = "int8" if lora.eight_bit_weights(self.model) else "model"
        settled = self.recipe.train.model_copy(update={"base_precision": found})
        return replace(_with(self, settled), not_eight_bit=reason)

    def stream(self, packed: bool, most: int | None = None) -> Stream:
        """Plan the training batches, those of the first `most` steps if that is given."""
        train = self.recipe.train
        assert isinstance(train.tokens_per_batch, int)
        assert isinstance(train.micro_batch_tokens, int)
        return Stream(
            self.training,
            epochs=train.num_train_epochs,
            tokens_per_batch=train.tokens_per_batch,
            micro_batch_tokens=train.micro_batch_tokens,
            packed=packed,
            seed=self.recipe.seed,
            max_steps=train.max_steps if most is None else most,
        )

    def held_out(self, packed: bool) -> Validation:
        """Lay out the validation rows."""
        micro = self.recipe.train.micro_batch_tokens
        assert isinstance(micro, int)
        tokens = evaluation_tokens(micro, device().type == "cuda")
        return Validation(self.validation, tokens, packed)


def open_session(recipe: Recipe, dataset: Dataset, loaded: Loaded | None = None) -> Session:
    """Load the model, attach the adapter, render the rows and resolve every `auto`.

    `loaded` takes the place of the recipe's model (a probe's has fewer layers).

    An `auto` that depends on the machine is measured only when it is still `auto`: a resumed run
    brings its own numbers.
    """
    torch.manual_seed(recipe.seed)
    recipe = with_eval_rows(recipe, len(dataset.of(Split.TRAIN)))
    loaded = loaded or load(recipe.model)
    renderer = renderer_of(loaded)
    adapt = recipe.model.adapt
    if isinstance(adapt, LoraConfig):
        lora.add_lora(loaded.model, adapt, recipe.seed)
    else:
        loaded.model.requires_grad_(True)
    renderings, rows, dropped = _rows(recipe, dataset, renderer)
    not_eight_bit = _use_eight_bit(recipe, loaded, rows[0])
    full_in_bf16 = isinstance(adapt, FullConfig) and loaded.dtype == torch.bfloat16
    recipe, apart = _sharing(recipe, loaded.model)
    objective = SupervisedFineTuning(
        has_plain_head(loaded.model),
        autocast=full_in_bf16,
        share_prefix=recipe.train.shared_prefix == "on",
        kl_weight=recipe.train.kl_weight,
    )
    given = (recipe, loaded, renderer, renderings, rows[0], rows[1], dropped, objective)
    return _resolved(Session(*given, apart=apart, not_eight_bit=not_eight_bit))


def _use_eight_bit(recipe: Recipe, loaded: Loaded, rows: Sequence[Tokens]) -> str:
    """Have the frozen weights in 8 bits too, for training steps, where the recipe says so.

    Returns why `auto` does not; "" when it does, or when the recipe decides.
    """
    model, choice = loaded.model, recipe.train.base_precision
    if choice == "model":
        return ""
    if choice == "auto" and (reason := _why_not_int8(recipe, model)):
        return reason
    problem = fp8.why_not(model.device) if choice == "fp8" else int8.why_not(model.device)
    if choice == "fp8" and not problem and loaded.dtype != torch.bfloat16:
        problem = f"the model computes in {loaded.dtype}, float8 stands in for bf16"
    if not problem:
        if choice == "fp8":
            lora.use_eight_bit(model, "fp8")
        else:
            lora.use_eight_bit(model, "int8", _largest_inputs(model, rows))
        if not lora.eight_bit_weights(model):
            problem = "no layer with an adapter has a size that it can be multiplied in"
    if problem:
        raise TrainingError(
            f"train.base_precision is {choice}, but {problem}",
            "set it to auto or model; int8 is for CPUs, fp8 for GPUs of Ada, Hopper or later",
        )
    return ""


def _why_not_int8(recipe: Recipe, model: Any) -> str:
    """Return what excludes int8, or that a trial does not show it faster; "" when it pays."""
    excluded = why_not_eight_bit(recipe.train, recipe.model)
    if reason := excluded or int8.why_not(model.device):
        return f"int8 {reason}" if excluded else reason
    layers = lora.lora_layers(model).values()
    largest = max((layer.base.weight for layer in layers), key=Tensor.numel)
    return "" if int8.pays(largest) else "a trial of the largest layer does not show int8 faster"


def _largest_inputs(model: Any, rows: Sequence[Tokens]) -> dict[str, Tensor]:
    """Return layer -> the largest value of each input channel [in], on a few training rows."""
    few = rows[:: max(1, len(rows) // CALIBRATION_ROWS)][:CALIBRATION_ROWS]
    with torch.no_grad(), int8.watched_inputs(lora.lora_layers(model)) as largest:
        for row in few:
            ids = torch.from_numpy(row.ids[:CALIBRATION_TOKENS]).long()
            model.base_model(ids.unsqueeze(0))  # no logits
    return largest


def _sharing(recipe: Recipe, model: Any) -> tuple[Recipe, str]:
    """Resolve train.shared_prefix; returns also why a common beginning is not computed once."""
    choice = recipe.train.shared_prefix
    apart = "" if choice == "off" else why_apart(model)
    if choice == "on" and apart:
        raise TrainingError(
            f"train.shared_prefix is on, which this model does not allow: {apart}",
            "set it to auto or off",
        )
    resolved = "off" if choice == "off" or apart else "on"
    train = recipe.train.model_copy(update={"shared_prefix": resolved})
    return recipe.model_copy(update={"train": train}), apart


def _checkpoint_activations(model: Any) -> None:
    """Recompute activations in the backward pass; Transformers renamed the switch on the way."""
    renamed = getattr(model, "activation_checkpointing_enable", None)
    (renamed or model.gradient_checkpointing_enable)({"use_reentrant": False})


def _rows(
    recipe: Recipe, dataset: Dataset, renderer: Renderer
) -> tuple[tuple[Rendering, ...], tuple[tuple[Tokens, ...], ...], tuple[Dropped, ...]]:
    found: list[Rendering] = []
    rows: list[tuple[Tokens, ...]] = []
    dropped: list[Dropped] = []
    for split in (Split.TRAIN, Split.VALIDATION):
        rendered = renderer.inspect_all(dataset.of(split))
        kept, lost = keep_usable(rendered, recipe.data)
        tokens = tuple(r.tokens for r in kept if r.tokens is not None)
        if not tokens:
            raise DataError(
                f"no {split} row is left (all {len(rendered)} were dropped for their length "
                f"or refused by the chat template; the first: {first_reason(lost)})",
                f"raise data.max_length (now {recipe.data.max_length}) or correct the rows",
            )
        if split is Split.VALIDATION and recipe.train.eval_rows is not None:
            assert recipe.train.eval_rows != "auto"
            tokens = _sample(tokens, recipe.train.eval_rows, recipe.data_seed)
        if split is Split.TRAIN and dataset.replay:
            chats = renderer.inspect_all(dataset.replay)
            extra, unusable = keep_chats(chats, recipe.data.max_length)
            rendered, lost = [*rendered, *extra], [*lost, *unusable]
            tokens += tuple(r.tokens for r in extra if r.tokens is not None)
        found += rendered
        rows.append(tokens)
        dropped += lost
    return tuple(found), tuple(rows), tuple(dropped)


def _sample(rows: tuple[Tokens, ...], limit: int, seed: int) -> tuple[Tokens, ...]:
    if len(rows) <= limit:
        return rows
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(rows), generator=generator)[:limit].sort().values.tolist()
    return tuple(rows[index] for index in chosen)


def _resolved(session: Session) -> Session:
    recipe, loaded = session.recipe, session.loaded
    config = loaded.model.config.get_text_config()
    per_token = functools.partial(
        activation_bytes_per_token,
        config.hidden_size,
        getattr(config, "intermediate_size", 4 * config.hidden_size),
        config.num_hidden_layers,
        loaded.dtype.itemsize,
    )
    lengths = [len(row) for row in (*session.training, *session.validation)]
    train = resolve_train(
        recipe.train,
        recipe.model.adapt,
        parameters=loaded.parameters,
        lengths=lengths,
        free_bytes=available_bytes(device()),
        bytes_per_token=per_token,
        on_gpu=device().type == "cuda",
        threads=1 if recipe.train.threads == "auto" else recipe.train.threads,
    )
    if train.gradient_checkpointing:
        _checkpoint_activations(loaded.model)
    session = _with(session, train)
    threads = recipe.train.threads
    if threads == "auto":
        threads = 1 if device().type == "cuda" else fastest_threads(session)
    torch.set_num_threads(threads)
    session = _with_attention(_with(session, train.model_copy(update={"threads": threads})))
    steps = len(session.stream(packed=True))
    every = train.eval_steps if train.eval_steps != "auto" else auto_eval_steps(steps)
    compiling = _compiling(session)
    compiled.switch(compiling)
    found = {"eval_steps": every, "torch_compile": compiling, "cuda_graphs": _graphs(train)}
    return _with(session, session.recipe.train.model_copy(update=found))


def _compiling(session: Session) -> bool:
    """Whether definitions are compiled for the device: when asked for, or when it pays."""
    choice = session.recipe.train.torch_compile
    if choice == "auto":
        return compiled.available() and compiled.pays(predicted_seconds(session))
    if choice and not compiled.available():
        raise TrainingError(
            "train.torch_compile is true, but there is no CUDA device with Triton here",
            "set it to auto or false",
        )
    return choice


def _graphs(train: TrainConfig) -> bool:
    """Whether micro-batches are recorded as graphs; recomputing reads the state of a generator."""
    reason = ""
    if train.packing == "off":
        reason = "train.packing is off, and only packed rows are recorded"
    elif device().type != "cuda":
        reason = "there is no CUDA device here"
    elif train.gradient_checkpointing:
        reason = "activations are recomputed"
    if train.cuda_graphs is True and reason:
        raise TrainingError(f"train.cuda_graphs is true, but {reason}", "set it to auto or false")
    return bool(train.cuda_graphs) and not reason


def _with_attention(session: Session) -> Session:
    """Measure up to which length documents are bucketed; nothing is bucketed on a GPU."""
    train, probe = session.recipe.train, None
    if train.attention_bucket_tokens != "auto":
        return session
    if device().type == "cpu":
        config = session.model.config.get_text_config()
        heads = config.num_attention_heads
        probe = probe_attention(
            max(len(row) for row in (*session.training, *session.validation)),
            heads,
            getattr(config, "num_key_value_heads", None) or heads,
            getattr(config, "head_dim", None) or config.hidden_size // heads,
            torch.bfloat16 if session.objective.autocast else session.loaded.dtype,
        )
    limit = probe.limit if probe else 0
    session = _with(session, train.model_copy(update={"attention_bucket_tokens": limit}))
    return replace(session, attention_probe=probe)


def _with(session: Session, train: Any) -> Session:
    return replace(session, recipe=session.recipe.model_copy(update={"train": train}))


def fastest_threads(session: Session) -> int:
    """Time one real micro-batch with all, half and one of the cores; more must earn their place.

    Two threads can be slower than one on a busy machine: OpenMP barriers wait for the slowest. The
    choices take turns, so that what else runs for a second does not decide for the whole run.
    """
    cores = available_cores()
    batch = _probe_batch(session)
    times = dict.fromkeys(sorted({1, max(1, cores // 2), cores}), 0.0)
    with session.attention():
        for turn in range(PROBE_TURNS):
            for threads, best in times.items():
                if turn and best > 2 * min(times.values()):
                    continue
                torch.set_num_threads(threads)
                seconds = _seconds(session, batch)
                times[threads] = min(best, seconds) if turn else seconds
    session.model.zero_grad(set_to_none=True)
    return min(times, key=lambda threads: times[threads])


def predicted_seconds(session: Session) -> float:
    """Return how long all training steps take, from one real micro-batch, uncompiled.

    Zero when it does not fit in memory: pre-flight will say so.
    """
    compiled.switch(False)
    stream = session.stream(packed=True)
    batch = stream.step(0)[0]
    try:
        with session.attention():
            seconds = min(_seconds(session, batch) for _ in range(2))
    except torch.OutOfMemoryError:
        return 0.0
    finally:
        session.model.zero_grad(set_to_none=True)
    return stream.tokens * seconds / batch.tokens


def _probe_batch(session: Session) -> Batch:
    """A micro-batch of the first training rows, or about a thousand tokens of it."""
    micro = session.recipe.train.micro_batch_tokens
    assert isinstance(micro, int)
    most = min(PROBE_TOKENS, micro)
    rows: list[Tokens] = []
    for row in session.training:
        rows.append(row)
        if sum(map(len, rows)) >= most:
            break
    return micro_batches(rows, max(most, max(map(len, rows))), packed=True)[0]


def _seconds(session: Session, batch: Batch) -> float:
    began = time.perf_counter()
    session.model.train()
    total = session.objective(session.model, batch).total
    total.backward()
    if total.is_cuda:
        torch.cuda.synchronize(total.device)
    session.model.eval()
    return time.perf_counter() - began
