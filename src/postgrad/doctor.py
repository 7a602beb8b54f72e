"""What this machine can do and whether it is set up: the first half of `postgrad doctor`.

Torch is imported by `examine` only, because only torch knows what it can use.
"""

import os
import platform
import shutil
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

from postgrad.machine import available_cores, hardware
from postgrad.types import Check

LEAST_PYTHON = Version("3.11")
LEAST_FREE_BYTES = 5 * 10**9
"""A small model, its cache and a few checkpoints; below it a first run is likely to fail."""


def examine(folder: Path) -> tuple[Check, ...]:
    """Return checks of Python, packages, processor, accelerator and the disk of `folder`."""
    return (_python(), _packages(), _processor(), _accelerator(), _disk(folder))


def _python() -> Check:
    found = platform.python_version()
    passed = Version(found) >= LEAST_PYTHON
    remedy = "" if passed else f"make a virtual environment with Python {LEAST_PYTHON} or later"
    return Check("python", passed, f"Python {found} at {sys.executable}", remedy)


def _packages() -> Check:
    """Compare what is installed with the ranges that postgrad's own metadata declares."""
    try:
        requirements = metadata.requires("postgrad") or []
    except metadata.PackageNotFoundError:
        return Check("packages", False, "postgrad runs without being installed", "pip install -e .")
    return compare_versions(requirements)


def compare_versions(requirements: Iterable[str]) -> Check:
    """Return whether every requirement without a marker is installed and within its range."""
    versions: dict[str, str | None] = {}
    wrong: list[str] = []
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None:
            continue
        name = requirement.name
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
            wrong.append(f"{name} is missing")
            continue
        if not requirement.specifier.contains(Version(versions[name] or ""), prereleases=True):
            wrong.append(f"{name} {versions[name]} is outside {requirement.specifier}")
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    return Check(
        "packages",
        not wrong,
        "; ".join(wrong) or f"within the tested ranges: {listed}",
        "pip install --upgrade -c constraints.txt postgrad" if wrong else "",
        failures=len(wrong),
        data={"versions": versions},
    )


def _processor() -> Check:
    facts = hardware()
    memory = facts["memory_bytes"] / 1e9
    detail = f"{facts['processor']}, {available_cores()} cores, {memory:.1f} GB memory"
    return Check("processor", True, detail, data=facts)


def _accelerator() -> Check:
    try:
        import torch

        from postgrad.model.load import has_native_bf16
    except ImportError as error:
        return Check("accelerator", False, f"torch cannot be used: {error}", "pip install torch")
    native, threads = has_native_bf16(), torch.get_num_threads()
    precision = "bf16 native" if native else "no native bf16: computes in fp32"
    data: dict[str, Any] = {"torch": torch.__version__, "bf16": native, "threads": threads}
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        detail = f"torch {torch.__version__} on {', '.join(names)}, {precision}"
        return Check("accelerator", True, detail, data=data | {"devices": names})
    detail = f"torch {torch.__version__} on the CPU, {threads} threads, {precision}"
    driver = Path("/proc/driver/nvidia/version").exists()
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if driver and not hidden:
        remedy = "install a torch build with CUDA: this machine has an NVIDIA driver"
        return Check("accelerator", False, f"{detail}, no CUDA", remedy, data=data)
    return Check("accelerator", True, detail, data=data)


def _disk(folder: Path) -> Check:
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    writable = os.access(place, os.W_OK)
    passed = writable and free >= LEAST_FREE_BYTES
    state = "" if writable else ", not writable"
    return Check(
        "disk",
        passed,
        f"{free / 1e9:.1f} GB free at {place}{state}",
        "" if passed else "free some space, or give another directory with --out",
        data={"free_bytes": free, "path": str(place)},
    )
