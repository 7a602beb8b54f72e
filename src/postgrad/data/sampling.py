"""Which training rows are kept when `data.limit` allows fewer than there are."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence

from postgrad.config import DataConfig
from postgrad.types import Dropped, Example

VARIETY = 0.7
"""Exponent of an answer's frequency in a varied sample: 1 = as in the rows, 0 = all answers alike.
mBERT sampled its languages with 0.7 (Devlin et al. 2018); of 0.5, 0.6 and 0.7 it served a linear
model best on held-out licence notices (LOG.md, 2026-11-26)."""


def seeded_hash(*parts: object) -> bytes:
    """Return 32 bytes that order rows at random, the same for the same parts."""
    return hashlib.sha256(":".join(map(str, parts)).encode()).digest()


def limit_rows(
    rows: Sequence[Example],
    alike: Mapping[int, int],
    config: DataConfig,
    seed: int,
    dropped: list[Dropped],
) -> list[Example]:
    """Keep data.limit rows, the others go into the ledger; a smaller limit keeps a subset of them.

    Args:
        rows: training rows.
        alike: the cluster of near-duplicates of each row, by identity of the row.
        config: limit and limit_sampling.
        seed: another seed gives another sample.
        dropped: the ledger.
    """
    limit = config.limit
    if limit is None or len(rows) <= limit:
        return list(rows)
    ranked = sorted(range(len(rows)), key=lambda index: seeded_hash(seed, "limit", rows[index].id))
    if config.limit_sampling == "varied":
        ranked = _varied(rows, ranked, [alike[id(row)] for row in rows])
    kept = set(ranked[:limit])
    for index, example in enumerate(rows):
        if index not in kept:
            reason = f"not in the sample of data.limit={limit}"
            dropped.append(Dropped(example.id, example.source, "limit", reason))
    return [example for index, example in enumerate(rows) if index in kept]


def _varied(rows: Sequence[Example], ranked: Sequence[int], clusters: Sequence[int]) -> list[int]:
    """Return all rows in an order of which every beginning is a varied sample.

    The k-th row of an answer that n rows have stands at k / n^VARIETY, so that the first m rows
    hold about m n^VARIETY / sum n^VARIETY of it (highest averages, as seats are given to parties).
    Within an answer, rows without a near-duplicate before them in `ranked` come first.
    """
    answers = [row.conversation.answer.strip() for row in rows]
    counts = Counter(answers)
    seen: set[int] = set()
    repeats: set[int] = set()
    for index in ranked:
        if clusters[index] in seen:
            repeats.add(index)
        seen.add(clusters[index])
    order = sorted(ranked, key=lambda index: index in repeats)
    taken: Counter[str] = Counter()
    place: dict[int, float] = {}
    for index in order:
        taken[answers[index]] += 1
        place[index] = taken[answers[index]] / counts[answers[index]] ** VARIETY
    return sorted(order, key=lambda index: place[index])
