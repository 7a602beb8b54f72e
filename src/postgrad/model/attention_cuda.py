"""Packed attention on a CUDA device: torch's flash kernel for documents of any lengths.

The kernel is `torch.nn.attention.varlen.varlen_attn`; what it takes differs from release to
release, so its own signature decides:

| torch | causal | window | scale | fewer key heads |
|---|---|---|---|---|
| 2.10 | `is_causal` | no | no, queries are scaled | no, keys are repeated |
| 2.11 | `window_size` | `window_size` | `scale` | no, keys are repeated |
| 2.12 and later | `window_size` | `window_size` | `scale` | `enable_gqa` |

Where it cannot work (torch 2.9, float32, a processor before Ampere, an odd head width, a window on
torch 2.10) every document is a call of scaled_dot_product_attention.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from postgrad.model.transfer import on_device

WIDTH_MULTIPLE, GREATEST_WIDTH = 8, 256
"""Head widths that the flash kernel takes."""
LEAST_CAPABILITY = (8, 0)
"""Compute capability that the flash kernel needs: Ampere."""

Kernel = Callable[..., Any]


def packed_attention_cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    scale: float,
    window: int | None,
) -> Tensor:
    """Causal attention inside each document; token i sees the `window` last ones, itself included.

    Args:
        query: [1, H, T, D]; T is the sum of `lengths`.
        key: [1, K, T, D], H a multiple of K.
        value: [1, K, T, D].
        lengths: tokens of each document, in order.
        scale: of the scores.
        window: None where no document is longer.

    Returns:
        [1, T, H, D].
    """
    kernel = varlen_kernel()
    if kernel is None or not takes(kernel, query, window):
        return document_attention(query, key, value, lengths, scale, window)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    ends = _ends(lengths, query.device)
    return varlen(kernel, q, k, v, ends, max(lengths), scale, window).unsqueeze(0)


@functools.cache
def varlen_kernel() -> Kernel | None:
    """Return this release's kernel; None where torch has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


@functools.cache
def _parameters(kernel: Kernel) -> frozenset[str]:
    return frozenset(inspect.signature(kernel).parameters)


def takes(kernel: Kernel, query: Tensor, window: int | None) -> bool:
    """Whether the kernel can work on queries [1, H, T, D] with this window."""
    width = query.shape[-1]
    return (
        query.dtype in (torch.bfloat16, torch.float16)
        and width % WIDTH_MULTIPLE == 0
        and width <= GREATEST_WIDTH
        and (window is None or "window_size" in _parameters(kernel))
        and torch.cuda.get_device_capability(query.device) >= LEAST_CAPABILITY
    )


def varlen(
    kernel: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends: Tensor,
    longest: int,
    scale: float,
    window: int | None,
) -> Tensor:
    """Call the kernel with the arguments that its release knows.

    q [T, H, D], k and v [T, K, D]; ends [documents + 1] int32, from 0 to T. The kernel's window
    counts the tokens *before* the query, so a window of W tokens is W - 1 to the left, 0 to the
    right.
    """
    known = _parameters(kernel)
    more: dict[str, Any] = {}
    if "window_size" in known:
        more["window_size"] = (-1 if window is None else window - 1, 0)
    else:
        assert window is None
        more["is_causal"] = True
    if "scale" in known:
        more["scale"] = scale
    else:
        q = q * (scale * math.sqrt(q.shape[-1]))
    if "enable_gqa" in known:
        more["enable_gqa"] = q.shape[1] != k.shape[1]
    else:
        k, v = (_repeated(x, q.shape[1], 1) for x in (k, v))
    out: Tensor = kernel(q, k, v, ends, ends, longest, longest, **more)
    return out


@functools.lru_cache(maxsize=16)
def _ends(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """[documents + 1] int32: where each document ends, from 0; made once for all layers."""
    return on_device(np.cumsum((0, *lengths), dtype=np.int32), device)


def _repeated(x: Tensor, heads: int, dim: int) -> Tensor:
    """Repeat key heads along `dim` until there are as many as query heads."""
    return x if x.shape[dim] == heads else x.repeat_interleave(heads // x.shape[dim], dim)


def document_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    scale: float,
    window: int | None,
) -> Tensor:
    """The same as `packed_attention_cuda`, one call for each document.

    Keys are repeated: torch's memory-efficient kernel, the only one for float32, takes no fewer
    key heads than query heads, and without it a document's scores would be kept.
    """
    key, value = (_repeated(x, query.shape[1], 1) for x in (key, value))
    split = (torch.split(x, list(lengths), dim=2) for x in (query, key, value))
    out = []
    for q, k, v in zip(*split, strict=True):
        mask = None
        if window is not None and q.shape[2] > window:
            ones = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device)
            mask = ones.tril().triu(1 - window)
        out.append(
            functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale
            )
        )
    return torch.cat(out, dim=2).transpose(1, 2)
