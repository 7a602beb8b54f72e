"""How fast this machine trains such a model: from its runs, or from a probe in the cache. No torch.

Only what was measured under equal conditions counts: base model, adapter, precision, checkpointing,
processor or GPU, cores, and the versions of postgrad and torch.
"""

import hashlib
import json
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from postgrad.config import Recipe
from postgrad.errors import ConfigError, RunError
from postgrad.estimate import Method, Speed
from postgrad.machine import hardware, versions
from postgrad.run import Run, list_runs, read_json, to_json, write_atomic
from postgrad.sources import cache_directory

FEWEST_STEPS = 10
"""Steps of a run from which its speed is believed."""


def conditions(recipe: Recipe, compute_bytes: int) -> dict[str, Any]:
    """Return what must be equal for a speed measured here to hold for this recipe."""
    found, installed = hardware(), versions()
    model = recipe.model
    return {
        "base": model.base,
        "revision": model.revision,
        "adapt": model.adapt.model_dump(mode="json", exclude={"lora_alpha", "use_rslora"}),
        "compute_bytes": compute_bytes,
        "gradient_checkpointing": recipe.train.gradient_checkpointing,
        "beside_base": recipe.train.kl_weight > 0,
        **{name: found.get(name) for name in ("processor", "cores", "gpu")},
        **{name: installed.get(name) for name in ("postgrad", "torch")},
    }


def recorded_speed(recipe: Recipe, method: Method, root: Path) -> Speed | None:
    """Return the speed of the newest run below `root` that trained under equal conditions."""
    wanted = conditions(recipe, method.compute_bytes)
    for run in reversed(list_runs(root) if root.is_dir() else []):
        try:
            if _conditions_of(run) != wanted or not _same_choices(recipe, run):
                continue
            rate = training_rate(run.read_metrics())
        except (RunError, ConfigError):
            continue  # A damaged run says nothing; `postgrad runs` names it.
        if rate is not None:
            return Speed(rate, "recorded run", str(run.path))
    return None


def _conditions_of(run: Run) -> dict[str, Any] | None:
    record = run.record
    precision = (record.get("train") or {}).get("precision")
    if precision is None:
        return None
    found = conditions(run.config, 4 if precision == "float32" else 2)
    measured, installed = record.get("hardware") or {}, record.get("versions") or {}
    here = {name: measured.get(name) for name in ("processor", "cores", "gpu")}
    return found | here | {name: installed.get(name) for name in ("postgrad", "torch")}


def _same_choices(recipe: Recipe, run: Run) -> bool:
    """Whether the run did as the recipe says where it says something.

    Tokens of a common beginning count in every row and are computed once: with another system
    prompt the same machine has another speed.
    """
    wanted, made = recipe.train, run.config.train
    systems = [
        (r.data.system, r.data.columns and r.data.columns.system) for r in (recipe, run.config)
    ]
    return (
        wanted.threads in ("auto", made.threads)
        and wanted.shared_prefix in ("auto", made.shared_prefix)
        and wanted.base_precision in (made.base_precision, run.recipe.train.base_precision)
        and systems[0] == systems[1]
    )


def training_rate(metrics: list[dict[str, Any]]) -> float | None:
    """Return tokens per second of the steps before which no held-out loss was measured.

    None when they are fewer than `FEWEST_STEPS`. The time of a step that follows an evaluation
    holds that evaluation, so it is left out, and so is the first step, which warms up.
    """
    measured = {line["step"] for line in metrics if "validation/loss" in line}
    lines = [line for line in metrics if "train/loss" in line]
    pairs = [
        (after["tokens"] - before["tokens"], after["seconds"] - before["seconds"])
        for before, after in pairwise(lines)
        if before["step"] not in measured and after["seconds"] > before["seconds"]
    ]
    if len(pairs) < FEWEST_STEPS:
        return None
    return fmean(tokens for tokens, _ in pairs) / fmean(seconds for _, seconds in pairs)


def probe_key(recipe: Recipe, method: Method, mean_length: float) -> str:
    """Return the name under which a probe is kept: its conditions, and sizes to a power of two."""
    micro = recipe.train.micro_batch_tokens
    assert isinstance(micro, int)
    sizes = {"micro_batch": micro.bit_length(), "document": round(mean_length).bit_length()}
    choices = recipe.train.model_dump(include={"threads", "shared_prefix", "base_precision"})
    found = conditions(recipe, method.compute_bytes) | sizes | choices
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


def cached_speed(key: str) -> Speed | None:
    """Return a probe of the cache; None when it was never made."""
    file = _file(key)
    if not file.exists():
        return None
    found = read_json(file)
    return Speed(
        found["tokens_per_second"], "probe", found["detail"], step_seconds=found["step_seconds"]
    )


def keep_speed(key: str, speed: Speed) -> None:
    """Write a probe into the cache."""
    values = {
        "tokens_per_second": speed.tokens_per_second,
        "step_seconds": speed.step_seconds,
        "detail": speed.detail,
    }
    write_atomic(_file(key), to_json(values).encode())


def _file(key: str) -> Path:
    return cache_directory() / "speeds" / f"{key}.json"
