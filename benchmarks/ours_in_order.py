"""postgrad on given batches in a given order, for the comparison of loss curves.

Usage: python ours_in_order.py SPEC.json, written by loss_curves.py. Trains with `fit`, the only
loop, on `rows_per_step` rows at a time in file order; writes the rendered rows and the adapter as
it was before the first step, for the other side to start from.
"""

import functools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from postgrad.config import LoraConfig, load_recipe
from postgrad.data.dataset import load_dataset
from postgrad.model.lora import save_adapter
from postgrad.run import create_run
from postgrad.train.fit import Loop, fit
from postgrad.train.optimizer import make_optimizer
from postgrad.train.session import open_session
from postgrad.train.stopping import observe
from postgrad.types import Tokens


def main() -> None:
    """Train as the spec says; losses are in the run's metrics.jsonl."""
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    recipe = load_recipe(spec["recipe"], spec["overrides"])
    session = open_session(recipe, load_dataset(recipe.data, recipe.seed))
    steps, size = spec["steps"], spec["rows_per_step"]
    train, adapt = session.recipe.train, session.recipe.model.adapt
    assert isinstance(adapt, LoraConfig)
    assert isinstance(train.learning_rate, float)
    stream = session.stream(packed=True)
    stream.plan = [list(range(step * size, (step + 1) * size)) for step in range(steps)]
    rows = [label(session.training[index]) for step in stream.plan for index in step]
    Path(spec["tokens"]).write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    adapter = Path(spec["adapter"])
    adapter.mkdir(parents=True, exist_ok=True)
    save_adapter(session.model, adapt, adapter, str(session.loaded.directory))
    validation = session.held_out(packed=True)
    with session.attention():
        fit(
            session.model,
            session.objective,
            stream,
            make_optimizer(session.model, train, train.learning_rate),
            lambda step: float(train.learning_rate),
            loop=Loop(eval_steps=steps + 1, max_grad_norm=train.max_grad_norm),
            run=create_run(session.recipe, "train", Path(spec["run"])),
            validate=functools.partial(validation, session.model, session.objective),
            stopper=functools.partial(observe, patience=None, min_delta="1se"),
        )


def label(row: Tokens) -> dict[str, Any]:
    """Return a row as TRL takes it when it is tokenised already: -100 where nothing is learned."""
    labels = np.where(row.weights > 0, row.ids, -100)
    return {"input_ids": row.ids.tolist(), "labels": labels.tolist()}


if __name__ == "__main__":
    main()
