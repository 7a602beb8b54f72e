"""How much memory there is and how much a piece of work needs, on the CPU or a CUDA device."""

import ctypes
import gc
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from postgrad.machine import available_memory_bytes, proc_bytes


def available_bytes(device: torch.device) -> int:
    """Return the bytes that this process can still take, the container's limit included."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + cached)
    return available_memory_bytes()


def used_bytes(device: torch.device) -> int:
    """Return the bytes that this process holds now, after giving back what it no longer needs."""
    gc.collect()
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    _trim()
    return proc_bytes(Path("/proc/self/status")).get("VmRSS", _highest_resident_bytes())


@dataclass(slots=True)
class Peak:
    """The most that was held at one time inside a `peak_memory` block."""

    bytes: int = 0


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the highest use inside the block; read `.bytes` after it.

    On a CPU this is the peak resident size, which Linux can reset; elsewhere it is the highest
    since the process started, so it may be too high, never too low.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        _reset_peak()
    try:
        yield peak
    finally:
        if device.type == "cuda":
            peak.bytes = int(torch.cuda.max_memory_allocated(device))
        else:
            status = proc_bytes(Path("/proc/self/status"))
            peak.bytes = status.get("VmHWM", _highest_resident_bytes())


def _trim() -> None:
    """Make the C library return freed memory, which would otherwise count as held (glibc only)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return  # Not Linux, or not allowed: the peak since the start is the upper bound.


def _highest_resident_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
