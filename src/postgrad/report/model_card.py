"""The model card: MODEL_CARD.md with Hugging Face metadata, from the files of a run.

Metadata follow https://github.com/huggingface/hub-docs/blob/main/modelcard.md; `model-index` holds
the tuned model's own measurements. What was not measured is said, never left to be assumed.
"""

import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from postgrad.report.collect import TUNED, Evaluation, Report, collect
from postgrad.report.costs import NO_LATENCY, break_even_sentence
from postgrad.report.facts import money, recompute_command
from postgrad.report.frontier import statement
from postgrad.report.markup import clean
from postgrad.report.prompts import effort_sentence
from postgrad.report.words import (
    NOT_MEASURED,
    arm_name,
    capital,
    count,
    duration,
    interval,
    level,
    method_name,
    metric_name,
    number,
    p_value,
    percent,
    points,
    points_interval,
    reference_interval,
    reference_method,
    size,
    training_notes,
    unknowns,
    verdict,
    warnings,
)
from postgrad.run import Run, write_atomic

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def write_model_card(run: Run) -> Path:
    """Write MODEL_CARD.md of a run from its files, and return its path.

    Raises `RunError` when a file of the run is damaged or the card cannot be written.
    """
    write_atomic(run.card_path, card(collect(run)).encode("utf-8", "replace"))
    return run.card_path


def card(report: Report) -> str:
    """Return the whole card: YAML front matter, then Markdown."""
    front = yaml.safe_dump(metadata(report), sort_keys=False, allow_unicode=True, width=100)
    parts = [
        f"# {_text(_name(report))}",
        *_introduction(report),
        *_use(report),
        *_data(report),
        *_training(report),
        *_evaluation(report),
        *_reproduction(report),
    ]
    return f"---\n{front}---\n\n" + clean("\n\n".join(part for part in parts if part)) + "\n"


def metadata(report: Report) -> dict[str, Any]:
    """Return the front matter; a key whose value is not known is left out."""
    recipe = report.recipe
    adapted = recipe.model.adapt.kind == "lora"
    found: dict[str, Any] = {
        "license": recipe.report.license,
        "language": [recipe.report.language],
        "library_name": "peft" if adapted else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["postgrad", "sft", "lora" if adapted else "full-tuning"],
    }
    if hub_id(recipe.model.base):
        found["base_model"] = recipe.model.base
        found["base_model_relation"] = "adapter" if adapted else "finetune"
    sources = [recipe.data.train] if isinstance(recipe.data.train, str) else recipe.data.train
    datasets = [source for source in sources if hub_id(source)]
    if datasets:
        found["datasets"] = datasets
    results = _results(report, datasets[0] if len(datasets) == 1 else _name(report))
    if results:
        found["model-index"] = [{"name": _name(report), "results": results}]
    return found


def hub_id(source: str) -> bool:
    """Return whether a source names a repository on the hub: `owner/name`, no such local path.

    >>> hub_id("HuggingFaceTB/SmolLM2-135M"), hub_id("pypi:a==1/b"), hub_id("data/rows.jsonl")
    (True, False, False)
    """
    suffixes = (".jsonl", ".json", ".csv", ".parquet", ".gz", ".gguf", ".safetensors")
    return (
        bool(_HUB_ID.fullmatch(source))
        and not source.lower().endswith(suffixes)
        and not Path(source).exists()
    )


def _results(report: Report, dataset: str) -> list[dict[str, Any]]:
    evaluation = report.evaluation
    tuned = [m for m in evaluation.measurements if m.arm == TUNED] if evaluation else []
    return [
        {
            "task": {"type": "text-generation", "name": m.task},
            "dataset": {"type": dataset, "name": f"{dataset}, held-out test rows", "split": "test"},
            "metrics": [
                {
                    "type": m.metric,
                    "value": m.value,
                    "name": f"{metric_name(m.metric)}, {_within(evaluation)} "
                    f"{interval(m.low, m.high)}, n = {m.n}",
                    "verified": False,
                }
            ],
        }
        for m in tuned
    ]


def _within(evaluation: Evaluation | None) -> str:
    return f"{level(evaluation.confidence)} interval" if evaluation else "interval"


def _name(report: Report) -> str:
    return str(report.record.get("name", report.recipe.name))


def _introduction(report: Report) -> list[str]:
    recipe, said = report.recipe, verdict(report)
    adapt = recipe.model.adapt
    kind = "No training is recorded in this run."
    if report.training and adapt.kind == "lora":
        size_words = f"r {adapt.r}, alpha {adapt.lora_alpha:g}"
        kind = f"A LoRA adapter ({size_words}) was trained by supervised fine-tuning."
    elif report.training:
        kind = "All its weights were trained by supervised fine-tuning."
    base = f"Base model: {_code(recipe.model.base)}. {kind}"
    lines = [base, f"**{said.headline}** {_text(said.summary)} {_text(said.evidence)}".strip()]
    return [*lines, *(f"> **Warning.** {_text(sentence)}" for sentence in warnings(report))]


def _use(report: Report) -> list[str]:
    licence = report.recipe.report.license
    lines = [
        "Requests of the kind found in the training rows, sent with the chat template and the "
        "system prompt of training. Other uses were not evaluated.",
    ]
    if licence == "other":
        lines.append(
            "Licence: not stated (report.license is not set). The licences of the base model and "
            "of the data apply."
        )
    return [
        "## Intended use",
        " ".join(lines),
        "## Limits and missing evidence",
        _bullets(
            [
                *unknowns(report),
                "Safety, bias and misuse: not measured in this run.",
            ]
        ),
    ]


def _data(report: Report) -> list[str]:
    data = report.data
    if data is None:
        return ["## Data", f"{NOT_MEASURED.capitalize()}: no manifest of the data was written."]
    rows = [
        [
            _code(file.file),
            file.format or "not recorded",
            "not recorded" if file.rows is None else count(file.rows),
            _code(file.sha256) if file.sha256 else "not recorded",
        ]
        for file in data.files
    ]
    splits = ", ".join(f"{name} {count(rows)}" for name, rows in data.splits.items())
    dropped = ", ".join(f"{step} {count(len(d))}" for step, d in data.dropped_by_step.items())
    return [
        "## Data",
        _table(["File", "Format", "Rows", "SHA-256"], rows),
        f"Rows per split: {splits or 'not recorded'}. Ledger of rows dropped or cut: "
        f"{dropped or 'none'}"
        + (" (each with its reason in `data/dropped.jsonl`)." if dropped else "."),
        _attribution(report),
    ]


def _attribution(report: Report) -> str:
    demo = report.record.get("demo")
    stated = demo.get("attribution") if isinstance(demo, dict) else None
    return f"Attribution: {_text(str(stated))}" if stated else ""


def _training(report: Report) -> list[str]:
    training, train = report.training, report.recipe.train
    if training is None:
        return ["## Training", f"{NOT_MEASURED.capitalize()}: no model was trained in this run."]
    hardware = dict(report.record.get("hardware") or {})
    packed = {True: "yes", False: "no", None: NOT_MEASURED}[training.packed]
    rate = training.learning_rate
    facts = [
        ("Learning rate", f"{number(rate)}, {train.lr_scheduler_type}"),
        ("Optimizer steps", _count(training.steps)),
        ("Passes over the rows", number(training.epochs, 3)),
        ("Tokens", f"{_count(training.tokens)} (supervised: {_count(training.supervised_tokens)})"),
        ("Tokens per batch", _count(training.tokens_per_batch)),
        ("Precision, packed", f"{training.precision_in_words or NOT_MEASURED}, {packed}"),
        ("Parameters trained", _count(training.trainable_parameters)),
        ("Parameters in all", _count(training.total_parameters)),
        ("Speed", f"{_count(training.tokens_per_second)} tokens per second"),
        ("Peak memory", size(training.peak_memory_bytes)),
        ("Hardware", f"{hardware.get('processor', 'not recorded')}, {hardware.get('cores')} cores"),
        ("Training time", duration(report.seconds.get("train"))),
        ("Time in all", duration(sum(report.seconds.values()) or None)),
        ("Cost", money(report)),
    ]
    return [
        "## Training",
        _text(" ".join(training_notes(report))),
        _table(["Fact", "Value"], [[name, _text(value)] for name, value in facts]),
        _preflight(report),
    ]


def _count(value: float | None) -> str:
    return NOT_MEASURED if value is None else count(value)


def _preflight(report: Report) -> str:
    if report.checks is None:
        return f"Pre-flight checks: {NOT_MEASURED}."
    passed = sum(check.passed for check in report.checks)
    waived = ", ".join(_code(check.name) for check in report.waived)
    return f"Pre-flight checks: {passed} of {len(report.checks)} passed" + (
        f"; waived: {waived}." if waived else "."
    )


def _evaluation(report: Report) -> list[str]:
    evaluation = report.evaluation
    if evaluation is None or not evaluation.measurements:
        return ["## Evaluation", f"{NOT_MEASURED.capitalize()}: no arm was evaluated."]
    rows = [
        [
            arm_name(m.arm),
            _text(m.task),
            metric_name(m.metric),
            percent(m.value),
            interval(m.low, m.high),
            count(m.n),
            method_name(m.method),
            _code(m.evidence) if m.evidence else "no file",
        ]
        for m in evaluation.measurements
    ]
    for r in evaluation.references:
        rows.append([_text(r.name), _text(evaluation.task), metric_name(evaluation.metric)])
        rows[-1] += [percent(r.value), reference_interval(r)]
        rows[-1] += ["not given" if r.n is None else count(r.n), reference_method(r)]
        rows[-1] += [_text(r.source) or "no source given"]
    heads = ["Arm", "Task", "Metric", "Value", _within(evaluation), "n", "Interval by", "Evidence"]
    search, curve = evaluation.prompt_search, evaluation.learning_curve
    return [
        "## Evaluation",
        _table(heads, rows),
        _comparisons(evaluation),
        *([f"{_text(break_even_sentence(evaluation))} {NO_LATENCY}"] if evaluation.costs else []),
        *([_text(effort_sentence(search))] if search else []),
        *([_text(capital(curve.finding)) + "."] if curve else []),
        *_retention(evaluation),
        *_dial(evaluation),
    ]


def _retention(evaluation: Evaluation) -> list[str]:
    retention = evaluation.retention
    if retention is None:
        return ["Forgetting: not measured in this run."]
    rows = []
    for benchmark in retention.benchmarks:
        row = [_text(benchmark.label), metric_name(benchmark.metric), benchmark.template]
        for arm in ("base", TUNED):
            m = retention.measured(benchmark, arm)
            row.append(f"{percent(m.value)} ({interval(m.low, m.high)})" if m else NOT_MEASURED)
        c = retention.compared(benchmark)
        row += [f"{points(c.difference)} ({points_interval(c)})", str(c.verdict)] if c else ["", ""]
        rows.append(row)
    heads = ["Benchmark", "Metric", "Prompt", "Base model", "This model", "Points", "Verdict"]
    return [
        "### General abilities, before and after",
        _table(heads, rows),
        "Figures of a part of a benchmark are not its standard score.",
    ]


def _dial(evaluation: Evaluation) -> list[str]:
    dial = evaluation.dial
    if dial is None:
        return []
    said = [_text(sentence) for sentence in statement(dial)]
    if dial.exported:
        kind = dial.point(dial.chosen).place.label
        said.append(f"`{dial.exported}` is the model at {kind}, beside the tuned one.")
    return ["### How much of the tuning to keep", _bullets_of(said)]


def _comparisons(evaluation: Evaluation) -> str:
    if not evaluation.comparisons:
        return f"Comparisons: {NOT_MEASURED}."
    heads = ["Tuned model against", "Points", _within(evaluation), "p", "Won / lost", "n"]
    rows = [
        [
            arm_name(c.a),
            points(c.difference),
            points_interval(c),
            f"{p_value(c.p)} ({method_name(c.method)})",
            f"{count(c.wins)} / {count(c.losses)}",
            count(c.n),
            str(c.verdict),
        ]
        for c in evaluation.comparisons
        if c.b == TUNED
    ]
    return _table([*heads, "Verdict"], rows)


def _reproduction(report: Report) -> list[str]:
    record = report.record
    versions = ", ".join(f"{k} {v}" for k, v in dict(record.get("versions") or {}).items())
    evaluation = report.evaluation
    tuned = evaluation.tuned if evaluation else None
    chosen = report.training.base_precision if report.training else None
    same = f" train.base_precision={chosen}" if chosen else ""
    commands = [
        f"RUN={shlex.quote(str(record.get('id', report.path.name)))}  # the folder of this card",
        "# the whole run again, in the folder where it was started",
        f'postgrad run "$RUN/recipe.yaml"{same} --out again',
    ]
    if tuned and tuned.evidence:
        commands.append(f"# {tuned.value:.6g} on {tuned.n} rows, from its evidence alone")
        commands += ['cd "$RUN"', recompute_command(tuned.evidence, tuned.metric)]
    return [
        "## Reproduction",
        "```bash\n" + "\n".join(commands) + "\n```",
        f"Run {_code(str(record.get('id', '')))}, seed {report.recipe.seed}, recipe hash "
        f"{_code(str(record.get('recipe_hash', '')))}. Versions: {_text(versions)}.",
    ]


def _bullets(sentences: Iterable[str]) -> str:
    return _bullets_of(_text(sentence) for sentence in sentences)


def _bullets_of(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _text(text: str) -> str:
    """Return text as Markdown that shows it: no markup, no new line, no table cell."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """Return text as inline code that stays in its table cell."""
    fence = "``" if "`" in text else "`"
    flat = " ".join(text.split()).replace("|", "\\|")
    return f"{fence} {flat} {fence}" if fence == "``" else f"{fence}{flat}{fence}"
