"""Rows into optimizer steps, and the rows of a step into micro-batches.

Nothing here has state: the order of an epoch is a function of (seed, epoch), the micro-batches are
a function of the rows, so a training cursor is the pair (epoch, step) and nothing more.
"""

from collections.abc import Sequence

import numpy as np

from postgrad.data.packing import pack
from postgrad.types import Batch, FloatArray, IntArray, Tokens


def plan_epoch(
    lengths: Sequence[int], tokens_per_batch: int, seed: int, epoch: int
) -> list[list[int]]:
    """Shuffle the rows and cut the sequence into optimizer steps of about `tokens_per_batch`.

    A step takes the next rows of the permutation as long as it stays within `tokens_per_batch`; a
    row longer than that is a step of its own. The last two steps share their rows as evenly as the
    limit allows, so an epoch does not end in a tiny step with a noisy gradient.

    Args:
        lengths: tokens of each row, all positive.
        tokens_per_batch: token budget of a step.
        seed: with `epoch` the only source of randomness (PCG64).
        epoch: number of the pass, from 0.

    Returns:
        The steps of the epoch in order, each a list of row indices; every row exactly once.
    """
    assert tokens_per_batch > 0
    assert all(length > 0 for length in lengths)
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, epoch))))
    order = np.argsort(generator.random(len(lengths)), kind="stable").tolist()
    steps: list[list[int]] = []
    tokens = 0
    for row in order:
        if not steps or tokens + lengths[row] > tokens_per_batch:
            steps.append([])
            tokens = 0
        steps[-1].append(row)
        tokens += lengths[row]
    if len(steps) > 1:
        steps[-2:] = _share(steps[-2] + steps[-1], lengths, tokens_per_batch)
    return steps


def _share(rows: list[int], lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Cut `rows` in two where the halves are most equal, neither of several rows above `limit`."""
    ends = np.cumsum([lengths[row] for row in rows])
    total = int(ends[-1])
    cuts = [
        cut
        for cut in range(1, len(rows))
        if (ends[cut - 1] <= limit or cut == 1)
        and (total - ends[cut - 1] <= limit or cut == len(rows) - 1)
    ]
    best = min(cuts, key=lambda cut: abs(total - 2 * int(ends[cut - 1])))
    return [rows[:best], rows[best:]]


def micro_batches(tokens: Sequence[Tokens], capacity: int, packed: bool) -> list[Batch]:
    """Lay the rows of one step out as forward passes of at most `capacity` tokens each.

    Which rows share a batch never changes what is learned: labels are shifted inside each
    document, positions start at 0 in each, and weights travel with their labels.

    Args:
        tokens: rendered rows, none empty.
        capacity: most tokens of a batch, padding included; only a row that is longer by itself may
            exceed it.
        packed: True: several documents one after another in a single row. False: a document per
            row, padded on the right, rows of similar length together.

    Returns:
        Batches, the one with the longest document first; documents longest first, equal lengths
        in the given order.
    """
    assert capacity > 0
    assert all(len(row) > 0 for row in tokens)
    lengths = [len(row) for row in tokens]
    groups = pack(lengths, capacity) if packed else _similar(lengths, capacity)
    layout = _packed_batch if packed else _padded_batch
    return [layout([tokens[index] for index in group]) for group in groups]


def _similar(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Group rows, longest first, so that rows times the longest stays within `capacity`."""
    groups: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not groups or (len(groups[-1]) + 1) * longest > capacity:
            groups.append([])
            longest = lengths[index]
        groups[-1].append(index)
    return groups


def _shifted(row: Tokens) -> tuple[IntArray, FloatArray]:
    """Return labels and weights by position: what each token must predict inside its document."""
    weights = np.zeros_like(row.weights)
    weights[:-1] = row.weights[1:]
    labels = np.zeros_like(row.ids)
    labels[:-1] = row.ids[1:]
    return np.where(weights != 0, labels, 0), weights


def _packed_batch(rows: Sequence[Tokens]) -> Batch:
    shifted = [_shifted(row) for row in rows]
    lengths = [len(row) for row in rows]
    return Batch(
        ids=np.concatenate([row.ids for row in rows])[None],
        labels=np.concatenate([labels for labels, _ in shifted])[None],
        weights=np.concatenate([weights for _, weights in shifted])[None],
        positions=np.concatenate([np.arange(length) for length in lengths])[None],
        documents=np.repeat(np.arange(len(rows)), lengths)[None],
        example_ids=tuple(row.example_id for row in rows),
        packed=True,
    )


def _padded_batch(rows: Sequence[Tokens]) -> Batch:
    shape = (len(rows), max(len(row) for row in rows))
    ids, labels, positions = (np.zeros(shape, np.int64) for _ in range(3))
    weights = np.zeros(shape, np.float32)
    documents = np.full(shape, -1, np.int64)
    for index, row in enumerate(rows):
        length = len(row)
        ids[index, :length] = row.ids
        labels[index, :length], weights[index, :length] = _shifted(row)
        positions[index, :length] = np.arange(length)
        documents[index, :length] = index
    example_ids = tuple(row.example_id for row in rows)
    return Batch(ids, labels, weights, positions, documents, example_ids, packed=False)
