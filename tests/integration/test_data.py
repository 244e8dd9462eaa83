"""The whole way of data: an expert's episodes out as a LeRobot data set, in again, SFT from them, then RL."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rove import cli
from rove.config import load
from rove.envs import conventions
from rove.policies import registry as policies
from rove.training.demonstrations import (
    dataset_statistics,
    described,
    load_demonstrations,
    save_demonstrations,
)
from rove.training.sft import _made_from

SMALL = (
    "--rollout.num_envs 4 --rollout.chunks 2 --training.iterations 1 --training.batch 8 "
    "--training.micro_batch 8 --training.optim.warmup 0 --sft.steps 2 --sft.batch 8 --sft.micro_batch 8 "
    "--sft.optim.warmup 0 --sft.grounding 4 --sft.grounding_steps 1 --evaluation.episodes 0 "
    "--evaluation.every 0 --evaluation.variant_episodes 0 --evaluation.num_envs 2 --logging.tensorboard false"
)


def rove(words: str, *more: str | Path) -> int:
    return cli.main([*words.split(), *map(str, more)])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demonstrations with a picture at every action, exported and imported again."""
    folder = tmp_path_factory.mktemp("way")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert (
            rove(
                "collect tabletop --rollout.chunk 1 --rollout.num_envs 4 --sft.episodes 5 --sft.noise 0 "
                "--out made.npz"
            )
            == 0
        )
        assert rove("data export made.npz --out set") == 0
        assert rove("data import set --suite tabletop --out brought.npz") == 0
    return folder


def test_what_goes_out_comes_in_as_it_was(place: Path) -> None:
    made, brought = (load_demonstrations(place / f"{name}.npz") for name in ("made", "brought"))
    assert brought.instruction == made.instruction and torch.equal(brought.episode, made.episode)
    assert brought.episode.max() == 4
    assert torch.equal(brought.mask, made.mask)
    torch.testing.assert_close(brought.actions, made.actions)
    torch.testing.assert_close(brought.state, made.state)
    # Half the resolution of colours, which a video of LeRobot's has, costs most on small pictures.
    assert (brought.images.int() - made.images.int()).abs().float().mean() < 6
    about, instructions, _ = described(place / "brought.npz")
    assert set(instructions) == set(made.instruction)
    assert about["fps"] == 8 and about["statistics"] == dataset_statistics(brought)
    assert about["action_spec"]["names"] == list(conventions.of("tabletop").action_spec.names)


def test_show_prints_what_is_there_and_draws_an_episode(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    length = int((load_demonstrations(place / "made.npz").episode == 1).sum())
    assert rove("data show set --episode 1 --out one.gif") == 0
    said = capsys.readouterr().out
    assert "set: LeRobot v3.0, 5 episodes" in said and "success: 5 of 5" in said
    assert "action" in said and "x, y, z, yaw, gripper" in said
    with Image.open(place / "one.gif") as picture:
        assert picture.n_frames == length + 1
        assert picture.info["duration"] == pytest.approx(125, abs=5)  # GIFs count hundredths
    (place / "set" / ".recording").mkdir()
    assert rove("data show set --out one.webp") == 0
    assert "rove data recover set finishes it" in capsys.readouterr().out
    assert rove("data recover set") == 0
    assert capsys.readouterr().out == "set: nothing was cut off.\n"
    assert not (place / "set" / ".recording").exists()


def test_sft_from_an_imported_data_set_and_then_rl(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    assert rove(f"train tabletop_ppo {SMALL} --name brought --sft.data", "brought.npz") == 0
    run = place / "runs" / "brought"
    assert (run / "report.html").is_file() and not (run / "demonstrations.npz").exists()
    kept = policies.load(run / "sft").statistics["tabletop"]["action"]
    np.testing.assert_allclose(
        kept["q99"], described(place / "brought.npz")[0]["statistics"]["action"]["q99"]
    )
    # The same path with other content is another warm-up.
    saved = json.loads((run / "sft" / "made_from.json").read_text())
    setup = load.load(run / "run.json")
    assert _made_from(setup) == saved
    shutil.copy("brought.npz", "kept.npz")
    assert rove("data import set --suite tabletop --episodes 4 --out brought.npz") == 0
    assert _made_from(setup)["data"] != saved["data"]
    shutil.copy("kept.npz", "brought.npz")


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (f"sft tabletop_ppo {SMALL} --sft.data nowhere.npz", "no demonstrations at"),
        (
            f"sft tabletop_ppo {SMALL} --sft.data small.npz",
            "shows 1 picture of 32 × 32, and tabletop 1 picture of 64 × 64",
        ),
        ("sft libero_object_ppo --sft.data brought.npz", "was imported for tabletop, with names ="),
        (
            f"sft tabletop_ppo {SMALL} --sft.data stateless.npz --policy.proprio true",
            "set --policy.proprio false",
        ),
        (f"sft tabletop_ppo {SMALL} --sft.data made.npz", "shows 1 actions from each picture on"),
        (f"sft tabletop_ppo {SMALL} --sft.data odd.npz", "lacks 'zorgle', which the instructions in"),
        ("data import set", "For which suite?"),
        ("data import set --suite tabletpo", "Did you mean 'tabletop'"),
        (
            "data import set --suite libero:object",
            r"recorded at 8 frames a second, and libero:object acts 20",
        ),
        ("data show set --suite tabletop", "rove data show does not read --suite"),
        ("data show set --episode 5 --out x.gif", "has episodes 0 to 4, and no 5"),
        ("data show set --out x.png", "name a .webp or a .gif"),
        ("data export made.npz --out set", "set is not empty"),
        ("data export sparse.npz --out x", "a picture every 2 actions"),
        ("data import set --suite tabletop --actions nowhere.json", "cannot be read as JSON"),
        ("data turn set", "invalid choice: 'turn'"),
    ],
)
def test_mistakes_are_said_in_a_line(
    command: str,
    reason: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    for name, options in (
        ("small", "--image-size 32"),
        ("stateless", "--state none"),
        ("sparse", "--every 2"),
    ):
        if name in command and not Path(f"{name}.npz").exists():
            assert rove(f"data import set --suite tabletop --out {name}.npz {options}") == 0
    if "odd" in command:
        brought = load_demonstrations(Path("brought.npz"))
        odd = replace(brought, instruction=("zorgle the red cube",) * len(brought))
        save_demonstrations(odd, Path("odd.npz"), described(Path("brought.npz"))[0])
    capsys.readouterr()
    assert rove(command) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("rove: error: ") and reason in said
