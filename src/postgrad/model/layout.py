"""What may attend to what, as small integers, and the definition of attention under it.

Every realisation (attention.py) takes a `Layout` and is tested against `reference_attention`; none
builds a mask of S x S.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from postgrad.errors import ModelError


@dataclass(frozen=True, slots=True)
class Layout:
    """Documents one after another in T tokens; each token sees its document's past.

    Token i sees token j of the same document when 0 <= i - j, and i - j < window if there is one
    (Transformers' meaning of `sliding_window`: the token itself counts). With a shared prefix the
    first document is the beginning of every other one as well: it stands there once, and distances
    count as if each had its own.
    """

    lengths: tuple[int, ...]
    """Tokens of each document, those of a shared prefix not counted again; they add up to T."""
    window: int | None = None
    shared_prefix: bool = False
    """Whether the first document continues in all others."""
    ends: Tensor | None = field(default=None, compare=False, repr=False)
    """[D + 1] int32, 0 and where each document ends, on the device: read there in place of
    `lengths`, so that a recorded graph (train/graphs.py) serves other documents. `lengths` then
    only says T and the longest. The last documents may be empty."""
    fixed: bool = False
    """Whether `lengths` are those of the documents although there are `ends`."""

    def __post_init__(self) -> None:
        """Leave out a window that hides nothing."""
        assert self.lengths
        assert min(self.lengths) > 0
        if self.window is not None and self.window >= max(self.spans):
            object.__setattr__(self, "window", None)

    @property
    def tokens(self) -> int:
        """T."""
        return sum(self.lengths)

    @property
    def prefix(self) -> int:
        """Tokens of the shared prefix."""
        return self.lengths[0] if self.shared_prefix else 0

    @property
    def spans(self) -> tuple[int, ...]:
        """Tokens of each document, the shared prefix included."""
        first, *others = self.lengths
        return (first, *(self.prefix + length for length in others))


def layout_of_positions(positions: Sequence[int]) -> Layout:
    """Return the documents of a packed row from its positions: each begins at position 0.

    >>> layout_of_positions([0, 1, 2, 0, 0, 1]).lengths
    (3, 1, 2)

    Raises:
        ModelError: the positions jump, as after a shared prefix, which they do not tell.
    """
    steps = itertools.pairwise(positions)
    if any(after not in (0, before + 1) for before, after in steps):
        raise ModelError(
            "this model does not hand the layout of a packed row to its attention",
            "set train.packing to off",
        )
    starts = [index for index, position in enumerate(positions) if index == 0 or position == 0]
    return Layout(tuple(b - a for a, b in zip(starts, [*starts[1:], len(positions)], strict=True)))


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """The definition, with a dense mask and in float64, for tests.

    Query [T, H, D], key and value [T, K, D], H a multiple of K -> [T, H, D]. `softcap` limits the
    scaled scores to softcap tanh(score / softcap) (Gemma 2, arXiv 2408.00118).
    """
    repeat = query.shape[1] // key.shape[1]
    q, k, v = (x.double().transpose(0, 1) for x in (query, key, value))
    k, v = k.repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0)
    document = torch.repeat_interleave(torch.tensor(layout.lengths))
    spans = zip(layout.lengths, layout.spans, strict=True)
    position = torch.cat([torch.arange(span - length, span) for length, span in spans])
    distance = position[:, None] - position[None, :]
    same = document[:, None] == document[None, :]
    if layout.shared_prefix:
        same |= document[None, :] == 0
    allowed = same & (distance >= 0)
    if layout.window is not None:
        allowed &= distance < layout.window
    scores = (q @ k.transpose(-1, -2)) * scale
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    return (weights @ v).transpose(0, 1).to(query.dtype)
