"""Checkpoints: whole or absent, the newest kept, a mismatch refused by name."""

from pathlib import Path

import pytest
import torch

from rove import checkpoint
from rove.errors import RoveError


class Weights:
    def __init__(self, value: float) -> None:
        self.value = value

    def save_pretrained(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "weights").write_text(str(self.value))


def test_the_newest_are_kept_and_load_back(tmp_path):
    for iteration in (5, 10, 15):
        write = Weights(iteration).save_pretrained
        checkpoint.save(tmp_path, iteration, write, {"x": torch.ones(2) * iteration}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iteration_000010", "iteration_000015"]
    path = checkpoint.latest(tmp_path)
    iteration, trainer = checkpoint.load_trainer(path)
    assert iteration == 15 and trainer["x"].tolist() == [15, 15]
    assert (path / "policy" / "weights").read_text() == "15"


def test_a_write_that_fails_leaves_the_old_one_whole(tmp_path):
    target = checkpoint.save_policy(tmp_path / "best", Weights(1))

    def fail(draft: Path) -> None:
        (draft / "weights").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.write_atomically(target, fail)
    assert (target / "weights").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


def test_nothing_to_resume_says_so(tmp_path):
    with pytest.raises(RoveError, match="nothing to resume"):
        checkpoint.latest(tmp_path)


def test_a_mismatch_names_the_field():
    saved = {"env": {"horizon": 32, "tasks": "demo"}, "seed": 1}
    checkpoint.refuse_mismatch(saved, saved)
    with pytest.raises(RoveError, match=r"env\.horizon is 40, the run was started with 32"):
        checkpoint.refuse_mismatch(saved, {"env": {"horizon": 40, "tasks": "demo"}, "seed": 1})
