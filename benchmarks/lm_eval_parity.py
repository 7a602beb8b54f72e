"""Our benchmarks against lm-evaluation-harness's: the same figures on the same items, and faster.

Usage: python benchmarks/lm_eval_parity.py DIR [--items N] [--quick]. DIR holds the public files
(docs/benchmarks.md); tasks that are not there come from the embedded wheel. The harness runs in an
environment of its own with its own unchanged tasks, fed the same rows. In float32 every
log-likelihood must be within 1e-3 and every acc and acc_norm identical. In bf16 both are timed,
the harness with the best of several batch sizes, before and after the float32 runs. Every
measurement is printed and kept as it comes in benchmarks/results/<date>-<hardware>-lm-eval.json,
those of a run that was stopped too. Exit code 1 when a figure differs, or nothing was compared.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
import yaml
from harness import (
    HERE,
    POLL_SECONDS,
    circumstances,
    contender_environment,
    frozen,
    peer_python,
    read_lines,
    say,
    table,
    write_result,
)
from machine_bound import TOKENS, linear_shapes

import postgrad.demo
from postgrad.evaluate.benchmarks import Benchmark, load_benchmark
from postgrad.evaluate.tasks import Item
from postgrad.model.load import model_directory

TASKS = (
    "hellaswag", "arc_easy", "arc_challenge", "piqa", "winogrande", "boolq", "openbookqa",
    "commonsense_qa", "lambada_openai", "mmlu",
)  # fmt: skip
TOLERANCE = 1e-3
GOAL = 3.0
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
BOUND_TOKENS = 512
BOUND_TRIALS = 20
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


def run_side(
    python: Path | str,
    script: str,
    job: Mapping[str, Any],
    out: Path,
    record: Callable[[Mapping[str, Any]], None],
) -> None:
    """Run one side in its own process; `record` gets each line that it writes, as it comes."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "job.json").write_text(json.dumps(job), encoding="utf-8")
    lines = out / "result.jsonl"
    command = [str(python), str(HERE / script), str(out / "job.json"), str(lines)]
    environment = {**contender_environment(), "HF_DATASETS_OFFLINE": "1"}
    seen = 0
    with (out / "log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            ended = False
            while not ended:
                time.sleep(POLL_SECONDS)
                ended = process.poll() is not None
                for line in read_lines(lines)[seen:]:
                    record(line)
                    seen += 1
        finally:
            process.kill()
            process.wait()
    if process.returncode:
        tail = "\n".join((out / "log").read_text(encoding="utf-8").splitlines()[-15:])
        raise SystemExit(f"{script}: exit code {process.returncode}:\n{tail}")


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


class Study:
    """Both sides' measurements, written to the file of results after each."""

    def __init__(self, options: argparse.Namespace, model: str, peer: Path) -> None:
        """Start a document without measurements."""
        self.options, self.model, self.peer = options, model, peer
        self.exact: dict[str, dict[str, Any]] = {}
        """Task -> side -> what it wrote, in float32."""
        self.timed: dict[str, dict[str, list[Any]]] = {}
        """Task -> side -> what it wrote in bf16, a repetition each."""
        self.document: dict[str, Any] = {
            **circumstances(),
            "threads": options.threads,
            "cores": len(os.sched_getaffinity(0)),
            "model": Path(model).name,
            "tolerance": TOLERANCE,
            "items": {},
            "bound": forward_bound(model, options.threads),
            "lm_eval": {"packages": frozen(peer)},
            "tasks": {},
        }

    def run(self, name: str, side: str, dtype: str, rows: Mapping[str, Any], sizes: Any) -> None:
        """Run one side on rows in one precision; `name` says what the measurement is for."""
        say(f"{name}: {side}, {dtype}, load {os.getloadavg()[0]:.1f}")
        job = {
            **rows,
            "model": self.model,
            "threads": self.options.threads,
            "dtype": dtype,
            "batch_sizes": list(sizes),
            "search_items": self.options.search_items,
        }
        python = sys.executable if side == "ours" else self.peer
        folder = Path(rows["folder"]) / name / side

        def record(line: Mapping[str, Any]) -> None:
            if "task" not in line:
                self.document["lm_eval"][name] = line
                say(f"{name}: {line}")
                return
            if name.startswith("speed"):
                self.timed.setdefault(line["task"], {s: [] for s in SIDES})[side].append(line)
            else:
                self.exact.setdefault(line["task"], {})[side] = line
            rate = len(line["items"]) / line["cpu_seconds"]
            say(f"{name}: {line['task']} {side} {rate:.2f} items/s, {line['tokens']:,} tokens")
            self.save()

        run_side(python, SCRIPTS[side], job, folder, record)

    @property
    def best_size(self) -> int:
        """The harness's batch size that was found to be the fastest."""
        return int(self.document["lm_eval"]["speed-1"]["batch_size"])

    def save(self) -> Path:
        """Write what there is."""
        tasks: dict[str, Any] = {}
        for name in self.options.tasks:
            exact, timed = self.exact.get(name, {}), self.timed.get(name)
            if all(side in exact for side in SIDES):
                tasks.setdefault(name, {})["float32"] = agreement(exact["ours"], exact["lm_eval"])
            if timed is not None and all(timed.values()):
                tasks.setdefault(name, {})["bfloat16"] = {
                    **agreement(timed["ours"][0], timed["lm_eval"][0]),
                    "runs": {
                        s: [{k: v for k, v in x.items() if k not in ("items", "task")} for x in t]
                        for s, t in timed.items()
                    },
                }
        self.document["tasks"] = tasks
        return write_result(self.document, "lm-eval", self.options.out)


def forward_bound(model: str, threads: int) -> dict[str, Any]:
    """Return what a token and a row of logits cost at least: matrix products in bf16, timed."""
    torch.set_num_threads(threads)
    counts, head = linear_shapes(Path(model))
    per_token = sum(product_seconds(shape) * count for shape, count in counts.items()) / TOKENS
    return {
        "flops_per_token": sum(2 * o * i * count for (o, i), count in counts.items()),
        "flops_per_row_of_logits": 2 * head[0] * head[1],
        "seconds_per_token": per_token,
        "seconds_per_row_of_logits": product_seconds(head) / TOKENS,
    }


def product_seconds(shape: tuple[int, int]) -> float:
    """Return the processor's seconds for TOKENS tokens through one layer, the best of several.

    The result is written to memory that is there already.
    """
    weight, x = (torch.randn(n, shape[1]).bfloat16() for n in (shape[0], BOUND_TOKENS))
    result = torch.empty(BOUND_TOKENS, shape[0], dtype=torch.bfloat16)
    best = math.inf
    for _ in range(BOUND_TRIALS):
        began = time.process_time()
        torch.mm(x, weight.t(), out=result)
        best = min(best, time.process_time() - began)
    return best * TOKENS / BOUND_TOKENS


def write_all(folder: Path, benchmarks: Sequence[Benchmark]) -> dict[str, Any]:
    """Write the rows of some benchmarks; return the part of a job that names them."""
    tasks = {b.task.name: write_rows(folder, b) for b in benchmarks}
    groups = [
        {"task": name, "names": [task["name"] for task in group], "folder": str(folder)}
        for name, group in tasks.items()
    ]
    return {"folder": str(folder), "tasks": list(chain(*tasks.values())), "groups": groups}


def main() -> int:
    """Run both comparisons; return 1 when a figure differs."""
    options = _options()
    recipe = Path(postgrad.demo.__file__).with_name("recipe.yaml").read_text(encoding="utf-8")
    model = str(model_directory(options.model or yaml.safe_load(recipe)["model"]["base"]))
    study = Study(options, model, peer_python(REQUIREMENTS))
    counts = {
        "float32": options.items,
        "bfloat16": options.speed_items,
    }
    with tempfile.TemporaryDirectory(prefix="postgrad-lm-eval-") as temporary:
        rows = {}
        for purpose, count in counts.items():
            found = [load_benchmark(n, options.folder, count, SEED) for n in options.tasks]
            study.document["items"][purpose] = {
                b.task.name: {
                    "items": len(b.items),
                    "of": b.task.samples.standard,
                    "split": b.task.samples.split,
                    "source": Path(b.source).name,
                }
                for b in found
            }
            rows[purpose] = write_all(Path(temporary) / purpose, found)
        for repetition in range(1, options.repetitions + 1):
            name = f"speed-{repetition}"
            sizes = options.batch_sizes if repetition == 1 else [study.best_size]
            study.run(name, "ours", "bfloat16", rows["bfloat16"], [1])
            study.run(name, "lm_eval", "bfloat16", rows["bfloat16"], sizes)
            print(f"\n{speed_table(study.document)}", flush=True)
            if repetition == 1:
                for side in SIDES:
                    study.run("float32", side, "float32", rows["float32"], [1])
                print(f"\n{parity_table(study.document['tasks'])}", flush=True)
    tasks = study.document["tasks"]
    print(f"\n{parity_table(tasks)}\n\n{speed_table(study.document)}")
    print(f"\nwritten: {study.save()}")
    exact = [task["float32"] for task in tasks.values() if "float32" in task]
    return int(not exact or any(not same(task) for task in exact))


def same(task: Mapping[str, Any]) -> bool:
    """Return whether a task's figures are the harness's."""
    return bool(task["largest_difference"] <= TOLERANCE and not task["differing"])


def parity_table(tasks: Mapping[str, Any]) -> str:
    """Return figures of both sides in float32, and the largest difference."""
    rows = [
        ["task", "same", "items", "log-likelihoods", "largest difference", "acc ours / lm-eval",
         "acc_norm"]
    ]  # fmt: skip
    for name, measured in tasks.items():
        task = measured.get("float32")
        if task is None:
            continue
        shares = [[100 * s[m] for s in (task["ours"], task["lm_eval"])] for m in task["ours"]]
        cells = [f"{ours:.2f} / {theirs:.2f}" for ours, theirs in shares]
        state = "yes" if same(task) else f"NO {task['differing'] or ''}"
        counts = [f"{task[key]:,}" for key in ("items", "log_likelihoods")]
        difference = f"{task['largest_difference']:.1e}"
        rows.append([name, state, *counts, difference, *[*cells, ""][:2]])
    return table(rows)


def speed_table(document: Mapping[str, Any]) -> str:
    """Return speeds in bf16 by the processor's clock: medians, and the range of the ratio."""
    bound = document["bound"]
    rows = [
        ["task", "goal", "items/s ours", "lm-eval", "times faster", "lowest to highest", "by clock",
         "tokens an item ours", "lm-eval", "of the bound ours", "lm-eval"]
    ]  # fmt: skip
    named = {n: t["bfloat16"] for n, t in document["tasks"].items() if "bfloat16" in t}
    complete = min((len(t["runs"][side]) for t in named.values() for side in SIDES), default=0)
    whole: dict[str, list[Counter[str]]] = {s: [Counter() for _ in range(complete)] for s in SIDES}
    for side, number in product(SIDES, range(complete)):
        for task in named.values():
            whole[side][number].update(task["runs"][side][number])
    items = sum(task["items"] for task in named.values())
    for name, task in [
        *named.items(),
        *([("all", {"items": items, "runs": whole})] * bool(complete)),
    ]:
        runs = {side: task["runs"][side] for side in SIDES}
        ratios, by_clock = (
            [b[unit] / a[unit] for a, b in zip(runs["ours"], runs["lm_eval"], strict=False)]
            for unit in ("cpu_seconds", "seconds")
        )
        seconds = [statistics.median(run["cpu_seconds"] for run in runs[side]) for side in SIDES]
        least = [
            runs[side][0]["tokens"] * bound["seconds_per_token"]
            + runs[side][0]["rows_of_logits"] * bound["seconds_per_row_of_logits"]
            for side in SIDES
        ]
        times = seconds[1] / seconds[0]
        rows.append([
            name,
            "yes" if times >= GOAL else "no",
            *(f"{task['items'] / each:.2f}" for each in seconds),
            f"{times:.2f}",
            f"{min(ratios):.2f} to {max(ratios):.2f}",
            f"{min(by_clock):.2f} to {max(by_clock):.2f}",
            *(f"{runs[side][0]['tokens'] / task['items']:.0f}" for side in SIDES),
            *(f"{100 * a / b:.0f} %" for a, b in zip(least, seconds, strict=True)),
        ])  # fmt: skip
    return table(rows)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="folder with the public files")
    parser.add_argument("--items", type=int, default=1000, help="items of each task, at most")
    parser.add_argument("--speed-items", type=int, help="the same for the speed [--items]")
    parser.add_argument("--repetitions", type=int, default=2, help="of the speed")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--model", help="another model than the demo's")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=list(BATCH_SIZES))
    parser.add_argument("--search-items", type=int, default=32, help="items of a trial per task")
    parser.add_argument("--quick", action="store_true", help="20 items, one batch size")
    parser.add_argument("--out", type=Path, help="file of the result")
    options = parser.parse_args()
    if options.quick:
        options.items, options.batch_sizes, options.repetitions = min(20, options.items), [8], 1
    options.speed_items = min(options.speed_items or options.items, options.items)
    return options


if __name__ == "__main__":
    sys.exit(main())
