"""The learning rate as a pure function of progress: no state, so nothing to save or to resume."""

import math


def learning_rate(
    step: int, steps: int, peak: float, kind: str = "linear", warmup_ratio: float = 0.03
) -> float:
    """Return the learning rate of optimizer step `step` (0-based) of `steps`.

    Rises linearly over the first `warmup_ratio` of the steps, then falls to zero along a line or a
    half cosine, or stays. The first step is never zero.

    >>> [learning_rate(s, 4, 1.0, "linear", 0.0) for s in range(4)]
    [1.0, 0.75, 0.5, 0.25]
    """
    warmup = math.ceil(steps * warmup_ratio)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    if kind == "linear":
        return peak * (1 - progress)
    if kind == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    assert kind == "constant", kind
    return peak
