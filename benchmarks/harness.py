"""What the benchmarks share: contenders in their own processes, the peer's environment, results.

A contender appends a JSON line per optimizer step to a file: `step`, `tokens` (so far, without
padding), `seconds` (so far) and the supervised tokens of the step. It is watched from outside, the
same for everyone: started, warmed up, timed, its memory read, ended.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from postgrad.machine import hardware, versions
from postgrad.sources import cache_directory

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
POLL_SECONDS = 0.2
ENDING_SECONDS = 120.0
HOPELESS_SECONDS = 3.0
"""Nobody is broken off before so much training: the first step is never typical."""


class ContenderError(RuntimeError):
    """A contender ended before it was measured."""


class HopelessError(ContenderError):
    """A contender was broken off because it is far slower than another."""


@dataclass(frozen=True, slots=True)
class Timing:
    """How long a contender is watched."""

    warmup_steps: int
    """Optimizer steps before the clock starts, at most."""
    seconds: float
    """Training time after them, at least."""
    least_steps: int
    """Optimizer steps after them, at least."""
    limit_seconds: float = 1800.0
    """After this long from the start it is given up."""
    warmup_seconds: float = math.inf
    """A step that ends after so much training is the last that does not count."""
    hopeless_rate: float = 0.0
    """Broken off when it makes fewer tokens per second than this, its first seconds included."""

    def uncounted(self, lines: Sequence[Mapping[str, Any]]) -> int | None:
        """Return how many of the steps were warm-up; None when the warm-up goes on."""
        for number, line in enumerate(lines, 1):
            if number >= self.warmup_steps or line["seconds"] >= self.warmup_seconds:
                return number
        return None

    def enough(self, lines: Sequence[Mapping[str, Any]]) -> bool:
        """Return whether enough steps and seconds were timed."""
        uncounted = self.uncounted(lines)
        if uncounted is None or len(lines) < uncounted + self.least_steps:
            return False
        return bool(lines[-1]["seconds"] - lines[uncounted - 1]["seconds"] >= self.seconds)

    def hopeless(self, lines: Sequence[Mapping[str, Any]]) -> bool:
        """Return whether it need not be watched any longer."""
        if not lines or lines[-1]["seconds"] < HOPELESS_SECONDS:
            return False
        return bool(lines[-1]["tokens"] < self.hopeless_rate * lines[-1]["seconds"])


@dataclass(frozen=True, slots=True)
class Measured:
    """One contender in one process."""

    steps: int
    tokens: int
    """Real tokens of the timed steps: no padding."""
    supervised: int
    """Of these, tokens that count in the loss."""
    seconds: float
    peak_memory_bytes: int | None
    """Highest resident size of the process from its start to its end; None where /proc is not."""
    load_before: float
    """Load average of the machine over the minute before: near zero on a quiet one."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the contender says about itself."""

    @property
    def tokens_per_second(self) -> float:
        """Real tokens per second of training."""
        return self.tokens / self.seconds

    @property
    def supervised_per_second(self) -> float:
        """Supervised tokens per second of training."""
        return self.supervised / self.seconds

    def row(self) -> dict[str, Any]:
        """Return it for the JSON of results."""
        return {
            "tokens_per_second": round(self.tokens_per_second, 2),
            "supervised_tokens_per_second": round(self.supervised_per_second, 2),
            "peak_memory_bytes": self.peak_memory_bytes,
            "steps": self.steps,
            "tokens": self.tokens,
            "supervised_tokens": self.supervised,
            "seconds": round(self.seconds, 3),
            "load_before": self.load_before,
            **self.facts,
        }


def watch(
    command: Sequence[str | Path],
    metrics: Path,
    timing: Timing,
    log: Path,
    environment: Mapping[str, str],
) -> Measured:
    """Start a contender, let it warm up, time it, end it.

    Raises:
        ContenderError: it ended or was given up before enough steps were made.
    """
    load = os.getloadavg()[0]
    began = time.monotonic()
    peak: int | None = None
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [str(part) for part in command], stdout=file, stderr=file, env=dict(environment)
        )
    try:
        while process.poll() is None:
            peak = _highest(peak, process.pid)
            lines = _steps(metrics)
            if timing.enough(lines):
                break
            if timing.hopeless(lines):
                rate = lines[-1]["tokens"] / lines[-1]["seconds"]
                raise HopelessError(f"broken off at {rate:.0f} tokens/s")
            if time.monotonic() - began > timing.limit_seconds:
                break
            time.sleep(POLL_SECONDS)
    finally:
        _end(process)
    lines = _steps(metrics)
    uncounted = timing.uncounted(lines) or len(lines)
    timed_lines = lines[uncounted:]
    if len(timed_lines) < timing.least_steps:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise ContenderError(f"{len(lines)} steps, exit code {process.returncode}; {log}:\n{tail}")
    first, last = lines[uncounted - 1], lines[-1]
    return Measured(
        steps=len(timed_lines),
        tokens=last["tokens"] - first["tokens"],
        supervised=sum(line["supervised"] for line in timed_lines),
        seconds=last["seconds"] - first["seconds"],
        peak_memory_bytes=peak,
        load_before=load,
        facts=_facts(metrics),
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines, leaving out one that is being written."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _steps(path: Path) -> list[dict[str, Any]]:
    """Return the lines of optimizer steps; postgrad's names are translated."""
    lines = []
    for line in read_lines(path):
        supervised = line.get("supervised", line.get("train/supervised_tokens"))
        if supervised is not None:
            lines.append({**line, "supervised": supervised})
    return lines


def _facts(path: Path) -> dict[str, Any]:
    return next((line for line in read_lines(path) if "step" not in line), {})


def _highest(peak: int | None, process: int) -> int | None:
    """Return the larger of `peak` and the process's highest resident size so far."""
    with contextlib.suppress(OSError, ValueError):
        status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
        found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
        if found:
            return max(peak or 0, int(found.group(1)) * 1024)
    return peak


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def contender_environment() -> dict[str, str]:
    """Return the variables that every contender gets: offline, one tokenizer process."""
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
    }


def peer_python(requirements: Path, without: Sequence[str] = ()) -> Path:
    """Return the Python of the peer's own environment; makes it in the cache the first time.

    It gets the very build of torch that runs here, so that both sides multiply with the same
    library and no other build (of several GB, for CUDA) is ever fetched in its place. Packages in
    `without` are taken out again.

    Raises:
        ContenderError: pip cannot install it; pip's last words are in the message.
    """
    torch = f"torch=={metadata.version('torch')}"
    text = requirements.read_text(encoding="utf-8") + torch + sys.version
    key = hashlib.sha256(text.encode()).hexdigest()[:10]
    folder = cache_directory() / "benchmarks" / f"{requirements.stem.partition('-')[0]}-{key}"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        say(f"making the peer's environment in {folder}")
        subprocess.run([sys.executable, "-m", "venv", folder], check=True, stdout=sys.stderr)
        install = [python, "-m", "pip", "install", "--quiet", "-r", requirements, torch]
        found = subprocess.run(install, capture_output=True, text=True)
        if found.returncode:
            tail = "\n".join(found.stderr.splitlines()[-15:])
            raise ContenderError(f"pip cannot install {requirements.name} with {torch}:\n{tail}")
        if without:
            remove = [python, "-m", "pip", "uninstall", "--quiet", "--yes", *without]
            subprocess.run(remove, check=True, stdout=sys.stderr)
        (folder / "complete").touch()
    return python


def frozen(python: Path) -> dict[str, str]:
    """Return name -> version of everything installed in an environment."""
    command = [python, "-m", "pip", "list", "--format", "json"]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    return {row["name"]: row["version"] for row in json.loads(found.stdout)}


def circumstances() -> dict[str, Any]:
    """Return date, commit, hardware and versions: what a figure means nothing without."""
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip() or None,
        "hardware": hardware(),
        "versions": versions(),
    }


def write_result(document: Mapping[str, Any], name: str, out: Path | None) -> Path:
    """Write results/<date>-<hardware>-<name>.json, or `out`."""
    path = out or RESULTS / f"{document['date']}-{hardware_slug(document['hardware'])}-{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def hardware_slug(machine: Mapping[str, Any]) -> str:
    """Return cores and processor as part of a file name.

    >>> hardware_slug({"processor": "Intel(R) Xeon(R) Processor @ 2.10GHz", "cores": 2})
    'xeon-2-cores'
    """
    noise = r"\((r|tm)\)|@.*|\b(intel|amd|processor|cpu|[0-9]+-core)\b"
    words = re.findall(r"[a-z0-9]+", re.sub(noise, " ", machine["processor"].lower()))
    return "-".join([*words, str(machine["cores"]), "cores"])


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as text with aligned columns, the first row as heading."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def say(text: str) -> None:
    """Tell people what happens, on stderr."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)
