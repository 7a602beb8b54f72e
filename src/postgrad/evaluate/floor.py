"""The retention floor of early stopping: benchmarks asked at every held-out evaluation.

Their items are neither the reported ones nor those of the dial, so that both still judge what was
chosen here. Every answer is kept below evidence/stopping/. The items are the same at every
evaluation and the floor is compared with the estimate of the paired difference, not its interval:
a rule for choosing, not a finding. The report's figures come from other items.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from postgrad.config import Recipe
from postgrad.data.template import ChatTemplate
from postgrad.errors import ConfigError, DataError
from postgrad.estimate import NOTHING, Amount
from postgrad.evaluate.benchmarks import LEAST_ITEMS, Benchmark, load_benchmarks, unreported
from postgrad.evaluate.compare import require_pairs, row_scores
from postgrad.evaluate.evidence import read_evidence, write_evidence
from postgrad.evaluate.gates import ALL, BASE
from postgrad.evaluate.prompts import amount_asked, chat_of
from postgrad.evaluate.tasks import Kind
from postgrad.progress import Display
from postgrad.run import Run
from postgrad.train.stopping import Retained
from postgrad.types import Check, Evidence

if TYPE_CHECKING:
    from postgrad.train.session import Session

FOLDER = "stopping/"
"""Where below evidence/ the answers are kept."""


@dataclasses.dataclass(frozen=True, slots=True)
class Floor:
    """A benchmark that is watched, with its items, and the points that it may lose."""

    benchmark: Benchmark
    margin: float

    @property
    def name(self) -> str:
        """Return the name of the task."""
        return self.benchmark.task.name

    @property
    def item_points(self) -> float:
        """Return what one item counts, in points."""
        return 100 / len(self.benchmark.items)


def load_floors(recipe: Recipe, benchmarks: Sequence[Benchmark] = ()) -> list[Floor]:
    """Return the benchmarks of train.early_stopping.retention_floor; none without that key.

    `benchmarks` are those of evaluate.retention if they are loaded already.

    Raises:
        ConfigError: a benchmark is unknown, writes its answers, or has too few items left.
        DataError, SourceError: as `load_benchmarks`.
    """
    stopping = recipe.train.early_stopping
    if stopping is None or not stopping.retention_floor:
        return []
    margins = stopping.retention_floor
    rest = margins.get(ALL)
    found = []
    for benchmark in benchmarks or load_benchmarks(recipe):
        margin = margins.get(benchmark.task.name, rest)
        if margin is not None:
            chosen = _watched(benchmark, stopping.retention_items, recipe)
            found.append(Floor(chosen, margin))
    return found


def _watched(benchmark: Benchmark, limit: int, recipe: Recipe) -> Benchmark:
    """Return the benchmark with items that neither the report's figures nor the dial will ask."""
    name, dial = benchmark.task.name, recipe.evaluate.dial
    if benchmark.task.kind is Kind.GENERATION:
        raise ConfigError(
            f"train.early_stopping.retention_floor: {name} lets the model write its answers, which "
            "takes too long to be done at every evaluation",
            "name benchmarks that are answered by likelihood (docs/benchmarks.md)",
        )
    left = benchmark.rest
    taken = f"the {len(benchmark.items):,} reported ones"
    if dial is not None and len(left) >= LEAST_ITEMS:
        [asked], _ = unreported([benchmark], dial.items, recipe.data_seed)
        left = asked.rest
        taken += f" and the {len(asked.items):,} of evaluate.dial"
    if len(left) < LEAST_ITEMS:
        lower = "evaluate.retention_limit" + (" or evaluate.dial.items" if dial else "")
        raise ConfigError(
            f"train.early_stopping.retention_floor: {name} has {len(left)} items besides {taken}, "
            f"fewer than {LEAST_ITEMS}",
            f"lower {lower}, or watch a larger benchmark",
        )
    spare = dataclasses.replace(benchmark, rest=left)
    [chosen], _ = unreported([spare], limit, recipe.data_seed)
    return chosen


def check_floors(floors: Sequence[Floor]) -> tuple[Check, ...]:
    """Check that a floor is no finer than its items: one net item may be lost; none without one."""
    if not floors:
        return ()
    facts = [
        f"{f.name} on {len(f.benchmark.items):,} items that are not reported: at most "
        f"{f.margin:g} points lost, an item is {f.item_points:.2g}"
        for f in floors
    ]
    data = {f.name: {"items": len(f.benchmark.items), "margin": f.margin} for f in floors}
    fine = [f for f in floors if f.margin < f.item_points]
    return (
        Check(
            "retention-floor",
            not fine,
            ("a single item lost would break the floor: " if fine else "")
            + "; ".join(facts if not fine else [facts[floors.index(f)] for f in fine]),
            "raise the margin or train.early_stopping.retention_items" if fine else "",
            data=data,
        ),
    )


def planned_amount(recipe: Recipe, tokenizer: Any) -> Amount:
    """Return what one evaluation asks: nothing without a floor."""
    floors = load_floors(recipe)
    if not floors:
        return NOTHING
    return amount_asked([f.benchmark for f in floors], recipe, tokenizer, ChatTemplate(tokenizer))


class Watch:
    """Asks the watched benchmarks of a model in training; see `train.workflow.Watch`."""

    def __init__(self, run: Run, recipe: Recipe, floors: Sequence[Floor], display: Display) -> None:
        """Take what `load_floors` returned."""
        self._run, self._recipe, self._floors, self._display = run, recipe, floors, display
        self._base: dict[str, list[Evidence]] = {}

    def __call__(self, session: "Session", step: int) -> Mapping[str, Retained]:
        """Return what is left of each benchmark after `step`; the first call is for the base.

        Raises:
            DataError: a resumed run would ask other items than it began with.
        """
        if not self._base:
            for floor in self._floors:
                self._display.note(f"retention floor: {check_floors([floor])[0].detail}")
                self._base[floor.name] = self._ask_base(session, floor)
        return {floor.name: self._retained(session, floor, step) for floor in self._floors}

    def _ask_base(self, session: "Session", floor: Floor) -> list[Evidence]:
        """Return what the base said: what a resumed run has of it, or new."""
        if not self._run.evidence_path(FOLDER + floor.name, BASE).exists():
            return self._ask(session, floor, BASE)
        rows = read_evidence(self._run, FOLDER + floor.name, BASE)
        if [row.example_id for row in rows] != [item.id for item in floor.benchmark.items]:
            path = self._run.evidence_path(FOLDER + floor.name, BASE)
            raise DataError(
                f"{path}: this run began with other items of {floor.name} than its source "
                f"({floor.benchmark.source}) has now",
                "bring the benchmark's file back, or train in a new run directory",
            )
        return rows

    def _retained(self, session: "Session", floor: Floor, step: int) -> Retained:
        benchmark, base = floor.benchmark, self._base[floor.name]
        rows = base if step == 0 else self._ask(session, floor, f"step-{step:06d}")
        require_pairs(base, rows, BASE, f"step {step}")
        metric = benchmark.task.metrics[0]
        before, after = (row_scores(part, metric, floor.name) for part in (base, rows))
        accuracy = float(np.mean(list(after.values())))
        change = float(np.mean([after[item] - before[item] for item in before]))
        return Retained(accuracy, change, len(base), floor.margin)

    def _ask(self, session: "Session", floor: Floor, arm: str) -> list[Evidence]:
        from postgrad.evaluate.retention import score_continuations

        model = session.model
        chat = chat_of(floor.benchmark, self._recipe, session.renderer.template)
        with session.objective.precision(model.device):
            rows = score_continuations(model, session.loaded.tokenizer, floor.benchmark, chat)
        write_evidence(self._run, FOLDER + floor.name, arm, rows)
        return rows


def open_watch(
    run: Run, recipe: Recipe, floors: Sequence[Floor], display: Display
) -> Callable[["Session", int], Mapping[str, Retained]] | None:
    """Return what a training watches; None when there is no floor."""
    return Watch(run, recipe, floors, display) if floors else None
