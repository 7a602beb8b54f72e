"""From evidence to figures: measurements with intervals, paired comparisons, the verdict in words.

Rows with an `error` count as score 0 and stay in n. Two arms are compared only on the same rows.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from postgrad.errors import DataError
from postgrad.evaluate import statistics
from postgrad.types import Comparison, Evidence, Measurement, Verdict

_SHOWN = 5
"""How many example ids an error message lists."""


def measure(
    rows: Sequence[Evidence],
    task: str,
    metric: str,
    arm: str,
    confidence: float = 0.95,
    seed: int = 7,
    evidence_path: str = "",
) -> Measurement:
    """Return the mean score of one arm with its interval.

    Scores that are all 0 or 1 get the Wilson interval, graded ones a bootstrap with `seed`; rows in
    groups an interval with clustered errors that is at least as wide.

    Raises:
        DataError: no rows, an example twice, a row without this metric, a score outside [0, 1].
    """
    scores = np.array(list(row_scores(rows, metric, arm).values()))
    if _binary(scores):
        method = "wilson"
        interval = statistics.wilson(int(scores.sum()), len(scores), confidence)
    else:
        method = "bootstrap"
        interval = statistics.bootstrap_mean(scores, confidence, seed)
    groups = row_groups(rows)
    if groups:
        method = "clustered"
        interval = statistics.clustered_interval(scores, groups, confidence, interval)
    return Measurement(
        task=task,
        metric=metric,
        arm=arm,
        value=float(scores.mean()),
        low=interval.low,
        high=interval.high,
        n=len(scores),
        method=method,
        evidence=evidence_path,
        errors=sum(row.error is not None for row in rows),
    )


def compare(
    a_rows: Sequence[Evidence],
    b_rows: Sequence[Evidence],
    task: str,
    metric: str,
    a: str,
    b: str,
    confidence: float = 0.95,
    seed: int = 7,
) -> Comparison:
    """Compare arm `b` with arm `a` row by row; the order of the rows does not matter.

    Scores that are all 0 or 1 are tested with McNemar's exact test and get Tango's interval,
    graded ones with the paired randomisation test and get a bootstrap interval. Rows in groups are
    tested with whole groups, and their interval has clustered errors. The verdict is `improved` or
    `worse` only when the test is significant at 1 - confidence and the interval leaves out zero,
    else `inconclusive`.

    Raises:
        DataError: what `measure` raises; or the arms do not hold the same examples with the same
            references (unpaired data are refused, never compared as if they were paired).
    """
    a_scores, b_scores = row_scores(a_rows, metric, a), row_scores(b_rows, metric, b)
    require_pairs(a_rows, b_rows, a, b)
    x = np.array(list(a_scores.values()))
    y = np.array([b_scores[example] for example in a_scores])
    result = _paired(x, y, row_groups(a_rows), confidence, seed)
    bounds = _paired(x, y, row_groups(a_rows), statistics.one_sided(confidence), seed)
    return Comparison(
        task=task,
        metric=metric,
        a=a,
        b=b,
        difference=result.difference,
        low=result.low,
        high=result.high,
        p=result.p,
        n=len(x),
        method=_method(x, y, row_groups(a_rows)),
        verdict=decide(result.p, result.low, result.high, confidence),
        detectable=_detectable(y - x, row_groups(a_rows), confidence),
        wins=int((y > x).sum()),
        losses=int((y < x).sum()),
        lower=bounds.low,
        upper=bounds.high,
        deviation=float((y - x).std()),
    )


def decide(p: float, low: float, high: float, confidence: float) -> Verdict:
    """Return what a test and an interval that must agree allow one to say."""
    if p < 1 - confidence and low > 0:
        return Verdict.IMPROVED
    return Verdict.WORSE if p < 1 - confidence and high < 0 else Verdict.INCONCLUSIVE


def correct(suite: Sequence[Comparison], confidence: float = 0.95) -> list[Comparison]:
    """Return the comparisons of a suite with Holm's correction in `corrected` and the verdict.

    With m tasks and no difference in any, the chance of even one false `improved` or `worse` is
    then at most 1 - confidence. Intervals and `p` stay those of each comparison alone.
    """
    corrected = statistics.holm([c.p for c in suite])
    return [
        dataclasses.replace(c, corrected=p, verdict=decide(p, c.low, c.high, confidence))
        for c, p in zip(suite, corrected, strict=True)
    ]


def is_row_mean(metric: str) -> bool:
    """Whether a figure is the mean of its rows' scores, so that runs can be compared row by row.

    A perplexity is not, nor is IFEval's share of instructions: their rows hold several.
    """
    return metric != "perplexity" and not metric.startswith("inst_level_")


def best_base(measurements: Iterable[Measurement]) -> Measurement | None:
    """Return the strongest way of prompting the base model; the first of equals, None if none.

    It is chosen by the very rows it is then compared on, which favours it: `improved` against it
    is on the safe side.
    """
    arms = [m for m in measurements if m.arm.startswith("base/")]
    return max(arms, key=lambda m: m.value, default=None)


def headline(comparisons: Sequence[Comparison], confidence: float = 0.95) -> str:
    """Say in one sentence what the comparisons of one arm `b` with its rivals come to.

    The strongest rival decides: the one over which `b` gains least, the first of equals.
    """
    if not comparisons:
        return "nothing was compared"
    assert len({(c.task, c.metric, c.b) for c in comparisons}) == 1, "one arm b, one metric"
    c = min(comparisons, key=lambda c: c.difference)
    name = c.a.removeprefix("base/")
    rival = name if name == c.a else f"{name} prompting"
    if len(comparisons) > 1 and name != c.a:
        rival = f"the best prompt ({name})"
    sign = -1 if c.verdict is Verdict.WORSE else 1
    low, high = sorted((sign * c.low, sign * c.high))
    facts = (
        f"{_points(sign * c.difference)} points ({_percent(confidence)} % interval {_points(low)} "
        f"to {_points(high)}, n = {c.n}, {_p(c.p)})"
    )
    if c.verdict is Verdict.IMPROVED:
        return f"{c.b} beats {rival} by {facts}"
    if c.verdict is Verdict.WORSE:
        return f"{'' if name == c.a else 'prompting wins: '}{name} beats {c.b} by {facts}"
    doubt = "" if c.low <= 0 <= c.high else "the exact test does not confirm the interval; "
    seen = f"{c.n} rows are too few to show any difference"
    if c.detectable < 1:
        seen = f"{c.n} rows would have needed a difference of {_points(c.detectable)} points"
    return f"inconclusive: {c.b} differs from {rival} by {facts}; {doubt}{seen}"


def row_scores(rows: Sequence[Evidence], metric: str, arm: str) -> dict[str, float]:
    """Return example id -> score, in order, having checked that each can be used."""
    if not rows:
        raise DataError(f"{arm}: no rows to measure", "evaluate at least one test row")
    counts = Counter(row.example_id for row in rows)
    twice = [example for example, count in counts.items() if count > 1]
    if twice:
        raise DataError(
            f"{arm}: {len(twice)} examples occur more than once: {_some(twice)}",
            "evaluate each example once; a repeat would count as independent evidence",
        )
    answered = [row for row in rows if row.error is None]
    missing = [row.example_id for row in answered if metric not in row.scores]
    if missing:
        raise DataError(
            f"{arm}: {len(missing)} rows have no {metric} score: {_some(missing)}",
            "evaluate with this scorer, or name one that the evidence holds",
        )
    outside = [r.example_id for r in answered if not 0 <= r.scores[metric].value <= 1]
    if outside:
        raise DataError(
            f"{arm}: {len(outside)} {metric} scores are not within 0 to 1: {_some(outside)}",
            "restore the evidence file or run the evaluation again",
        )
    return {r.example_id: 0.0 if r.error is not None else r.scores[metric].value for r in rows}


def require_pairs(a_rows: Sequence[Evidence], b_rows: Sequence[Evidence], a: str, b: str) -> None:
    """Raise `DataError` naming what differs unless both arms hold the same examples."""
    a_references = {row.example_id: row.reference for row in a_rows}
    b_references = {row.example_id: row.reference for row in b_rows}
    problems = []
    for here, there, name in ((a_references, b_references, a), (b_references, a_references, b)):
        only = [example for example in here if example not in there]
        if only:
            problems.append(f"{len(only)} examples only in {name}: {_some(only)}")
    changed = _changed(a_references, b_references)
    if changed:
        problems.append(f"{len(changed)} examples with another reference: {_some(changed)}")
    if problems:
        raise DataError(
            f"{a} and {b} were not evaluated on the same rows: {'; '.join(problems)}",
            "evaluate both on the same test rows; unpaired results are not compared",
        )


def _changed(a: Mapping[str, str], b: Mapping[str, str]) -> list[str]:
    return [example for example, text in a.items() if example in b and b[example] != text]


def _binary(scores: statistics.Values) -> bool:
    return bool(np.isin(scores, (0.0, 1.0)).all())


def row_groups(rows: Sequence[Evidence]) -> list[str]:
    """Return the group of each row, its id where it has none; empty when no two rows share one."""
    groups = [f"{r.example_id} alone" if r.group is None else f"group {r.group}" for r in rows]
    return groups if len(set(groups)) < len(groups) else []


def _method(x: statistics.Values, y: statistics.Values, groups: Sequence[str]) -> str:
    if groups:
        return "paired-clustered"
    return "mcnemar-exact" if _binary(x) and _binary(y) else "paired-bootstrap"


def _paired(
    x: statistics.Values,
    y: statistics.Values,
    groups: Sequence[str],
    confidence: float,
    seed: int,
) -> statistics.PairedResult:
    """Return difference, interval and p-value by the method that suits the scores."""
    n, wins, losses = len(x), int((y > x).sum()), int((y < x).sum())
    if _binary(x) and _binary(y):
        interval = statistics.paired_share_interval(wins, losses, n, confidence)
        p = statistics.mcnemar_exact(wins, losses)
        result = statistics.PairedResult((wins - losses) / n, *interval, p)
    else:
        result = statistics.paired_bootstrap(x, y, confidence, seed)
    if not groups:
        return result
    rows = statistics.Interval(result.low, result.high)
    interval = statistics.clustered_interval(y - x, groups, confidence, rows, (-1.0, 1.0))
    p = statistics.clustered_p(y - x, groups, seed)
    return statistics.PairedResult(result.difference, *interval, p)


def _detectable(difference: statistics.Values, groups: Sequence[str], confidence: float) -> float:
    n = len(difference)
    if np.isin(difference, (-1.0, 0.0, 1.0)).all():
        discordance = float((difference != 0).mean())
        detectable = statistics.detectable_share_difference(discordance, n, confidence)
    elif n == 1 or not difference.std():
        detectable = statistics.detectable_share_difference(0.0, n, confidence)
    else:
        deviation = float(difference.std(ddof=1))
        detectable = min(1.0, statistics.detectable_mean_difference(deviation, n, confidence))
    if not groups:
        return detectable
    deviation = statistics.clustered_error(difference, groups) * n**0.5
    clustered = statistics.detectable_mean_difference(deviation, n, confidence)
    return min(1.0, max(detectable, clustered))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _points(share: float) -> str:
    return f"{100 * share + 0.0:.1f}".replace("-0.0", "0.0")


def _percent(confidence: float) -> str:
    return f"{100 * confidence:.6g}"


def _p(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
