"""What a run asks of a flow policy is checked before it begins; a checkpoint's kind is found out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_flow_policy import STATISTICS, build, chance, close, observe
from test_flow_preflight import published as published

from rove import recipes
from rove.config import load
from rove.config.schema import FlowPolicyConfig, Run, SFTConfig
from rove.config.validate import validate
from rove.envs import conventions
from rove.errors import RoveError
from rove.policies import registry
from rove.policies.flow import FlowVLA
from rove.policies.flow.memory import Row, estimate, skeleton
from rove.policies.memory import GIB
from rove.types import ActionSpec, Observation

RECIPE = "tabletop_smolvla_ppo"


def ends(size: int) -> dict[str, list[float]]:
    return {"q01": [-1.0] * size, "q99": [1.0] * size}


def changed(*words: str, recipe: str = RECIPE) -> Run:
    return load.apply(recipes.build(recipe), words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--policy.film", "true"], r"policy\.film = True: .*--policy\.film false"),
        (["--policy.decoding", "autoregressive"], r"--policy\.decoding parallel"),
        (["--policy.value_head.level", "action"], r"--algorithm\.advantage_level chunk"),
        (["--policy.pointers", "0"], r"does not point"),
        (["--policy.flow.horizon", "4"], r"predicts 4: set --rollout\.chunk 4 or less"),
        (["--policy.flow.sizes.patch", "7"], r"pictures of 64 pixels do not divide"),
        (["--policy.flow.sizes.max_dim", "8"], r"3 pointers and a state of 8 are 14 numbers"),
        (["--policy.flow.sizes.kv_heads", "3"], r"do not share 3 keys"),
        (["--sft.smoothing", "1"], r"no bins"),
        (["--policy.kind", "openvla", "--sft.draws", "1"], r"policy\.flow is set, but OpenVLA"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_it_cannot_do_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(RoveError, match=message):
        registry.check(changed(*words))


def test_noisy_points_are_of_flows_alone() -> None:
    run = changed("--sft.draws", "2", recipe="tabletop_ppo")
    with pytest.raises(RoveError, match=r"OpenVLA has no noisy points to draw: set --sft\.draws 1"):
        registry.check(run)


@pytest.mark.parametrize("name", [r.name for r in recipes.all() if "smolvla" in r.name or "pi0" in r.name])
def test_recipes_can_be_done(name: str) -> None:
    run = recipes.build(name)
    validate(run)
    if run.policy.checkpoint is None:
        registry.check(run)
    assert registry.horizon(run) >= run.rollout.chunk


def test_a_frozen_vlm_may_be_in_lower_precision_and_the_expert_is_not(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    policy = FlowVLA.from_pretrained(tmp_path, freeze="vlm", dtype=torch.bfloat16)
    kinds = {p.dtype for p in policy.parameters() if p.requires_grad}
    assert kinds == {torch.float32} and policy.model.tower.dtype == torch.bfloat16
    drawn = policy.act(observe(), "sample", chance())
    close(policy.evaluate(observe(), drawn.sample).logprob, drawn.logprob)
    with pytest.raises(RoveError, match="8 bits"):
        validate(changed("--policy.flow.freeze", "vision", recipe="libero_10_pi0"))


def test_memory_is_counted_before_anything_is_loaded() -> None:
    run = recipes.build("libero_object_smolvla_24gb")
    memory = estimate(run)
    assert memory.total < 24 * GIB and memory.weights < 1 * GIB
    whole = estimate(
        replace(run, policy=replace(run.policy, flow=FlowPolicyConfig(freeze="none", cameras=2)))
    )
    assert whole.trained == whole.parameters and whole.total > 1.5 * memory.total
    work = registry.work(run)
    # A sample is trained on by one pass of the expert, forward and backward; acting takes four.
    assert 0.9 * work.forward < work.training < 1.1 * work.forward and work.passes == 5
    # All weights of a policy from scratch are there.
    tiny = recipes.build(RECIPE)
    assert sum(p.numel() for p in skeleton(tiny).parameters()) == estimate(tiny).parameters


@pytest.mark.parametrize("freeze", ["none", "vlm"])
def test_kept_activations_are_as_counted(freeze: str) -> None:
    """To a factor of two of what autograd keeps: buffers of its own come and go with versions."""
    run = changed("--policy.flow.freeze", freeze, "--policy.value_head", "none", "--policy.pointers", "0")
    row = Row(skeleton(run), half=False, expert_half=False)
    policy = registry.build(
        run.policy,
        chunk=8,
        action_spec=skeleton(run).action_spec,
        image_size=64,
        vocabulary=["w"] * 20,
        statistics={"s": {"action": ends(7), "proprio": ends(1)}},
        seed=0,
    )
    rows = 4
    seen = Observation(
        torch.zeros(rows, 1, 64, 64, 3, dtype=torch.uint8),
        (" ".join(["w"] * 20),) * rows,
        torch.zeros(rows, 1),
    )
    sample = policy.act(seen, "sample", chance(rows)).sample
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = policy.evaluate(seen, sample)
    measured = sum(size for place, size in kept.items() if place not in weights) / rows
    assert output.logprob.requires_grad
    assert 0.5 < row.training(False) / measured < 2


def test_the_kind_of_a_checkpoint(published: Path, tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    assert isinstance(registry.load(tmp_path), FlowVLA)
    assert isinstance(registry.load(published, chunk=2), FlowVLA)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {"type": "smolvlm"}))
    with pytest.raises(RoveError, match=r"config\.json: unknown policy, type = 'smolvlm'.*'smolvla'"):
        registry.load(tmp_path)


def test_more_noisy_points_share_a_prefix() -> None:
    policy, seen = build(), observe()
    actions, mask = torch.zeros(3, 4, 5), torch.ones(3, 4, dtype=torch.bool)
    calls, prefix = [], policy.model.prefix
    policy.model.prefix = lambda *a, **k: calls.append(1) or prefix(*a, **k)  # pyright: ignore
    with torch.no_grad():
        one, many = (
            float(policy.imitation_loss(seen, actions, mask, SFTConfig(draws=n), chance()).loss)
            for n in (1, 64)
        )
    assert len(calls) == 2 and many == pytest.approx(one, rel=0.5) and many != one


def test_a_policy_is_fine_tuned_on_data_of_other_sizes(tmp_path: Path) -> None:
    """Statistics of demonstrations bring the sizes of state and action with them, and are saved so."""
    build().save_pretrained(tmp_path / "start")
    spec = ActionSpec(tuple("abcd"), ("1",) * 4, (-1.0,) * 4, (1.0,) * 4)
    statistics = {"new": {"action": ends(4), "proprio": ends(4)}}
    policy = FlowVLA.from_pretrained(tmp_path / "start", statistics=statistics, action_spec=spec)
    policy.save_pretrained(tmp_path / "end")
    again = FlowVLA.from_pretrained(tmp_path / "end")
    assert (again.state_size, again.action_spec.dim, again.config.state) == (4, 4, 4)


def test_a_published_policy_is_fine_tuned_on_a_suite(published: Path, tmp_path: Path) -> None:
    """Actions are then relative to nothing; prompts and pictures stay as they were."""
    parts = {"action": ends(7), "proprio": ends(8)}
    spec = FlowVLA.from_pretrained(published).action_spec
    with pytest.raises(RoveError, match="lack mean and std"):
        FlowVLA.from_pretrained(published, statistics={"libero:object": parts}, action_spec=spec)
    parts = {
        name: {"mean": [0.0] * len(x["q01"]), "std": [1.0] * len(x["q01"])} | x for name, x in parts.items()
    }
    statistics = {"libero:object": parts}
    policy = FlowVLA.from_pretrained(published, statistics=statistics, action_spec=spec, chunk=2)
    assert (policy.config.delta, policy.config.prompt, policy.config.resizer) == (0, "openpi", "openpi")
    policy.save_pretrained(tmp_path)
    again = FlowVLA.from_pretrained(tmp_path)
    assert (again.config.delta, again.config.prompt, again.config.resizer) == (0, "openpi", "openpi")
    findings = again.preflight(conventions.of("libero:object"), rl=True)
    assert [f for f in findings if f.status != "pass"] == []


def test_points_follow_the_state() -> None:
    run = recipes.build(RECIPE)
    policy = registry.build(
        replace(run.policy, value_head=None),
        chunk=8,
        action_spec=build().action_spec,
        image_size=64,
        vocabulary=["go"],
        statistics=STATISTICS,
        seed=0,
    )
    assert isinstance(policy, FlowVLA) and policy.pointer is not None
    seen = replace(observe(2), images=torch.randint(0, 256, (2, 1, 64, 64, 3), dtype=torch.uint8))
    seen = replace(seen, instruction=("go", "go"))
    with torch.no_grad():
        first = policy.observe(seen)
        assert first.pointing is not None and first.pointing.shape == (2, 3, 64)
        torch.testing.assert_close(policy.point(seen), first.pointing)  # whatever the state
        policy.pointer.queries.neg_()
        second = policy.observe(seen)
    places = slice(0, 64)
    assert torch.equal(first.keys[-1][:, :, places], second.keys[-1][:, :, places])
    assert not torch.allclose(first.keys[-1][:, :, -1], second.keys[-1][:, :, -1])


def test_a_flow_policy_points_in_the_second_picture_too(tmp_path: Path) -> None:
    run = recipes.build("libero_object_smolvla_vine")
    settings = replace(run.policy, pointed=2)
    made = {"chunk": 8, "image_size": 64, "vocabulary": ["go"], "statistics": STATISTICS, "seed": 0}
    policy = registry.build(settings, action_spec=build().action_spec, **made)
    assert isinstance(policy, FlowVLA) and policy.pointer is not None
    images = torch.randint(0, 256, (2, 2, 64, 64, 3), dtype=torch.uint8)
    seen = replace(observe(2), images=images, instruction=("go", "go"))
    logits = policy.point(seen)
    assert logits.shape == (2, 6, 64)
    policy.save_pretrained(tmp_path)
    again = registry.load(tmp_path, device="cpu")
    assert isinstance(again, FlowVLA)
    torch.testing.assert_close(again.point(seen), logits)
    free = replace(settings, flow=replace(settings.flow, cameras=None))
    policy = registry.build(free, action_spec=build().action_spec, **made)
    with pytest.raises(RoveError, match="points in 2 pictures, the observation has 1"):
        policy.point(replace(seen, images=images[:, :1]))
