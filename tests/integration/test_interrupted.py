"""A run that ends early: what was finished is used, and the results are those of a run that did not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tests.integration.test_resume import BASE, NO_EVALUATION, measured

from rove import rundir
from rove.cluster.executor import Executor
from rove.config import load
from rove.config.validate import validate
from rove.errors import RoveError
from rove.interrupt import Interrupt, Interrupted
from rove.reporting.progress import Progress
from rove.train import Best, train
from rove.types import EpisodeRecord, EpisodeSpec

assert BASE.sft is not None
GROUNDED = replace(
    BASE,
    policy=replace(BASE.policy, pointers=3),
    sft=replace(BASE.sft, grounding=16, grounding_steps=4, color_jitter=0.2),
    training=replace(BASE.training, iterations=1, optim=replace(BASE.training.optim, warmup=0)),
    evaluation=NO_EVALUATION,
)
UNGROUNDED = replace(GROUNDED, policy=BASE.policy, sft=BASE.sft)


def warmed_up(directory: Path) -> bytes:
    return (directory / "sft" / "model.safetensors").read_bytes()


def logged(directory: Path) -> list[tuple[str, int]]:
    """(counter, number) of every line of the log."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [next((name, line[name]) for name in ("step", "sft_step") if name in line) for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that was not stopped."""
    return train(GROUNDED, tmp_path_factory.mktemp("whole") / "run")


@pytest.mark.parametrize(
    ("phase", "resume"), [("demonstrate", False), ("picture", False), ("point", True), ("sft", False)]
)
def test_a_warm_up_that_is_stopped_goes_on_where_it_was(phase, resume, whole, tmp_path, monkeypatch):
    advance, count = Progress.advance, [0]

    def stopped(self, n: int = 1) -> None:
        count[0] += self._phase == phase
        if count[0] == 2:
            signal.raise_signal(signal.SIGTERM)
        advance(self, n)

    monkeypatch.setattr(Progress, "advance", stopped)
    with pytest.raises(Interrupted) as ended:
        train(GROUNDED, tmp_path / "run")
    assert ended.value.exit_code == 143
    monkeypatch.undo()
    assert (tmp_path / "run" / "demonstrations.npz").exists() == (phase != "demonstrate")
    phases: list[str] = []
    begin = Progress.phase
    monkeypatch.setattr(
        Progress, "phase", lambda self, name, total: (phases.append(name), begin(self, name, total))
    )
    run = train(GROUNDED, tmp_path / "run", resume=resume)
    assert ("demonstrate" in phases) == (phase == "demonstrate")
    assert ("point" in phases) == (phase != "sft")
    assert warmed_up(run) == warmed_up(whole)
    assert measured(run) == measured(whole) and logged(run) == logged(whole)
    assert not (run / "warm_up").exists()


def test_what_is_kept_is_used_only_for_what_it_was_made_from(tmp_path, capsys):
    run = UNGROUNDED
    first = rundir_of(run, tmp_path / "run")
    assert "made anew" not in capsys.readouterr().out
    for change, said in (
        ({"sft": replace(run.sft, steps=6)}, "sft.steps = 5, not 6"),
        ({"seed": 2}, "seed = 1, not 2"),
        ({"env": replace(run.env, image_size=48)}, "env.image_size = 64, not 48"),
    ):
        changed = replace(run, **change)
        again = rundir_of(changed, tmp_path / "run")
        printed = capsys.readouterr().out
        assert said in printed and "the warm-up is made anew" in printed, printed
        assert ("the demonstrations are collected anew" in printed) == (changed.sft == run.sft)
        assert again != first
        first = again
        run = changed
    rundir_of(run, tmp_path / "run")
    assert "anew" not in capsys.readouterr().out


def rundir_of(run, directory: Path) -> bytes:
    """Warm a run up, and stop it before its first iteration."""

    def stop(*_: object) -> None:
        raise Interrupted(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rove.train.settle", stop)
        with pytest.raises(Interrupted):
            train(run, directory)
    return warmed_up(directory)


def test_one_process_writes_a_run(tmp_path):
    with rundir.claim(tmp_path):
        code = (
            "import sys; from pathlib import Path; from rove import rundir\n"
            f"with rundir.claim(Path({str(tmp_path)!r})): pass"
        )
        told = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        ).stderr
        assert f"is being written by another process (process {os.getpid()} on " in told
    with rundir.claim(tmp_path):
        pass


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "a\nb", "x" * 300])
def test_a_name_that_is_no_folder_is_refused(name):
    with pytest.raises(RoveError, match="it becomes a folder below `output`; use letters"):
        validate(replace(BASE, name=name))


def test_a_directory_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RoveError, match="Nothing can be written to .*Choose another --output"):
        train(BASE, tmp_path / "file" / "run")


def test_a_signal_ends_at_once_what_is_not_patient(capsys):
    with Interrupt() as interrupt, pytest.raises(Interrupted):
        signal.raise_signal(signal.SIGINT)
    with Interrupt() as interrupt:
        with interrupt.patient("this step"):
            signal.raise_signal(signal.SIGTERM)
            assert interrupt.requested
        with pytest.raises(Interrupted, match="SIGTERM"):
            interrupt.check()
    assert "Stopping after this step" in capsys.readouterr().err


def test_a_scheduler_is_heard_within_seconds_of_a_long_warm_up(tmp_path):
    run = replace(UNGROUNDED, sft=replace(UNGROUNDED.sft, steps=100_000))
    load.save(run, tmp_path / "run.json")
    code = f"import sys; from rove.cli import main; sys.exit(main(['train', '--resume', {str(tmp_path)!r}]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    log = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 143, process.communicate()[1].decode()
    assert time.monotonic() - began < 25, "two seconds, and what the machine has to do besides"
    assert (tmp_path / "warm_up" / "state.pt").exists()


def test_an_iteration_of_which_every_step_was_skipped_replaces_no_checkpoint(
    whole, tmp_path, monkeypatch, capsys
):
    update = Executor.update

    def ill(self, batch, iteration, on_step):
        metrics = update(self, batch, iteration, on_step)
        return metrics | {"train/skipped_steps": metrics["train/steps"] if iteration else 0}

    monkeypatch.setattr(Executor, "update", ill)
    policy = replace(GROUNDED.policy, checkpoint=str(whole / "sft"))
    training = replace(GROUNDED.training, iterations=3)
    logging = replace(GROUNDED.logging, keep=1)
    run = train(
        replace(GROUNDED, policy=policy, sft=None, training=training, logging=logging), tmp_path / "run"
    )
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["iteration_000001"]
    assert "Every optimizer step of iteration 3 was skipped: nothing is saved" in capsys.readouterr().out


def test_the_best_policy_is_chosen_on_train_states():
    def rollout(*success: bool) -> list[EpisodeRecord]:
        return [
            EpisodeRecord(
                EpisodeSpec("t", n), slot=n, success=won, length=1, total_reward=0.0, truncated=False
            )
            for n, won in enumerate(success)
        ]

    best = Best()
    best.count(rollout(True, False))
    assert best.beaten() and best.rate == 0.5
    best.count(rollout(True, False, False))
    assert not best.beaten() and best.rate == 0.5
    assert not best.beaten(), "nothing has been tried since"
    best.count(rollout(True))
    assert best.beaten() and best.rate == 1.0
