"""What a run does with a policy: memory foretold, conventions converted, rollouts compiled."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.point_env import PointEnv
from tests.unit.test_openvla_checkpoints import CONFIG, build, observe
from tests.unit.test_policy_openvla import AUTOREGRESSIVE, TEXTS, noise
from tests.unit.test_policy_openvla import CONFIG as PARALLEL
from tests.unit.test_policy_openvla import build as build_one

from rove import cli, recipes
from rove.config.schema import GRPO, LlamaConfig, LoraConfig, PolicyConfig, TowerConfig
from rove.policies.memory import GIB
from rove.policies.openvla import OpenVLA
from rove.policies.openvla.memory import ChunkMemory, estimate
from rove.rollout.collect import act_rows
from rove.types import ActionSpec, Observation


@pytest.mark.parametrize("name", ["openvla_ppo", "openvla_oft_grpo"])
def test_a_7b_recipe_says_what_it_needs_before_anything_is_loaded(name: str, capsys) -> None:
    assert cli.main(["show", name]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert "7,65" in last and "memory per device about" in last
    memory = estimate(recipes.get(name).build())
    # What is added is trained, but for DINOv2's mask token and class position, which no checkpoint stores.
    added = memory.parameters - 7_541_237_184
    assert memory.trained == added - 2 * 1024 and 100e6 < added < 130e6
    assert 15e9 < memory.weights < 17e9 and memory.total < 60 * GIB


def test_what_a_run_needs_follows_its_settings() -> None:
    run = recipes.get("openvla_oft_grpo").build()
    base = estimate(run)
    full = estimate(replace(run, policy=replace(run.policy, lora=None, dtype="float32")))
    assert full.trained > 7e9 and full.optimizer == pytest.approx(12 * full.trained)
    assert full.weights == pytest.approx(2 * base.weights, rel=0.05)
    assert isinstance(run.algorithm, GRPO)
    beside = estimate(replace(run, algorithm=replace(run.algorithm, kl_coef=0.1)))
    assert beside.weights == base.weights + 4 * base.trained  # float32 adapters, once more
    frugal = estimate(replace(run, training=replace(run.training, gradient_checkpointing=True)))
    assert base.training > 5 * frugal.training


def test_activations_are_as_measured() -> None:
    """Against what autograd saves, on a model whose layers outweigh its ends."""
    config = PolicyConfig(
        towers=(
            TowerConfig(kind="dinov2", width=32, depth=6, heads=2, patch=8, mlp=128),
            TowerConfig(kind="siglip", width=32, depth=6, heads=2, patch=8, mlp=120),
        ),
        llama=LlamaConfig(width=64, depth=8, heads=2, mlp=172),
    )
    words = " ".join(["pick"] * 39)
    policy = OpenVLA.build(
        config,
        chunk=8,
        action_spec=ActionSpec(tuple("abcdefg"), ("1",) * 7, (-1.0,) * 7, (1.0,) * 7),
        image_size=64,
        vocabulary=("pick",),
        statistics=None,
        seed=0,
    )
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 1, 64, 64, 3), dtype=torch.uint8, generator=generator)
    seen = Observation(images, (words,) * 4)
    tokens = policy.act(seen, "greedy").sample
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = policy.evaluate(seen, tokens)
    measured = sum(size for place, size in saved.items() if place not in weights) / 4
    assert ChunkMemory(policy, 1, half=False).training(False) == pytest.approx(measured, rel=0.25)
    del output


def test_actions_reach_the_environment_in_its_own_convention() -> None:
    env = PointEnv(2, "refill")
    ours = ActionSpec(("unused", "push"), ("1", "cm"), (-2.0, -50.0), (2.0, 50.0))
    policy = OpenVLA.build(
        CONFIG,
        chunk=env.chunk,
        action_spec=ours,
        image_size=16,
        vocabulary=env.suite.vocabulary,
        statistics=None,
        seed=0,
    )
    seen = observe()
    given = policy.act(seen, "greedy").actions
    chunk = act_rows(policy, env, seen, torch.arange(2), "greedy", 0)
    torch.testing.assert_close(chunk.actions[..., 0], (given[..., 1] / 100).clamp(-1, 1))
    torch.testing.assert_close(chunk.actions[..., 1], given[..., 0] / 2)
    assert chunk.sample.shape == (2, env.chunk, 2)


@pytest.mark.slow
@pytest.mark.parametrize("config", [PARALLEL, AUTOREGRESSIVE], ids=["parallel", "autoregressive"])
def test_compiled_rollouts_answer_the_same(config: PolicyConfig) -> None:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (4, 1, 16, 16, 3), dtype=torch.uint8, generator=generator)
    seen = Observation(images, TEXTS)
    plain, compiled = build_one(config), build_one(replace(config, compile=True))
    expected = plain.act(seen, "sample", noise())
    for rows in (4, 3):  # three are padded to four, and nobody notices
        some = compiled.act(seen.select(range(rows)), "sample", noise(rows))
        assert torch.equal(some.sample, expected.sample[:rows])
        torch.testing.assert_close(some.logprob, expected.logprob[:rows], atol=1e-5, rtol=0)
        assert some.value is not None and expected.value is not None
        torch.testing.assert_close(some.value, expected.value[:rows], atol=1e-5, rtol=0)
    output = compiled.evaluate(seen, expected.sample)
    torch.testing.assert_close(output.logprob, expected.logprob, atol=1e-5, rtol=0)
    output.logprob.sum().backward()


def test_a_policy_from_scratch_is_warmed_up_whole() -> None:
    """Adapters are for a checkpoint's weights: random ones have to be trained."""
    policy = build(replace(CONFIG, lora=LoraConfig()))
    assert policy.lora is None and not any(".lora_" in name for name, _ in policy.named_parameters())
