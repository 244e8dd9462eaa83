"""Success of several runs that were evaluated on the same episodes: its mean over seeds, and differences.

A table holds a row a seed and a column an episode, the same episode in each row. Two things are chance in it:
which seeds were run, and which episodes they were judged by. An interval has a part of each:

- seeds: Student's, of the rows' means. They are not resampled: a percentile of resampled seeds never leaves
  their range, and the range of three holds the mean of all seeds in three cases of four at most, whatever is
  written beside it.
- episodes: a bootstrap, resampled within each task (`scipy.stats.bootstrap`), the same ones in every row.

Both parts are squared and added, below and above (Zou and Donner 2008). With one seed only the second is
left, and the interval says nothing of other seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from rove.errors import RoveError
from rove.evaluation.statistics import Difference, Interval, Mean, Rate
from rove.types import EpisodeRecord

_RESAMPLES = 4000

Seeds = Mapping[int, Sequence[EpisodeRecord]]
"""Seed -> the episodes that the run with it was judged by."""


def require() -> None:
    """Raise RoveError, with the install command, where SciPy is not installed."""
    try:
        import scipy.stats  # noqa: F401
    except ImportError as error:
        raise RoveError("SciPy is not installed: pip install 'rove[study]'.") from error


def mean_success(runs: Seeds) -> Mean:
    """Compute the mean over seeds of success, in fractions, with its 95 % interval.

    Raises RoveError where there is no run, or one was judged by other episodes.
    """
    outcomes, strata = _table([runs])
    value, (low, high) = _mean(outcomes[0], strata)
    return Mean(value, max(low, 0.0), min(high, 1.0))


def difference_in_success(first: Seeds, second: Seeds) -> Difference:
    """Compute `first - second` over the seeds that both have, episode by episode, with its 95 % interval.

    Raises RoveError where they have no seed in common, or were judged by other episodes.
    """
    seeds = [seed for seed in first if seed in second]
    outcomes, strata = _table([{seed: runs[seed] for seed in seeds} for runs in (first, second)])
    value, (low, high) = _mean(outcomes[0] - outcomes[1], strata)
    return Difference(value, max(low, -1.0), min(high, 1.0), paired=True)


def _table(arms: Sequence[Seeds]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the outcomes of each arm, float64 [seeds, episodes], and the columns of each task."""
    rows = [[{r.spec: r.success for r in records} for records in runs.values()] for runs in arms]
    if not rows or not rows[0] or not rows[0][0]:
        raise RoveError("Nothing can be compared: there is no run with episodes.")
    specs = list(rows[0][0])
    if any(row.keys() != rows[0][0].keys() for arm in rows for row in arm):
        raise RoveError("Runs that were judged by different episodes cannot be compared episode by episode.")
    tasks: dict[tuple[str, str], list[int]] = {}
    for column, spec in enumerate(specs):
        tasks.setdefault((spec.task, spec.variant), []).append(column)
    outcomes = [np.array([[float(row[spec]) for spec in specs] for row in arm]) for arm in rows]
    return outcomes, [np.array(columns) for columns in tasks.values()]


def _mean(table: np.ndarray, strata: Sequence[np.ndarray]) -> tuple[float, Interval]:
    """Return the mean of a table [seeds, episodes], and its 95 % interval."""
    from scipy import stats

    value, seeds = float(table.mean()), len(table)
    between = 0.0
    if seeds > 1:
        between = float(stats.t.ppf(0.975, seeds - 1)) * table.mean(1).std(ddof=1) / math.sqrt(seeds)
    columns = table.mean(0)
    of_tasks = [columns[stratum] for stratum in strata if len(stratum) > 1]
    low = high = value
    if of_tasks:
        fixed = sum(float(columns[stratum].sum()) for stratum in strata if len(stratum) == 1)
        low, high = stats.bootstrap(
            of_tasks,
            lambda *tasks, axis: (sum(task.sum(axis) for task in tasks) + fixed) / len(columns),
            n_resamples=_RESAMPLES,
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
    return value, (value - math.hypot(between, value - low), value + math.hypot(between, high - value))


# --- what was found, in words ---------------------------------------------------------------------

Claimed = Literal["higher", "same"] | None
"""A claim of the first of two: that it is higher than the second, as high; None: there is none."""


def found(first: str, second: str, difference: Difference) -> str:
    """Say which of two is higher by how much, or, where the interval of `first - second` holds zero, that no
    difference was seen, and how large one may have been missed."""
    low, high = 100 * difference.low, 100 * difference.high
    if low <= 0 <= high:
        return f"no difference seen between {first} and {second}, smaller than {max(-low, high):.1f} points"
    if high < 0:
        first, second, low, high = second, first, -high, -low
    value = abs(100 * difference.value)
    return f"{first} ends higher than {second}, by {value:.1f} points [{low:.1f}, {high:.1f}]"


def verdict(claimed: Claimed, difference: Difference) -> str:
    """Say how the difference `first - second` stands to what is claimed of it."""
    if claimed is None:
        return "nothing is claimed of these two"
    none_seen = difference.low <= 0 <= difference.high
    if claimed == "same":
        return "agrees with the claim, as far as can be seen" if none_seen else "disagrees with the claim"
    if none_seen:
        return "neither agrees nor disagrees with the claim"
    return "agrees with the claim" if difference.low > 0 else "disagrees with the claim"


def collapsed(success: Sequence[Rate]) -> bool:
    """Whether success fell below half of its best along a run, by more than chance: the upper end of a later
    95 % interval below half of the lower end of an earlier one."""
    best = 0.0
    for rate in success:
        if rate.trials:
            low, high = rate.interval
            if high < best / 2:
                return True
            best = max(best, low)
    return False
