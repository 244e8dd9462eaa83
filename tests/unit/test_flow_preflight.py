"""The preflight of flow policies: ones that pass every check, and for each check one that does not."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rove import cli
from rove.config.schema import FlowPolicyConfig, FlowSizes, PolicyConfig
from rove.envs import conventions
from rove.findings import Finding
from rove.policies.flow import FlowVLA
from rove.policies.flow.config import FAMILIES, Family
from rove.types import Conventions

LIBERO = conventions.of("libero_spatial")
SPEC = LIBERO.action_spec
WORDS = sorted({word for text in LIBERO.instructions for word in text.split()})
SIZES = FlowSizes(vision_width=16, vision_layers=1, vision_mlp=32, width=32, layers=2, mlp=48, expert_mlp=48)


def numbers(size: int) -> dict[str, list[float]]:
    return {
        "q01": [-0.9] * (size - 1) + [-1.0],
        "q99": [0.9] * (size - 1) + [1.0],
        "mean": [0.0] * size,
        "std": [0.5] * size,
    }


STATISTICS = {"libero_spatial": {"action": numbers(7), "proprio": numbers(8)}}


def build(family: Family = "smolvla", chunk: int = 2, statistics: Any = STATISTICS, **flow: Any) -> FlowVLA:
    """A small policy that fits LIBERO."""
    settings = FlowPolicyConfig(**{"cameras": 2, "sizes": SIZES} | flow)
    return FlowVLA.build(
        PolicyConfig(kind=family, flow=settings),
        chunk=chunk,
        action_spec=SPEC,
        image_size=16,
        vocabulary=WORDS,
        statistics=statistics,
        seed=0,
    )


def find(policy: FlowVLA, name: str, wanted: Conventions = LIBERO) -> Finding:
    return {f.name: f for f in policy.preflight(wanted, rl=True)}[name]


def assert_not_passed(finding: Finding, status: str, *words: str) -> None:
    assert finding.status == status, finding
    assert finding.fix
    for word in words:
        assert word in finding.detail


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny π0 in openpi's layout, with the statistics of LIBERO."""
    directory = tmp_path_factory.mktemp("openpi")
    build("pi0").save_pretrained(directory)
    for path in directory.glob("policy_*"):
        path.unlink()
    content = json.loads((directory / "config.json").read_text())
    for key in ("type", "rove", "input_features", "output_features"):
        del content[key]
    (directory / "config.json").write_text(json.dumps(content))
    folder = directory / "assets" / "physical-intelligence" / "libero"
    folder.mkdir(parents=True)
    stats = {"norm_stats": {"state": numbers(8), "actions": numbers(7)}}
    (folder / "norm_stats.json").write_text(json.dumps(stats))
    return directory


NAMES = "statistics normalisation images resizer actions gripper delta state prompt horizon".split()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_policy_that_fits_passes_everything(family: Family) -> None:
    findings = build(family).preflight(LIBERO, rl=True)
    assert [f for f in findings if f.status != "pass"] == []
    assert [f.name for f in findings] == NAMES


def test_a_published_checkpoint_passes_everything(published: Path) -> None:
    policy = FlowVLA.from_pretrained(published, chunk=2)
    assert [f for f in policy.preflight(LIBERO, rl=True) if f.status != "pass"] == []
    assert (policy.config.delta, policy.config.prompt, policy.config.resizer) == (6, "openpi", "openpi")
    assert "first 6" in find(policy, "delta").detail


def test_statistics(published: Path) -> None:
    elsewhere = replace(LIBERO, suite="maniskill", statistics=("maniskill*",))
    policy = FlowVLA.from_pretrained(published, chunk=2)
    assert_not_passed(find(policy, "statistics", elsewhere), "fail", "physical-intelligence/libero is not of")
    few = build(statistics={"libero_spatial": {"action": numbers(5), "proprio": numbers(8)}})
    assert_not_passed(find(few, "statistics"), "fail", "5 action dimensions")
    still = numbers(7) | {"q01": [0.0] * 7, "q99": [0.0] * 6 + [1.0]}
    stiff = build(statistics={"libero_spatial": {"action": still, "proprio": numbers(8)}})
    assert_not_passed(find(stiff, "statistics"), "warn", "hardly move in x, y")


def test_normalization() -> None:
    bare = build(statistics={"libero_spatial": {"action": {}, "proprio": numbers(8)}})
    assert_not_passed(find(bare, "normalisation"), "fail", "actions are not normalised")
    means = {"mean": [0.0] * 8, "std": [1.0] * 8}
    unscaled = build("pi05", statistics={"libero_spatial": {"action": numbers(7), "proprio": means}})
    assert_not_passed(find(unscaled, "normalisation"), "warn", "MEAN_STD leaves that range")


def test_images() -> None:
    assert_not_passed(find(build(cameras=3), "images"), "fail", "reads 3 at a time", "gives 1 or 2")


def test_resizer() -> None:
    assert_not_passed(find(build("pi0", resizer="smolvla"), "resizer"), "fail", "smolvla", "saw lerobot's")
    assert_not_passed(find(build("pi0", resizer="openpi"), "resizer"), "warn", "openpi")
    assert_not_passed(find(build(resizer="lerobot"), "resizer"), "fail", "saw smolvla's")


def test_actions() -> None:
    wanted = replace(LIBERO, action_spec=replace(SPEC, frame="end_effector"))
    assert_not_passed(find(build(), "actions", wanted), "fail")


def test_gripper() -> None:
    turned = numbers(7) | {"q01": [-0.9] * 6 + [0.0]}
    policy = build(statistics={"libero_spatial": {"action": turned, "proprio": numbers(8)}})
    assert_not_passed(find(policy, "gripper"), "fail", "span [0, 1]", "convention [-1, 1]")


def test_actions_relative_to_the_state(published: Path) -> None:
    absolute = FlowVLA.from_pretrained(published, chunk=2, delta=0)
    assert_not_passed(find(absolute, "delta"), "fail", "0 numbers of the state", "to 6")
    assert_not_passed(find(build("pi0", delta=6), "delta"), "fail", "6 numbers of the state", "to 0")


def test_state() -> None:
    smaller = replace(LIBERO, state=5)
    assert_not_passed(find(build(), "state", smaller), "fail", "8 numbers by the network", "gives 5")
    assert_not_passed(find(build("pi05"), "state", smaller), "fail", "8 numbers in the prompt")
    assert find(build("pi05", prompt="openpi"), "state", smaller).detail == "not read"


def test_prompt(published: Path) -> None:
    policy = build()
    unknown = replace(LIBERO, instructions=("fetch the basket",), complete=True)
    assert_not_passed(find(policy, "prompt", unknown), "fail", "'fetch'")
    other = FlowVLA.from_pretrained(published, chunk=2, prompt="newline")
    assert_not_passed(find(other, "prompt"), "fail", "'newline'", "read 'openpi'")
    policy.config = replace(policy.config, text=replace(policy.config.text, vocab=257152))
    assert_not_passed(find(policy, "prompt"), "fail", "a newline becomes", "expected [108]")
    policy.prompts = None
    assert_not_passed(find(policy, "prompt"), "fail", "no tokenizer.json")


def test_horizon() -> None:
    assert_not_passed(find(build(chunk=50), "horizon"), "warn", "all of 50 actions")
    assert "5 of 50" in find(build(chunk=5, horizon=50), "horizon").detail


def test_doctor_prints_the_table_and_fails_where_a_check_does(
    published: Path, tmp_path: Path, capsys
) -> None:
    directory = shutil.copytree(published, tmp_path / "checkpoint")
    words = ["doctor", "--policy", str(directory), "--suite"]
    assert cli.main([*words, "libero_spatial"]) == 0
    table = capsys.readouterr().out
    assert "   pass  delta" in table and "   warn  horizon" not in table
    assert cli.main([*words, "tabletop"]) == 1
    table = capsys.readouterr().out
    assert "   fail  statistics" in table and "   fail  images" in table and "   fail  state" in table
    shutil.rmtree(directory / "assets")
    assert cli.main([*words, "libero_spatial"]) == 2
    assert "config.json has no" in capsys.readouterr().err


@torch.no_grad()
def test_a_base_without_statistics_is_refused(tmp_path: Path, capsys) -> None:
    build().save_pretrained(tmp_path)
    for path in tmp_path.glob("policy_*"):
        path.unlink()
    assert cli.main(["doctor", "--policy", str(tmp_path), "--suite", "libero_spatial"]) == 2
    assert "has no statistics" in capsys.readouterr().err
