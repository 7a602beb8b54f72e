"""Does a training take what `postgrad estimate` said? Time and peak memory, estimated and measured.

Usage: python benchmarks/estimate_accuracy.py [--banking77 DIR] [KEY=VALUE ...]. For each task it
estimates (from a probe, and from the runs of the tasks before it), makes a dry run, and then the
run itself, each in a process of its own. Prints a table last and writes
benchmarks/results/<date>-....json. The goal is an error within 25 %.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import circumstances, contender_environment, say, table, write_result
from quality import banking_task, demo_task

from postgrad.run import open_run

GOAL = 0.25


def postgrad(*arguments: str | Path) -> dict[str, Any]:
    """Run one command line; returns its JSON document."""
    command = [sys.executable, "-m", "postgrad", *map(str, arguments), "--json"]
    environment = contender_environment()
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if ended.returncode:
        raise SystemExit(f"exit code {ended.returncode}: {' '.join(command)}")
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


def measured(run: Path) -> dict[str, float]:
    """Return tokens, seconds and peak memory of a run's training, held-out losses included."""
    train = open_run(run).record["train"]
    return {
        "tokens": train["tokens"],
        "seconds": train["tokens"] / train["tokens_per_second"],
        "peak_memory_bytes": train["peak_memory_bytes"],
    }


def errors(estimate: dict[str, Any], truth: dict[str, float]) -> dict[str, float]:
    """Return the relative errors of an estimate; a run that stopped early counts by its tokens.

    >>> estimate = {"train_seconds": 200, "tokens": 1000, "peak_memory_bytes": 90}
    >>> errors(estimate, {"seconds": 100, "tokens": 500, "peak_memory_bytes": 100})
    {'seconds': 0.0, 'peak_memory_bytes': -0.1}
    """
    seconds = estimate["train_seconds"] * truth["tokens"] / estimate["tokens"]
    found = estimate["peak_memory_bytes"] / truth["peak_memory_bytes"] - 1
    return {
        "seconds": round(seconds / truth["seconds"] - 1, 4),
        "peak_memory_bytes": round(found, 4),
    }


def judge(recipe: Path, overrides: Sequence[str], name: str, folder: Path) -> dict[str, Any]:
    """Estimate a task in every way, run it, and compare."""
    runs, none = folder / "runs", folder / "none"
    estimates = {
        "probe": postgrad("estimate", recipe, *overrides, "--runs", none)["estimate"],
        "dry run": postgrad("run", recipe, *overrides, "--dry-run")["plan"],
    }
    if runs.is_dir():
        found = postgrad("estimate", recipe, *overrides, "--runs", runs)["estimate"]
        if found["time_source"] == "recorded run":
            estimates["recorded run"] = found
    postgrad("run", recipe, *overrides, "--out", runs / name)
    truth = measured(runs / name)
    return {
        "measured": truth,
        "estimates": {
            source: {
                "train_seconds": found["train_seconds"],
                "peak_memory_bytes": found["peak_memory_bytes"],
                "tokens": found["tokens"],
                "memory": found["memory"],
                "time_detail": found["time_detail"],
                "errors": errors(found, truth),
            }
            for source, found in estimates.items()
        },
    }


def accuracy_table(tasks: dict[str, Any]) -> str:
    """Return a line for each task and source of the estimate."""
    heads = ["task", "estimated by", "seconds", "measured", "error", "GB", "measured", "error"]
    rows = [heads]
    for name, task in tasks.items():
        truth = task["measured"]
        for source, found in task["estimates"].items():
            share = truth["tokens"] / found["tokens"]
            rows.append(
                [
                    name,
                    source,
                    f"{found['train_seconds'] * share:.0f}",
                    f"{truth['seconds']:.0f}",
                    f"{found['errors']['seconds']:+.0%}",
                    f"{found['peak_memory_bytes'] / 1e9:.2f}",
                    f"{truth['peak_memory_bytes'] / 1e9:.2f}",
                    f"{found['errors']['peak_memory_bytes']:+.0%}",
                ]
            )
    return table(rows)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--banking77", type=Path, metavar="DIR", help="adds the task banking77")
    parser.add_argument("--quick", action="store_true", help="few rows: proves that it runs")
    parser.add_argument("--out", type=Path, help="the JSON; default: benchmarks/results/...")
    parser.add_argument("--keep", type=Path, help="folder for the runs, kept")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for every task")
    return parser.parse_intermixed_args()


def main() -> None:
    """Measure, write, print."""
    options = arguments()
    chosen = {"demo": demo_task()}
    if options.banking77:
        chosen["banking77"] = banking_task(options.banking77)
    quick = ["data.limit=300", "evaluate.limit=8"] if options.quick else []
    tasks: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="postgrad-estimate-") as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name, (recipe, places) in chosen.items():
            say(name)
            overrides = [*places, "evaluate.fewshot=[]", *quick, *options.overrides]
            tasks[name] = judge(recipe, overrides, name, folder)
    facts = circumstances()
    document = {"benchmark": "estimate accuracy", **facts, "quick": options.quick, "tasks": tasks}
    path = write_result(document, "estimate-accuracy", options.out)
    print(accuracy_table(tasks))
    print(f"goal: every error within {GOAL:.0%}; written to {path}")


if __name__ == "__main__":
    main()
