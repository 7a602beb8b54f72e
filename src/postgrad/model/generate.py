"""Greedy answers for many prompts: grouped, batched, and equal to generating one at a time.

Prompts that begin alike share the computation of their beginning; prompts of similar length share
a batch; answers that are finished leave it. In float32 the result is that of Transformers'
`generate(do_sample=False)` on each prompt alone; in bf16 a tie may fall differently.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from postgrad.errors import ModelError
from postgrad.model.decode import (
    Decoder,
    PaddedDecoder,
    Prefix,
    SharedDecoder,
    can_share,
    decoding_attention,
    read_prefix,
    steady_length,
)
from postgrad.model.lora import cast_once
from postgrad.types import Completion, StopReason

PREFIX_TOKENS = 8
"""Shortest common beginning worth computing once."""
SAVED_TOKENS = 2048
"""Prompt tokens that sharing must save to give some of the prompts batches of their own."""
FINISHED_SHARE = 0.25
"""Share of a batch that must be finished before the finished rows are taken out."""

OnProgress = Callable[[Sequence[int], float], None]
"""Called after each batch with the indices of its prompts and the seconds it took."""


@dataclass(frozen=True, slots=True)
class GenerationBatch:
    """Prompts that are decoded together, longest first."""

    prefix: int
    """How many tokens at the beginning are common to all of them and computed once."""
    rows: tuple[int, ...]
    """Indices into the prompts."""


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: frozenset[int],
    batch_tokens: int,
    tokenizer: Any,
    on_progress: OnProgress | None = None,
) -> list[Completion]:
    """Answer every prompt greedily; completions come in the order of the prompts.

    Args:
        model: a Transformers causal language model, on any device and in any precision.
        prompts: token ids, none of them empty.
        max_new_tokens: longest answer; one that reaches it has stop reason LENGTH.
        stop_ids: tokens that end an answer. The stop token is the last of a completion's `ids` and
            has a log-probability, but is not part of its text.
        batch_tokens: rows x (longest prompt + max_new_tokens) of a batch, a common beginning
            counted once. A prompt longer than that is decoded alone.
        tokenizer: turns ids into text; special tokens are left out.
        on_progress: see `OnProgress`.

    Raises:
        ModelError: the model returns logits that are not finite.
    """
    assert max_new_tokens > 0
    assert all(len(prompt) > 0 for prompt in prompts)
    share = can_share(model)
    steady = steady_length(model)
    batches = plan_batches(prompts, max_new_tokens, batch_tokens, share, steady)
    completions: dict[int, Completion] = {}
    attention: AbstractContextManager[None] = decoding_attention(model) if share else nullcontext()
    prefixes: dict[tuple[int, ...], Prefix] = {}
    with torch.inference_mode(), _evaluating(model), cast_once(model), attention:
        for batch in batches:
            start = time.perf_counter()
            decoder = _decoder(model, prompts, batch, max_new_tokens, share, prefixes)
            answers = _decode(decoder, len(batch.rows), max_new_tokens, stop_ids)
            for row, (ids, logprobs) in zip(batch.rows, answers, strict=True):
                completions[row] = _completion(ids, logprobs, stop_ids, tokenizer)
            if on_progress is not None:
                on_progress(batch.rows, time.perf_counter() - start)
    return [completions[row] for row in range(len(prompts))]


def plan_batches(
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_tokens: int,
    share: bool,
    steady: int | None = None,
) -> list[GenerationBatch]:
    """Group prompts by their beginning, sort each group by length and cut it into batches.

    Rows that may grow beyond `steady` tokens are decoded alone (`decode.steady_length`).
    """
    together, batches = [], []
    for row, prompt in enumerate(prompts):
        if steady is not None and len(prompt) + max_new_tokens > steady:
            batches.append(GenerationBatch(0, (row,)))
        else:
            together.append(row)
    for prefix, members in _families(prompts, together, share):
        members = sorted(members, key=lambda row: (-len(prompts[row]), row))
        while members:
            own = len(prompts[members[0]]) - prefix + max_new_tokens
            count = max(1, (batch_tokens - prefix) // own)
            batches.append(GenerationBatch(prefix, tuple(members[:count])))
            members = members[count:]
    return batches


def _families(
    prompts: Sequence[Sequence[int]], rows: Sequence[int], share: bool
) -> Iterator[tuple[int, list[int]]]:
    """Yield (tokens in common, rows) of each group that gains from sharing, then all the others."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for row in rows:
        groups.setdefault(tuple(prompts[row][:PREFIX_TOKENS]), []).append(row)
    others: list[int] = []
    for group in groups.values():
        common = _common([prompts[row] for row in group])
        saved = (len(group) - 1) * common
        worth = saved >= SAVED_TOKENS or len(group) == len(rows) > 1
        if share and common >= PREFIX_TOKENS and worth:
            yield common, group
        else:
            others += group
    if others:
        yield 0, others


def _common(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all prompts begin with, at least one left over for each."""
    low, high = min(map(tuple, prompts)), max(map(tuple, prompts))
    limit = min(len(prompt) for prompt in prompts) - 1
    different = (i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b)
    return min(limit, next(different, limit))


def _decoder(
    model: Any,
    prompts: Sequence[Sequence[int]],
    batch: GenerationBatch,
    max_new_tokens: int,
    share: bool,
    prefixes: dict[tuple[int, ...], Prefix],
) -> Decoder:
    """Return the decoder of a batch; `prefixes` keeps the last prefix for the next batch."""
    if not share:
        return PaddedDecoder(model, [prompts[row] for row in batch.rows])
    prefix = None
    if batch.prefix:
        ids = tuple(prompts[batch.rows[0]][: batch.prefix])
        if ids not in prefixes:
            prefixes.clear()
            prefixes[ids] = read_prefix(model, ids)
        prefix = prefixes[ids]
    rest = [prompts[row][batch.prefix :] for row in batch.rows]
    return SharedDecoder(model, prefix, rest, max_new_tokens)


def _decode(
    decoder: Decoder, rows: int, max_new_tokens: int, stop_ids: frozenset[int]
) -> list[tuple[list[int], list[float]]]:
    """Run a batch to its end; return ids and log-probabilities of each row."""
    answers: list[tuple[list[int], list[float]]] = [([], []) for _ in range(rows)]
    active = list(range(rows))
    """Which answer each row of the decoder is; finished ones stay until they are taken out."""
    finished: set[int] = set()
    tokens, logprobs = _choose(decoder.prefill())
    for number in range(1, max_new_tokens + 1):
        pairs = zip(active, tokens.tolist(), logprobs.tolist(), strict=True)
        for row, token, logprob in pairs:
            if row not in finished:
                answers[row][0].append(token)
                answers[row][1].append(logprob)
                if token in stop_ids:
                    finished.add(row)
        if len(finished) == rows or number == max_new_tokens:
            break
        left = sum(row not in finished for row in active)
        if left <= (1 - FINISHED_SHARE) * len(active):
            index = torch.tensor(_compact(active, finished), device=tokens.device)
            decoder.keep(index)
            tokens, active = tokens[index], [active[i] for i in index.tolist()]
        tokens, logprobs = _choose(decoder.step(tokens))
    return answers


def _compact(active: Sequence[int], finished: set[int]) -> list[int]:
    """Return the rows to keep, with as few as possible changing places."""
    kept = [i for i, row in enumerate(active) if row not in finished]
    tail = [i for i in kept if i >= len(kept)]
    return [i if active[i] not in finished else tail.pop() for i in range(len(kept))]


def _choose(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the likeliest token of each row and its log-probability; logits [rows, vocabulary]."""
    best, tokens = logits.max(-1)
    best, rest = best.float(), logits.to(torch.float32, copy=True)
    logprobs = -rest.sub_(best[:, None]).exp_().sum(-1).log()
    if not torch.isfinite(logprobs).all():
        raise ModelError(
            "the model returns logits that are not finite",
            "set model.precision to fp32, or check that the weights are whole",
        )
    return tokens, logprobs


def _completion(
    ids: list[int], logprobs: list[float], stop_ids: frozenset[int], tokenizer: Any
) -> Completion:
    stopped = ids[-1] in stop_ids
    text = tokenizer.decode(ids[:-1] if stopped else ids, skip_special_tokens=True)
    reason = StopReason.STOP if stopped else StopReason.LENGTH
    return Completion(text, tuple(ids), reason, tuple(logprobs))


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Switch dropout and gradient checkpointing off, and back to what it was afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
