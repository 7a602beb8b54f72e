"""Batched generation gives what Transformers gives for one prompt at a time."""

import math
import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from postgrad.errors import ModelError
from postgrad.model import decode
from postgrad.model.generate import generate, plan_batches
from postgrad.types import StopReason

torch.set_num_threads(1)
VOCABULARY = 300


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()


def small(**changes):
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return shape | changes


def alone(model, prompt, limit, stop_ids):
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=limit,
        eos_token_id=sorted(stop_ids) or None,
        pad_token_id=0,
    )
    return tuple(output[0, len(prompt) :].tolist())


def ask(model, tokenizer, prompts, limit=12, stop_ids=frozenset(), batch_tokens=4096, **options):
    return generate(
        model,
        prompts,
        max_new_tokens=limit,
        stop_ids=frozenset(stop_ids),
        batch_tokens=batch_tokens,
        tokenizer=tokenizer,
        **options,
    )


def prompts_of(seed, count=10, longest=60, common=0):
    draw = random.Random(seed)
    head = [draw.randrange(3, VOCABULARY) for _ in range(common)]
    return [
        head + [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, longest))]
        for _ in range(count)
    ]


@pytest.mark.parametrize("batch_tokens", [1, 200, 100_000])
@pytest.mark.parametrize("common", [0, 9, 50])
def test_a_batch_answers_like_one_prompt_at_a_time(model, tokenizer, common, batch_tokens):
    prompts = prompts_of(common, common=common)
    stop_ids = frozenset(random.Random(1).sample(range(VOCABULARY), 25))
    wanted = [alone(model, prompt, 15, stop_ids) for prompt in prompts]
    assert len({len(ids) for ids in wanted}) > 2  # answers leave the batch at different times
    found = ask(model, tokenizer, prompts, 15, stop_ids, batch_tokens)
    assert [completion.ids for completion in found] == wanted


@pytest.mark.parametrize("limit", [1, 2, 20])
def test_the_limit_is_reached_and_kept(model, tokenizer, limit):
    prompts = prompts_of(3, count=5)
    found = ask(model, tokenizer, prompts, limit)
    assert [completion.ids for completion in found] == [
        alone(model, prompt, limit, ()) for prompt in prompts
    ]
    assert {completion.stop_reason for completion in found} == {StopReason.LENGTH}
    assert {len(completion.ids) for completion in found} == {limit}


def test_prompts_are_read_in_several_passes(model, tokenizer, monkeypatch):
    prompts = prompts_of(4, count=12) + prompts_of(5, count=1, longest=1)
    whole = ask(model, tokenizer, prompts)
    for tokens in (1, 40, 100):
        monkeypatch.setattr(decode, "PREFILL_TOKENS", {"cpu": tokens})
        assert [c.ids for c in ask(model, tokenizer, prompts)] == [c.ids for c in whole]


def test_beginnings_are_grouped_where_that_saves_tokens(model, tokenizer):
    first, second = prompts_of(6, 40, 20, common=70), prompts_of(7, 40, 20, common=90)
    single = prompts_of(8, 3)
    prompts = [p for pair in zip(first, second, strict=True) for p in pair] + single
    batches = plan_batches(prompts, 5, 100_000, share=True)
    assert [(batch.prefix >= 70, len(batch.rows)) for batch in batches] == [
        (True, 40), (True, 40), (False, 3)
    ]  # fmt: skip
    assert plan_batches(prompts, 5, 100_000, share=False)[0].prefix == 0
    sample = random.Random(1).sample(range(len(prompts)), 4)
    found = ask(model, tokenizer, prompts, 5)
    for row in sample:
        assert found[row].ids == alone(model, prompts[row], 5, ())


def test_equal_prompts_and_a_prompt_that_is_the_beginning_of_another(model, tokenizer):
    whole = prompts_of(9, 1, common=60)[0]
    prompts = [whole, whole, whole[:20], whole[:-1]]
    wanted = [alone(model, prompt, 8, ()) for prompt in prompts]
    assert [c.ids for c in ask(model, tokenizer, prompts, 8)] == wanted


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=30), min_size=1, max_size=30),
    st.integers(1, 9),
    st.integers(1, 400),
    st.booleans(),
    st.one_of(st.none(), st.integers(1, 40)),
)
def test_plan_uses_every_prompt_once_and_keeps_the_budget(prompts, limit, budget, share, steady):
    batches = plan_batches(prompts, limit, budget, share, steady)
    assert Counter(row for batch in batches for row in batch.rows) == Counter(range(len(prompts)))
    for batch in batches:
        rows = [prompts[row] for row in batch.rows]
        lengths = [len(row) for row in rows]
        assert lengths == sorted(lengths, reverse=True)
        assert all(row[: batch.prefix] == rows[0][: batch.prefix] for row in rows)
        assert batch.prefix < min(lengths)
        used = batch.prefix + len(rows) * (lengths[0] - batch.prefix + limit)
        assert used <= budget or len(rows) == 1
        if steady is not None and lengths[0] + limit > steady:
            assert len(rows) == 1


def test_the_stop_token_is_in_the_ids_and_not_in_the_text(model, tokenizer):
    prompt = prompts_of(10, 1)[0]
    ids = alone(model, prompt, 6, ())
    stop = ids[3]
    [completion] = ask(model, tokenizer, [prompt], 6, {stop})
    end = ids.index(stop)
    assert completion.stop_reason is StopReason.STOP
    assert completion.ids == ids[: end + 1]
    assert completion.text == tokenizer.decode(list(ids[:end]), skip_special_tokens=True)


def test_logprobs_are_those_of_the_chosen_tokens(model, tokenizer):
    prompts = prompts_of(11, 4, common=30)
    for prompt, completion in zip(prompts, ask(model, tokenizer, prompts, 5), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *completion.ids]])).logits[0, len(prompt) - 1 :]
        wanted = logits.log_softmax(-1)[range(5), list(completion.ids)]
        assert completion.logprobs == pytest.approx(wanted.tolist(), abs=1e-4)


def test_bf16_agrees_with_its_own_single_answers_in_the_first_token(tiny_model_dir, tokenizer):
    half = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16).eval()
    prompts = prompts_of(12, 12, common=20)
    for prompt, completion in zip(prompts, ask(half, tokenizer, prompts, 3), strict=True):
        with torch.no_grad():
            logits = half(torch.tensor([prompt])).logits[0, -1].float()
        assert logits[completion.ids[0]] >= logits.max() - 0.05 * logits.std()
        assert all(math.isfinite(logprob) for logprob in completion.logprobs)


def test_progress_names_every_prompt_once(model, tokenizer):
    seen = []
    ask(
        model, tokenizer, prompts_of(13), 2, batch_tokens=150,
        on_progress=lambda rows, seconds: seen.append((rows, seconds)),
    )  # fmt: skip
    assert sorted(row for rows, _ in seen for row in rows) == list(range(10))
    assert len(seen) > 1
    assert all(seconds > 0 for _, seconds in seen)


def test_no_prompts_no_answers(model, tokenizer):
    assert ask(model, tokenizer, []) == []


def test_the_model_is_left_as_it_was(model, tokenizer):
    model.train()
    try:
        ask(model, tokenizer, prompts_of(14, 2), 2)
        assert model.training
        assert model.config._attn_implementation == "sdpa"
    finally:
        model.eval()


def test_logits_that_are_not_finite_are_an_error(tiny_model_dir, tokenizer):
    broken = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="not finite"):
        ask(broken, tokenizer, prompts_of(15, 2))
    assert broken.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("batch_tokens", [200, 100_000])
def test_models_with_sliding_windows_take_the_general_way(tokenizer, batch_tokens):
    torch.manual_seed(2)
    layers = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(**small(sliding_window=16, head_dim=16, layer_types=layers))
    model = Gemma3ForCausalLM(config).eval()
    assert not decode.can_share(model)
    prompts = prompts_of(16, 8, common=12)
    stop_ids = frozenset(random.Random(2).sample(range(VOCABULARY), 25))
    found = ask(model, tokenizer, prompts, 12, stop_ids, batch_tokens)
    assert [c.ids for c in found] == [alone(model, p, 12, stop_ids) for p in prompts]


def test_rows_beyond_a_rescaled_context_do_not_change_the_others(tokenizer):
    torch.manual_seed(3)
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    config = LlamaConfig(**small(rope_parameters=rope, max_position_embeddings=48))
    model = LlamaForCausalLM(config).eval()
    assert decode.steady_length(model) == 48
    prompts = prompts_of(17, 8, common=10)
    found = ask(model, tokenizer, prompts, 8)
    assert [c.ids for c in found] == [alone(model, prompt, 8, ()) for prompt in prompts]


@pytest.mark.parametrize("length", [1, 2, 17, 64])
def test_packed_and_plain_attention_equal_the_kernel(length, monkeypatch):
    torch.manual_seed(4)
    query = torch.randn(2, 4, length, 16)
    key, value = torch.randn(2, 2, 2, length, 16)
    plain = decode._causal(query, key, value, 0.25)
    monkeypatch.setattr(decode, "PLAIN_SCORES", 0)
    kernel = decode._causal(query, key, value, 0.25)
    for a, b in zip(plain, kernel, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_token_sees_the_prefix_and_what_its_row_shows(dtype):
    torch.manual_seed(5)
    query = torch.randn(3, 4, 1, 16).to(dtype)
    key, value = torch.randn(2, 3, 2, 9, 16).to(dtype)
    prefix = torch.randn(2, 1, 2, 5, 16).to(dtype)
    bias = torch.zeros(3, 1, 1, 9).masked_fill_(torch.rand(3, 1, 1, 9) < 0.4, float("-inf"))
    for pair, columns in ((None, 9), ((prefix[0], prefix[1]), 14)):
        keys, values, mask = key, value, bias
        if pair is not None:
            keys = torch.cat([prefix[0].expand(3, -1, -1, -1), key], 2)
            values = torch.cat([prefix[1].expand(3, -1, -1, -1), value], 2)
            mask = torch.nn.functional.pad(bias, (5, 0))
        assert keys.shape[2] == columns
        wanted = torch.nn.functional.scaled_dot_product_attention(
            query.double(), keys.double(), values.double(), mask.double(), scale=0.25,
            enable_gqa=True,
        )  # fmt: skip
        found = decode._last(query, key, value, 0.25, bias.to(dtype), pair).transpose(1, 2)
        tolerance = 1e-5 if dtype is torch.float32 else 0.02
        torch.testing.assert_close(found.double(), wanted, atol=tolerance, rtol=tolerance)


def test_answers_longer_than_the_reserve_and_long_beginnings_stay_equal(
    model, tokenizer, monkeypatch
):
    monkeypatch.setattr(decode, "RESERVED_TOKENS", 3)
    monkeypatch.setattr(decode, "PLAIN_SCORES", 100)
    prompts = prompts_of(18, 6, common=40)
    stop_ids = frozenset(random.Random(3).sample(range(VOCABULARY), 25))
    found = ask(model, tokenizer, prompts, 15, stop_ids)
    assert [c.ids for c in found] == [alone(model, prompt, 15, stop_ids) for prompt in prompts]
