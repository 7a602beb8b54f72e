"""Train, validation and test without leaks: rows that are alike never stand in two of them.

Requests (everything but the assistant's words) are normalised; equal ones, near-duplicates and rows
of one group form clusters, and clusters are dealt to splits by a seeded hash of their content, so
that neither file order nor added rows elsewhere move a row needlessly. Files that the user gives as
validation or test are not trusted: they are checked for overlap.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from postgrad.config import DataConfig
from postgrad.data.near_duplicates import Ints, connect, find_twins, join, normalise
from postgrad.data.sampling import limit_rows, seeded_hash
from postgrad.errors import ConfigError, DataError
from postgrad.types import Check, Dropped, Example, Split

SMALLEST_TEST = 30
SMALLEST_VALIDATION = 20
_MOST_CHARACTERS = 40_000_000
_SHOWN = 24
_HELD_OUT = (Split.TEST, Split.VALIDATION)


@dataclass(frozen=True, slots=True)
class Division:
    """Examples with their split, the ledger, and the checks `split-overlap` and `held-out-size`."""

    examples: tuple[Example, ...]
    dropped: tuple[Dropped, ...]
    checks: tuple[Check, ...]


def divide(
    pool: Sequence[Example],
    given: Mapping[Split, Sequence[Example]],
    config: DataConfig,
    seed: int,
) -> Division:
    """Set the split of every row, or write down why it is not used.

    Args:
        pool: Rows of data.train; the shares data.validation and data.test are taken from them.
        given: Rows of the files that data.validation and data.test name, if they do.
        config: Fractions, near-duplicate threshold, what to do on overlap, limit.
        seed: Another seed gives another division.

    Raises:
        DataError: Too few different rows for the splits asked for.
        ConfigError: The shares leave nothing to train on.
    """
    dropped: list[Dropped] = []
    parts = {Split.TRAIN: list(pool), **{split: list(rows) for split, rows in given.items()}}
    everything = [example for rows in parts.values() for example in rows]
    requests = _Requests(everything, config)
    shares = {
        split: share
        for split, share in ((Split.TEST, config.test), (Split.VALIDATION, config.validation))
        if isinstance(share, float)
    }
    if sum(shares.values()) >= 1:
        raise ConfigError(
            "data.validation and data.test together leave no rows for training",
            "make them smaller: 0.1 each is usual",
        )
    clusters = np.arange(len(pool))
    if shares or config.limit_sampling == "varied":
        clusters = _clusters(pool, requests, config.near_duplicate)
    kept = _without_repeats(pool, dropped)
    _require(len(kept), len(set(clusters[kept].tolist())), len(shares) + 1, len(pool))
    facts: dict[str, Any] = {"near_duplicate": config.near_duplicate}
    if shares:
        dealt = _deal(pool, kept, clusters, shares, seed)
        facts |= _cluster_facts(clusters[kept], dealt, shares)
    else:
        dealt = [Split.TRAIN] * len(kept)
    parts[Split.TRAIN] = []
    for index, split in zip(kept, dealt, strict=True):
        parts.setdefault(split, []).append(pool[index])
    if Split.VALIDATION in given:
        rows = given[Split.VALIDATION]
        parts[Split.VALIDATION] = [rows[index] for index in _without_repeats(rows, dropped)]
    facts |= _conflicts(everything, requests)
    overlaps = _overlaps(parts, requests, config, dropped) if given else []
    alike = {id(example): int(root) for example, root in zip(pool, clusters, strict=True)}
    parts[Split.TRAIN] = limit_rows(parts[Split.TRAIN], alike, config, seed, dropped)
    checks = (_overlap_check(overlaps, facts, config), _size_check(parts))
    return Division(_number(parts), tuple(dropped), checks)


# --- what is compared ---------------------------------------------------------------------------


class _Requests:
    """The normalised request of every example, by identity of the example."""

    def __init__(self, examples: Sequence[Example], config: DataConfig) -> None:
        texts = request_texts(examples, config.prompt_template)
        self._texts = {id(example): text for example, text in zip(examples, texts, strict=True)}
        self._half = max(_MOST_CHARACTERS // max(len(texts), 1), 500) // 2
        self.cut = sum(map(len, texts)) > _MOST_CHARACTERS

    def of(self, example: Example) -> str:
        return self._texts[id(example)]

    def near(self, text: str) -> str:
        """Return what is compared for near-duplicates: of very long texts both ends, for memory."""
        if self.cut and len(text) > 2 * self._half:
            return text[: self._half] + text[-self._half :]
        return text


def request_texts(
    examples: Sequence[Example], template: str = "{prompt}", *, system: bool = True
) -> list[str]:
    """Return the normalised request of each example, without what most requests have in common.

    The text around {prompt} in `template` and every line that more than half of the (at least 20)
    different requests contain - a system prompt, a fixed instruction - say nothing about likeness
    and are left out, unless nothing else would be left. Without `system` no system message is read:
    for rows of which only some got one.
    """
    before, _, after = template.partition("{prompt}")
    raw = ["\n".join(_request_lines(example, before, after, system)) for example in examples]
    different = set(raw)
    counts: Counter[str] = Counter()
    if len(different) >= 20:
        for text in different:
            counts.update(set(text.split("\n")))
    common = {line for line, count in counts.items() if 2 * count > len(different)}
    texts = []
    for text in raw:
        own = [line for line in text.split("\n") if line not in common] if common else []
        texts.append(normalise("\n".join(own)) or normalise(text))
    return texts


def _request_lines(example: Example, before: str, after: str, system: bool) -> Iterable[str]:
    left_out = {"assistant"} if system else {"assistant", "system"}
    for message in example.conversation.messages:
        if message.role in left_out:
            continue
        text = message.content
        if message.role == "user" and text.startswith(before) and text.endswith(after):
            text = text[len(before) : len(text) - len(after)]
        yield from (line.strip() for line in text.splitlines())


def _clusters(examples: Sequence[Example], requests: _Requests, threshold: float | None) -> Ints:
    """Return for each example the smallest index of its cluster (request, likeness or group)."""
    by_text: dict[str, int] = {}
    by_group: dict[str, int] = {}
    pairs: list[tuple[int, int]] = []
    for index, example in enumerate(examples):
        pairs.append((index, by_text.setdefault(requests.of(example), index)))
        if example.group is not None:
            pairs.append((index, by_group.setdefault(example.group, index)))
    if threshold is not None:
        where = np.array(list(by_text.values()), dtype=np.int64)
        roots = where[connect([requests.near(text) for text in by_text], threshold)]
        pairs.extend(zip(where.tolist(), roots.tolist(), strict=True))
    first, second = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return join(np.arange(len(examples)), first, second)


def _without_repeats(rows: Sequence[Example], dropped: list[Dropped]) -> list[int]:
    """Return the indices of rows that do not repeat an earlier one exactly."""
    first: dict[str, Example] = {}
    kept = []
    for index, example in enumerate(rows):
        if example.id not in first:
            first[example.id] = example
            kept.append(index)
            continue
        reason, twin = "same request and same answer as an earlier row", first[example.id]
        dropped.append(Dropped(example.id, example.source, "duplicate", reason, twin.source))
    return kept


def _conflicts(examples: Sequence[Example], requests: _Requests) -> dict[str, Any]:
    """Count requests that have more than one answer: no model can get all of them right."""
    answers: dict[str, dict[str, Example]] = {}
    for example in examples:
        found = answers.setdefault(requests.of(example), {})
        found.setdefault(example.conversation.answer, example)
    several = [list(found.values()) for found in answers.values() if len(found) > 1]
    shown = [f"{rows[0].source} / {rows[1].source}" for rows in several[:_SHOWN]]
    return {"conflicting_requests": len(several), "conflicting_rows": shown}


# --- dealing clusters to splits -----------------------------------------------------------------


def _require(rows: int, clusters: int, splits: int, given: int) -> None:
    if rows == 0:
        raise DataError("there are no usable training rows", "check data.train")
    if clusters >= splits:
        return
    if rows == 1 and given > 1:
        what = f"all {given} rows are the same"
    elif clusters == rows:
        what = f"there {'is 1 row' if rows == 1 else f'are {rows} rows'}"
    else:
        what = f"{rows} rows form {clusters} group(s) of like requests"
    raise DataError(
        f"{what}, but {splits} splits are needed that share nothing",
        "give more varied rows, or files for data.validation and data.test; if rows that differ "
        "count as alike, raise data.near_duplicate (null = exact only) or check data.group_by",
    )


def _deal(
    pool: Sequence[Example],
    kept: Sequence[int],
    clusters: Ints,
    shares: Mapping[Split, float],
    seed: int,
) -> list[Split]:
    """Return the split of each kept row.

    Clusters come in the order of a seeded hash. Each goes to the first held-out split with room for
    it, unless it would be more than a quarter of that split; the rest is training. A held-out split
    that stays short takes larger clusters as long as that brings it nearer to its share.
    """
    members: dict[int, list[int]] = {}
    for index in kept:
        members.setdefault(int(clusters[index]), []).append(index)
    keys = {root: min(pool[index].id for index in rows) for root, rows in members.items()}
    deal = _Deal(
        sorted(members, key=lambda root: seeded_hash(seed, keys[root])),
        {root: len(rows) for root, rows in members.items()},
        {split: max(1, round(share * len(kept))) for split, share in shares.items()},
    )
    deal.fill()
    for split in shares:
        deal.top_up(split)
    return [deal.chosen.get(int(clusters[index]), Split.TRAIN) for index in kept]


class _Deal:
    """Which clusters are held out, and how many rows each held-out split still lacks."""

    def __init__(self, order: list[int], size: dict[int, int], room: dict[Split, int]) -> None:
        self.order = order
        self.size = size
        self.room = room
        self.chosen: dict[int, Split] = {}
        self._taken: Counter[Split] = Counter()

    def _spare(self, split: Split) -> bool:
        """Whether a cluster can be given to `split` and leave one for every split without any."""
        waiting = sum(not self._taken[other] for other in self.room if other is not split)
        return len(self.order) - len(self.chosen) > 1 + waiting

    def _take(self, root: int, split: Split) -> None:
        self.chosen[root] = split
        self._taken[split] += 1
        self.room[split] -= self.size[root]

    def fill(self) -> None:
        """Give each cluster to the first split in which it fits and does not dominate."""
        largest = {split: max(1, target // 4) for split, target in self.room.items()}
        for root in self.order:
            for split in self.room:
                fits = self.size[root] <= min(self.room[split], largest[split])
                if fits and self._spare(split):
                    self._take(root, split)
                    break

    def top_up(self, split: Split) -> None:
        """Give a split that lacks rows the training clusters that bring it nearer to its share."""
        while self._spare(split):
            free = [root for root in self.order if root not in self.chosen]
            if self._taken[split]:
                free = [root for root in free if self.size[root] < 2 * self.room[split]]
            if not free:
                return
            self._take(min(free, key=lambda root: abs(self.size[root] - self.room[split])), split)


def _cluster_facts(
    clusters: Ints, dealt: Sequence[Split], shares: Mapping[Split, float]
) -> dict[str, Any]:
    roots, first, counts = np.unique(clusters, return_index=True, return_counts=True)
    largest = int(counts.argmax())
    return {
        "clusters": len(roots),
        "rows_with_twin": int(counts[counts > 1].sum()),
        "largest_cluster": int(counts[largest]),
        "largest_cluster_split": dealt[int(first[largest])].value,
        "asked": {split.value: share for split, share in shares.items()},
        "got": {split.value: dealt.count(split) for split in shares},
    }


def _number(parts: Mapping[Split, Sequence[Example]]) -> tuple[Example, ...]:
    """Set split and final id: repeats that stay (a test file is never altered) get -2, -3 ..."""
    seen: Counter[str] = Counter()
    numbered: dict[Split, list[Example]] = {}
    for split in (Split.TEST, Split.VALIDATION, Split.TRAIN):
        for example in parts.get(split, ()):
            seen[example.id] += 1
            again = f"-{seen[example.id]}" if seen[example.id] > 1 else ""
            row = replace(example, id=example.id + again, split=split)
            numbered.setdefault(split, []).append(row)
    order = (Split.TRAIN, Split.VALIDATION, Split.TEST)
    return tuple(example for split in order for example in numbered.get(split, ()))


# --- overlap of given files ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Overlap:
    """A row that stands, exactly or nearly, in a split that is worth more."""

    example: Example
    split: Split
    twin: Example
    twin_split: Split
    kind: str
    similarity: float | None = None

    def __str__(self) -> str:
        near = f"{self.similarity:.2f} similar to" if self.similarity is not None else "same"
        what = {"exact": "same request as", "near": near, "group": "same group as"}[self.kind]
        return f"{self.example.source} ({self.split}): {what} {self.twin.source}"


def _overlaps(
    parts: dict[Split, list[Example]],
    requests: _Requests,
    config: DataConfig,
    dropped: list[Dropped],
) -> list[_Overlap]:
    """Find rows of VALIDATION in TEST and rows of TRAIN in either; drop them when told to."""
    found: list[_Overlap] = []
    protected = [(example, Split.TEST) for example in parts[Split.TEST]]
    for split in (Split.VALIDATION, Split.TRAIN):
        mine = _overlaps_of(parts[split], split, protected, requests, config)
        found += mine
        if config.on_overlap == "drop":
            bad = {id(overlap.example) for overlap in mine}
            parts[split] = [example for example in parts[split] if id(example) not in bad]
            for overlap in mine:
                row, reason = overlap.example, str(overlap).partition(": ")[2]
                dropped.append(Dropped(row.id, row.source, "overlap", reason, overlap.twin.source))
            if not parts[split]:
                where = " or ".join(sorted({name for _, name in protected}))
                raise DataError(
                    f"every row of {split} also stands in {where}",
                    f"give other rows for data.{split}",
                )
        protected += [(example, split) for example in parts[split]]
    return found


def _overlaps_of(
    rows: Sequence[Example],
    split: Split,
    protected: Sequence[tuple[Example, Split]],
    requests: _Requests,
    config: DataConfig,
) -> list[_Overlap]:
    by_text: dict[str, tuple[Example, Split]] = {}
    by_group: dict[str, tuple[Example, Split]] = {}
    for twin in protected:
        by_text.setdefault(requests.of(twin[0]), twin)
        if twin[0].group is not None:
            by_group.setdefault(twin[0].group, twin)
    mine = dict.fromkeys(requests.of(example) for example in rows)
    new = [text for text in mine if text not in by_text]
    near: dict[str, tuple[str, float]] = {}
    if config.near_duplicate is not None:
        others = list(by_text)
        ends = [requests.near(text) for text in others]
        twins = find_twins([requests.near(text) for text in new], ends, config.near_duplicate)
        near = {new[text]: (others[other], value) for text, (other, value) in twins.items()}
    found = []
    for example in rows:
        text = requests.of(example)
        if text in by_text:
            found.append(_Overlap(example, split, *by_text[text], "exact"))
        elif text in near:
            other, value = near[text]
            found.append(_Overlap(example, split, *by_text[other], "near", value))
        elif example.group is not None and example.group in by_group:
            found.append(_Overlap(example, split, *by_group[example.group], "group"))
    return found


# --- checks -------------------------------------------------------------------------------------


def _overlap_check(
    overlaps: Sequence[_Overlap], facts: Mapping[str, Any], config: DataConfig
) -> Check:
    kinds = Counter(overlap.kind for overlap in overlaps)
    pairs = Counter(f"{overlap.split} in {overlap.twin_split}" for overlap in overlaps)
    refused = bool(overlaps) and config.on_overlap == "refuse"
    alike = "nothing" if config.near_duplicate is None else f"Jaccard >= {config.near_duplicate:g}"
    if overlaps:
        where = ", ".join(f"{count} of {pair}" for pair, count in sorted(pairs.items()))
        how = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        verb = "stand in two splits" if refused else "stood in two splits and were dropped"
        detail = f"{len(overlaps)} rows {verb}: {where} ({how}; near = {alike})"
    else:
        detail = f"no request stands in two splits, exactly or nearly (near = {alike})"
    if "clusters" in facts:
        detail += f"; {facts['clusters']} clusters, the largest has {facts['largest_cluster']} rows"
        detail += f" and is in {facts['largest_cluster_split']}"
    if facts["conflicting_requests"]:
        detail += f"; {facts['conflicting_requests']} requests have more than one answer"
    return Check(
        "split-overlap",
        not refused,
        detail,
        "drop them from the split that trains or selects: data.on_overlap=drop" if refused else "",
        tuple(str(overlap) for overlap in overlaps[:_SHOWN]),
        len(overlaps) if refused else 0,
        data={**facts, "overlaps": dict(kinds), "pairs": dict(pairs)},
    )


def _size_check(parts: Mapping[Split, Sequence[Example]]) -> Check:
    """Refuse held-out sets whose figures could not be read: ±18 points at 30 rows is the limit."""
    test, validation = (len(parts.get(split, ())) for split in _HELD_OUT)
    half = 1.96 * math.sqrt(0.25 / test) if test else 1.0
    short = [
        f"{have} {name} rows, at least {least} needed"
        for name, have, least in (
            ("test", test, SMALLEST_TEST),
            ("validation", validation, SMALLEST_VALIDATION),
        )
        if have < least
    ]
    measured = (
        f"{test} test rows measure a rate to within {100 * half:.1f} points (95 %, worst case)"
    )
    return Check(
        "held-out-size",
        not short,
        "; ".join([*short, measured, f"{validation} validation rows"]),
        "give more rows, or a larger data.test or data.validation" if short else "",
        failures=len(short),
        data={
            "test_rows": test,
            "validation_rows": validation,
            "train_rows": len(parts[Split.TRAIN]),
            "half_width": half,
        },
    )
