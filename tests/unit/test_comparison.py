"""Means and differences over seeds: known values, coverage on simulated runs, and what is said of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from rove.errors import RoveError
from rove.evaluation import comparison
from rove.evaluation.comparison import collapsed, difference_in_success, found, mean_success, verdict
from rove.evaluation.statistics import Difference, Rate
from rove.types import EpisodeRecord, EpisodeSpec

TASKS, EACH = 4, 24


def episodes(success, task: str = "pick") -> list[EpisodeRecord]:
    return [
        EpisodeRecord(EpisodeSpec(task, number), 0, bool(won), 8, float(won), not won)
        for number, won in enumerate(success)
    ]


def columns(tasks: int = TASKS, each: int = EACH) -> list[np.ndarray]:
    return [np.arange(task * each, (task + 1) * each) for task in range(tasks)]


def test_seeds_add_students_interval():
    """Rows without a difference between episodes: 4.303 · 0.1 / √3 on either side."""
    table = np.repeat([[0.5], [0.6], [0.7]], TASKS * EACH, axis=1)
    value, (low, high) = comparison._mean(table, columns())
    assert value == pytest.approx(0.6)
    assert (high - value, value - low) == pytest.approx((4.302653 * 0.1 / math.sqrt(3),) * 2, rel=1e-5)


def test_one_seed_has_the_interval_of_its_episodes():
    """64 of 96 in one task: the normal interval is ± 1.96 · √(p (1 − p) / n) = 9.4 points."""
    result = mean_success({1: episodes([1, 1, 0] * 32)})
    assert result.value == pytest.approx(2 / 3)
    expected = 1.96 * math.sqrt(2 / 9 / 96)
    assert result.value - result.low == pytest.approx(expected, abs=0.012)
    assert result.high - result.value == pytest.approx(expected, abs=0.012)


def test_episodes_are_resampled_within_their_task():
    """A task that always succeeds and one that never does say nothing of chance when taken apart."""
    sure = episodes([True] * 20, "easy") + episodes([False] * 20, "hard")
    assert (mean_success({1: sure}).low, mean_success({1: sure}).high) == (0.5, 0.5)
    mixed = episodes([True] * 20 + [False] * 20)
    assert mean_success({1: mixed}).high > 0.6
    lone = [*episodes([True, False] * 20), *episodes([True], "once")]
    assert mean_success({1: lone}).value == pytest.approx(21 / 41)


def test_a_difference_is_taken_episode_by_episode():
    """Both arms fail in the same hard half: the difference is sure, unlike two rates."""
    hard = [True] * 40 + [False] * 40
    first = {seed: episodes(hard) for seed in (1, 2, 3)}
    second = {seed: episodes([*hard[:36], *[False] * 44]) for seed in (1, 2, 3)}
    result = difference_in_success(first, second)
    assert result.value == pytest.approx(4 / 80) and result.paired
    assert 0.0 < result.low < result.high < 0.11
    backwards = difference_in_success(second, first)
    assert (backwards.value, -backwards.low) == pytest.approx((-result.value, result.high), abs=0.01)
    only = difference_in_success({1: first[1], 7: first[2]}, {1: second[1], 8: second[2]})
    assert only.value == pytest.approx(4 / 80)


def test_what_cannot_be_compared_is_refused():
    one, other = episodes([True, False]), episodes([True, False], "push")
    with pytest.raises(RoveError, match="judged by different episodes"):
        difference_in_success({1: one}, {1: other})
    with pytest.raises(RoveError, match="judged by different episodes"):
        mean_success({1: one, 2: one[:1]})
    with pytest.raises(RoveError, match="no run with episodes"):
        difference_in_success({1: one}, {2: one})


def simulated(generator: np.random.Generator, seeds: int, spread: float, gap: float = 0.0) -> np.ndarray:
    """Outcomes [2, seeds, episodes] of two arms, the first `gap` better in log-odds, that share episodes;
    `spread` is the deviation of a seed's log-odds in each arm."""
    hardness = np.repeat([-1.0, 0.0, 0.5, 1.0], EACH) + generator.normal(0, 1, TASKS * EACH)
    ability = generator.normal(0, spread, (2, seeds, 1)) + np.array([gap, 0.0])[:, None, None]
    return (generator.random((2, seeds, TASKS * EACH)) < 1 / (1 + np.exp(-hardness - ability))).astype(float)


@pytest.mark.parametrize(("seeds", "spread"), [(1, 0.0), (3, 0.0), (3, 0.5)])
def test_an_interval_of_95_percent_holds_the_truth_as_often(seeds, spread, monkeypatch):
    """Of a rate and of a difference, whether seeds or episodes are most of the chance; 200 simulated studies
    tell it to 1.5 points."""
    monkeypatch.setattr(comparison, "_RESAMPLES", 300)
    generator = np.random.default_rng(seeds)
    truth = np.array([simulated(generator, 1, spread, 0.8).mean((1, 2)) for _ in range(2000)]).mean(0)
    strata, runs = columns(), 200
    held = np.zeros(2)
    for _ in range(runs):
        first, second = simulated(generator, seeds, spread, 0.8)
        for i, (table, true) in enumerate(((first, truth[0]), (first - second, truth[0] - truth[1]))):
            low, high = comparison._mean(table, strata)[1]
            held[i] += low <= true <= high
    assert (held / runs >= 0.91).all(), held / runs


def test_resampling_three_seeds_alone_would_not_do():
    """Why Student's interval is there: the bootstrap's misses the mean of three in a quarter of all cases."""
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(100):
        rates = generator.normal(0.6, 0.05, 3)
        made = stats.bootstrap((rates,), np.mean, n_resamples=200, method="percentile", rng=generator)
        held += made.confidence_interval.low <= 0.6 <= made.confidence_interval.high
    assert held / 100 < 0.85


def test_no_winner_is_named_where_the_interval_holds_zero():
    gap = Difference(0.02, -0.031, 0.083, True)
    assert found("A", "B", gap) == "no difference seen between A and B, smaller than 8.3 points"
    assert found("A", "B", Difference(0.0, -0.09, 0.04, True)).endswith("smaller than 9.0 points")


def test_the_higher_one_is_named_in_both_directions():
    assert found("A", "B", Difference(0.07, 0.02, 0.11, True)) == (
        "A ends higher than B, by 7.0 points [2.0, 11.0]"
    )
    assert found("A", "B", Difference(-0.07, -0.11, -0.02, True)) == (
        "B ends higher than A, by 7.0 points [2.0, 11.0]"
    )


@pytest.mark.parametrize(
    ("claimed", "low", "high", "said"),
    [
        ("higher", 0.01, 0.1, "agrees with the claim"),
        ("higher", -0.1, -0.01, "disagrees with the claim"),
        ("higher", -0.1, 0.1, "neither agrees nor disagrees with the claim"),
        ("same", -0.1, 0.1, "agrees with the claim, as far as can be seen"),
        ("same", 0.01, 0.1, "disagrees with the claim"),
        (None, 0.01, 0.1, "nothing is claimed of these two"),
    ],
)
def test_a_claim_is_compared_with_the_interval(claimed, low, high, said):
    assert verdict(claimed, Difference((low + high) / 2, low, high, True)) == said


def test_a_collapse_is_half_of_the_best_and_no_chance():
    up = [Rate(n, 200) for n in (80, 120, 160, 150)]
    assert not collapsed(up)
    assert collapsed([*up, Rate(40, 200), Rate(150, 200)])
    assert not collapsed([*up, Rate(2, 6)]), "six episodes do not show it"
    assert not collapsed([Rate(0, 0), *up]) and not collapsed([])
