"""postgrad against TRL's SFTTrainer: same rows, same model, same adapter, one machine, one run.

Usage: python benchmarks/train_speed.py [--quick]. README.md beside this file says what is measured,
how, and what is not. Prints a table last and writes benchmarks/results/<date>-<hardware>-....json.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import loss_curves
import rows
from harness import (
    HERE,
    ContenderError,
    Measured,
    Timing,
    circumstances,
    contender_environment,
    frozen,
    peer_python,
    say,
    table,
    watch,
    write_result,
)

from postgrad.config import LoraConfig, load_recipe
from postgrad.model.load import load_tokenizer, model_directory
from postgrad.run import Run, read_json

RECIPE = HERE / "train_speed.yaml"
ROWS = 4000
SEED = 7
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
OURS, DEFAULTS, BEST = "postgrad", "TRL defaults", "TRL best"


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to run TRL."""

    sft: dict[str, Any] = field(default_factory=dict)
    """Arguments of SFTConfig that differ from its defaults."""
    dtype: str = "float32"
    """Precision in which the frozen weights are loaded: TRL's default is float32."""
    threads: int | None = None
    """CPU threads; None = torch's default, all cores."""

    def with_arguments(self, **sft: Any) -> "Setting":
        """Return this setting with more arguments of SFTConfig."""
        return replace(self, sft={**self.sft, **sft})


@dataclass(frozen=True, slots=True)
class Bench:
    """What all measurements of one run share."""

    folder: Path
    model: Path
    peer: Path
    """Python of TRL's environment."""
    timing: Timing
    tuning: Timing
    counter: Iterator[int]

    def place(self, name: str) -> Path:
        """Return a new path in the working folder."""
        return self.folder / f"{next(self.counter):03d}-{name}"

    def postgrad(self, data: Path) -> Measured:
        """Measure `postgrad train` with the defaults of this project."""
        run = self.place("postgrad")
        command = [
            *(sys.executable, "-m", "postgrad", "train", RECIPE, "--out", run),
            *(f"data.train={data}", f"model.base={self.model}"),
        ]
        log = run.with_suffix(".log")
        metrics = run / "metrics.jsonl"
        found = watch(command, metrics, self.timing, log, contender_environment())
        return replace(found, facts=_facts(Run(run)))

    def trl(self, data: Path, setting: Setting, timing: Timing | None = None) -> Measured:
        """Measure SFTTrainer as `setting` says."""
        spec = self.place("trl.json")
        metrics, log = spec.with_suffix(".jsonl"), spec.with_suffix(".log")
        content = {
            **asdict(setting),
            "model": str(self.model),
            "rows": str(data),
            "metrics": str(metrics),
            "output": str(spec.with_suffix("")),
            "lora": LORA,
        }
        spec.write_text(json.dumps(content), encoding="utf-8")
        command = [self.peer, HERE / "peers" / "trl_sft.py", spec]
        return watch(command, metrics, timing or self.timing, log, contender_environment())


def _facts(run: Run) -> dict[str, Any]:
    train, lora = run.config.train, run.config.model.adapt
    assert isinstance(lora, LoraConfig)
    checks = {check["name"]: check for check in read_json(run.preflight_path)["checks"]}
    return {
        "threads": train.threads,
        "tokens_per_batch": train.tokens_per_batch,
        "micro_batch_tokens": train.micro_batch_tokens,
        "precision": run.config.model.precision,
        "packing": checks["packing-isolation"]["data"]["packed"],
        "lora": {"r": lora.r, "lora_alpha": lora.lora_alpha, "targets": lora.target_modules},
    }


def best_setting(bench: Bench, data: Path, longest: int, quick: bool) -> tuple[Setting, list[Any]]:
    """Find TRL's fastest setting, one choice after the other; returns it and every trial."""
    trials: list[dict[str, Any]] = []
    best, fastest = Setting(), 0.0
    plain = Setting({"gradient_checkpointing": False})
    for name, options in _choices(longest, quick):
        start = best if best.sft else plain
        for label, change in options:
            setting = change(start)
            trial: dict[str, Any] = {"choice": name, "option": label, **asdict(setting)}
            trials.append(trial)
            try:
                found = bench.trl(data, setting, bench.tuning)
            except ContenderError as error:
                trial["error"] = str(error).splitlines()[-1]
                say(f"  {name}: {label}: does not run: {error}")
                continue
            trial |= found.row()
            exact = found.facts.get("isolated") is not False
            rate = found.tokens_per_second
            say(f"  {name}: {label}: {rate:.0f} tokens/s{'' if exact else ', but not exact'}")
            if exact and rate > fastest:
                best, fastest = setting, rate
    if not best.sft:
        raise SystemExit("TRL ran with none of the settings; see the trials' logs")
    return best, trials


def _choices(longest: int, quick: bool) -> list[tuple[str, list[tuple[str, Any]]]]:
    """Return the choices in order: each option changes the best setting found so far."""

    def precision(dtype: str, autocast: bool) -> Any:
        return lambda s: replace(s.with_arguments(bf16=autocast), dtype=dtype)

    def grouped(size: int) -> Any:
        return lambda s: s.with_arguments(
            per_device_train_batch_size=size, train_sampling_strategy="group_by_length"
        )

    def packed(length: int) -> Any:
        return lambda s: s.with_arguments(
            packing=True,
            max_length=length,
            per_device_train_batch_size=1,
            train_sampling_strategy="random",
        )

    if quick:
        return [("precision", [("bf16 autocast, bf16 weights", precision("bfloat16", True))])]
    row = -(-longest // 256) * 256
    return [
        (
            "precision",
            [
                ("bf16 autocast, fp32 weights", precision("float32", True)),
                ("bf16 autocast, bf16 weights", precision("bfloat16", True)),
                ("bf16 throughout", precision("bfloat16", False)),
                ("fp32 throughout", precision("float32", False)),
            ],
        ),
        ("rows of similar length", [(f"{n} rows a step", grouped(n)) for n in (1, 2, 4, 16)]),
        ("packing", [(f"rows of {n} tokens", packed(n)) for n in (row, 2 * row)]),
        ("threads", [("1 thread", lambda s: replace(s, threads=1))]),
    ]


def machine_bound(model: Path) -> dict[str, Any]:
    """Measure the model's matrix products in a process of their own."""
    command = [sys.executable, HERE / "machine_bound.py", model]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(found.stdout)
    return result


def bound_tokens_per_second(bound: dict[str, Any], supervised_share: float) -> float:
    """Return the real tokens per second that the matrix products alone would allow."""
    head = bound["head_seconds_per_supervised_token"] * supervised_share
    return float(
        1 / (bound["frozen_seconds_per_token"] + bound["adapter_seconds_per_token"] + head)
    )


def row_lengths(data: Path, model: Path) -> list[int]:
    """Return the tokens of each row under the model's own chat template."""
    tokenizer = load_tokenizer(model)
    lines = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    return [
        len(tokenizer.apply_chat_template(line["prompt"] + line["completion"])["input_ids"])
        for line in lines
    ]


def measure_kind(
    bench: Bench, kind: str, data: Path, repetitions: int, quick: bool
) -> dict[str, Any]:
    """Measure every contender on one set of rows, interleaved, the machine's bound between them."""
    lengths = row_lengths(data, bench.model)
    say(f"{kind}: {len(lengths)} rows, mean {statistics.mean(lengths):.0f} tokens")
    say("looking for TRL's best setting")
    best, trials = best_setting(bench, data, max(lengths), quick)
    say(f"TRL best: {asdict(best)}")
    runs: list[dict[str, Any]] = []
    bounds: list[dict[str, Any]] = []
    for repetition in range(repetitions):
        bounds.append(machine_bound(bench.model))
        for name, measure in (
            (OURS, lambda: bench.postgrad(data)),
            (DEFAULTS, lambda: bench.trl(data, Setting())),
            (BEST, lambda: bench.trl(data, best)),
        ):
            found = measure()
            say(f"  {name}: {found.tokens_per_second:.0f} tokens/s (load {found.load_before:.1f})")
            runs.append({"contender": name, "repetition": repetition, **found.row()})
    return {
        "kind": kind,
        "rows": {
            "count": len(lengths),
            "mean_tokens": round(statistics.mean(lengths), 1),
            "median_tokens": statistics.median(lengths),
            "p95_tokens": sorted(lengths)[int(0.95 * len(lengths))],
            "longest_tokens": max(lengths),
        },
        "trl_best": asdict(best),
        "trl_trials": trials,
        "machine_bound": bounds,
        "runs": runs,
        "summary": summarise(runs, bounds),
    }


def summarise(runs: Sequence[dict[str, Any]], bounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return median and spread for each contender, and shares of the machine's bound."""
    ours = [run for run in runs if run["contender"] == OURS]
    share = sum(run["supervised_tokens"] for run in ours) / sum(run["tokens"] for run in ours)
    bound = statistics.median(bound_tokens_per_second(b["bf16"], share) for b in bounds)
    summary: dict[str, Any] = {
        "supervised_share": round(share, 4),
        "bound_tokens_per_second": round(bound, 1),
        "bf16_gflops": round(statistics.median(b["bf16"]["gflops"] for b in bounds), 1),
        "fp32_gflops": round(statistics.median(b["fp32"]["gflops"] for b in bounds), 1),
        "contenders": {},
    }
    for name in (OURS, DEFAULTS, BEST):
        mine = [run for run in runs if run["contender"] == name]
        rates = [run["tokens_per_second"] for run in mine]
        supervised = [run["supervised_tokens_per_second"] for run in mine]
        peaks = [run["peak_memory_bytes"] for run in mine if run["peak_memory_bytes"]]
        summary["contenders"][name] = {
            "tokens_per_second": statistics.median(rates),
            "lowest": min(rates),
            "highest": max(rates),
            "supervised_tokens_per_second": statistics.median(supervised),
            "peak_memory_bytes": statistics.median(peaks) if peaks else None,
            "share_of_bound": round(statistics.median(rates) / bound, 4),
        }
    return summary


def speed_table(measured: Sequence[dict[str, Any]]) -> str:
    """Return the table that people read."""
    lines = [
        ["rows", "trainer", "real tok/s", "lowest-highest", "supervised tok/s", "peak memory",
         "of bf16 bound", "x TRL defaults", "x TRL best"],
    ]  # fmt: skip
    for part in measured:
        summary = part["summary"]
        found = summary["contenders"]
        for name, row in found.items():
            rate, memory = row["tokens_per_second"], row["peak_memory_bytes"]
            lines.append(
                [
                    f"{part['kind']}, mean {part['rows']['mean_tokens']:.0f}",
                    name,
                    f"{rate:.0f}",
                    f"{row['lowest']:.0f}-{row['highest']:.0f}",
                    f"{row['supervised_tokens_per_second']:.0f}",
                    f"{memory / 1e9:.2f} GB" if memory else "?",
                    f"{100 * row['share_of_bound']:.0f} %",
                    f"{rate / found[DEFAULTS]['tokens_per_second']:.1f}",
                    f"{rate / found[BEST]['tokens_per_second']:.1f}",
                ]
            )
        bound = f"{summary['bound_tokens_per_second']:.0f}"
        lines.append([lines[-1][0], "GEMM bound, bf16", bound, "", "", "", "100 %", "", ""])
    return table(lines)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few steps: proves that it runs")
    parser.add_argument("--kinds", nargs="*", default=list(rows.KINDS), choices=list(rows.KINDS))
    parser.add_argument("--rows", type=Path, help="measure this JSONL instead of made rows")
    parser.add_argument("--model", help="hub id, directory or package URI; default: the recipe's")
    parser.add_argument("--repetitions", type=int, default=3, help="0 = loss curves only")
    parser.add_argument("--seconds", type=float, default=75, help="timed, for each contender")
    parser.add_argument("--loss-steps", type=int, default=50, help="0 = no loss curves")
    parser.add_argument("--out", type=Path, help="the JSON; default: benchmarks/results/...")
    parser.add_argument("--keep", type=Path, help="working folder with all logs, kept")
    return parser.parse_args()


def main() -> None:
    """Measure, write, print."""
    options = arguments()
    base = options.model or load_recipe(RECIPE).model.base
    peer = peer_python(HERE / "peers" / "trl-requirements.txt")
    with tempfile.TemporaryDirectory(prefix="postgrad-speed-") as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        timing = Timing(2, options.seconds, 3)
        tuning = Timing(1, 10, 2)
        if options.quick:
            timing, tuning = Timing(1, 1, 1), Timing(1, 1, 1)
            options.repetitions = min(options.repetitions, 1)
            options.loss_steps = min(options.loss_steps, 2)
        bench = Bench(
            folder, model_directory(base), peer, timing, tuning, iter(range(1, sys.maxsize))
        )
        data = {kind: rows.write_rows(folder / f"{kind}.jsonl", kind, ROWS, SEED)
                for kind in options.kinds}  # fmt: skip
        if options.rows:
            data = {options.rows.stem: rows.copy_rows(options.rows, folder / "given.jsonl")}
        document = {
            "benchmark": "train-speed",
            **circumstances(),
            "peer_versions": frozen(peer),
            "model": Path(base).name if Path(base).exists() else base,
            "lora": LORA,
            "settings": {"timing": asdict(timing), "repetitions": options.repetitions},
            "quick": options.quick,
        }
        measured = [
            measure_kind(bench, kind, path, options.repetitions, options.quick)
            for kind, path in data.items()
            if options.repetitions
        ]
        document["measured"] = measured
        if options.loss_steps and data:
            first = next(iter(data.values()))
            document["loss_curves"] = loss_curves.compare(bench, first, options.loss_steps)
    path = write_result(document, "train-speed", options.out)
    if measured:
        print(speed_table(measured))
    if "loss_curves" in document:
        print(loss_curves.text(document["loss_curves"]))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
