"""A recipe's test rows as a task of lm-evaluation-harness, and its sample logs back as evidence.

The harness answers the same rows with any of its models; its sample logs are scored and compared
here, with intervals and paired tests. Logs of its own tasks are read too, with the scores that they
hold. Written for lm-evaluation-harness 0.4.13; nothing of it is imported.
"""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from postgrad.config import EvaluateConfig, Recipe
from postgrad.data.dataset import Dataset
from postgrad.errors import DataError
from postgrad.evaluate import compare
from postgrad.evaluate.evidence import write_evidence
from postgrad.evaluate.runner import SHORTEST_LIMIT, SPARE, reference, sample_test
from postgrad.run import Run, read_jsonl, write_atomic
from postgrad.scoring import score
from postgrad.types import Evidence, Example, Score, Split

_SHOWN = 5
_HEAD = """\
# Run in this folder:
#   lm_eval run --model hf --model_args pretrained=MODEL --include_path . --tasks {task} \\
#     --apply_chat_template --log_samples --output_path logs
# Its figure is the share of literally equal answers. The recipe's scorer ({scorer}), intervals and
# paired comparisons come from:
#   postgrad export lm-eval RECIPE|RUN_DIR --samples logs/MODEL/samples_{task}_DATE.jsonl
"""
_COLUMNS = ("id", "system", "prompt", "answer")


def write_task(recipe: Recipe, dataset: Dataset, folder: Path) -> list[Path]:
    """Write NAME.yaml and the rows it reads, NAME.test.jsonl and NAME.train.jsonl.

    The test rows are those that `evaluate` asks; the training rows are the pool for few-shot
    examples. Only rows of one request and one answer fit, with or without a system message.

    Raises:
        DataError: no test rows, or rows that do not fit (all are counted, some named).
    """
    tests = sample_test(dataset.of(Split.TEST), recipe.evaluate.limit, recipe.data_seed)
    if not tests:
        raise DataError("there are no test rows", "set data.test to a share or a file")
    train = dataset.of(Split.TRAIN)
    _refuse_unfitting([*tests, *train])
    rows = {"test": [_row(example) for example in tests], "train": [_row(e) for e in train]}
    files = {split: folder / f"{recipe.name}.{split}.jsonl" for split in rows}
    for split, path in files.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows[split])
        write_atomic(path, "".join(lines).encode("utf-8", "replace"))
    task = folder / f"{recipe.name}.yaml"
    write_atomic(task, _yaml(recipe, rows, files).encode())
    return [task, *files.values()]


def _refuse_unfitting(examples: Sequence[Example]) -> None:
    wrong = [example.source for example in examples if not _fits(example)]
    if wrong:
        raise DataError(
            f"{len(wrong)} rows have several turns or tools: {', '.join(wrong[:_SHOWN])}",
            "an lm-evaluation-harness task takes one request and one answer; evaluate these here",
        )


def _fits(example: Example) -> bool:
    messages = example.conversation.messages
    roles = [message.role for message in messages]
    plain = not example.conversation.tools and not any(m.tool_calls for m in messages)
    return plain and roles in (["user", "assistant"], ["system", "user", "assistant"])


def _row(example: Example) -> dict[str, str]:
    messages = example.conversation.messages
    system = messages[0].content if messages[0].role == "system" else ""
    gold = reference(example.conversation)
    return dict(zip(_COLUMNS, (example.id, system, messages[-2].content, gold), strict=True))


def _yaml(
    recipe: Recipe, rows: Mapping[str, Sequence[Mapping[str, str]]], files: Mapping[str, Path]
) -> str:
    """Return the task file; lm-evaluation-harness finds its rows from the folder it runs in."""
    systems = any(row["system"] for split in rows.values() for row in split)
    task = {
        "task": recipe.name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {split: path.name for split, path in files.items()}},
        "training_split": "train",
        "test_split": "test",
        "fewshot_split": "train",
        "output_type": "generate_until",
        **({"description": "{{system}}"} if systems else {}),
        "doc_to_text": "prompt",
        "doc_to_target": "answer",
        "num_fewshot": 0,
        "generation_kwargs": {
            "until": [],
            "do_sample": False,
            "max_gen_toks": _max_new_tokens(recipe, rows["train"]),
        },
        "filter_list": [
            {
                "name": "none",
                "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0, "recipe": recipe.hash()},
    }
    head = _HEAD.format(task=recipe.name, scorer=recipe.evaluate.scorer)
    return head + yaml.safe_dump(task, sort_keys=False, allow_unicode=True)


def _max_new_tokens(recipe: Recipe, train: Sequence[Mapping[str, str]]) -> int:
    """Return evaluate.max_new_tokens; for auto a bound, as a token has at least one byte."""
    wanted = recipe.evaluate.max_new_tokens
    if isinstance(wanted, int):
        return wanted
    longest = max((len(row["answer"].encode("utf-8", "replace")) for row in train), default=0)
    return max(SHORTEST_LIMIT, min(recipe.data.max_length, math.ceil(longest * SPARE)))


def read_samples(path: Path, evaluate: EvaluateConfig) -> list[Evidence]:
    """Return the evidence of a sample log (`samples_TASK_DATE.jsonl`).

    Rows of a task written by `write_task` are scored again with the recipe's scorer. Rows of any
    other task keep the log's own scores between 0 and 1, under METRIC, or METRIC,FILTER where the
    log has several filters; their id is the harness's hash of the row.

    Raises:
        DataError: no rows, or a line that is not a sample.
    """
    lines = read_jsonl(path)
    try:
        filters = list(dict.fromkeys(str(line["filter"]) for line in lines))
        documents: dict[Any, list[Mapping[str, Any]]] = {}
        for line in lines:
            documents.setdefault(line["doc_id"], []).append(line)
        found = [_evidence(group, evaluate, len(filters) > 1) for group in documents.values()]
        found = _with_own_ids(found)
    except (KeyError, TypeError, IndexError) as error:
        raise DataError(
            f"{path}: not a sample log of lm-evaluation-harness (no {error})",
            "give a samples_*.jsonl, written with --log_samples",
        ) from None
    if not found:
        raise DataError(f"{path} has no samples", "run lm_eval with --log_samples")
    return found


def _evidence(
    lines: Sequence[Mapping[str, Any]], evaluate: EvaluateConfig, several: bool
) -> Evidence:
    """Return the evidence of one document from its lines, one for each filter."""
    line = lines[0]
    doc = line["doc"]
    if all(isinstance(doc.get(name), str) for name in _COLUMNS):
        completion = line["resps"][0][0]
        verdict = score(evaluate.scorer, completion, doc["answer"], evaluate.pattern)
        own = {str(evaluate.scorer): verdict}
        return Evidence(doc["id"], doc["prompt"], doc["answer"], completion, own)
    scores: dict[str, Score] = {}
    for each in lines:
        for name in each["metrics"]:
            value = each[name]
            if isinstance(value, bool | int | float) and 0 <= value <= 1:
                metric = f"{name},{each['filter']}" if several else name
                scores[metric] = Score(float(value), value == 1)
    return Evidence(
        example_id=line["doc_hash"],
        prompt=_request(line["arguments"]),
        reference=str(line["target"]),
        completion=_answer(line["filtered_resps"]),
        scores=scores,
    )


def _request(arguments: Any) -> str:
    """Return the first request's text; logs hold it by name or by position."""
    first = next(iter(arguments.values())) if isinstance(arguments, Mapping) else arguments[0]
    return str(next(iter(first.values())) if isinstance(first, Mapping) else first[0])


def _answer(responses: Any) -> str:
    """Return the text of a generation, or the likelihoods of all choices as JSON."""
    first = responses[0]
    return first if isinstance(first, str) else json.dumps(responses)


def _with_own_ids(rows: Sequence[Evidence]) -> list[Evidence]:
    """Number the ids of rows that occur more than once in a data set."""
    seen: Counter[str] = Counter()
    found = []
    for row in rows:
        seen[row.example_id] += 1
        number = seen[row.example_id]
        name = row.example_id if number == 1 else f"{row.example_id}-{number}"
        found.append(dataclasses.replace(row, example_id=name))
    return found


def import_samples(paths: Sequence[Path], recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Write sample logs as evidence below `folder`; measure each, compare each with the first.

    Returns {evidence, measurements, comparisons}. The arm of a log is `lm-eval/MODEL`, from the
    folder the harness wrote it to.

    Raises:
        DataError: what `read_samples` raises, or logs that are not of the same rows.
    """
    arms = _arms(paths)
    logs = dict(zip(arms, (read_samples(path, recipe.evaluate) for path in paths), strict=True))
    settings = (recipe.evaluate.confidence, recipe.data_seed)
    first, *others = arms
    comparisons = [
        compare.compare(logs[first], logs[arm], recipe.name, metric, first, arm, *settings)
        for arm in others
        for metric in logs[arm][0].scores
    ]
    written = {arm: write_evidence(Run(folder), recipe.name, arm, logs[arm]) for arm in arms}
    measurements = [
        compare.measure(
            rows, recipe.name, metric, arm, *settings, str(written[arm].relative_to(folder))
        )
        for arm, rows in logs.items()
        for metric in rows[0].scores
    ]
    return {
        "evidence": [str(path) for path in written.values()],
        "measurements": [dataclasses.asdict(measurement) for measurement in measurements],
        "comparisons": [dataclasses.asdict(comparison) for comparison in comparisons],
    }


def _arms(paths: Sequence[Path]) -> list[str]:
    """Return lm-eval/MODEL for each log, numbered where a model has several."""
    seen: Counter[str] = Counter()
    arms = []
    for path in paths:
        name = f"lm-eval/{path.absolute().parent.name.lstrip('._')}"
        seen[name] += 1
        arms.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return arms
