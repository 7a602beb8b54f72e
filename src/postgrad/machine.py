"""What this machine is: versions that decide numbers, processor, cores, memory. No torch."""

import contextlib
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any


def versions() -> dict[str, str]:
    """Return the versions that decide numbers."""
    names = ("postgrad", "torch", "transformers", "tokenizers", "peft", "numpy", "safetensors")
    found = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def hardware() -> dict[str, Any]:
    """Return processor, cores and memory as the report prints them."""
    model, flags = platform.machine(), ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
            elif line.startswith("flags"):
                flags = line
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    features = [name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if name in flags]
    return {
        "system": platform.platform(terse=True),
        "processor": model,
        "features": features[:2],
        "cores": available_cores(),
        "memory_bytes": pages,
    }


def available_cores() -> int:
    """Return the processor cores this process may use (containers and taskset restrict them)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
