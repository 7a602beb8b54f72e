"""The formulas against numbers worked out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postgrad import estimate
from postgrad.errors import ModelError
from postgrad.estimate import Amount, Method, Shape, Speed, amount_of, costs, flops, memory
from postgrad.prices import Prices

SMOLLM2 = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
SMALL = Shape(4, 8, 2, query_width=4, key_width=2, vocabulary=10)
"""A block: q 16, k 8, v 8, o 16, gate 32, up 32, down 32 = 144 weights; two of them."""
LORA = Method(trainable=100, full=False, compute_bytes=2)
NOTHING = Amount(0, 0, 0)


def test_the_sizes_of_a_real_model_are_exact():
    shape = estimate.read_shape(SMOLLM2)
    assert shape.parameters == 134_515_008
    assert shape.linear_weights == 106_168_320
    assert shape.adapter_parameters(16) == 4_884_480
    assert shape.eight_bit_bytes("int8") == shape.linear_weights
    assert shape.eight_bit_bytes("fp8") == 2 * shape.linear_weights
    assert shape.eight_bit_bytes("fp8", ("q_proj",)) == 30 * 576 * 576 * 2
    assert SMALL.eight_bit_bytes("fp8") == SMALL.eight_bit_bytes("int8") == 0
    attention = shape.adapter_parameters(16, ("q_proj", "model.layers.v_proj"))
    assert attention == 30 * 16 * (576 + 576 + 192 + 576)


def test_the_counts_of_the_speed_benchmark_are_these():
    """424.7 million for frozen layers, 29.3 for adapters, 113.2 for the head: its README."""
    shape = estimate.read_shape(SMOLLM2)
    method = Method(shape.adapter_parameters(16), full=False, compute_bytes=2)
    found = flops(shape, method, Amount(1, 1, 0), NOTHING)
    assert (found["layers"], found["adapters"]) == (424_673_280, 29_306_880)
    assert found["output_head"] == 113_246_208


def test_other_spellings_and_kinds():
    gpt2 = {"model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 12, "vocab_size": 50257}
    shape = estimate.read_shape(gpt2)
    assert shape.linear_weights == 12 * (4 * 768 * 768 + 2 * 4 * 768 * 768)
    nested = estimate.read_shape({"text_config": {**SMOLLM2, "head_dim": 128}})
    assert nested.query_width == 9 * 128
    untied = estimate.read_shape({**SMOLLM2, "tie_word_embeddings": False})
    assert untied.parameters == 134_515_008 + 49152 * 576


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ModelError, match="num_experts is 8"):
        estimate.read_shape({**SMOLLM2, "num_experts": 8})
    with pytest.raises(ModelError, match="no vocab_size"):
        estimate.read_shape({**SMOLLM2, "vocab_size": None})
    with pytest.raises(ModelError, match="sizes of c_attn"):
        SMALL.adapter_parameters(4, ("c_attn",))


def test_operations_of_adapters_by_hand():
    training = amount_of([(3, 1), (4, 2)])
    assert training == Amount(7, 3, 6 + 10)
    found = flops(SMALL, LORA, training, Amount(5, 2, 15))
    scores = 4 * 2 * 4 * 16
    assert found == {
        "layers": 4 * 288 * 7,
        "adapters": 6 * 100 * 7,
        "output_head": 4 * 40 * 3,
        "attention_scores": 3 * scores,
        "recomputation": 0,
        "base": 0,
        "held_out": 2 * (288 + 100) * 5 + 4 * 2 * 4 * 15 + 2 * 40 * 2,
        "total": sum(value for name, value in found.items() if name != "total"),
    }
    again = Method(100, full=False, compute_bytes=2, checkpointing=True)
    recomputed = flops(SMALL, again, training, NOTHING)["recomputation"]
    assert recomputed == 2 * (288 + 100) * 7 + scores
    beside = Method(100, full=False, compute_bytes=2, beside_base=True)
    assert flops(SMALL, beside, training, NOTHING)["base"] == 2 * 288 * 7 + scores + 2 * 40 * 3


def test_operations_of_full_tuning_by_hand():
    full = Method(SMALL.parameters, full=True, compute_bytes=4)
    found = flops(SMALL, full, Amount(7, 3, 16), NOTHING)
    assert (found["layers"], found["adapters"]) == (6 * 288 * 7, 0)
    assert found["output_head"] == 6 * 40 * 3


def test_memory_by_hand():
    found = memory(SMALL, LORA, Amount(10, 3, 0), parameters=500, on_gpu=False)
    layer = estimate.HIDDEN_VECTORS * 4 + estimate.INTERMEDIATE_VECTORS * 8
    assert found["program_bytes"] == estimate.PROGRAM_BYTES
    assert found["weights_bytes"] == 2 * 500
    assert found["gradients_bytes"] + found["optimizer_bytes"] == 12 * 100
    assert found["activations_bytes"] == 10 * 2 * layer * 2
    assert found["logits_bytes"] == 3 * 10 * 8
    assert found["peak_bytes"] == sum(v for name, v in found.items() if name != "peak_bytes")
    assert found["eight_bit_copies_bytes"] == 0
    copies = Method(100, full=False, compute_bytes=2, eight_bit_bytes=400)
    with_copies = memory(SMALL, copies, Amount(10, 3, 0), parameters=500, on_gpu=False)
    assert with_copies["eight_bit_copies_bytes"] == 400
    assert with_copies["peak_bytes"] == found["peak_bytes"] + 400
    full = Method(500, full=True, compute_bytes=2)
    whole = memory(SMALL, full, Amount(10, 5000, 0), parameters=500, on_gpu=True)
    assert (whole["program_bytes"], whole["weights_bytes"]) == (0, 2000)
    assert whole["adapters_bytes"] == 0
    assert whole["precision_copies_bytes"] == 2 * 288
    assert whole["logits_bytes"] == estimate.LOGIT_CHUNK * 10 * 8


def test_the_chunk_of_logits_is_that_of_the_loss():
    from postgrad.train import sft

    assert estimate.LOGIT_CHUNK == sft.CHUNK


@given(tokens=st.integers(1, 10**6), layers=st.integers(2, 100))
def test_checkpointing_keeps_less(tokens, layers):
    kept, less = (
        estimate.activation_bytes_per_token(64, 256, layers, 2, checkpointing)
        for checkpointing in (False, True)
    )
    assert 0 < less < kept


def test_seconds_are_tokens_a_third_of_the_held_out_ones_and_the_optimizer():
    speed = Speed(100.0, "probe", "", step_seconds=0.5)
    assert speed.seconds(Amount(1000, 0, 0), Amount(600, 0, 0), steps=4) == 10 + 2 + 2


def cost(prices, **given):
    facts = {
        "seconds": 7200.0,
        "machine": "NVIDIA H100 80GB",
        "watts": (500.0, "power limit of the GPU"),
        "price_per_hour": 2.5,
        "currency": "EUR",
        "tokens": 3_000_000,
        "held_out_tokens": 1_000_000,
        "parameters": 10**9,
    }
    return costs(Prices.model_validate(prices), **{**facts, **given})


SOURCE = {"source": "s", "url": "u", "date": "2026"}


def test_money_and_energy_by_hand():
    prices = {
        "currency": "USD",
        "price_per_kwh": 0.3,
        "hour": [{"machine": "h100", "price": 7.0, **SOURCE}],
        "hosted": [
            {
                "service": "A",
                "model": "open",
                "largest_parameters": 2e9,
                "price_per_million_tokens": 0.5,
                "bills_validation": True,
                **SOURCE,
            },
            {
                "service": "B",
                "model": "its own",
                "price_per_million_tokens": 3,
                "closed": "since May",
                **SOURCE,
            },
        ],
    }
    found = cost(prices)
    assert (found["here"]["amount"], found["here"]["currency"]) == (5.0, "EUR")
    assert (found["rented"]["amount"], found["rented"]["currency"]) == (14.0, "USD")
    assert (found["energy"]["kwh"], found["energy"]["amount"]) == (1.0, 0.3)
    assert [offer["amount"] for offer in found["hosted"]] == [2.0, 9.0]
    assert [offer["closed"] for offer in found["hosted"]] == [None, "since May"]
    larger = cost(prices, parameters=3 * 10**9)["hosted"]
    assert [offer["service"] for offer in larger] == ["B"]


def test_what_is_not_known_is_left_out():
    found = cost({"currency": "USD"}, watts=None, price_per_hour=None)
    assert found == {"here": None, "rented": None, "energy": None, "hosted": []}
    assert "amount" not in cost({"currency": "USD"})["energy"]
