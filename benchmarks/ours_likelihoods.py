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


class Count:
    """Tokens that the model reads and rows of logits that it computes, padding included."""

    def __init__(self, model: Any) -> None:
        """Watch a Transformers causal language model."""
        self.tokens = self.rows = 0
        model.get_input_embeddings().register_forward_pre_hook(self._read)
        model.get_output_embeddings().register_forward_pre_hook(self._answer)

    def _read(self, _: Any, inputs: Any) -> None:
        self.tokens += inputs[0].numel()

    def _answer(self, _: Any, inputs: Any) -> None:
        self.rows += inputs[0].shape[:-1].numel()


def main(job_path: str, out_path: str) -> None:
    """Write a line for every task of the job; seconds hold encoding, computation and judging."""
    job = json.loads(Path(job_path).read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    directory = Path(job["model"])
    tokenizer = load_tokenizer(directory)
    model = load_model(directory, getattr(torch, job["dtype"]))
    for group in job["groups"]:
        benchmark = load_benchmark(group["task"], Path(group["folder"]), None, 7)
        count = Count(model)
        began, cpu = time.perf_counter(), time.process_time()
        rows = score_continuations(model, tokenizer, benchmark)
        line = {
            "task": group["task"],
            "seconds": time.perf_counter() - began,
            "cpu_seconds": time.process_time() - cpu,
            "tokens": count.tokens,
            "rows_of_logits": count.rows,
            "items": [
                {
                    "logprobs": row.logprobs,
                    **{name: score.value for name, score in row.scores.items()},
                }
                for row in rows
            ],
        }
        with Path(out_path).open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
