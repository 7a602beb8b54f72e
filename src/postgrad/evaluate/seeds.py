"""Several trainings of one recipe: what their evidence says together, seeds and rows kept apart.

All seeds answer the same test rows (the split has a seed of its own), so scores form a table of
seeds and rows. An interval over rows alone holds for these very models; what is claimed for the
recipe must also cover the next seed.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from postgrad.evaluate import statistics
from postgrad.evaluate.compare import (
    correct,
    decide,
    headline,
    is_row_mean,
    require_pairs,
    row_groups,
    row_scores,
)
from postgrad.evaluate.evidence import read_evidence
from postgrad.evaluate.gates import BASE, DIALLED, TUNED
from postgrad.evaluate.prompt_search import LEDGER
from postgrad.run import Run, read_json
from postgrad.types import Comparison, Evidence, Measurement, SeedSpread

METHOD = "two-level"


def reuse_base_evidence(first: Run, run: Run, files: str = "**/*.jsonl") -> None:
    """Copy what the base model answered: same model, rows and prompts, whatever the seed."""
    for path in sorted((first.path / "evidence").glob(files)):
        target = run.path / path.relative_to(first.path)
        arm = path.name.removesuffix(".jsonl").rpartition(".")[2]
        of_base = arm in (BASE, LEDGER) or arm.startswith((f"{BASE}-", f"{LEDGER}-"))
        if of_base and not target.exists():
            run.write_text(target, path.read_text(encoding="utf-8"))


def combine(parent: Run, members: Sequence[Run]) -> dict[str, Any]:
    """Write the combined evidence/measurements.json of several seeds; returns the document.

    Base arms are those of the first seed. The tuned arm and its comparisons are means over seeds
    with the two-level interval; `seeds` holds both spreads apart.

    Raises:
        DataError: the seeds did not answer the same rows.
    """
    settings = parent.recipe.evaluate
    trees = [read_json(member.measurements_path) for member in members]
    first, own = trees[0], members[0].path.relative_to(parent.path)
    document = {**first, "measurements": [], "comparisons": [], "seeds": []}
    document.pop("dial", None)  # each seed has chosen its own point
    for entry, key in (("prompt_search", "variants"), ("learning_curve", "shares")):
        if first.get(entry):
            inside = [{**row, "evidence": f"{own}/{row['evidence']}"} for row in first[entry][key]]
            document[entry] = {**first[entry], key: inside}
    for m in first["measurements"]:
        if not is_row_mean(m["metric"]) or m["arm"] == DIALLED:
            continue
        if m["arm"] != TUNED:
            document["measurements"].append({**m, "evidence": f"{own}/{m['evidence']}"})
            continue
        rows = _rows(members, m["task"], TUNED)
        measured, spread = _measure(rows, m, settings.confidence, parent.recipe.data_seed)
        document["measurements"].append(dataclasses.asdict(measured))
        document["seeds"].append(dataclasses.asdict(spread))
    found: list[Comparison] = []
    for c in first["comparisons"]:
        if c["b"] == TUNED and is_row_mean(c["metric"]):
            rows = _rows(members, c["task"], TUNED)
            base = read_evidence(members[0], c["task"], c["a"])
            compared, spread = _compare(base, rows, c, settings.confidence, parent.recipe.data_seed)
            found.append(compared)
            document["seeds"].append(dataclasses.asdict(spread))
    own_task = [c for c in found if c.task == first["task"]]
    suite = [c for c in found if c.task != first["task"]]
    if len(suite) > 1:
        suite = correct(suite, settings.confidence)
    document["comparisons"] = [dataclasses.asdict(c) for c in (*own_task, *suite)]
    parent.write_json(parent.measurements_path, document)
    verdict = headline(own_task, settings.confidence) if own_task else "no comparison"
    parent.update(
        verdict=f"over {len(members)} seeds: {verdict}",
        seeds=[member.recipe.seed for member in members],
        seconds=_seconds(members),
    )
    return document


def _seconds(members: Sequence[Run]) -> dict[str, float]:
    total: dict[str, float] = {}
    for member in members:
        for stage, spent in member.record["seconds"].items():
            total[stage] = round(total.get(stage, 0.0) + spent, 3)
    return total


def _rows(members: Sequence[Run], task: str, arm: str) -> list[list[Evidence]]:
    """Return the evidence of each seed, refused unless all answered the same rows."""
    rows = [read_evidence(member, task, arm) for member in members]
    for member, found in zip(members[1:], rows[1:], strict=True):
        require_pairs(rows[0], found, f"seed {members[0].path.name}", f"seed {member.path.name}")
    return rows


def _table(rows: Sequence[Sequence[Evidence]], metric: str) -> statistics.Values:
    """Return scores [seeds, rows], the rows in the order of the first seed."""
    scores = [row_scores(found, metric, TUNED) for found in rows]
    return np.array([[found[example] for example in scores[0]] for found in scores])


def _levels(
    table: statistics.Values,
    groups: Sequence[str],
    confidence: float,
    seed: int,
    bounds: tuple[float, float],
) -> statistics.TwoLevels:
    """Return both levels; rows in groups enter as one term each, which clusters their errors."""
    if groups:
        _, index = np.unique(np.asarray(groups), return_inverse=True)
        count, mean = int(index.max()) + 1, table.mean()
        sums = np.stack([np.bincount(index, weights=row - mean) for row in table])
        table = mean + count / table.shape[1] * sums
    return statistics.two_levels(table, confidence, seed, bounds=bounds)


def _spread(
    levels: statistics.TwoLevels, table: statistics.Values, like: dict[str, Any], against: str
) -> SeedSpread:
    return SeedSpread(
        task=like["task"],
        metric=like["metric"],
        arm=TUNED,
        against=against,
        values=tuple(float(value) for value in table.mean(axis=1)),
        mean=levels.mean,
        seed_deviation=levels.seed_deviation,
        row_error=levels.row_error,
        over_seeds=levels.over_seeds,
        over_rows=levels.over_rows,
        over_both=levels.over_both,
    )


def _measure(
    rows: Sequence[Sequence[Evidence]], like: dict[str, Any], confidence: float, seed: int
) -> tuple[Measurement, SeedSpread]:
    table = _table(rows, like["metric"])
    levels = _levels(table, row_groups(rows[0]), confidence, seed, (0.0, 1.0))
    measured = Measurement(
        task=like["task"],
        metric=like["metric"],
        arm=TUNED,
        value=levels.mean,
        low=levels.over_both.low,
        high=levels.over_both.high,
        n=table.shape[1],
        method=METHOD,
        evidence=f"seeds/*/{like['evidence']}",
        errors=sum(row.error is not None for found in rows for row in found),
    )
    return measured, _spread(levels, table, like, "")


def _compare(
    base: Sequence[Evidence],
    rows: Sequence[Sequence[Evidence]],
    like: dict[str, Any],
    confidence: float,
    seed: int,
) -> tuple[Comparison, SeedSpread]:
    require_pairs(base, rows[0], like["a"], TUNED)
    scores, groups = row_scores(base, like["metric"], like["a"]), row_groups(rows[0])
    table = _table(rows, like["metric"]) - np.array([scores[row.example_id] for row in rows[0]])
    bounds, means, n = (-1.0, 1.0), table.mean(axis=0), table.shape[1]
    levels = _levels(table, groups, confidence, seed, bounds)
    sided = _levels(table, groups, statistics.one_sided(confidence), seed, bounds).over_both
    detectable = statistics.detectable_share_difference(0.0, n, confidence)
    if levels.error:
        unit = statistics.detectable_mean_difference(1.0, 1, confidence)
        detectable = min(1.0, unit * levels.error)
    compared = Comparison(
        task=like["task"],
        metric=like["metric"],
        a=like["a"],
        b=TUNED,
        difference=levels.mean,
        low=levels.over_both.low,
        high=levels.over_both.high,
        p=levels.p,
        n=n,
        method=METHOD,
        verdict=decide(levels.p, *levels.over_both, confidence),
        detectable=detectable,
        wins=int((means > 0).sum()),
        losses=int((means < 0).sum()),
        lower=sided.low,
        upper=sided.high,
        deviation=float(means.std()),
    )
    return compared, _spread(levels, table, like, like["a"])
