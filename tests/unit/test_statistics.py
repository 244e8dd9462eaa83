"""Intervals against the values printed in the papers that defined them."""

import math

import pytest
from synthetic import records

from rove.evaluation.statistics import (
    Rate,
    by,
    difference,
    family,
    newcombe_difference,
    paired_difference,
    task,
    wilson,
)
from rove.types import EpisodeRecord, EpisodeSpec


def outcomes(flags):
    return [
        EpisodeRecord(EpisodeSpec("put/a/b", i), 0, flag, 10, float(flag), not flag)
        for i, flag in enumerate(flags)
    ]


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [  # Newcombe 1998, Statistics in Medicine 17:857–872, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_matches_the_published_values(successes, trials, low, high):
    assert wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_wilson_mirrors_and_widens():
    low, high = wilson(81, 263)
    assert wilson(263 - 81, 263) == pytest.approx((1 - high, 1 - low))
    assert wilson(81, 263, confidence=0.99)[0] < low
    assert wilson(20, 20)[1] == 1.0
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("successes", "trials"), [(3, 2), (-1, 2), (1, -1)])
def test_wilson_refuses_impossible_counts(successes, trials):
    with pytest.raises(ValueError, match="successes"):
        wilson(successes, trials)


@pytest.mark.parametrize(
    ("first", "second", "low", "high"),
    [  # Newcombe 1998a, table II, method 10
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((10, 10), (0, 10), 0.6075, 1.0),
    ],
)
def test_independent_difference_matches_the_published_values(first, second, low, high):
    result = newcombe_difference(Rate(*first), Rate(*second))
    assert (result.low, result.high) == pytest.approx((low, high), abs=5e-5)
    assert not result.paired


def test_paired_difference_matches_the_published_value():
    # Newcombe 1998b: 36 both, 12 first only, 2 second only, 0 neither.
    first = outcomes([True] * 48 + [False] * 2)
    second = outcomes([True] * 36 + [False] * 12 + [True] * 2)
    result = paired_difference(first, second[::-1])
    assert (result.value, result.low, result.high) == pytest.approx((0.2, 0.0569, 0.3404), abs=5e-5)


def test_pairing_narrows_the_interval_of_correlated_outcomes():
    first, second = outcomes([True] * 60 + [False] * 40), outcomes([True] * 50 + [False] * 50)
    paired = difference(first, second)
    independent = newcombe_difference(Rate.of(first), Rate.of(second))
    assert paired.paired
    assert paired.high - paired.low < 0.6 * (independent.high - independent.low)


def test_paired_difference_refuses_different_episodes():
    with pytest.raises(ValueError, match="same episodes"):
        paired_difference(outcomes([True, False]), outcomes([True]))
    with pytest.raises(ValueError, match="same episodes"):
        paired_difference(outcomes([True, False]) * 2, outcomes([True, False]) * 2)
    assert not difference(outcomes([True, False]), outcomes([True])).paired


def test_rate_reads_well():
    assert str(Rate(157, 256)) == "61.3 % [55.2, 67.1]"
    assert str(Rate(0, 0)) == "–"
    assert math.isnan(Rate(0, 0).rate)


def test_by_groups_every_episode_once():
    episodes = records(0.5, 50)
    tasks, families = by(episodes, task), by(episodes, family)
    assert list(families) == ["put", "stack", "push", "pick"]
    assert families["put"].trials == 20
    puts = [rate for name, rate in tasks.items() if name.startswith("put/")]
    assert families["put"].successes == sum(rate.successes for rate in puts)
    assert sum(rate.successes for rate in tasks.values()) == sum(record.success for record in episodes)
