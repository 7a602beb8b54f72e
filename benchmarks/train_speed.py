"""postgrad against TRL and Unsloth: same rows, same model, same method, one machine, one run.

Usage: python benchmarks/train_speed.py [--quick]. README.md beside this file says what is measured,
how, and what is not. Prints the table and the goals last; writes benchmarks/results/<date>-....json
after every measurement, so that a run that was stopped goes on with --resume FILE.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import peer_search
import rows
from contenders import (
    CONTENDERS,
    LORA,
    OURS,
    PEERS,
    RECIPE,
    UNSLOTH,
    Bench,
    Method,
    Setting,
    environments,
    last_line,
)
from harness import (
    HERE,
    ContenderError,
    Timing,
    circumstances,
    frozen,
    say,
    write_result,
)
from speed_table import failures, goals_table, speed_table, summarise

from postgrad.config import load_recipe
from postgrad.model.load import load_tokenizer, model_directory
from postgrad.run import read_json

ROWS, TRIAL_ROWS = 2000, 500
SEED = 7
SEARCHED = peer_search.SEARCHED
TRIAL = Timing(1, 8, 1, limit_seconds=300)
QUICK = Timing(1, 1, 1)


@dataclass(frozen=True, slots=True)
class Plan:
    """How often and how long each contender of a part is timed."""

    repetitions: int
    timing: Timing


def plan_of(method: Method, repetitions: int, seconds: float, quick: bool) -> Plan:
    """Return the plan: full tuning is timed for a shorter time."""
    if quick:
        return Plan(min(repetitions, 1), QUICK)
    full = method == "full"
    timing = Timing(2, 0.5 * seconds if full else seconds, 1 if full else 2, warmup_seconds=10)
    return Plan(repetitions, timing)


@dataclass(frozen=True, slots=True)
class Speed:
    """One run of this benchmark: what is measured, and the document that grows."""

    bench: Bench
    document: dict[str, Any]
    path: Path
    contenders: Sequence[str]
    quick: bool

    def save(self) -> None:
        """Write what is known."""
        for part in self.document["measured"]:
            part["summary"] = summarise(part)
        write_result(self.document, "train-speed", self.path)

    def part(self, method: Method, kind: str, data: Path) -> dict[str, Any]:
        """Return the part of the document for a method and rows; adds it when it is new."""
        part: dict[str, Any]
        for part in self.document["measured"]:
            if (part["method"], part["kind"]) == (method, kind):
                return part
        part = {"method": method, "kind": kind, "rows": row_facts(data, self.bench.model),
                "failed": {}, "machine_bound": [], "runs": []}  # fmt: skip
        self.document["measured"].append(part)
        return part

    def setting(self, contender: str, part: dict[str, Any], trial_data: Path) -> Setting:
        """Return a peer's setting: none, the one found before, or the one that is found now.

        Raises:
            ContenderError: it trains with none.
        """
        if contender not in SEARCHED:
            return Setting()
        method, kind = part["method"], part["kind"]
        known = self.document["found"]
        key = f"{contender}, {method}, {kind}"
        if key not in known:
            say(f"looking for the fastest setting: {key}")
            began = time.monotonic()
            start, choices = peer_search.choices_of(
                contender,
                method,
                part["rows"]["longest_tokens"],
                self.quick,
                precision=known_setting(known, f"{contender}, {method}, "),
                layout=known_setting(known, f"{contender}, lora, {kind}"),
            )
            timing = QUICK if self.quick else TRIAL
            found = peer_search.search(
                lambda setting, least: self.bench.measure(
                    contender, trial_data, method, setting, replace(timing, hopeless_rate=least)
                ),
                start,
                choices,
            )
            known[key] = {**found, "seconds": round(time.monotonic() - began, 1)}
            self.save()
            say(f"{key}: {found['setting']}")
        return Setting(**known[key]["setting"])

    def measure(self, method: Method, kind: str, data: Path, trial_data: Path, plan: Plan) -> None:
        """Measure every contender on one method and set of rows, interleaved, with the bound."""
        part = self.part(method, kind, data)
        part["plan"] = asdict(plan)
        say(f"{method}, {kind}: {part['rows']}")
        for repetition in range(plan.repetitions):
            if len(part["machine_bound"]) <= repetition:
                precisions = ["bf16", "int8", "fp32"] if repetition == 0 else ["bf16", "int8"]
                part["machine_bound"].append(machine_bound(self.bench.model, precisions))
            done = {(run["contender"], run["repetition"]) for run in part["runs"]}
            for contender in self.contenders:
                if contender in part["failed"] or (contender, repetition) in done:
                    continue
                if contender == UNSLOTH and method == "full":
                    part["failed"][contender] = "not measured: compared with LoRA only"
                    continue
                try:
                    setting = self.setting(contender, part, trial_data)
                    found = self.bench.measure(contender, data, method, setting, plan.timing)
                except ContenderError as error:
                    say(f"  {contender}: {error}")
                    part["failed"][contender] = f"does not train: {last_line(error)}"
                else:
                    rate, load = found.tokens_per_second, found.load_before
                    say(f"  {contender}: {rate:.0f} tokens/s (load {load:.1f})")
                    part["runs"].append(
                        {"contender": contender, "repetition": repetition, **found.row()}
                    )
                self.save()
        self.save()


def known_setting(found: Mapping[str, Any], prefix: str) -> Setting | None:
    """Return the first setting found under a key that begins with `prefix`."""
    keys = (key for key in found if key.startswith(prefix))
    return next((Setting(**found[key]["setting"]) for key in keys), None)


def machine_bound(model: Path, precisions: Sequence[str]) -> dict[str, Any]:
    """Measure the model's matrix products in a process of their own."""
    command = [sys.executable, HERE / "machine_bound.py", model, *precisions]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(found.stdout)
    return result


def row_facts(data: Path, model: Path) -> dict[str, Any]:
    """Return how long the rows are, in tokens, under the model's own chat template."""
    tokenizer = load_tokenizer(model)
    lines = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    lengths = sorted(
        len(tokenizer.apply_chat_template(line["prompt"] + line["completion"])["input_ids"])
        for line in lines
    )
    return {
        "count": len(lengths),
        "mean_tokens": round(statistics.mean(lengths), 1),
        "median_tokens": statistics.median(lengths),
        "p95_tokens": lengths[int(0.95 * len(lengths))],
        "longest_tokens": lengths[-1],
    }


def read_result(path: Path, hardware: Mapping[str, Any]) -> dict[str, Any]:
    """Read an earlier result; the machine must be of the same kind, its memory to the byte not."""
    document: dict[str, Any] = read_json(path)
    for key in ("processor", "features", "cores"):
        if document["hardware"][key] != hardware[key]:
            raise SystemExit(f"{path} was measured on other hardware: {document['hardware']}")
    return document


def found_before(path: Path, hardware: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that an earlier result found."""
    found: dict[str, Any] = read_result(path, hardware)["found"]
    return found


def resumed(path: Path, new: Mapping[str, Any]) -> dict[str, Any]:
    """Return the document of a stopped run of this very measurement; who failed is tried again."""
    document = read_result(path, new["hardware"])
    for key in ("benchmark", "model", "quick", "settings"):
        if document[key] != new[key]:
            raise SystemExit(f"{path}: {key} was {document[key]}, not {new[key]}")
    for part in document["measured"]:
        part["failed"] = {}
    if document["commit"] != new["commit"]:
        say(f"{path} was begun at commit {document['commit']}")
    return document


def arguments() -> argparse.Namespace:
    """Read the command line."""
    methods = list(get_args(Method))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few steps: proves that it runs")
    parser.add_argument(
        "--kinds", nargs="+", choices=list(rows.KINDS),
        help="of rows; default: all, full tuning on chat rows only",
    )  # fmt: skip
    parser.add_argument("--methods", nargs="+", default=methods, choices=methods)
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--rows", type=Path, help="measure this JSONL instead of made rows")
    parser.add_argument("--model", help="hub id, directory or package URI")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20, help="timed, for each contender")
    parser.add_argument("--best", type=Path, help="a result whose peer settings are reused")
    parser.add_argument("--resume", type=Path, help="go on with this result of a stopped run")
    parser.add_argument("--out", type=Path, help="the JSON; default: benchmarks/results/...")
    parser.add_argument("--keep", type=Path, help="working folder with all logs, kept")
    return parser.parse_args()


def written_rows(options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Path, Path]]:
    """Write the rows; yields kind, file, and a shorter file for trials."""
    if options.rows:
        sources = [(options.rows.stem, rows.copy_rows(options.rows, folder / "given.jsonl"))]
    else:
        sources = [
            (kind, rows.write_rows(folder / f"{kind}.jsonl", kind, ROWS, SEED))
            for kind in options.kinds or rows.KINDS
        ]
    for kind, path in sources:
        trial = folder / f"{path.stem}-trial.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        trial.write_text("".join(lines[:TRIAL_ROWS]), encoding="utf-8")
        yield kind, path, trial


def begin(options: argparse.Namespace, base: str) -> tuple[dict[str, Any], dict[str, Path]]:
    """Return the document to start from, and peer -> the Python of its environment."""
    python, missing = environments(options.contenders)
    document: dict[str, Any] = {
        "benchmark": "train-speed",
        **circumstances(),
        "peer_versions": {name: frozen(path) for name, path in python.items()},
        "missing": missing,
        "model": Path(base).name if Path(base).exists() else base,
        "lora": LORA,
        "settings": {"seconds": options.seconds, "repetitions": options.repetitions,
                     "rows": options.rows.stem if options.rows else ROWS},
        "quick": options.quick,
        "found": {},
        "measured": [],
    }  # fmt: skip
    if options.resume:
        document = {**resumed(options.resume, document), "missing": missing}
    if options.best:
        document["found"] |= found_before(options.best, document["hardware"])
    return document, python


def main() -> None:
    """Measure, write, print."""
    options = arguments()
    base = options.model or load_recipe(RECIPE).model.base
    began = time.monotonic()
    document, python = begin(options, base)
    path = write_result(document, "train-speed", options.resume or options.out)
    chosen = [name for name in CONTENDERS if name in options.contenders]
    contenders = [name for name in chosen if name == OURS or PEERS[name] in python]
    with tempfile.TemporaryDirectory(prefix="postgrad-speed-") as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(folder, model_directory(base), python, iter(range(1, sys.maxsize)))
        speed = Speed(bench, document, path, contenders, options.quick)
        data = list(written_rows(options, folder))
        for method in options.methods:
            plan = plan_of(method, options.repetitions, options.seconds, options.quick)
            for kind, file, trial in data:
                if method == "full" and kind == "short" and not options.kinds:
                    continue
                speed.measure(method, kind, file, trial, plan)
    say(f"{(time.monotonic() - began) / 60:.0f} minutes")
    print(speed_table(document["measured"]))
    print(f"\n{goals_table(document['measured'])}\n{failures(document)}")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
