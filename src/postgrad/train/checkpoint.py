"""Checkpoints: everything the next step depends on, whole or not at all.

A checkpoint holds the trained weights (a PEFT directory for LoRA, model.safetensors for full
tuning), the optimizer's moments, every random state, the stopping state and the step. The data
cursor *is* the step: batches are a pure function of it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from postgrad.config import LoraConfig
from postgrad.errors import CheckpointError
from postgrad.model import lora
from postgrad.run import Run, verify_checksums
from postgrad.train.optimizer import load_optimizer_state, optimizer_state, trainable
from postgrad.train.stopping import HeldOut, StoppingState

STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"
RANDOM = "random.safetensors"
HELD_OUT = "held_out.safetensors"
FULL_WEIGHTS = "model.safetensors"


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands after `step` optimizer steps."""

    step: int = 0
    tokens: int = 0
    supervised_tokens: float = 0.0
    seconds: float = 0.0
    stopping: StoppingState | None = None


def checkpoint_path(run: Run, step: int) -> Path:
    """Return checkpoints/step-NNNNNN."""
    return run.checkpoints / f"step-{step:06d}"


def save_checkpoint(
    run: Run, model: Any, optimizer: torch.optim.Optimizer, progress: Progress
) -> Path:
    """Write a checkpoint atomically and point `last` (and `best`, when it is the best) at it."""
    final = checkpoint_path(run, progress.step)
    with run.publish(final) as folder:
        save_weights(model, folder, run.recipe.model.base, run.recipe.model.adapt)
        save_file(optimizer_state(model, optimizer), folder / OPTIMIZER)
        save_file(_random_state(), folder / RANDOM)
        state: dict[str, Any] = {
            "step": progress.step,
            "tokens": progress.tokens,
            "supervised_tokens": progress.supervised_tokens,
            "seconds": progress.seconds,
        }
        if progress.stopping is not None:
            s = progress.stopping
            state["stopping"] = {
                "best_step": s.best_step,
                "best_loss": s.best_loss,
                "waited": s.waited,
                "stopped": s.stopped,
                "beyond": s.beyond,
                "reason": s.reason,
            }
            held_out = {"sums": s.reference.sums, "weights": s.reference.weights}
            save_file({k: torch.from_numpy(v) for k, v in held_out.items()}, folder / HELD_OUT)
        (folder / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    run.point("last", final)
    if progress.stopping is not None and progress.stopping.best_step == progress.step:
        run.point("best", final)
    return final


def save_weights(model: Any, folder: Path, base: str, adapt: Any) -> None:
    """Write the trained weights: a PEFT adapter, or every trained tensor."""
    if isinstance(adapt, LoraConfig):
        lora.save_adapter(model, adapt, folder, base)
    else:
        tensors = {n: p.detach().cpu().contiguous() for n, p in trainable(model).items()}
        save_file(tensors, folder / FULL_WEIGHTS, metadata={"format": "pt"})


def load_weights(model: Any, folder: Path) -> None:
    """Put the weights of a checkpoint into the model; names and shapes must agree."""
    if (folder / lora.WEIGHTS).exists():
        lora.load_adapter_weights(model, folder)
        return
    state = load_file(folder / FULL_WEIGHTS)
    parameters = trainable(model)
    if set(state) != set(parameters):
        raise CheckpointError(f"{folder} belongs to another model", "use its own recipe")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


def load_checkpoint(folder: Path, model: Any, optimizer: torch.optim.Optimizer) -> Progress:
    """Restore everything from a verified checkpoint and return where the run stands."""
    load_weights(model, folder)
    load_optimizer_state(model, optimizer, load_file(folder / OPTIMIZER))
    _restore_random_state(load_file(folder / RANDOM))
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    stopping = None
    if "stopping" in state:
        arrays = {k: v.numpy().astype(np.float64) for k, v in load_file(folder / HELD_OUT).items()}
        stopping = StoppingState(reference=HeldOut(**arrays), **state.pop("stopping"))
    return Progress(stopping=stopping, **state)


def newest_valid(run: Run) -> Path | None:
    """Return the newest checkpoint whose files are whole; damaged ones are recorded and passed."""
    for folder in sorted(run.checkpoints.glob("step-*"), reverse=True):
        try:
            verify_checksums(folder)
        except CheckpointError as error:
            run.event("damaged-checkpoint", checkpoint=folder.name, reason=error.message)
            continue
        return folder
    return None


def resume(run: Run, model: Any, optimizer: torch.optim.Optimizer) -> Progress | None:
    """Go back to the newest whole checkpoint: state, pointers and metrics; None = start afresh.

    A kill may have come between a checkpoint and the pointers to it, so they are set again; what is
    newer than the checkpoint is damaged and removed.
    """
    folder = newest_valid(run)
    if folder is None:
        run.rewind_metrics(-1)
        return None
    progress = load_checkpoint(folder, model, optimizer)
    run.point("last", folder)
    if progress.stopping is not None:
        best = checkpoint_path(run, progress.stopping.best_step)
        if best.exists():
            run.point("best", best)
    for later in run.checkpoints.glob("step-*"):
        if later.name > folder.name:
            run.delete(later)
    run.rewind_metrics(progress.step)
    run.event("resumed", step=progress.step, checkpoint=folder.name)
    return progress


def prune(run: Run, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints and the best one."""
    best = run.pointed("best")
    folders = sorted(run.checkpoints.glob("step-*"))
    for folder in folders[:-keep] if keep else folders:
        if folder.resolve() != best:
            run.delete(folder)


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
