"""Measurements of gpu_train_speed.py that share a process, because starting one takes long.

Usage: python gpu_worker.py SPECS.json, a list. A line of JSON for each, in order; a job that fails
says so in its line. A spec's `job` is one of

    train   `postgrad.train.fit.fit` on a model with random weights: model and run (directories),
            kind, rows, tokens_per_batch, micro_batch_tokens, steps, warmup_steps, compile, graphs;
            fp8 (default false)
    bound   the matrix products of the model's own shapes: model
    save    a model with random weights, written to its directory: model
"""

import functools
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import machine_bound
import torch
from gpu_shapes import make_rows
from transformers import AutoConfig, AutoModelForCausalLM

from postgrad.config import LoraConfig, parse_recipe
from postgrad.model import compiled, fp8, lora
from postgrad.model.attention import training_attention
from postgrad.model.load import device
from postgrad.progress import SilentDisplay
from postgrad.run import create_run
from postgrad.train.fit import Loop, Probe, fit
from postgrad.train.graphs import Graphs
from postgrad.train.held_out import Validation
from postgrad.train.optimizer import make_optimizer
from postgrad.train.sft import SupervisedFineTuning
from postgrad.train.stopping import observe
from postgrad.train.stream import Stream

BOUND_TOKENS, BOUND_HEAD_TOKENS = 16384, 1024
"""Rows of the products of the bound: enough to fill a device; the head works in chunks."""


def random_model(directory: Path, dtype: torch.dtype) -> Any:
    """Return the model of a config.json with random weights, on the device."""
    torch.manual_seed(0)
    with torch.device(device()):
        config = AutoConfig.from_pretrained(directory)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.to(device())


def train(spec: dict[str, Any]) -> dict[str, Any]:
    """Train and return tokens per second after the warm-up, and the peak memory."""
    began = time.monotonic()
    model = random_model(Path(spec["model"]), torch.bfloat16)
    lora.add_lora(model, LoraConfig(), seed=7)
    if spec.get("fp8"):
        lora.use_eight_bit(model, "fp8")
    rows = make_rows(spec["kind"], spec["rows"], model.config.vocab_size)
    recipe = parse_recipe(
        {"name": "gpu", "model": {"base": spec["model"]}, "data": {"train": "rows.jsonl"}}
    )
    stream = Stream(
        rows,
        epochs=1000.0,
        tokens_per_batch=spec["tokens_per_batch"],
        micro_batch_tokens=spec["micro_batch_tokens"],
        packed=True,
        seed=7,
        max_steps=spec["steps"],
    )
    run = create_run(recipe, "train", Path(spec["run"]))
    held_out = Validation(rows[:2], spec["micro_batch_tokens"], packed=True)
    objective = SupervisedFineTuning()
    compiled.switch(spec["compile"])
    graphs = None
    if spec["graphs"] and model.device.type == "cuda":
        graphs = Graphs(max(len(row) for row in rows), spec["micro_batch_tokens"])
    peak: dict[str, float] = {}

    def measure(step: int) -> dict[str, float]:
        if model.device.type == "cuda":
            peak["bytes"] = torch.cuda.max_memory_allocated()
        return {}

    loaded = time.monotonic()
    with training_attention(model):
        fit(
            model,
            objective,
            stream,
            make_optimizer(model, recipe.train, 1e-4),
            lambda step: 1e-4,
            loop=Loop(eval_steps=10**9, save_seconds=10**9),
            run=run,
            validate=lambda step: held_out(model, objective),
            stopper=functools.partial(observe, patience=None),
            probes=[Probe("peak", spec["steps"], measure)],
            display=SilentDisplay(),
            backward=graphs,
        )
    steps = [line for line in run.read_metrics() if "train/loss" in line]
    first, last = steps[spec["warmup_steps"] - 1], steps[-1]
    tokens, seconds = last["tokens"] - first["tokens"], last["seconds"] - first["seconds"]
    return {
        "tokens_per_second": tokens / seconds,
        "tokens": tokens,
        "seconds": seconds,
        "steps": len(steps) - spec["warmup_steps"],
        "tokens_per_step": last["tokens"] / len(steps),
        "warmup_seconds": first["seconds"],
        "loading_seconds": loaded - began,
        "peak_device_bytes": peak.get("bytes"),
        "graphs": graphs and {**graphs.counts(), "reason": graphs.reason},
        "first_loss": steps[0]["train/loss"],
        "last_loss": steps[-1]["train/loss"],
    }


def bound(spec: dict[str, Any]) -> dict[str, Any]:
    """Return what the matrix products alone would allow."""
    machine_bound.TOKENS, machine_bound.HEAD_TOKENS = BOUND_TOKENS, BOUND_HEAD_TOKENS
    counts, head = machine_bound.linear_shapes(Path(spec["model"]))
    return machine_bound.measure(counts, head, torch.bfloat16)


def save(spec: dict[str, Any]) -> dict[str, Any]:
    """Write the random weights beside their config.json."""
    random_model(Path(spec["model"]), torch.float32).save_pretrained(spec["model"])
    return {}


def facts() -> dict[str, Any]:
    """Return what the device is."""
    if not torch.cuda.is_available():
        return {"name": "cpu"}
    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "memory_bytes": found.total_memory,
        "capability": f"{found.major}.{found.minor}",
        "cuda": torch.version.cuda,
        "can_compile": compiled.available(),
        "can_fp8": not fp8.why_not(device()),
    }


def main() -> None:
    """Do the jobs, one after another, in the memory that the one before gave back."""
    for spec in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            found = {"train": train, "bound": bound, "save": save}[spec["job"]](spec)
        except (RuntimeError, ValueError, TypeError, OSError) as error:
            found = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
        print("JOB", json.dumps({**found, "device": facts()}), flush=True)


if __name__ == "__main__":
    main()
