"""Supervised fine-tuning: weighted next-token cross-entropy on the supervised positions only.

With `kl_weight` the distance to the base, KL(base || tuned), is added at the same positions.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from postgrad.data.batches import micro_batches
from postgrad.errors import ModelError
from postgrad.model import lora
from postgrad.model.attention import is_ours, training_attention
from postgrad.model.divergence import cross_entropy_and_kl, forward_kl
from postgrad.model.fused import cross_entropy
from postgrad.model.layout import Layout
from postgrad.model.transfer import on_device
from postgrad.types import Batch, IntArray, LossSum, Tokens

ROW_MULTIPLES = {512: 16, 1 << 62: 64}
"""Tokens of a packed row -> it is padded to a multiple of this many, by a document that nothing
reads."""
POSITION_MULTIPLE = 32
"""Supervised positions are padded to a multiple of this, with weight zero. Few distinct shapes let
oneDNN keep its kernels and malloc its blocks: without, a long CPU run slows down by half."""
SHARED_LEAST = 0.04
"""A common beginning is computed once when that saves at least this share of the tokens."""
CHUNK = 1024
"""Supervised positions whose logits exist at the same time."""
KL_CHUNK = 256
"""The same where two models' logits are compared, in float32."""


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


class _FusedCrossEntropyAndKl(torch.autograd.Function):
    """sum_i w_i (-log q_i[y_i] + b KL(p_i || q_i)); q from hidden states h, p from the base's.

    Both go through the same frozen head; as above, no logits are kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        base: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        w: Tensor,
        kl_weight: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert not any(ctx.needs_input_grad[1:]), "the head of the base does not move"
        matrix = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden)
        losses, kl = (
            torch.empty(len(hidden), dtype=torch.float32, device=hidden.device) for _ in range(2)
        )
        for start in range(0, len(hidden), KL_CHUNK):
            part = slice(start, start + KL_CHUNK)
            tuned, plain = (functional.linear(h[part], matrix, bias) for h in (hidden, base))
            losses[part], kl[part], delta = cross_entropy_and_kl(
                tuned, plain, labels[part], w[part], kl_weight
            )
            grad_hidden[part] = delta @ matrix
        ctx.save_for_backward(grad_hidden)
        ctx.mark_non_differentiable(losses, kl)
        total = ((losses + kl_weight * kl) * w).sum(dtype=torch.float64)
        return total, losses, kl

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (of_hidden,) = ctx.saved_tensors
        return of_hidden * grad.to(of_hidden.dtype), *[None] * 6


@dataclass(frozen=True, slots=True)
class Room:
    """Sizes that micro-batches are padded to, so that many have the same (graphs.py)."""

    tokens: int
    """T of a packed row."""
    documents: int
    longest: int
    """Tokens of the longest document, the one that pads the row included."""
    positions: int
    """N, supervised positions."""
    dense: bool = False
    """All documents are equally long and fill the row: their lengths are always the same."""

    def layout(self, lengths: Sequence[int], device: torch.device) -> Layout:
        """Return a layout whose documents are read on the device; `lengths` add up to T."""
        ends = np.full(self.documents + 1, self.tokens, np.int32)
        ends[: len(lengths) + 1] = np.cumsum((0, *lengths))
        if self.dense:
            return Layout(tuple(lengths), ends=on_device(ends, device), fixed=True)
        longest = min(self.longest, self.tokens)
        whole, rest = divmod(self.tokens, longest)
        said = (longest,) * whole + ((rest,) if rest else ())
        return Layout(said, ends=on_device(ends, device))


@dataclass(frozen=True, slots=True)
class Positions:
    """What the model gets for a batch, and its supervised positions."""

    inputs: dict[str, Any]
    """Keywords of the model's forward."""
    flat: Tensor
    """[N] indices into its hidden states, rows one after another; padded to a multiple."""
    labels: Tensor
    """[N] the tokens to predict."""
    weights: Tensor
    """[N] zero where padded."""


@dataclass(frozen=True, slots=True)
class SupervisedFineTuning:
    """The SFT objective."""

    fused: bool = True
    """Skip the logits (see `_FusedCrossEntropy`); False goes through the model's own head."""
    autocast: bool = False
    """Compute a float32 model in bf16 (full tuning keeps float32 master weights)."""
    share_prefix: bool = False
    """Compute what all documents of a packed row begin with once (see `share_prefix`)."""
    kl_weight: float = 0.0
    """Times KL(base || tuned) is added while training; the base is the adapters switched off."""

    @property
    def terms(self) -> tuple[str, ...]:
        """What a loss sum is made of, when it is more than the loss."""
        return ("loss", "kl") if self.kl_weight else ()

    def __call__(self, model: Any, batch: Batch, per_document: bool = False) -> LossSum:
        """Return the loss sum of a micro-batch; `per_document` adds a sum for each document.

        The distance to the base is part of what is trained, not of what is measured: without
        gradients and in the sums of documents there is none of it.
        """
        at = self.positions(model, batch)
        if not per_document:
            return self.loss(model, at, batch.supervised)
        device = at.flat.device
        with self.precision(device):
            total, losses = self._losses(model, at)
        rows, columns = np.nonzero(batch.weights)
        document = on_device(batch.documents[rows, columns], device)
        sums = torch.zeros(len(batch.example_ids), dtype=torch.float64, device=device)
        sums.index_add_(0, document, (losses * at.weights)[: len(rows)].double())
        return LossSum(total, batch.supervised, sums)

    def loss(self, model: Any, at: Positions, supervised: float) -> LossSum:
        """Return the loss sum of positions that are on the device; their weights add up to that."""
        if not torch.is_grad_enabled():
            with self.precision(at.flat.device):
                return LossSum(self._losses(model, at)[0], supervised)
        cast = lora.cast_once(model) if at.flat.is_cuda else nullcontext()
        with cast, self.precision(at.flat.device):
            if self.kl_weight:
                return self._with_kl(model, at, supervised)
            return LossSum(self._losses(model, at)[0], supervised)

    def positions(self, model: Any, batch: Batch, room: Room | None = None) -> Positions:
        """Return what the model gets and where it has to answer, on its device.

        With `room`, padded to its sizes.
        """
        device = model.get_input_embeddings().weight.device
        rows, columns = np.nonzero(batch.weights)
        spare = (0, -len(rows) % POSITION_MULTIPLE if room is None else room.positions - len(rows))
        share = self.share_prefix and is_ours(model)
        inputs, place = model_inputs(batch, device, share, room)
        flat, labels, weights = (
            on_device(np.pad(values[rows, columns], spare), device)
            for values in (place, batch.labels, batch.weights)
        )
        return Positions(inputs, flat, labels, weights)

    def precision(self, device: torch.device) -> torch.autocast:
        """Return a block inside which the model computes in the precision of training."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.autocast)

    def outputs(self, model: Any, at: Positions) -> Tensor:
        """Return what the logits of the positions are made from: hidden states [N, H] or they.

        Inside `precision`. `logits` finishes it.
        """
        if self.fused:
            found = model.base_model(**at.inputs).last_hidden_state
        else:
            found = model(**at.inputs).logits
        return found.reshape(-1, found.shape[-1]).index_select(0, at.flat)  # type: ignore[no-any-return]

    def logits(self, model: Any, outputs: Tensor) -> Tensor:
        """Return logits [N, V] of `outputs`."""
        return model.get_output_embeddings()(outputs) if self.fused else outputs

    def _losses(self, model: Any, at: Positions) -> tuple[Tensor, Tensor]:
        outputs = self.outputs(model, at)
        if self.fused:
            head = model.get_output_embeddings()
            bias = getattr(head, "bias", None)
            return _FusedCrossEntropy.apply(  # type: ignore[no-untyped-call,no-any-return]
                outputs, head.weight, bias, at.labels, at.weights
            )
        losses = functional.cross_entropy(outputs.float(), at.labels, reduction="none")
        return (losses * at.weights).sum(dtype=torch.float64), losses.detach()

    def _with_kl(self, model: Any, at: Positions, supervised: float) -> LossSum:
        base = self._base_outputs(model, at)
        outputs = self.outputs(model, at)
        if self.fused:
            head = model.get_output_embeddings()
            total, losses, kl = _FusedCrossEntropyAndKl.apply(  # type: ignore[no-untyped-call]
                outputs, base, head.weight, getattr(head, "bias", None), at.labels, at.weights,
                self.kl_weight,
            )  # fmt: skip
        else:
            losses = functional.cross_entropy(outputs.float(), at.labels, reduction="none")
            kl = forward_kl(base, outputs)
            total = ((losses + self.kl_weight * kl) * at.weights).sum(dtype=torch.float64)
        sums = ((of.detach() * at.weights).sum(dtype=torch.float64) for of in (losses, kl))
        return LossSum(total, supervised, terms=dict(zip(self.terms, sums, strict=True)))

    def _base_outputs(self, model: Any, at: Positions) -> Tensor:
        """Return the outputs of the base: adapters off, no dropout, no gradient."""
        was_training = model.training
        model.eval()
        with torch.no_grad(), lora.disabled(model):
            found = self.outputs(model, at)
        model.train(was_training)
        return found


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


def model_inputs(
    batch: Batch, device: Any, share: bool = False, room: Room | None = None
) -> tuple[dict[str, Any], IntArray]:
    """Return what the model gets (ids, positions, the layout of the rows) and where it answers.

    Padded rows are documents of equal length. Without a layout attention would look for documents
    in the positions of a single row, and wait for the device to read them.

    Never a 2-D attention mask: with Transformers any such mask switches packing isolation off.

    Args:
        batch: R rows of S tokens.
        device: where the model is.
        share: what all documents of a packed row begin with is given once.
        room: sizes to pad a packed row to.

    Returns:
        The keywords, and [R, S]: which of the model's hidden states, rows one after another,
        belongs to each position of the batch.
    """
    rows, length = batch.ids.shape
    place = np.arange(rows * length).reshape(rows, length)
    ids, positions, lengths, prefix = batch.ids, batch.positions, batch.lengths, 0
    if share and batch.packed:
        prefix = shared_prefix(batch)
    if prefix:
        own = positions >= prefix
        own[0, :prefix] = True
        place = np.where(own, own.cumsum(1) - 1, positions)
        ids, positions = ids[own][None], positions[own][None]
        lengths = (prefix, *(each - prefix for each in lengths))
    spare = -ids.shape[1] % row_multiple(ids.shape[1]) if batch.packed else 0
    if room is not None:
        spare = room.tokens - ids.shape[1]
    if spare:
        ids = np.pad(ids, ((0, 0), (0, spare)))
        # nothing reads these; a position that the model may not know would still be looked up
        beyond = np.minimum(prefix + np.arange(spare), positions.max())
        positions = np.concatenate([positions, beyond[None]], axis=1)
        lengths = (*lengths, spare)
    inputs: dict[str, Any] = {
        "input_ids": on_device(ids, device),
        "position_ids": on_device(positions, device),
        "use_cache": False,
    }
    lengths = lengths if batch.packed else (length,) * rows
    inputs["layout"] = Layout(lengths, shared_prefix=prefix > 0)
    if room is not None:
        inputs["layout"] = room.layout(lengths, device)
    return inputs, place


def row_multiple(tokens: int) -> int:
    """Return what a packed row of so many tokens is padded to a multiple of."""
    return next(multiple for most, multiple in ROW_MULTIPLES.items() if tokens <= most)


def shared_prefix(batch: Batch) -> int:
    """Return how many tokens all documents of a packed row begin with, when it pays; else 0.

    In a causal model the hidden states of equal beginnings are equal, whatever follows: a system
    prompt that stands in every row is computed once for all, and gets the sum of their gradients.
    Positions that predict something supervised stay with their documents, and each document keeps
    a token of its own.
    """
    lengths = np.array(batch.lengths)
    supervised = batch.positions[0][batch.weights[0] != 0]
    most = min(int(lengths.min()) - 1, int(supervised.min(initial=batch.ids.shape[1])))
    starts = np.cumsum(lengths) - lengths
    beginnings = batch.ids[0][starts[:, None] + np.arange(most)]
    differs = (beginnings != beginnings[0]).any(0)
    prefix = int(differs.argmax()) if differs.any() else most
    return prefix if (len(lengths) - 1) * prefix >= SHARED_LEAST * batch.ids.shape[1] else 0


def why_apart(model: Any) -> str:
    """Return why a common beginning cannot be computed once for this model; "" when it can.

    Not on a GPU, whose kernels know no shared beginning, not under dropout, which would then be
    shared too, and not where layers do not hand the layout to their attention. The rest is tried
    on made-up documents.
    """
    embeddings = model.get_input_embeddings().weight
    if embeddings.device.type != "cpu":
        return f"kernels on {embeddings.device.type} know no shared beginning"
    noise = noise_of(model)
    if noise:
        return f"{noise} would be the same in all rows"
    ids = np.arange(8) % len(embeddings)
    documents = [
        Tokens(np.concatenate([ids, ids[:n][::-1]]), np.zeros(8 + n, np.float32), str(n))
        for n in (5, 2, 3)
    ]
    batch = micro_batches(documents, 100, packed=True)[0]
    assert shared_prefix(batch) >= 8
    found = []
    try:
        with torch.no_grad(), training_attention(model):
            for share in (False, True):
                inputs, place = model_inputs(batch, embeddings.device, share)
                hidden = model.base_model(**inputs).last_hidden_state[0]
                found.append(hidden[torch.from_numpy(place[0])].float())
    except (ModelError, TypeError, ValueError, RuntimeError) as error:
        return str(error).partition("\n")[0]
    apart, together = found
    error_norm = float((apart - together).norm() / apart.norm())
    limit = 1e-4 if embeddings.dtype == torch.float32 else 0.02
    return "" if error_norm <= limit else f"hidden states differ by {error_norm:.1e}"


def noise_of(model: Any) -> str:
    """Return the name of a setting by which the model computes at random in training; "" if none.

    Looks at dropout layers, and at numbers of layers and of the config whose name says so.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and module.p:
            return "dropout"
    for settings in (*map(vars, model.modules()), model.config.get_text_config().to_dict()):
        for name, value in settings.items():
            said = "drop" in name or "jitter" in name
            if said and isinstance(value, float) and value > 0:
                return str(name)
    return ""
