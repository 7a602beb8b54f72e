"""Two runs compared on the same rows, from their evidence files, or refused; the planner of rows.

Nothing is computed by a model here: what two runs have in common is compared row by row, and what
they do not have in common is named.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from postgrad.errors import DataError, RunError
from postgrad.evaluate import statistics
from postgrad.evaluate.compare import compare, correct, headline, is_row_mean
from postgrad.evaluate.evidence import read_evidence
from postgrad.evaluate.frontier import FOLDER
from postgrad.evaluate.gates import BASE, TUNED
from postgrad.run import Run, read_json
from postgrad.types import Comparison, Evidence, Verdict

ASSUMED_DISCORDANCE = (0.05, 0.1, 0.15, 0.2, 0.3)
"""Shares of rows on which exactly one of two arms is right, where no run says which it is."""
POWERS = (0.8, 0.9)


@dataclass(frozen=True, slots=True)
class _Key:
    """What is compared: a benchmark by its name, the run's own task (None) whatever its name."""

    task: str | None
    metric: str
    arm: str


def compare_runs(a: Run, b: Run) -> dict[str, Any]:
    """Compare every arm that both runs measured on the same task, `b` against `a`.

    Benchmarks are a suite: their verdicts are corrected by Holm for each arm. The verdict is that
    of the tuned arms on the test rows.

    Raises:
        RunError: a run was not evaluated.
        DataError: the test rows, their references, the requests or the scorer differ, or nothing is
            shared; says what.
    """
    measured = {run.path: _measured(run) for run in (a, b)}
    here, there = (_keys(measured[run.path]) for run in (a, b))
    names = names_of((a, b))
    shared = [key for key in here if key in there]
    if not any(key.task is None for key in shared):
        _refuse_unshared(measured[a.path], measured[b.path], names)
    confidence = a.recipe.evaluate.confidence
    found = {key: _compare(a, b, key, (here[key], there[key]), names, confidence) for key in shared}
    for arm in dict.fromkeys(key.arm for key in shared):
        suite = [key for key in shared if key.arm == arm and key.task is not None]
        if len(suite) > 1:
            found |= zip(suite, correct([found[key] for key in suite], confidence), strict=True)
    decisive = [c for key, c in found.items() if (key.task, key.arm) == (None, TUNED)]
    return {
        "runs": [str(a.path), str(b.path)],
        "verdict": headline(decisive, confidence) if decisive else "no tuned model in both runs",
        "confidence": confidence,
        "comparisons": [asdict(c) for c in found.values()],
        "recipe": {k: list(values) for k, values in a.recipe.differences(b.recipe).items()},
        "frontiers": collect_frontiers((a, b), names),
        "unshared": [
            f"{name}: {keys[key]} {key.metric} {key.arm}"
            for name, keys in zip(names, (here, there), strict=True)
            for key in keys
            if key not in shared
        ],
    }


def collect_frontiers(runs: Sequence[Run], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the dials of runs that can stand in one table or picture, as {"run", "dial"}.

    Those are the runs whose dial asked the same base model the same rows and items in the same way
    as the first run's that has one; fewer than two are none. A dial whose answers are gone is left
    out.
    """
    found: list[dict[str, Any]] = []
    asked: list[Any] | None = None
    for run, name in zip(runs, names, strict=True):
        tree = _measured(run)
        dial = tree.get("dial")
        if dial is None:
            continue
        tasks = (tree["task"], *dial["items"])
        if not all(run.evidence_path(FOLDER + task, BASE).exists() for task in tasks):
            continue
        base = (read_evidence(run, FOLDER + task, BASE) for task in tasks)
        ids = [[row.example_id for row in rows] for rows in base]
        questions = [_manner(run), dial["metric"], tasks[1:], ids]
        asked = questions if asked is None else asked
        if questions == asked:
            found.append({"run": name, "dial": dial})
    return found if len(found) > 1 else []


def _manner(run: Run) -> tuple[Any, ...]:
    """Return what decides, besides rows and items, whether the points of two dials are alike."""
    model, settings = run.recipe.model, run.recipe.evaluate
    return model.base, model.revision, settings.retention_template, settings.pattern


def plan_rows(points: float, runs: Sequence[Run] = ()) -> dict[str, Any]:
    """Return how many rows show a difference of so many points, or certify that it was not lost.

    The answer depends on how often two arms differ on a row: taken from the comparisons of one run,
    from those between two runs, or, without a run, assumed.
    """
    difference, confidence = points / 100, 0.95
    sources: list[tuple[str, str, int | None, Mapping[str, float]]]
    if not runs:
        shares = sorted({max(share, difference) for share in ASSUMED_DISCORDANCE})
        sources = [("any", "assumed", None, {"discordance": share}) for share in shares]
    else:
        if len(runs) == 2:
            found = compare_runs(*runs)["comparisons"]
        else:
            found = _measured(runs[0])["comparisons"]
        if not found:
            raise RunError(
                f"{runs[0].path} holds no comparison to plan from", "give a run with a tuned model"
            )
        confidence = runs[0].recipe.evaluate.confidence
        comparisons = [Comparison(**{**c, "verdict": Verdict(c["verdict"])}) for c in found]
        sources = [
            (c.task, f"{c.b} against {c.a}", c.n, _spread(c, confidence)) for c in comparisons
        ]
    rows = [
        {
            "task": task,
            "arms": arms,
            "measured_rows": n,
            **spread,
            "rows_to_show": _needed(statistics.items_needed, difference, spread, confidence),
            "rows_to_certify": _needed(statistics.items_to_certify, difference, spread, confidence),
        }
        for task, arms, n, spread in sources
    ]
    return {"plan": {"points": points, "confidence": confidence, "rows": rows}}


def _needed(
    planner: Any, difference: float, spread: Mapping[str, float], confidence: float
) -> dict[str, int]:
    return {
        f"{power:g}": planner(difference, power=power, confidence=confidence, **spread)
        for power in POWERS
    }


def _spread(c: Comparison, confidence: float) -> Mapping[str, float]:
    """Return what the planner needs; for clustered rows the deviation that clusters amount to."""
    if c.method == "mcnemar-exact":
        return {"discordance": (c.wins + c.losses) / c.n}
    unit = statistics.detectable_mean_difference(1.0, c.n, confidence)
    return {"deviation": c.detectable / unit}


def _compare(
    a: Run,
    b: Run,
    key: _Key,
    tasks: tuple[str, str],
    names: Sequence[str],
    confidence: float,
) -> Comparison:
    a_rows, b_rows = (read_evidence(run, t, key.arm) for run, t in zip((a, b), tasks, strict=True))
    labels = (f"{names[0]}:{key.arm}", f"{names[1]}:{key.arm}")
    task = tasks[0] if tasks[0] == tasks[1] else " / ".join(tasks)
    compared = compare(a_rows, b_rows, task, key.metric, *labels, confidence, a.recipe.data_seed)
    _refuse_other_requests(a_rows, b_rows, labels)
    return compared


def _refuse_other_requests(
    a_rows: Sequence[Evidence], b_rows: Sequence[Evidence], labels: Sequence[str]
) -> None:
    asked = {row.example_id: row.prompt for row in a_rows}
    changed = [row.example_id for row in b_rows if asked[row.example_id] != row.prompt]
    if changed:
        raise DataError(
            f"{labels[0]} and {labels[1]} were not asked the same: {len(changed)} of {len(asked)} "
            f"requests differ, the first is {changed[0]}",
            "evaluate both with the same prompt; the difference would mix two changes",
        )


def _refuse_unshared(a: Mapping[str, Any], b: Mapping[str, Any], names: Sequence[str]) -> None:
    """Say why the test rows of two runs have no arm in common."""
    if a["metric"] != b["metric"]:
        raise DataError(
            f"the runs were scored differently: {a['metric']} in {names[0]}, {b['metric']} in "
            f"{names[1]}",
            "evaluate both with the same evaluate.scorer",
        )
    arms = [
        ", ".join(key.arm for key in _keys(tree) if key.task is None) or "no arm" for tree in (a, b)
    ]
    raise DataError(
        f"the runs measured no arm in common: {arms[0]} in {names[0]}, {arms[1]} in {names[1]}",
        "evaluate both with the same evaluate.fewshot, or train both",
    )


def _measured(run: Run) -> dict[str, Any]:
    if run.seeds.is_dir():
        raise RunError(f"{run.path} holds several seeds", f"name one of them: {run.seeds}/SEED")
    if not run.measurements_path.exists():
        raise RunError(f"{run.path} was not evaluated", f"run `postgrad evaluate {run.path}`")
    tree: dict[str, Any] = read_json(run.measurements_path)
    return tree


def _keys(tree: Mapping[str, Any]) -> dict[_Key, str]:
    """Return what a run measured -> the task's name there."""
    return {
        _Key(None if m["task"] == tree["task"] else m["task"], m["metric"], m["arm"]): m["task"]
        for m in tree["measurements"]
        if is_row_mean(m["metric"])
    }


def names_of(runs: Sequence[Run]) -> list[str]:
    """Return the directories' names, or their paths where two names are equal."""
    short = [run.path.resolve().name for run in runs]
    return short if len(set(short)) == len(short) else [str(run.path) for run in runs]
