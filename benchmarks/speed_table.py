"""From measurements to medians, the table that people read and the goals that were set."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from contenders import BEST, DEFAULTS, OURS
from harness import table

TIMES_DEFAULTS, TIMES_BEST, BOUND_SHARE, MEMORY_SHARE = 10.0, 8.0, 0.6, 0.5
"""The goals: times TRL's rates, at least this share of the bound, at most that of TRL's peak."""


def bound_tokens_per_second(
    bound: Mapping[str, Any], supervised_share: float, method: str = "lora"
) -> float:
    """Return the real tokens per second that the matrix products alone would allow."""
    layers, head = bound["frozen_seconds_per_token"], bound["head_seconds_per_supervised_token"]
    if method == "full":
        layers += bound["weight_gradient_seconds_per_token"]
        head += bound["head_weight_gradient_seconds_per_supervised_token"]
    else:
        layers += bound["adapter_seconds_per_token"]
    return float(1 / (layers + head * supervised_share))


def summarise(part: Mapping[str, Any]) -> dict[str, Any]:
    """Return median and spread for each contender of a part, and shares of the machine's bound."""
    runs = part["runs"]
    basis = [run for run in runs if run["contender"] == OURS] or runs
    tokens = sum(run["tokens"] for run in basis)
    share = sum(run["supervised_tokens"] for run in basis) / max(1, tokens)
    bounds = part["machine_bound"]
    bound, reduced = (
        _median(
            bound_tokens_per_second(b[name], share, part["method"])
            for b in bounds
            if name in b and (name == "bf16" or part["method"] == "lora")
        )
        for name in ("bf16", "int8")
    )
    found: dict[str, Any] = {}
    for name in dict.fromkeys(run["contender"] for run in runs):
        mine = [run for run in runs if run["contender"] == name]
        rates = [run["tokens_per_second"] for run in mine]
        peaks = [run["peak_memory_bytes"] for run in mine if run["peak_memory_bytes"]]
        found[name] = {
            "repetitions": len(mine),
            "tokens_per_second": statistics.median(rates),
            "lowest": min(rates),
            "highest": max(rates),
            "supervised_tokens_per_second": statistics.median(
                run["supervised_tokens_per_second"] for run in mine
            ),
            "peak_memory_bytes": statistics.median(peaks) if peaks else None,
            "share_of_bound": round(statistics.median(rates) / bound, 4) if bound else None,
        }
    return {
        "supervised_share": round(share, 4),
        "bound_tokens_per_second": bound,
        "int8_bound_tokens_per_second": reduced,
        "bf16_gflops": _median(b["bf16"]["gflops"] for b in bounds),
        "fp32_gflops": _median(b["fp32"]["gflops"] for b in bounds if "fp32" in b),
        "contenders": found,
        "goals": goals(found, reduced or bound),
    }


def _median(values: Any) -> float | None:
    numbers = list(values)
    return round(statistics.median(numbers), 1) if numbers else None


def goals(found: Mapping[str, Any], bound: float | None) -> list[dict[str, Any]]:
    """Return each goal with what was found; `reached` is None where it was not measured.

    Memory is compared with the smaller of TRL's two peaks. `bound`: tokens per second of the
    matrix products alone, with frozen weights in int8 where that was measured.
    """
    ours = found.get(OURS)
    peers = [found[name] for name in (DEFAULTS, BEST) if name in found]

    def times(name: str) -> float | None:
        if ours is None or name not in found:
            return None
        return float(ours["tokens_per_second"] / found[name]["tokens_per_second"])

    peaks = [peer["peak_memory_bytes"] for peer in peers if peer["peak_memory_bytes"]]
    peak = ours["peak_memory_bytes"] if ours else None
    wanted = [
        ("times TRL defaults", TIMES_DEFAULTS, times(DEFAULTS)),
        ("times TRL best", TIMES_BEST, times(BEST)),
        (
            "share of the bound",
            BOUND_SHARE,
            ours["tokens_per_second"] / bound if ours and bound else None,
        ),
        ("share of TRL's peak memory", MEMORY_SHARE, peak / min(peaks) if peak and peaks else None),
    ]
    rows = []
    for name, goal, value in wanted:
        below = goal == MEMORY_SHARE
        reached = None if value is None else bool(value <= goal if below else value >= goal)
        rows.append(
            {"goal": name, "at_most" if below else "at_least": goal, "found": value,
             "reached": reached}
        )  # fmt: skip
    return rows


def speed_table(measured: Sequence[Mapping[str, Any]]) -> str:
    """Return a line for each contender of each part, and one for the bound."""
    lines = [
        ["method, rows", "trainer", "runs", "real tok/s", "lowest-highest", "supervised tok/s",
         "peak memory", "of bf16 bound", "postgrad is"],
    ]  # fmt: skip
    for part in measured:
        summary = part["summary"]
        found = summary["contenders"]
        title = f"{part['method']}, {part['kind']} ({part['rows']['mean_tokens']:.0f} tokens)"
        for name, row in found.items():
            rate, memory, share = (
                row[key] for key in ("tokens_per_second", "peak_memory_bytes", "share_of_bound")
            )
            ours = found[OURS]["tokens_per_second"] / rate if OURS in found else None
            lines.append(
                [
                    title,
                    name,
                    str(row["repetitions"]),
                    f"{rate:.0f}",
                    f"{row['lowest']:.0f}-{row['highest']:.0f}",
                    f"{row['supervised_tokens_per_second']:.0f}",
                    f"{memory / 1e9:.2f} GB" if memory else "?",
                    f"{100 * share:.0f} %" if share else "?",
                    f"{ours:.1f} x" if ours and name != OURS else "",
                ]
            )
        if summary["bound_tokens_per_second"]:
            bound = f"{summary['bound_tokens_per_second']:.0f}"
            count = str(len(part["machine_bound"]))
            lines.append([title, "GEMM bound, bf16", count, bound, "", "", "", "100 %", ""])
        if summary["int8_bound_tokens_per_second"]:
            rate = summary["int8_bound_tokens_per_second"]
            share = f"{100 * rate / summary['bound_tokens_per_second']:.0f} %"
            name = "GEMM bound, frozen int8"
            lines.append([title, name, "", f"{rate:.0f}", "", "", "", share, ""])
    return table(lines)


def goals_table(measured: Sequence[Mapping[str, Any]]) -> str:
    """Return a line for each goal of each part."""
    lines = [["method, rows", "goal", "wanted", "found", "reached"]]
    for part in measured:
        for row in part["summary"]["goals"]:
            wanted = f"<= {row['at_most']:g}" if "at_most" in row else f">= {row['at_least']:g}"
            value = "not measured" if row["found"] is None else f"{row['found']:.2f}"
            reached = {True: "yes", False: "no", None: "-"}[row["reached"]]
            lines.append([f"{part['method']}, {part['kind']}", row["goal"], wanted, value, reached])
    return table(lines)


def failures(document: Mapping[str, Any]) -> str:
    """Say for every contender that was not measured why it was not."""
    lines = [f"{name}: not installed: {why}" for name, why in document["missing"].items()]
    for part in document["measured"]:
        title = f"{part['method']}, {part['kind']}"
        lines += [f"{title}: {name}: {why}" for name, why in part["failed"].items()]
    return "\n".join(lines)
