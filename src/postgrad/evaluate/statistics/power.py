"""How many rows show which difference: the smallest detectable one, and the planner."""

import math

from postgrad.evaluate.statistics.intervals import NORMAL, critical_value


def detectable_share_difference(
    discordance: float, n: int, confidence: float = 0.95, power: float = 0.8
) -> float:
    """Return the smallest true difference of two paired shares that n rows would have shown.

    Shown means: McNemar's exact test significant with probability `power` or more (within a point
    of 0.8 from about 30 discordant rows on, up to 0.92 below). `discordance` is the
    share of rows on which exactly one arm is right; where it is too small for any difference to
    show, the answer is the smallest discordance, all in one direction, that would. 1 means that n
    rows cannot show anything at this confidence.

    Source: Connor 1987, Biometrics 43:207, solved for the difference, with a continuity correction
    of one row for the exact test.
    """
    assert 0 <= discordance <= 1, discordance
    z_level, z_power = critical_value(confidence), NORMAL.inv_cdf(power)

    def surplus(difference: float, share: float) -> float:
        spread = z_power * math.sqrt(n * max(share - difference * difference, 0.0))
        return n * difference - 1 - z_level * math.sqrt(n * share) - spread

    one_sided = surplus(discordance, discordance) < 0
    if one_sided and surplus(1.0, 1.0) < 0:
        return 1.0
    low, high = (discordance, 1.0) if one_sided else (0.0, discordance)
    for _ in range(60):
        middle = (low + high) / 2
        if surplus(middle, middle if one_sided else discordance) < 0:
            low = middle
        else:
            high = middle
    return high


def detectable_mean_difference(
    deviation: float, n: int, confidence: float = 0.95, power: float = 0.8
) -> float:
    """Return the smallest true difference of two paired means that n rows would have shown.

    `deviation` is the standard deviation of the differences, row by row.

    Source: Miller 2024, arXiv 2411.00640 (the usual normal power formula, paired).
    """
    assert n >= 1, n
    assert deviation >= 0, deviation
    return (critical_value(confidence) + NORMAL.inv_cdf(power)) * deviation / math.sqrt(n)


def items_needed(
    difference: float,
    *,
    discordance: float | None = None,
    deviation: float | None = None,
    power: float = 0.8,
    confidence: float = 0.95,
) -> int:
    """Return how many rows show a true difference of two arms with probability `power`.

    The inverse of `detectable_share_difference` (give `discordance`, the share of rows on which
    exactly one arm is right) and of `detectable_mean_difference` (give `deviation`, the standard
    deviation of the differences of graded scores). A discordance below the difference is raised to
    it: arms that differ by 5 points are discordant on at least 5 % of the rows.

    Source: Connor 1987, Biometrics 43:207 with a continuity correction of one row; Miller 2024,
    arXiv 2411.00640, section 5.
    """
    assert 0 < difference <= 1, difference
    assert (discordance is None) != (deviation is None), "one measure of spread"
    z_level, z_power = critical_value(confidence), NORMAL.inv_cdf(power)
    if deviation is not None:
        return max(1, math.ceil(((z_level + z_power) * deviation / difference) ** 2))
    share = max(discordance or 0.0, difference)
    spread = z_level * math.sqrt(share) + z_power * math.sqrt(share - difference * difference)
    root = (spread + math.sqrt(spread * spread + 4 * difference)) / (2 * difference)
    return math.ceil(root * root - 1e-9)


def items_to_certify(
    margin: float,
    *,
    discordance: float | None = None,
    deviation: float | None = None,
    power: float = 0.8,
    confidence: float = 0.95,
) -> int:
    """Return how many rows show that no more than `margin` was lost when nothing was lost.

    One-sided: the lower bound at `confidence` is above -margin with probability `power`.

    Source: Blackwelder 1982, Control. Clin. Trials 3:345, for pairs: Liu et al. 2002, Stat. Med.
    21:231.
    """
    assert 0 < margin <= 1, margin
    assert (discordance is None) != (deviation is None), "one measure of spread"
    spread = math.sqrt(discordance or 0.0) if deviation is None else deviation
    z = NORMAL.inv_cdf(confidence)
    normal = ((z + NORMAL.inv_cdf(power)) * spread / margin) ** 2
    unseen = z * z * (1 - margin) / margin  # rows without any discordance that rule the margin out
    return max(1, math.ceil(max(normal, unseen)))
