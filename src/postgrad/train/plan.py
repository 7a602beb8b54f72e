"""Every `auto` of the train section becomes a number, written to the resolved config. Pure."""

from collections.abc import Callable, Sequence

from postgrad.config import FullConfig, LoraConfig, Recipe, TrainConfig

ROWS_PER_BATCH = 16
EVALUATIONS = 10
CPU_MICRO_BATCH = 2048
"""Beyond two thousand tokens a CPU gains no speed, only memory grows (LOG.md, 2026-11-25)."""
GPU_MICRO_BATCH = 16384
ACTIVATION_SHARE = 0.5
"""Share of the free memory that activations may take."""
CHECKPOINT_SHARE = 0.8
"""Above this share the activations of the smallest micro-batch are recomputed instead of kept; the
rest is for gradients, optimizer and logits. Pre-flight then tries it."""


def auto_learning_rate(adapt: LoraConfig | FullConfig, parameters: int) -> float:
    """Return the default peak learning rate for a model of this size (see config.TrainConfig)."""
    if adapt.kind == "lora":
        return 1e-3 if parameters < 4e9 else 3e-4
    return 1e-5 if parameters <= 3.5e9 else 5e-6


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
    if micro == "auto":
        fitting = int(free_bytes * ACTIVATION_SHARE / bytes_per_token(checkpointing))
        preferred = GPU_MICRO_BATCH if on_gpu else CPU_MICRO_BATCH
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
