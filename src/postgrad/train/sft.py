"""Supervised fine-tuning: weighted next-token cross-entropy on the supervised positions only."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from postgrad.model.fused import cross_entropy
from postgrad.model.layout import Layout
from postgrad.model.transfer import on_device
from postgrad.types import Batch, LossSum

ROW_MULTIPLE = 64
"""A packed row is padded to a multiple of this many tokens, with a document that nothing reads."""
POSITION_MULTIPLE = 32
"""Supervised positions are padded to a multiple of this, with weight zero. Few distinct shapes let
oneDNN keep its kernels and malloc its blocks: without, a long CPU run slows down by half."""
CHUNK = 1024
"""Supervised positions whose logits exist at the same time."""


class _FusedCrossEntropy(torch.autograd.Function):
    """sum_i w_i (-log softmax(h_i Wᵀ + b)[y_i]), the gradient computed with the forward pass.

    The logits of `CHUNK` positions exist at a time and are never kept: memory is O(chunk x V)
    instead of O(N x V). Same idea as Liger's fused linear cross-entropy (arXiv 2410.10989).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, w: Tensor
    ) -> tuple[Tensor, Tensor]:
        of_hidden, of_weight, of_bias, *_ = ctx.needs_input_grad
        needs_grad = of_hidden or of_weight or of_bias
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if of_weight else None
        grad_bias = None
        if bias is not None and of_bias:
            grad_bias = torch.zeros_like(bias, dtype=torch.float32)
        matrix = weight.to(hidden.dtype)
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            h, y = hidden[part], labels[part]
            logits = functional.linear(h, matrix, bias)
            losses[part], delta = cross_entropy(logits, y, w[part], gradient=needs_grad)
            if delta is None:
                continue
            assert grad_hidden is not None
            if grad_bias is not None:
                grad_bias += delta.sum(0, dtype=torch.float32)
            grad_hidden[part] = delta @ matrix
            if grad_weight is not None:
                grad_weight += (delta.t() @ h).float()
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(losses)
        return (losses * w).sum(dtype=torch.float64), losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, *of_head = ctx.saved_tensors
        head = [None if g is None else (g * grad.to(g.dtype)).to(ctx.dtype) for g in of_head]
        return of_hidden * grad.to(of_hidden.dtype), *head, None, None


@dataclass(frozen=True, slots=True)
class SupervisedFineTuning:
    """The SFT objective."""

    fused: bool = True
    """Skip the logits (see `_FusedCrossEntropy`); False goes through the model's own head."""
    autocast: bool = False
    """Compute a float32 model in bf16 (full tuning keeps float32 master weights)."""

    def __call__(self, model: Any, batch: Batch, per_document: bool = False) -> LossSum:
        """Return the loss sum of a micro-batch; `per_document` adds a sum for each document."""
        device = model.get_input_embeddings().weight.device
        rows, columns = np.nonzero(batch.weights)
        spare = (0, -len(rows) % POSITION_MULTIPLE)
        flat, labels, weights = (
            on_device(np.pad(values, spare), device)
            for values in (
                rows * _row_length(batch) + columns,
                batch.labels[rows, columns],
                batch.weights[rows, columns],
            )
        )
        with torch.autocast(device.type, torch.bfloat16, enabled=self.autocast):
            total, losses = self._losses(model, batch, flat, labels, weights, device)
        sums = None
        if per_document:
            document = on_device(batch.documents[rows, columns], device)
            sums = torch.zeros(len(batch.example_ids), dtype=torch.float64, device=device)
            sums.index_add_(0, document, (losses * weights)[: len(rows)].double())
        return LossSum(total, batch.supervised, sums)

    def _losses(
        self, model: Any, batch: Batch, flat: Tensor, labels: Tensor, weights: Tensor, device: Any
    ) -> tuple[Tensor, Tensor]:
        inputs = model_inputs(batch, device)
        if self.fused:
            hidden = model.base_model(**inputs).last_hidden_state
            hidden = hidden.reshape(-1, hidden.shape[-1]).index_select(0, flat)
            head = model.get_output_embeddings()
            bias = getattr(head, "bias", None)
            return _FusedCrossEntropy.apply(  # type: ignore[no-untyped-call,no-any-return]
                hidden, head.weight, bias, labels, weights
            )
        logits = model(**inputs).logits
        logits = logits.reshape(-1, logits.shape[-1]).index_select(0, flat).float()
        losses = functional.cross_entropy(logits, labels, reduction="none")
        return (losses * weights).sum(dtype=torch.float64), losses.detach()


def has_plain_head(model: Any) -> bool:
    """Whether logits are the output head applied to the last hidden states, and nothing more.

    Models that scale or cap their logits (Granite, Cohere) must go through their own head.
    """
    head = model.get_output_embeddings()
    ids = torch.arange(4, device=head.weight.device).unsqueeze(0)
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        logits = model(input_ids=ids, use_cache=False).logits.float()
        return torch.allclose(head(hidden).float(), logits, rtol=1e-5, atol=1e-5)


def _row_length(batch: Batch) -> int:
    """Return the tokens of a row as the model sees it."""
    length = int(batch.ids.shape[1])
    return length + -length % ROW_MULTIPLE if batch.packed else length


def model_inputs(batch: Batch, device: Any) -> dict[str, Any]:
    """Return what the model gets: ids, positions, and the layout of the rows.

    Padded rows are documents of equal length. Without a layout attention would look for documents
    in the positions of a single row, and wait for the device to read them.

    Never a 2-D attention mask: with Transformers any such mask switches packing isolation off.
    """
    ids, positions, lengths = batch.ids, batch.positions, batch.lengths
    spare = _row_length(batch) - ids.shape[1]
    if spare:
        ids = np.pad(ids, ((0, 0), (0, spare)))
        positions = np.concatenate([positions, np.arange(spare)[None]], axis=1)
        lengths = (*lengths, spare)
    inputs: dict[str, Any] = {
        "input_ids": on_device(ids, device),
        "position_ids": on_device(positions, device),
        "use_cache": False,
    }
    rows, length = ids.shape
    inputs["layout"] = Layout(lengths if batch.packed else (length,) * rows)
    return inputs
