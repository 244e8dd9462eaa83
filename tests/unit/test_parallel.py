"""Two learners train as one does: DDP and FSDP2 on gloo, with all that goes with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.unit.test_learner import CHUNK_PPO, FLOW, SPEC, C, make_batch, make_policy
from torch import distributed

from rove import algorithms
from rove.config.schema import (
    GRPO,
    PPO,
    LlamaConfig,
    LoraConfig,
    OptimConfig,
    PolicyConfig,
    Run,
    TowerConfig,
    TrainingConfig,
    ValueHeadConfig,
)
from rove.placement.inventory import Inventory
from rove.placement.plan import make_plan
from rove.policies import registry as policies
from rove.policies.base import Policy
from rove.runtime.channel import Channel, ChannelClosed
from rove.runtime.process import Child, Crash
from rove.training.deal import deal, schedule, step_of_rank
from rove.training.learner import Learner
from rove.training.parallel import Ranks, free_address, join, leave
from rove.workers.policy import Assignment, PolicyWorker

STEPS = 3
PUBLISHED = PolicyConfig(
    towers=(
        TowerConfig(kind="dinov2", width=16, depth=3, heads=2, patch=8, mlp=32),
        TowerConfig(kind="siglip", width=16, depth=3, heads=2, patch=8, mlp=32),
    ),
    llama=LlamaConfig(width=16, depth=2, heads=2, mlp=32),
    decoding="autoregressive",
    film=True,
    value_head=ValueHeadConfig(hidden=(16,)),
)
"""Both towers, as every published checkpoint has them, and what can be put around them."""


def policy_of(config: PolicyConfig | None) -> Policy:
    """A new one, or one read from a checkpoint; None: the smallest."""
    if config is None:
        return make_policy(critic=True)
    return policies.build(
        config, chunk=C, action_spec=SPEC, image_size=16, vocabulary=("go", "left"), statistics=None, seed=0
    )


def learner_of(
    training: TrainingConfig,
    ranks: Ranks,
    config: PolicyConfig | None = None,
    algorithm: PPO | GRPO = PPO(),
) -> Learner:
    torch.manual_seed(0)
    run = Run("t", algorithm, training=training)
    return Learner(policy_of(config), algorithms.get(algorithm.kind), run, torch.device("cpu"), ranks)


def history(learner: Learner, config: PolicyConfig | None = None) -> list[dict[str, float]]:
    """Metrics of some iterations on one batch, of 12 rows: an odd number of micro-batches a rank. Its weights
    are the first ones: all iterations but the first are behind."""
    level = learner.config.ratio_level
    batch = replace(make_batch(policy_of(config), normalized=False, level=level), version=0)
    return [learner.update(batch, iteration) for iteration in range(STEPS)]


def rank(channel: Channel, number: int, address: str) -> None:
    """One of two learners, in a process of its own, for as many runs as it is asked for."""
    torch.set_num_threads(1)
    ranks = join(number, 2, address, torch.device("cpu"))
    while True:
        try:
            training, config, algorithm = channel.recv()
        except ChannelClosed:
            return leave()
        learner = learner_of(training, ranks, config, algorithm)
        metrics = history(learner, config)
        state, weights = learner.state_dict(), learner.trainable()
        again = learner_of(training, ranks, config, algorithm)
        again.load_state_dict(state)
        channel.send((metrics, weights, state, again.state_dict()))


@pytest.fixture(scope="module")
def two_learners() -> Iterator[Callable[..., list[tuple]]]:
    """Trains on two ranks; the answers of both."""
    address = free_address()
    children = [Child(rank, n, address) for n in range(2)]

    def train(
        training: TrainingConfig, config: PolicyConfig | None, algorithm: PPO | GRPO = PPO()
    ) -> list[tuple]:
        for child in children:
            child.channel.send((training, config, algorithm))
        answers = [child.channel.recv() for child in children]
        for answer in answers:
            assert not isinstance(answer, Crash), answer.trace
        return answers

    yield train
    for child in children:
        child.join()


BASE = TrainingConfig(iterations=STEPS, batch=6, micro_batch=2, optim=OptimConfig(lr=1e-3, value_lr=3e-3))
FSDP = replace(BASE, parallel="fsdp")


def compare(expected: list, alone: Learner, answers: list[tuple], tolerance: float) -> None:
    """Assert that two learners measured, and became, what one does."""
    first, second = answers
    for metrics in (first[0], second[0]):
        for want, got in zip(expected, metrics, strict=True):
            assert want.keys() == got.keys()
            for name in want:
                assert got[name] == pytest.approx(want[name], rel=tolerance, abs=tolerance), name
    assert first[1].keys() == alone.trainable().keys()
    for name, weight in alone.trainable().items():
        assert torch.equal(first[1][name], second[1][name]), "the ranks' weights have parted"
        # The gradient of a key's bias is zero but for rounding, which Adam blows up to whole steps.
        if not name.endswith("k_proj.bias"):
            assert torch.allclose(first[1][name], weight, atol=10 * tolerance), name


@pytest.mark.parametrize(
    ("training", "tolerance"),
    [
        (BASE, 1e-5),
        (replace(FSDP, gradient_checkpointing=True), 1e-5),
        (replace(FSDP, precision="bfloat16"), 5e-2),
    ],
    ids=["ddp", "fsdp", "fsdp-bfloat16"],
)
def test_two_learners_train_as_one(training, tolerance, two_learners):
    alone = learner_of(replace(training, gradient_checkpointing=False), Ranks())
    expected = history(alone)
    answers = two_learners(training, None)
    compare(expected, alone, answers, tolerance)
    first = answers[0]
    before = dict(make_policy(critic=True).named_parameters())
    assert any(not torch.equal(weight, before[name]) for name, weight in first[1].items())
    # A checkpoint holds whole tensors, and is the same after it was loaded.
    saved, loaded, single = (
        state["optimizer"]["adamw"]["state"] for state in (first[2], first[3], alone.state_dict())
    )
    assert saved.keys() == loaded.keys() == single.keys()
    for number, moments in saved.items():
        assert torch.equal(moments["exp_avg"], loaded[number]["exp_avg"])
        assert moments["exp_avg"].shape == single[number]["exp_avg"].shape


def adapted(config: PolicyConfig, directory: Path) -> PolicyConfig:
    """Its weights in bfloat16, with adapters beside them."""
    policy_of(config).save_pretrained(directory)
    return replace(config, checkpoint=str(directory), lora=LoraConfig(rank=2), dtype="bfloat16")


@pytest.mark.parametrize("how", ["whole", "adapters"])
def test_a_policy_as_published_is_sharded(how: str, two_learners, tmp_path: Path):
    """Both towers and FiLM, decoded token by token."""
    config = PUBLISHED if how == "whole" else adapted(PUBLISHED, tmp_path / "start")
    alone = learner_of(BASE, Ranks(), config)
    expected = history(alone, config)
    answers = two_learners(replace(FSDP, gradient_checkpointing=True), config)
    compare(expected, alone, answers, 1e-5 if how == "whole" else 5e-2)


@pytest.mark.parametrize("training", [BASE, FSDP], ids=["ddp", "fsdp"])
def test_two_learners_train_a_flow_policy_as_one_does(training: TrainingConfig, two_learners):
    alone = learner_of(BASE, Ranks(), FLOW, CHUNK_PPO)
    compare(history(alone, FLOW), alone, two_learners(training, FLOW, CHUNK_PPO), 1e-5)


@pytest.mark.parametrize("training", [BASE, FSDP], ids=["ddp", "fsdp"])
def test_a_reference_is_kept_by_every_rank(training: TrainingConfig, two_learners):
    config = replace(PUBLISHED, value_head=None)
    algorithm = GRPO(kl_coef=0.5, length_normalization=False)
    alone = learner_of(BASE, Ranks(), config, algorithm)
    expected = history(alone, config)
    assert expected[0]["train/kl_reference"] < expected[-1]["train/kl_reference"]
    answers = two_learners(training, config, algorithm)
    compare(expected, alone, answers, 1e-5)
    saved, loaded = answers[0][2]["reference"], answers[0][3]["reference"]
    start = dict(policy_of(config).named_parameters())
    assert saved.keys() == alone.trainable().keys()
    for name, kept in saved.items():
        assert torch.equal(kept, start[name]) and torch.equal(kept, loaded[name])


def test_a_seat_makes_its_gpu_its_own_before_all_else(monkeypatch):
    """FSDP and NCCL take the current device: left at the first, all ranks would meet on one GPU."""

    class Chosen(Exception):
        pass

    def choose(device: torch.device) -> None:
        raise Chosen(device)

    monkeypatch.setattr(torch.cuda, "set_device", choose)
    plan = make_plan(Run("t", PPO()), Inventory.of(gpus=8, cores=64))
    number = next(n for n, worker in enumerate(plan.workers) if worker.rank == 3)
    with pytest.raises(Chosen, match="cuda:3"):
        PolicyWorker(Assignment(Run("t", PPO()), plan, number, Path("nowhere"), ""))


@pytest.mark.parametrize(
    ("device", "backend", "bound"),
    [("cpu", "gloo", None), ("cuda:3", "cpu:gloo,cuda:nccl", torch.device("cuda:3"))],
)
def test_ranks_meet_on_their_own_devices(device, backend, bound, monkeypatch):
    asked: list[tuple] = []
    monkeypatch.setattr(distributed, "init_process_group", lambda *args, **how: asked.append((args, how)))
    assert join(3, 8, "host:1", torch.device(device)) == Ranks(3, 8)
    how = {"init_method": "tcp://host:1", "rank": 3, "world_size": 8, "device_id": bound}
    assert asked == [((backend,), how)]


def test_rows_that_fill_up_a_share_count_nothing():
    batch = make_batch(make_policy(critic=True), normalized=False)
    rows = torch.tensor([7, 0, 11, 3, 6])
    shares = [deal(batch, [rows], rank, 3) for rank in range(3)]
    assert {len(share.batch) for share in shares} == {2}
    parts = [share.steps[0].select(share.batch) for share in shares]
    assert {len(part) for part in parts} == {2}
    assert sum(int(part.mask.sum()) for part in parts) == int(batch.mask[rows].sum())
    assert {share.steps[0].denominator for share in shares} == {float(batch.mask[rows].sum())}


def test_ranks_together_see_the_rows_that_one_learner_does():
    """In two epochs of three steps each, of 12, 11 or 1 rows: other rows for a rank in each."""
    whole = make_batch(make_policy(critic=True), normalized=False)
    run = Run("t", PPO(epochs=2), training=replace(BASE, batch=4))
    for size in (12, 11, 1):
        batch = whole.select(torch.arange(size))
        steps = schedule(size, run, 3)
        assert len(steps) == 2 * -(-size // 4) and all(len(rows) <= 4 for rows in steps)
        shares = [deal(batch, steps, rank, 3) for rank in range(3)]
        assert len({len(share.batch) for share in shares}) == 1, "all evaluate as many"
        for number, rows in enumerate(steps):
            alone = step_of_rank(batch, rows).select(batch)
            parts = [share.steps[number] for share in shares]
            seen = [part.select(share.batch) for part, share in zip(parts, shares, strict=True)]
            for name in ("sample", "logprob", "advantage", "mask"):
                kept = [getattr(s, name)[part.real] for s, part in zip(seen, parts, strict=True)]
                assert torch.equal(torch.cat(kept), getattr(alone, name)), name


def test_recomputed_activations_give_the_same_gradients(monkeypatch):
    plain, frugal = (learner_of(replace(BASE, gradient_checkpointing=on), Ranks()) for on in (False, True))
    expected = history(plain)
    # Nothing in a policy draws numbers: to save the generators' states, a GPU's too, would make it wait.
    monkeypatch.delattr(torch, "get_rng_state")
    assert history(frugal) == expected


def test_a_stale_batch_is_trained_on_through_the_proximal_policy():
    policy = make_policy(critic=True)
    batch = make_batch(policy, normalized=False)
    fresh = learner_of(BASE, Ranks()).update(replace(batch, version=4), 4)
    unknown = learner_of(BASE, Ranks()).update(batch, 4)
    assert fresh == unknown | {"train/behind": 0} and "train/behavior_weight" not in fresh
    stale = learner_of(BASE, Ranks()).update(replace(batch, version=2), 4)
    assert stale["train/behind"] == 2 and 0.5 < stale["train/behavior_weight"] <= 2


def test_a_stale_batch_is_anchored_at_the_policy_and_critic_as_they_are():
    batch = make_batch(policy := make_policy(critic=True), normalized=False)
    learner = learner_of(BASE, Ranks())
    anchored = learner.anchored(replace(batch, value=torch.full_like(batch.value, 7.0)))
    now = policy.evaluate(batch.observation, batch.sample)
    torch.testing.assert_close(anchored.proximal, now.logprob.detach())
    torch.testing.assert_close(anchored.value, now.value.detach())
    assert anchored.logprob is batch.logprob and anchored.returns is batch.returns
