"""What can be known before a run or an evaluation begins is said then, and not after hours."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tests.point_env import PointSuite
from tests.unit.test_learner import make_policy

from rove import cli, preflight
from rove.config.schema import PPO, EvaluationConfig, LoggingConfig, RolloutConfig, Run
from rove.errors import RoveError
from rove.evaluation.evaluate import capacity, episodes, held_out
from rove.policies import registry as policies
from rove.runtime import memory
from rove.runtime.channel import Segment


class Few(PointSuite):
    """Three held-out states of one task, two of the other."""

    def initial_states(self, task, split):
        return (
            range(3 if task == "forwards" else 2)
            if split == "held_out"
            else super().initial_states(task, split)
        )


def test_too_few_held_out_states_are_named_with_the_setting():
    suite = Few()
    assert capacity(suite) == 5 and len(episodes(suite, 5)) == 5
    config = EvaluationConfig(episodes=5, variant_episodes=5)
    assert len(held_out(suite, config)) == 10
    for setting in ("episodes", "variant_episodes"):
        with pytest.raises(RoveError, match=rf"evaluation\.{setting}: 6 episodes .* at most 5"):
            held_out(suite, replace(config, **{setting: 6}))
    suite.variants = {}
    assert len(held_out(suite, replace(config, variant_episodes=64))) == 5, "there is nothing to run"


def test_a_report_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path, capsys):
    (tmp_path / "file").touch()
    for out, said in ((tmp_path, "is a directory"), (tmp_path / "file" / "x.json", "cannot be written")):
        words = ["eval", str(tmp_path / "no checkpoint"), "--suite", "no suite", "--out", str(out)]
        assert cli.main(words) == 2
        assert said in capsys.readouterr().err
    preflight.can_write(tmp_path / "new" / "x.json", "--out")
    assert (tmp_path / "new").is_dir()


def test_memory_and_disk_are_looked_at(tmp_path, monkeypatch):
    run = Run("t", PPO(), rollout=RolloutConfig(num_envs=64))
    preflight.room(run, tmp_path / "new" / "run")
    with pytest.raises(RoveError, match=r"GiB of memory, and .*rollout\.num_envs"):
        preflight.room(replace(run, rollout=RolloutConfig(num_envs=2**31)), tmp_path)
    with pytest.raises(RoveError, match=r"logging\.keep = 100000000 checkpoints .*--output"):
        preflight.room(replace(run, logging=LoggingConfig(keep=10**8)), tmp_path)
    limits = (tmp_path / "memory.max", tmp_path / "memory.current")
    for file, text in zip(
        (*limits, tmp_path / "memory.stat"), ("3000", "2500", "inactive_file 100\n"), strict=True
    ):
        file.write_text(text)
    monkeypatch.setattr(memory, "_LIMITS", (tuple(map(str, limits)),))
    assert memory.available() == 600, "what a container may have, less what it cannot give back"
    with pytest.raises(RoveError, match=r"needs .* of memory, and 0\.0 MiB are there"):
        Segment(1 << 27)


def test_shared_memory_is_taken_at_once(monkeypatch):
    segment = Segment(1 << 20)
    assert os.fstat(segment.fd).st_blocks * 512 >= 1 << 20, "a page that is missing later ends the process"

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RoveError, match=r"1\.0 MiB of shared memory cannot be had.*--shm-size.*num_envs"):
        Segment(1 << 20)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tokenizer.json", "tokenizer"),
        ("model.safetensors", "model.safetensors"),
        ("config.json", "config.json"),
    ],
)
def test_files_of_a_checkpoint_are_looked_at(name: str, said: str, tmp_path: Path):
    make_policy(critic=False).save_pretrained(tmp_path / "whole")
    run = Run("t", PPO(), sft=None)
    run = replace(run, policy=replace(run.policy, checkpoint=str(tmp_path / "whole")))
    policies.check(run)
    if name != "config.json":
        os.truncate(tmp_path / "whole" / name, 20)
        with pytest.raises(RoveError, match=said):
            policies.check(run)
    (tmp_path / "whole" / name).unlink()
    with pytest.raises(RoveError, match=said):
        policies.check(run)
    shutil.rmtree(tmp_path / "whole")
    with pytest.raises(RoveError, match="there is no such folder"):
        policies.check(run)
