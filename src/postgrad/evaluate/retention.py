"""Retention: benchmarks of general ability, asked of the base model and of the tuned one.

The same items for both, every answer as evidence, every figure with its interval, every difference
paired by item. A task and arm that has its evidence is not asked again.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from postgrad.config import Recipe
from postgrad.data.template import TEMPLATE_ERRORS
from postgrad.errors import ModelError
from postgrad.evaluate import compare, statistics
from postgrad.evaluate.benchmarks import Benchmark
from postgrad.evaluate.evidence import read_evidence, write_evidence
from postgrad.evaluate.gates import BASE, DIALLED, TUNED
from postgrad.evaluate.models import Models
from postgrad.evaluate.prompts import Render, chat_of, contexts, requests, under_template
from postgrad.evaluate.tasks import Item, Kind
from postgrad.model.generate import generate
from postgrad.model.likelihood import Likelihood, Pair, encode_pairs, log_likelihoods
from postgrad.progress import Display
from postgrad.run import Run
from postgrad.types import Comparison, Completion, Evidence, Measurement, Score

SHOWN_OPTION = 60
"""Characters of an option that an explanation quotes."""


@dataclasses.dataclass(frozen=True, slots=True)
class Retention:
    """What was measured, for evidence/measurements.json."""

    measurements: tuple[Measurement, ...]
    comparisons: tuple[Comparison, ...]
    tasks: tuple[Mapping[str, Any], ...]
    """For each task: name, label, source, prompt format, template, metric, chance."""


def measure_retention(
    run: Run, recipe: Recipe, benchmarks: Sequence[Benchmark], models: Models, display: Display
) -> Retention:
    """Ask every benchmark of every arm there is, `base` first, and compare each with those before.

    The tuned model is compared with the base, the dialled one with both; each is a suite.
    """
    arms = [BASE, *(arm for arm in (TUNED, DIALLED) if models.has(arm))]
    measurements: list[Measurement] = []
    comparisons: list[Comparison] = []
    for benchmark in benchmarks:
        for reason in benchmark.tried:
            display.note(f"{benchmark.task.name}: {reason}")
        display.note(f"benchmark {benchmark.label}")
    # arm by arm: switching from one model to the other is not free
    rows = {
        (benchmark.task.name, arm): ask_benchmark(run, recipe, benchmark, arm, models, display)
        for arm in arms
        for benchmark in benchmarks
    }
    for benchmark in benchmarks:
        name = benchmark.task.name
        for arm in arms:
            place = str(run.evidence_path(name, arm).relative_to(run.path))
            measurements += _measure(benchmark, rows[name, arm], arm, recipe, place)
    for a, b in ((BASE, TUNED), (BASE, DIALLED), (TUNED, DIALLED)):
        if a in arms and b in arms:
            suite = [_compare(x, rows[x.task.name, a], rows[x.task.name, b], recipe, a, b)
                     for x in benchmarks]  # fmt: skip
            if len(suite) > 1:  # one of many benchmarks differs by chance
                suite = compare.correct(suite, recipe.evaluate.confidence)
            comparisons += suite
    tasks = tuple(_facts(benchmark, recipe) for benchmark in benchmarks)
    return Retention(tuple(measurements), tuple(comparisons), tasks)


def _facts(benchmark: Benchmark, recipe: Recipe) -> dict[str, Any]:
    task = benchmark.task
    return {
        "task": task.name,
        "label": benchmark.label,
        "source": benchmark.source,
        "tried": list(benchmark.tried),
        "items": len(benchmark.items),
        "available": benchmark.available,
        "unusable": benchmark.unusable,
        "standard": task.samples.standard or None,
        "metric": task.metrics[0],
        "chance": benchmark.chance,
        "kind": str(task.kind),
        "origin": task.origin,
        "shots": task.shots,
        "template": "chat" if under_template(benchmark, recipe) else "raw",
    }


def _measure(
    benchmark: Benchmark, rows: Sequence[Evidence], arm: str, recipe: Recipe, place: str
) -> list[Measurement]:
    task, confidence = benchmark.task, recipe.evaluate.confidence
    found = [
        compare.measure(
            observed(benchmark, rows, metric),
            task.name,
            metric,
            arm,
            confidence,
            recipe.data_seed,
            place,
        )
        for metric in task.metrics
    ]
    values = np.array([-row.logprobs[0] for row in rows if row.error is None and row.logprobs])
    if task.kind is Kind.CLOZE and len(values) > 1:
        found.append(_perplexity(values, task.name, arm, confidence, place))
    return found


def _compare(
    benchmark: Benchmark,
    a_rows: Sequence[Evidence],
    b_rows: Sequence[Evidence],
    recipe: Recipe,
    a: str,
    b: str,
) -> Comparison:
    metric = benchmark.task.metrics[0]
    return compare.compare(
        observed(benchmark, a_rows, metric),
        observed(benchmark, b_rows, metric),
        benchmark.task.name,
        metric,
        a,
        b,
        recipe.evaluate.confidence,
        recipe.data_seed,
    )


def observed(benchmark: Benchmark, rows: Sequence[Evidence], metric: str) -> Sequence[Evidence]:
    """Return the rows whose mean is the metric: the items, unless the task has other units."""
    units = benchmark.task.units
    return rows if units is None else units(rows, metric)


def _perplexity(
    values: statistics.Values, task: str, arm: str, confidence: float, place: str
) -> Measurement:
    """Return exp of the mean negative log-likelihood, with a normal interval of that mean.

    Items that could not be asked have no likelihood and are not among the n.
    """
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    mean, half = float(values.mean()), statistics.critical_value(confidence) * error
    low, high = math.exp(mean - half), math.exp(mean + half)
    return Measurement(
        task, "perplexity", arm, math.exp(mean), low, high, len(values), "normal", place
    )


def ask_benchmark(
    run: Run,
    recipe: Recipe,
    benchmark: Benchmark,
    arm: str,
    models: Models,
    display: Display,
    folder: str = "",
) -> list[Evidence]:
    """Return the evidence of one task and arm: what is there already, or new.

    `folder` (with a slash) is where below evidence/ it is kept.
    """
    name = folder + benchmark.task.name
    if run.evidence_path(name, arm).exists():
        rows = read_evidence(run, name, arm)
        if [row.example_id for row in rows] == [item.id for item in benchmark.items]:
            return rows
    chat = chat_of(benchmark, recipe, models.renderer.template)
    title = f"{name} {arm}"
    with models.arm(arm) as model, display.track(title, len(benchmark.items), unit="items") as bar:
        if benchmark.task.kind is Kind.GENERATION:
            size = recipe.evaluate.batch_tokens
            rows = _generate(model, models, benchmark, chat, size, bar.advance)
        else:
            tokenizer = models.base.tokenizer
            rows = score_continuations(model, tokenizer, benchmark, chat, bar.advance)
    write_evidence(run, name, arm, rows)
    return rows


def score_continuations(
    model: Any,
    tokenizer: Any,
    benchmark: Benchmark,
    chat: Render | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Evidence]:
    """Return the evidence of a multiple-choice or cloze task, in the order of its items."""
    limit = _context_tokens(model)
    pairs: dict[int, list[Pair]] = {}
    problems: dict[int, str] = {}
    for number, item in enumerate(benchmark.items):
        try:
            pairs[number] = encode_pairs(tokenizer, requests(benchmark, item, chat))
            longest = max(len(pair.inputs) for pair in pairs[number])
            if longest > limit:
                problems[number] = f"{longest} tokens, the model's context has {limit}"
        except (*TEMPLATE_ERRORS, ModelError) as error:
            problems[number] = str(error).splitlines()[0]
    asked = [number for number in pairs if number not in problems]
    seconds: dict[int, float] = {}

    def finished(groups: Sequence[int], spent: float) -> None:
        for group in groups:
            seconds[asked[group]] = seconds.get(asked[group], 0.0) + spent / len(groups)
        advance(len(groups))

    found = log_likelihoods(model, [pairs[n] for n in asked], on_progress=finished)
    likelihoods = dict(zip(asked, found, strict=True))
    return [
        _failure(benchmark, item, problems[n])
        if n in problems
        else _chosen(benchmark, item, likelihoods[n], pairs[n], seconds[n])
        for n, item in enumerate(benchmark.items)
    ]


def _chosen(
    benchmark: Benchmark,
    item: Item,
    likelihoods: Sequence[Likelihood],
    pairs: Sequence[Pair],
    seconds: float,
) -> Evidence:
    """Return the evidence of one item from the likelihoods of its options."""
    task = benchmark.task
    values = np.array([likelihood.logprob for likelihood in likelihoods])
    if task.kind is Kind.CLOZE:
        right = likelihoods[0].greedy
        why = "" if right else "another continuation is likelier"
        scores, said = {"acc": Score(float(right), right, why)}, ""
    else:
        texts = item.contexts or item.options
        best = {
            "acc": int(values.argmax()),
            "acc_norm": int((values / [max(1, len(text)) for text in texts]).argmax()),
        }
        scores = {m: _verdict(best[m] == item.gold, texts[best[m]]) for m in task.metrics}
        said = texts[best[task.metrics[0]]]
    return Evidence(
        example_id=item.id,
        prompt=item.prompt,
        reference=item.reference,
        completion=said,
        scores=scores,
        prompt_tokens=max(len(pair.context) for pair in pairs),
        completion_tokens=sum(len(pair.continuation) for pair in pairs),
        seconds=seconds,
        logprobs=tuple(values.tolist()),
        group=item.group,
    )


def _verdict(right: bool, chosen: str) -> Score:
    return Score(float(right), right, "" if right else f"chose {chosen[:SHOWN_OPTION]!r}")


def _failure(benchmark: Benchmark, item: Item, problem: str) -> Evidence:
    return Evidence(
        example_id=item.id,
        prompt=item.prompt,
        reference=item.reference,
        completion="",
        scores={metric: Score(0.0, False, problem) for metric in benchmark.task.metrics},
        error=problem,
        group=item.group,
    )


def _generate(
    model: Any,
    models: Models,
    benchmark: Benchmark,
    chat: Render | None,
    batch_tokens: int,
    advance: Callable[[int], None],
) -> list[Evidence]:
    """Return evidence of a generation task."""
    generation = benchmark.task.generation
    assert generation is not None
    tokenizer, limit = models.base.tokenizer, _context_tokens(model) - generation.max_new_tokens
    prompts: dict[int, list[int]] = {}
    problems: dict[int, str] = {}
    for number, item in enumerate(benchmark.items):
        try:
            text = contexts(benchmark, item, chat)[0]
            prompts[number] = tokenizer(text, add_special_tokens=chat is None)["input_ids"]
        except TEMPLATE_ERRORS as error:
            problems[number] = str(error).splitlines()[0]
            continue
        if len(prompts[number]) > limit:
            problems[number] = f"{len(prompts[number])} tokens leave no room for the answer"
    asked = [number for number in prompts if number not in problems]
    seconds: dict[int, float] = {}

    def finished(rows: Sequence[int], spent: float) -> None:
        seconds.update({asked[row]: spent / len(rows) for row in rows})
        advance(len(rows))

    completions = generate(
        model,
        [prompts[number] for number in asked],
        max_new_tokens=generation.max_new_tokens,
        stop_ids=models.renderer.stop_ids,
        batch_tokens=batch_tokens,
        tokenizer=tokenizer,
        on_progress=finished,
    )
    answers = dict(zip(asked, completions, strict=True))
    return [
        _failure(benchmark, item, problems[n])
        if n in problems
        else _written(benchmark, item, answers[n], len(prompts[n]), seconds[n])
        for n, item in enumerate(benchmark.items)
    ]


def _written(
    benchmark: Benchmark, item: Item, completion: Completion, prompt_tokens: int, seconds: float
) -> Evidence:
    """Return the evidence of one generated answer, cut before the first stop text."""
    generation = benchmark.task.generation
    assert generation is not None
    text = completion.text
    for stop in generation.until:
        text = text.partition(stop)[0]
    return Evidence(
        example_id=item.id,
        prompt=item.prompt,
        reference=item.reference,
        completion=text,
        scores=dict(generation.score(text, item)),
        stop_reason=completion.stop_reason,
        prompt_tokens=prompt_tokens,
        completion_tokens=len(completion.ids),
        seconds=seconds,
        group=item.group,
    )


def _context_tokens(model: Any) -> float:
    config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or math.inf
