"""`rove eval` by its own command: device, dtype, settings, the check of the policy and the table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rove import cli, host
from rove.config import load
from rove.config.schema import (
    PPO,
    FlowPolicyConfig,
    FlowSampling,
    FlowSizes,
    LlamaConfig,
    PolicyConfig,
    Run,
    TabletopConfig,
    TowerConfig,
)
from rove.envs import registry as envs
from rove.envs.tabletop.robot import ACTION_SPEC
from rove.evaluation import checkpoint
from rove.policies.flow import FlowVLA
from rove.policies.openvla import OpenVLA

SMALL = PolicyConfig(
    towers=(TowerConfig(width=16, depth=2, heads=2, patch=8, mlp=32),),
    llama=LlamaConfig(width=16, depth=1, heads=2, mlp=32),
)
STATISTICS = {
    name: {"action": {"q01": [-scale] * 5, "q99": [scale] * 5}}
    for name, scale in (("tabletop", 1.0), ("bridge_orig", 0.5))
}
SIZES = {"action": 5, "proprio": 5}
"""Numbers of an action, and of the state, of the tabletop."""
QUICK = "--episodes 2 --num-envs 2 --env.image_size 32 --env.horizon 4"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint with the statistics of two data sets, of which none is chosen."""
    policy = OpenVLA.build(
        SMALL,
        chunk=2,
        action_spec=ACTION_SPEC,
        image_size=32,
        vocabulary=envs.suite(TabletopConfig()).vocabulary,
        statistics={"tabletop": STATISTICS["tabletop"]},
        seed=0,
    )
    directory = tmp_path / "policy"
    policy.save_pretrained(directory)
    (directory / "dataset_statistics.json").write_text(json.dumps(STATISTICS))
    config = json.loads((directory / "config.json").read_text())
    config["rove"]["unnorm_key"] = None
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def evaluated(*words: str | Path) -> int:
    return cli.main(["eval", *map(str, words)])


def test_the_statistics_are_chosen_by_a_setting(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluated(saved, "--suite", "tabletop", *QUICK.split()) == 2
    assert "unnorm_key" in capsys.readouterr().err
    chosen = ["--policy.unnorm_key", "tabletop"]
    assert evaluated(saved, "--suite", "tabletop", *QUICK.split(), *chosen) == 0
    said = capsys.readouterr()
    assert "in distribution" in said.out
    assert "evaluate: 0/2" in said.err
    assert "evaluate" not in said.out


def test_a_policy_that_does_not_fit_is_refused_before_the_first_episode(
    saved: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "evaluate", lambda *args, **kwargs: pytest.fail("an episode was begun"))
    words = [*QUICK.split(), "--policy.unnorm_key", "bridge_orig"]
    assert evaluated(saved, "--suite", "tabletop", *words) == 2
    error = capsys.readouterr().err
    assert "does not fit tabletop" in error
    assert "bridge_orig" in error


def test_settings_reach_the_policy_or_are_refused(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def kept(env, policy, specs, **options):
        seen.append((policy.unnorm_key, next(iter(policy.vlm.parameters())).dtype, policy.temperature))
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "evaluate", kept)
    words = "--policy.unnorm_key tabletop --policy.dtype bfloat16 --policy.temperature=1.5".split()
    assert evaluated(saved, "--suite", "tabletop", *QUICK.split(), *words) == 130
    assert seen == [("tabletop", torch.bfloat16, 1.5)]
    assert evaluated(saved, "--suite", "tabletop", "--policy.film", "true") == 2
    assert "decided by the checkpoint" in capsys.readouterr().err


def test_a_setting_that_a_policy_does_not_take_is_refused(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def from_pretrained(path: Path, /, *, device: torch.device | str = "cpu") -> None:
        pytest.fail("it was read all the same")

    monkeypatch.setattr(OpenVLA, "from_pretrained", from_pretrained)
    assert evaluated(saved, "--suite", "tabletop", *QUICK.split(), "--policy.dtype", "bfloat16") == 2
    assert "OpenVLA takes no 'dtype'" in capsys.readouterr().err


def test_a_checkpoint_of_a_run_is_read_as_its_run_did(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run("mine", PPO(), env=TabletopConfig(image_size=32))
    policy = replace(SMALL, unnorm_key="tabletop", dtype="bfloat16", temperature=0.7)
    run = replace(run, policy=policy, rollout=replace(run.rollout, chunk=2))
    load.save(run, saved.parent / "run.json")
    seen = []
    monkeypatch.setattr(
        checkpoint,
        "evaluate",
        lambda env, policy, specs, **options: seen.append(
            (policy.unnorm_key, next(iter(policy.vlm.parameters())).dtype, policy.temperature)
        ),
    )
    args = (saved, "tabletop", None, "none", load.decode(checkpoint.EvaluationConfig, {"episodes": 2}, ""))
    checkpoint.evaluate_checkpoint(*args, seed=0)
    assert seen == [("tabletop", torch.bfloat16, 0.7)]


@pytest.fixture
def flown(tmp_path: Path) -> Path:
    """A flow policy's checkpoint that predicts four actions; the run that it is of lies above it."""
    flow = FlowPolicyConfig(sampling=FlowSampling(steps=2), sizes=FlowSizes(layers=2, vision_layers=2))
    policy = PolicyConfig(kind="smolvla", flow=flow)
    built = FlowVLA.build(
        policy,
        chunk=4,
        action_spec=ACTION_SPEC,
        image_size=32,
        vocabulary=envs.suite(TabletopConfig()).vocabulary,
        statistics={"tabletop": {name: {"q01": [-1.0] * n, "q99": [1.0] * n} for name, n in SIZES.items()}},
        seed=0,
    )
    built.save_pretrained(tmp_path / "run" / "policy")
    run = Run("mine", PPO(), env=TabletopConfig(image_size=32), policy=policy)
    load.save(replace(run, rollout=replace(run.rollout, chunk=4)), tmp_path / "run" / "run.json")
    return tmp_path / "run" / "policy"


@pytest.mark.parametrize("of_a_run", [True, False])
def test_fewer_actions_are_executed_than_are_predicted(
    of_a_run: bool, flown: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def kept(env, policy, specs, **options):
        seen.append((env.chunk, policy.chunk, policy.horizon, policy.sampling))
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "evaluate", kept)
    if not of_a_run:
        (flown.parent / "run.json").unlink()
    words = ["--execute", "2", "--policy.flow.sampling.start", "0.5"]
    assert evaluated(flown, "--suite", "tabletop", *QUICK.split(), *words) == 130
    assert seen == [(2, 2, 4, FlowSampling(steps=2, start=0.5))]
    assert evaluated(flown, "--suite", "tabletop", *QUICK.split(), "--execute", "5") == 2
    assert "the policy predicts 4" in capsys.readouterr().err


def test_fewer_actions_are_executed_or_that_is_refused(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--suite", "tabletop", *QUICK.split(), "--execute", "1"]
    assert evaluated(saved, *words, "--policy.unnorm_key", "tabletop") == 2
    assert "all 2 actions that this policy predicts are executed" in capsys.readouterr().err
    assert checkpoint.policy_of(Path("random"), Run("mine", PPO()), False, (), execute=3)[0] == 3


def test_the_policy_is_asked_onto_the_gpu_where_there_is_one(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert host.device("auto") == torch.device("cuda:0")
    asked = []
    monkeypatch.setattr(
        checkpoint.policies, "load", lambda path, **settings: asked.append(settings["device"])
    )
    with pytest.raises(AttributeError):  # no policy came of it
        evaluated(saved, "--suite", "tabletop", *QUICK.split())
    assert asked == [torch.device("cuda:0")]


def test_the_published_protocol_of_libero_ends_in_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("libero")
    words = "random --suite libero:goal --decoding sample --episodes 2 --num-envs 2 --env.protocol published"
    assert evaluated(*words.split(), *"--env.renderer none --env.horizon 4 --env.wait 1".split()) == 0
    assert "in distribution" in capsys.readouterr().out
