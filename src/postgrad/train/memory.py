"""How much memory there is and how much a piece of work needs, on the CPU or a CUDA device."""

import ctypes
import gc
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)
"""Limit, use and statistics of this container: control groups version 2, then version 1."""


def available_bytes(device: torch.device) -> int:
    """Return the bytes that this process can still take, the container's limit included."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + cached)
    free = _fields(Path("/proc/meminfo")).get("MemAvailable", _physical_bytes())
    return max(0, min([free, *_container_bytes()]))


def used_bytes(device: torch.device) -> int:
    """Return the bytes that this process holds now, after giving back what it no longer needs."""
    gc.collect()
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    _trim()
    return _fields(Path("/proc/self/status")).get("VmRSS", _highest_resident_bytes())


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
            status = _fields(Path("/proc/self/status"))
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


def _container_bytes() -> list[int]:
    """Return what the container's limit leaves: none or one figure; its file cache can be freed."""
    for limit_file, use_file, statistics in _CGROUPS:
        try:
            limit = Path(limit_file).read_text(encoding="ascii").strip()
            use = int(Path(use_file).read_text(encoding="ascii"))
        except (OSError, ValueError):
            continue
        if limit == "max":
            return []
        lines = Path(statistics).read_text(encoding="ascii").splitlines()
        cache = dict(line.split(maxsplit=1) for line in lines).get("inactive_file", "0")
        return [int(limit) - use + int(cache)]
    return []


def _fields(path: Path) -> dict[str, int]:
    """Read `Name:   123 kB` lines as bytes; empty where there is no /proc."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    parts = [line.split() for line in lines]
    return {p[0].rstrip(":"): int(p[1]) * 1024 for p in parts if len(p) == 3 and p[2] == "kB"}


def _physical_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _highest_resident_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
