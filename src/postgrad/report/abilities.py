"""General abilities as the report tells them: what was asked, and the figures of both models."""

from collections.abc import Sequence
from dataclasses import dataclass

from postgrad.types import Comparison, Measurement


@dataclass(frozen=True, slots=True)
class Benchmark:
    """An entry of `retention` in measurements.json: what was asked, and how."""

    task: str
    label: str
    """Name with the number of items asked, the size of the standard set and the source."""
    metric: str
    origin: str
    template: str
    """`raw` or `chat`."""
    chance: float | None = None
    shots: int = 0
    unusable: int = 0


@dataclass(frozen=True, slots=True)
class Retention:
    """Benchmarks of general ability, before and after."""

    benchmarks: tuple[Benchmark, ...]
    measurements: tuple[Measurement, ...]
    comparisons: tuple[Comparison, ...]

    @classmethod
    def of(
        cls,
        benchmarks: Sequence[Benchmark],
        measurements: Sequence[Measurement],
        comparisons: Sequence[Comparison],
    ) -> "Retention | None":
        """Take what belongs to the benchmarks; None when there are none."""
        tasks = {benchmark.task for benchmark in benchmarks}
        if not tasks:
            return None
        own = tuple(m for m in measurements if m.task in tasks)
        return cls(tuple(benchmarks), own, tuple(c for c in comparisons if c.task in tasks))

    def measured(self, benchmark: Benchmark, arm: str) -> Measurement | None:
        """Return the figure of one arm in the benchmark's first metric."""
        wanted = (benchmark.task, benchmark.metric, arm)
        found = [m for m in self.measurements if (m.task, m.metric, m.arm) == wanted]
        return found[0] if found else None

    @property
    def of_tuned(self) -> tuple[Comparison, ...]:
        """The tuned model against the base model."""
        return self.between("base", "tuned")

    def between(self, a: str, b: str) -> tuple[Comparison, ...]:
        """Return the comparisons of arm `b` with arm `a`."""
        return tuple(c for c in self.comparisons if (c.a, c.b) == (a, b))

    def compared(self, benchmark: Benchmark) -> Comparison | None:
        """Return the tuned model against the base model."""
        return next((c for c in self.of_tuned if c.task == benchmark.task), None)
