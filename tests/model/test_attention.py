"""Every realisation of packed attention computes the definition, forward and backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from postgrad.model import attention
from postgrad.model.attention import (
    make_layout,
    packed_attention,
    reference_attention,
    training_attention,
)

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing_:FutureWarning"  # the new names came with Transformers 5.2x
)

LENGTHS = [
    (1,),
    (2,),
    (37,),
    (430,),
    (1, 1, 1),
    (2, 1, 2, 1),
    (40, 38, 37, 5, 3, 1),
    (7, 64, 11, 401, 2, 350, 63),
    (13,) * 9,
]
REALISATIONS = {"mixed": attention.BUCKET_LIMIT, "bucketed": 10_000, "flash": 0}


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


def reference(lengths, q, k, v):
    scale = q.shape[-1] ** -0.5
    return results(
        lambda q, k, v: reference_attention(q, k, v, lengths, scale).transpose(1, 2), q, k, v
    )


def packed(lengths, limit, q, k, v, **options):
    layout = make_layout(lengths, bucket_limit=limit)
    return results(
        lambda q, k, v: packed_attention(None, q, k, v, None, layout=layout, **options)[0], q, k, v
    )


@pytest.mark.parametrize("limit", REALISATIONS.values(), ids=REALISATIONS.keys())
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (6, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_float32_equals_the_definition(lengths, heads, kv_heads, limit):
    q, k, v = inputs(sum(lengths), heads, kv_heads)
    pairs = zip(packed(lengths, limit, q, k, v), reference(lengths, q, k, v), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("limit", REALISATIONS.values(), ids=REALISATIONS.keys())
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_bfloat16_stays_within_its_rounding(lengths, limit):
    """2 % of the norm: bf16 keeps 8 bits (0.4 %), scores, probabilities and results are rounded."""
    q, k, v = inputs(sum(lengths), 4, 2, dtype=torch.bfloat16)
    exact = reference(lengths, *(x.detach().float().requires_grad_() for x in (q, k, v)))
    for ours, theirs in zip(packed(lengths, limit, q, k, v), exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - theirs).norm() <= 0.02 * theirs.norm() + 1e-6


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    limit=st.integers(0, 64),
    kv_heads=st.sampled_from([1, 2, 4]),
)
def test_any_documents_in_any_order_equal_the_definition(lengths, limit, kv_heads):
    q, k, v = inputs(sum(lengths), 4, kv_heads, width=8)
    pairs = zip(packed(lengths, limit, q, k, v), reference(lengths, q, k, v), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


@given(
    lengths=st.lists(st.integers(1, 700), min_size=1, max_size=60), limit=st.sampled_from([0, 320])
)
def test_a_layout_holds_every_token_once(lengths, limit):
    layout = make_layout(lengths, bucket_limit=limit)
    seen = [index for start, end in layout.long for index in range(start, end)]
    for bucket in layout.buckets:
        assert bucket.count == 1 or bucket.index.numel() <= attention.BUCKET_TOKENS
        kept = bucket.index[bucket.index < sum(lengths)].tolist()
        assert (len(kept) < bucket.index.numel()) == bucket.padded
        assert len(kept) >= 0.5 * bucket.index.numel() or bucket.length < 32
        seen += kept
    assert sorted(seen) == list(range(sum(lengths)))


def windowed(lengths, window, q, k, v):
    """The definition with a sliding window: a dense mask, float64."""
    group = q.shape[1] // k.shape[1]
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    order = torch.arange(sum(lengths))
    distance = order[:, None] - order[None, :]
    allowed = (document[:, None] == document) & (distance >= 0) & (distance < window)

    def run(q, k, v):
        k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
        scores = (q.double() @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
        return (weights @ v).transpose(1, 2).to(q.dtype)

    return results(run, q, k, v)


@pytest.mark.parametrize("window", [1, 5, 40, 64])
@pytest.mark.parametrize("lengths", [(40,), (5, 40, 1, 17), (41, 3)], ids=str)
def test_a_window_shorter_than_a_document_is_obeyed(lengths, window):
    q, k, v = inputs(sum(lengths), 4, 2)
    ours = packed(lengths, attention.BUCKET_LIMIT, q, k, v, sliding_window=window)
    for one, other in zip(ours, windowed(lengths, window, q, k, v), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 6])
def test_unpacked_rows_are_causal_each_on_its_own(window):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 4, 11, 8, generator=generator)
    k, v = (torch.randn(3, 2, 11, 8, generator=generator) for _ in range(2))
    out, weights = packed_attention(None, q, k, v, None, sliding_window=window)
    assert weights is None
    for row in range(3):
        part = [x[row : row + 1].requires_grad_() for x in (q, k, v)]
        exact = windowed([11], window or 11, *part)[0] if window else reference((11,), *part)[0]
        torch.testing.assert_close(out[row : row + 1], exact, atol=2e-5, rtol=1e-5)


def test_the_scale_is_the_models():
    q, k, v = inputs(9, 2, 2)
    layout = make_layout((5, 4))
    out = packed_attention(None, q, k, v, None, scaling=0.7, layout=layout)[0]
    exact = reference_attention(q, k, v, (5, 4), 0.7).transpose(1, 2)
    torch.testing.assert_close(out, exact, atol=2e-5, rtol=1e-5)


def test_reference_agrees_with_torch_on_one_document():
    q, k, v = inputs(23, 4, 4)
    torchs = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(reference_attention(q, k, v, (23,), 0.25), torchs)


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


@pytest.fixture(scope="module", params=["llama", "mistral"])
def model(request):
    """A tiny Llama, and a tiny Mistral whose window is shorter than most documents."""
    torch.manual_seed(0)
    if request.param == "llama":
        return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    return MistralForCausalLM(MistralConfig(sliding_window=9, **SHAPE)).eval()


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
            torch.cat(documents, 1), position_ids=positions, layout=make_layout(lengths)
        ).logits
        together.square().sum().backward()
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
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
        assert model.config._attn_implementation == attention.NAME
    assert model.config._attn_implementation == before
    with pytest.raises(RuntimeError, match="inside"), training_attention(model):
        raise RuntimeError("inside")
    assert model.config._attn_implementation == before
