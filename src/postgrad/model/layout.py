"""What may attend to what, as small integers, and the definition of attention under it.

Every realisation (attention.py) takes a `Layout` and is tested against `reference_attention`; none
builds a mask of S x S.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Layout:
    """Documents one after another in T tokens; each token sees its document's past.

    Token i sees token j of the same document when 0 <= i - j, and i - j < window if there is one
    (Transformers' meaning of `sliding_window`: the token itself counts).
    """

    lengths: tuple[int, ...]
    """Tokens of each document; they add up to T."""
    window: int | None = None

    def __post_init__(self) -> None:
        """Leave out a window that hides nothing."""
        assert self.lengths
        assert min(self.lengths) > 0
        if self.window is not None and self.window >= max(self.lengths):
            object.__setattr__(self, "window", None)

    @property
    def tokens(self) -> int:
        """T."""
        return sum(self.lengths)


def layout_of_positions(positions: Sequence[int]) -> Layout:
    """Return the documents of a packed row from its positions: each begins at position 0.

    >>> layout_of_positions([0, 1, 2, 0, 0, 1]).lengths
    (3, 1, 2)
    """
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
    distance = torch.arange(layout.tokens)
    distance = distance[:, None] - distance[None, :]
    allowed = (document[:, None] == document[None, :]) & (distance >= 0)
    if layout.window is not None:
        allowed &= distance < layout.window
    scores = (q @ k.transpose(-1, -2)) * scale
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    return (weights @ v).transpose(0, 1).to(query.dtype)
