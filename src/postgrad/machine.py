"""What this machine is: versions that decide numbers, processor, cores, memory. No torch."""

import contextlib
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)
"""Limit, use and statistics of this container: control groups version 2, then version 1."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """The first NVIDIA GPU that this process may use, as the driver describes it."""

    name: str
    free_bytes: int
    has_bf16: bool
    """Whether it multiplies bf16 natively (compute capability 8 and above)."""
    watts: float | None
    """Power limit; None when the driver does not say."""


def gpu() -> Gpu | None:
    """Ask the driver (nvidia-smi) for the GPU; None where there is none or it is hidden."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.split(",")[0].strip() in ("", "-1"):
        return None
    if shutil.which("nvidia-smi") is None:
        return None
    fields = "--query-gpu=name,memory.free,compute_cap,power.limit"
    command = ["nvidia-smi", fields, "--format=csv,noheader,nounits"]
    command += ["-i", visible.split(",")[0]] if visible else []
    answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    cells = [cell.strip() for cell in answer.stdout.partition("\n")[0].split(",")]
    if answer.returncode or len(cells) != 4:
        return None
    name, free, capability, limit = cells
    watts = None
    with contextlib.suppress(ValueError):
        watts = float(limit)
    return Gpu(name, int(free) * 2**20, float(capability) >= 8, watts)


def processor_watts() -> float | None:
    """Return the long-term power limit of all processor packages (Linux powercap), if readable."""
    watts = 0.0
    with contextlib.suppress(OSError, ValueError):
        for package in Path("/sys/class/powercap").glob("intel-rapl:?"):
            watts += int((package / "constraint_0_power_limit_uw").read_text()) / 1e6
    return watts or None


def has_native_bf16() -> bool:
    """Return whether the processor multiplies bf16 in hardware (AMX, AVX512-BF16, Arm BF16)."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return False
    return bool(flags & {"amx_bf16", "avx512_bf16", "bf16"})


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
    card = gpu()
    features = [name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if name in flags]
    return {
        "system": platform.platform(terse=True),
        "processor": model,
        "features": features[:2],
        "cores": available_cores(),
        "memory_bytes": _physical_bytes(),
        **({"gpu": card.name} if card else {}),
    }


def available_cores() -> int:
    """Return the processor cores this process may use (containers and taskset restrict them)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory_bytes() -> int:
    """Return the bytes of main memory still to be had, the container's limit included."""
    free = proc_bytes(Path("/proc/meminfo")).get("MemAvailable", _physical_bytes())
    return max(0, min([free, *_container_bytes()]))


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


def proc_bytes(path: Path) -> dict[str, int]:
    """Read `Name:   123 kB` lines as bytes; empty where there is no /proc."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    parts = [line.split() for line in lines]
    return {p[0].rstrip(":"): int(p[1]) * 1024 for p in parts if len(p) == 3 and p[2] == "kB"}


def _physical_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
