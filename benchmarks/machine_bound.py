"""What this machine could do at best: matrix products of the model's own shapes, timed.

Usage: python machine_bound.py BASE [bf16] [fp32] [int8]. Prints one JSON document. int8: products
with frozen weights in int8, everything else in bf16, as postgrad trains LoRA by default.

Counted in multiplications and additions (2 for each weight), per token:

                    LoRA                                    full tuning
    linear layers   2 forward and 2 for the gradient of     2 forward and 4 backward
                    the input: the weight is frozen
    adapters        2 forward and 4 backward, for A and B   none
    output head     2 forward and 2 backward                2 forward and 4 backward

The head counts on supervised positions only.

Nothing else is counted: no attention scores, norms, activations, optimizer or batch layout. A
trainer that did only these products, each at its best speed, would be at 100 %.
"""

import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from postgrad.machine import available_cores
from postgrad.model import int8
from postgrad.model.load import model_directory

TOKENS = 2048
"""Rows of the activation matrix: more makes a product no faster."""
HEAD_TOKENS = 512
WINDOWS = 3
WINDOW_SECONDS = 0.1
"""Long enough for the clock of a processor under load to settle."""
RANK = 16

PRECISIONS = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp32": (torch.float32, torch.float32),
    "int8": (torch.bfloat16, torch.int8),
}
"""Name -> what everything else is multiplied in, and frozen weights."""

Shape = tuple[int, int]


def linear_shapes(directory: Path) -> tuple[Counter[Shape], Shape]:
    """Return how often each [out, in] occurs among the frozen layers, and the head's shape."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    counts = Counter((m.out_features, m.in_features) for m in layers)
    return counts, (head.out_features, head.in_features)


def gflops(shape: Shape, tokens: int, dtype: torch.dtype) -> tuple[float, float, float]:
    """Return GFLOP/s of x Wᵀ (forward), g W (gradient of the input), gᵀ x (of the weight)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out, width = shape
    size = 40 if dtype == torch.int8 else 1
    weight = (size * torch.randn(out, width, device=device)).to(dtype)
    x = (size * torch.randn(tokens, width, device=device)).to(dtype)
    gradient = (size * torch.randn(tokens, out, device=device)).to(dtype)
    work = 2 * tokens * out * width
    seconds = (
        _seconds(x, weight.t()),
        _seconds(gradient, weight),
        float("inf") if dtype == torch.int8 else _seconds(gradient.t(), x),
    )
    forward, backward, weight_gradient = (work / each / 1e9 for each in seconds)
    return forward, backward, weight_gradient


def _seconds(a: Tensor, b: Tensor) -> float:
    """Time one product as training would repeat it: the best of several windows.

    The result is written to memory that is there already.
    """
    whole = a.dtype == torch.int8
    dtype, product = (torch.int32, torch._int_mm) if whole else (a.dtype, torch.mm)
    result = torch.empty(len(a), b.shape[1], dtype=dtype, device=a.device)
    windows = []
    count = 1
    for window in range(2 + WINDOWS):
        _finish(a)
        began = time.perf_counter()
        for _ in range(count):
            product(a, b, out=result)
        _finish(a)
        each = (time.perf_counter() - began) / count
        if window < 2:  # the first call prepares, the second says how many fill a window
            count = 1 if window == 0 else max(1, round(WINDOW_SECONDS / each))
        else:
            windows.append(each)
    return min(windows)


def _finish(tensor: Tensor) -> None:
    """Wait for a device that works ahead."""
    if tensor.is_cuda:
        torch.cuda.synchronize()


def measure(
    counts: Counter[Shape],
    head: Shape,
    dtype: torch.dtype,
    frozen_dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Return seconds per token of the counted products, and the speed of each shape.

    Frozen weights are multiplied in `frozen_dtype`, where that is given.
    """
    speeds = {shape: gflops(shape, TOKENS, dtype) for shape in counts}
    of_frozen = speeds
    if frozen_dtype not in (None, dtype):
        assert frozen_dtype is not None
        of_frozen = {shape: gflops(shape, TOKENS, frozen_dtype) for shape in counts}
    head_speed = gflops(head, HEAD_TOKENS, dtype)
    fastest = max(max(speed) for speed in speeds.values())
    frozen = {shape: 2 * shape[0] * shape[1] * number for shape, number in counts.items()}
    frozen_seconds = sum(
        frozen[shape] * (1 / forward + 1 / backward)
        for shape, (forward, backward, _) in of_frozen.items()
    )
    weight_seconds = sum(frozen[shape] / speed[2] for shape, speed in speeds.items())
    adapter_flops = 6 * sum(RANK * (o + i) * number for (o, i), number in counts.items())
    head_flops = 2 * head[0] * head[1]
    total = 2 * sum(frozen.values())
    return {
        "gflops": total / frozen_seconds,
        "frozen_seconds_per_token": frozen_seconds / 1e9,
        "adapter_seconds_per_token": adapter_flops / fastest / 1e9,
        "head_seconds_per_supervised_token": (
            sum(head_flops / speed for speed in head_speed[:2]) / 1e9
        ),
        "weight_gradient_seconds_per_token": weight_seconds / 1e9,
        "head_weight_gradient_seconds_per_supervised_token": head_flops / head_speed[2] / 1e9,
        "frozen_flops_per_token": total,
        "adapter_flops_per_token": adapter_flops,
        "head_flops_per_supervised_token": 2 * head_flops,
        "shapes": {
            f"{o}x{i}": [round(each, 1) for each in speed]
            for (o, i), speed in {**of_frozen, head: head_speed}.items()
        },
    }


def main() -> None:
    """Measure with one thread and with all; keep the faster."""
    directory = model_directory(sys.argv[1])
    counts, head = linear_shapes(directory)
    found: dict[str, Any] = {}
    for name in sys.argv[2:] or list(PRECISIONS):
        if name == "int8" and int8.why_not(torch.device("cpu")):
            continue
        for threads in sorted({1, available_cores()}):
            torch.set_num_threads(threads)
            result = {"threads": threads, **measure(counts, head, *PRECISIONS[name])}
            if name not in found or result["gflops"] > found[name]["gflops"]:
                found[name] = result
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
