"""Every realisation of packed attention computes the definition, forward and backward."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from postgrad.errors import ModelError
from postgrad.model import attention, buckets, kernels, short_attention
from postgrad.model.attention import own_attention, packed_attention, training_attention
from postgrad.model.layout import Layout, layout_of_positions, reference_attention
from postgrad.model.likelihood import Pair, log_likelihoods

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing_:FutureWarning"  # the new names came with Transformers 5.2x
)

DTYPES = (torch.float32, torch.bfloat16)
LENGTHS = [
    (1,),
    (2,),
    (127,),
    (641,),
    (1, 1, 1),
    (2, 1, 127, 1),
    (40, 38, 37, 5, 3, 1),
    (7, 64, 11, 401, 2, 63),
    (13,) * 9,
]
REALISATIONS = {"mixed": 127, "bucketed": 10_000, "short": 10_000, "some short": 127, "flash": 0}
"""Names of realisations -> documents up to this many tokens are bucketed; those that are called
short are computed by attention.c, whatever their length."""
WINDOWS = [None, 40, 200]
HEADS = [(4, 2), (6, 2), (3, 3), (4, 1)]


@pytest.fixture(params=["compiled", "tensors"])
def kernel(request, monkeypatch):
    """Run a test with the compiled kernels and with tensor operations."""
    if request.param == "tensors":
        monkeypatch.setattr(kernels, "kernels", lambda: kernels.Kernels(None, "off"))


@pytest.fixture(params=REALISATIONS)
def limit(request, monkeypatch):
    """Choose a realisation; the value is the limit that goes with it."""
    if "short" in request.param:
        request.getfixturevalue("c_kernels")
        monkeypatch.setattr(short_attention, "MEAN_SPAN", dict.fromkeys(DTYPES, 1e9))
    else:
        monkeypatch.setattr(buckets, "fits", lambda *_: False)
    return REALISATIONS[request.param]


def inputs(total, heads, kv_heads, width=16, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((1, heads, total, width), (1, kv_heads, total, width), (1, kv_heads, total, width))
    made = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    return [x.requires_grad_(True) for x in made]


def results(run, q, k, v):
    """Output [1, T, H, D] and the gradients of q, k, v under a fixed cotangent."""
    out = run(q, k, v)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return [out, *torch.autograd.grad(out, (q, k, v), cotangent.to(out.dtype))]


def reference(lengths, q, k, v, window=None, softcap=None, shared=False):
    def run(*qkv):
        q, k, v = (x[0].transpose(0, 1) for x in qkv)
        layout = Layout(lengths, window, shared)
        return reference_attention(q, k, v, layout, q.shape[-1] ** -0.5, softcap).unsqueeze(0)

    return results(run, q, k, v)


def packed(lengths, limit, q, k, v, window=None, shared=False, **options):
    layout = Layout(lengths, shared_prefix=shared)
    options |= {"layout": layout, "bucket_limit": limit, "sliding_window": window}
    return results(lambda q, k, v: packed_attention(None, q, k, v, None, **options)[0], q, k, v)


def assert_equal(ours, exact):
    for one, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)


def assert_within_bfloat16(ours, exact):
    """2 % of the norm: bf16 keeps 8 bits (0.4 %), scores, probabilities and results are rounded."""
    for one, other in zip(ours, exact, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one.float() - other).norm() <= 0.02 * other.norm() + 1e-6


def in_float32(*tensors):
    return [x.detach().float().requires_grad_() for x in tensors]


@pytest.mark.parametrize("shared", [False, True], ids=["apart", "shared"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_float32_equals_the_definition(lengths, window, limit, shared):
    for heads, kv_heads in HEADS if sum(lengths) < 200 else HEADS[1:2]:
        q, k, v = inputs(sum(lengths), heads, kv_heads)
        ours = packed(lengths, limit, q, k, v, window, shared)
        assert_equal(ours, reference(lengths, q, k, v, window, shared=shared))


@pytest.mark.parametrize("shared", [False, True], ids=["apart", "shared"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_bfloat16_stays_within_its_rounding(lengths, window, limit, shared):
    q, k, v = inputs(sum(lengths), 6, 2, dtype=torch.bfloat16)
    exact = reference(lengths, *in_float32(q, k, v), window, shared=shared)
    assert_within_bfloat16(packed(lengths, limit, q, k, v, window, shared), exact)


def test_a_shared_prefix_is_in_front_of_every_document():
    """The definition with a shared prefix is the definition with a copy of it in each document."""
    prefix, own = 5, (3, 1, 7)
    q, k, v = inputs(prefix + sum(own), 4, 2)
    rows, start = [], prefix
    for length in own:
        rows += [*range(prefix), *range(start, start + length)]
        start += length
    copies = [x[:, :, rows] for x in (q, k, v)]
    spans = tuple(prefix + length for length in own)
    assert Layout((prefix, *own), shared_prefix=True).spans == (prefix, *spans)
    for window in (None, 4):
        apart = reference(spans, *(x.detach().requires_grad_() for x in copies), window)[0]
        once = reference((prefix, *own), q, k, v, window, shared=True)[0]
        torch.testing.assert_close(apart, once[:, rows])


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("lengths", [(127, 2, 1), (450,)], ids=str)
def test_capped_scores_and_windows_with_and_without_kernels(lengths, window, softcap, kernel):
    q, k, v = inputs(sum(lengths), 6, 2)
    ours = packed(lengths, 10_000, q, k, v, window, softcap=softcap)
    assert_equal(ours, reference(lengths, q, k, v, window, softcap))
    q, k, v = (x.detach().bfloat16().requires_grad_() for x in (q, k, v))
    ours = packed(lengths, 10_000, q, k, v, window, softcap=softcap)
    exact = reference(lengths, *in_float32(q, k, v), window, softcap)
    assert_within_bfloat16(ours, exact)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    limit=st.integers(0, 64),
    kv_heads=st.sampled_from([1, 2, 4]),
    window=st.none() | st.integers(1, 70),
    shared=st.booleans(),
    width=st.sampled_from([8, 16, 80]),  # attention.c takes multiples of 16
)
def test_any_documents_in_any_order_equal_the_definition(
    lengths, limit, kv_heads, window, shared, width
):
    q, k, v = inputs(sum(lengths), 4, kv_heads, width=width)
    ours = packed(tuple(lengths), limit, q, k, v, window, shared)
    assert_equal(ours, reference(tuple(lengths), q, k, v, window, shared=shared))


@given(
    lengths=st.lists(st.integers(1, 700), min_size=1, max_size=60),
    limit=st.sampled_from([0, 320]),
    shared=st.booleans(),
)
def test_buckets_hold_every_token_of_the_short_documents_once(lengths, limit, shared):
    layout, seen = Layout(tuple(lengths), shared_prefix=shared), []
    for bucket in buckets.make_buckets(layout, limit):
        assert bucket.count == 1 or bucket.index.numel() <= buckets.BUCKET_TOKENS
        kept = bucket.index[bucket.index < sum(lengths)].tolist()
        assert len(kept) == bucket.own
        visible = bucket.keys[bucket.keys < sum(lengths)].tolist()
        assert len(visible) == len(kept) + bucket.count * bucket.prefix
        assert len(visible) >= 0.5 * bucket.index.numel() or bucket.length < 32
        seen += kept
    start, short = 0, []
    for length, span in zip(lengths, layout.spans, strict=True):
        short += range(start, start + length) if span <= limit else ()
        start += length
    assert sorted(seen) == short


def test_a_window_that_hides_nothing_is_no_window():
    assert Layout((3, 5), 5) == Layout((3, 5))
    assert Layout((3, 5), 4).window == 4


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8))
def test_positions_say_where_documents_begin(lengths):
    positions = [position for length in lengths for position in range(length)]
    assert layout_of_positions(positions).lengths == tuple(lengths)


def test_positions_that_jump_are_refused():
    with pytest.raises(ModelError, match="layout"):
        layout_of_positions([0, 1, 2, 3, 4, 3, 4])


def test_a_long_document_under_a_window_takes_blocks(monkeypatch):
    """No call sees more keys than a block of queries and its window."""
    seen = []
    kernel = functional.scaled_dot_product_attention

    def spy(q, k, v, **options):
        seen.append((q.shape[2], k.shape[2]))
        return kernel(q, k, v, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", spy)
    packed((641, 30), 0, *inputs(671, 4, 2), window=50)
    assert seen == [(128, 128), *[(128, 177)] * 4, (1, 50), (30, 30)]


@pytest.mark.parametrize("limit", [0, 16])
@pytest.mark.parametrize("window", [None, 6])
def test_unpacked_rows_are_causal_each_on_its_own(window, limit):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 4, 11, 8, generator=generator)
    k, v = (torch.randn(3, 2, 11, 8, generator=generator) for _ in range(2))
    out, weights = packed_attention(None, q, k, v, None, sliding_window=window, bucket_limit=limit)
    assert weights is None
    for row in range(3):
        part = [x[row : row + 1].requires_grad_() for x in (q, k, v)]
        exact = reference((11,), *part, window)[0]
        torch.testing.assert_close(out[row : row + 1], exact, atol=2e-5, rtol=1e-5)


def test_the_scale_is_the_models():
    q, k, v = inputs(9, 2, 2)
    out = packed_attention(None, q, k, v, None, scaling=0.7, layout=Layout((5, 4)))[0]
    rows = (x[0].transpose(0, 1) for x in (q, k, v))
    exact = reference_attention(*rows, Layout((5, 4)), 0.7).unsqueeze(0)
    torch.testing.assert_close(out, exact, atol=2e-5, rtol=1e-5)


def test_reference_agrees_with_torch_on_one_document():
    q, k, v = inputs(23, 4, 4)
    torchs = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(reference((23,), q, k, v)[0], torchs.transpose(1, 2))


@pytest.mark.parametrize("window", [None, 3])
def test_dropout_drops_probabilities_and_keeps_their_mean(window):
    q, k, v = inputs(8, 2, 2)
    options = {"layout": Layout((5, 3)), "sliding_window": window}
    torch.manual_seed(0)
    with torch.no_grad():
        many = [
            packed_attention(None, q, k, v, None, dropout=0.2, **options)[0] for _ in range(500)
        ]
        plain = packed_attention(None, q, k, v, None, **options)[0]
    assert not torch.equal(many[0], many[1])
    torch.testing.assert_close(torch.stack(many).mean(0), plain, atol=0.2, rtol=0.05)


SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
}


GEMMA = {**SHAPE, "head_dim": 8, "sliding_window": 9}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(sliding_window=9, **SHAPE)),
    "stablelm": lambda: StableLmForCausalLM(StableLmConfig(**SHAPE)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(attn_logit_softcapping=2.0, **GEMMA)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(layer_types=["sliding_attention", "full_attention"], **GEMMA)
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    """Tiny models; windows are shorter than most documents, StableLM hands no layout on."""
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


REFUSED = {
    "s_aux": lambda: GptOssForCausalLM(GptOssConfig(head_dim=8, num_local_experts=2, **SHAPE)),
    "chunked_overlay": lambda: Llama4ForCausalLM(
        Llama4TextConfig(
            head_dim=8,
            attention_chunk_size=8,
            num_local_experts=2,
            intermediate_size_mlp=48,
            **{**SHAPE, "num_hidden_layers": 4},
        )
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_computed_is_refused_by_name(name):
    model = REFUSED[name]()
    with training_attention(model), pytest.raises(ModelError, match=name):
        model(torch.arange(12)[None], use_cache=False)


def test_masks_biases_and_two_directions_are_refused():
    q, k, v = inputs(4, 2, 2)
    with pytest.raises(ModelError, match="a mask of its own"):
        packed_attention(None, q, k, v, torch.zeros(1, 1, 4, 4))
    for keyword in ({"position_bias": q}, {"is_causal": False}):
        with pytest.raises(ModelError, match=next(iter(keyword))):
            packed_attention(None, q, k, v, None, **keyword)
    with pytest.raises(ModelError, match="capped"):
        packed_attention(None, q, k, v, None, softcap=1.0, dropout=0.1)


@pytest.mark.parametrize("lengths", [(6, 5, 1, 30, 2), (340, 8), (12,)], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_packed_row_gives_each_document_the_logits_it_has_alone(model, lengths, checkpointing):
    generator = torch.Generator().manual_seed(2)
    documents = [torch.randint(0, 97, (1, n), generator=generator) for n in lengths]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
    model.train(checkpointing)
    with training_attention(model):
        together = model(
            torch.cat(documents, 1), position_ids=positions, layout=Layout(lengths)
        ).logits
        together.square().sum().backward()
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    if getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # some releases of Transformers take sdpa, uncapped
    alone = torch.cat([model(ids).logits for ids in documents], 1)
    alone.square().sum().backward()
    torch.testing.assert_close(together, alone, atol=2e-4, rtol=1e-4)
    for one, parameter in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, atol=1e-3, rtol=1e-3)
    model.zero_grad()


def test_padded_rows_give_the_logits_of_separate_documents(model):
    model.gradient_checkpointing_disable()
    model.eval()
    generator = torch.Generator().manual_seed(3)
    documents = [torch.randint(0, 97, (n,), generator=generator) for n in (20, 11, 1)]
    ids = torch.zeros(3, 20, dtype=torch.long)
    positions = torch.zeros(3, 20, dtype=torch.long)
    for row, document in enumerate(documents):
        ids[row, : len(document)] = document
        positions[row, : len(document)] = torch.arange(len(document))
    with torch.no_grad(), training_attention(model):
        together = model(ids, position_ids=positions).logits
    with torch.no_grad():
        for row, document in enumerate(documents):
            alone = model(document[None]).logits[0]
            torch.testing.assert_close(together[row, : len(document)], alone, atol=2e-4, rtol=1e-4)


def test_the_models_own_attention_comes_back_even_after_an_error(model):
    before = model.config._attn_implementation
    with training_attention(model):
        assert attention.is_ours(model)
    assert model.config._attn_implementation == before
    with pytest.raises(RuntimeError, match="inside"), training_attention(model):
        raise RuntimeError("inside")
    assert model.config._attn_implementation == before


def test_likelihoods_inside_training_are_those_of_evaluation(model):
    """By trees or by rows padded on the left, whose mask the attention of training ignores."""
    draw = np.random.default_rng(3)
    groups = [
        [Pair(tuple(ids[:size].tolist()), tuple(ids[size:].tolist()))]
        for size in (3, 30)
        for ids in (draw.integers(3, SHAPE["vocab_size"], size + 4),)
    ]
    own = model.config._attn_implementation
    outside = log_likelihoods(model, groups)
    with training_attention(model):
        chosen = model.config._attn_implementation
        with own_attention(model, own):
            inside = log_likelihoods(model, groups)
        assert model.config._attn_implementation == chosen
        with pytest.raises(RuntimeError, match="inside"), own_attention(model, own):
            raise RuntimeError("inside")
        assert model.config._attn_implementation == chosen
    assert inside == outside


def test_an_inner_block_keeps_the_limit_of_the_outer(model):
    with training_attention(model, 100):
        chosen = model.config._attn_implementation
        with training_attention(model):
            assert model.config._attn_implementation == chosen
        with training_attention(model, 50):
            assert model.config._attn_implementation != chosen
        assert model.config._attn_implementation == chosen
