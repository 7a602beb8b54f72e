"""Compile kernels.c and attention.c with the machine's own C compiler, once; call them on tensors.

Without a compiler nothing breaks: `library()` is None and everything runs as ordinary tensor
operations (see fused.py), slower. `POSTGRAD_KERNELS=off` chooses that on purpose.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from postgrad.sources import cache_directory

SOURCE = Path(__file__).with_name("kernels.c")
INCLUDED = (Path(__file__).with_name("attention.c"),)
FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
"""Nothing that changes results: sums keep their order but where the source says otherwise."""
ATTEMPTS = (("-march=native", "-fopenmp"), ("-march=native",), ())
"""Options tried in turn: not every compiler knows OpenMP (threads) or its own processor."""
_SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}


@dataclass(frozen=True, slots=True)
class Kernels:
    """The compiled functions, or why there are none."""

    library: ctypes.CDLL | None
    detail: str
    """The compiler's name and version, or the reason for doing without."""


@functools.cache
def kernels() -> Kernels:
    """Return the compiled kernels; compiles in a second or two the first time on a machine."""
    if os.environ.get("POSTGRAD_KERNELS", "on").lower() in ("off", "0"):
        return Kernels(None, "switched off by POSTGRAD_KERNELS")
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None:
        return Kernels(None, "no C compiler (cc) on this machine")
    version = _first_line([compiler, "--version"])
    texts = [path.read_text(encoding="utf-8") for path in (SOURCE, *INCLUDED)]
    key = "\n".join([*texts, compiler, version, _processor(), *FLAGS])
    target = cache_directory() / "kernels" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    try:
        if not target.exists():
            _compile(compiler, target)
        return Kernels(ctypes.CDLL(os.fspath(target)), version)
    except (OSError, subprocess.SubprocessError) as error:
        return Kernels(None, f"{version}: {str(error).splitlines()[-1]}")


def _compile(compiler: str, target: Path) -> None:
    """Build into a temporary file with the first options that the compiler takes, and move it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        built = Path(folder) / target.name
        for options in ATTEMPTS:
            command = [compiler, *FLAGS, *options, os.fspath(SOURCE), "-o", os.fspath(built), "-lm"]
            ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
            if ended.returncode == 0:
                built.replace(target)
                return
    raise subprocess.SubprocessError(ended.stderr.strip() or f"{compiler} failed")


def _first_line(command: list[str]) -> str:
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return (found.stdout.splitlines() or [command[0]])[0]


def _processor() -> str:
    """What -march=native depends on: a home directory can be shared by unlike machines."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    lines = (line for line in text.splitlines() if line.startswith(("model name", "flags")))
    return "\n".join(dict.fromkeys(lines))


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels can work on these: on the CPU, contiguous, all float32 or all bf16."""
    dtype = tensors[0].dtype
    return (
        dtype in _SUFFIXES
        and all(t.device.type == "cpu" and t.dtype == dtype and t.is_contiguous() for t in tensors)
        and kernels().library is not None
    )


def call(name: str, dtype: torch.dtype, *arguments: Tensor | float | int | None) -> None:
    """Call a function of kernels.c; tensors go as pointers, integers as int64, None as null."""
    function = getattr(kernels().library, f"{name}_{_SUFFIXES[dtype]}")
    function(*(_argument(argument) for argument in arguments))


def _argument(value: Tensor | float | int | None) -> object:
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int64(value)
