"""Is the tuned model any good? Accuracy over seeds against a linear model on the same rows.

Usage: python benchmarks/quality.py [--precisions] [--banking77 DIR] [KEY=VALUE ...]. Every figure
comes from `postgrad run ... --json` in a process of its own; the linear model (evaluate/linear.py)
learns from the rows that the tuned model was trained on and labels the rows that it was tested on,
so the two are compared row by row. --precisions asks another question, on fewer rows: do bf16 and
int8 cost quality against float32 (precisions.py)? Prints a table last and writes
benchmarks/results/<date>-....json.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import precisions
from harness import HERE, circumstances, contender_environment, say, table, write_result

import postgrad.demo
from postgrad.config import Recipe, load_recipe
from postgrad.data.dataset import read_dataset
from postgrad.demo.licences import ATTRIBUTION, licence_rows_file
from postgrad.evaluate.evidence import read_evidence
from postgrad.evaluate.linear import linear_floor
from postgrad.evaluate.statistics import mcnemar_exact, paired_share_interval
from postgrad.run import open_run
from postgrad.types import Split

DEMO_RECIPE = Path(postgrad.demo.__file__).with_name("recipe.yaml")
BANKING_RECIPE = HERE.parent / "recipes" / "banking77.yaml"
BANKING_FILES = {"train": "train.jsonl", "validation": "valid.jsonl", "test": "test.jsonl"}
QUICK = ("data.limit=300", "evaluate.limit=20", "train.max_steps=3", "train.eval_rows=20")
TUNED = "tuned"


def demo_task() -> tuple[Path, list[str]]:
    """Return the embedded recipe and where its rows are; downloads them the first time."""
    say(ATTRIBUTION)
    return DEMO_RECIPE, [f"data.train={licence_rows_file()}"]


def banking_task(folder: Path) -> tuple[Path, list[str]]:
    """Return the Banking77 recipe and its three files in `folder`; all test rows are used."""
    missing = [name for name in BANKING_FILES.values() if not (folder / name).is_file()]
    if missing:
        raise SystemExit(f"{folder} has no {', '.join(missing)} (columns text and label)")
    paths = [f"data.{split}={folder / name}" for split, name in BANKING_FILES.items()]
    return BANKING_RECIPE, [*paths, "evaluate.limit=null"]


def measure(recipe: Path, overrides: Sequence[str], seed: int, out: Path) -> dict[str, Any]:
    """Run a recipe with one seed; returns its figures beside the linear model's."""
    command = [
        *(sys.executable, "-m", "postgrad", "run", recipe, *overrides),
        *(f"seed={seed}", "--out", out, "--json"),
    ]
    log = out.with_suffix(".log")
    began = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        ended = subprocess.run(
            [str(part) for part in command],
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            env=contender_environment(),
        )
    if ended.returncode:
        tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-15:])
        raise SystemExit(f"exit code {ended.returncode}; {log}:\n{tail}")
    document = json.loads(ended.stdout)
    train = document["train"]
    beside = beside_linear(out, seed)
    shown = [r["value"] for r in document["references"] if r["name"] == beside["linear"]["arm"]]
    assert shown == [beside["linear"]["value"]], "the report shows another linear model"
    return {
        "seed": seed,
        "comparisons": document["comparisons"],
        "measurements": document["measurements"],
        **beside,
        "train": {
            key: train[key]
            for key in (
                "steps", "last_step", "best_step", "stopped", "epochs", "learning_rate",
                "start_loss", "best_loss", "tokens", "tokens_per_second", "peak_memory_bytes",
                "threads", "precision", "packed",
            )
        },
        "seconds": {**document["seconds"], "all": round(time.monotonic() - began, 1)},
    }  # fmt: skip


def beside_linear(path: Path, seed: int) -> dict[str, Any]:
    """Compare the tuned model with the linear one, row by row, from the run's own files."""
    run = open_run(path)
    recipe = run.config
    confidence = recipe.evaluate.confidence
    dataset = read_dataset(run)
    evidence = read_evidence(run, recipe.name, TUNED)
    requests = {
        example.id: [m.content for m in example.conversation.messages if m.role == "user"][-1]
        for example in dataset.examples
    }
    train = dataset.of(Split.TRAIN)
    floor = linear_floor(
        [requests[example.id] for example in train],
        [example.conversation.answer for example in train],
        [requests[row.example_id] for row in evidence],
        [row.reference for row in evidence],
        confidence=confidence,
        seed=seed,
    )
    assert floor is not None
    scorer = recipe.evaluate.scorer
    tuned = [bool(row.scores[scorer].passed) if not row.error else False for row in evidence]
    linear = [
        guess == row.reference.strip()
        for guess, row in zip(floor.predictions, evidence, strict=True)
    ]
    wins = sum(a and not b for a, b in zip(tuned, linear, strict=True))
    losses = sum(b and not a for a, b in zip(tuned, linear, strict=True))
    n = len(evidence)
    interval = paired_share_interval(wins, losses, n, confidence)
    figures = {key: value for key, value in asdict(floor).items() if key != "predictions"}
    return {
        "rows": {"train": len(train), "test": n, "labels": floor.labels},
        "tuned": sum(tuned) / n,
        "linear": figures,
        "tuned_minus_linear": {
            "difference": (wins - losses) / n,
            "low": interval.low,
            "high": interval.high,
            "p": mcnemar_exact(wins, losses),
            "only_tuned_right": wins,
            "only_linear_right": losses,
        },
    }


def portable(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe without the folders of this machine."""
    tree = recipe.model_dump(mode="json")
    data = tree["data"]
    files = {key: Path(data[key]).name for key in BANKING_FILES if isinstance(data[key], str)}
    return {**tree, "data": {**data, **files}}


def summarise(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return mean and range over seeds, and how many seeds beat the linear model."""
    tuned = [run["tuned"] for run in runs]
    linear = [run["linear"]["value"] for run in runs]
    differences = [run["tuned_minus_linear"]["difference"] for run in runs]
    return {
        "seeds": [run["seed"] for run in runs],
        "tuned_mean": statistics.mean(tuned),
        "tuned_lowest": min(tuned),
        "tuned_highest": max(tuned),
        "linear_mean": statistics.mean(linear),
        "difference_mean": statistics.mean(differences),
        "seeds_above_linear": sum(difference > 0 for difference in differences),
        "train_seconds_mean": statistics.mean(run["seconds"]["train"] for run in runs),
    }


def quality_table(tasks: dict[str, Any]) -> str:
    """Return the table that people read: a line per seed, then the mean."""
    lines = [
        ["task", "seed", "train rows", "test rows", "tuned", "95 % interval", "linear SVM",
         "difference", "p", "training"],
    ]  # fmt: skip
    for name, task in tasks.items():
        for run in task["runs"]:
            measured = next(m for m in run["measurements"] if m["arm"] == TUNED)
            gap = run["tuned_minus_linear"]
            lines.append(
                [
                    name,
                    str(run["seed"]),
                    f"{run['rows']['train']:,}",
                    f"{run['rows']['test']:,}",
                    f"{100 * run['tuned']:.1f} %",
                    f"{100 * measured['low']:.1f}-{100 * measured['high']:.1f} %",
                    f"{100 * run['linear']['value']:.1f} %",
                    f"{100 * gap['difference']:+.1f}",
                    f"{gap['p']:.2g}",
                    f"{run['seconds']['train'] / 60:.1f} min",
                ]
            )
        mean = task["summary"]
        lines.append(
            [name, "mean", "", "", f"{100 * mean['tuned_mean']:.1f} %", "",
             f"{100 * mean['linear_mean']:.1f} %", f"{100 * mean['difference_mean']:+.1f}", "",
             f"{mean['train_seconds_mean'] / 60:.1f} min"]
        )  # fmt: skip
    return table(lines)


def misses(tasks: dict[str, Any]) -> str:
    """Say for every seed that does not beat the linear model by how much it misses it."""
    lines = [
        f"{name}, seed {run['seed']}: "
        f"{abs(100 * run['tuned_minus_linear']['difference']):.1f} points below the linear model"
        for name, task in tasks.items()
        for run in task["runs"]
        if run["tuned_minus_linear"]["difference"] < 0
    ]
    return "\n".join(lines) or "every seed is at or above the linear model"


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="*", choices=["demo", "banking77"], default=["demo"])
    parser.add_argument("--banking77", type=Path, metavar="DIR", help="adds the task banking77")
    parser.add_argument("--seeds", nargs="*", type=int, default=[7, 8, 9])
    parser.add_argument(
        "--prompting", action="store_true", help="measure the base model's arms too"
    )
    parser.add_argument(
        "--precisions", action="store_true", help="bf16, int8 against float32, fewer rows"
    )
    parser.add_argument("--quick", action="store_true", help="a few steps: proves that it runs")
    parser.add_argument("--out", type=Path, help="the JSON; default: benchmarks/results/...")
    parser.add_argument("--keep", type=Path, help="folder for the runs, kept")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for every run")
    return parser.parse_intermixed_args()


def quality_of(options: argparse.Namespace, names: Sequence[str], folder: Path) -> dict[str, Any]:
    """Return task -> its recipe, a run for each seed, and a summary."""
    tasks: dict[str, Any] = {}
    for name in names:
        recipe, overrides = task_of(options, name)
        overrides += [] if options.prompting else ["evaluate.fewshot=[]"]
        overrides += [*(QUICK if options.quick else ()), *options.overrides]
        runs = []
        for seed in options.seeds:
            say(f"{name}, seed {seed}")
            runs.append(measure(recipe, overrides, seed, folder / f"{name}-{seed}"))
            say(f"  tuned {runs[-1]['tuned']:.3f}, linear {runs[-1]['linear']['value']:.3f}")
        tasks[name] = {
            "recipe": portable(load_recipe(recipe, overrides)),
            "runs": runs,
            "summary": summarise(runs),
        }
    return tasks


def precisions_of(
    options: argparse.Namespace, names: Sequence[str], folder: Path
) -> dict[str, Any]:
    """Return task -> its recipe, a run for each seed and precision, and how float32 compares."""
    tasks: dict[str, Any] = {}
    for name in names:
        recipe, overrides = task_of(options, name)
        overrides += ["evaluate.fewshot=[]", *precisions.REDUCED]
        overrides += [*(QUICK if options.quick else ()), *options.overrides]
        runs: list[dict[str, Any]] = []
        rights: dict[tuple[int, str], dict[str, bool]] = {}
        losses: dict[tuple[int, str], float] = {}
        for seed in options.seeds:
            for precision, chosen in precisions.PRECISIONS.items():
                say(f"{name}, seed {seed}, {precision}")
                out = folder / f"{name}-{seed}-{precision}"
                found = measure(recipe, [*overrides, *chosen], seed, out)
                runs.append({**found, "precision": precision})
                rights[seed, precision] = precisions.answers(out)
                losses[seed, precision] = found["train"]["best_loss"]
                say(
                    f"  held-out loss {found['train']['best_loss']:.4f}, tuned {found['tuned']:.3f}"
                )
        tasks[name] = {
            "recipe": portable(load_recipe(recipe, overrides)),
            "runs": runs,
            "comparisons": {
                name: precisions.compare(
                    [
                        (losses[seed, precisions.REFERENCE], losses[seed, name])
                        for seed in options.seeds
                    ],
                    [
                        precisions.paired(rights[seed, precisions.REFERENCE], rights[seed, name])
                        for seed in options.seeds
                    ],
                )
                for name in precisions.PRECISIONS
                if name != precisions.REFERENCE
            },
        }
    return tasks


def task_of(options: argparse.Namespace, name: str) -> tuple[Path, list[str]]:
    """Return a task's recipe and where its rows are."""
    return demo_task() if name == "demo" else banking_task(options.banking77)


def main() -> None:
    """Measure, write, print."""
    options = arguments()
    names = list(options.tasks)
    if options.banking77 and "banking77" not in names:
        names.append("banking77")
    if "banking77" in names and not options.banking77:
        raise SystemExit("banking77 needs its files: --banking77 DIR")
    if options.quick:
        options.seeds = options.seeds[:1]
    title = "precision-quality" if options.precisions else "quality"
    with tempfile.TemporaryDirectory(prefix="postgrad-quality-") as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        tasks = (precisions_of if options.precisions else quality_of)(options, names, folder)
    document = {"benchmark": title, **circumstances(), "quick": options.quick, "tasks": tasks}
    path = write_result(document, title, options.out)
    if options.precisions:
        for name, task in tasks.items():
            print(f"{name}\n{precisions.precision_table(task['runs'])}\n")
            for precision, found in task["comparisons"].items():
                print(precisions.verdict(precision, found))
    else:
        print(quality_table(tasks))
        print(misses(tasks))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
