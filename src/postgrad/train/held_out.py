"""Held-out loss: a loss sum for every validation row, whatever the batches look like."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from postgrad.data.batches import micro_batches
from postgrad.model.transfer import on_device
from postgrad.parallel import World
from postgrad.train.objective import Objective
from postgrad.train.stopping import HeldOut
from postgrad.types import Tokens


class Validation:
    """The validation rows, laid out once; calling it measures a model on them."""

    def __init__(self, rows: Sequence[Tokens], micro_batch_tokens: int, packed: bool) -> None:
        """Lay out the rows; ids must be unique, for they are what pairs two evaluations."""
        self.index = {row.example_id: number for number, row in enumerate(rows)}
        assert len(self.index) == len(rows)
        self.weights = np.array([row.supervised for row in rows], dtype=np.float64)
        self.batches = micro_batches(rows, micro_batch_tokens, packed)
        self.tokens = sum(len(row) for row in rows)

    def __call__(self, model: Any, objective: Objective, world: World | None = None) -> HeldOut:
        """Measure every row, in evaluation mode and without gradients, on all ranks together."""
        world = world or World()
        was_training = model.training
        model.eval()
        device = next(model.parameters()).device
        sums = torch.zeros(len(self.index), dtype=torch.float64, device=device)
        with torch.no_grad():
            for batch in self.batches[world.rank :: world.size]:
                rows = np.array([self.index[name] for name in batch.example_ids])
                found = objective(model, batch, per_document=True).per_document
                sums.index_copy_(0, on_device(rows, device), found)
        model.train(was_training)
        return HeldOut(world.sum_(sums).cpu().numpy(), self.weights)
