"""Would more rows help? The same training on shares of its rows, tested on the same test rows.

Shares are nested: a smaller one is a part of a larger one. Validation and test rows, learning rate
and tokens of a step are those of the whole run, and each share is passed over as often. So a share
takes fewer steps, as a user with fewer rows would.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from postgrad.config import EvaluateConfig, Recipe
from postgrad.evaluate.compare import compare, measure
from postgrad.evaluate.evidence import read_evidence
from postgrad.evaluate.gates import TUNED
from postgrad.run import Run, read_json, read_jsonl
from postgrad.types import Comparison, Measurement, Split, Verdict


@dataclass(frozen=True, slots=True)
class Share:
    """What a training on a share of the rows reached on the test rows."""

    share: float
    rows: int
    """Rows trained on."""
    value: float
    low: float
    high: float
    n: int
    """Test rows."""
    steps: int
    train_seconds: float
    evidence: str


@dataclass(frozen=True, slots=True)
class LearningCurve:
    """The `learning_curve` entry of measurements.json."""

    shares: tuple[Share, ...]
    """From the smallest to all rows."""
    comparison: Comparison
    """All rows against the largest share of them, paired on the test rows."""
    finding: str
    """The same in words."""


def share_recipe(whole: Run, share: float, max_new_tokens: int) -> Recipe:
    """Return the recipe of a training on `share` of the rows of a trained run.

    What was resolved for the whole run holds for its shares, except the steps between evaluations.
    Only the tuned model is asked: the base model does not depend on the rows. Benchmarks are asked
    only where early stopping needs them to tell its items from the reported ones.
    """
    given, resolved = whole.recipe, whole.config
    rows, most = training_rows(whole), given.train.max_steps
    train = {
        "eval_steps": given.train.eval_steps,
        "max_steps": None if most is None else max(1, round(share * most)),
    }
    evaluate, stopping = resolved.evaluate, resolved.train.early_stopping
    watched = {}
    if stopping and stopping.retention_floor:
        names = ("retention", "retention_limit", "retention_template", "benchmarks")
        watched = {name: getattr(evaluate, name) for name in names}
    return resolved.model_copy(
        update={
            "data": resolved.data.model_copy(
                update={"limit": max(1, round(share * rows)), "seed": resolved.data_seed}
            ),
            "train": resolved.train.model_copy(update=train),
            "evaluate": EvaluateConfig(
                scorer=evaluate.scorer,
                pattern=evaluate.pattern,
                fewshot=(),
                limit=evaluate.limit,
                max_new_tokens=max_new_tokens,
                batch_tokens=evaluate.batch_tokens,
                confidence=evaluate.confidence,
                **watched,
            ),
        }
    )


def training_rows(run: Run) -> int:
    """Return how many rows a run trains on."""
    lines = read_jsonl(run.manifest_path)
    return next(int(line["rows"]) for line in lines if line.get("split") == Split.TRAIN)


def measure_curve(whole: Run, members: Sequence[tuple[float, Run]]) -> LearningCurve:
    """Add the learning curve to measurements.json of the whole run and return it.

    Raises:
        DataError: a share was not tested on the same rows.
    """
    recipe = whole.config
    task, metric, settings = recipe.name, recipe.evaluate.scorer, recipe.evaluate
    runs = [*sorted(members, key=lambda pair: pair[0]), (1.0, whole)]
    shares = []
    for share, run in runs:
        path = str(run.evidence_path(task, TUNED).relative_to(whole.path))
        rows = read_evidence(run, task, TUNED)
        m = measure(rows, task, metric, TUNED, settings.confidence, recipe.data_seed, path)
        shares.append(_share(share, run, m))
    share, part = runs[-2]
    label = f"{TUNED} on {100 * share:g}% of the rows"
    compared = compare(
        read_evidence(part, task, TUNED),
        read_evidence(whole, task, TUNED),
        task,
        metric,
        label,
        TUNED,
        settings.confidence,
        recipe.data_seed,
    )
    said = finding(shares[-2], shares[-1], compared, settings.confidence)
    curve = LearningCurve(tuple(shares), compared, said)
    document = read_json(whole.measurements_path)
    document["learning_curve"] = dataclasses.asdict(curve)
    whole.write_json(whole.measurements_path, document)
    return curve


def _share(share: float, run: Run, m: Measurement) -> Share:
    record: dict[str, Any] = run.record
    return Share(
        share=share,
        rows=training_rows(run),
        value=m.value,
        low=m.low,
        high=m.high,
        n=m.n,
        steps=record["train"]["last_step"],
        train_seconds=record["seconds"]["train"],
        evidence=m.evidence,
    )


def finding(part: Share, whole: Share, c: Comparison, confidence: float) -> str:
    """Say what the last rows bought, and what that allows one to say about more of them."""
    doubled = abs(whole.rows - 2 * part.rows) <= 1
    step = "doubling the rows" if doubled else f"going from {100 * part.share:g}% to all rows"
    text = (
        f"{step} ({part.rows:,} to {whole.rows:,}) bought {100 * c.difference:+.1f} points "
        f"({100 * confidence:g} % interval {100 * c.low:+.1f} to {100 * c.high:+.1f}, "
        f"n = {c.n:,}): "
    )
    if c.verdict is Verdict.IMPROVED:
        return text + "more rows of this kind would probably help further"
    if c.verdict is Verdict.WORSE:
        return text + "fewer rows did better; look at what the others hold before adding more"
    return text + (
        "that more rows would help is not shown; a difference of "
        f"{100 * c.detectable:.1f} points would have been seen"
    )
