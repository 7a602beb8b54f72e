"""Attention in one call: when it is taken, what changes nothing, what it does with extremes."""

import pytest
import torch

from postgrad.model import buckets, kernels, short_attention
from postgrad.model.buckets import bucketed_attention
from postgrad.model.layout import Layout, reference_attention
from postgrad.model.short_attention import documents, fits, mean_span

LAYOUT = Layout((5, 9, 30, 2, 70), shared_prefix=True)


@pytest.fixture(autouse=True)
def one_thread(c_kernels):
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


def made(tokens, heads=6, key_heads=2, width=32, dtype=torch.float32, factor=1.0):
    generator = torch.Generator().manual_seed(0)
    return [
        (factor * torch.randn(tokens, n, width, generator=generator)).to(dtype).requires_grad_()
        for n in (heads, key_heads, key_heads)
    ]


def passes(q, k, v, layout=LAYOUT, limit=1000):
    out = bucketed_attention(q, k, v, layout, limit, 0.2, None)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), torch.ones_like(out) / 7)]


def test_threads_change_no_bit():
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(passes(*made(LAYOUT.tokens)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_other_documents_change_no_bit_of_a_document():
    """Alone, among others, and after a larger call has left its intermediate results."""
    q, k, v = made(40 + 100)
    alone = passes(*(x[:40].detach().requires_grad_() for x in (q, k, v)), Layout((40,)))
    passes(*made(900), Layout((900,)))
    among = passes(q, k, v, Layout((40, 60, 40)))
    assert all(torch.equal(a, b[:40]) for a, b in zip(alone, among, strict=True))


def test_documents_that_are_too_long_are_left_at_zero():
    q, k, v = made(LAYOUT.tokens)
    found = passes(q, k, v, limit=40)
    assert documents(LAYOUT, 40).tolist() == [[0, 5, 0], [5, 9, 5], [14, 30, 5], [44, 2, 5]]
    assert all((x[46:] == 0).all() for x in found)
    cut = Layout(LAYOUT.lengths[:-1], shared_prefix=True)
    wanted = passes(*(x[:46].detach().requires_grad_() for x in (q, k, v)), cut)
    assert all(torch.equal(a[:46], b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("factor", [1e-4, 6.0])
def test_flat_and_peaked_scores(factor):
    qkv = made(LAYOUT.tokens, factor=factor)
    wide = [x.detach().double().requires_grad_() for x in qkv]
    out = reference_attention(*wide, LAYOUT, 0.2)
    exact = [out, *torch.autograd.grad(out, wide, torch.ones_like(out) / 7)]
    for ours, wanted in zip(passes(*qkv), exact, strict=True):
        assert (ours - wanted).norm() <= 1e-4 * wanted.norm()


def test_what_is_not_a_number_stays_in_its_document():
    q, k, v = made(80)
    with torch.no_grad():
        k[3, 0, 0] = float("nan")
    out, *gradients = passes(q, k, v, Layout((20, 60)))
    assert out[3:20].isnan().any()
    assert all(x[20:].isfinite().all() for x in (out, *gradients))


def test_queries_that_do_not_lie_one_after_another():
    q, k, v = (x.detach() for x in made(LAYOUT.tokens))
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in (q, k, v)]
    wanted = passes(*(x.clone().requires_grad_() for x in (q, k, v)))
    assert all(torch.equal(a, b) for a, b in zip(passes(*turned), wanted, strict=True))


def test_it_is_taken_where_it_is_faster(monkeypatch):
    short, long = Layout((100, 60)), Layout((100, 300))
    assert mean_span(long, 200) == 100.0
    for dtype, layout, limit, width, taken in (
        (torch.float32, short, 500, 32, True),
        (torch.float32, long, 500, 32, True),
        (torch.bfloat16, short, 500, 32, True),
        (torch.bfloat16, long, 500, 32, False),  # 250 tokens on average
        (torch.bfloat16, long, 200, 32, True),  # the long one goes elsewhere
        (torch.bfloat16, short, 500, 40, False),
        (torch.float16, short, 500, 32, False),
    ):
        assert fits(*made(layout.tokens, width=width, dtype=dtype), layout, limit) == taken
    assert not fits(*made(10**4, 1, 1, 16), Layout((10**4,)), 10**4)  # 200 million numbers
    called = []
    real = short_attention.short_attention
    monkeypatch.setattr(
        buckets, "short_attention", lambda *given: called.append(given) or real(*given)
    )
    q, k, v = made(LAYOUT.tokens)
    bucketed_attention(q, k, v, LAYOUT, 1000, 0.2, 30.0)  # capped scores
    assert called == []
    passes(q, k, v)
    assert len(called) == 1
    monkeypatch.setattr(kernels, "kernels", lambda: kernels.Kernels(None, "off"))
    assert not fits(q, k, v, LAYOUT, 1000)


def test_training_after_an_inference_with_the_same_documents():
    """What is kept of a layout must not be an inference tensor."""
    layout = Layout((3, 11, 8))
    q, k, v = made(layout.tokens)
    with torch.inference_mode():
        bucketed_attention(q, k, v, layout, 977, 0.2, None)
    passes(q, k, v, layout, 977)


def test_a_whole_number_is_a_scale():
    q, k, v = made(LAYOUT.tokens)
    found = [short_attention.short_attention(q, k, v, LAYOUT, 1000, scale) for scale in (1, 1.0)]
    assert torch.equal(*found)
