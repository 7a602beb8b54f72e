"""The report page: one self-contained HTML file, verdict first. No script, no network."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from postgrad.evaluate.frontier import Frontier
from postgrad.report import charts, facts
from postgrad.report.answers import answers_section
from postgrad.report.charts import NARROW, WIDE
from postgrad.report.collect import TUNED, Evaluation, Report, collect
from postgrad.report.costs import costs_section
from postgrad.report.curves import Curves, Point
from postgrad.report.frontier import frontier_section, frontiers_section
from postgrad.report.learning import learning_section
from postgrad.report.markup import Content, Html, join, tag
from postgrad.report.parts import empty, figure, note, section, table
from postgrad.report.prompts import prompts_section
from postgrad.report.retention import retention_section
from postgrad.report.words import (
    MINUS,
    arm_name,
    capital,
    count,
    duration,
    interval,
    level,
    method_name,
    metric_name,
    number,
    p_value,
    percent,
    points,
    points_interval,
    reference_interval,
    reference_method,
    retention_margin,
    training_notes,
    unknowns,
    verdict,
    warnings,
)
from postgrad.run import Run, write_atomic
from postgrad.types import GateStatus, Verdict

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def write_report(run: Run) -> Path:
    """Write report.html of a run from its files, and return its path.

    Raises `RunError` when a file of the run is damaged or the page cannot be written.
    """
    write_atomic(run.report_path, page(collect(run)).encode())
    return run.report_path


def page(report: Report) -> Html:
    """Return the whole page."""
    name = str(report.record.get("name", report.path.name))
    main = tag(
        "main",
        _verdict(report, name),
        _gates(report),
        _evaluation(report),
        prompts_section(report),
        costs_section(report),
        learning_section(report),
        retention_section(report),
        frontier_section(report),
        _training(report),
        answers_section(report),
        facts.data_section(report),
        facts.preflight_section(report),
        facts.recipe_section(report),
        facts.machine_section(report),
        facts.recompute_section(report),
    )
    footer = tag(
        "footer",
        "Written by postgrad from the files beside this page. It loads nothing from the network.",
    )
    return document(f"{name} · postgrad report", main, footer)


def document(title: str, *content: Content) -> Html:
    """Return a self-contained page in the report's style."""
    style = files("postgrad.report").joinpath("report.css").read_text(encoding="utf-8")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("title", title),
        tag("style", Html(style)),
    )
    body = tag("body", *content)
    return Html("<!doctype html>\n" + tag("html", head, body, lang="en") + "\n")


def frontiers_page(frontiers: Sequence[Mapping[str, Any]]) -> Html:
    """Return a page with the `frontiers` of a comparison, the dials of several runs, in a picture.

    Each is {"run": its name, "dial": as in measurements.json}.
    """
    dials = TypeAdapter(list[tuple[str, Frontier]])
    given = dials.validate_python([(entry["run"], entry["dial"]) for entry in frontiers])
    return document("Dials \u00b7 postgrad", tag("main", frontiers_section(given)))


def _verdict(report: Report, name: str) -> Html:
    said = verdict(report)
    date = str(report.record.get("created", ""))[:10]
    missing = unknowns(report)
    base = report.recipe.model.base.partition("#")[0].rsplit("/", 1)[-1]
    return tag(
        "header",
        tag("p", f"{name} · {base} · {date}", class_="over"),
        tag("h1", said.headline, class_=said.kind),
        tag("p", said.summary, class_="lead"),
        tag("p", said.evidence, class_="evidence") if said.evidence else None,
        tag("p", _effort(report), class_="effort") if report.training else None,
        *(_alarm(sentence) for sentence in warnings(report)),
        tag(
            "details",
            tag("summary", f"What this run does not show ({len(missing)})"),
            tag("ul", *(_unknown(sentence) for sentence in missing)),
            class_="unknown",
            open="",
        )
        if missing
        else None,
        id="verdict",
    )


def _gates(report: Report) -> Html | None:
    if not report.gates:
        return None
    rows: list[list[Content]] = [
        [
            tag("span", str(gate.status), class_=f"badge {_GATE_TONE[gate.status]}"),
            tag("b", gate.name),
            gate.rule,
            gate.finding,
        ]
        for gate in report.gates
    ]
    met = sum(gate.status is GateStatus.PASS for gate in report.gates)
    return section(
        "Gates",
        "gates",
        tag("p", f"{met} of {count(len(rows), 'condition')} of the recipe shown to be met."),
        table(["Result", "Gate", "Asked for", "Finding"], rows),
        note("A gate passes only when it is shown to hold; undecided counts as not met."),
    )


def _unknown(sentence: str) -> Html:
    first, colon, rest = sentence.partition(":")
    return tag("li", tag("b", first + colon), rest)


def _alarm(sentence: str) -> Html:
    first, colon, rest = sentence.partition(":")
    return tag("p", tag("b", first + colon), rest, class_="alarm", dir="auto")


def _effort(report: Report) -> str:
    training, parts = report.training, []
    if training is None:
        return ""
    if training.start_loss is not None and training.best_loss is not None:
        parts.append(
            f"held-out loss {number(training.start_loss, 3)} → {number(training.best_loss, 3)}"
        )
    if training.trainable_parameters and training.total_parameters:
        share = training.trainable_parameters / training.total_parameters
        parts.append(
            f"{training.trainable_parameters / 1e6:,.1f} M parameters trained ({percent(share)})"
        )
    if "train" in report.seconds:
        parts.append(f"{duration(report.seconds['train'])} training")
    if report.seconds:
        parts.append(f"{duration(sum(report.seconds.values()))} in all")
    if report.cost is not None:
        parts.append(facts.money(report))
    return " · ".join(parts)


def _evaluation(report: Report) -> Html:
    evaluation = report.evaluation
    if evaluation is None or not evaluation.measurements:
        return section("Before and after", "evaluation", empty("no arm was evaluated"))
    drawn = [
        charts.bars(
            evaluation.main,
            evaluation.references,
            confidence=evaluation.confidence,
            width=width,
            name=f"bars-{width}",
        )
        for width in (WIDE, NARROW)
    ]
    caption = (
        f"{capital(metric_name(evaluation.metric))} on the held-out test rows of task "
        f"{evaluation.task}, with {level(evaluation.confidence)} intervals."
    )
    return section(
        "Before and after",
        "evaluation",
        figure(drawn, caption) if evaluation.main else None,
        _measurements(evaluation),
        _comparisons(evaluation),
        _seeds(evaluation) if evaluation.seeds else None,
    )


def _seeds(evaluation: Evaluation) -> Html:
    within = level(evaluation.confidence)
    rows: list[list[Content]] = [
        [
            arm_name(s.arm) + (f" minus {arm_name(s.against)}" if s.against else ""),
            f"{s.task} · {metric_name(s.metric)}",
            ", ".join(percent(value) for value in s.values),
            percent(s.mean),
            f"{100 * s.seed_deviation:.1f}",
            interval(*s.over_seeds),
            f"{100 * s.row_error:.1f}",
            interval(*s.over_rows),
            interval(*s.over_both),
        ]
        for s in evaluation.seeds
    ]
    heads = ["Figure", "Task · metric", "#Each seed", "#Mean", "#Deviation of seeds"]
    heads += [f"#{within}, new seeds", "#Error of rows", f"#{within}, new rows", f"#{within}, both"]
    return join(
        [
            tag("h3", "Seeds and rows apart"),
            table(heads, rows),
            note(
                "New seeds: another training, tested on these very rows. New rows: these very "
                "models on other rows. Both: what may be said about the recipe; the measurements "
                "and comparisons above use it. The page of each seed is in seeds/."
            ),
        ]
    )


def _measurements(evaluation: Evaluation) -> Html:
    kinds = {(m.task, m.metric) for m in evaluation.measurements}
    within = f"#{level(evaluation.confidence)} interval"
    heads = ["Arm", "Task · metric", "#Value", within, "#n", "Interval by", "Evidence"]
    rows: list[list[Content]] = [
        [
            tag("b", arm_name(m.arm)) if m.arm == TUNED else arm_name(m.arm),
            f"{m.task} · {metric_name(m.metric)}",
            tag("b", percent(m.value)) if m.arm == TUNED else percent(m.value),
            interval(m.low, m.high),
            count(m.n),
            method_name(m.method),
            tag("code", m.evidence) if m.evidence else "no file",
        ]
        for m in sorted(evaluation.measurements, key=lambda m: m.arm == TUNED)
    ]
    rows += [
        [
            tag("i", reference.name),
            f"{evaluation.task} · {metric_name(evaluation.metric)}",
            percent(reference.value),
            reference_interval(reference),
            count(reference.n) if reference.n is not None else "not given",
            reference_method(reference),
            reference.source or "no source given",
        ]
        for reference in evaluation.references
    ]
    if len(kinds) == 1:
        heads, rows = heads[:1] + heads[2:], [row[:1] + row[2:] for row in rows]
    return join([tag("h3", "Measurements"), table(heads, rows)])


def _comparisons(evaluation: Evaluation) -> Html:
    if not evaluation.comparisons:
        return join([tag("h3", "Comparisons"), empty("nothing was compared")])
    rows = [
        [
            f"{arm_name(c.b)} against {arm_name(c.a)[0].lower()}{arm_name(c.a)[1:]}",
            tag("b", points(c.difference)),
            points_interval(c),
            p_value(c.p).removeprefix("p = ").removeprefix("p "),
            f"{count(c.wins)} / {count(c.losses)}",
            count(c.n),
            f"{100 * c.detectable:.1f}",
            tag("span", str(c.verdict), class_=f"badge {_TONE[c.verdict]}"),
        ]
        for c in evaluation.comparisons
    ]
    within = f"#{level(evaluation.confidence)} interval"
    heads = ["Compared", "#Points", within, "#p", "#Won / lost", "#n", "#Detectable", "Verdict"]
    decisive = evaluation.decisive
    methods = " and ".join(sorted({method_name(c.method) for c in evaluation.comparisons}))
    return join(
        [
            tag("h3", "Comparisons, paired on the same rows"),
            table(
                heads,
                rows,
            ),
            note(
                "The verdict rests on the comparison with the best base arm, "
                f"{decisive.a}; choosing it on the test rows favours the base model. "
                if decisive
                else "",
                f"Tested by {methods}. Detectable: the smallest true difference in points that so "
                "many rows would have seen with 80% power.",
            ),
        ]
    )


_GATE_TONE = {GateStatus.PASS: "good", GateStatus.FAIL: "bad", GateStatus.UNDECIDED: "open"}
_TONE = {Verdict.IMPROVED: "good", Verdict.WORSE: "bad", Verdict.INCONCLUSIVE: "open"}


def _training(report: Report) -> Html:
    curves = report.curves
    if report.training is None and curves is None:
        return section("Training", "training", empty("no model was trained in this run"))
    notes = training_notes(report)
    return section(
        "Training",
        "training",
        _curves(curves, report) if curves else empty("no metrics were recorded"),
        tag("p", " ".join(notes), class_="notes") if notes else None,
        _evaluations(curves) if curves and curves.held_out else None,
        facts.training_facts(report),
    )


def _curves(curves: Curves, report: Report) -> Html:
    best_step = report.training.best_step if report.training else None
    parts = []
    if curves.loss or curves.held_out:
        drawn = [
            charts.loss_chart(curves, best_step, width=width, name=f"loss-{width}")
            for width in (WIDE, NARROW)
        ]
        parts.append(figure(drawn, "Loss in nats per supervised token.", _legend(curves)))
    small = [
        _small(
            series, f"{task}: points against the base, on watched items", f"watched-{task}", floor
        )
        for task, series in curves.retention.items()
        for floor in (retention_margin(report.recipe, task),)
    ]
    small += [
        _small(series, title, name)
        for series, title, name in (
            (curves.probe_kl, "Distance from the base: KL in nats per token", "kl"),
            (curves.learning_rate, "Learning rate", "rate"),
            (curves.gradient_norm, "Gradient norm", "norm"),
        )
        if series
    ]
    return join([*parts, tag("div", *small, class_="pair") if small else None])


def _small(series: Sequence[Point], title: str, name: str, margin: float | None = None) -> Html:
    """Return a small figure; with a margin, the floor that many points below zero."""
    floors = [] if margin is None else [charts.Level(-margin, f"floor {MINUS}{margin:g}", "base")]
    drawn = charts.small_chart(series, title, width=360, name=name, levels=floors)
    return tag("figure", tag("figcaption", title), drawn)


def _legend(curves: Curves) -> Html:
    items = []
    if curves.held_out:
        items.append(("held-out", "held-out rows"))
    if curves.loss:
        items.append(("train", "training rows, smoothed (faint: each step)"))
    if any(e.step == 0 for e in curves.held_out):
        items.append(("level", "base model, held-out rows"))
    keys = (tag("span", tag("i", class_=style), words) for style, words in items)
    return tag("p", *keys, class_="legend")


def _evaluations(curves: Curves) -> Html:
    rows = [
        [
            count(e.step),
            number(e.loss),
            "" if e.standard_error is None else number(e.standard_error, 2),
            tag("span", "best so far", class_="badge good") if e.best else "",
        ]
        for e in curves.held_out
    ]
    heads = ["#Step", "#Held-out loss", "#Standard error of the paired difference", ""]
    return tag(
        "details",
        tag("summary", f"{count(len(rows), 'held-out evaluation')} as a table"),
        table(heads, rows),
    )
