"""Our side of lm_eval_parity.py, in a process of its own: python ours_likelihoods.py JOB OUT."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from postgrad.evaluate.benchmarks import load_benchmark
from postgrad.evaluate.retention import score_continuations
from postgrad.model.load import load_model, load_tokenizer


def main(job_path: str, out_path: str) -> None:
    """Score every task of the job; seconds hold encoding, computation and judging."""
    job = json.loads(Path(job_path).read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    directory = Path(job["model"])
    tokenizer = load_tokenizer(directory)
    model = load_model(directory, getattr(torch, job["dtype"]))
    found: dict[str, Any] = {}
    for group in job["groups"]:
        benchmark = load_benchmark(group["task"], Path(group["folder"]), None, 7)
        began, cpu = time.perf_counter(), time.process_time()
        rows = score_continuations(model, tokenizer, benchmark)
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
        found[group["task"]] = {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "items": [
                {
                    "logprobs": row.logprobs,
                    **{name: score.value for name, score in row.scores.items()},
                }
                for row in rows
            ],
        }
    Path(out_path).write_text(json.dumps({"tasks": found}), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
