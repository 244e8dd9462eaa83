"""What only a card can show: numbers, capture, kernels, waits, NCCL. `make test-gpu` runs them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.integration.test_openvla_rl import SMALL
from tests.unit.test_learner import make_batch, make_learner, make_policy
from tests.unit.test_parallel import BASE, history, learner_of
from tests.unit.test_policy_openvla import AUTOREGRESSIVE, TEXTS, noise
from tests.unit.test_policy_openvla import CONFIG as PARALLEL
from tests.unit.test_policy_openvla import build as build_policy
from torch import Tensor

from rove import algorithms, recipes, transfer
from rove.config.schema import PPO, EvaluationConfig, LoggingConfig, LoraConfig, PolicyConfig, Run
from rove.policies.openvla import OpenVLA
from rove.rollout.collect import act
from rove.runtime.channel import Channel
from rove.runtime.process import Child, Crash
from rove.train import train
from rove.training.learner import Learner
from rove.training.parallel import Ranks, free_address, join, leave
from rove.types import Observation

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible"),
]
DEVICE = torch.device("cuda:0")
EVERY = pytest.mark.parametrize("config", [PARALLEL, AUTOREGRESSIVE], ids=["parallel", "autoregressive"])


def observe(rows: int = 4) -> Observation:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (rows, 1, 16, 16, 3), dtype=torch.uint8, generator=generator)
    return Observation(images, TEXTS[:rows])


def lowered(config: PolicyConfig) -> OpenVLA:
    """Weights in bfloat16 with adapters that have moved, on the card."""
    policy = build_policy(config)
    policy.vlm.to(torch.bfloat16)
    policy.adapt(LoraConfig(rank=4), torch.Generator().manual_seed(0))
    with torch.no_grad():
        for layer in policy.adapters:
            layer.pair[1].normal_(0.0, 0.05)
    return policy.to(DEVICE).eval()


@EVERY
def test_numbers_are_the_cpus(config: PolicyConfig) -> None:
    here, there = build_policy(config), build_policy(config).to(DEVICE)
    tokens = here.act(observe(), "sample", noise()).sample
    torch.testing.assert_close(there.act(observe(), "sample", noise()).sample.cpu(), tokens)
    one, other = here.evaluate(observe(), tokens), transfer.to(there.evaluate(observe(), tokens), "cpu")
    torch.testing.assert_close(other.logprob, one.logprob, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(other.value, one.value, atol=1e-4, rtol=1e-4)


@EVERY
def test_act_and_evaluate_agree_in_half_precision(config: PolicyConfig) -> None:
    policy = lowered(config)
    chunk = policy.act(observe(), "sample", noise())
    output = policy.evaluate(observe(), chunk.sample)
    torch.testing.assert_close(output.logprob, chunk.logprob, atol=0.15, rtol=0)


@EVERY
def test_a_captured_act_answers_the_same(config: PolicyConfig) -> None:
    plain = build_policy(config).to(DEVICE)
    captured = build_policy(replace(config, compile=True)).to(DEVICE)
    for rows in (4, 3, 4):
        some = observe().select(range(rows))
        want, got = (policy.act(some, "sample", noise(rows)) for policy in (plain, captured))
        assert torch.equal(got.sample, want.sample)
        torch.testing.assert_close(got.logprob, want.logprob, atol=1e-4, rtol=0)
    with torch.no_grad():  # a graph reads weights where they are, as they are now
        for policy in (plain, captured):
            policy.vlm.lm_head.weight.mul_(0.5)
    want, got = (policy.act(observe(), "greedy") for policy in (plain, captured))
    torch.testing.assert_close(got.logprob, want.logprob, atol=1e-4, rtol=0)


@EVERY
def test_nothing_waits(config: PolicyConfig) -> None:
    """PyTorch raises at a synchronisation while its debug mode says so."""
    policy = lowered(config)
    learner = make_learner(PPO(), make_policy(critic=True).to(DEVICE), 6, device=DEVICE)
    rows = make_batch(make_policy(critic=True), normalized=False)
    policy.act(observe(), "sample", noise())  # constants go to the device once
    learner.update(rows, 0)
    seen, some = observe(), noise()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        policy.act(seen, "sample", some)
        output = policy.evaluate(seen, torch.full((4, 3, 2), policy.vlm.vocab_size - 5))
        output.logprob.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_flash_attention_serves_prompts_of_different_lengths() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    policy = lowered(PARALLEL)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]):  # raises where neither can
        chunk = act(policy, policy.action_spec, observe(), noise())
        policy.evaluate(observe(), chunk.sample).logprob.sum().backward()


def test_a_learner_on_the_card_learns_what_one_on_the_cpu_does() -> None:
    here, there = make_policy(critic=True), make_policy(critic=True).to(DEVICE)
    rows = make_batch(make_policy(critic=True), normalized=False)
    learners = [make_learner(PPO(), here, 6), make_learner(PPO(), there, 6, device=DEVICE)]
    for iteration in range(3):
        want, got = (learner.update(rows, iteration) for learner in learners)
        for name, value in want.items():
            assert got[name] == pytest.approx(value, rel=1e-2, abs=1e-3), name


@pytest.mark.parametrize("name", ["openvla_oft_ppo", "openvla_ppo"])
def test_a_recipe_trains_on_the_card(name: str, tmp_path: Path) -> None:
    from tests.integration.test_openvla_rl import small

    run = small(name, tmp_path / "checkpoint")
    from rove.envs import registry as envs

    env = envs.make(run.env, num_envs=1, chunk=run.rollout.chunk, autoreset="refill")
    OpenVLA.build(
        SMALL,
        chunk=run.rollout.chunk,
        action_spec=env.action_spec,
        image_size=56,
        vocabulary=env.suite.vocabulary,
        statistics=None,
        seed=1,
    ).save_pretrained(tmp_path / "checkpoint")
    env.close()
    run = replace(run, policy=replace(run.policy, dtype="bfloat16"))
    assert train(run, tmp_path / "run") and train(run, tmp_path / "run", resume=True)


def test_the_tabletop_trains_on_the_card_drawn_there_too(tmp_path: Path) -> None:
    base = recipes.get("tabletop_ppo").build()
    assert base.sft is not None
    run = replace(
        base,
        env=replace(base.env, render="cuda"),
        rollout=replace(base.rollout, num_envs=16),
        sft=replace(base.sft, episodes=20, steps=20, grounding=64, grounding_steps=20),
        training=replace(base.training, iterations=2, batch=32, micro_batch=32, offload=True),
        evaluation=EvaluationConfig(every=1, episodes=16, variant_episodes=0, num_envs=16),
        logging=LoggingConfig(tensorboard=False, save_every=1),
    )
    assert (train(run, tmp_path / "run") / "report.html").is_file()


def rank(channel: Channel, number: int, address: str, parallel: str) -> None:
    """One of two learners, each on a card of its own."""
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    ranks = join(number, 2, address, device)
    training = replace(BASE, parallel=parallel, gradient_checkpointing=True)
    run = Run("t", PPO(), training=training)
    learner = Learner(make_policy(critic=True).to(device), algorithms.get("ppo"), run, device, ranks)
    channel.send((history(learner), {name: w.cpu() for name, w in learner.trainable().items()}))
    channel.recv()
    leave()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_cards_train_as_one_cpu(parallel: str) -> None:
    address = free_address()
    children = [Child(rank, n, address, parallel) for n in range(2)]
    answers = [child.channel.recv() for child in children]
    for answer in answers:
        assert not isinstance(answer, Crash), answer.trace
    for child in children:
        child.channel.send(None)
        child.join()
    alone = learner_of(BASE, Ranks())
    for want, got in zip(history(alone), answers[0][0], strict=True):
        for name in want:
            assert got[name] == pytest.approx(want[name], rel=1e-2, abs=1e-3), name
    first, second = (answer[1] for answer in answers)
    assert all(isinstance(w, Tensor) and torch.equal(w, second[name]) for name, w in first.items())
