"""Training batches as a pure function of the step number: the data cursor is the step."""

from collections.abc import Sequence

from postgrad.data.batches import micro_batches, plan_epoch
from postgrad.types import Batch, Tokens


class Stream:
    """The whole run's batches, planned at once (row numbers only) and laid out when asked for."""

    def __init__(
        self,
        rows: Sequence[Tokens],
        *,
        epochs: float,
        tokens_per_batch: int,
        micro_batch_tokens: int,
        packed: bool,
        seed: int,
        max_steps: int | None = None,
    ) -> None:
        """Plan `epochs` passes; a fraction of a pass is that share of its steps, at least one."""
        self.rows = rows
        self.micro_batch_tokens = micro_batch_tokens
        self.packed = packed
        lengths = [len(row) for row in rows]
        plan: list[list[int]] = []
        whole, rest = int(epochs), epochs - int(epochs)
        for epoch in range(whole + (rest > 0)):
            steps = plan_epoch(lengths, tokens_per_batch, seed, epoch)
            plan += steps if epoch < whole else steps[: max(1, round(rest * len(steps)))]
        self.plan = plan[:max_steps]
        self._ahead: tuple[int, list[Batch]] | None = None

    def __len__(self) -> int:
        """Return the number of optimizer steps."""
        return len(self.plan)

    def step(self, number: int) -> list[Batch]:
        """Return the micro-batches of optimizer step `number`, from 0."""
        if self._ahead is not None and self._ahead[0] == number:
            return self._ahead[1]
        return self._lay_out(number)

    def prepare(self, number: int) -> None:
        """Lay step `number` out before it is asked for, while a device is busy with another."""
        self._ahead = (number, self._lay_out(number)) if number < len(self) else None

    def _lay_out(self, number: int) -> list[Batch]:
        rows = [self.rows[index] for index in self.plan[number]]
        return micro_batches(rows, self.micro_batch_tokens, self.packed)

    @property
    def tokens(self) -> int:
        """Tokens of all steps together."""
        return sum(len(self.rows[index]) for step in self.plan for index in step)
