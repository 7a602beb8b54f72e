"""A micro-batch's forward and backward pass as one CUDA graph: recorded once, replayed often.

A small model is a few thousand kernels of a few microseconds each; starting them one by one takes
the host longer than the device needs for all of them. A graph is started at once. It repeats the
same kernels on the same memory, so micro-batches are padded to a few sizes (`sft.Room`) and copied
to where the graph reads them: tokens, positions, labels, and where documents end.

Source: CUDA graphs in PyTorch (pytorch.org/docs, "CUDA Graphs").
"""

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from postgrad.errors import ModelError
from postgrad.train.fit import one_backward
from postgrad.train.optimizer import trainable
from postgrad.train.sft import Positions, Room, SupervisedFineTuning
from postgrad.types import Batch, LossSum

MOST = 24
"""Graphs that are kept; other sizes run operation by operation."""
SEEN = 2
"""A size is recorded when it has come so often, after the first optimizer step: one that comes once
is not worth it."""
ROOM = 1.1
"""Times the memory of a graph that must be free beside it: another size may come, which runs
operation by operation."""
SHARE = 16
"""Rows are padded to a multiple of about this share of a full micro-batch."""
LEAST_TOKENS, LEAST_POSITIONS, LEAST_DOCUMENTS = 64, 32, 8
"""Multiples that sizes are rounded to at least."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """A graph, what it reads and what it writes."""

    replay: Callable[[], None]
    at: Positions
    divisor: Tensor
    loss: LossSum


class Graphs:
    """What `fit` calls for a micro-batch's gradients (`fit.Backward`) on a CUDA device.

    Gradients stay in the same memory from step to step.
    """

    def __init__(self, longest: int, capacity: int) -> None:
        """Make it for documents up to `longest` and micro-batches up to `capacity` tokens."""
        self.multiple = max(LEAST_TOKENS, power_of_two(capacity // SHARE + 1) // 2)
        self.full = -(-capacity // LEAST_TOKENS) * LEAST_TOKENS
        self.longest = max(self.multiple, power_of_two(longest))
        self.documents = LEAST_DOCUMENTS
        self.recorded: dict[Room, Recorded] = {}
        self.replayed = 0
        self.other = 0
        """Micro-batches that ran operation by operation."""
        self.reason = ""
        """Why nothing is recorded any more."""
        self._seen: Counter[Room] = Counter()
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._stepped = False
        """Whether an optimizer step was taken: before, its state has not claimed its memory."""
        self._pool: Any = None

    def __call__(
        self, model: Any, objective: SupervisedFineTuning, batch: Batch, weight: float
    ) -> LossSum:
        """Add the gradients of `batch` over `weight` to the parameters' own."""
        if not batch.packed or self.reason:
            self.other += 1
            return one_backward(model, objective, batch, weight)
        self._attach()
        room = self.room(batch)
        at = objective.positions(model, batch, room)
        recorded = self.recorded.get(room)
        if recorded is not None:
            fill(recorded.at, at)
            recorded.divisor.fill_(weight)
            recorded.replay()
            self.replayed += 1
            return LossSum(recorded.loss.total, batch.supervised, terms=recorded.loss.terms)
        self.other += 1
        try:
            loss = at_once(model, objective, at, batch.supervised, weight)
        except ModelError as error:
            self._give_up(error)
            return one_backward(model, objective, batch, weight)
        # what a graph writes to must stay: also the gradient of a weight that had none before
        self._gradients |= {p: p.grad for p in trainable(model).values() if p.grad is not None}
        self._seen[room] += 1
        if self._stepped and self._seen[room] >= SEEN and len(self.recorded) < MOST:
            self._record(model, objective, room, at)
        return loss

    def _give_up(self, error: Exception) -> None:
        """Go on operation by operation, and keep no memory for gradients."""
        self.reason = str(error).partition("\n")[0]
        self._gradients.clear()

    def counts(self) -> dict[str, int]:
        """Return how many graphs there are, and how many micro-batches ran in which way."""
        recorded = len(self.recorded)
        return {"recorded": recorded, "replayed": self.replayed, "other": self.other}

    def room(self, batch: Batch) -> Room:
        """Return the sizes that a packed micro-batch is padded to.

        Documents that fill a row equally keep their own layout, for which there is a faster kernel.
        """
        lengths = batch.lengths
        tokens = sum(lengths)
        supervised = int((batch.weights != 0).sum())
        row = -(-tokens // self.multiple) * self.multiple
        if tokens <= self.full < row:
            row = self.full
        step = max(LEAST_POSITIONS, 2 * self.multiple)
        positions = -(-supervised // step) * step
        if row == tokens and len(set(lengths)) == 1:
            return Room(tokens, len(lengths), lengths[0], positions, dense=True)
        documents = power_of_two(len(lengths) + 1)
        if documents > self.documents:
            self.documents = documents
            # graphs for fewer documents are not asked for again
            self.recorded = {room: of for room, of in self.recorded.items() if room.dense}
        return Room(row, self.documents, self.longest, positions)

    def _attach(self) -> None:
        """Give parameters their gradients' memory back, zeroed, where a step has begun."""
        if next((p.grad for p in self._gradients), True) is None:
            torch._foreach_zero_(list(self._gradients.values()))
            for parameter, gradient in self._gradients.items():
                parameter.grad = gradient
            self._stepped = True

    def _record(
        self, model: Any, objective: SupervisedFineTuning, room: Room, at: Positions
    ) -> None:
        """Record the passes for one size; where that fails, give up with the reason."""
        divisor = torch.ones((), dtype=torch.float64, device=at.flat.device)
        passes = functools.partial(at_once, model, objective, at, 0.0, divisor)
        try:
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            free = free_bytes()
            replay, loss = capture(passes, self._pool)
            left = free_bytes()
            if left < ROOM * (free - left):
                raise torch.OutOfMemoryError("another size would not fit beside the graph")
        except RuntimeError as error:
            self.recorded.clear()
            self._pool = None
            self._give_up(error)
            return
        self.recorded[room] = Recorded(replay, at, divisor, loss)


def at_once(
    model: Any,
    objective: SupervisedFineTuning,
    at: Positions,
    supervised: float,
    weight: float | Tensor,
) -> LossSum:
    """Compute positions and their gradients; nothing of autograd is left behind.

    What is left of an earlier pass would be taken into the next one, with its stream, and break the
    recording.
    """
    loss = objective.loss(model, at, supervised)
    (loss.total / weight).backward()
    return LossSum(loss.total.detach(), supervised, terms=loss.terms)


def capture(passes: Callable[[], LossSum], pool: Any) -> tuple[Callable[[], None], LossSum]:
    """Record what `passes` does, without doing it; returns what does it, and where results are."""
    graph, generator = (
        torch.cuda.CUDAGraph(),
        torch.cuda.default_generators[torch.cuda.current_device()],
    )
    before = generator.get_state()
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            loss = passes()
    except RuntimeError:
        # a recording that breaks off leaves the generator in a state in which it refuses to draw
        fresh = torch.Generator(generator.device)
        fresh.set_state(before)
        generator.graphsafe_set_state(fresh)
        raise
    return graph.replay, loss


def free_bytes() -> int:
    """Bytes that the device has left for this process, those that torch keeps in store included."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    return free


def fill(target: Positions, source: Positions) -> None:
    """Copy what a graph reads from a new micro-batch to where it reads it."""
    for into, of in zip(tensors(target), tensors(source), strict=True):
        into.copy_(of)


def tensors(at: Positions) -> Sequence[Tensor]:
    """Return all that depends on the micro-batch."""
    ends = at.inputs["layout"].ends
    return at.inputs["input_ids"], at.inputs["position_ids"], at.flat, at.labels, at.weights, ends


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is not less.

    >>> power_of_two(5), power_of_two(8)
    (8, 8)
    """
    return 1 << max(0, number - 1).bit_length()
