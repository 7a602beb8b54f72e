"""Likelihoods against a plain forward pass of Transformers, one continuation at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from postgrad.errors import ModelError
from postgrad.model import kernels, likelihood, token_tree
from postgrad.model.likelihood import Pair, encode_pairs, log_likelihoods, shared_beginnings
from postgrad.model.token_tree import grow, tree_softmax

sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()


def reference(model, pair):
    """The definition: (log-likelihood, greedy) from the logits of one row."""
    ids = torch.tensor([[*pair.context, *pair.continuation]])
    with torch.no_grad():
        logprobs = model(input_ids=ids).logits[0].double().log_softmax(-1)
    wanted = torch.tensor(pair.continuation)
    rows = logprobs[len(pair.context) - 1 : -1]
    total = float(rows.gather(1, wanted[:, None]).sum())
    return total, bool((rows.argmax(-1) == wanted).all())


def make_groups(seed, beginnings, count=7, longest=40):
    """Groups of options on one context or on several; some contexts share a long beginning."""
    draw = np.random.default_rng(seed)

    def tokens(low, high):
        return tuple(int(t) for t in draw.integers(3, 300, size=draw.integers(low, high)))

    shared = [tokens(90, 120) for _ in range(beginnings)]
    groups = []
    for number in range(count * max(1, beginnings)):
        context = (*(shared[number % beginnings] if beginnings else ()), *tokens(2, longest))
        options = [tokens(1, 9) for _ in range(4)]
        options[1] = options[0][:1] + options[1]
        if number % 3 == 2:
            end = tokens(1, 6)
            groups.append([Pair((*context, *option), end) for option in options[:2]])
        else:
            groups.append([Pair(context, option) for option in options])
    return groups


def check(model, groups, found):
    for group, likelihoods in zip(groups, found, strict=True):
        for pair, given_ in zip(group, likelihoods, strict=True):
            total, greedy = reference(model, pair)
            assert given_.logprob == pytest.approx(total, abs=2e-4)
            assert given_.greedy == greedy


@pytest.mark.parametrize("beginnings", [0, 1, 2])
@pytest.mark.parametrize("pass_tokens", [1, 150, 10_000])
def test_figures_are_those_of_a_plain_forward_pass(model, beginnings, pass_tokens):
    groups = make_groups(beginnings, beginnings)
    assert bool(beginnings) == bool(shared_beginnings([p[0].context for p in groups])[0][0])
    check(model, groups, log_likelihoods(model, groups, pass_tokens=pass_tokens))


@pytest.mark.parametrize("beginnings", [0, 1])
def test_under_autocast_they_are_those_of_a_model_in_that_precision(tiny_model_dir, beginnings):
    """Full tuning keeps weights in float32 and computes in bfloat16."""
    wide, narrow = (
        AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=dtype).eval()
        for dtype in (torch.float32, torch.bfloat16)
    )
    groups = make_groups(beginnings, beginnings)
    with torch.autocast("cpu", torch.bfloat16):
        found = log_likelihoods(wide, groups)
    wanted = [x.logprob for group in log_likelihoods(narrow, groups) for x in group]
    assert [x.logprob for group in found for x in group] == pytest.approx(wanted, rel=0.03, abs=0.3)
    exact = [x.logprob for group in log_likelihoods(wide, groups) for x in group]
    assert exact != [x.logprob for group in found for x in group]


@pytest.mark.parametrize("joined", [0, 10_000])
@pytest.mark.parametrize("plain", [0, 10_000])
@pytest.mark.parametrize("library", [True, False])
def test_every_way_to_attend_gives_the_same(model, monkeypatch, joined, plain, library):
    monkeypatch.setattr(token_tree, "JOINED_PREFIX", joined)
    monkeypatch.setattr(token_tree, "PLAIN_LENGTH", plain)
    if not library:
        monkeypatch.setattr(kernels, "kernels", lambda: kernels.Kernels(None, "off"))
    groups = make_groups(5, 2)
    check(model, groups, log_likelihoods(model, groups, pass_tokens=300))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("prefix", [0, 3])
def test_the_softmax_of_trees_is_its_definition(monkeypatch, dtype, library, prefix):
    if not library:
        monkeypatch.setattr(kernels, "kernels", lambda: kernels.Kernels(None, "off"))
    trees = [grow([[1, 2, 3], [1, 2, 4, 5]]), grow([[6], [7, 8]])]
    length, heads = 16, 6
    hidden = np.ones((2, length, length), dtype=np.bool_)
    hidden[:, :, 0] = False
    for row, tree in enumerate(trees):
        hidden[row, : len(tree), : len(tree)] = ~tree.visible()
    mask = torch.from_numpy(hidden)
    bias = torch.zeros(mask.shape, dtype=dtype).masked_fill_(mask, float("-inf"))
    generator = torch.Generator().manual_seed(1)
    scores = (4 * torch.randn(2 * heads, length, prefix + length, generator=generator)).to(dtype)
    wide = scores.double().view(2, heads, length, -1) * 0.5
    wide[..., prefix:] += bias.double()[:, None]
    found = tree_softmax(scores.clone(), bias, 0.5)
    expected = wide.softmax(-1).view(found.shape)
    close = 1e-6 if dtype == torch.float32 else 1e-2
    assert torch.allclose(found.double(), expected, atol=close)
    assert (found[:, 0, prefix + 1 :] == 0).all()


def test_greedy_continuations_are_recognised(model):
    context = [5, 6, 7, 8]
    made = model.generate(
        torch.tensor([context]), max_new_tokens=3, do_sample=False, eos_token_id=None
    )[0].tolist()
    right = Pair(tuple(context), tuple(made[4:]))
    wrong = Pair(tuple(context), (*made[4:6], (made[6] + 1) % 300))
    found = log_likelihoods(model, [[right, wrong]])[0]
    assert [likelihood.greedy for likelihood in found] == [True, False]


def test_a_model_with_another_attention_gives_the_same_by_rows():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=320, n_positions=256, n_embd=32, n_layer=2, n_head=2,
        bos_token_id=0, eos_token_id=0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    groups = make_groups(3, 1)
    results = {}
    with torch.inference_mode():
        likelihood._by_rows(model, groups, 300, results, None)
    check(model, groups, [results[number] for number in range(len(groups))])


def test_progress_names_every_group_and_training_mode_comes_back(model):
    groups, seen = make_groups(1, 0), []
    model.train()
    log_likelihoods(
        model, groups, pass_tokens=60, on_progress=lambda rows, seconds: seen.extend(rows)
    )
    assert sorted(seen) == list(range(len(groups)))
    assert model.training
    model.eval()


def test_logits_that_are_not_finite_are_an_error(tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="not finite"):
        log_likelihoods(model, make_groups(1, 0))


@given(sequences)
def test_a_tree_holds_every_sequence_and_each_beginning_once(rows):
    tree = grow(rows)
    for row, path in zip(rows, tree.paths, strict=True):
        assert tree.ids[list(path)].tolist() == row
        assert tree.depths[list(path)].tolist() == list(range(len(row)))
        assert tree.parents[list(path)].tolist() == [-1, *path[:-1]]
    assert len(tree) == len({tuple(row[:n]) for row in rows for n in range(1, len(row) + 1)})
    visible = tree.visible()
    for path in tree.paths:
        for depth, node in enumerate(path):
            assert np.flatnonzero(visible[node]).tolist() == sorted(path[: depth + 1])


@given(sequences)
def test_shared_beginnings_are_shared_and_leave_a_token(rows):
    long = [[*(row * 200)[:600], 7] for row in rows]
    found = shared_beginnings(long)
    assert sorted(row for _, members in found for row in members) == list(range(len(long)))
    for size, members in found:
        assert len({tuple(long[row][:size]) for row in members}) == 1
        assert size < min(len(long[row]) for row in members)


def test_the_division_into_beginnings_saves_the_most():
    one, two = [1] * 100, [2] * 100
    rows = [[9, *one, n] for n in range(10)] + [[9, *two, n] for n in range(10)] + [[5], [6, 6]]
    found = shared_beginnings(rows)
    assert found == [(101, list(range(10))), (101, list(range(10, 20))), (0, [20, 21])]


def test_encoding_moves_spaces_and_cuts_where_the_context_ends(tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    first, second = encode_pairs(tokenizer, [("the answer  ", " yes"), ("the answer", " yes")])
    assert tokenizer.decode(first.context) == "the answer"
    assert tokenizer.decode(first.continuation) == "   yes"
    assert tokenizer.decode(second.continuation) == " yes"
    whole = tokenizer("the answer yes")["input_ids"]
    assert [*second.context, *second.continuation] == whole


def test_an_empty_context_is_the_first_token(tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    (pair,) = encode_pairs(tokenizer, [("", "yes")])
    assert pair.context == (tokenizer.bos_token_id,)
    assert tokenizer.decode(pair.continuation) == "yes"


def test_a_continuation_without_tokens_is_an_error(tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    with pytest.raises(ModelError, match="no tokens of its own"):
        encode_pairs(tokenizer, [("the answer", "")])
