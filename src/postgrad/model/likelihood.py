"""How likely a model finds given continuations: the figures behind multiple choice and cloze tests.

Encoding and figures are those of lm-evaluation-harness; the computation is not: contexts are read
once for all their continuations (`token_tree`), beginnings that many contexts share once for all of
them, and logits are computed only where a continuation is scored.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor

from postgrad.errors import ModelError
from postgrad.model.decode import Prefix, can_share, read_prefix, steady_length
from postgrad.model.fused import fused_layers, log_sum_exp
from postgrad.model.token_tree import (
    TokenTree,
    computed_dtype,
    grow,
    make_layout,
    tree_attention,
)
from postgrad.types import IntArray

PASS_TOKENS = {"cpu": 2048}
"""Tokens of one forward pass by kind of device, `MOST_PASS_TOKENS` elsewhere."""
MOST_PASS_TOKENS = 16384
SAVED_TOKENS = 512
"""Tokens that sharing a beginning must save to be worth a pass of its own."""
LOGIT_ROWS = 1024
"""Rows of logits that are summed at once: where there is no kernel they become float32."""

OnProgress = Callable[[Sequence[int], float], None]
"""Called after each pass with the indices of its groups and the seconds it took."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A context and its continuation as token ids, neither of them empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def inputs(self) -> tuple[int, ...]:
        """What the model reads: all but the last token, which is only predicted."""
        return (*self.context, *self.continuation[:-1])


@dataclass(frozen=True, slots=True)
class Likelihood:
    """What a model gives to a continuation."""

    logprob: float
    """Sum of the log-probabilities of its tokens, in nats."""
    greedy: bool
    """Whether each of its tokens is the likeliest."""


def encode_pairs(tokenizer: Any, texts: Sequence[tuple[str, str]]) -> list[Pair]:
    """Encode (context, continuation) as lm-evaluation-harness does (`TemplateLM._encode_pair`).

    Spaces at the end of the context go to the continuation. Both together are encoded and cut where
    the context alone ends. An empty context is the beginning-of-sequence (else the end) token.
    Special tokens are added as the tokenizer does by itself, unless the text begins with one.

    Raises:
        ModelError: a continuation has no tokens of its own.
    """
    prefix = tokenizer.bos_token_id
    prefix = tokenizer.eos_token_id if prefix is None else prefix
    first = tokenizer.decode([prefix])
    moved = []
    for context, continuation in texts:
        stripped = context.rstrip()
        moved.append(
            (stripped, context[len(stripped) :] + continuation) if context else ("", continuation)
        )
    encoded: dict[str, tuple[int, ...]] = {}

    def encode(text: str) -> tuple[int, ...]:
        if text not in encoded:
            special = not text.startswith(first)
            encoded[text] = tuple(tokenizer(text, add_special_tokens=special)["input_ids"])
        return encoded[text]

    pairs = []
    for context, continuation in moved:
        if context:
            before = encode(context)
            after = encode(context + continuation)[len(before) :]
        else:
            after = tuple(tokenizer(continuation, add_special_tokens=False)["input_ids"])
            before = (prefix,)
            if after[:1] == before:
                after = after[1:]
        if not after or not before:
            raise ModelError(
                f"the continuation {continuation!r} has no tokens of its own after its context",
                "correct the task's rows",
            )
        pairs.append(Pair(before, after))
    return pairs


def log_likelihoods(
    model: Any,
    groups: Sequence[Sequence[Pair]],
    *,
    pass_tokens: int | None = None,
    on_progress: OnProgress | None = None,
) -> list[list[Likelihood]]:
    """Return the likelihood of every continuation, in the order of the groups.

    Args:
        model: a Transformers causal language model, on any device and in any precision.
        groups: pairs that belong together: the options of one question, all on one context or not.
        pass_tokens: tokens of one forward pass, a shared beginning not counted; None = by device.
            A group that is larger has a pass of its own.
        on_progress: see `OnProgress`.

    Raises:
        ModelError: the model returns logits that are not finite.
    """
    device = next(model.parameters()).device
    most = pass_tokens or PASS_TOKENS.get(device.type, MOST_PASS_TOKENS)
    results: dict[int, list[Likelihood]] = {}
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            if can_share(model) and steady_length(model) is None:
                _by_trees(model, groups, most, results, on_progress)
            else:
                _by_rows(model, groups, most, results, on_progress)
    finally:
        model.train(was_training)
    return [results[number] for number in range(len(groups))]


def shared_beginnings(sequences: Sequence[Sequence[int]]) -> list[tuple[int, list[int]]]:
    """Divide sequences into groups that share a beginning, saving the most tokens.

    Returns (tokens in common, indices); sequences whose sharing would save too little come last,
    together, with 0. At least one token of each sequence is left over.
    """
    order = sorted(range(len(sequences)), key=lambda n: tuple(sequences[n]))
    found = _divide(sequences, order)
    kept = [(size, rows) for size, rows in found if size * (len(rows) - 1) >= SAVED_TOKENS]
    taken = {row for _, rows in kept for row in rows}
    rest = [row for row in range(len(sequences)) if row not in taken]
    return [*kept, (0, rest)] if rest else kept


def _divide(sequences: Sequence[Sequence[int]], rows: list[int]) -> list[tuple[int, list[int]]]:
    """Choose for sorted rows between their common beginning and those of their parts."""
    first, last = sequences[rows[0]], sequences[rows[-1]]
    shortest = min(len(sequences[row]) for row in rows) - 1
    pairs = zip(first[:shortest], last[:shortest], strict=True)
    common = next((i for i, (a, b) in enumerate(pairs) if a != b), shortest)
    if len(rows) == 1 or len(rows) * max(len(sequences[row]) for row in rows) < SAVED_TOKENS:
        return [(common, rows)]

    def following(row: int) -> int | None:
        """The next token; None where it is the last, which is left over."""
        return sequences[row][common] if len(sequences[row]) > common + 1 else None

    parts = [list(part) for _, part in itertools.groupby(rows, key=following)]
    if len(parts) == 1:
        return [(common, rows)]
    divided = [found for part in parts for found in _divide(sequences, part)]
    if sum(size * (len(part) - 1) for size, part in divided) > common * (len(rows) - 1):
        return divided
    return [(common, rows)]


def _by_trees(
    model: Any,
    groups: Sequence[Sequence[Pair]],
    most: int,
    results: dict[int, list[Likelihood]],
    on_progress: OnProgress | None,
) -> None:
    with tree_attention(model), fused_layers(model):
        for size, members in shared_beginnings([_beginning(group) for group in groups]):
            prefix = None
            if size:
                prefix = read_prefix(model, groups[members[0]][0].context[:size])
            trees = {n: grow([pair.inputs[size:] for pair in groups[n]]) for n in members}
            for batch in _passes(trees, most):
                began = time.perf_counter()
                found = _read_trees(
                    model, [trees[n] for n in batch], [groups[n] for n in batch], prefix
                )
                results.update(zip(batch, found, strict=True))
                if on_progress is not None:
                    on_progress(batch, time.perf_counter() - began)


def _beginning(group: Sequence[Pair]) -> tuple[int, ...]:
    """Return what all contexts of a group begin with, and one token more."""
    low, high = min(pair.context for pair in group), max(pair.context for pair in group)
    shortest = min(len(pair.context) for pair in group)
    pairs = zip(low[:shortest], high[:shortest], strict=True)
    return low[: next((i for i, (a, b) in enumerate(pairs) if a != b), shortest) + 1]


def _passes(trees: dict[int, TokenTree], most: int) -> list[list[int]]:
    """Cut the groups, largest first, into passes of at most `most` tokens."""
    passes: list[list[int]] = []
    tokens = 0
    for number in sorted(trees, key=lambda n: (-len(trees[n]), n)):
        size = len(trees[number])
        if not passes or tokens + size > most:
            passes.append([])
            tokens = 0
        passes[-1].append(number)
        tokens += size
    return passes


def _read_trees(
    model: Any, trees: Sequence[TokenTree], groups: Sequence[Sequence[Pair]], prefix: Prefix | None
) -> list[list[Likelihood]]:
    parameter = next(model.parameters())
    start = prefix.length if prefix else 0
    ids = torch.from_numpy(np.concatenate([tree.ids for tree in trees])).to(parameter.device)
    depths = np.concatenate([tree.depths for tree in trees])
    positions = torch.from_numpy(depths + start).to(parameter.device)
    nodes: list[int] = []
    targets: list[int] = []
    sizes: list[int] = []
    offset = 0
    for tree, group in zip(trees, groups, strict=True):
        for path, pair in zip(tree.paths, group, strict=True):
            nodes += [offset + node for node in path[-len(pair.continuation) :]]
            targets += pair.continuation
            sizes.append(len(pair.continuation))
        offset += len(tree)
    scored, rows = np.unique(np.array(nodes), return_inverse=True)
    logits = model(
        input_ids=ids[None],
        position_ids=positions[None],
        use_cache=False,
        logits_to_keep=torch.from_numpy(scored).to(parameter.device),
        layout=make_layout(trees, prefix, computed_dtype(parameter), parameter.device),
    ).logits[0]
    found = iter(_sums(*_log_probabilities(logits, rows, targets), sizes))
    return [[next(found) for _ in group] for group in groups]


def _log_probabilities(
    logits: Tensor, rows: Sequence[int] | IntArray, targets: Sequence[int]
) -> tuple[list[float], list[bool]]:
    """Return log-probability of each target in its row of logits [N, V], and whether it is best."""
    index = torch.as_tensor(rows, device=logits.device)
    wanted = torch.as_tensor(targets, device=logits.device)
    parts = [log_sum_exp(part) for part in torch.split(logits, LOGIT_ROWS)]
    denominators, likeliest = (torch.cat(found) for found in zip(*parts, strict=True))
    values = logits[index, wanted].float() - denominators[index]
    if not torch.isfinite(values).all():
        raise ModelError(
            "the model returns logits that are not finite",
            "set model.precision to fp32, or check that the weights are whole",
        )
    return values.tolist(), (likeliest[index] == wanted).tolist()


def _sums(values: Sequence[float], best: Sequence[bool], sizes: Sequence[int]) -> list[Likelihood]:
    found, start = [], 0
    for size in sizes:
        part = slice(start, start + size)
        found.append(Likelihood(sum(values[part]), all(best[part])))
        start += size
    return found


def _by_rows(
    model: Any,
    groups: Sequence[Sequence[Pair]],
    most: int,
    results: dict[int, list[Likelihood]],
    on_progress: OnProgress | None,
) -> None:
    """A row of its own for each pair, padded on the left: for models with other attentions."""
    flat = [(n, pair) for n, group in enumerate(groups) for pair in group]
    order = sorted(range(len(flat)), key=lambda i: -len(flat[i][1].inputs))
    figures: dict[int, Likelihood] = {}
    while order:
        longest = len(flat[order[0]][1].inputs)
        count = 1 if steady_length(model) is not None else max(1, most // longest)
        batch, order = order[:count], order[count:]
        began = time.perf_counter()
        pairs = [flat[i][1] for i in batch]
        figures.update(zip(batch, _read_rows(model, pairs, longest), strict=True))
        if on_progress is not None:
            done = [flat[i][0] for i in batch]
            on_progress(done, time.perf_counter() - began)
    for i, (n, _) in enumerate(flat):
        results.setdefault(n, []).append(figures[i])


def _read_rows(model: Any, pairs: Sequence[Pair], longest: int) -> list[Likelihood]:
    ids = torch.zeros(len(pairs), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, pair in enumerate(pairs):
        read = pair.inputs
        ids[row, longest - len(read) :] = torch.tensor(read)
        mask[row, longest - len(read) :] = 1
    keep = max(len(pair.continuation) for pair in pairs)
    device = next(model.parameters()).device
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in signature(model.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp_(min=0)
    moved = {name: value.to(device) for name, value in inputs.items()}
    logits = model(**moved, use_cache=False, logits_to_keep=keep).logits
    logits = logits.reshape(-1, logits.shape[-1])
    rows = [
        row * keep + keep - len(pair.continuation) + i
        for row, pair in enumerate(pairs)
        for i in range(len(pair.continuation))
    ]
    targets = [token for pair in pairs for token in pair.continuation]
    sizes = [len(pair.continuation) for pair in pairs]
    return _sums(*_log_probabilities(logits, rows, targets), sizes)
