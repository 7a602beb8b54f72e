"""The dial: points between base and tuned model, asked on rows that are not reported, one chosen.

Target: the validation rows, asked as the tuned model is. Retention: items of the benchmarks that
are not among the reported ones. Every answer is kept below evidence/dial/, and what was answered is
not asked again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from postgrad.config import DialConfig, LoraConfig, Recipe
from postgrad.data.dataset import Dataset
from postgrad.evaluate.benchmarks import Benchmark, unreported
from postgrad.evaluate.frontier import FOLDER, Frontier, Place, measure_frontier
from postgrad.evaluate.gates import BASE, DIALLED, TUNED
from postgrad.evaluate.models import Models, Weights
from postgrad.evaluate.retention import ask_benchmark, observed
from postgrad.evaluate.runner import sample_test
from postgrad.model import export, lora
from postgrad.progress import Display
from postgrad.run import Run, read_json, verify_checksums
from postgrad.types import Evidence, Example, Split

RECORD = "dial.json"
"""In the exported folder: which point it is."""
Ask = Callable[[str, Sequence[Example], Sequence[str]], Mapping[str, Sequence[Evidence]]]
"""Task, rows and arms -> the evidence of each arm."""


def measure_dial(
    run: Run,
    recipe: Recipe,
    dataset: Dataset,
    benchmarks: Sequence[Benchmark],
    models: Models,
    ask: Ask,
    display: Display,
) -> Frontier:
    """Measure every point, choose one, export it; `models` then has the arm `dialled`.

    Nothing is exported when the chosen point is the base or the tuned model.

    Raises:
        ConfigError: no benchmark has items that are not reported.
        CheckpointError: a checkpoint is damaged.
    """
    settings = recipe.evaluate.dial
    assert settings is not None
    others, missing = unreported(benchmarks, settings.items, recipe.data_seed)
    for reason in missing:
        display.note(f"dial: left out, {reason}")
    rows = sample_test(dataset.of(Split.VALIDATION), settings.rows, recipe.data_seed)
    asked = [recipe.name, *(benchmark.task.name for benchmark in others)]
    weights = _weights(run, settings, asked, display)
    for place, taken in weights.items():
        if taken is not None:
            models.define(place.name, taken)
    names = [place.name for place in weights]
    display.note(
        f"dial: {len(names)} points on {len(rows)} validation rows and "
        f"{sum(len(b.items) for b in others):,} items of {len(others)} benchmark(s)"
    )
    target = ask(FOLDER + recipe.name, rows, names)
    answers = {
        (name, benchmark.task.name): ask_benchmark(
            run, recipe, benchmark, name, models, display, FOLDER
        )
        for name in names
        for benchmark in others
    }
    retention = {
        (b.task.name, b.task.metrics[0]): {
            name: observed(b, answers[name, b.task.name], b.task.metrics[0]) for name in names
        }
        for b in others
    }
    frontier = measure_frontier(
        list(weights),
        target,
        retention,
        metric=recipe.evaluate.scorer,
        margin=settings.margin,
        left_out=missing,
        confidence=recipe.evaluate.confidence,
        seed=recipe.data_seed,
    )
    tasks = [recipe.name, *(benchmark.task.name for benchmark in benchmarks)]
    chosen = frontier.point(frontier.chosen).place
    exported = _export(run, recipe, models, chosen, weights[chosen], tasks)
    where = None if exported is None else str(exported.relative_to(run.path))
    display.note(f"dial: {frontier.choice}")
    return replace(frontier, exported=where)


def _weights(
    run: Run, settings: DialConfig, tasks: Sequence[str], display: Display
) -> dict[Place, Weights | None]:
    """Return the points in the order of the frontier and what each is made of; None = the base."""
    tuned = next(run.export / n for n in ("adapter", "model") if (run.export / n).exists())
    found: dict[Place, Weights | None] = {Place(BASE, 0.0): None}
    for scale in sorted((*settings.lambdas, 1.0)):
        name = TUNED if scale == 1 else f"lambda-{scale:g}"
        found[Place(name, scale)] = Weights(tuned, scale)
    for step, folder in kept_checkpoints(run, settings.checkpoints, tasks, display):
        if folder.exists():
            verify_checksums(folder)
        found[Place(f"step-{step:06d}", 1.0, step)] = Weights(folder)
    kept = sum(place.step is not None for place in found)
    if kept < settings.checkpoints:
        display.note(
            f"dial: {kept} instead of {settings.checkpoints} checkpoints are there besides the "
            "best one"
        )
    return found


def kept_checkpoints(
    run: Run, count: int, tasks: Sequence[str], display: Display
) -> list[tuple[int, Path]]:
    """Return at most `count` checkpoints besides the best one, evenly spaced, as (step, folder).

    One whose folder was deleted since counts if its answers to all of `tasks` are there.
    """
    if not count:
        return []
    best = run.pointed("best")
    folders = {path for path in run.checkpoints.glob("step-*") if path.resolve() != best}
    answered = run.evidence_path(FOLDER + tasks[0], "step-*")
    for name in sorted(path.name.split(".")[-2] for path in answered.parent.glob(answered.name)):
        folder = run.checkpoints / name
        if folder.exists():
            continue
        if all(run.evidence_path(FOLDER + task, name).exists() for task in tasks):
            folders.add(folder)
        else:
            display.note(f"dial: left out, {name} is gone and its answers are not complete")
    steps = ((int(path.name.removeprefix("step-")), path) for path in folders)
    left = sorted((step, path) for step, path in steps if step)  # step 0 is the base model
    if not left:
        return []
    first, last = left[0][0], left[-1][0]
    wanted = np.linspace(first, last, count) if count > 1 else [(first + last) / 2]
    chosen = []
    for step in wanted:
        if left:
            nearest = min(left, key=lambda entry: abs(entry[0] - step))
            left.remove(nearest)
            chosen.append(nearest)
    return sorted(chosen)


def _export(
    run: Run,
    recipe: Recipe,
    models: Models,
    chosen: Place,
    weights: Weights | None,
    tasks: Sequence[str],
) -> Path | None:
    """Write export/dialled unless it holds the chosen point already; None = nothing to write.

    What an earlier choice left behind, its answers included, is removed.
    """
    final = run.export / DIALLED
    record = {"point": chosen.name, "lambda": chosen.scale, "step": chosen.step}
    wanted = weights is not None and chosen.name != TUNED
    written = final.exists() and read_json(final / RECORD) == record
    if not (wanted and written):
        if final.exists():
            run.delete(final)
        for task in tasks:
            run.evidence_path(task, DIALLED).unlink(missing_ok=True)
    if weights is None or not wanted:
        return None
    if not written:
        with run.publish(final) as folder:
            if isinstance(recipe.model.adapt, LoraConfig):
                lora.write_scaled(weights.folder, folder, weights.scale)
            else:
                base = models.base
                export.write_full(
                    base.directory,
                    models.interpolated(weights),
                    folder,
                    base.tokenizer,
                    models.renderer.stop_ids,
                )
            run.write_json(folder / RECORD, record)
    models.define(DIALLED, Weights(final))
    return final
