"""Small real trainings that the tests of the loop share: rows, a model, a run, a call to `fit`."""

import json
import signal
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from postgrad.config import LoraConfig, Recipe, parse_recipe
from postgrad.model import lora
from postgrad.model.attention import training_attention
from postgrad.run import Run, create_run, read_jsonl
from postgrad.train.fit import Loop, Probe, fit
from postgrad.train.held_out import Validation
from postgrad.train.optimizer import make_optimizer
from postgrad.train.schedule import learning_rate
from postgrad.train.sft import SupervisedFineTuning
from postgrad.train.stopping import observe
from postgrad.train.stream import Stream
from postgrad.types import Tokens

torch.set_num_threads(1)

RARE = 249
"""A token that no row has."""


def make_rows(count, seed=0, shortest=3, longest=40, weights=(1.0,), name="row", first=10):
    """Rows of random prompts and answers that count from `first` on: a small model learns that."""
    generator = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        length = int(generator.integers(shortest, longest + 1))
        ids = generator.integers(3, RARE, size=length)
        answer = (length + 1) // 2
        ids[answer:] = first + (generator.integers(8) + np.arange(length - answer)) % 8
        label_weights = np.zeros(length, np.float32)
        label_weights[answer:] = weights[number % len(weights)]
        rows.append(Tokens(ids, label_weights, f"{name}-{number}"))
    return rows


def load_model(directory, adapt=None, dtype=torch.float32, seed=7):
    """The tiny model, ready for training: with an adapter, or (adapt None) all of it trained."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    if adapt is not None:
        lora.add_lora(model, adapt, seed)
    return model


def make_recipe(base, **sections) -> Recipe:
    tree: dict[str, Any] = {
        "name": "tiny",
        "model": {"base": str(base), "precision": "fp32", "adapt": {"r": 4}},
        "data": {"train": "rows.jsonl"},
    }
    for section, fields in sections.items():
        tree[section] = {**tree.get(section, {}), **fields}
    return parse_recipe(tree)


@dataclass
class Training:
    """Everything that one call to `fit` needs; `go` makes the call."""

    model: Any
    stream: Stream
    validation: Validation
    optimizer: torch.optim.Optimizer
    run: Run
    recipe: Recipe
    objective: SupervisedFineTuning

    def stream_supervised(self):
        """Label weights of the whole plan."""
        steps = range(len(self.stream))
        return sum(batch.supervised for step in steps for batch in self.stream.step(step))

    def go(
        self,
        *,
        start=None,
        patience=None,
        min_delta="1se",
        probes=(),
        world=None,
        backward=None,
        **loop,
    ):
        train = self.recipe.train
        steps = len(self.stream)
        settings = {"eval_steps": 4, "max_grad_norm": train.max_grad_norm, **loop}
        with training_attention(self.model):
            return fit(
                self.model,
                self.objective,
                self.stream,
                self.optimizer,
                partial(learning_rate, steps=steps, peak=train.learning_rate),
                loop=Loop(**settings),
                run=self.run,
                validate=lambda _: self.validation(self.model, self.objective, world),
                stopper=partial(observe, patience=patience, min_delta=min_delta),
                probes=probes,
                start=start,
                world=world,
                backward=backward,
            )


def make_training(
    directory: Path,
    out: Path,
    *,
    rows=None,
    held_out=None,
    packed=True,
    capacity=96,
    per_step=120,
    epochs=1.0,
    max_steps=None,
    dropout=0.0,
    full=False,
    run=None,
    **train,
) -> Training:
    """A training of 12 steps or so on 30 rows, in a new run directory or in `run`."""
    adapt = {"kind": "full"} if full else {"r": 4, "lora_dropout": dropout}
    train = {"learning_rate": 1e-2, **train}
    recipe = make_recipe(directory, model={"adapt": adapt}, train=train)
    model = load_model(directory, None if full else LoraConfig(r=4, lora_dropout=dropout))
    rows = make_rows(60, seed=1) if rows is None else rows
    held_out = make_rows(12, seed=2, name="held-out") if held_out is None else held_out
    stream = Stream(
        rows,
        epochs=epochs,
        tokens_per_batch=per_step,
        micro_batch_tokens=capacity,
        packed=packed,
        seed=recipe.seed,
        max_steps=max_steps,
    )
    torch.manual_seed(recipe.seed)
    torch.set_num_threads(1)
    return Training(
        model=model,
        stream=stream,
        validation=Validation(held_out, capacity, packed),
        optimizer=make_optimizer(model, recipe.train, train["learning_rate"]),
        run=run or create_run(recipe, "train", out),
        recipe=recipe,
        objective=SupervisedFineTuning(),
    )


WORDS_TASK = """
name: words
file: words.jsonl
prompt: "Which word is number {n}?"
choices: options
answer: gold
"""
"""A benchmark of one's own, whose items lie in words.jsonl."""
WORDS = ("yes", "no", "maybe", "number", "answer", "question", "user", "system")


def write_rows(path: Path, count=40, seed=0) -> Path:
    """A JSONL file of prompt/completion rows whose answer is a word of the prompt; all differ."""
    generator = np.random.default_rng(seed)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            words = [WORDS[index] for index in generator.integers(len(WORDS), size=6)]
            prompt = f"{seed}-{number * 7919}: {' '.join(words)}"
            file.write(json.dumps({"prompt": prompt, "completion": words[-1]}) + "\n")
    return path


def weights_of(model):
    """Copies of everything that is trained, by name."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def timeless(run: Run):
    """The figures of metrics.jsonl without the clock (and without probes that have none)."""
    lines = [{k: v for k, v in line.items() if k != "seconds"} for line in run.read_metrics()]
    return [line for line in lines if set(line) != {"step", "tokens"}]


def stop_at(step, number=signal.SIGINT):
    """A probe that sends this process a signal after `step` steps."""
    return Probe("stop", step, lambda _: signal.raise_signal(number) or {})


def events(run: Run, kind: str):
    return [event for event in read_jsonl(run.events_path) if event["event"] == kind]
