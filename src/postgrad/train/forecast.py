"""What a recipe will take, before anything is trained: rows counted, sizes read, no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from postgrad import machine
from postgrad.config import LoraConfig, Recipe, why_not_eight_bit
from postgrad.data.dataset import Dataset
from postgrad.data.lengths import keep_chats, keep_usable
from postgrad.data.render import Renderer
from postgrad.errors import DataError
from postgrad.estimate import (
    NOTHING,
    Amount,
    Method,
    Shape,
    Speed,
    activation_bytes_per_token,
    amount_of,
    costs,
    flops,
    memory,
    read_shape,
)
from postgrad.model.directory import end_token_ids, read_settings
from postgrad.prices import load_prices
from postgrad.train.plan import (
    PROBE_FACTORS,
    auto_eval_steps,
    probe_steps,
    resolve_train,
    with_eval_rows,
)
from postgrad.train.probe_rows import check_given_chats
from postgrad.train.stream import Stream
from postgrad.types import Split, Tokens

COVERS = (
    "training, its held-out losses with what a retention floor asks and a learning-rate probe, if "
    "it does not stop early; "
    "pre-flight, evaluation by generation (with evaluate.dial, of every point) and the report come "
    "on top"
)


@dataclass(frozen=True, slots=True)
class Forecast:
    """A recipe's amount of work."""

    recipe: Recipe
    """Every `auto` resolved but `threads` and `packing`."""
    shape: Shape
    method: Method
    parameters: int
    """Of the model, without adapters."""
    rows: dict[str, int]
    epoch: Amount
    """One pass over the training rows."""
    training: Amount
    """All passes."""
    steps: int
    held_out: Amount
    """All held-out losses together."""
    evaluations: int
    micro_batch: Amount
    """The largest forward pass."""
    on_gpu: bool
    probe: Amount
    """All tries of train.learning_rate: probe; nothing without."""
    probe_steps: int
    retention: Amount = NOTHING
    """What train.early_stopping.retention_floor asks at all evaluations together."""

    @property
    def read(self) -> Amount:
        """Return what is only read: held-out losses and items."""
        return self.held_out + self.retention


def count(
    recipe: Recipe,
    training: Sequence[Tokens],
    validation: Amount,
    shape: Shape,
    method: Method,
    *,
    parameters: int,
    rows: dict[str, int],
    on_gpu: bool,
    watched: Amount = NOTHING,
) -> Forecast:
    """Plan the steps of a resolved recipe and add up what they compute on.

    Args:
        recipe: With numbers in `train`, except `eval_steps`, which may be `auto`.
        training: Rendered rows.
        validation: The rows of one held-out loss.
        shape: Of the model.
        method: What is trained.
        parameters: Of the model, without adapters.
        rows: Rows by split, for the reader.
        on_gpu: Where.
        watched: What train.early_stopping.retention_floor asks at one evaluation.
    """
    train = recipe.train
    assert isinstance(train.tokens_per_batch, int)
    assert isinstance(train.micro_batch_tokens, int)
    stream = Stream(
        training,
        epochs=train.num_train_epochs,
        tokens_per_batch=train.tokens_per_batch,
        micro_batch_tokens=train.micro_batch_tokens,
        packed=True,
        seed=recipe.seed,
        max_steps=train.max_steps,
    )
    documents = [(len(row), int((row.weights > 0).sum())) for row in training]
    steps = [amount_of(documents[index] for index in step) for step in stream.plan]
    parts = ((step.tokens, step.supervised, step.pairs) for step in steps)
    total = Amount(*map(sum, zip(*parts, strict=True)))
    probed = probe_steps(len(stream)) if train.learning_rate == "probe" else 0
    parts = ((step.tokens, step.supervised, step.pairs) for step in steps[:probed])
    probe = Amount(*map(sum, zip((0, 0, 0), *parts, strict=True))) * len(PROBE_FACTORS)
    every = train.eval_steps if train.eval_steps != "auto" else auto_eval_steps(len(stream))
    watching = -(-len(stream) // every) + 1  # before, after the last step
    evaluations = watching + 1  # after restoring
    if probed:
        evaluations += 1 + len(PROBE_FACTORS)
    fullest = max(steps, key=lambda step: step.tokens)
    return Forecast(
        recipe.model_copy(update={"train": train.model_copy(update={"eval_steps": every})}),
        shape,
        method,
        parameters,
        rows,
        amount_of(documents),
        total,
        len(stream),
        validation * evaluations,
        evaluations,
        fullest * min(1.0, train.micro_batch_tokens / fullest.tokens),
        on_gpu,
        probe,
        probed * len(PROBE_FACTORS),
        watched * watching,
    )


def forecast(
    recipe: Recipe, dataset: Dataset, directory: Path, tokenizer: Any, watched: Amount = NOTHING
) -> Forecast:
    """Count a recipe from its rows, its tokenizer and the model's config.json.

    `watched` is what train.early_stopping.retention_floor asks at one evaluation.

    Raises:
        DataError: No row is left to train on.
        ModelError: A model whose sizes cannot be read.
    """
    card = machine.gpu()
    shape = read_shape(read_settings(directory, "config.json", required=True))
    native_bf16 = card.has_bf16 if card else machine.has_native_bf16()
    method = _method(recipe, shape, native_bf16, on_gpu=card is not None)
    recipe = with_eval_rows(recipe, len(dataset.of(Split.TRAIN)))
    renderer = Renderer(tokenizer, eos_token_ids=end_token_ids(directory))
    check_given_chats(renderer, recipe)
    training, validation = (
        _rendered(recipe, dataset, renderer, split) for split in (Split.TRAIN, Split.VALIDATION)
    )
    wanted = recipe.train.eval_rows
    assert wanted != "auto"
    share = 1.0 if wanted is None else min(1.0, wanted / len(validation))
    train = resolve_train(
        recipe.train,
        recipe.model.adapt,
        parameters=shape.parameters,
        lengths=[len(row) for row in (*training, *validation)],
        free_bytes=card.free_bytes if card else machine.available_memory_bytes(),
        bytes_per_token=partial(
            activation_bytes_per_token,
            shape.hidden,
            shape.intermediate,
            shape.layers,
            method.compute_bytes,
        ),
        on_gpu=card is not None,
        threads=1 if recipe.train.threads == "auto" else recipe.train.threads,
    )
    train = train.model_copy(update={"threads": recipe.train.threads})
    method = replace(method, checkpointing=bool(train.gradient_checkpointing))
    return count(
        recipe.model_copy(update={"train": train}),
        training,
        amount_of((len(r), int((r.weights > 0).sum())) for r in validation) * share,
        shape,
        method,
        parameters=shape.parameters,
        rows=row_counts(dataset),
        on_gpu=card is not None,
        watched=watched,
    )


def row_counts(dataset: Dataset) -> dict[str, int]:
    """Return the rows of every split that has any."""
    rows = {str(split): len(dataset.of(split)) for split in Split if dataset.of(split)}
    return rows | ({"replay": len(dataset.replay)} if dataset.replay else {})


def _method(recipe: Recipe, shape: Shape, native_bf16: bool, on_gpu: bool) -> Method:
    """Return what the recipe trains; whether activations are kept is decided later.

    On a CPU `train.base_precision: auto` is taken for int8: the larger of its two choices.
    """
    adapt, precision = recipe.model.adapt, recipe.model.precision
    narrow = precision == "bf16" or (precision == "auto" and native_bf16)
    if not isinstance(adapt, LoraConfig):
        trainable, copies = shape.parameters, 0
    else:
        kind = recipe.train.base_precision
        if kind == "auto":
            kind = "model" if on_gpu or why_not_eight_bit(recipe.train, recipe.model) else "int8"
        trainable = shape.adapter_parameters(adapt.r, adapt.target_modules)
        copies = 0 if kind == "model" else shape.eight_bit_bytes(kind, adapt.target_modules)
    return Method(
        trainable=trainable,
        full=not isinstance(adapt, LoraConfig),
        compute_bytes=2 if narrow else 4,
        beside_base=recipe.train.kl_weight > 0,
        eight_bit_bytes=copies,
    )


def _rendered(recipe: Recipe, dataset: Dataset, renderer: Renderer, split: Split) -> list[Tokens]:
    kept, _ = keep_usable(renderer.inspect_all(dataset.of(split)), recipe.data)
    if split is Split.TRAIN and dataset.replay:
        kept += keep_chats(renderer.inspect_all(dataset.replay), recipe.data.max_length)[0]
    rows = [rendering.tokens for rendering in kept if rendering.tokens is not None]
    if not rows:
        raise DataError(
            f"no {split} row is left", "run `postgrad doctor RECIPE` to see why rows are dropped"
        )
    return rows


def document(work: Forecast, speed: Speed, peak_bytes: int | None = None) -> dict[str, Any]:
    """Return what `estimate` and `--dry-run` print; `peak_bytes` is a measured peak."""
    recipe, report = work.recipe, work.recipe.report
    train = recipe.train
    computed = work.training + work.probe
    seconds = speed.seconds(computed, work.read, work.steps + work.probe_steps)
    shares = recipe.evaluate.learning_curve
    curve = speed.seconds(
        work.training * sum(shares), work.read * len(shares), round(work.steps * sum(shares))
    )
    parts = memory(
        work.shape,
        work.method,
        work.micro_batch,
        parameters=work.parameters,
        on_gpu=work.on_gpu,
    )
    card = machine.gpu() if work.on_gpu else None
    prices = load_prices(report.prices)
    return {
        "rows": work.rows,
        "tokens_per_epoch": work.epoch.tokens,
        "tokens": work.training.tokens,
        "supervised_tokens": work.training.supervised,
        **({"learning_rate_probe_tokens": work.probe.tokens} if work.probe.tokens else {}),
        "steps": work.steps,
        "tokens_per_batch": train.tokens_per_batch,
        "micro_batch_tokens": train.micro_batch_tokens,
        "learning_rate": train.learning_rate,
        "threads": train.threads,
        "evaluations": work.evaluations,
        "validation_tokens": work.held_out.tokens // work.evaluations,
        **({"retention_floor_tokens": work.retention.tokens} if work.retention.tokens else {}),
        "trainable_parameters": work.method.trainable,
        "total_parameters": work.parameters + (0 if work.method.full else work.method.trainable),
        "flops": flops(work.shape, work.method, computed, work.read),
        "tokens_per_second": round(speed.tokens_per_second, 1),
        "train_seconds": round(seconds, 1),
        **({"learning_curve_seconds": round(curve, 1)} if shares else {}),
        "time_source": speed.source,
        "time_detail": speed.detail,
        "time_covers": COVERS,
        "memory": {name: value for name, value in parts.items() if name != "peak_bytes"},
        "peak_memory_bytes": parts["peak_bytes"] if peak_bytes is None else peak_bytes,
        "peak_memory_source": "formula" if peak_bytes is None else "measured",
        "available_memory_bytes": card.free_bytes if card else machine.available_memory_bytes(),
        "cost": costs(
            prices,
            seconds=seconds,
            machine=card.name if card else machine.hardware()["processor"],
            watts=_watts(prices.watts, card),
            price_per_hour=report.price_per_hour,
            currency=report.currency,
            tokens=computed.tokens,
            held_out_tokens=work.held_out.tokens,
            parameters=work.parameters,
        ),
    }


def _watts(given: float | None, card: machine.Gpu | None) -> tuple[float, str] | None:
    """Return the power while training and who says so."""
    if given is not None:
        return given, "watts in the prices file"
    if card is not None:
        return None if card.watts is None else (card.watts, "power limit of the GPU")
    limit = machine.processor_watts()
    return None if limit is None else (limit, "power limit of the processor")
