"""Several tests at once: how sure the family of them is."""

from collections.abc import Sequence


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected so that one false alarm in the whole suite has the stated level.

    The smallest of m is multiplied by m, the next by m - 1, and so on; never below one before it,
    never above 1. Holds whatever the dependence between the tests, and always finds at least what
    Bonferroni finds.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]

    Source: Holm 1979, Scand. J. Stat. 6:65.
    """
    corrected = [1.0] * len(p_values)
    largest = 0.0
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected
