"""Every `auto` of the train section becomes the number its documentation promises."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postgrad.config import FullConfig, LoraConfig, TrainConfig
from postgrad.train import plan
from postgrad.train.plan import auto_eval_steps, auto_learning_rate, resolve_train


def resolve(lengths=(100,) * 40, *, free=10**10, on_gpu=False, per_token=10_000, **train):
    return resolve_train(
        TrainConfig(**train),
        LoraConfig(),
        parameters=135_000_000,
        lengths=lengths,
        free_bytes=free,
        bytes_per_token=lambda checkpointing: per_token // 10 if checkpointing else per_token,
        on_gpu=on_gpu,
        threads=2,
    )


@pytest.mark.parametrize(
    ("adapt", "parameters", "rate"),
    [
        (LoraConfig(), 135e6, 1e-3),
        (LoraConfig(), 3.9e9, 1e-3),
        (LoraConfig(), 8e9, 3e-4),
        (FullConfig(), 135e6, 1e-5),
        (FullConfig(), 3e9, 1e-5),
        (FullConfig(), 8e9, 5e-6),
    ],
)
def test_learning_rate_by_method_and_size(adapt, parameters, rate):
    assert auto_learning_rate(adapt, int(parameters)) == rate


def test_given_numbers_are_kept():
    found = resolve(learning_rate=2e-5, tokens_per_batch=777, micro_batch_tokens=33)
    assert (found.learning_rate, found.tokens_per_batch) == (2e-5, 777)
    assert (found.micro_batch_tokens, found.threads) == (33, 2)


@given(lengths=st.lists(st.integers(1, 5000), min_size=1, max_size=50), gpu=st.booleans())
def test_a_batch_is_sixteen_mean_rows_and_holds_the_longest(lengths, gpu):
    found = resolve(lengths, on_gpu=gpu)
    assert found.tokens_per_batch == max(max(lengths), round(16 * sum(lengths) / len(lengths)))
    assert max(lengths) <= found.micro_batch_tokens <= found.tokens_per_batch
    assert "auto" not in (found.learning_rate, found.threads)


def test_a_micro_batch_fits_in_half_the_free_memory():
    found = resolve([100] * 40, free=10_000 * 2 * 700)
    assert found.micro_batch_tokens == 700
    tight = resolve([100] * 40, free=10_000)
    assert tight.micro_batch_tokens == 100


@pytest.mark.parametrize("on_gpu", [False, True])
def test_activations_are_recomputed_only_when_the_longest_row_would_not_fit(on_gpu):
    row = 900 * 10_000  # bytes of the longest row
    lengths = [900, *[100] * 300]
    for free, checkpointing in ((row / 0.79, False), (row / 0.81, True), (10 * row, False)):
        found = resolve(lengths, free=int(free), on_gpu=on_gpu)
        assert found.gradient_checkpointing is checkpointing
    asked = resolve(lengths, free=row * 2, micro_batch_tokens=3600, on_gpu=on_gpu)
    assert (asked.gradient_checkpointing, asked.micro_batch_tokens) == (True, 3600)
    for choice in (True, False):
        kept = resolve(lengths, free=row, gradient_checkpointing=choice, on_gpu=on_gpu)
        assert kept.gradient_checkpointing is choice


def test_what_is_not_kept_leaves_room_for_larger_micro_batches():
    found = resolve([900] * 300, free=900 * 10_000, tokens_per_batch=100_000, on_gpu=True)
    assert found.gradient_checkpointing
    assert found.micro_batch_tokens == 4500


@pytest.mark.parametrize(
    ("on_gpu", "limit"), [(False, plan.CPU_MICRO_BATCH), (True, plan.GPU_MICRO_BATCH)]
)
def test_a_micro_batch_is_no_larger_than_the_machine_likes(on_gpu, limit):
    found = resolve([900] * 40, on_gpu=on_gpu, free=10**13, tokens_per_batch=100_000)
    assert found.micro_batch_tokens == limit


@given(steps=st.integers(1, 10_000))
def test_a_run_has_at_least_ten_evaluations_when_it_has_ten_steps(steps):
    every = auto_eval_steps(steps)
    assert every >= 1
    assert steps // every >= min(10, steps)
    assert steps // every < 20


@given(st.integers(1, 100_000), st.integers(64, 4096))
def test_micro_batches_of_a_step_are_as_few_as_possible_and_even(batch, most):
    found = plan.even_share(batch, most)
    assert found <= most
    assert found * -(-batch // most) >= batch  # no more passes than with the largest
    assert found <= 1.05 * batch / -(-batch // most) + 1
