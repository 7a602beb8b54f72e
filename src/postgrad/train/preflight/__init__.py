"""Pre-flight: prove the path on the user's own rows, model and machine, or refuse to train."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from postgrad.config import Recipe
from postgrad.data.lengths import keep_usable
from postgrad.data.render import Renderer, Rendering
from postgrad.errors import ConfigError, PreflightError
from postgrad.keys import nearest
from postgrad.run import Run
from postgrad.train.objective import Objective
from postgrad.train.preflight.model import check_model
from postgrad.train.preflight.rows import check_rows
from postgrad.types import Check

__all__ = [
    "NAMES",
    "check_model",
    "check_rows",
    "may_pack",
    "preflight",
    "refuse",
    "waive",
    "write_checks",
]

NAMES = (
    "rows-render",
    "render-matches-template",
    "content-kept",
    "control-tokens-in-text",
    "message-weights",
    "serving-sends-the-same-prompt",
    "boundary-on-token",
    "stop-token-supervised",
    "bos-count",
    "supervised-tokens-present",
    "supervised-fraction",
    "over-length",
    "untrained-token-ids",
    "context-length",
    "packing-isolation",
    "loss-matches-reference",
    "accumulation-invariance",
    "shared-prefix-matches",
    "eight-bit-near",
    "graphs-match",
    "fits-in-memory",
)
"""Every check made here, in order; those of the data come with the data set."""


def preflight(
    recipe: Recipe,
    renderer: Renderer,
    renderings: Sequence[Rendering],
    data_checks: Sequence[Check],
    model: Any,
    objective: Objective,
    *,
    micro_batch_tokens: int,
    precision: torch.dtype,
) -> tuple[Check, ...]:
    """Run all checks, the cheap ones first; the model is not touched when rows are refused.

    Args:
        recipe: with `auto` values or resolved ones.
        renderer: what made `renderings`.
        renderings: training and validation rows, before `keep_usable`.
        data_checks: the data set's own checks.
        model: as `fit` will get it, adapters attached.
        objective: as `fit` will get it.
        micro_batch_tokens: the resolved size of a forward pass.
        precision: what matrix products are computed in.

    Returns:
        The checks in order, those named in `train.waive` marked; `refuse` raises on the others.
    """
    by_rows = (*data_checks, *check_rows(renderer, renderings, recipe.data))
    checks = waive(by_rows, recipe.train.waive)
    kept, _ = keep_usable(renderings, recipe.data)
    if failed(checks) or not any(r.tokens is not None and r.tokens.supervised for r in kept):
        return checks
    by_model = check_model(
        model,
        objective,
        kept,
        recipe.train,
        micro_batch_tokens=micro_batch_tokens,
        precision=precision,
    )
    return (*checks, *waive(by_model, recipe.train.waive, known=[c.name for c in checks]))


def waive(
    checks: Sequence[Check], names: Sequence[str], known: Sequence[str] = ()
) -> tuple[Check, ...]:
    """Mark the failed checks that the recipe overrules.

    Raises ConfigError for a name that is no check, with the nearest one.
    """
    choices = [*NAMES, *known, *(check.name for check in checks)]
    for name in names:
        if name not in choices:
            near = nearest(name, choices)
            raise ConfigError(
                f"train.waive: there is no check called {name}",
                f"did you mean {near}?" if near else f"choose from {', '.join(NAMES)}",
            )
    return tuple(
        dataclasses.replace(check, waived=not check.passed and check.name in names)
        for check in checks
    )


def failed(checks: Sequence[Check]) -> list[Check]:
    """Return the checks that stand in the way: failed and not waived."""
    return [check for check in checks if not check.passed and not check.waived]


def refuse(checks: Sequence[Check]) -> None:
    """Raise PreflightError naming every check that failed and was not waived; else do nothing."""
    wrong = failed(checks)
    if not wrong:
        return
    lines = []
    for check in wrong:
        rows = f" [{', '.join(check.rows[:5])}{', ...' if check.failures > 5 else ''}]"
        lines.append(f"{check.name}: {check.detail}{rows if check.rows else ''}")
        lines.append(f"    -> {check.remedy}")
    raise PreflightError(
        f"{len(wrong)} of {len(checks)} pre-flight checks refuse to train:\n" + "\n".join(lines),
        "correct them, or overrule one with train.waive: ["
        + ", ".join(check.name for check in wrong)
        + "] (the report will say so)",
    )


def may_pack(checks: Sequence[Check]) -> bool:
    """Return whether several documents may share a row: the verdict of packing-isolation."""
    return any(check.name == "packing-isolation" and check.data["packed"] for check in checks)


def near_in_eight_bits(checks: Sequence[Check]) -> bool:
    """Return the verdict of eight-bit-near; True where nothing is multiplied in 8 bits."""
    return all(check.data["near"] for check in checks if check.name == "eight-bit-near")


def write_checks(run: Run, checks: Sequence[Check]) -> None:
    """Write preflight.json: the verdict and every check."""
    rows = [dataclasses.asdict(check) for check in checks]
    run.write_json(run.preflight_path, {"passed": not failed(checks), "checks": rows})
