"""Packed attention for CUDA: the kernel is called as its release wants it, and is exact.

The kernel itself runs on a CUDA device only (tests marked gpu). Elsewhere its place is taken by a
function with the signature of a release, which computes what that release documents.
"""

import inspect

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, masking_utils

from postgrad.model import attention, attention_cuda
from postgrad.model.attention import packed_attention, training_attention
from postgrad.model.layout import Layout

LENGTHS = [(1,), (2,), (37,), (1, 1, 1), (40, 38, 5, 1), (7, 64, 11, 401, 2, 350, 63)]
SCALE = 0.3


def flash(q, k, v, ends, window, scale):
    """What the kernel computes: causal in each document, `window[0]` tokens back (-1: all)."""
    assert ends.dtype == torch.int32
    token, document = torch.arange(len(q)), torch.zeros(len(q), dtype=torch.long)
    for end in ends[1:-1].tolist():
        document[end:] += 1
    back = token[:, None] - token[None, :]
    seen = (document[:, None] == document) & (back >= 0)
    if window[0] >= 0:
        seen &= back <= window[0]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q.double(), k.double()) * scale
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hts,shd->thd", weights, v.double()).to(q.dtype)


def release_2_10(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None
):
    assert is_causal
    assert query.shape[1] == key.shape[1]
    return flash(query, key, value, cu_seq_q, (-1, 0), query.shape[-1] ** -0.5)


def release_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
    window_size=(-1, -1),
):  # fmt: skip
    assert query.shape[1] == key.shape[1]
    assert window_size[1] == 0
    return flash(query, key, value, cu_seq_q, window_size, scale)


def release_2_12(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
    window_size=(-1, -1), enable_gqa=False, seqused_k=None,
):  # fmt: skip
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert window_size[1] == 0
    return flash(query, key, value, cu_seq_q, window_size, scale)


RELEASES = [release_2_10, release_2_11, release_2_12]


def inputs(total, heads, kv_heads, width=16, dtype=torch.float32, device="cpu"):
    """q [1, H, T, D], k and v [1, K, T, D]."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, heads, total, width), (1, kv_heads, total, width), (1, kv_heads, total, width))
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    return [x.to(device, dtype).requires_grad_(True) for x in made]


def definition(q, k, v, lengths, window=None):
    """[1, T, H, D]: a dense mask, in float64."""
    ends = torch.tensor((0, *lengths)).cumsum(0).int()
    rows = (x[0].transpose(0, 1) for x in (q, k, v))
    return flash(*rows, ends, (-1 if window is None else window - 1, 0), SCALE)[None]


def gradients(out, inputs):
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad(out, inputs, cotangent.to(out))


@pytest.mark.parametrize("kernel", RELEASES)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_every_release_is_asked_for_the_same_function(kernel, lengths, kv_heads):
    q, k, v = inputs(sum(lengths), 4, kv_heads)
    rows = [x[0].transpose(0, 1) for x in (q, k, v)]
    out = attention_cuda.varlen_attention(kernel, *rows, Layout(lengths), SCALE)[None]
    torch.testing.assert_close(out, definition(q, k, v, lengths), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel", RELEASES[1:])
@pytest.mark.parametrize("window", [1, 5, 39])
def test_a_window_of_n_tokens_holds_the_query_and_those_before_it(kernel, window):
    lengths = (40, 3, 17)
    q, k, v = inputs(sum(lengths), 4, 2)
    rows = [x[0].transpose(0, 1) for x in (q, k, v)]
    out = attention_cuda.varlen_attention(kernel, *rows, Layout(lengths, window), SCALE)[None]
    torch.testing.assert_close(out, definition(q, k, v, lengths, window), atol=2e-5, rtol=1e-5)


def test_the_installed_release_accepts_what_it_is_given():
    kernel = attention_cuda._installed()
    if kernel is None:
        pytest.skip("torch 2.9 has no such kernel")
    called = []

    def recorded(*arguments, **more):
        inspect.signature(kernel).bind(*arguments, **more)
        called.append(more)
        return arguments[0]

    recorded.__signature__ = inspect.signature(kernel)
    q, k, v = (x[0].transpose(0, 1) for x in inputs(9, 4, 2))
    attention_cuda.varlen_attention(recorded, q, k, v, Layout((5, 4)), SCALE)
    assert len(called) == 1


@pytest.mark.parametrize(
    ("kernel", "width", "dtype", "window", "capability", "expected"),
    [
        (release_2_12, 64, torch.bfloat16, 128, (9, 0), True),
        (release_2_10, 64, torch.bfloat16, None, (8, 0), True),
        (release_2_10, 64, torch.bfloat16, 128, (9, 0), False),
        (release_2_12, 64, torch.float32, None, (9, 0), False),
        (release_2_12, 36, torch.bfloat16, None, (9, 0), False),
        (release_2_12, 320, torch.bfloat16, None, (9, 0), False),
        (release_2_12, 64, torch.float16, None, (7, 5), False),
    ],
)
def test_where_the_kernel_cannot_work_it_is_not_used(
    monkeypatch, kernel, width, dtype, window, capability, expected
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    query = torch.zeros(3, 4, width, dtype=dtype)
    assert attention_cuda.takes(kernel, query, window) is expected


@pytest.fixture
def ahead(monkeypatch):
    """Let the model's device be one that works ahead."""
    monkeypatch.setattr(attention, "works_ahead", lambda model: True)


def test_no_forward_pass_looks_for_packed_documents(monkeypatch, ahead):
    """Transformers' search reads a value back from the device, once every forward pass."""

    def refused(_):
        raise AssertionError("searched")

    config = LlamaConfig(
        vocab_size=31, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    positions = torch.cat([torch.arange(4), torch.arange(3)])[None]
    before = model.config._attn_implementation
    with training_attention(model, 16), torch.no_grad():
        monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", refused)
        model(torch.arange(7)[None], position_ids=positions, layout=Layout((4, 3)))
        assert attention.is_ours(model)
    assert model.config._attn_implementation == before
    assert not model.training


def test_masks_that_are_not_computed_are_still_refused(monkeypatch, ahead):
    asked = []
    monkeypatch.setattr(attention, "_mask", lambda *_, **__: asked.append(1))
    config = LlamaConfig(
        vocab_size=31, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    with training_attention(LlamaForCausalLM(config), 24):
        assert asked


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 33])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 2, 64), (9, 3, 64), (4, 4, 128),
                                                          (4, 1, 36)])  # fmt: skip
@pytest.mark.parametrize("lengths", [LENGTHS[0], *LENGTHS[-2:]], ids=str)
def test_on_a_device_it_equals_the_definition(cuda, lengths, heads, kv_heads, width, window, dtype):
    """2 % of the norm in half precision, 1e-4 in float32."""
    given = inputs(sum(lengths), heads, kv_heads, width, dtype, cuda)
    out, _ = packed_attention(
        None, *given, None, scaling=SCALE, layout=Layout(lengths), sliding_window=window
    )
    exact = [x.detach().double().cpu().requires_grad_() for x in given]
    wanted = definition(*exact, lengths, window)
    limit = 1e-4 if dtype == torch.float32 else 2e-2
    pairs = [(out, wanted), *zip(gradients(out, given), gradients(wanted, exact), strict=True)]
    for ours, theirs in pairs:
        assert ours.dtype == dtype
        # one token sees itself alone: the exact gradients of its query and key are zero
        assert (ours.double().cpu() - theirs).norm() <= limit * theirs.norm().clamp(min=1)
