"""Numbers and sentences, worded once for the page and for the model card. Plain text only."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from postgrad.config import Recipe
from postgrad.evaluate.gates import ALL, DIALLED
from postgrad.report.collect import TUNED, Evaluation, Merge, Reference, Report
from postgrad.train.stopping import Retained
from postgrad.types import Comparison, GateStatus, Measurement, Verdict

NOT_MEASURED = "not measured"
EN_DASH = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"

_METRICS = {
    "exact_match": "exact match",
    "normalized_match": "match after normalising",
    "numeric": "numerically equal",
    "contains": "answer contained",
    "regex": "match after extraction",
    "f1": "mean token F1",
    "json": "mean JSON score",
    "acc": "accuracy",
    "acc_norm": "accuracy, likelihood per character",
}
_SHARES = frozenset({"exact_match", "normalized_match", "numeric", "contains", "regex"})
"""Metrics whose mean is a share of rows."""

_METHODS = {
    "wilson": "Wilson",
    "bootstrap": "bootstrap",
    "clustered": "clustered errors",
    "two-level": "seeds and rows",
    "mcnemar-exact": "exact McNemar test",
    "paired-bootstrap": "paired bootstrap",
    "paired-clustered": "paired, clustered by group",
}


def metric_name(metric: str) -> str:
    """Return the metric in words."""
    return _METRICS.get(metric, metric)


def capital(text: str) -> str:
    """Return the text with its first letter raised and the others as they are.

    >>> capital("mean token F1")
    'Mean token F1'
    """
    return text[:1].upper() + text[1:]


def method_name(method: str) -> str:
    """Return the statistical method in words."""
    return _METHODS.get(method, method)


def arm_name(arm: str) -> str:
    """Return the arm in words.

    >>> arm_name("base/few-shot-8")
    'Base model, 8 examples in the prompt'
    >>> arm_name("base/few-shot-8-retrieved")
    'Base model, 8 nearest examples in the prompt'
    >>> arm_name("base/few-shot-1-embedded")
    'Base model, 1 nearest example (embedded) in the prompt'
    """
    known = {TUNED: "Tuned model", "base/zero-shot": "Base model, no examples"}
    known[DIALLED] = f"{capital(DIALLED)} model"
    known["base/best-prompt"] = "Base model, best prompt found"
    found = re.fullmatch(r"base/few-shot-(\d+)(-retrieved|-embedded)?", arm)
    if arm in known or not found:
        return known.get(arm, arm)
    kind = "nearest example" if found[2] else "example"
    how = " (embedded)" if found[2] == "-embedded" else ""
    return f"Base model, {count(int(found[1]), kind)}{how} in the prompt"


def percent(value: float) -> str:
    """Return a share as a percentage with one decimal.

    >>> percent(0.8633)
    '86.3%'
    """
    return f"{100 * value:.1f}%"


def interval(low: float, high: float) -> str:
    """Return an interval of shares.

    >>> interval(0.82, 0.8975).replace(EN_DASH, "to")
    '82.0to89.8%'
    """
    return f"{100 * low:.1f}{EN_DASH}{100 * high:.1f}%"


def points(difference: float) -> str:
    """Return a difference of shares in percentage points, with its sign.

    >>> points(0.031), points(-0.00001)
    ('+3.1', '0.0')
    """
    text = f"{100 * difference:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", MINUS)


def points_interval(comparison: Comparison) -> str:
    """Return the interval of a difference in points."""
    return f"{points(comparison.low)} to {points(comparison.high)}"


def p_value(p: float) -> str:
    """Return a p-value the way papers print it.

    >>> p_value(1e-9), p_value(0.04)
    ('p < 0.001', 'p = 0.040')
    """
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def level(confidence: float) -> str:
    """Return a confidence level.

    >>> level(0.95)
    '95%'
    """
    return f"{100 * confidence:g}%"


def count(number: float, noun: str = "") -> str:
    """Return a number with thousands separators and its noun, singular for one.

    >>> count(3000, "row")
    '3,000 rows'
    """
    text = f"{number:,.0f}"
    if not noun:
        return text
    return f"{text} {noun}" if number == 1 else f"{text} {noun}s"


def number(value: float | None, digits: int = 4) -> str:
    """Return a figure with so many significant digits, or "not measured"."""
    if value is None:
        return NOT_MEASURED
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:,.{digits}g}" if abs(value) < 10**digits else f"{value:,.0f}"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def duration(seconds: float | None) -> str:
    """Return a time as people say it.

    >>> duration(371), duration(9.04), duration(7322)
    ('6 min 11 s', '9.0 s', '2 h 2 min')
    """
    if seconds is None:
        return NOT_MEASURED
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def size(size_bytes: float | None) -> str:
    """Return bytes in decimal units.

    >>> size(4_200_000_000)
    '4.2 GB'
    """
    if size_bytes is None:
        return NOT_MEASURED
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.1f} {unit}"
    return f"{size_bytes:.0f} B"


@dataclass(frozen=True, slots=True)
class VerdictText:
    """The verdict as a reader meets it: one line, then what it rests on."""

    kind: str
    """improved, worse, inconclusive, refused or none."""
    headline: str
    summary: str
    evidence: str = ""
    """The test behind it: difference, interval, p, n. Empty without a comparison."""


def verdict(report: Report) -> VerdictText:
    """Return the verdict of a run, or why there is none."""
    evaluation = report.evaluation
    decisive = evaluation.decisive if evaluation else None
    if evaluation is None or decisive is None:
        return _no_verdict(report)
    tuned, base = evaluation.tuned, evaluation.best_base
    assert tuned is not None
    assert base is not None
    headline = {
        Verdict.IMPROVED: "The tuned model is better.",
        Verdict.WORSE: "The tuned model is worse.",
        Verdict.INCONCLUSIVE: "Inconclusive: no difference shown.",
    }[decisive.verdict]
    return VerdictText(
        kind=str(decisive.verdict),
        headline=headline,
        summary=_summary(tuned, base, decisive.verdict),
        evidence=comparison_sentence(decisive, evaluation.confidence),
    )


def _summary(tuned: Measurement, base: Measurement, kind: Verdict) -> str:
    shots = arm_name(base.arm).partition(", ")[2] or base.arm
    rival = f"the base model at its best ({shots})"
    subject = "The tuned model" if kind is Verdict.INCONCLUSIVE else "It"
    if tuned.metric in _SHARES:
        text = (
            f"{subject} answers {percent(tuned.value)} of {count(tuned.n)} held-out test rows "
            f"correctly ({metric_name(tuned.metric)}); {rival} {percent(base.value)}."
        )
    else:
        text = (
            f"{capital(metric_name(tuned.metric))} {percent(tuned.value)} on {count(tuned.n)} "
            f"held-out test rows; {rival} {percent(base.value)}."
        )
    if kind is Verdict.WORSE:
        text += " Prompting the base model wins: do not ship this one."
    return text


def comparison_sentence(comparison: Comparison, confidence: float) -> str:
    """Return difference, interval, p, n and the test in one sentence."""
    return (
        f"{points(comparison.difference)} points on the same {count(comparison.n, 'row')} "
        f"({level(confidence)} interval {points_interval(comparison)}, "
        f"{p_value(comparison.p)}, {method_name(comparison.method)}); "
        f"{count(comparison.wins, 'row')} won, {count(comparison.losses)} lost."
    )


def _no_verdict(report: Report) -> VerdictText:
    if report.refused:
        return VerdictText(
            "refused",
            "Refused before training.",
            f"{count(len(report.refused), 'pre-flight check')} failed: "
            f"{', '.join(check.name for check in report.refused)}. Nothing was trained.",
        )
    evaluation = report.evaluation
    if evaluation is None:
        done = "A model was trained, but " if report.training else "Nothing was trained and "
        why = done + "no test row was answered, so nothing is known about what was gained."
    elif evaluation.tuned is None:
        why = "Only the base model was evaluated: there is no tuned model to compare it with."
    elif evaluation.best_base is None:
        why = "Only the tuned model was evaluated: there is nothing to compare it with."
    else:
        why = "The tuned and the base model were measured, but not compared on the same rows."
    return VerdictText("none", "No verdict.", why)


def warnings(report: Report) -> list[str]:
    """Return what must be read before the verdict is believed, one sentence each."""
    found = []
    status = str(report.record.get("status", "unknown"))
    if status in ("interrupted", "failed"):
        found.append(f"Not finished: the run's status is {status}, later stages are missing.")
    for gate in report.gates:
        if gate.status is not GateStatus.PASS:
            found.append(
                f"Gate not met: {gate.name} ({gate.rule}) is {gate.status}; {gate.finding}."
            )
    for check in report.waived:
        found.append(
            f"Waived: pre-flight check {check.name} failed ({check.detail}) "
            "and was overruled by the recipe."
        )
    evaluation = report.evaluation
    tuned = evaluation.tuned if evaluation else None
    for reference in evaluation.references if evaluation and tuned else ():
        if tuned and reference.value >= tuned.low:
            apart = points(reference.value - tuned.value)
            found.append(
                f"A simpler model may do: {reference_name(reference)} is not below the tuned "
                f"model's interval, {interval(tuned.low, tuned.high)}; the two are {apart} points "
                "apart (reference minus tuned)."
            )
    return found


def reference_name(reference: Reference) -> str:
    """Return an outside figure with its value and its number of rows."""
    rows = f" on {count(reference.n, 'row')}" if reference.n else ""
    return f"{reference.name} ({percent(reference.value)}{rows})"


def reference_interval(reference: Reference) -> str:
    """Return the interval of an outside figure, when one was measured."""
    if reference.low is None or reference.high is None:
        return "not given"
    return interval(reference.low, reference.high)


def reference_method(reference: Reference) -> str:
    """Say how the interval of an outside figure was made, or that it was not made here."""
    return "outside this run" if reference.low is None else method_name("wilson")


def unknowns(report: Report) -> list[str]:
    """Return what this run does not show, one sentence each, the most serious first."""
    found = []
    evaluation = report.evaluation
    decisive = evaluation.decisive if evaluation else None
    if decisive and decisive.verdict is Verdict.INCONCLUSIVE:
        found.append(
            f"Small differences: with {count(decisive.n, 'row')} only a true difference of at "
            f"least {100 * decisive.detectable:.1f} points would have been seen (80% power)."
        )
    if evaluation is None and not report.refused:
        found.append("Quality: not measured, no arm was evaluated.")
    if report.training or (evaluation and evaluation.tuned):
        found.append(forgetting(evaluation))
        if not (evaluation and evaluation.seeds):
            found.append(
                "Another seed: not measured. This is one training run "
                f"(seed {report.recipe.seed}); "
                "the intervals cover the choice of test rows only."
            )
    return found + (_evaluation_unknowns(report, evaluation) if evaluation else [])


def forgetting(evaluation: Evaluation | None) -> str:
    """Say what is not known about lost abilities."""
    if evaluation is None or evaluation.retention is None:
        return (
            "Forgetting: not measured in this run. Whether general abilities were lost is unknown."
        )
    names = ", ".join(benchmark.task for benchmark in evaluation.retention.benchmarks)
    return f"Other abilities: measured were {names}; what else was lost or gained is unknown."


def _evaluation_unknowns(report: Report, evaluation: Evaluation) -> list[str]:
    found = []
    prompted = [m for m in evaluation.main if "few-shot" in m.arm or "best-prompt" in m.arm]
    if evaluation.tuned and not prompted:
        found.append("Prompting with examples: not measured. It may do better than zero-shot.")
    if evaluation.measurements and not isinstance(report.recipe.data.test, str):
        found.append(
            "Other inputs: the test rows come from the same files as the training rows; "
            "requests of another kind were not tested."
        )
    for what, flawed in (
        ("ended in an error", {f.arm: (f.errors, f.rows) for f in evaluation.flaws}),
        ("were cut off at the length limit", {f.arm: (f.cut, f.rows) for f in evaluation.flaws}),
    ):
        arms = [f"{arm} {bad} of {rows}" for arm, (bad, rows) in flawed.items() if bad]
        if arms:
            found.append(f"Full answers: some {what} ({', '.join(arms)}).")
    return found


def training_notes(report: Report) -> list[str]:
    """Return what the loss curves say, in sentences."""
    training, curves = report.training, report.curves
    found = []
    if training and training.best_step is not None and training.best_loss is not None:
        how = {"early": "stopped early", "end": "ran to the end"}.get(training.stopped or "", "ran")
        why = f" ({training.stop_reason})" if training.stop_reason else ""
        found.append(
            f"Training {how}"
            + (f" at step {count(training.last_step)}" if training.last_step is not None else "")
            + why
            + f"; the weights of step {count(training.best_step)} were kept "
            f"(held-out loss {number(training.best_loss)} nats per token)."
        )
    if training and training.restored_loss is not None and training.best_loss is not None:
        same = training.restored_loss == training.best_loss
        found.append(
            "Restored and measured again, they give "
            + ("exactly the same loss." if same else f"{number(training.restored_loss, 6)}.")
        )
    if curves and len(curves.held_out) > 1:
        found += _shape_notes([(e.step, e.loss) for e in curves.held_out])
    if training and training.probe_kl is not None:
        probe = report.recipe.train.kl_probe
        rows = "answers of the base model to general requests" if probe == "auto" else probe
        found.append(
            f"On {rows} the kept weights are {number(training.probe_kl)} nats per token away from "
            "the base model (KL divergence; 0 = unchanged)."
        )
    if training and training.retention:
        found.append(_watched_note(training.retention))
    if report.record.get("learning_rate_probe"):
        found.append(_probe_note(report.record["learning_rate_probe"]))
    if report.merge:
        found.append(_merge_note(report.merge))
    return found


def retention_margin(recipe: Recipe, task: str) -> float | None:
    """Return how many points of a benchmark early stopping lets go; None = any."""
    stopping = recipe.train.early_stopping
    floors = stopping.retention_floor if stopping else {}
    return floors.get(task, floors.get(ALL))


def _watched_note(retention: Mapping[str, Retained]) -> str:
    """Say what the kept weights lost of the benchmarks that early stopping watched."""
    changes = [
        f"{name} by {points(kept.difference)} points ({count(kept.items, 'item')}, floor "
        f"{MINUS}{kept.margin:g})"
        for name, kept in retention.items()
    ]
    return (
        f"On the items that early stopping watched the kept weights change {', '.join(changes)}; "
        "a step was chosen by these figures, so General abilities is judged on other items."
    )


def _probe_note(probe: Mapping[str, Any]) -> str:
    """Say which learning rates were tried, where each led, and why one was taken."""
    said = []
    for tried in probe["tried"]:
        led = "broke down"
        if tried["loss"] is not None:
            led = f"{number(tried['loss'])}"
            if tried["behind"]:
                led += f" ({number(tried['behind'], 2)} worse, ± {number(tried['error'], 2)})"
        said.append(f"{number(tried['rate'], 3)}: {led}")
    return (
        f"The learning rate {number(probe['chosen'], 3)} was probed for "
        f"{count(probe['steps'], 'step')} each; held-out loss on {count(probe['rows'], 'row')} "
        f"after them: {'; '.join(said)}. The smallest within a standard error of the best is taken."
    )


def _merge_note(merge: Merge) -> str:
    text = "Merging into the base " + ("was refused" if merge.refused else "was accepted")
    text += f": held-out loss {number(merge.loss_before)} before, {number(merge.loss_after)} after"
    if merge.tolerance is not None:
        text += f" (tolerance {number(merge.tolerance)})"
    if merge.greedy_agreement is not None:
        text += f", {percent(merge.greedy_agreement)} of answers equal"
    return text + "."


def _shape_notes(held_out: Sequence[tuple[int, float]]) -> list[str]:
    best = min(range(len(held_out)), key=lambda i: held_out[i][1])
    if best == 0:
        return ["No step improved the held-out loss: the base model's was the lowest."]
    if best == len(held_out) - 1:
        return ["The held-out loss was lowest at its last evaluation: longer training may help."]
    rise = held_out[-1][1] - held_out[best][1]
    return [
        f"From there to the last evaluation the held-out loss rose by {number(rise, 2)} nats per "
        "token."
    ]
