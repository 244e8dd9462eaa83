"""From rollouts to batches and losses: PPO and GRPO as the loop calls them."""

from dataclasses import replace

import pytest
import torch

from rove import algorithms
from rove.algorithms import grpo, ppo
from rove.config.schema import GRPO, PPO
from rove.types import EpisodeRecord, EpisodeSpec, Observation, PolicyOutput, Trajectory

C, A = 2, 3


def rollout(lengths, success, t=3, level=C, reward=None):
    """One episode a slot, of these lengths in actions; 0 is an idle slot. Failures are truncated."""
    b = len(lengths)
    step = torch.arange(t * C).reshape(t, 1, C)
    length, won = torch.tensor(lengths).view(1, b, 1), torch.tensor(success).view(1, b, 1)
    last = step == length - 1
    generator = torch.Generator().manual_seed(b)
    records = tuple(
        EpisodeRecord(
            EpisodeSpec("task", slot), slot, success[slot], n, float(success[slot]), not success[slot]
        )
        for slot, n in enumerate(lengths)
        if n
    )
    number = torch.arange(t * b)
    return Trajectory(
        observation=Observation(
            number.to(torch.uint8).view(-1, 1, 1, 1, 1).expand(-1, 1, 2, 2, 3), tuple(map(str, range(t * b)))
        ),
        sample=number.view(t, b, 1, 1).expand(t, b, C, A),
        logprob=-torch.rand(t, b, C, A, generator=generator),
        value=torch.rand(t + 1, b, level, generator=generator),
        final_value=torch.rand(t, b, 1, generator=generator) * (last & ~won).any(-1, keepdim=True),
        reward=(last & won).float() if reward is None else reward,
        terminated=last & won,
        truncated=last & ~won,
        executed=step < length,
        finished=records,
        version=0,
    )


def answer(batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch.logprob.shape, generator=generator)
    return PolicyOutput(
        logprob=(batch.logprob + 0.4 * noise).requires_grad_(),
        entropy=noise.abs().requires_grad_(),
        value=None if batch.value is None else (batch.value + 0.3).requires_grad_(),
    )


def denominators(algorithm_batch):
    masked = float(algorithm_batch.mask.sum())
    return {
        "denominator": masked if algorithm_batch.denominator is None else algorithm_batch.denominator,
        "value_denominator": masked,
    }


def test_registry():
    assert algorithms.get("ppo") is ppo
    assert algorithms.get("grpo") is grpo
    with pytest.raises(ValueError, match="grpo, ppo"):
        algorithms.get("gppo")
    with pytest.raises(ValueError, match="already"):
        algorithms.register(PPO, ppo)


# --- PPO ------------------------------------------------------------------------------------------


def test_ppo_rows_are_the_executed_chunks_and_stay_together():
    batch, _ = ppo.prepare([rollout([5, 2, 0, 6], [True, True, False, False])], PPO())
    assert len(batch) == 3 + 1 + 0 + 3
    rows = [0, 1, 3, 4, 7, 8, 11]  # t·B + b
    assert batch.sample[:, 0, 0].tolist() == rows
    assert batch.observation.instruction == tuple(map(str, rows))
    assert batch.observation.images[:, 0, 0, 0, 0].tolist() == rows
    assert batch.mask.sum() == 5 + 2 + 6
    assert batch.mask.any(-1).all()


def test_ppo_bootstraps_truncations_only_or_every_end():
    config = PPO(gamma=0.5, lam=0.0, normalize_advantage=False)
    trajectory = rollout([6, 6], [True, False])
    trajectory = replace(trajectory, final_value=torch.ones(3, 2, 1))
    for bootstrap, of_success in (("truncated", 1.0), ("always", 1.5)):
        batch, _ = ppo.prepare([trajectory], replace(config, bootstrap=bootstrap))
        assert batch.returns is not None
        # λ = 0: the last action's target is its reward, with the bootstrap where there is one.
        assert batch.returns[-2:, -1].tolist() == pytest.approx([of_success, 0.5])


def test_ppo_normalises_over_all_rounds_at_once():
    rounds = [rollout([5, 2], [True, True]), rollout([6, 6, 3], [False, True, True])]
    batch, metrics = ppo.prepare(rounds, PPO())
    raw, _ = ppo.prepare(rounds, PPO(normalize_advantage=False))
    counted = batch.advantage[batch.mask]
    assert len(batch) == 4 + 8
    assert counted.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert counted.std().item() == pytest.approx(1.0, abs=1e-3)
    assert metrics["train/advantage_std"] == pytest.approx(raw.advantage[raw.mask].std().item())
    assert metrics["train/return_mean"] == pytest.approx(raw.returns[raw.mask].mean().item())
    assert set(metrics) == {
        "train/advantage_mean", "train/advantage_std", "train/return_mean", "train/explained_variance",
    }  # fmt: skip


@pytest.mark.parametrize("ratio_level", ["token", "chunk"])
def test_ppo_at_chunk_level(ratio_level):
    config = PPO(advantage_level="chunk", ratio_level=ratio_level, entropy_coef=0.1)
    batch, _ = ppo.prepare([rollout([5, 2], [True, True], level=1)], config)
    assert batch.advantage.shape == (4, 1)
    assert batch.mask.shape == (4, 1 if ratio_level == "chunk" else C)
    loss, _ = ppo.loss(answer(batch), batch, config, denominator=1.0, value_denominator=1.0)
    assert loss.isfinite()


def test_ppo_without_a_critic_says_so():
    with pytest.raises(ValueError, match="value head"):
        ppo.prepare([replace(rollout([5], [True]), value=None)], PPO())


def test_ppo_loss_is_the_sum_of_its_terms():
    config = PPO(entropy_coef=0.1, value_coef=0.5)
    batch, _ = ppo.prepare([rollout([5, 2, 6], [True, True, False])], config)
    loss, metrics = ppo.loss(answer(batch), batch, config, **denominators(batch))
    expected = metrics["policy_loss"] + 0.5 * metrics["value_loss"] - 0.1 * metrics["entropy"]
    torch.testing.assert_close(loss.detach(), expected)
    assert all(not value.requires_grad for value in metrics.values())


def test_ppo_takes_one_rollout():
    assert ppo.wants_more([], PPO(), 4)
    assert not ppo.wants_more([rollout([5], [True])], PPO(), 4)


# --- GRPO -----------------------------------------------------------------------------------------

MIXED = rollout([4, 6, 2, 2, 6, 6], [True, False, True, True, False, False])
"""Groups of two: one informative, one all success, one all failure."""


def test_grpo_keeps_informative_groups_only():
    kept = grpo.filter(MIXED, GRPO(group_size=2))
    assert kept.shape[1] == 2
    assert [record.spec.initial_state for record in kept.finished] == [0, 1]
    assert grpo.filter(kept, GRPO(group_size=2)) is kept


@pytest.mark.parametrize(
    ("low", "high", "kept"), [(0.0, 1.0, 4), (0.3, 1.0, 0), (0.25, 0.25, 4), (0.0, 0.2, 0)]
)
def test_grpo_success_rate_bounds_are_inclusive(low, high, kept):
    trajectory = rollout([4, 6, 6, 6], [True, False, False, False])
    config = GRPO(group_size=4, keep_low=low, keep_high=high)
    assert grpo.filter(trajectory, config).shape[1] == kept


def test_grpo_keeps_a_group_whose_rewards_differ_without_success():
    reward = torch.zeros(3, 2, C)
    reward[0, 0, 0] = 0.5
    trajectory = rollout([6, 6], [False, False], reward=reward)
    assert grpo.filter(trajectory, GRPO(group_size=2)).shape[1] == 2


def test_grpo_samples_until_full_or_out_of_rounds():
    config = GRPO(group_size=2, max_rounds=3)
    assert grpo.wants_more([], config, 6)
    assert grpo.wants_more([MIXED], config, 6)
    assert not grpo.wants_more([MIXED], config, 2)
    assert not grpo.wants_more([MIXED] * 3, config, 7)
    assert not grpo.wants_more([MIXED], replace(config, max_rounds=1), 6)


def test_grpo_batch():
    batch, metrics = grpo.prepare([MIXED, MIXED], GRPO(group_size=2))
    assert len(batch) == 2 * (2 + 3)
    assert batch.episode_length is not None
    assert batch.episode_length.flatten().tolist() == [4, 6, 4, 6, 6] * 2
    assert batch.advantage[0].item() == pytest.approx(0.5**0.5, abs=1e-4)
    assert batch.advantage[1].item() == pytest.approx(-(0.5**0.5), abs=1e-4)
    assert batch.horizon == 6
    assert batch.denominator == 4 * 6 * A
    assert metrics == {
        "rollout/groups": 6,
        "rollout/kept_groups": 2,
        "rollout/kept_fraction": 1 / 3,
        "rollout/rounds": 2,
    }


def test_grpo_ignores_what_follows_the_first_episode():
    trajectory = rollout([2, 6], [True, False])
    reward, executed = trajectory.reward.clone(), torch.ones_like(trajectory.executed)
    reward[2, 0] = 100.0
    longer = replace(trajectory, reward=reward, executed=executed)
    batch, _ = grpo.prepare([longer], GRPO(group_size=2))
    assert len(batch) == 1 + 3
    assert batch.advantage[0].item() == pytest.approx(0.5**0.5, abs=1e-4)


@pytest.mark.parametrize("ratio_level", ["token", "action", "chunk"])
def test_grpo_every_kept_episode_weighs_the_same(ratio_level):
    """At ratio 1 the loss is minus the mean advantage, whatever the lengths: zero within a group."""
    config = GRPO(group_size=2, ratio_level=ratio_level)
    batch, _ = grpo.prepare([rollout([4, 6, 2, 6], [True, False, True, False])], config)
    same = PolicyOutput(batch.logprob, torch.zeros_like(batch.logprob), None)
    loss, metrics = grpo.loss(same, batch, config, **denominators(batch))
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert metrics["ratio"].item() == pytest.approx(1.0)


def test_grpo_without_length_normalisation_weighs_actions_alike():
    config = GRPO(group_size=2, length_normalization=False, ratio_level="action")
    batch, _ = grpo.prepare([rollout([4, 6], [True, False])], config)
    assert batch.denominator is None
    same = PolicyOutput(batch.logprob, torch.zeros_like(batch.logprob), None)
    loss, _ = grpo.loss(same, batch, config, **denominators(batch))
    assert loss.item() == pytest.approx(-(0.5**0.5) * (4 - 6) / 10, abs=1e-4)


def test_grpo_without_the_valid_action_mask_counts_the_rest_of_an_episodes_last_chunk():
    """A success of 3 actions fills its second chunk, C = 2, with one more; a failure has all 6 of its own."""
    trajectory = rollout([3, 6], [True, False])
    config = GRPO(group_size=2, ratio_level="action", length_normalization=False)
    valid, _ = grpo.prepare([trajectory], config)
    every, _ = grpo.prepare([trajectory], replace(config, valid_action_mask=False))
    assert valid.mask.tolist() == [[True, True], [True, True], [True, False], [True, True], [True, True]]
    assert every.mask.all() and every.mask.shape == valid.mask.shape
    torch.testing.assert_close(every.advantage, valid.advantage)
    assert torch.equal(every.sample, valid.sample)
    share = 0.5**0.5  # the advantages of two are plus and minus this
    for batch, expected in ((valid, -share * (3 - 6) / 9), (every, -share * (4 - 6) / 10)):
        same = PolicyOutput(batch.logprob, torch.zeros_like(batch.logprob), None)
        loss, _ = grpo.loss(same, batch, config, **denominators(batch))
        assert loss.item() == pytest.approx(expected, abs=1e-4)
    normalized, _ = grpo.prepare([trajectory], GRPO(group_size=2, valid_action_mask=False))
    assert normalized.episode_length is not None
    assert sorted(normalized.episode_length.flatten().tolist()) == [4, 4, 6, 6, 6]


def test_grpo_without_a_filter_trains_on_groups_that_teach_nothing():
    config = GRPO(group_size=2, keep_uniform=True)
    assert grpo.filter(MIXED, config) is MIXED
    batch, metrics = grpo.prepare([MIXED], config)
    assert metrics["rollout/kept_fraction"] == 1.0
    assert batch.denominator == 6 * 6 * A
    assert len(batch) == 2 + 3 + 1 + 1 + 3 + 3
    kept, _ = grpo.prepare([MIXED], GRPO(group_size=2))
    assert sorted(batch.advantage[batch.advantage != 0].tolist()) == sorted(kept.advantage.flatten().tolist())
    assert grpo.wants_more([], config, 6) and not grpo.wants_more([MIXED], config, 6)


def test_grpo_with_nothing_kept_has_an_empty_batch():
    batch, metrics = grpo.prepare([rollout([6, 6], [False, False])], GRPO(group_size=2))
    assert len(batch) == 0
    assert len(batch.observation) == 0
    assert metrics["rollout/kept_groups"] == 0


def test_grpo_kl_pulls_towards_the_reference():
    config = GRPO(group_size=2, kl_coef=0.5, entropy_coef=0.1)
    batch, _ = grpo.prepare([MIXED], config)
    output = answer(batch)
    plain, _ = grpo.loss(output, batch, replace(config, kl_coef=0.0), **denominators(batch))
    at_home, _ = grpo.loss(output, batch, config, reference=output.logprob.detach(), **denominators(batch))
    away, metrics = grpo.loss(output, batch, config, reference=output.logprob - 1.0, **denominators(batch))
    torch.testing.assert_close(at_home, plain)
    assert metrics["kl_reference"].item() == pytest.approx(torch.tensor(-1.0).exp().item(), rel=1e-4)
    assert (away - plain).item() == pytest.approx(0.5 * metrics["kl_reference"].item(), rel=1e-4)
    with pytest.raises(ValueError, match="reference"):
        grpo.loss(output, batch, config, **denominators(batch))


# --- both -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "config"),
    [
        (ppo, PPO(entropy_coef=0.1, dual_clip=1.5)),
        (ppo, PPO(entropy_coef=0.1, ratio_level="action")),
        (grpo, GRPO(group_size=2, entropy_coef=0.1, kl_coef=0.2)),
        (grpo, GRPO(group_size=2, entropy_coef=0.1, kl_coef=0.2, length_normalization=False)),
        (grpo, GRPO(group_size=2, entropy_coef=0.1, kl_coef=0.2, ratio_level="chunk")),
    ],
)
def test_micro_batches_sum_to_the_batch(algorithm, config):
    rounds = [rollout([5, 2, 6, 1], [True, True, False, True]), MIXED]
    batch, _ = algorithm.prepare(rounds, config)
    reference = batch.logprob - 0.3 if isinstance(config, GRPO) else None

    def run(parts):
        output, total, sums = answer(batch), 0.0, {}
        for rows in parts:
            part = PolicyOutput(
                output.logprob[rows],
                output.entropy[rows],
                None if output.value is None else output.value[rows],
            )
            loss, metrics = algorithm.loss(
                part,
                batch.select(rows),
                config,
                reference=None if reference is None else reference[rows],
                **denominators(batch),
            )
            loss.backward()
            total += loss.detach()
            sums = {name: sums.get(name, 0.0) + value for name, value in metrics.items()}
        gradients = [output.logprob.grad, output.entropy.grad]
        return total, gradients + ([] if output.value is None else [output.value.grad]), sums

    everything = torch.arange(len(batch))
    torch.testing.assert_close(run(everything.split(3)), run([everything]))
