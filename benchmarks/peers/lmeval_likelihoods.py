"""lm-evaluation-harness on local rows: its own tasks, unchanged; runs in its own environment.

    python lmeval_likelihoods.py JOB.json OUT.jsonl

`datasets.load_dataset` is answered from the files of the job, so the tasks need no network. The job
names the model, the precision, threads, tasks with their rows, and the batch sizes to choose from
by a short run each. The first line says which was taken; then one line for each task, with seconds,
the tokens that were read and the rows of logits (padding included), and one entry per item.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager


def serve_rows(tasks: list[dict[str, Any]]) -> None:
    """Answer load_dataset(path, name) from files; every split of a set has the same rows."""
    files = {(t["hub"], t["config"]): t["rows"] for t in tasks}

    def load_dataset(path: str, name: str | None = None, **_: Any) -> Any:
        lines = Path(files[path, name]).read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        table = datasets.Dataset.from_list(rows)
        return datasets.DatasetDict(dict.fromkeys(("train", "validation", "test", "dev"), table))

    datasets.load_dataset = load_dataset


class Timed(HFLM):
    """The harness's model, with a clock around its likelihoods: no set-up, no aggregation."""

    seconds = cpu_seconds = 0.0
    tokens = 0

    def _model_call(self, inps: Any, *arguments: Any, **options: Any) -> Any:
        self.tokens += inps.numel()  # every token gets a row of logits
        return super()._model_call(inps, *arguments, **options)

    def loglikelihood(self, *arguments: Any, **options: Any) -> Any:
        """Encode and compute as the harness does."""
        began, cpu = time.perf_counter(), time.process_time()
        found = super().loglikelihood(*arguments, **options)
        self.seconds += time.perf_counter() - began
        self.cpu_seconds += time.process_time() - cpu
        return found


def evaluate(model: Timed, manager: TaskManager, names: list[str], limit: int | None) -> Any:
    """Return {task: samples} of a zero-shot run; its time is added to the model's."""
    model.seconds, model.cpu_seconds, model.tokens = 0.0, 0.0, 0
    result = lm_eval.simple_evaluate(
        model=model,
        tasks=names,
        num_fewshot=0,
        limit=limit,
        log_samples=True,
        bootstrap_iters=0,
        task_manager=manager,
    )
    return result["samples"]


def entry(sample: dict[str, Any]) -> dict[str, Any]:
    """Return what is compared of one item."""
    responses = [value[0] for value in sample["resps"]]
    return {
        "logprobs": [float(logprob) for logprob, _ in responses],
        **{name: sample[name] for name in ("acc", "acc_norm") if name in sample},
    }


def main(job_path: str, out_path: str) -> None:
    """Choose the batch size, run the tasks, write the result."""
    job = json.loads(Path(job_path).read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    serve_rows(job["tasks"])
    manager = TaskManager()
    model = Timed(pretrained=job["model"], dtype=job["dtype"], device="cpu", batch_size=1)
    names = [task["name"] for task in job["tasks"]]
    searched = {}
    for size in job["batch_sizes"] if len(job["batch_sizes"]) > 1 else ():
        model.batch_size_per_gpu = size
        evaluate(model, manager, names, job["search_items"])
        searched[size] = model.cpu_seconds
    best = min(searched, key=searched.get) if searched else job["batch_sizes"][0]
    model.batch_size_per_gpu = best
    write(
        out_path, {"lm_eval": lm_eval.__version__, "batch_size": best, "searched_seconds": searched}
    )
    for group in job["groups"]:
        samples = evaluate(model, manager, group["names"], None)
        ordered = {n: sorted(s, key=lambda x: x["doc_id"]) for n, s in samples.items()}
        line = {
            "task": group["task"],
            "seconds": model.seconds,
            "cpu_seconds": model.cpu_seconds,
            "tokens": model.tokens,
            "rows_of_logits": model.tokens,
            "items": [entry(sample) for name in group["names"] for sample in ordered[name]],
        }
        write(out_path, line)


def write(out_path: str, line: dict[str, Any]) -> None:
    """Append a line to the result."""
    with Path(out_path).open("a", encoding="utf-8") as out:
        out.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
