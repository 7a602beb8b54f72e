"""Packed attention on a CUDA device: torch's flash kernel for documents of any lengths.

The kernel is `torch.nn.attention.varlen.varlen_attn`; what it takes differs from release to
release, so its own signature decides:

| torch | causal | window | scale | fewer key heads |
|---|---|---|---|---|
| 2.10 | `is_causal` | no | no, queries are scaled | no, keys are repeated |
| 2.11 | `window_size` | `window_size` | `scale` | no, keys are repeated |
| 2.12 and later | `window_size` | `window_size` | `scale` | `enable_gqa` |

Where it cannot work (torch 2.9, float32, a processor before Ampere, an odd head width, a window on
torch 2.10) documents go one by one (attention.py).
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from postgrad.model.layout import Layout
from postgrad.model.transfer import on_device

WIDTH_MULTIPLE, GREATEST_WIDTH = 8, 256
"""Head widths that the flash kernel takes."""
LEAST_CAPABILITY = (8, 0)
"""Compute capability that the flash kernel needs: Ampere."""

Kernel = Callable[..., Any]


def varlen_attention(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float
) -> Tensor:
    """All documents of `layout` in one call: q [T, H, D], k and v [T, K, D] -> [T, H, D].

    The kernel gets the arguments that its release knows. Its window counts the tokens *before* the
    query, so a window of W tokens is W - 1 to the left, 0 to the right.
    """
    known = _parameters(kernel)
    more: dict[str, Any] = {}
    if "window_size" in known:
        more["window_size"] = (-1 if layout.window is None else layout.window - 1, 0)
    else:
        assert layout.window is None
        more["is_causal"] = True
    if "scale" in known:
        more["scale"] = scale
    else:
        q = q * (scale * math.sqrt(q.shape[-1]))
    if "enable_gqa" in known:
        more["enable_gqa"] = q.shape[1] != k.shape[1]
    elif q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    ends, longest = _ends(layout.lengths, q.device), max(layout.lengths)
    out: Tensor = kernel(q, k, v, ends, ends, longest, longest, **more)
    return out


def varlen_kernel(q: Tensor, layout: Layout) -> Kernel | None:
    """Return this release's kernel if it can work on queries [T, H, D]."""
    kernel = _installed()
    return kernel if kernel is not None and takes(kernel, q, layout.window) else None


@functools.cache
def _installed() -> Kernel | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


@functools.cache
def _parameters(kernel: Kernel) -> frozenset[str]:
    return frozenset(inspect.signature(kernel).parameters)


def takes(kernel: Kernel, query: Tensor, window: int | None) -> bool:
    """Whether the kernel can work on queries [T, H, D] with this window."""
    width = query.shape[-1]
    return (
        query.dtype in (torch.bfloat16, torch.float16)
        and width % WIDTH_MULTIPLE == 0
        and width <= GREATEST_WIDTH
        and (window is None or "window_size" in _parameters(kernel))
        and torch.cuda.get_device_capability(query.device) >= LEAST_CAPABILITY
    )


@functools.lru_cache(maxsize=16)
def _ends(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """[documents + 1] int32: where each document ends, from 0; made once for all layers."""
    return on_device(np.cumsum((0, *lengths), dtype=np.int32), device)
