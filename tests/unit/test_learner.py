"""The learner: how a batch is split changes nothing, and one batch can be overfitted."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rove import algorithms
from rove.config.schema import (
    GRPO,
    PPO,
    FlowPolicyConfig,
    FlowSizes,
    LlamaConfig,
    LoraConfig,
    OptimConfig,
    PolicyConfig,
    RolloutConfig,
    Run,
    TowerConfig,
    TrainingConfig,
    ValueHeadConfig,
)
from rove.errors import RoveError
from rove.policies import registry as policies
from rove.policies.base import SamplingNoise
from rove.training.deal import step_of_rank
from rove.training.learner import Learner, freeze
from rove.types import ActionSpec, Observation, TrainBatch

SPEC = ActionSpec(("x", "gripper"), ("m", "1"), (-1.0, -1.0), (1.0, 1.0))
N, C = 12, 3
CPU = torch.device("cpu")


TOKENS = PolicyConfig(
    towers=(TowerConfig(width=16, depth=2, heads=2, patch=8, mlp=32),),
    llama=LlamaConfig(width=16, depth=2, heads=2, mlp=32),
    value_head=ValueHeadConfig(hidden=(16,)),
)
SIZES = FlowSizes(vision_width=16, vision_layers=1, vision_mlp=32, width=16, layers=2, heads=2, mlp=32)
FLOW = PolicyConfig(
    kind="pi05",
    value_head=ValueHeadConfig(level="chunk", hidden=(16,)),
    flow=FlowPolicyConfig(horizon=C + 1, prompt="openpi", sizes=SIZES),
)
"""A flow policy that reads no state."""
CHUNK_PPO = PPO(advantage_level="chunk", ratio_level="chunk")
CHUNK_GRPO = GRPO(ratio_level="chunk", length_normalization=False)


def make_policy(critic: bool, config: PolicyConfig = TOKENS):
    config = config if critic else replace(config, value_head=None)
    return policies.build(
        config, chunk=C, action_spec=SPEC, image_size=16, vocabulary=("go", "left"), statistics=None, seed=0
    )


def make_batch(policy, *, normalized: bool, level: str = "token") -> TrainBatch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 255, (N, 1, 16, 16, 3), dtype=torch.uint8, generator=generator)
    observation = Observation(images, ("go left", "go") * (N // 2))
    chunk = policy.act(
        observation, "sample", SamplingNoise(0, torch.arange(N), torch.zeros(N, dtype=torch.long))
    )
    width = 1 if level == "chunk" else C
    mask = torch.ones(N, width, dtype=torch.bool)
    mask[::3, 1:] = False
    critic = chunk.value is not None
    return TrainBatch(
        observation=observation,
        sample=chunk.sample,
        logprob=chunk.logprob + 0.1 * torch.randn(chunk.logprob.shape, generator=generator),
        advantage=torch.randn(N, width, generator=generator),
        mask=mask,
        returns=torch.randn(N, width, generator=generator) if critic else None,
        value=chunk.value,
        episode_length=mask.sum(1, keepdim=True) if normalized else None,
        horizon=2 * C if normalized else None,
        denominator=4.0 * 2 * C * SPEC.dim if normalized else None,
    )


def make_learner(
    algorithm, policy, micro_batch: int, lr: float = 1e-3, device: torch.device = torch.device("cpu")
) -> Learner:
    training = TrainingConfig(iterations=1, batch=N, micro_batch=micro_batch, optim=OptimConfig(lr=lr))
    run = Run("test", algorithm, training=training)
    return Learner(policy, algorithms.get(algorithm.kind), run, device)


def test_the_schedule_ends_with_the_run_also_where_rows_were_dropped():
    """Dynamic sampling leaves rows out: there are fewer steps, and the rate goes all its way."""
    policy = make_policy(critic=False)
    rollout = RolloutConfig(num_envs=2 * N, chunks=2)
    optim = OptimConfig(lr=1.0, schedule="linear", final_lr_fraction=0.0)
    training = TrainingConfig(iterations=2, batch=N, micro_batch=N, optim=optim)
    run = Run("test", GRPO(length_normalization=False), rollout=rollout, training=training)
    learner = Learner(policy, algorithms.get("grpo"), run, torch.device("cpu"))
    batch = make_batch(policy, normalized=False)
    rates = [learner.update(batch, iteration)["train/lr"] for iteration in range(2)]
    taken = learner.optimizer.steps
    assert taken < learner.optimizer.total_steps
    last = (len(rates) - 1) + (taken / 2 - 1) / (taken / 2)  # iterations, when the last step is taken
    assert rates[1] == pytest.approx(1 - last / 2)


def test_without_a_correction_an_older_policys_batch_is_trained_on_as_it_is():
    """Decoupled, the first step's ratios are 1 and samples weighted; else ratios are those to who acted."""
    batch = replace(make_batch(make_policy(critic=True), normalized=False), version=0)
    metrics = {}
    for decoupled in (True, False):
        learner = make_learner(PPO(decoupled=decoupled), make_policy(critic=True), micro_batch=N)
        metrics[decoupled] = learner.update(batch, 1)
        assert metrics[decoupled]["train/behind"] == 1
    assert "train/behavior_weight" in metrics[True] and "train/behavior_weight" not in metrics[False]
    same = make_learner(PPO(), make_policy(critic=True), micro_batch=N).update(replace(batch, version=1), 1)
    for name in ("policy_loss", "ratio", "approx_kl", "clip_fraction"):
        assert metrics[False][f"train/{name}"] == same[f"train/{name}"]
    assert metrics[True]["train/approx_kl"] == pytest.approx(0.0, abs=1e-6)
    assert metrics[False]["train/approx_kl"] > 1e-3


def test_what_is_frozen_stays_and_all_else_moves():
    policy = make_policy(critic=True)
    training = TrainingConfig(iterations=1, batch=N, micro_batch=N, freeze=("vlm.towers", "vlm.projector"))
    learner = Learner(
        policy, algorithms.get("ppo"), Run("test", PPO(), training=training), torch.device("cpu")
    )
    before = {name: value.clone() for name, value in policy.named_parameters()}
    learner.update(make_batch(policy, normalized=False), 0)
    moved = {name for name, value in policy.named_parameters() if not torch.equal(value, before[name])}
    assert "vlm.lm_head.weight" in moved and any(name.startswith("value_head") for name in moved)
    assert not any(name.startswith(training.freeze) for name in moved)
    with pytest.raises(RoveError, match=r"training\.freeze.*Did you mean 'vlm\.towers'"):
        freeze(policy, ("vlm.tower.",), "training.freeze")


@pytest.mark.parametrize(
    ("algorithm", "config"),
    [
        *((algorithm, TOKENS) for algorithm in (PPO(), GRPO(), GRPO(length_normalization=False))),
        (CHUNK_PPO, FLOW),
        (CHUNK_GRPO, FLOW),
    ],
    ids=["ppo", "grpo", "grpo without lengths", "ppo of a flow", "grpo of a flow"],
)
def test_the_micro_batch_split_does_not_change_the_gradient(algorithm, config):
    policy = make_policy(isinstance(algorithm, PPO), config)
    normalized = isinstance(algorithm, GRPO) and algorithm.length_normalization
    batch = make_batch(policy, normalized=normalized, level=algorithm.ratio_level)
    gradients, metrics = [], []
    for micro_batch in (N, 4, 1):
        learner = make_learner(algorithm, policy, micro_batch)
        policy.zero_grad()
        sums = learner.accumulate(batch, step_of_rank(batch, torch.arange(N)))
        metrics.append({name: float(value) for name, value in sums.items()})
        gradients.append({n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None})
    assert gradients[0] and max(g.abs().max() for g in gradients[0].values()) > 1e-3
    for other, measured in zip(gradients[1:], metrics[1:], strict=True):
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
        assert measured == pytest.approx(metrics[0], rel=1e-4, abs=1e-6)


def start_of(kind: str, directory: Path):
    """A policy to start RL from: "whole", or "adapters" that demonstrations have moved, beside bfloat16."""
    policy = make_policy(critic=False)
    if kind == "whole":
        return policy
    policy.save_pretrained(directory)
    policy = policies.load(directory, lora=LoraConfig(rank=2), dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return policy


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["whole", "adapters"])
def test_the_reference_is_the_policy_that_the_run_started_from(kind, precision, tmp_path):
    policy, start = (start_of(kind, tmp_path / "base") for _ in range(2))
    batch = make_batch(policy, normalized=False)
    config = GRPO(length_normalization=False, kl_coef=0.1)
    optim = OptimConfig(lr=1e-2)
    training = TrainingConfig(iterations=1, batch=N, micro_batch=5, optim=optim, precision=precision)
    learner = Learner(policy, algorithms.get("grpo"), Run("test", config, training=training), CPU)
    for iteration in range(3):
        metrics = learner.update(batch, iteration)
        assert (metrics["train/kl_reference"] == 0) == (iteration == 0)

    def logprob(of) -> torch.Tensor:
        with torch.no_grad():
            return of.evaluate(batch.observation, batch.sample).logprob

    assert (logprob(policy) - logprob(start)).abs().max() > 1e-2
    assert learner.reference is not None
    with learner.reference.in_place():
        assert torch.equal(logprob(policy), logprob(start))
    assert (logprob(policy) - logprob(start)).abs().max() > 1e-2, "the policy is itself again"
    kept = learner.state_dict()["reference"]
    assert kept.keys() == learner.trainable().keys()

    again = deepcopy(policy)
    resumed = Learner(again, algorithms.get("grpo"), Run("test", config, training=training), CPU)
    resumed.load_state_dict(learner.state_dict())
    assert resumed.update(batch, 3) == learner.update(batch, 3)


def test_critic_warm_up_trains_the_head_alone():
    policy = make_policy(critic=True)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    learner = make_learner(PPO(critic_warmup=1), policy, N)
    learner.update(make_batch(policy, normalized=False), iteration=0)
    moved = {name for name, p in policy.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(name.startswith("value_head") for name in moved)
    learner.update(make_batch(policy, normalized=False), iteration=1)
    assert not torch.equal(policy.vlm.lm_head.weight, before["vlm.lm_head.weight"])


@pytest.mark.parametrize("config", [TOKENS, FLOW], ids=["tokens", "flow"])
def test_one_batch_is_overfitted_towards_its_good_actions(config):
    policy = make_policy(False, config)
    batch = make_batch(policy, normalized=False)
    batch = replace(batch, logprob=policy.evaluate(batch.observation, batch.sample).logprob.detach())
    good = (batch.advantage > 0) & batch.mask
    learner = make_learner(GRPO(length_normalization=False, clip_high=10.0), policy, N, lr=3e-3)
    for iteration in range(20):
        learner.update(batch, iteration)
    gain = policy.evaluate(batch.observation, batch.sample).logprob - batch.logprob
    bad = (batch.advantage < 0) & batch.mask
    assert gain[good].mean() > 0.1 > gain[bad].mean()


def test_an_empty_batch_takes_no_step():
    policy = make_policy(critic=False)
    batch = make_batch(policy, normalized=True).select(torch.arange(0))
    metrics = make_learner(GRPO(), policy, N).update(batch, 0)
    assert metrics["train/steps"] == 0 and metrics["train/rows"] == 0
