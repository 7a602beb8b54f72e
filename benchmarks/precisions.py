"""Do bf16 and int8 cost quality? The same training in float32 and in each, over seeds, paired.

A seed fixes split, order and the adapter's start, so two runs of one seed differ in precision
only. Held-out losses are paired by seed (Student's t interval over seeds); answers are paired by
test row, all seeds together (Tango's interval, exact McNemar test). A precision costs no quality
where both intervals stay inside their margins; an interval that reaches beyond one shows nothing.
"""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import table
from scipy import stats

from postgrad.evaluate.evidence import read_evidence
from postgrad.evaluate.statistics import mcnemar_exact, paired_share_interval
from postgrad.run import open_run

REFERENCE = "fp32"
PRECISIONS = {
    REFERENCE: ("model.precision=fp32",),
    "bf16": ("model.precision=bf16", "train.base_precision=model"),
    "int8": ("model.precision=bf16", "train.base_precision=int8"),
}
"""int8 = bf16, and products with the frozen weights in int8: the default where it is faster."""
CONFIDENCE = 0.95
LOSS_MARGIN = 0.02
"""Nats per supervised token of held-out loss: more than this is a cost."""
ACCURACY_MARGIN = 0.03
"""Share of test rows: losing more than this is a cost."""
REDUCED = (
    "data.limit=800",
    "data.validation=0.1",
    "data.test=0.3",
    "evaluate.limit=240",
    "train.merge=false",
)
"""The task made smaller, with more of it for the test: float32 is several times slower."""


def answers(path: Path) -> dict[str, bool]:
    """Return test row -> right or wrong, of the tuned model of a finished run."""
    run = open_run(path)
    scorer = run.config.evaluate.scorer
    evidence = read_evidence(run, run.config.name, "tuned")
    return {row.example_id: not row.error and bool(row.scores[scorer].passed) for row in evidence}


def paired(a: dict[str, bool], b: dict[str, bool]) -> tuple[int, int, int]:
    """Return rows, rows that only `a` gets right and rows that only `b` gets right."""
    if a.keys() != b.keys():
        raise SystemExit("the two precisions were tested on different rows")
    return len(a), sum(a[k] and not b[k] for k in a), sum(b[k] and not a[k] for k in a)


def compare(
    losses: Sequence[tuple[float, float]], rows: Sequence[tuple[int, int, int]]
) -> dict[str, Any]:
    """Return a precision minus float32 with intervals, and whether it is shown to cost nothing.

    Args:
        losses: Best held-out loss in float32 and in the other, for each seed.
        rows: `paired(float32, other)` for each seed.
    """
    differences = [other - fp32 for fp32, other in losses]
    n, only_fp32, only_other = (sum(each) for each in zip(*rows, strict=True))
    interval = paired_share_interval(only_other, only_fp32, n, CONFIDENCE)
    low, high = mean_interval(differences)
    return {
        "confidence": CONFIDENCE,
        "held_out_loss": {
            "difference": statistics.mean(differences), "low": low, "high": high,
            "seeds": len(differences), "margin": LOSS_MARGIN,
        },
        "accuracy": {
            "difference": (only_other - only_fp32) / n, "low": interval.low, "high": interval.high,
            "p": mcnemar_exact(only_other, only_fp32), "n": n, "only_fp32_right": only_fp32,
            "only_other_right": only_other, "margin": ACCURACY_MARGIN,
        },
        "loss_shown": high is not None and high <= LOSS_MARGIN,
        "accuracy_shown": interval.low >= -ACCURACY_MARGIN,
    }  # fmt: skip


def mean_interval(values: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """Return Student's t interval of a mean; one value says nothing about its own spread."""
    if len(values) < 2:
        return None, None
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values) - half, statistics.mean(values) + half


def verdict(name: str, found: dict[str, Any]) -> str:
    """Return the comparison of a precision with float32 in words."""
    loss, accuracy = found["held_out_loss"], found["accuracy"]
    shown = {True: "shown", False: "NOT shown"}
    interval = "no interval from one seed"
    if loss["low"] is not None:
        interval = f"95 % {loss['low']:+.4f} to {loss['high']:+.4f}, {loss['seeds']} seeds"
    return "\n".join(
        [
            f"held-out loss, {name} minus fp32: {loss['difference']:+.4f} nats per token "
            f"({interval}); "
            f"no more than {loss['margin']:g} higher: {shown[found['loss_shown']]}",
            f"accuracy, {name} minus fp32: {100 * accuracy['difference']:+.1f} points "
            f"(95 % {100 * accuracy['low']:+.1f} to {100 * accuracy['high']:+.1f}, "
            f"{accuracy['n']} rows, p {accuracy['p']:.2g}); "
            f"no more than {100 * accuracy['margin']:g} lower: {shown[found['accuracy_shown']]}",
            f"{name} costs no quality: " + shown[found["loss_shown"] and found["accuracy_shown"]],
        ]
    )


def precision_table(runs: Sequence[dict[str, Any]]) -> str:
    """Return a line for each seed and precision."""
    lines = [["seed", "precision", "train rows", "test rows", "held-out loss", "accuracy",
              "tokens/s", "peak memory", "training"]]  # fmt: skip
    for run in runs:
        train = run["train"]
        lines.append(
            [
                str(run["seed"]),
                run["precision"],
                f"{run['rows']['train']:,}",
                f"{run['rows']['test']:,}",
                f"{train['best_loss']:.4f}",
                f"{100 * run['tuned']:.1f} %",
                f"{train['tokens_per_second']:.0f}",
                f"{train['peak_memory_bytes'] / 1e9:.2f} GB",
                f"{run['seconds']['train'] / 60:.1f} min",
            ]
        )
    return table(lines)
