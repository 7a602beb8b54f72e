"""Pre-flight checks of products in 8 bits and of CUDA graphs, on the user's own rows."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from postgrad.data.batches import micro_batches
from postgrad.model.attention import training_attention
from postgrad.model.lora import without_eight_bit
from postgrad.train.graphs import SEEN, Graphs
from postgrad.train.objective import Objective
from postgrad.train.preflight.measured import (
    Tolerance,
    compare,
    measure,
    objective_losses,
    taken,
)
from postgrad.train.sft import SupervisedFineTuning, noise_of
from postgrad.types import Check, Tokens

EIGHT_BITS = Tolerance(loss=5e-2, norm=2e-1, gradient=5e-1)
"""The same for products in 8 bits: 2e-2, 8e-2 and 3e-1 on the 135M model in float8; 6e-3, 3e-2 and
2e-1 in int8, on two kinds of rows."""


def eight_bit_near(
    model: Any, objective: Objective, rows: Sequence[Tokens], packed: bool, choice: str
) -> Check:
    """A training step in 8 bits has nearly the loss and gradient of one in the model's precision.

    `data["near"]` says so; where `train.base_precision` is auto the check passes either way.
    """
    found = []
    with training_attention(model):
        model.train()
        for computing in (nullcontext(), without_eight_bit(model)):
            torch.manual_seed(0)  # the same dropout
            with computing:
                losses = objective_losses(model, objective, rows, packed)
                found.append(measure(model, losses, rows))
        model.eval()
    remedy = "set train.base_precision to model: 8 bits do not hold this model's activations"
    ours, other = found
    what = "products in the model's precision"
    check = compare("eight-bit-near", ours, other, EIGHT_BITS, what, remedy)
    near = check.passed
    if choice == "auto" and not near:
        detail = f"trained in the model's precision, because 8 bits are not near: {check.detail}"
        check = replace(check, passed=True, remedy="", detail=detail)
    return replace(check, data={**check.data, "near": near})


def graphs_match(
    model: Any, objective: SupervisedFineTuning, rows: Sequence[Tokens], tolerance: Tolerance
) -> Check:
    """A replayed graph has the loss and gradient of its micro-batch computed without one.

    It is recorded with the longest row cut in two, where both rows need the same sizes, so that
    something left over from there would show.
    """
    tokens = sum(map(len, rows))
    batch, other = (micro_batches(each, tokens, True)[0] for each in (rows, cut(rows)))
    graphs, weight = Graphs(max(map(len, rows)), tokens), batch.supervised
    if graphs.room(other) != graphs.room(batch):
        other = batch
    with training_attention(model):
        model.train(not noise_of(model))  # as a step computes, in 8 bits too, but nothing at random
        plain = measure(model, iter([objective(model, batch).total]), rows)
        for each in (*[other] * SEEN, batch):
            model.zero_grad(set_to_none=True)
            loss = graphs(model, objective, each, weight)
        replayed = taken(model, float(loss.total), weight)
        model.eval()
    name = "graphs-match"
    if not graphs.replayed:
        return Check(name, True, f"not recorded, so not used: {graphs.reason}")
    remedy = "set train.cuda_graphs to false"
    return compare(name, replayed, plain, tolerance, "the same row without a graph", remedy)


def cut(rows: Sequence[Tokens]) -> list[Tokens]:
    """Return the rows with the longest in two halves."""
    longest = max(rows, key=len)
    middle = len(longest) // 2
    ids, weights = longest.ids, longest.weights.copy()
    weights[middle] = 0  # the first token of a document is not predicted
    halves = (slice(None, middle), slice(middle, None))
    others = [row for row in rows if row is not longest]
    return [*others, *(Tokens(ids[h], weights[h], f"{longest.example_id}-cut") for h in halves)]
