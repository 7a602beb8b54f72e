"""Forgetting while it happens: KL(base || tuned) on fixed answers, at every held-out evaluation.

The distance is taken from whole distributions, position by position, and is exact: of the base its
last hidden states are kept where its head is frozen, else its logits.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from postgrad.config import LoraConfig
from postgrad.data.batches import micro_batches
from postgrad.data.dataset import example_from_row, example_to_row
from postgrad.data.generic_prompts import probe_prompts
from postgrad.errors import TrainingError
from postgrad.model.divergence import forward_kl
from postgrad.model.lora import disabled
from postgrad.run import Run, read_jsonl
from postgrad.train.base_answers import answer_as_base
from postgrad.train.plan import evaluation_tokens
from postgrad.train.probe_rows import given_chats, usable_chats
from postgrad.train.session import Session
from postgrad.train.sft import SupervisedFineTuning
from postgrad.types import Conversation, Message, Tokens

ANSWER_TOKENS = 32
"""Longest answer of the base model to a request of the fixed probe set."""
FEWEST_PROMPTS = 8
"""Requests of the probe set that are asked however short the training is."""
SHARE_OF_TRAINING = 0.02
"""What measuring may cost, as a share of the training."""
FORWARD_SHARE = 0.6
"""Cost of a token that is only read, both heads included, as a share of one that is trained on with
LoRA (0.62 measured on a 135M model, one thread of a CPU)."""
CHUNK = 64
"""Positions that are compared at a time: five times their logits in float32 exist then, which with
256 positions was the largest memory of a training of a 135M model."""
MOST_BYTES = 2**30
"""What the base model's logits may take where they have to be kept."""


class KlProbe:
    """Fixed rows and what the base model says on them; calling it measures a model."""

    def __init__(
        self,
        model: Any,
        objective: SupervisedFineTuning,
        rows: Sequence[Tokens],
        *,
        micro_batch_tokens: int,
        packed: bool,
        frozen_head: bool,
    ) -> None:
        """Ask the base, which `model` must be when its adapters are switched off.

        Args:
            model: inside its attention block, as it is trained.
            objective: says in which precision, and whether logits are the head's own.
            rows: rendered; the supervised positions count, with their weights.
            micro_batch_tokens: size of a forward pass.
            packed: whether documents may share a row.
            frozen_head: keep hidden states [N, H] instead of logits [N, V]; LoRA leaves the head.

        Raises:
            TrainingError: the logits that must be kept would take more than a gibibyte.
        """
        self.objective = objective
        self.batches = micro_batches(rows, micro_batch_tokens, packed)
        self.tokens = sum(len(row) for row in rows)
        self.weight = sum(row.supervised for row in rows)
        self._as_logits = not (frozen_head and objective.fused)
        if self._as_logits:
            self._refuse_if_large(model)
        with torch.no_grad(), disabled(model):
            self._base = [self._kept(model, outputs) for _, outputs in self._outputs(model)]

    def __call__(self, model: Any) -> float:
        """Return KL(base || tuned) of the model as it is now, in nats per supervised token."""
        total = 0.0
        with torch.no_grad():
            for base, (weights, tuned) in zip(self._base, self._outputs(model), strict=True):
                for start in range(0, len(tuned), CHUNK):
                    part = slice(start, start + CHUNK)
                    with self.objective.precision(tuned.device):
                        q = self.objective.logits(model, tuned[part])
                        p = base[part].to(tuned.device)
                        p = p if self._as_logits else self.objective.logits(model, p)
                    total += float((forward_kl(p, q).double() * weights[part]).sum())
        return total / self.weight

    def _outputs(self, model: Any) -> list[tuple[Tensor, Tensor]]:
        """Return weights and outputs of each batch's supervised positions, in evaluation mode."""
        was_training = model.training
        model.eval()
        found = []
        for batch in self.batches:
            at = self.objective.positions(model, batch)
            with self.objective.precision(at.flat.device):
                found.append((at.weights, self.objective.outputs(model, at)))
        model.train(was_training)
        return found

    def _kept(self, model: Any, outputs: Tensor) -> Tensor:
        if not self._as_logits:
            return outputs
        with self.objective.precision(outputs.device):
            chunks = torch.split(outputs, CHUNK)
            parts = [self.objective.logits(model, chunk).cpu() for chunk in chunks]
        return torch.cat(parts)

    def _refuse_if_large(self, model: Any) -> None:
        positions = sum(int((batch.weights != 0).sum()) for batch in self.batches)
        vocabulary = len(model.get_output_embeddings().weight)
        size = 2 if self.objective.autocast else next(model.parameters()).element_size()
        if positions * vocabulary * size > MOST_BYTES:
            most = MOST_BYTES // (vocabulary * size)
            raise TrainingError(
                f"train.kl_probe has {positions:,} supervised tokens; the base model's logits on "
                f"them would take {positions * vocabulary * size / 2**30:.1f} GiB",
                f"give rows with at most {most:,} supervised tokens, or set train.kl_probe to auto",
            )


def open_kl_probe(session: Session, run: Run, packed: bool) -> KlProbe | None:
    """Make the probe of a training that is about to start or to be resumed; None = not measured.

    Its rows are kept in data/probe.jsonl, and a resumed run reads them there. To be called while
    the model still is its base: before the weights of a checkpoint are loaded.

    Raises:
        DataError: rows of the user's file that cannot be used.
    """
    config = session.recipe.train
    if config.kl_probe is None:
        return None
    auto, known = config.kl_probe == "auto", run.probe_path.exists()
    if known:
        examples = [example_from_row(row) for row in read_jsonl(run.probe_path)]
    elif auto:
        prompts = affordable_prompts(session, packed)
        examples = answer_as_base(session.loaded, session.renderer, prompts, ANSWER_TOKENS)
    else:
        examples = given_chats(config)
    longest = session.recipe.data.max_length
    rows = usable_chats(session.renderer, examples, longest, given=not auto)
    if not known:
        run.write_jsonl(run.probe_path, map(example_to_row, examples))
    if not rows:
        run.event("probe-empty", reason="the base model answers none of the probe's requests")
        if config.early_stopping and config.early_stopping.max_kl is not None:
            raise TrainingError(
                "the base model answers none of the probe's requests, so its distance cannot be "
                "limited",
                "give train.kl_probe a file of chats, or remove train.early_stopping.max_kl",
            )
        return None
    assert isinstance(config.micro_batch_tokens, int)
    with session.attention():
        return KlProbe(
            session.model,
            session.objective,
            rows,
            micro_batch_tokens=evaluation_tokens(
                config.micro_batch_tokens, session.model.device.type == "cuda"
            ),
            packed=packed,
            frozen_head=isinstance(session.recipe.model.adapt, LoraConfig),
        )


def affordable_prompts(session: Session, packed: bool) -> tuple[str, ...]:
    """Return the beginning of the fixed probe set that costs at most 2 % of this training.

    Counted in tokens, over all evaluations; never fewer than eight requests.
    """
    stream, every = session.stream(packed), session.recipe.train.eval_steps
    assert isinstance(every, int)
    evaluations = -(-len(stream) // every) + 1
    room = SHARE_OF_TRAINING * stream.tokens / FORWARD_SHARE / evaluations
    chosen: list[str] = []
    for prompt in probe_prompts():
        request = session.renderer.prompt_ids(Conversation((Message("user", prompt),)))
        room -= len(request) + ANSWER_TOKENS
        if room < 0 and len(chosen) >= FEWEST_PROMPTS:
            break
        chosen.append(prompt)
    return tuple(chosen)
