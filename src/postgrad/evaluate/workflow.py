"""All arms of an evaluation on the same test rows: base with K examples, then the tuned model."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from postgrad.config import EvaluateConfig, Recipe
from postgrad.data.dataset import Dataset
from postgrad.errors import DataError
from postgrad.evaluate import compare
from postgrad.evaluate.benchmarks import load_benchmarks
from postgrad.evaluate.cost import measure_costs, tuning_seconds
from postgrad.evaluate.dial import measure_dial
from postgrad.evaluate.embedding import Embedder
from postgrad.evaluate.evidence import read_evidence, write_evidence
from postgrad.evaluate.fewshot import ExampleFinder, question
from postgrad.evaluate.frontier import to_tree
from postgrad.evaluate.gates import DIALLED, TUNED
from postgrad.evaluate.linear import linear_floor
from postgrad.evaluate.models import Models
from postgrad.evaluate.prompt_search import BEST, Ask, Variant, search_outcome, search_prompts
from postgrad.evaluate.retention import measure_retention
from postgrad.evaluate.runner import resolve_max_new_tokens, run_arm, sample_test
from postgrad.progress import Display
from postgrad.run import Run
from postgrad.types import Comparison, Evidence, Example, Measurement, Split


def base_arm(shots: int, kind: str = "static") -> str:
    """Return the name of a prompting arm.

    >>> base_arm(0), base_arm(8), base_arm(8, "retrieved"), base_arm(4, "embedded")
    ('base/zero-shot', 'base/few-shot-8', 'base/few-shot-8-retrieved', 'base/few-shot-4-embedded')
    """
    if not shots:
        return "base/zero-shot"
    return f"base/few-shot-{shots}" + ("" if kind == "static" else f"-{kind}")


def base_arms(settings: EvaluateConfig) -> dict[str, tuple[int, str]]:
    """Return the prompting arms of a recipe in their order: name -> examples and their kind."""
    return {
        base_arm(count, kind): (count, kind if count else "static")
        for count in settings.fewshot
        for kind in settings.fewshot_examples
    }


def evaluate_run(run: Run, dataset: Dataset, display: Display) -> dict[str, Any]:
    """Measure every arm that has no evidence yet, compare, write evidence/measurements.json.

    A run without a tuned model (no export) gets the base arms only. Returns the written document.
    """
    recipe = run.config
    tests = sample_test(dataset.of(Split.TEST), recipe.evaluate.limit, recipe.data_seed)
    if not tests:
        raise DataError("there are no test rows", "set data.test to a share or a file")
    if isinstance(recipe.train.threads, int):
        torch.set_num_threads(recipe.train.threads)
    models = Models(run, recipe)
    benchmarks = load_benchmarks(recipe)
    arms = [*base_arms(recipe.evaluate), *([BEST] if recipe.evaluate.prompt_search else [])]
    arms += [TUNED] if models.has_tuned else []

    def ask(
        task: str, examples: Sequence[Example], arms: Sequence[str]
    ) -> dict[str, list[Evidence]]:
        return _evidence(run, recipe, dataset, task, examples, arms, models, display)

    dial = None
    if recipe.evaluate.dial and not models.has_tuned:
        display.note("dial: not measured, there is no tuned model")
    elif recipe.evaluate.dial:
        dial = measure_dial(run, recipe, dataset, benchmarks, models, ask, display)
        arms += [DIALLED] if models.has(DIALLED) else []
    rows = ask(recipe.name, tests, arms)
    scorer = recipe.evaluate.scorer
    measurements = [
        compare.measure(
            rows[arm],
            recipe.name,
            scorer,
            arm,
            recipe.evaluate.confidence,
            recipe.data_seed,
            str(run.evidence_path(recipe.name, arm).relative_to(run.path)),
        )
        for arm in arms
    ]
    comparisons = [
        compare.compare(
            rows[a], rows[b], recipe.name, scorer, a, b,
            recipe.evaluate.confidence, recipe.data_seed,
        )
        for b in (TUNED, DIALLED) if b in arms
        for a in arms[: arms.index(b)]
    ]  # fmt: skip
    retention = measure_retention(run, recipe, benchmarks, models, display)
    document = {
        "task": recipe.name,
        "metric": scorer,
        "measurements": [dataclasses.asdict(m) for m in (*measurements, *retention.measurements)],
        "comparisons": [dataclasses.asdict(c) for c in (*comparisons, *retention.comparisons)],
        "references": _references(recipe, dataset, tests),
        "costs": dataclasses.asdict(
            measure_costs(
                {a: rows[a] for a in arms if a != DIALLED}, TUNED, tuning_seconds(run.record)
            )
        ),
        "retention": list(retention.tasks),
        **({"dial": to_tree(dial)} if dial else {}),
    }
    search = search_outcome(run, recipe)
    if search is not None:
        document["prompt_search"] = dataclasses.asdict(search)
    run.write_json(run.measurements_path, document)
    of_tuned = [c for c in comparisons if c.b == TUNED]
    run.update(verdict=_verdict(measurements, of_tuned, recipe.evaluate.confidence))
    return document


def _verdict(
    measurements: Sequence[Measurement], comparisons: Sequence[Comparison], confidence: float
) -> str:
    if comparisons:
        return compare.headline(comparisons, confidence)
    if any(measurement.arm == TUNED for measurement in measurements):
        return "no comparison: evaluate.fewshot names no base arm"
    return "no comparison: there is no tuned model"


def _evidence(
    run: Run,
    recipe: Recipe,
    dataset: Dataset,
    task: str,
    tests: Sequence[Example],
    arms: Sequence[str],
    models: Models,
    display: Display,
) -> dict[str, list[Evidence]]:
    """Return the evidence of every arm, reading what an interrupted evaluation left behind."""
    found: dict[str, list[Evidence]] = {}
    wanted = [example.id for example in tests]
    for arm in arms:
        if run.evidence_path(task, arm).exists():
            rows = read_evidence(run, task, arm)
            if [row.example_id for row in rows] == wanted:
                found[arm] = rows
    missing = [arm for arm in arms if arm not in found]
    if not missing:
        return found
    ask = _asking(recipe, dataset, models, display)
    prompting, search = base_arms(recipe.evaluate), recipe.evaluate.prompt_search
    for arm in missing:
        if arm == BEST and search:
            held_out = sample_test(dataset.of(Split.VALIDATION), search.rows, recipe.data_seed)
            best = search_prompts(run, recipe, held_out, ask, display)
            found[arm] = _already(found, prompting, best) or ask(best, tests, arm)
        else:
            count, kind = prompting.get(arm, (0, "static"))
            found[arm] = ask(Variant(arm, count, kind, 0, None), tests, arm)
        write_evidence(run, task, arm, found[arm])
    return found


def _already(
    found: Mapping[str, list[Evidence]], prompting: Mapping[str, tuple[int, str]], best: Variant
) -> list[Evidence] | None:
    """Return the answers of an arm that prompts exactly as `best` does, when there is one."""
    if best.system is not None or best.draw:
        return None
    same = [arm for arm, prompt in prompting.items() if prompt == (best.shots, best.kind)]
    return found.get(same[0]) if same else None


def _asking(recipe: Recipe, dataset: Dataset, models: Models, display: Display) -> Ask:
    """Return what answers rows: an arm under its own name, prompts that are tried by the base."""
    limit = _answer_limit(recipe, dataset, models)
    embedder = Embedder(lambda: models.arm(BEST), lambda: models.base.tokenizer, display)
    finder = ExampleFinder(dataset.of(Split.TRAIN), embedder, recipe.data_seed)

    def ask(variant: Variant, rows: Sequence[Example], label: str) -> list[Evidence]:
        shots = finder.find(variant.kind, variant.shots, rows, variant.draw)
        with models.arm(variant.name if variant.name == label else BEST) as model:
            return run_arm(
                model,
                models.renderer,
                models.base.tokenizer,
                rows,
                arm=label,
                shots=shots,
                system=variant.system,
                scorer=recipe.evaluate.scorer,
                pattern=recipe.evaluate.pattern,
                max_new_tokens=limit,
                batch_tokens=recipe.evaluate.batch_tokens,
                display=display,
            )

    return ask


def answer_limit(run: Run, dataset: Dataset) -> int:
    """Return evaluate.max_new_tokens of a run; loads the model when that is `auto`."""
    wanted = run.config.evaluate.max_new_tokens
    if isinstance(wanted, int):
        return wanted
    return _answer_limit(run.config, dataset, Models(run, run.config))


def _answer_limit(recipe: Recipe, dataset: Dataset, models: Models) -> int:
    wanted, longest = recipe.evaluate.max_new_tokens, recipe.data.max_length
    return resolve_max_new_tokens(wanted, models.renderer, dataset.of(Split.TRAIN), longest)


def _references(recipe: Recipe, dataset: Dataset, tests: Sequence[Example]) -> list[dict[str, Any]]:
    """Return what a simple linear model reaches on the same rows, when answers are labels."""
    train = dataset.of(Split.TRAIN)
    floor = linear_floor(
        [question(example) for example in train],
        [example.conversation.answer for example in train],
        [question(example) for example in tests],
        [example.conversation.answer for example in tests],
        confidence=recipe.evaluate.confidence,
        seed=recipe.data_seed,
    )
    if floor is None:
        return []
    return [
        {
            "name": floor.arm,
            "value": floor.value,
            "low": floor.low,
            "high": floor.high,
            "n": floor.n,
            "source": floor.source,
        }
    ]
