"""Trying learning rates: the first steps of the training with each, judged on the held-out rows.

Batches, dropout and the schedule of the whole run are the same for all, so that only the rate
differs. Afterwards the model is where it was: the training that follows is the one that a recipe
with the chosen number would have begun.
"""

import shutil
import time
from dataclasses import asdict, replace

import torch

from postgrad.errors import TrainingError
from postgrad.progress import Display
from postgrad.run import Run
from postgrad.train.checkpoint import Progress, load_weights, save_weights
from postgrad.train.fit import Loop, fit
from postgrad.train.held_out import Validation
from postgrad.train.optimizer import make_optimizer
from postgrad.train.plan import PROBE_FACTORS, auto_learning_rate, choose_rate, probe_steps
from postgrad.train.schedule import learning_rate
from postgrad.train.session import Session
from postgrad.train.stopping import HeldOut, StoppingState, observe
from postgrad.train.workflow import open_graphs

FOLDER = "learning-rate"
"""Of the tries, inside the run."""


def probe_learning_rate(session: Session, run: Run, packed: bool, display: Display) -> Session:
    """Return the session with a number for train.learning_rate, which was `probe`.

    run.json keeps under `learning_rate_probe` what was tried, the metrics of each try lie in
    learning-rate/. A probe that was interrupted is made again from its beginning.

    Raises:
        TrainingError: the training breaks down at every rate.
    """
    adapt, began = session.recipe.model.adapt, time.monotonic()
    usual = auto_learning_rate(adapt, session.loaded.parameters)
    steps = probe_steps(len(session.stream(packed)))
    validation = session.held_out(packed)
    folder = run.inside(FOLDER).path
    shutil.rmtree(folder, ignore_errors=True)
    found: list[tuple[float, HeldOut | None]] = []
    problems: dict[float, str] = {}
    start = folder / "start"
    with run.publish(start) as temporary:
        save_weights(session.model, temporary, str(session.loaded.directory), adapt)
    with session.attention():
        untrained = validation(session.model, session.objective)
        for factor in PROBE_FACTORS:
            rate = factor * usual
            display.note(f"learning rate {rate:.3g}: {steps} steps")
            held = None
            try:
                held = _try(session, run, packed, rate, steps, validation, untrained, display)
            except TrainingError as error:
                problems[rate] = error.message
            found.append((rate, held))
            session.model.zero_grad(set_to_none=True)
            load_weights(session.model, start)
    run.delete(start)
    if len(problems) == len(found):
        raise TrainingError(
            f"the training breaks down at every learning rate tried: {problems[found[0][0]]}",
            "look at the rows, and set train.learning_rate to a smaller number",
        )
    chosen, tried = choose_rate(found)
    record = {
        "chosen": chosen,
        "auto": usual,
        "steps": steps,
        "rows": len(session.validation),
        "seconds": round(time.monotonic() - began, 3),
        "tried": [asdict(replace(t, problem=problems.get(t.rate, ""))) for t in tried],
    }
    run.update(learning_rate_probe=record)
    run.event("learning-rate-probed", **record)
    display.note(f"learning rate {chosen:.3g} is taken")
    train = session.recipe.train.model_copy(update={"learning_rate": chosen})
    return replace(session, recipe=session.recipe.model_copy(update={"train": train}))


def _try(
    session: Session,
    run: Run,
    packed: bool,
    rate: float,
    steps: int,
    validation: Validation,
    untrained: HeldOut,
    display: Display,
) -> HeldOut:
    """Train `steps` steps from where the model is and return its held-out evaluation."""
    config, whole = session.recipe.train, len(session.stream(packed))
    inside = run.inside(FOLDER, f"{rate:.3g}")
    run.write_text(inside.recipe_path, session.recipe.to_yaml())
    seen: list[HeldOut] = []

    def validate(_: int) -> HeldOut:
        seen.append(validation(session.model, session.objective))
        return seen[-1]

    torch.manual_seed(session.recipe.seed)
    try:
        fit(
            session.model,
            session.objective,
            session.stream(packed, most=steps),
            make_optimizer(session.model, config, rate),
            lambda step: learning_rate(
                step, whole, rate, config.lr_scheduler_type, config.warmup_ratio
            ),
            loop=Loop(
                steps, config.save_minutes * 60, config.save_total_limit, config.max_grad_norm
            ),
            run=inside,
            validate=validate,
            stopper=lambda state, step, held: observe(state, step, held, patience=None),
            start=Progress(stopping=StoppingState(0, untrained.loss, untrained)),
            display=display,
            backward=open_graphs(session, packed),
        )
    finally:
        shutil.rmtree(inside.checkpoints, ignore_errors=True)
    return seen[-1]
