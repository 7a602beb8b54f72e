"""Train, restore the best weights, prove that they are the best, export them, prove that too."""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from postgrad.config import LoraConfig
from postgrad.data.batches import micro_batches
from postgrad.errors import TrainingError
from postgrad.model import export
from postgrad.model.attention import own_attention, training_attention
from postgrad.model.kernels import kernels
from postgrad.model.lora import lora_layers
from postgrad.progress import Display
from postgrad.run import Run
from postgrad.train.checkpoint import Progress, load_weights, resume, save_weights
from postgrad.train.fit import Loop, fit
from postgrad.train.graphs import Graphs
from postgrad.train.held_out import Validation
from postgrad.train.kl_probe import KlProbe, open_kl_probe
from postgrad.train.memory import peak_memory
from postgrad.train.optimizer import make_optimizer, trainable
from postgrad.train.schedule import learning_rate
from postgrad.train.session import Session
from postgrad.train.sft import model_inputs
from postgrad.train.stopping import HeldOut, Retained, observe

RESTORE_TOLERANCE = 1e-6
"""Largest relative difference between a recorded held-out loss and the restored model's; zero on a
CPU, where sums are made in the same order."""
LOGIT_ROWS = 8
"""Validation rows on which merged and adapted logits are compared."""


Watch = Callable[[Session, int], Mapping[str, Retained]]
"""Session and step -> what is left of each benchmark that train.early_stopping.retention_floor
names. Called first with step 0 while the model is its base, then in every evaluation."""


def train_model(
    session: Session, run: Run, packed: bool, display: Display, watch: Watch | None = None
) -> dict[str, Any]:
    """Run the loop from the newest checkpoint (or from nothing) and deliver the best weights.

    Returns what run.json keeps under `train`.
    """
    config = session.recipe.train
    stream, validation = session.stream(packed), session.held_out(packed)
    peak = config.learning_rate
    assert isinstance(peak, float)
    assert isinstance(config.eval_steps, int)
    optimizer = make_optimizer(session.model, config, peak)
    probe = open_kl_probe(session, run, packed)
    watched = watch(session, 0) if watch else {}
    measure = _measurement(session, validation, probe, watch)
    start = resume(run, session.model, optimizer)
    if start is None:
        torch.manual_seed(session.recipe.seed)
    if session.attention_probe is not None:
        run.event("attention-measured", **asdict(session.attention_probe))
    run.event("shared-prefix", setting=config.shared_prefix, reason=session.apart)
    _record_products(session, run, display)
    if session.model.device.type == "cpu":
        compiled = kernels()
        run.event("kernels", compiled=compiled.library is not None, detail=compiled.detail)
        if compiled.library is None:
            display.note(
                f"element-wise work is not compiled, so steps are slower: {compiled.detail}"
            )
    if not session.objective.fused:
        run.event("logits-kept", reason="this model scales or caps its logits")
    stopping = config.early_stopping
    graphs = open_graphs(session, packed)
    assert (watch is not None) == bool(stopping and stopping.retention_floor)
    with session.attention(), peak_memory(session.model.device) as memory:
        progress = fit(
            session.model,
            session.objective,
            stream,
            optimizer,
            lambda step: learning_rate(
                step, len(stream), peak, config.lr_scheduler_type, config.warmup_ratio
            ),
            loop=Loop(
                config.eval_steps,
                config.save_minutes * 60,
                config.save_total_limit,
                config.max_grad_norm,
            ),
            run=run,
            validate=measure,
            stopper=functools.partial(
                observe,
                patience=stopping.patience if stopping else None,
                min_delta=stopping.min_delta if stopping else "1se",
                max_kl=stopping.max_kl if stopping else None,
            ),
            start=start,
            display=display,
            backward=graphs,
        )
        restored = restore_best(session, run, validation, progress)
    if graphs is not None:
        run.event("cuda-graphs", **graphs.counts(), reason=graphs.reason)
        if graphs.reason:
            display.note(
                f"micro-batches ran operation by operation, not as graphs: {graphs.reason}"
            )
    facts = _facts(session, run, progress, restored, memory.bytes, len(stream), packed)
    return facts | ({"retention": _kept(run, facts["best_step"], watched)} if watched else {})


def _record_products(session: Session, run: Run, display: Display) -> None:
    """Write down what frozen weights are multiplied in, why, and which layers are left out."""
    choice = session.recipe.train.base_precision
    run.event("base-precision", setting=choice, reason=session.not_eight_bit)
    if choice not in ("int8", "fp8"):
        return
    layers = lora_layers(session.model)
    others = [name for name, layer in layers.items() if layer.eight_bit is None]
    products = {"precision": choice, "layers": len(layers) - len(others)}
    run.event("eight-bit-products", **products, others=others)
    if others:
        display.note(
            f"{len(others)} of {len(layers)} layers are not multiplied in {choice}: "
            f"{others[0]}, ..."
        )


def open_graphs(session: Session, packed: bool) -> Graphs | None:
    """Return what records micro-batches as CUDA graphs, where the resolved recipe says so."""
    train = session.recipe.train
    if not train.cuda_graphs or not packed:
        return None
    assert isinstance(train.micro_batch_tokens, int)
    return Graphs(max(len(row) for row in session.training), train.micro_batch_tokens)


def _measurement(
    session: Session, validation: Validation, probe: KlProbe | None, watch: Watch | None
) -> Callable[[int], HeldOut]:
    """Return what the loop calls at every evaluation: held-out loss, and what was forgotten.

    To be called outside the attention of training.
    """
    own = session.model.config._attn_implementation

    def measure(step: int) -> HeldOut:
        held_out = validation(session.model, session.objective)
        if probe is not None:
            held_out = replace(held_out, kl=probe(session.model))
        if watch is not None and math.isfinite(held_out.loss):
            with own_attention(session.model, own):
                held_out = replace(held_out, retention=watch(session, step))
        return held_out

    return measure


def restore_best(session: Session, run: Run, validation: Validation, progress: Progress) -> float:
    """Load the best checkpoint and measure it again; it must give the loss that was recorded."""
    assert progress.stopping is not None
    best = run.pointed("best")
    if best is None:
        raise TrainingError(
            f"the best checkpoint (step {progress.stopping.best_step}) is gone",
            "train again in a new run directory",
        )
    load_weights(session.model, best)
    restored = validation(session.model, session.objective).loss
    recorded = progress.stopping.best_loss
    if not abs(restored - recorded) <= RESTORE_TOLERANCE * abs(recorded):
        raise TrainingError(
            f"the restored best weights give a held-out loss of {restored:.6f}, "
            f"step {progress.stopping.best_step} was recorded with {recorded:.6f}",
            "do not use this model; check the disk and the memory of this machine and train again",
        )
    run.event("restored", step=progress.stopping.best_step, loss=restored)
    return restored


def _facts(
    session: Session,
    run: Run,
    progress: Progress,
    restored: float,
    peak_bytes: int,
    steps: int,
    packed: bool,
) -> dict[str, Any]:
    assert progress.stopping is not None
    train = session.recipe.train
    stopping = progress.stopping
    evaluations = [line for line in run.read_metrics() if "validation/loss" in line]
    best = next(line for line in evaluations if line["step"] == stopping.best_step)
    tokens_per_epoch = sum(len(row) for row in session.training)
    return {
        "best_step": stopping.best_step,
        "best_loss": stopping.best_loss,
        "restored_loss": restored,
        "start_loss": evaluations[0]["validation/loss"],
        "probe_kl": best.get("probe/kl"),
        "last_step": progress.step,
        "stopped": "early" if stopping.stopped else "end",
        "stop_reason": stopping.reason,
        "steps": steps,
        "epochs": round(progress.tokens / tokens_per_epoch, 3),
        "tokens": progress.tokens,
        "supervised_tokens": progress.supervised_tokens,
        "tokens_per_second": round(progress.tokens / progress.seconds, 1),
        "peak_memory_bytes": peak_bytes,
        "trainable_parameters": sum(p.numel() for p in trainable(session.model).values()),
        "total_parameters": session.loaded.parameters,
        "learning_rate": train.learning_rate,
        "tokens_per_batch": train.tokens_per_batch,
        "micro_batch_tokens": train.micro_batch_tokens,
        "gradient_checkpointing": train.gradient_checkpointing,
        "torch_compile": train.torch_compile,
        "cuda_graphs": bool(train.cuda_graphs) and packed,
        "base_precision": train.base_precision,
        "threads": train.threads,
        "attention_bucket_tokens": train.attention_bucket_tokens,
        "precision": str(session.loaded.dtype).removeprefix("torch."),
        "packed": packed,
    }


def _kept(run: Run, step: int, base: Mapping[str, Retained]) -> dict[str, Any]:
    """Return what was left of each benchmark that was watched at the step that was kept."""
    line = next(x for x in run.read_metrics() if x["step"] == step and "validation/loss" in x)
    return {
        name: asdict(found)
        | {
            "accuracy": line[f"retention/{name}"],
            "difference": line[f"retention/{name}/difference"],
        }
        for name, found in base.items()
    }


def export_model(
    session: Session, run: Run, packed: bool, loss: float | None = None
) -> dict[str, Any] | None:
    """Write export/: the adapter (and the merged model, measured), or the fully tuned model.

    `loss` is the held-out loss of the model as it is; None = to be measured. Returns what run.json
    keeps under `merge`; None when nothing was merged.

    Raises:
        TrainingError: merging changed the held-out loss by more than train.merge_tolerance.
    """
    recipe, loaded = session.recipe, session.loaded
    adapt = recipe.model.adapt
    if not isinstance(adapt, LoraConfig):
        with run.publish(run.export / "model") as folder:
            export.write_full(
                loaded.directory, loaded.model, folder, loaded.tokenizer, session.renderer.stop_ids
            )
        return None
    with run.publish(run.export / "adapter") as folder:
        save_weights(loaded.model, folder, str(loaded.directory), adapt)
    if not recipe.train.merge:
        return None
    target = run.export / "merged"
    with run.publish(target) as folder:
        export.write_merged(
            loaded.directory,
            run.export / "adapter",
            folder,
            loaded.tokenizer,
            session.renderer.stop_ids,
        )
        drift = measure_drift(session, export.open_merged(folder, loaded.dtype), packed, loss)
        if drift["refused"]:
            run.update(merge=drift)
            raise TrainingError(
                f"merging moves the held-out loss from {drift['loss_before']:.4f} to "
                f"{drift['loss_after']:.4f}, more than train.merge_tolerance allows "
                f"({drift['tolerance']}); the merged model was not written",
                "serve the adapter unmerged (export/adapter), or raise train.merge_tolerance",
            )
    return drift


def measure_drift(
    session: Session, merged: Any, packed: bool, before: float | None = None
) -> dict[str, Any]:
    """Compare a merged model with the adapted one: held-out loss and logits on validation rows.

    `before` is the held-out loss of the adapted one, None = to be measured.
    """
    validation = session.held_out(packed)
    with session.attention():
        if before is None:
            before = validation(session.model, session.objective).loss
        logits = _logits(session, session.model)
    limit = session.recipe.train.attention_bucket_tokens
    with training_attention(merged, None if limit == "auto" else limit):
        after = validation(merged, session.objective).loss
        other = _logits(session, merged)
    tolerance = session.recipe.train.merge_tolerance
    return {
        "loss_before": before,
        "loss_after": after,
        "max_logit_difference": float((logits - other).abs().max()),
        "greedy_agreement": float((logits.argmax(-1) == other.argmax(-1)).float().mean()),
        "tolerance": tolerance,
        "refused": not abs(after - before) <= tolerance,
    }


def _logits(session: Session, model: Any) -> Tensor:
    """Logits [supervised positions of a few rows, V] in float32."""
    rows = session.validation[:LOGIT_ROWS]
    batches = micro_batches(rows, max(len(row) for row in rows), packed=False)
    found = []
    with torch.no_grad():
        for batch in batches:
            logits = model(**model_inputs(batch, model.device)[0]).logits
            found.append(logits[torch.from_numpy(batch.weights > 0)].float())
    return torch.cat(found)
