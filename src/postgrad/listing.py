"""What there is to know about runs, finished or not, read from their directories. No torch."""

from pathlib import Path
from typing import Any

from postgrad.errors import RunError
from postgrad.run import Run, list_runs, open_run, read_json

TUNED = "tuned"


def summarize(run: Run) -> dict[str, Any]:
    """Return one run as a row: run, name, verb, status, created, verdict, outcome, tuned, seconds.

    `outcome` is the verdict against the strongest base arm in one word, `verdict` its sentence.

    The status is `running` while a process holds the directory, `stopped` when one was killed
    there, else what the run says of itself: done, failed or interrupted. A run whose files are
    damaged is `unreadable`; the reason stands under `problem`.
    """
    try:
        record = run.record
        results = _results(run)
    except RunError as error:
        return {"run": str(run.path), "status": "unreadable", "problem": error.message}
    status = record.get("status", "unknown")
    general = {benchmark["task"] for benchmark in results.get("retention", ())}
    own = {
        kind: [x for x in results.get(kind, ()) if x.get("task") not in general]
        for kind in ("measurements", "comparisons")
    }
    tuned = [m for m in own["measurements"] if m.get("arm") == TUNED]
    rivals = [c for c in own["comparisons"] if c.get("b") == TUNED]
    return {
        "run": str(run.path),
        "name": record.get("name"),
        "verb": record.get("verb"),
        "status": "running" if run.in_use else "stopped" if status == "running" else status,
        "created": record.get("created"),
        "verdict": record.get("verdict"),
        "problem": record.get("error") if status != "done" else None,
        "outcome": min(rivals, key=lambda c: c["difference"])["verdict"] if rivals else None,
        "tuned": tuned[0] if tuned else None,
        "seconds": round(sum(record.get("seconds", {}).values()), 3),
    }


def describe_run(path: Path) -> dict[str, Any]:
    """Return one run in full: its summary, measurements, comparisons, seconds per stage, changes.

    `changed` lists the files that differ from the seal; None when the run is not sealed.
    """
    run = open_run(path)
    record, results = run.record, _results(run)
    return summarize(run) | {
        "finished": record.get("finished"),
        "seed": record.get("seed"),
        "recipe_hash": record.get("recipe_hash"),
        "gates": record.get("gates", []),
        "measurements": results.get("measurements", []),
        "comparisons": results.get("comparisons", []),
        "retention": results.get("retention", []),
        "seconds_by_stage": record.get("seconds", {}),
        "versions": record.get("versions", {}),
        "changed": run.changed_files(),
    }


def list_summaries(root: Path) -> list[dict[str, Any]]:
    """Return a summary of every run below `root`, oldest first."""
    return [summarize(run) for run in list_runs(root)]


def _results(run: Run) -> dict[str, Any]:
    path = run.measurements_path
    results: dict[str, Any] = read_json(path) if path.exists() else {}
    return results
