"""Our benchmarks against lm-evaluation-harness's: the same figures on the same items, and faster.

Usage: python benchmarks/lm_eval_parity.py DIR [--items N] [--quick]. DIR holds the public files
(docs/benchmarks.md); tasks that are not there come from the embedded wheel. The harness runs in an
environment of its own with its own unchanged tasks, fed the same rows. First in float32: every
log-likelihood within 1e-3, every acc and acc_norm identical. Then in bf16 for speed, the harness
with the best of several batch sizes. Prints tables and writes
benchmarks/results/<date>-<hardware>-lm-eval.json. Exit code 1 when a figure differs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from harness import (
    HERE,
    circumstances,
    contender_environment,
    frozen,
    peer_python,
    say,
    table,
    write_result,
)

import postgrad.demo
from postgrad.evaluate.benchmarks import Benchmark, load_benchmark
from postgrad.evaluate.tasks import Item
from postgrad.model.load import model_directory

TASKS = (
    "hellaswag", "arc_easy", "arc_challenge", "piqa", "winogrande", "boolq", "openbookqa",
    "commonsense_qa", "lambada_openai", "mmlu",
)  # fmt: skip
TOLERANCE = 1e-3
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
REQUIREMENTS = HERE / "peers" / "lmeval-requirements.txt"
SEED = 7
SCRIPTS = {"ours": "ours_likelihoods.py", "lm_eval": "peers/lmeval_likelihoods.py"}
SIDES = tuple(SCRIPTS)


def hub_row(name: str, item: Item, number: int) -> dict[str, Any]:
    """Return an item as a row under the hub's column names, from which both sides start."""
    labels = [chr(ord("A") + n) for n in range(len(item.options))]
    question = item.prompt.removeprefix("Question: ").removesuffix("\nAnswer:")
    options = list(item.options)
    if name == "hellaswag":
        activity, _, context = item.prompt.partition(": ")
        ends = {"endings": options, "label": str(item.gold)}
        return {"activity_label": activity, "ctx_a": context, "ctx_b": "", **ends}
    if name.startswith("arc"):
        choices = {"text": options, "label": labels}
        return {"question": question, "choices": choices, "answerKey": labels[item.gold]}
    if name == "piqa":
        return {"goal": question, "sol1": options[0], "sol2": options[1], "label": item.gold}
    if name == "winogrande":
        pairs = zip(*item.contexts, strict=False)
        size = next((n for n, (a, b) in enumerate(pairs) if a != b), len(item.prompt))
        before, (first, second) = item.prompt[:size], (c[size:] for c in item.contexts)
        return {
            "sentence": f"{before}_ {options[0]}",
            "option1": first,
            "option2": second,
            "answer": str(item.gold + 1),
        }
    if name == "boolq":
        passage, _, asked = item.prompt.rpartition("\nQuestion: ")
        asked = asked.removesuffix("?\nAnswer:")
        return {"passage": passage, "question": asked, "label": item.gold, "idx": number}
    if name == "openbookqa":
        choices = {"text": options, "label": labels}
        return {"question_stem": item.prompt, "choices": choices, "answerKey": labels[item.gold]}
    if name == "lambada_openai":
        return {"text": item.prompt + options[0]}
    lines = question.removesuffix("\nAnswer:").split("\n")
    count = 5 if name == "commonsense_qa" else 4
    asked, texts = _lettered(lines, count)
    if name == "commonsense_qa":
        choices = {"text": texts, "label": labels}
        return {"question": asked, "choices": choices, "answerKey": labels[item.gold]}
    return {"question": asked, "choices": texts, "answer": item.gold, "subject": item.group}


def _lettered(lines: Sequence[str], count: int) -> tuple[str, list[str]]:
    """Return question and texts of the last `count` lettered options, which may have lines."""
    starts = []
    at = len(lines)
    for letter in reversed([chr(ord("A") + n) for n in range(count)]):
        at = max(n for n in range(at) if lines[n].startswith(f"{letter}. "))
        starts.insert(0, at)
    texts = ["\n".join(lines[a:b])[3:] for a, b in zip(starts, [*starts[1:], None], strict=True)]
    return "\n".join(lines[: starts[0]]), texts


def write_rows(folder: Path, benchmark: Benchmark) -> list[dict[str, Any]]:
    """Write the rows for both sides; return the harness's tasks, one for each subject of MMLU."""
    name = benchmark.task.name
    items = (
        sorted(benchmark.items, key=lambda item: item.group or "")
        if name == "mmlu"
        else (benchmark.items)
    )
    rows = [hub_row(name, item, number) for number, item in enumerate(items)]
    again = [benchmark.task.read(row) for row in rows]
    assert [(a.prompt, a.options, a.gold) for a in again] == [
        (i.prompt, i.options, i.gold) for i in items
    ], name
    _write_jsonl(folder / f"{name}.jsonl", rows)
    path, _, fragment = benchmark.task.samples.hub.partition("#")
    options = dict(part.split("=") for part in fragment.split("&"))
    if name != "mmlu":
        place = str(folder / f"{name}.jsonl")
        return [{"name": name, "hub": path, "config": options.get("config"), "rows": place}]
    tasks = []
    for subject in dict.fromkeys(row["subject"] for row in rows):
        place = folder / "subjects" / f"{subject}.jsonl"
        _write_jsonl(place, [row for row in rows if row["subject"] == subject])
        tasks.append(
            {"name": f"mmlu_{subject}", "hub": path, "config": subject, "rows": str(place)}
        )
    return tasks


def _write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run_side(python: Path | str, script: str, job: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Run one side in its own process and return what it wrote."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "job.json").write_text(json.dumps(job), encoding="utf-8")
    command = [str(python), str(HERE / script), str(out / "job.json"), str(out / "result.json")]
    environment = {**contender_environment(), "HF_DATASETS_OFFLINE": "1"}
    with (out / "log").open("w", encoding="utf-8") as log:
        ended = subprocess.run(command, stdout=log, stderr=log, env=environment)
    if ended.returncode:
        tail = "\n".join((out / "log").read_text(encoding="utf-8").splitlines()[-15:])
        raise SystemExit(f"{script}: exit code {ended.returncode}:\n{tail}")
    found: dict[str, Any] = json.loads((out / "result.json").read_text(encoding="utf-8"))
    return found


def agreement(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Return how far two runs of one task are apart, item by item."""
    largest, options = 0.0, 0
    differing: Counter[str] = Counter()
    for a, b in zip(ours["items"], theirs["items"], strict=True):
        for x, y in zip(a["logprobs"], b["logprobs"], strict=True):
            largest, options = max(largest, abs(x - y)), options + 1
        differing.update(m for m in ("acc", "acc_norm") if m in b and m in a and a[m] != b[m])
    metrics = [m for m in ("acc", "acc_norm") if m in ours["items"][0]]
    n = len(ours["items"])
    return {
        "items": n,
        "log_likelihoods": options,
        "largest_difference": largest,
        "differing": dict(differing),
        "ours": {m: sum(item[m] for item in ours["items"]) / n for m in metrics},
        "lm_eval": {m: sum(item[m] for item in theirs["items"]) / n for m in metrics},
    }


def run_both(
    benchmarks: Sequence[Benchmark], model: str, peer: Path, options: argparse.Namespace
) -> dict[tuple[str, str], dict[str, Any]]:
    """Run both sides in float32 and in bf16; (side, precision) -> what it wrote."""
    with tempfile.TemporaryDirectory(prefix="postgrad-lm-eval-") as temporary:
        folder = Path(temporary)
        tasks = {b.task.name: write_rows(folder / "rows", b) for b in benchmarks}
        job = {
            "model": model,
            "threads": options.threads,
            "tasks": [task for group in tasks.values() for task in group],
            "groups": [
                {"task": n, "names": [t["name"] for t in group], "folder": str(folder / "rows")}
                for n, group in tasks.items()
            ],
            "search_items": options.search_items,
        }
        runs: dict[tuple[str, str], dict[str, Any]] = {}
        for dtype, sizes in (("float32", [8]), ("bfloat16", options.batch_sizes)):
            full = {**job, "dtype": dtype, "batch_sizes": list(sizes)}
            for side in SIDES:
                say(f"{side}, {dtype}, load {os.getloadavg()[0]:.1f}")
                python = sys.executable if side == "ours" else peer
                runs[side, dtype] = run_side(python, SCRIPTS[side], full, folder / side / dtype)
    return runs


def compared(runs: Mapping[tuple[str, str], Any], benchmark: Benchmark) -> dict[str, Any]:
    """Return agreement and time of one task."""
    exact, fast = (
        {side: runs[side, dtype]["tasks"][benchmark.task.name] for side in SIDES}
        for dtype in ("float32", "bfloat16")
    )
    return {
        "label": benchmark.label,
        **agreement(exact["ours"], exact["lm_eval"]),
        "bf16": agreement(fast["ours"], fast["lm_eval"]),
        **{u: {s: fast[s][u] for s in SIDES} for u in ("seconds", "cpu_seconds")},
    }


def main() -> int:
    """Run both comparisons; return 1 when a figure differs."""
    options = _options()
    recipe = Path(postgrad.demo.__file__).with_name("recipe.yaml").read_text(encoding="utf-8")
    model = str(model_directory(options.model or yaml.safe_load(recipe)["model"]["base"]))
    peer = peer_python(REQUIREMENTS)
    benchmarks = [load_benchmark(n, options.folder, options.items, SEED) for n in options.tasks]
    runs = run_both(benchmarks, model, peer, options)
    found = {b.task.name: compared(runs, b) for b in benchmarks}
    theirs = runs["lm_eval", "bfloat16"]
    document = {
        **circumstances(),
        "threads": options.threads,
        "model": Path(model).name,
        "tolerance": TOLERANCE,
        "tasks": found,
        "lm_eval": {
            "version": theirs["lm_eval"],
            "batch_size": theirs["batch_size"],
            "searched_seconds": theirs["searched"],
            "packages": frozen(peer),
        },
    }
    print(parity_table(found) + "\n\n" + speed_table(found))
    print(f"\nwritten: {write_result(document, 'lm-eval', options.out)}")
    return int(any(not same(task) for task in found.values()))


def same(task: Mapping[str, Any]) -> bool:
    """Return whether a task's figures are the harness's."""
    return bool(task["largest_difference"] <= TOLERANCE and not task["differing"])


def parity_table(found: Mapping[str, Any]) -> str:
    """Return figures of both sides in float32, and the largest difference."""
    rows = [["task", "same", "items", "largest difference", "acc ours / lm-eval", "acc_norm"]]
    for name, task in found.items():
        shares = [[100 * s[m] for s in (task["ours"], task["lm_eval"])] for m in task["ours"]]
        cells = [f"{ours:.2f} / {theirs:.2f}" for ours, theirs in shares]
        state = "yes" if same(task) else f"NO {task['differing'] or ''}"
        difference = f"{task['largest_difference']:.1e}"
        rows.append([name, state, f"{task['items']:,}", difference, *[*cells, ""][:2]])
    return table(rows)


def speed_table(found: Mapping[str, Any]) -> str:
    """Return items per second in bf16, and how many times faster by the clock and in CPU time."""
    rows = [["task", "", "ours items/s", "lm-eval items/s", "times faster", "in CPU time"]]
    whole: dict[str, Any] = {"items": sum(task["items"] for task in found.values())}
    for unit in ("seconds", "cpu_seconds"):
        whole[unit] = {side: sum(task[unit][side] for task in found.values()) for side in SIDES}
    for name, task in [*found.items(), ("all", whole)]:
        rates = [task["items"] / task["seconds"][side] for side in SIDES]
        times = [task[u]["lm_eval"] / task[u]["ours"] for u in ("seconds", "cpu_seconds")]
        rows.append([name, "", *(f"{figure:.2f}" for figure in (*rates, *times))])
    return table(rows)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="folder with the public files")
    parser.add_argument("--items", type=int, default=1000, help="items of each task, at most")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--model", help="another model than the demo's")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=list(BATCH_SIZES))
    parser.add_argument("--search-items", type=int, default=32, help="items of a trial per task")
    parser.add_argument("--quick", action="store_true", help="20 items, one batch size")
    parser.add_argument("--out", type=Path, help="file of the result")
    options = parser.parse_args()
    if options.quick:
        options.items, options.batch_sizes = min(20, options.items), [8]
    return options


if __name__ == "__main__":
    sys.exit(main())
