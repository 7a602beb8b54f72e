"""Greedy answers: postgrad's `generate` against Transformers' `model.generate` with left padding.

Usage: python benchmarks/generation_speed.py [--run DIR] [--quick]. Same model object, same prompts,
same limit, same stop tokens, one process. README.md beside this file says what is measured. Prints
a table last and writes benchmarks/results/<date>-<hardware>-generation-speed.json.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import rows
import torch
from harness import HERE, circumstances, say, table, write_result
from torch.nn.utils.rnn import pad_sequence

from postgrad.config import Recipe, load_recipe
from postgrad.data.dataset import Dataset, load_dataset, read_dataset
from postgrad.data.render import Renderer
from postgrad.evaluate.fewshot import choose_shots, with_shots
from postgrad.evaluate.gates import BASE, TUNED
from postgrad.evaluate.models import Models
from postgrad.evaluate.runner import resolve_max_new_tokens, sample_test
from postgrad.model.generate import generate
from postgrad.model.load import load, load_model, load_tokenizer, model_directory
from postgrad.run import Run, open_run
from postgrad.types import Split

RECIPE = HERE / "train_speed.yaml"
SIZES = (8, 16, 32, 64)
SHOTS = 8
MADE_ROWS = 400
SEED = 7

OURS, PEER = "postgrad", "generate"

Answers = list[tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Task:
    """Prompts of one kind and what both sides are told about the answers."""

    prompts: list[list[int]]
    max_new_tokens: int
    stop_ids: frozenset[int]
    batch_tokens: int
    tokenizer: Any

    def ours(self, model: Any) -> Answers:
        """Answer as an evaluation does."""
        found = generate(
            model,
            self.prompts,
            max_new_tokens=self.max_new_tokens,
            stop_ids=self.stop_ids,
            batch_tokens=self.batch_tokens,
            tokenizer=self.tokenizer,
        )
        return [completion.ids for completion in found]

    def peer(self, model: Any, size: int, by_length: bool) -> Answers:
        """Answer with `model.generate`, `size` prompts at a time, padded on the left."""
        order = list(range(len(self.prompts)))
        if by_length:
            order.sort(key=lambda row: -len(self.prompts[row]))
        answers: dict[int, tuple[int, ...]] = {}
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            prompts = [torch.tensor(self.prompts[row]) for row in chosen]
            ids = pad_sequence(prompts, batch_first=True, padding_side="left")
            ones = [torch.ones_like(prompt) for prompt in prompts]
            output = model.generate(
                ids.to(model.device),
                attention_mask=pad_sequence(ones, True, padding_side="left").to(model.device),
                do_sample=False,
                max_new_tokens=self.max_new_tokens,
                eos_token_id=sorted(self.stop_ids),
                pad_token_id=0,
            )
            for row, answer in zip(chosen, output[:, ids.shape[1] :].tolist(), strict=True):
                answers[row] = self._until_stop(answer)
        return [answers[row] for row in range(len(order))]

    def _until_stop(self, ids: Sequence[int]) -> tuple[int, ...]:
        ends = [place for place, token in enumerate(ids) if token in self.stop_ids]
        return tuple(ids[: ends[0] + 1] if ends else ids)


@dataclass(frozen=True, slots=True)
class Clock:
    """Seconds of the processor with one thread (other work does not count), else of the wall."""

    name: str
    now: Callable[[], float]

    def measure(self, work: Callable[[], Answers]) -> tuple[float, Answers]:
        """Return the seconds that `work` takes, and its answers."""
        start = self.now()
        answers = work()
        return self.now() - start, answers


def choose_clock() -> Clock:
    """Return the clock that this machine and number of threads allow."""
    if torch.get_num_threads() == 1 and not torch.cuda.is_available():
        return Clock("process", time.process_time)
    return Clock("wall", time.perf_counter)


def models_of(run: Run | None, recipe: Recipe) -> Iterator[tuple[str, Any, Sequence[int]]]:
    """Yield name, model and the numbers of examples in the prompt.

    The base model first, then (of a run) the tuned one as an evaluation sees it, then the merged
    one where the run has exported it. Each is to be used before the next is taken: an adapter is
    attached to the base model in place.
    """
    if run is None:
        yield BASE, load(recipe.model, trained=False).model, (0, SHOTS)
        return
    models = Models(run, recipe)
    with models.arm(BASE) as model:
        yield BASE, model, (0, SHOTS)
    if models.has_tuned:
        with models.arm(TUNED) as model:
            yield TUNED, model, (0,)
    merged = run.export / "merged"
    if merged.is_dir():
        yield "merged", load_model(merged, models.base.dtype), (0,)


def make_task(recipe: Recipe, dataset: Dataset, model: Any, limit: int, count: int) -> Task:
    """Return the prompts of TEST rows with `count` examples of TRAIN, as an evaluation asks."""
    tokenizer = load_tokenizer(model_directory(recipe.model.base), recipe.model.chat_template)
    eos = model.generation_config.eos_token_id
    renderer = Renderer(tokenizer, eos_token_ids=[eos] if isinstance(eos, int) else eos)
    train = dataset.of(Split.TRAIN)
    shots = choose_shots(train, count, recipe.seed)
    tests = sample_test(dataset.of(Split.TEST), limit, recipe.seed)
    asked = [with_shots(test.conversation.prompt, shots) for test in tests]
    wanted = recipe.evaluate.max_new_tokens
    return Task(
        [list(renderer.prompt_ids(conversation)) for conversation in asked],
        resolve_max_new_tokens(wanted, renderer, train, recipe.data.max_length),
        renderer.stop_ids,
        recipe.evaluate.batch_tokens,
        tokenizer,
    )


def measure(model: Any, task: Task, clock: Clock, repetitions: int, quick: bool) -> dict[str, Any]:
    """Find the peer's best setting, then time both in turn."""
    trials: list[dict[str, Any]] = []
    seen: list[Answers] = []
    task.ours(model)  # warm-up: first calls load and choose kernels
    for size in SIZES[:1] if quick else SIZES:
        for by_length in (True, False):
            seconds, answers = clock.measure(partial(task.peer, model, size, by_length))
            trials.append({"size": size, "by_length": by_length, "seconds": round(seconds, 3)})
            seen.append(answers)
            say(f"  generate, {size} rows{', by length' * by_length}: {seconds:.1f} s")
    best = min(trials, key=lambda trial: trial["seconds"])
    times: dict[str, list[float]] = {OURS: [], PEER: []}
    for _ in range(repetitions):
        seconds, ours = clock.measure(partial(task.ours, model))
        times[OURS].append(round(seconds, 3))
        seconds, peer = clock.measure(partial(task.peer, model, best["size"], best["by_length"]))
        times[PEER].append(round(seconds, 3))
    median = {name: statistics.median(found) for name, found in times.items()}
    say(f"  postgrad {median[OURS]:.1f} s, generate {median[PEER]:.1f} s")
    tokens = {OURS: sum(map(len, ours)), PEER: sum(map(len, peer))}
    return {
        "prompts": len(task.prompts),
        "prompt_tokens": sum(map(len, task.prompts)),
        "max_new_tokens": task.max_new_tokens,
        "peer_trials": trials,
        "peer_best": {key: best[key] for key in ("size", "by_length")},
        "seconds": times,
        "prompts_per_second": {n: round(len(task.prompts) / median[n], 2) for n in median},
        "tokens_per_second": {n: round(tokens[n] / median[n], 1) for n in median},
        "ratio": round(median[PEER] / median[OURS], 3),
        "equal": equal_share(ours, peer),
        "peer_equal_to_itself": min(equal_share(peer, answers) for answers in seen),
    }


def equal_share(a: Answers, b: Answers) -> float:
    """Return the share of rows whose answers are the same tokens."""
    return round(sum(x == y for x, y in zip(a, b, strict=True)) / len(a), 4)


def speed_table(measured: Sequence[dict[str, Any]]) -> str:
    """Return the table that people read."""
    lines = [
        ["arm", "prompts", "prompt tok", "generate's best", "prompts/s: generate", "postgrad",
         "tokens/s: generate", "postgrad", "ratio", "equal", "fp32", "generate with itself"],
    ]  # fmt: skip
    for row in measured:
        best, rate, tokens = (
            row[k] for k in ("peer_best", "prompts_per_second", "tokens_per_second")
        )
        lines.append(
            [
                row["arm"],
                f"{row['prompts']} prompts",
                f"{row['prompt_tokens'] / row['prompts']:.0f}",
                f"{best['size']}{' sorted' * best['by_length']}",
                f"{rate[PEER]:.2f}",
                f"{rate[OURS]:.2f}",
                f"{tokens[PEER]:.0f}",
                f"{tokens[OURS]:.0f}",
                f"{row['ratio']:.2f}",
                f"{100 * row['equal']:.1f} %",
                f"{100 * row['equal_in_fp32']:.1f} %" if "equal_in_fp32" in row else "",
                f"{100 * row['peer_equal_to_itself']:.1f} %",
            ]
        )
    return table(lines)


def made_dataset(folder: Path) -> tuple[Recipe, Dataset]:
    """Return a recipe and rows of its own, where there is no run."""
    data = rows.write_rows(folder / "short.jsonl", "short", MADE_ROWS, SEED)
    recipe = load_recipe(RECIPE, [f"data.train={data}", "data.test=0.3"])
    return recipe, load_dataset(recipe.data, recipe.seed)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, help="a run: its models and test rows")
    parser.add_argument("--rows", type=int, default=100, help="test rows")
    parser.add_argument("--arms", nargs="*", help="base/zero-shot ...; default: all")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-fp32", action="store_true", help="no equality of answers in float32")
    parser.add_argument("--quick", action="store_true", help="a few rows: proves that it runs")
    parser.add_argument("--out", type=Path, help="the JSON; default: benchmarks/results/...")
    return parser.parse_args()


def main() -> None:
    """Measure, write, print."""
    options = arguments()
    torch.set_num_threads(options.threads)
    if options.quick:
        options.rows, options.repetitions = 4, 1
    clock = choose_clock()
    run = open_run(options.run) if options.run else None
    with tempfile.TemporaryDirectory(prefix="postgrad-speed-") as folder:
        recipe, dataset = (run.config, read_dataset(run)) if run else made_dataset(Path(folder))
    measured: dict[str, dict[str, Any]] = {}
    for precision in (recipe.model.precision, "fp32"):
        if precision == "fp32" and (options.no_fp32 and measured):
            break
        section = recipe.model.model_copy(update={"precision": precision})
        for name, model, counts in models_of(run, recipe.model_copy(update={"model": section})):
            for count in counts:
                arm = f"{name}/few-shot-{count}" if count else f"{name}/zero-shot"
                if options.arms and arm not in options.arms:
                    continue
                task = make_task(recipe, dataset, model, options.rows, count)
                say(f"{arm}, {precision}: {len(task.prompts)} prompts")
                if arm not in measured:
                    found = measure(model, task, clock, options.repetitions, options.quick)
                    measured[arm] = {"arm": arm, **found}
                else:
                    ours, peer = task.ours(model), task.peer(model, **measured[arm]["peer_best"])
                    measured[arm]["equal_in_fp32"] = equal_share(ours, peer)
    document = {
        "benchmark": "generation-speed",
        **circumstances(),
        "clock": clock.name,
        "threads": options.threads,
        "precision": recipe.model.precision,
        "rows_from": recipe.name,
        "quick": options.quick,
        "measured": list(measured.values()),
    }
    path = write_result(document, "generation-speed", options.out)
    say(f"wrote {path}")
    print(speed_table(list(measured.values())))


if __name__ == "__main__":
    main()
