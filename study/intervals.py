"""What a handful of runs says about a mean, and about a difference between two objectives."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

Row = Mapping[str, Any]
STUDENT_T_975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)
"""The 97.5 % quantile of Student's t at 1, 2, ... degrees of freedom."""


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval.

    Args:
        mean: of the values.
        half_width: of the interval around it; NaN for a single value.
        count: number of values.
    """

    mean: float
    half_width: float
    count: int

    @property
    def excludes_zero(self) -> bool:
        """True if zero lies outside the interval."""
        return abs(self.mean) > self.half_width


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean of 1 to 10 values, with Student's interval `t s / sqrt(n)`."""
    if not 1 <= len(values) <= len(STUDENT_T_975) + 1:
        raise ValueError(f"`values` must be 1 to {len(STUDENT_T_975) + 1} numbers, got {len(values)}")
    if len(values) == 1:
        return Interval(values[0], float("nan"), 1)
    half_width = STUDENT_T_975[len(values) - 2] * stdev(values) / len(values) ** 0.5
    return Interval(fmean(values), half_width, len(values))


def paired_difference(rows: Iterable[Row], reference: Iterable[Row], field: str) -> Interval | None:
    """The mean of `row - reference` over the seeds that both have: equal seeds have equal prompts; None without any."""
    of_reference = {row["seed"]: row[field] for row in reference}
    differences = [row[field] - of_reference[row["seed"]] for row in rows if row["seed"] in of_reference]
    return mean_interval(differences) if differences else None


def verdict(difference: Interval) -> str:
    """What the interval of a difference says, more being better."""
    if difference.count < 2:
        return "one seed"
    if not difference.excludes_zero:
        return "no difference"
    return "**better**" if difference.mean > 0 else "**worse**"


def has_collapsed(row: Row) -> bool:
    """True if a run ends below where it began, or below half of its best."""
    return bool(row["final"] < row["initial"] or row["final"] < row["best"] / 2)
