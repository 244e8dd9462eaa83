"""Two learners train as one does: DDP and FSDP2 on gloo, with all that goes with them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.unit.test_learner import make_batch, make_policy

from rove import algorithms
from rove.config.schema import PPO, OptimConfig, Run, TrainingConfig
from rove.ipc import Channel, Child, Crash, Setup
from rove.training.learner import Learner
from rove.training.parallel import Ranks, free_address, join, leave

STEPS = 3


def learner_of(training: TrainingConfig, ranks: Ranks) -> Learner:
    torch.manual_seed(0)
    return Learner(
        make_policy(critic=True),
        algorithms.get("ppo"),
        Run("t", PPO(), training=training),
        torch.device("cpu"),
        ranks,
    )


def history(learner: Learner) -> list[dict[str, float]]:
    """Metrics of some iterations on one batch, of 12 rows: an odd number of micro-batches a rank. Its weights
    are the first ones: all iterations but the first are behind."""
    batch = replace(make_batch(make_policy(critic=True), normalized=False), version=0)
    return [learner.update(batch, iteration) for iteration in range(STEPS)]


def rank(channel: Channel, number: int, address: str, training: TrainingConfig) -> None:
    """One of two learners, in a process of its own."""
    torch.set_num_threads(1)
    learner = learner_of(training, join(number, 2, address, torch.device("cpu")))
    metrics = history(learner)
    state, weights = learner.state_dict(), learner.trainable()
    again = learner_of(training, learner.ranks)
    again.load_state_dict(state)
    channel.send((metrics, weights, state, again.state_dict()))
    channel.recv()
    leave()


def two_learners(training: TrainingConfig) -> list[tuple]:
    address = free_address()
    children = [
        Child("tests.unit.test_parallel:rank", (n, address, training), setup=Setup.here()) for n in range(2)
    ]
    answers = [child.channel.recv() for child in children]
    for answer in answers:
        assert not isinstance(answer, Crash), answer.trace
    for child in children:
        child.channel.send(None)
        child.join()
    return answers


BASE = TrainingConfig(iterations=STEPS, batch=6, micro_batch=2, optim=OptimConfig(lr=1e-3, value_lr=3e-3))


@pytest.mark.parametrize(
    ("training", "tolerance"),
    [
        (BASE, 1e-5),
        (replace(BASE, parallel="fsdp", gradient_checkpointing=True), 1e-5),
        (replace(BASE, parallel="fsdp", precision="bfloat16"), 5e-2),
    ],
    ids=["ddp", "fsdp", "fsdp-bfloat16"],
)
def test_two_learners_train_as_one(training, tolerance):
    alone = learner_of(replace(training, gradient_checkpointing=False), Ranks())
    expected = history(alone)
    first, second = two_learners(training)
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


def test_rows_that_fill_up_a_share_count_nothing():
    batch = make_batch(make_policy(critic=True), normalized=False)
    part = batch.select(torch.arange(5))
    shares = [Ranks(r, 3).share(part) for r in range(3)]
    assert {len(share) for share in shares} == {2}
    assert sum(int(share.mask.sum()) for share in shares) == int(part.mask.sum())


def test_recomputed_activations_give_the_same_gradients():
    plain, frugal = (learner_of(replace(BASE, gradient_checkpointing=on), Ranks()) for on in (False, True))
    assert history(plain) == history(frugal)


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
    now = policy.evaluate(batch.observation, batch.tokens)
    torch.testing.assert_close(anchored.proximal, now.logprob.detach())
    torch.testing.assert_close(anchored.value, now.value.detach())
    assert anchored.logprob is batch.logprob and anchored.returns is batch.returns
