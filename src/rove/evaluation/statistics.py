"""Success rates with their uncertainty: score intervals of proportions and of differences.

All intervals are two-sided, in closed form, and behave at 0 % and 100 %, where the textbook normal
approximation collapses to a point.

- Wilson, E. B. (1927), "Probable inference, the law of succession, and statistical inference", JASA 22.
- Newcombe, R. G. (1998a), "Interval estimation for the difference between independent proportions",
  Statistics in Medicine 17:873–890, method 10.
- Newcombe, R. G. (1998b), "Improved confidence intervals for the difference between binomial proportions
  based on paired data", Statistics in Medicine 17:2635–2650, method 10.
- Zou, G. Y., Donner, A. (2008), "Construction of confidence limits about effect measures: a general
  approach", Statistics in Medicine 27:1693–1702: limits of a sum from those of its terms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from rove.types import EpisodeRecord

Interval = tuple[float, float]


def wilson(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Score interval of a proportion (Wilson 1927), as fractions; (0, 1) when there were no trials.

    Example: `wilson(81, 263)` -> `(0.2553, 0.3662)`
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"successes must lie in [0, trials]; got {successes} of {trials}")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie strictly between 0 and 1; got {confidence}")
    if trials == 0:
        return 0.0, 1.0
    z2 = NormalDist().inv_cdf((1.0 + confidence) / 2.0) ** 2
    rate = successes / trials
    centre = (rate + z2 / (2 * trials)) / (1 + z2 / trials)
    half = math.sqrt(z2 * (rate * (1 - rate) + z2 / (4 * trials)) / trials) / (1 + z2 / trials)
    # At 0 and at all successes the bound is exact; rounding would miss it by an ulp.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == trials else centre + half
    return low, high


@dataclass(frozen=True, slots=True)
class Rate:
    """A success rate with the number of episodes behind it."""

    successes: int
    trials: int

    @staticmethod
    def of(records: Sequence[EpisodeRecord]) -> Rate:
        """Compute the success rate of episodes."""
        return Rate(sum(record.success for record in records), len(records))

    @property
    def rate(self) -> float:
        """The fraction of trials that succeeded; NaN without trials."""
        return self.successes / self.trials if self.trials else math.nan

    @property
    def interval(self) -> Interval:
        """The 95 % Wilson interval of the rate, as fractions."""
        return wilson(self.successes, self.trials)

    def __str__(self) -> str:
        """Format as `"61.3 % [55.1, 67.2]"`; `"–"` without trials."""
        if not self.trials:
            return "–"
        low, high = self.interval
        return f"{self.rate:.1%} [{100 * low:.1f}, {100 * high:.1f}]".replace("%", " %")


@dataclass(frozen=True, slots=True)
class Mean:
    """The plain mean of several success rates, each counting alike, in fractions, with its 95 % interval."""

    value: float
    low: float
    high: float

    @staticmethod
    def of(rates: Sequence[Rate]) -> Mean:
        """Average independent rates, each with at least one trial, else ValueError (Zou and Donner 2008)."""
        if not rates or not all(rate.trials for rate in rates):
            raise ValueError("the mean of success rates needs rates, each with at least one episode")
        value = sum(rate.rate for rate in rates) / len(rates)
        below = math.sqrt(sum((rate.rate - rate.interval[0]) ** 2 for rate in rates)) / len(rates)
        above = math.sqrt(sum((rate.interval[1] - rate.rate) ** 2 for rate in rates)) / len(rates)
        return Mean(value, value - below, value + above)

    def __str__(self) -> str:
        """Format as `"61.3 % [55.1, 67.2]"`."""
        return f"{self.value:.1%} [{100 * self.low:.1f}, {100 * self.high:.1f}]".replace("%", " %")


@dataclass(frozen=True, slots=True)
class Difference:
    """The difference of two success rates, first minus second, in fractions, with its 95 % interval."""

    value: float
    low: float
    high: float
    paired: bool
    """True where both rates come from the same episodes."""

    def __str__(self) -> str:
        """Format as `"+31.6 points [+24.1, +38.2]"`."""
        return f"{100 * self.value:+.1f} points [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


def newcombe_difference(first: Rate, second: Rate, confidence: float = 0.95) -> Difference:
    """Compute `first - second` for two independent sets of episodes (Newcombe 1998a, method 10).

    Raises ValueError when either has no trials.
    """
    return _square_and_add(first, second, 0.0, confidence, paired=False)


def paired_difference(
    first: Sequence[EpisodeRecord], second: Sequence[EpisodeRecord], confidence: float = 0.95
) -> Difference:
    """Compute `first - second` for the same episodes run under two policies (Newcombe 1998b, method 10).

    The interval is in closed form (no resampling): it narrows the independent one by the correlation of
    the two outcomes. Records are matched by `EpisodeRecord.spec`, in any order; ValueError when the two do
    not cover the same episodes once each.
    """
    outcome = {record.spec: record.success for record in second}
    if {record.spec for record in first} != outcome.keys() or not len(first) == len(second) == len(outcome):
        raise ValueError(
            f"a paired difference needs the same episodes on both sides, once each; got {len(first)} and "
            f"{len(second)} that differ. Use newcombe_difference for different episodes."
        )
    cells = [(record.success, outcome[record.spec]) for record in first]
    phi = _correlation(
        *(cells.count(cell) for cell in [(True, True), (True, False), (False, True), (False, False)])
    )
    return _square_and_add(Rate.of(first), Rate.of(second), phi, confidence, paired=True)


def difference(first: Sequence[EpisodeRecord], second: Sequence[EpisodeRecord]) -> Difference:
    """Compute `first - second`, paired where both hold the same episodes, else independent."""
    if {record.spec for record in first} == {record.spec for record in second}:
        return paired_difference(first, second)
    return newcombe_difference(Rate.of(first), Rate.of(second))


def by(records: Sequence[EpisodeRecord], key: Callable[[EpisodeRecord], str]) -> dict[str, Rate]:
    """Compute the success rate of each group of episodes, in the order in which the groups first appear.

    Example: `by(report.records, family)` -> `{"put": Rate(45, 64), "push": Rate(60, 64)}`
    """
    groups: dict[str, list[EpisodeRecord]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return {name: Rate.of(group) for name, group in groups.items()}


def task(record: EpisodeRecord) -> str:
    """Return the task id: a key for `by`."""
    return record.spec.task


def family(record: EpisodeRecord) -> str:
    """Return the task family, the part of the task id before the first slash: a key for `by`."""
    return record.spec.task.partition("/")[0]


def variant(record: EpisodeRecord) -> str:
    """Return the shifted variant, "none" in distribution: a key for `by`."""
    return record.spec.variant


def _correlation(both: int, first: int, second: int, neither: int) -> float:
    """Phi coefficient of a 2×2 table, with the continuity correction of Newcombe 1998b, method 10."""
    margins = (both + first) * (second + neither) * (both + second) * (first + neither)
    if margins == 0:
        return 0.0
    cross = both * neither - first * second
    if cross > 0:
        cross = max(cross - (both + first + second + neither) / 2, 0.0)
    return cross / math.sqrt(margins)


def _square_and_add(first: Rate, second: Rate, phi: float, confidence: float, paired: bool) -> Difference:
    if not first.trials or not second.trials:
        raise ValueError("the difference of two success rates needs at least one episode on each side")
    low1, high1 = wilson(first.successes, first.trials, confidence)
    low2, high2 = wilson(second.successes, second.trials, confidence)
    below1, above1 = first.rate - low1, high1 - first.rate
    below2, above2 = second.rate - low2, high2 - second.rate
    value = first.rate - second.rate
    down = math.sqrt(below1**2 - 2 * phi * below1 * above2 + above2**2)
    up = math.sqrt(above1**2 - 2 * phi * above1 * below2 + below2**2)
    return Difference(value, value - down, value + up, paired)
