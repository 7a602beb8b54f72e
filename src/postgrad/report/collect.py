"""Everything the report needs, read from the files of a run directory into one frozen tree.

A part that was not measured (a run that only trained, only evaluated, or was interrupted) is None;
nothing is filled in. Damaged or wrongly typed files are errors that name the file and the field.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from postgrad.config import Recipe
from postgrad.errors import RunError
from postgrad.evaluate.compare import best_base
from postgrad.evaluate.cost import Costs
from postgrad.evaluate.evidence import read_evidence
from postgrad.evaluate.frontier import Frontier
from postgrad.evaluate.gates import DIALLED
from postgrad.evaluate.learning_curve import LearningCurve
from postgrad.evaluate.prompt_search import PromptSearch
from postgrad.report.abilities import Benchmark, Retention
from postgrad.report.curves import Curves, is_finite, read_curves
from postgrad.run import Run, read_json, read_jsonl
from postgrad.train.stopping import Retained
from postgrad.types import (
    Check,
    Comparison,
    Dropped,
    Evidence,
    Gate,
    Measurement,
    SeedSpread,
    StopReason,
)

T = TypeVar("T")
Outcome = Literal["win", "loss", "both-wrong", "both-right"]

TUNED = "tuned"


@dataclass(frozen=True, slots=True)
class Reference:
    """A figure from outside the run to hold the result against (a linear model, a human)."""

    name: str
    value: float
    n: int | None = None
    source: str = ""
    low: float | None = None
    high: float | None = None
    """Ends of its Wilson interval, when it was measured on this run's test rows."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One test row answered by the best base arm and by the tuned model."""

    example_id: str
    prompt: str
    reference: str
    base: str
    tuned: str
    base_value: float
    tuned_value: float
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Answers:
    """The paired answers, in the order of their content hash: a fixed order nobody chose."""

    base_arm: str
    pairs: tuple[Pair, ...]
    unpaired: int
    """Rows that only one of the two arms has."""

    def count(self, outcome: Outcome) -> int:
        """Return how many rows ended so."""
        return sum(pair.outcome == outcome for pair in self.pairs)


@dataclass(frozen=True, slots=True)
class Flaws:
    """What went wrong while an arm answered; such rows are counted in its measurement."""

    arm: str
    rows: int
    errors: int
    cut: int
    """Answers that ended at `max_new_tokens` instead of a stop token."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Measurements, comparisons and the answers behind them."""

    task: str
    metric: str
    confidence: float
    measurements: tuple[Measurement, ...]
    comparisons: tuple[Comparison, ...]
    references: tuple[Reference, ...]
    flaws: tuple[Flaws, ...]
    answers: Answers | None
    seeds: tuple[SeedSpread, ...] = ()
    """Spread over several trainings; none when there was one."""
    retention: Retention | None = None
    costs: Costs | None = None
    dial: Frontier | None = None
    prompt_search: PromptSearch | None = None
    learning_curve: LearningCurve | None = None

    @property
    def main(self) -> tuple[Measurement, ...]:
        """Measurements of the run's own task and metric, base arms first."""
        own = [m for m in self.measurements if (m.task, m.metric) == (self.task, self.metric)]
        return tuple(sorted(own, key=lambda m: m.arm in (TUNED, DIALLED)))

    @property
    def tuned(self) -> Measurement | None:
        """The tuned model's measurement."""
        return next((m for m in self.main if m.arm == TUNED), None)

    @property
    def best_base(self) -> Measurement | None:
        """The strongest way of prompting the base model."""
        return best_base(self.main)

    @property
    def decisive(self) -> Comparison | None:
        """The comparison that makes the verdict: tuned against the best base arm."""
        best = self.best_base
        found = [
            c
            for c in self.comparisons
            if best and (c.task, c.metric, c.a, c.b) == (self.task, self.metric, best.arm, TUNED)
        ]
        return found[0] if found else None


@dataclass(frozen=True, slots=True)
class Training:
    """The `train` entry of run.json; a missing figure is None."""

    best_step: int | None = None
    best_loss: float | None = None
    start_loss: float | None = None
    last_step: int | None = None
    stopped: str | None = None
    steps: int | None = None
    epochs: float | None = None
    tokens: int | None = None
    supervised_tokens: float | None = None
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    trainable_parameters: int | None = None
    total_parameters: int | None = None
    learning_rate: float | None = None
    tokens_per_batch: int | None = None
    micro_batch_tokens: int | None = None
    threads: int | None = None
    attention_bucket_tokens: int | None = None
    precision: str | None = None
    base_precision: str | None = None
    packed: bool | None = None
    restored_loss: float | None = None
    probe_kl: float | None = None
    retention: Mapping[str, Retained] | None = None
    """Benchmark -> what was left of it at the kept step, where a floor was set."""
    stop_reason: str | None = None

    @property
    def precision_in_words(self) -> str | None:
        """What training computed in; None when that is not known."""
        if self.precision is None or self.base_precision in (None, "model", "auto"):
            return self.precision
        return f"{self.precision}, frozen weights in {self.base_precision} while training"


@dataclass(frozen=True, slots=True)
class Merge:
    """The `merge` entry of run.json: what merging the adapter into the base changed."""

    loss_before: float
    loss_after: float
    max_logit_difference: float | None = None
    tolerance: float | None = None
    greedy_agreement: float | None = None
    refused: bool = False


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens per row, as a pre-flight check counted them."""

    quantiles: Mapping[str, int]
    """median, p90, ... longest: those that were counted."""
    edges: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()
    """Rows between consecutive edges; empty when no histogram was made."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """A source file of the rows."""

    file: str
    sha256: str | None = None
    format: str | None = None
    rows: int | None = None


@dataclass(frozen=True, slots=True)
class Data:
    """Source files, rows per split, and every row that was not used."""

    files: tuple[DataFile, ...]
    splits: Mapping[str, int]
    dropped: tuple[Dropped, ...]

    @property
    def dropped_by_step(self) -> dict[str, list[Dropped]]:
        """Dropped rows under the step that dropped them, the largest step first."""
        steps = Counter(row.step for row in self.dropped).most_common()
        return {step: [row for row in self.dropped if row.step == step] for step, _ in steps}


@dataclass(frozen=True, slots=True)
class Report:
    """A run as the report tells it."""

    path: Path
    record: Mapping[str, Any]
    recipe: Recipe
    resolved: bool
    """Whether `recipe` is the resolved one, every `auto` a value."""
    evaluation: Evaluation | None
    training: Training | None
    curves: Curves | None
    merge: Merge | None
    data: Data | None
    checks: tuple[Check, ...] | None
    lengths: Lengths | None
    gates: tuple[Gate, ...] = ()
    """Conditions of the recipe, judged; none when it has none or nothing was measured."""

    @property
    def waived(self) -> tuple[Check, ...]:
        """Checks that failed and were overruled by the recipe."""
        return tuple(c for c in self.checks or () if c.waived and not c.passed)

    @property
    def refused(self) -> tuple[Check, ...]:
        """Checks that failed and stopped the run."""
        return tuple(c for c in self.checks or () if not c.passed and not c.waived)

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time of each stage that ran."""
        return {str(k): float(v) for k, v in dict(self.record.get("seconds") or {}).items()}

    @property
    def cost(self) -> float | None:
        """Price of the recorded time; None without a price or without a time."""
        price, spent = self.recipe.report.price_per_hour, sum(self.seconds.values())
        return None if price is None or not spent else price * spent / 3600


def collect(run: Run) -> Report:
    """Read a run directory; raises `RunError` when a file in it is damaged."""
    record = run.record
    preflight = read_json(run.preflight_path) if run.preflight_path.exists() else None
    checks = None
    if preflight is not None:
        rows = _mapping(preflight, run.preflight_path).get("checks", [])
        checks = tuple(_parse(Check, row, run.preflight_path) for row in rows)
    return Report(
        path=run.path,
        record=record,
        recipe=run.config,
        resolved=run.config_path.exists(),
        evaluation=_evaluation(run),
        training=_section(Training, record, "train", run.record_path),
        curves=read_curves(run),
        merge=_section(Merge, record, "merge", run.record_path),
        data=_data(run),
        checks=checks,
        lengths=_lengths(checks or ()),
        gates=tuple(_parse(Gate, gate, run.record_path) for gate in record.get("gates") or ()),
    )


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _parse(kind: type[T], row: Any, path: Path) -> T:
    try:
        parsed: T = _adapter(kind).validate_python(row)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise RunError(
            f"{path}: {kind.__name__.lower()}: {field}: {first['msg'].lower()}",
            "rerun the stage that writes this file",
        ) from None
    return parsed


def _mapping(value: Any, path: Path) -> dict[str, Any]:
    return dict(_parse(dict, value, path))


def _section(kind: type[T], record: Mapping[str, Any], key: str, path: Path) -> T | None:
    value = record.get(key)
    return None if value is None else _parse(kind, value, path)


def _evaluation(run: Run) -> Evaluation | None:
    path = run.measurements_path
    if not path.exists():
        return None
    tree = _mapping(read_json(path), path)
    task, metric = str(tree.get("task")), str(tree.get("metric"))
    measurements = tuple(_parse(Measurement, m, path) for m in tree.get("measurements", []))
    rows = {
        m.arm: _evidence(run, task, m.arm, metric)
        for m in measurements
        if (m.task, m.metric) == (task, metric)
    }
    comparisons = tuple(_parse(Comparison, c, path) for c in tree.get("comparisons", []))
    benchmarks = tuple(_parse(Benchmark, b, path) for b in tree.get("retention", []))
    general = {benchmark.task for benchmark in benchmarks}
    without_answers = Evaluation(
        task=task,
        metric=metric,
        confidence=run.config.evaluate.confidence,
        measurements=tuple(m for m in measurements if m.task not in general),
        comparisons=tuple(c for c in comparisons if c.task not in general),
        references=tuple(_parse(Reference, r, path) for r in tree.get("references", [])),
        flaws=tuple(_flaws(arm, found) for arm, found in rows.items() if found),
        answers=None,
        seeds=tuple(_parse(SeedSpread, spread, path) for spread in tree.get("seeds", [])),
        retention=Retention.of(benchmarks, measurements, comparisons),
        costs=_section(Costs, tree, "costs", path),
        prompt_search=_section(PromptSearch, tree, "prompt_search", path),
        learning_curve=_section(LearningCurve, tree, "learning_curve", path),
        dial=_section(Frontier, tree, "dial", path),
    )
    best = without_answers.best_base
    if best is None or not rows.get(best.arm) or not rows.get(TUNED):
        return without_answers
    answers = _answers(best.arm, rows[best.arm], rows[TUNED], metric)
    return replace(without_answers, answers=answers)


def _evidence(run: Run, task: str, arm: str, metric: str) -> Sequence[Evidence]:
    path = run.evidence_path(task, arm)
    if not path.exists():
        return ()
    rows = read_evidence(run, task, arm)
    missing = [row.example_id for row in rows if row.error is None and metric not in row.scores]
    if missing:
        raise RunError(
            f"{path}: {len(missing)} rows have no {metric} score, the first is {missing[0]}",
            "run the evaluation again",
        )
    return rows


def _flaws(arm: str, rows: Sequence[Evidence]) -> Flaws:
    return Flaws(
        arm=arm,
        rows=len(rows),
        errors=sum(row.error is not None for row in rows),
        cut=sum(row.stop_reason is StopReason.LENGTH for row in rows),
    )


def _answers(
    base_arm: str, base: Sequence[Evidence], tuned: Sequence[Evidence], metric: str
) -> Answers:
    left, right = ({row.example_id: row for row in rows} for rows in (base, tuned))
    both = sorted(left.keys() & right.keys())
    return Answers(
        base_arm=base_arm,
        pairs=tuple(_pair(left[key], right[key], metric) for key in both),
        unpaired=len(left.keys() ^ right.keys()),
    )


def _pair(base: Evidence, tuned: Evidence, metric: str) -> Pair:
    a_value, b_value = _value(base, metric), _value(tuned, metric)
    passed = tuned.error is None and tuned.scores[metric].passed
    outcome: Outcome = "both-right" if passed else "both-wrong"
    if a_value != b_value:
        outcome = "win" if b_value > a_value else "loss"
    return Pair(
        example_id=tuned.example_id,
        prompt=tuned.prompt,
        reference=tuned.reference,
        base=_said(base),
        tuned=_said(tuned),
        base_value=a_value,
        tuned_value=b_value,
        outcome=outcome,
    )


def _value(row: Evidence, metric: str) -> float:
    """Return the score as it is counted: a row that failed is 0."""
    return row.scores[metric].value if row.error is None else 0.0


def _said(row: Evidence) -> str:
    return row.completion if row.error is None else f"[error: {row.error}] {row.completion}"


def _data(run: Run) -> Data | None:
    if not run.manifest_path.exists():
        return None
    lines = [_mapping(line, run.manifest_path) for line in read_jsonl(run.manifest_path)]
    return Data(
        files=tuple(_parse(DataFile, x, run.manifest_path) for x in lines if "file" in x),
        splits={str(x["split"]): int(x["rows"]) for x in lines if "split" in x},
        dropped=tuple(_parse(Dropped, x, run.dropped_path) for x in read_jsonl(run.dropped_path)),
    )


def _lengths(checks: Sequence[Check]) -> Lengths | None:
    """Return the row lengths among the figures of the first check that counted them."""
    for check in checks:
        nested = check.data.get("lengths")
        found = {**check.data, **(nested if isinstance(nested, Mapping) else {})}
        quantiles = {name: int(found[name]) for name in _QUANTILES if is_finite(found.get(name))}
        edges, counts = tuple(found.get("edges", ())), tuple(found.get("counts", ()))
        drawn = bool(counts) and len(edges) == len(counts) + 1
        if "longest" in quantiles or drawn:
            return Lengths(quantiles, edges if drawn else (), counts if drawn else ())
    return None


_QUANTILES = ("median", "p90", "p95", "p99", "longest", "max_length")
