"""An evaluation that is stopped goes on where it was; its tables weigh suites and tasks as they say."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.point_env import PointEnv

from rove.errors import RoveError
from rove.evaluation.evaluate import episodes, evaluate
from rove.evaluation.journal import Journal
from rove.evaluation.report import task_table
from rove.evaluation.statistics import Mean, Rate
from rove.policies.uniform import Uniform
from rove.types import EpisodeRecord, EpisodeSpec, EvalReport

ABOUT = {"seed": 3, "policy": "random"}


def judged(out: Path | None, stop_after: int | None = None) -> tuple[EvalReport, int]:
    """The report, and how many episodes were run for it."""
    env = PointEnv(4, "refill")
    policy = Uniform(env.action_spec, env.chunk)
    journal = Journal(out, ABOUT) if out else None
    ran = 0

    def keep(record: EpisodeRecord) -> None:
        nonlocal ran
        ran += 1
        if journal:
            journal.add(record)
        if ran == stop_after:
            raise KeyboardInterrupt

    specs = episodes(env.suite, 20)
    done = journal.done if journal else ()
    return evaluate(env, policy, specs, decoding="sample", seed=3, on_episode=keep, done=done), ran


def outcomes(report: EvalReport) -> list[tuple[EpisodeSpec, bool, int]]:
    return [(record.spec, record.success, record.length) for record in report.records]


def test_a_stopped_evaluation_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "eval.json"
    expected, _ = judged(None)
    with pytest.raises(KeyboardInterrupt):
        judged(out, stop_after=7)
    with (tmp_path / "eval.json.journal").open("a") as file:
        file.write('{"spec": {"task": "forw')  # the line that a crash cut short
    report, ran = judged(out)
    assert ran == 20 - 7
    assert outcomes(report) == outcomes(expected)


def test_another_evaluations_journal_is_refused(tmp_path: Path) -> None:
    Journal(tmp_path / "eval.json", ABOUT)
    with pytest.raises(RoveError, match="another evaluation"):
        Journal(tmp_path / "eval.json", {**ABOUT, "seed": 4})


def test_a_mean_of_rates_counts_each_alike() -> None:
    mean = Mean.of([Rate(1, 2), Rate(100, 100)])
    assert mean.value == 0.75
    assert 0.5 < mean.low < 0.6 < 0.9 < mean.high <= 1.0
    one = Rate(30, 40)
    assert (Mean.of([one]).low, Mean.of([one]).high) == pytest.approx(one.interval)
    with pytest.raises(ValueError, match="at least one episode"):
        Mean.of([one, Rate(0, 0)])


def test_the_task_table_has_both_means() -> None:
    def records(task: str, successes: int, trials: int) -> list[EpisodeRecord]:
        return [
            EpisodeRecord(EpisodeSpec(task, i), 0, i < successes, 5, float(i < successes), i >= successes)
            for i in range(trials)
        ]

    everything = [*records("a/one", 2, 2), *records("a/two", 2, 2), *records("b/three", 0, 2)]
    lines = task_table(EvalReport("suite", "held_out", "greedy", tuple(everything), 1.0)).splitlines()
    assert [line.split()[0] for line in lines[2:6]] == ["a", "one", "two", "b"]
    assert "50.0 %" in next(line for line in lines if line.startswith("mean of families"))
    assert "66.7 %" in next(line for line in lines if line.startswith("mean of tasks"))


def test_a_random_policy_acts_within_bounds_and_only_by_chance() -> None:
    env = PointEnv(2, "stop")
    policy = Uniform(env.action_spec, 5)
    with pytest.raises(RoveError, match="--decoding sample"):
        policy.act(env.reset(episodes(env.suite, 2)), "greedy")
