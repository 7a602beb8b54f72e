"""Gates: conditions of the recipe, judged from the figures alone as PASS, FAIL or UNDECIDED.

A gate passes only when it is shown to hold, so what was not measured, or on too few rows, is
UNDECIDED and counts as not met. All gates must pass, so each is judged at the full level.
"""

from collections.abc import Iterable, Sequence

from postgrad.config import TARGET_GATE, GatesConfig
from postgrad.evaluate import statistics
from postgrad.types import Comparison, Gate, GateStatus, Measurement, Verdict

BASE, TUNED, DIALLED = "base", "tuned", "dialled"
"""The arms of a retention benchmark; the prompting arms of the test rows are `base/...`. Gates are
judged by the tuned model; the dialled one is the point that evaluate.dial has chosen."""
ALL = "all"
_WORST = (GateStatus.FAIL, GateStatus.UNDECIDED, GateStatus.PASS)
_FROM_VERDICT = {
    Verdict.IMPROVED: GateStatus.PASS,
    Verdict.WORSE: GateStatus.FAIL,
    Verdict.INCONCLUSIVE: GateStatus.UNDECIDED,
}


def judge_gates(
    gates: GatesConfig,
    task: str,
    metric: str,
    measurements: Sequence[Measurement],
    comparisons: Sequence[Comparison],
    confidence: float = 0.95,
) -> list[Gate]:
    """Judge every gate; `task` and `metric` are those of the test rows.

    Comparisons of the target are base/... against tuned on `task`, those of retention base against
    tuned on a benchmark.
    """
    judged = []
    if gates.target:
        own = [m for m in measurements if (m.task, m.metric, m.arm) == (task, metric, TUNED)]
        rivals = [c for c in comparisons if (c.task, c.metric, c.b) == (task, metric, TUNED)]
        prompting = [c for c in rivals if c.a.startswith(f"{BASE}/")]
        judged.append(_target(gates.target, own, prompting, confidence))
    kept = [c for c in comparisons if (c.a, c.b) == (BASE, TUNED) and c.task != task]
    named = {name: points for name, points in gates.retention.items() if name != ALL}
    for name, points in named.items():
        judged.append(_retention(name, points, [c for c in kept if c.task == name], confidence))
    if ALL in gates.retention:
        others = dict.fromkeys(c.task for c in kept if c.task not in named)
        for name in others or ([] if named else [ALL]):
            found = [c for c in kept if c.task == name]
            judged.append(_retention(name, gates.retention[ALL], found, confidence))
    return judged


def unmet(gates: Iterable[Gate]) -> list[Gate]:
    """Return the gates that were not shown to hold."""
    return [gate for gate in gates if gate.status is not GateStatus.PASS]


def _target(
    rule: str, own: Sequence[Measurement], rivals: Sequence[Comparison], confidence: float
) -> Gate:
    asked = TARGET_GATE.fullmatch(rule)
    assert asked, rule
    if asked["value"]:
        return _level(rule, float(asked["value"]), own)
    if not rivals:
        return Gate(
            "target",
            rule,
            GateStatus.UNDECIDED,
            "not measured: no prompting arm; undecided counts as not met",
        )
    margin = float(asked["points"] or 0) / 100
    judged = []
    for c in rivals:
        if asked["sign"] == ">":
            status = _FROM_VERDICT[c.verdict]
            seen = f"interval {_points(c.low)} to {_points(c.high)}"
        else:
            status = statistics.non_inferior(c.lower, c.upper, margin)
            seen = _bounds(c, confidence)
        finding = f"against {c.a}: {_points(c.difference)} points, {seen}, n = {c.n:,}"
        judged.append((_WORST.index(status), c.difference, status, finding))
    _, _, status, finding = min(judged)
    return Gate("target", rule, status, finding + _doubt(status))


def _level(rule: str, value: float, own: Sequence[Measurement]) -> Gate:
    if not own:
        return Gate("target", rule, GateStatus.UNDECIDED, "not measured: there is no tuned model")
    (m,) = own
    status = GateStatus.PASS if m.low >= value else GateStatus.UNDECIDED
    if m.high < value:
        status = GateStatus.FAIL
    finding = f"{m.value:.3f}, interval {m.low:.3f} to {m.high:.3f}, n = {m.n:,}"
    return Gate("target", rule, status, finding + _doubt(status))


def _retention(name: str, points: float, found: Sequence[Comparison], confidence: float) -> Gate:
    """Judge one benchmark; of several metrics the worst decides."""
    rule = f"at most {points:g} points lost"
    if not found:
        what = "no benchmark was run" if name == ALL else "it was not run"
        unknown = f"not measured: {what} on both base and tuned model; undecided counts as not met"
        return Gate(f"retention.{name}", rule, GateStatus.UNDECIDED, unknown)
    judged = []
    for c in found:
        status = statistics.non_inferior(c.lower, c.upper, points / 100)
        finding = (
            f"{c.metric} {_points(c.difference)} points, {_bounds(c, confidence)}, n = {c.n:,}"
        )
        if status is GateStatus.UNDECIDED and c.deviation:
            enough = statistics.items_to_certify(
                min(1.0, points / 100), deviation=c.deviation, confidence=confidence
            )
            finding += f"; if nothing was lost, about {enough:,} rows would show it"
        judged.append((_WORST.index(status), c.difference, status, finding))
    _, _, status, finding = min(judged)
    return Gate(f"retention.{name}", rule, status, finding + _doubt(status))


def _bounds(c: Comparison, confidence: float) -> str:
    level = f"{100 * confidence:.6g} %"
    return f"at least {_points(c.lower)} and at most {_points(c.upper)} (each with {level})"


def _doubt(status: GateStatus) -> str:
    return "; undecided counts as not met" if status is GateStatus.UNDECIDED else ""


def _points(share: float) -> str:
    return f"{100 * share + 0.0:+.1f}"
