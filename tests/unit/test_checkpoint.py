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


def test_numbers_sort_as_numbers_and_what_is_not_a_checkpoint_is_not_touched(tmp_path):
    mine = tmp_path / "iteration_best"
    mine.mkdir()
    for iteration in (999_999, 1_000_000):
        checkpoint.save(tmp_path, iteration, Weights(1).save_pretrained, {}, keep=1)
    assert {path.name for path in tmp_path.iterdir()} == {"iteration_1000000", "iteration_best"}
    assert checkpoint.load_trainer(checkpoint.latest(tmp_path))[0] == 1_000_000


@pytest.mark.parametrize("state", ["set aside", "in place", "a draft"])
def test_a_kill_at_any_moment_of_a_write_is_undone(tmp_path, state):
    target = tmp_path / "best"
    checkpoint.write_atomically(target, Weights(1).save_pretrained)
    draft, old = tmp_path / ".best.0123abcd.draft", tmp_path / ".best.old"
    if state == "set aside":  # killed between the two renames
        target.rename(old)
        Weights(2).save_pretrained(draft)
    elif state == "in place":  # killed before the old one was removed
        target.rename(old)
        checkpoint.save_policy(target, Weights(1))
        Weights(0).save_pretrained(old)
    else:
        Weights(2).save_pretrained(draft)
    checkpoint.clean_up(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    assert (target / "weights").read_text() == "1"
    for value in (2, 3):
        checkpoint.save_policy(target, Weights(value))
        assert (target / "weights").read_text() == str(value)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


@pytest.mark.parametrize("file", ["trainer.pt", "meta.json", "policy/weights", "checksums.json"])
@pytest.mark.parametrize("how", ["gone", "empty", "a bit"])
def test_damage_is_found_named_and_gone_around(tmp_path, file, how):
    for iteration in (1, 2):
        checkpoint.save(tmp_path, iteration, Weights(iteration).save_pretrained, {"x": iteration}, keep=2)
    path = tmp_path / "iteration_000002" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(b"" if how == "empty" else content)
    said: list[str] = []
    assert checkpoint.latest(tmp_path, said.append).name == "iteration_000001"
    named = (
        "" if how == "a bit" and file == "checksums.json" else file
    )  # it then says another is not as it was
    assert len(said) == 1 and f"iteration_000002/{named}" in said[0] and "iteration_000001 instead" in said[0]
    (tmp_path / "iteration_000001" / "trainer.pt").write_bytes(b"")
    with pytest.raises(
        RoveError, match=r"is whole: .*iteration_000002.*iteration_000001/trainer\.pt is damaged"
    ):
        checkpoint.latest(tmp_path)


def test_a_policy_of_which_a_file_has_changed_is_refused(tmp_path):
    path = checkpoint.save(tmp_path, 1, Weights(1).save_pretrained, {}, keep=1)
    alone = checkpoint.save_policy(tmp_path / "best", Weights(1))
    for policy, file in ((path / "policy", "policy/weights"), (alone, "weights")):
        checkpoint.refuse_damaged(policy)
        (policy / "weights").write_text("3")
        with pytest.raises(RoveError, match=f"{file} is damaged: copy it again .* delete .*checksums.json"):
            checkpoint.refuse_damaged(policy)
        (policy.parent / "checksums.json").unlink(missing_ok=True)
        (policy / "checksums.json").unlink(missing_ok=True)
        checkpoint.refuse_damaged(policy)
    (path / "trainer.pt").write_bytes(b"")
    checkpoint.refuse_damaged(path / "policy")


def test_what_a_kill_left_to_be_removed_goes(tmp_path):
    for iteration in (1, 2, 3, 4):
        checkpoint.save(tmp_path, iteration, Weights(1).save_pretrained, {}, keep=9)
    checkpoint.prune(tmp_path / "iteration_000003", keep=2)
    assert sorted(p.name[-1] for p in tmp_path.iterdir()) == ["2", "3", "4"], "a newer one is not touched"


def test_a_checkpoint_says_which_run_it_is_of(tmp_path):
    path = checkpoint.save(tmp_path, 1, Weights(1).save_pretrained, {}, 1, {"seed": 1})
    checkpoint.refuse_other_run(path, {"seed": 1})
    with pytest.raises(RoveError, match="seed is 2, the run was started with 1"):
        checkpoint.refuse_other_run(path, {"seed": 2})


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
