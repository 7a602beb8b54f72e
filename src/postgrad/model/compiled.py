"""torch.compile for the definitions of fused.py: on a CUDA device each becomes one kernel.

Compiling takes a while, so a run must be long enough for it to pay; `pays` is the rule. Triton must
be installed (plain torch for CUDA on Linux brings it).
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

COMPILE_SECONDS = 20.0
"""What compiling all definitions may take, forward and backward, with and without gradients; the
first step with nothing in the cache took 2 to 8 seconds on an H100's host (LOG.md)."""
SAVED_SHARE = 0.15
"""Share of the training time that compiled definitions save. On an H100 29 % with the shape of an
8B model, 4 % with that of a 135M model whose host was the limit (LOG.md)."""

_switched_on = False


def available() -> bool:
    """Whether this machine can compile for its CUDA device."""
    return torch.cuda.is_available() and importlib.util.find_spec("triton") is not None


def pays(seconds: float) -> bool:
    """Whether a training that takes so long uncompiled saves more than compiling costs.

    >>> pays(100), pays(3600)
    (False, True)
    """
    return SAVED_SHARE * seconds > COMPILE_SECONDS


def switch(on: bool) -> None:
    """Compile definitions from now on, or no longer; for the process, as torch sets threads."""
    global _switched_on
    _switched_on = on


def realised(definition: Callable[..., Any], like: Tensor) -> Callable[..., Any]:
    """Return the compiled definition for a tensor on a CUDA device, if switched on."""
    return compiled(definition) if _switched_on and like.is_cuda else definition


@functools.cache
def compiled(definition: Callable[..., Any]) -> Callable[..., Any]:
    """Compile one definition for any number of rows."""
    return torch.compile(definition, dynamic=True)
