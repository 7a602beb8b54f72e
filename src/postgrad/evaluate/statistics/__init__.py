"""Intervals, paired tests, margins, power and seeds; numpy only, every random draw seeded.

Which method and why: Wilson for shares (Brown, Cai & DasGupta 2001); a bootstrap, widened where it
is known to be too narrow, for means of graded scores; the exact McNemar test with Tango's score
interval for two arms on the same rows with 0/1 scores (Fagerland, Lydersen & Laake 2014); the
paired randomisation test with the bootstrap of the differences for graded scores; clustered errors
and whole clusters in the randomisation test for rows that go together (Miller 2024); Holm's
correction across a suite. All two-sided, save the margin test. How often they err is measured by
benchmarks/error_rates.py.
"""

from postgrad.evaluate.statistics.intervals import (
    RESAMPLES,
    Interval,
    Values,
    bootstrap_mean,
    chance_adjusted,
    clustered_error,
    clustered_interval,
    critical_value,
    student_critical,
    student_within,
    wilson,
)
from postgrad.evaluate.statistics.levels import TwoLevels, two_levels
from postgrad.evaluate.statistics.multiple import holm
from postgrad.evaluate.statistics.paired import (
    PairedResult,
    clustered_p,
    mcnemar_exact,
    non_inferior,
    one_sided,
    paired_bootstrap,
    paired_share_interval,
)
from postgrad.evaluate.statistics.power import (
    detectable_mean_difference,
    detectable_share_difference,
    items_needed,
    items_to_certify,
)
from postgrad.evaluate.statistics.stratified import kept_share, stratified_mean

__all__ = [
    "RESAMPLES",
    "Interval",
    "PairedResult",
    "TwoLevels",
    "Values",
    "bootstrap_mean",
    "chance_adjusted",
    "clustered_error",
    "clustered_interval",
    "clustered_p",
    "critical_value",
    "detectable_mean_difference",
    "detectable_share_difference",
    "holm",
    "items_needed",
    "items_to_certify",
    "kept_share",
    "mcnemar_exact",
    "non_inferior",
    "one_sided",
    "paired_bootstrap",
    "paired_share_interval",
    "stratified_mean",
    "student_critical",
    "student_within",
    "two_levels",
    "wilson",
]
