"""The only training loop.

A method is an objective; LoRA and full tuning differ only in which parameters require gradients;
resuming differs only in where the loop starts.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from postgrad.errors import Interrupted, TrainingError
from postgrad.parallel import World
from postgrad.progress import Display, SilentDisplay
from postgrad.run import Run
from postgrad.train.checkpoint import Progress, prune, save_checkpoint
from postgrad.train.objective import Objective
from postgrad.train.optimizer import trainable
from postgrad.train.stopping import HeldOut, StoppingState
from postgrad.train.stream import Stream
from postgrad.types import Batch, LossSum

Backward = Callable[[Any, Any, Batch, float], LossSum]
"""Adds the gradients of a micro-batch's loss sum over a weight to the parameters' own, given model,
objective, batch and weight; returns the loss sum."""
Validate = Callable[[int], HeldOut]
"""Step -> what the model is worth on the held-out rows after it."""
Stopper = Callable[[StoppingState | None, int, HeldOut], tuple[StoppingState, float]]


@dataclass(frozen=True, slots=True)
class Loop:
    """When the loop evaluates, saves and clips."""

    eval_steps: int
    save_seconds: float = 600.0
    save_total_limit: int = 2
    max_grad_norm: float | None = 1.0


@dataclass(frozen=True, slots=True)
class Probe:
    """The only hook: every `every` steps its figures go into metrics.jsonl."""

    name: str
    every: int
    measure: Callable[[int], Mapping[str, float]]


def fit(
    model: Any,
    objective: Objective,
    batches: Stream,
    optimizer: torch.optim.Optimizer,
    schedule: Callable[[int], float],
    *,
    loop: Loop,
    run: Run,
    validate: Validate,
    stopper: Stopper,
    probes: Sequence[Probe] = (),
    start: Progress | None = None,
    world: World | None = None,
    display: Display | None = None,
    backward: Backward | None = None,
) -> Progress:
    """Train until the stream ends or the stopper says so; returns where training stopped.

    The gradient of a step is the sum over all micro-batches and ranks of the loss sums, divided by
    the *global* sum of label weights: how a step is cut into micro-batches changes nothing.

    Raises:
        TrainingError: a loss or gradient is not finite; names the examples.
        Interrupted: SIGINT or SIGTERM arrived; a checkpoint was saved first.
    """
    world, display = world or World(), display or SilentDisplay()
    backward, progress = backward or one_backward, start or Progress()
    parameters = list(trainable(model).values())
    began = time.monotonic() - progress.seconds
    saved = time.monotonic()
    if progress.stopping is None:
        progress = _evaluate(progress, run, validate, stopper)
        save_checkpoint(run, model, optimizer, progress)
    track = display.track("training", batches.tokens, done=progress.tokens)
    with _interruptible() as interrupted, track as bar:
        while progress.step < len(batches) and not _stopped(progress):
            micro = batches.step(progress.step)
            rate = schedule(progress.step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            sums = _accumulate(model, objective, micro, parameters, world, backward)
            batches.prepare(progress.step + 1)
            loss, norm, terms = _update(
                model, objective, micro, parameters, optimizer, loop.max_grad_norm, sums
            )
            tokens = sum(batch.tokens for batch in micro)
            supervised = sum(batch.supervised for batch in micro)
            progress = replace(
                progress,
                step=progress.step + 1,
                tokens=progress.tokens + tokens,
                supervised_tokens=progress.supervised_tokens + supervised,
                seconds=time.monotonic() - began,
            )
            figures = {"train/loss": loss, "train/grad_norm": norm, "train/learning_rate": rate}
            figures |= {"train/supervised_tokens": supervised, **terms}
            run.metrics(progress.step, progress.tokens, progress.seconds, **figures)
            for probe in probes:
                if progress.step % probe.every == 0:
                    values = probe.measure(progress.step)
                    run.metrics(progress.step, progress.tokens, progress.seconds, **values)
            bar.advance(tokens, loss=loss)
            last = progress.step == len(batches)
            if progress.step % loop.eval_steps == 0 or last:
                progress = _evaluate(progress, run, validate, stopper)
                bar.advance(0, **{"held-out": _best(progress).best_loss})
            due = world.any(time.monotonic() - saved > loop.save_seconds)
            stop_now = world.any(interrupted.is_set())
            if progress.step % loop.eval_steps == 0 or last or due or stop_now:
                save_checkpoint(run, model, optimizer, progress)
                prune(run, loop.save_total_limit)
                saved = time.monotonic()
            if stop_now:
                run.event("interrupted", step=progress.step)
                raise Interrupted(
                    f"interrupted after step {progress.step}; the checkpoint is saved",
                    "go on with --resume",
                )
    return progress


def one_backward(model: Any, objective: Objective, batch: Batch, weight: float) -> LossSum:
    """Compute a micro-batch and its gradients, operation by operation."""
    loss = objective(model, batch)
    (loss.total / weight).backward()
    return replace(loss, total=loss.total.detach())


def _accumulate(
    model: Any,
    objective: Objective,
    micro: Sequence[Batch],
    parameters: Sequence[torch.nn.Parameter],
    world: World,
    backward: Backward,
) -> Tensor:
    """Sum losses and gradients of a step over micro-batches and ranks.

    Returns [loss sum, gradient norm, *sums of the objective's terms] in float64 on the model's
    device. Nothing is read back: a device may still be busy with all of it when this returns.
    """
    weight = _weight(micro)
    if weight == 0:
        names = ", ".join(name for batch in micro for name in batch.example_ids[:20])
        raise TrainingError(
            f"no token of this step is supervised (examples {names})",
            "give these rows an answer with a weight, or leave them out",
        )
    model.train()
    parts = objective.terms
    totals = torch.zeros(1 + len(parts), dtype=torch.float64, device=parameters[0].device)
    for batch in micro[world.rank :: world.size]:
        loss = backward(model, objective, batch, weight)
        totals[0] += loss.total
        for index, term in enumerate(parts, 1):
            totals[index] += loss.terms[term]
    world.sum_gradients(parameters)
    norm = torch.nn.utils.get_total_norm(_gradients(parameters))
    total, *terms = world.sum_(totals).unbind()
    return torch.stack([total, norm.to(total), *terms])


def _update(
    model: Any,
    objective: Objective,
    micro: Sequence[Batch],
    parameters: Sequence[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float | None,
    sums: Tensor,
) -> tuple[float, float, dict[str, float]]:
    """Take the optimizer step; returns (loss in nats per token, gradient norm, terms).

    Reading `sums` is the only time in a step that the host waits for the device: weights must not
    move if they are not finite.
    """
    total, norm, *terms = sums.tolist()
    if not (abs(total) < float("inf") and norm < float("inf")):
        raise _not_finite(model, objective, micro, total, norm)
    if max_grad_norm is not None and max_grad_norm < norm:
        torch._foreach_mul_(_gradients(parameters), max_grad_norm / norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    weight = _weight(micro)
    named = {
        f"train/{name}": term / weight for name, term in zip(objective.terms, terms, strict=True)
    }
    return named.get("train/loss", total / weight), norm, named


def _weight(micro: Sequence[Batch]) -> float:
    return sum(batch.supervised for batch in micro)


def _gradients(parameters: Sequence[torch.nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def _not_finite(
    model: Any, objective: Objective, micro: Sequence[Batch], total: float, norm: float
) -> TrainingError:
    """Find the rows behind a loss or gradient that is not finite, and say so."""
    guilty: list[str] = []
    with torch.no_grad():
        for batch in micro:
            sums = objective(model, batch, per_document=True).per_document
            bad = (~torch.isfinite(sums)).nonzero().flatten().tolist()
            guilty += [batch.example_ids[index] for index in bad]
    rows = guilty or [name for batch in micro for name in batch.example_ids]
    kind = "loss" if guilty else f"gradient (norm {norm}, loss sum {total})"
    return TrainingError(
        f"the {kind} is not finite at example{'s' if len(rows) > 1 else ''} "
        + ", ".join(rows[:20])
        + (f" and {len(rows) - 20} more" if len(rows) > 20 else ""),
        "look at these rows (data/kept.jsonl); lower train.learning_rate if they are fine",
    )


def _evaluate(progress: Progress, run: Run, validate: Validate, stopper: Stopper) -> Progress:
    held_out = validate(progress.step)
    if not held_out.loss < float("inf"):
        raise TrainingError(
            f"the held-out loss is {held_out.loss} after step {progress.step}",
            "check the weights of the base model and lower train.learning_rate",
        )
    stopping, error = stopper(progress.stopping, progress.step, held_out)
    values = {"validation/loss": held_out.loss, "validation/se": error}
    values["validation/best"] = stopping.best_loss
    if held_out.kl is not None:
        values["probe/kl"] = held_out.kl
    for task, kept in (held_out.retention or {}).items():
        values[f"retention/{task}"] = kept.accuracy
        values[f"retention/{task}/difference"] = kept.difference
    run.metrics(progress.step, progress.tokens, progress.seconds, **values)
    if stopping.best_step == progress.step:
        run.event("best", step=progress.step, loss=held_out.loss)
    if stopping.stopped:
        run.event("stopped", step=progress.step, reason=stopping.reason)
    return replace(progress, stopping=stopping)


def _best(progress: Progress) -> StoppingState:
    assert progress.stopping is not None
    return progress.stopping


def _stopped(progress: Progress) -> bool:
    return _best(progress).stopped


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Turn the first SIGINT or SIGTERM into a flag; a second one acts at once."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, _: object) -> None:
        flag.set()
        ignored = before[signal.Signals(number)] is signal.SIG_IGN  # by a shell, for a job with &
        at_once = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, at_once if ignored else before[signal.Signals(number)])

    for name in before:
        signal.signal(name, handle)
    try:
        yield flag
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
