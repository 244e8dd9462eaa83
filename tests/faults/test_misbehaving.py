"""Environments that answer what cannot be true, or do what none must, wherever a run has one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests.faults import dots
from tests.faults.forks import FULL, Ended, Found, forked
from tests.faults.runs import DIRECTORY, OUT, RESUME, START, command, difference, left

POLICY, STRUCK = Path("policy"), Path("struck")
NAMED = "rove: error: Environment 'reach'"
HARMLESS = ("act: forks", "act: prints", "act: changes seeds")
RAISED = {
    "act: raises": "ArithmeticError: the physics is broken",
    "act: raises what cannot be pickled": "the physics is odd",
    "act: raises without words": "StopIteration",
}
KILLED = {"act: dies": 11, "act: is killed": -11}
DEADLINE = ("--placement.deadline", "3")
APART = ("--placement.map", "hybrid", "--placement.env_workers", "1")
FEW = ("act: exits", "act: is killed", "seen: 0 to 1", "done: one a chunk")
"""What is tried where not all is."""


def words_of(fault: str, *more: str) -> tuple[str, ...]:
    """A run from a policy that is there, without evaluation, so that what strikes does so in a rollout."""
    return (
        *START, *"--sft none --policy.checkpoint policy --training.optim.warmup 0".split(),
        *"--evaluation.episodes 0 --evaluation.every 0 --evaluation.variant_episodes 0".split(),
        *("--env.fault", fault, "--env.marker", str(STRUCK.absolute())), *DEADLINE, *more,
    )  # fmt: skip


def make_a_policy() -> None:
    ended = forked(command, *START, "--training.iterations", "1")
    assert ended.status == 0, ended.text
    shutil.move(DIRECTORY / "best", POLICY)
    shutil.rmtree(DIRECTORY)


def is_told(fault: str, ended: Ended) -> str | None:
    """What is wrong with how a command ended whose environment, in its own process, had this fault."""
    if fault in HARMLESS:
        right = ended.status == 0
    elif fault in KILLED:
        right = ended.status == KILLED[fault]
    elif fault in RAISED:
        right = ended.status in (1, 2) and RAISED[fault] in ended.text
    elif fault == "act: wants memory":
        right = ended.refused and "Not enough memory" in ended.text
    else:
        right = ended.refused and NAMED in ended.text
    return None if right else str(ended)


def in_the_policys_process() -> Found:
    make_a_policy()
    found = Found("an environment misbehaves in the policy's process")
    for fault in dots.FAULTS if FULL else FEW:
        shutil.rmtree(DIRECTORY, ignore_errors=True)
        STRUCK.touch()
        assert forked(command, *words_of(fault)).status == 0
        wanted = left(DIRECTORY)
        shutil.rmtree(DIRECTORY)
        STRUCK.unlink()
        problem = is_told(fault, forked(command, *words_of(fault)))
        if not STRUCK.exists():
            problem = "it did not strike"
        if problem is None:
            ended = forked(command, *RESUME)
            problem = str(ended) if ended.status else difference(left(DIRECTORY), wanted)
        found.judge(fault, problem)
    return found


def in_a_process_of_its_own() -> Found:
    make_a_policy()
    found = Found("an environment misbehaves in a process of its own")
    some = ("seen: 0 to 1", "seen: nothing", "reset: NaN", "done: NaN", "done: None")
    for fault in (*(f"act: {how}" for how in dots.ACTS), *some):
        shutil.rmtree(DIRECTORY, ignore_errors=True)
        STRUCK.unlink(missing_ok=True)
        ended = forked(command, *words_of(fault, *APART))
        replaced = ended.status == 0 and ("A worker was replaced" in ended.text) == (fault not in HARMLESS)
        # One that does not even begin is not tried again.
        right = replaced or (fault.startswith("reset") and ended.refused and NAMED in ended.text)
        found.judge(fault, None if right and STRUCK.exists() else str(ended))
    return found


def in_an_evaluation_and_a_demonstration() -> Found:
    make_a_policy()
    found = Found("an environment misbehaves in an evaluation or a demonstration")
    evaluate = ("eval", str(POLICY), *"--suite dots --episodes 6 --num-envs 2 --out".split(), str(OUT))
    collect = ("collect", "dots", "--sft.episodes", "24", "--out", str(OUT.with_suffix(".npz")))
    for words in (evaluate, collect):
        for fault in dots.FAULTS:
            if fault in ("done: no final observation", "done: other final slots"):  # neither asks for them
                continue
            shutil.rmtree(OUT.parent, ignore_errors=True)
            told = forked(command, *words, "--env.fault", fault, "--env.chunk_number", "2", *DEADLINE)
            found.judge(f"{fault}, {words[0]}", is_told(fault, told))
    return found


def test_an_environment_in_the_policys_process(sweep):
    sweep(in_the_policys_process)


@pytest.mark.skipif(not FULL, reason="long: make test-faults runs it")
@pytest.mark.parametrize("inject", [in_a_process_of_its_own, in_an_evaluation_and_a_demonstration])
def test_an_environment_elsewhere(inject, sweep):
    sweep(inject)
