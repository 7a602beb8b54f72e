"""Packed attention on a CUDA device: one call of a kernel for all documents.

Documents of any lengths go to torch's flash kernel (varlen). Long documents of equal length go to
cuDNN's kernel (dense), which is written for Hopper and knows no other lengths: on an H100 the flash
kernel reached 245 TFLOP/s with documents of 4,096 tokens (LOG.md).

The flash kernel is `torch.nn.attention.varlen.varlen_attn`; what it takes differs from release to
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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from postgrad.model.layout import Layout
from postgrad.model.transfer import on_device

WIDTH_MULTIPLE, GREATEST_WIDTH = 8, 256
"""Head widths that the flash kernel takes."""
LEAST_CAPABILITY = (8, 0)
"""Compute capability that the flash kernel needs: Ampere."""
DENSE_LEAST, DENSE_WIDTHS, DENSE_CAPABILITY = 1024, (64, 128), (9, 0)
"""Tokens of a document, head widths and compute capability (Hopper) from which cuDNN's kernel is
taken for documents of equal length."""
DENSE_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""In this order."""

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
    ends = _ends(layout.lengths, q.device) if layout.ends is None else layout.ends
    longest = max(layout.lengths)
    out: Tensor = kernel(q, k, v, ends, ends, longest, longest, **more)
    return out


def dense_pays(q: Tensor, layout: Layout) -> bool:
    """Whether cuDNN's kernel takes these documents and is the faster one: queries [T, H, D]."""
    length = layout.lengths[0]
    return (
        (layout.ends is None or layout.fixed)
        and layout.window is None
        and length >= DENSE_LEAST
        and layout.lengths == (length,) * len(layout.lengths)
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] in DENSE_WIDTHS
        and torch.cuda.get_device_capability(q.device) >= DENSE_CAPABILITY
    )


def dense_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> Tensor:
    """Documents of equal length: q [T, H, D], k and v [T, K, D] -> [T, H, D].

    Where cuDNN cannot work after all, torch takes its next kernel.
    """
    shape = (len(layout.lengths), layout.lengths[0])
    q, k, v = (x.reshape(*shape, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(DENSE_BACKENDS, set_priority=True):
        out = scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    return out.transpose(1, 2).flatten(0, 1)


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
