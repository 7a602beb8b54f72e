"""Every `auto` of the train section becomes a number, written to the resolved config. Pure."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from postgrad.config import FullConfig, LoraConfig, Recipe, TrainConfig
from postgrad.train.stopping import HeldOut, paired_difference

ROWS_PER_BATCH = 16
EVALUATIONS = 10
CPU_MICRO_BATCH = 2048
"""Beyond two thousand tokens a CPU gains no speed, only memory grows (LOG.md, 2026-11-25)."""
GPU_MICRO_BATCH = 16384
UNEVEN = 1.05
"""Room for documents that do not divide evenly over the micro-batches of a step."""
ACTIVATION_SHARE = 0.5
"""Share of the free memory that activations may take."""
CHECKPOINT_SHARE = 0.8
"""Above this share the activations of the smallest micro-batch are recomputed instead of kept; the
rest is for gradients, optimizer and logits. Pre-flight then tries it."""

EVALUATION_FACTOR = 4
"""So many times the tokens of a micro-batch fit where nothing is kept for a backward pass."""

PROBE_FACTORS = (1 / 3, 1.0, 3.0)
"""Multiples of the automatic learning rate that a probe tries."""
PROBE_SHARE, FEWEST_PROBE_STEPS = 0.1, 20
"""Share of the steps for which each is tried, and the number below which that says little."""


def auto_learning_rate(adapt: LoraConfig | FullConfig, parameters: int) -> float:
    """Return the default peak learning rate for a model of this size (see config.TrainConfig)."""
    if adapt.kind == "lora":
        return 1e-3 if parameters < 4e9 else 3e-4
    return 1e-5 if parameters <= 3.5e9 else 5e-6


def even_share(batch: int, most: int) -> int:
    """Return the tokens of a micro-batch when a step takes as few as possible, of equal size.

    As many passes as with `most` tokens in each, and less memory.

    >>> even_share(2000, 2048), even_share(2709, 2048)
    (2000, 1423)
    """
    passes = math.ceil(batch / most)
    return batch if passes == 1 else min(most, math.ceil(UNEVEN * batch / passes))


def resolve_train(
    config: TrainConfig,
    adapt: LoraConfig | FullConfig,
    *,
    parameters: int,
    lengths: Sequence[int],
    free_bytes: int,
    bytes_per_token: Callable[[bool], int],
    on_gpu: bool,
    threads: int,
) -> TrainConfig:
    """Return `config` with the `auto` of rate, sizes and checkpointing replaced by values.

    `bytes_per_token` says what is kept for the backward pass, without and with checkpointing.
    """
    longest, mean = max(lengths), sum(lengths) / len(lengths)
    rate = config.learning_rate
    batch = config.tokens_per_batch
    micro = config.micro_batch_tokens
    if batch == "auto":
        batch = max(longest, round(ROWS_PER_BATCH * mean))
    checkpointing = config.gradient_checkpointing
    if checkpointing == "auto":
        smallest = longest if micro == "auto" else max(longest, micro)
        checkpointing = smallest * bytes_per_token(False) > free_bytes * CHECKPOINT_SHARE
    assert isinstance(batch, int)
    if micro == "auto":
        fitting = int(free_bytes * ACTIVATION_SHARE / bytes_per_token(checkpointing))
        preferred = GPU_MICRO_BATCH if on_gpu else even_share(batch, CPU_MICRO_BATCH)
        micro = max(longest, min(batch, fitting, preferred))
    return config.model_copy(
        update={
            "learning_rate": auto_learning_rate(adapt, parameters) if rate == "auto" else rate,
            "tokens_per_batch": batch,
            "micro_batch_tokens": micro,
            "gradient_checkpointing": checkpointing,
            "threads": threads,
        }
    )


def auto_eval_rows(training_rows: int, epochs: float) -> int:
    """Return how many validation rows keep the evaluations at about a sixth of the training time.

    >>> auto_eval_rows(3000, 2)
    300
    """
    return min(2000, max(200, round(training_rows * epochs / 20)))


def with_eval_rows(recipe: Recipe, training_rows: int) -> Recipe:
    """Return the recipe with a number for train.eval_rows where it is `auto`."""
    if recipe.train.eval_rows != "auto":
        return recipe
    rows = auto_eval_rows(training_rows, recipe.train.num_train_epochs)
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"eval_rows": rows})})


def auto_eval_steps(steps: int) -> int:
    """Return the interval that gives ten evaluations in a run of `steps`.

    >>> auto_eval_steps(104)
    10
    """
    return max(1, steps // EVALUATIONS)


def evaluation_tokens(micro_batch_tokens: int, on_gpu: bool) -> int:
    """Return the tokens of a forward pass over held-out rows, which keeps no activations.

    >>> [evaluation_tokens(micro, on_gpu=False) for micro in (100, 470, 2048, 4096)]
    [400, 1880, 2048, 4096]
    """
    preferred = GPU_MICRO_BATCH if on_gpu else CPU_MICRO_BATCH
    return max(micro_batch_tokens, min(EVALUATION_FACTOR * micro_batch_tokens, preferred))


def probe_steps(steps: int) -> int:
    """Return for how many steps of a run of `steps` each learning rate is tried.

    >>> [probe_steps(steps) for steps in (8, 100, 1000)]
    [8, 20, 100]
    """
    return min(steps, max(FEWEST_PROBE_STEPS, round(PROBE_SHARE * steps)))


@dataclass(frozen=True, slots=True)
class TriedRate:
    """A learning rate and where it led in the steps of a probe."""

    rate: float
    loss: float | None
    """Held-out loss, nats per token; None where the training broke down."""
    behind: float | None = None
    """How much worse than the best, nats per token."""
    error: float | None = None
    """Standard error of that, paired by row."""
    problem: str = ""
    """Why the training broke down."""


def choose_rate(found: Sequence[tuple[float, HeldOut | None]]) -> tuple[float, list[TriedRate]]:
    """Return the smallest rate that the best one does not beat by more than a standard error.

    The smaller of equals moves the weights less, and so forgets less. `found` holds a rate and its
    held-out evaluation, None where training broke down; at least one did not.
    """
    usable = [(rate, held) for rate, held in found if held is not None]
    _, best = min(usable, key=lambda pair: (pair[1].loss, pair[0]))
    tried, chosen = [], math.inf
    for rate, held in found:
        if held is None:
            tried.append(TriedRate(rate, None))
            continue
        behind, error = paired_difference(held, best)
        error = 0.0 if math.isinf(error) else error  # one row: its noise is unknown
        if behind <= error:
            chosen = min(chosen, rate)
        tried.append(TriedRate(rate, held.loss, behind, error))
    return chosen, tried
