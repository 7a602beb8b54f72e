"""Who is measured and how each is started: postgrad, TRL's SFTTrainer, Unsloth's CPU backend.

Every contender trains the same rows with the same method in a process of its own (`harness.watch`).
Peers live in environments of their own and get a JSON spec (`peers/trl_sft.py` describes it).
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from harness import (
    HERE,
    ContenderError,
    Measured,
    Timing,
    contender_environment,
    peer_python,
    say,
    watch,
)

from postgrad.run import Run, read_json

RECIPE = HERE / "train_speed.yaml"
OURS, DEFAULTS, BEST, UNSLOTH = "postgrad", "TRL defaults", "TRL best", "Unsloth CPU"
CONTENDERS = (OURS, DEFAULTS, BEST, UNSLOTH)
PEERS = {DEFAULTS: "trl", BEST: "trl", UNSLOTH: "unsloth"}
"""Contender -> name of its files below peers/."""
WITHOUT = {"unsloth": ("torchvision",)}
"""Peer -> what it requires and does not need here. The published torchvision is built for a CUDA
torch: beside a CPU torch it does not load, and Unsloth then refuses to start; without it, it runs.
"""
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
Method = Literal["lora", "full"]


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to run a peer."""

    sft: dict[str, Any] = field(default_factory=dict)
    """Arguments of SFTConfig that differ from its defaults."""
    dtype: str | None = None
    """Precision in which the weights are loaded; None = the peer's default."""
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
    peers: Mapping[str, Path]
    """Peer -> the Python of its environment; a peer that cannot be installed is not in it."""
    counter: Iterator[int]

    def place(self, name: str) -> Path:
        """Return a new path in the working folder, which may hold those of an earlier run."""
        paths = (self.folder / f"{number:03d}-{name}" for number in self.counter)
        return next(path for path in paths if not path.exists())

    def measure(
        self, contender: str, data: Path, method: Method, setting: Setting, timing: Timing
    ) -> Measured:
        """Measure one contender on the rows in `data`; `setting` is for peers only.

        Raises:
            ContenderError: it does not train.
        """
        if contender == OURS:
            return self.postgrad(data, method, timing)
        return self.peer(PEERS[contender], data, method, setting, timing)

    def postgrad(self, data: Path, method: Method, timing: Timing) -> Measured:
        """Measure `postgrad train` with the defaults of this project."""
        run = self.place("postgrad")
        command = [
            *(sys.executable, "-m", "postgrad", "train", RECIPE, "--out", run),
            *(f"data.train={data}", f"model.base={self.model}", f"model.adapt={{kind: {method}}}"),
        ]
        log = run.with_suffix(".log")
        found = watch(command, run / "metrics.jsonl", timing, log, contender_environment())
        return replace(found, facts=_facts(Run(run)))

    def peer(
        self, name: str, data: Path, method: Method, setting: Setting, timing: Timing
    ) -> Measured:
        """Measure a peer as `setting` says."""
        spec = self.place(f"{name}.json")
        metrics, log = spec.with_suffix(".jsonl"), spec.with_suffix(".log")
        content = {
            **asdict(setting),
            "model": str(self.model),
            "rows": str(data),
            "metrics": str(metrics),
            "output": str(spec.with_suffix("")),
            **({"lora": LORA} if method == "lora" else {}),
        }
        spec.write_text(json.dumps(content), encoding="utf-8")
        command = [self.peers[name], HERE / "peers" / f"{name}_sft.py", spec]
        return watch(command, metrics, timing, log, contender_environment())


def environments(contenders: Sequence[str]) -> tuple[dict[str, Path], dict[str, str]]:
    """Make the peers' environments; returns peer -> Python, and peer -> why there is none."""
    found: dict[str, Path] = {}
    missing: dict[str, str] = {}
    for name in dict.fromkeys(PEERS[c] for c in contenders if c in PEERS):
        try:
            found[name] = peer_python(
                HERE / "peers" / f"{name}-requirements.txt", WITHOUT.get(name, ())
            )
        except ContenderError as error:
            say(f"{name}: {error}")
            missing[name] = last_line(error)
    return found, missing


def last_line(error: BaseException) -> str:
    """Return the last line of an error: the reason, without the log around it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


def _facts(run: Run) -> dict[str, Any]:
    train, adapt = run.config.train, run.config.model.adapt
    checks = {check["name"]: check for check in read_json(run.preflight_path)["checks"]}
    return {
        "threads": train.threads,
        "tokens_per_batch": train.tokens_per_batch,
        "micro_batch_tokens": train.micro_batch_tokens,
        "precision": run.config.model.precision,
        "packing": checks["packing-isolation"]["data"]["packed"],
        "adapt": adapt.model_dump(mode="json"),
    }
