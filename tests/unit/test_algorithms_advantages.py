"""Masks, bootstrapping, GAE, group-relative advantages, normalisation: cases worked out by hand."""

import pytest
import torch

from rove.algorithms.advantages import bootstrap, explained_variance, gae, group_relative, normalize
from rove.algorithms.masking import episode_mask, masked_mean


def test_episode_mask_counts_up_to_and_including_the_first_end():
    done = torch.zeros(2, 3, 2, dtype=torch.bool)
    done[0, 0, 1] = done[1, 0, 0] = True  # ends twice: only the first counts
    done[1, 1, 0] = True
    mask, length = episode_mask(done)
    assert mask[:, 0].flatten().tolist() == [True, True, False, False]
    assert mask[:, 1].flatten().tolist() == [True, True, True, False]
    assert mask[:, 2].all()
    assert length.tolist() == [2, 3, 4]


def test_masked_mean_forms():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    mask = torch.tensor([[True, True], [True, False]])
    length = torch.tensor([[2], [1]])
    assert masked_mean(x, mask).item() == pytest.approx(6 / 3)
    assert masked_mean(x, mask, denominator=12).item() == pytest.approx(6 / 12)
    normalized = masked_mean(x, mask, episode_length=length, horizon=4)
    assert normalized.item() == pytest.approx((1 * 2 + 2 * 2 + 3 * 4) / 4)
    tokens = x[..., None].expand(2, 2, 3)
    assert masked_mean(tokens, mask).item() == pytest.approx(3 * 6 / 3)
    assert masked_mean(tokens, mask, episode_length=length, horizon=4).item() == pytest.approx(18 / 4)
    assert masked_mean(x, torch.zeros_like(mask)).item() == 0.0


def test_masked_mean_refuses_half_a_length_normalisation_and_a_misfit_mask():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="both episode_length and horizon"):
        masked_mean(x, torch.ones(2, 3, dtype=torch.bool), horizon=4)
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        masked_mean(x, torch.ones(2, 1, dtype=torch.bool))


def test_gae_equals_the_definition_summed_forwards():
    generator = torch.Generator().manual_seed(0)
    t, b, c, gamma, lam = 3, 2, 2, 0.9, 0.8
    reward = torch.rand(t, b, c, generator=generator)
    value = torch.rand(t + 1, b, c, generator=generator)
    done = torch.zeros(t, b, c, dtype=torch.bool)
    done[1, 0, 0] = True
    advantage, returns = gae(reward, value, done, gamma=gamma, lam=lam)
    for slot in range(b):
        r, d = reward[:, slot].flatten(), done[:, slot].flatten()
        v = value[:, slot].flatten()
        for start in range(t * c):
            expected, weight = 0.0, 1.0
            for step in range(start, t * c):
                expected += weight * (r[step] + gamma * v[step + 1] * ~d[step] - v[step])
                if d[step]:
                    break
                weight *= gamma * lam
            assert advantage[start // c, slot, start % c].item() == pytest.approx(float(expected), abs=1e-6)
    torch.testing.assert_close(returns, advantage + value[:-1])


def test_nothing_after_an_end_leaks_into_what_came_before():
    reward, value = torch.zeros(2, 1, 4), torch.zeros(3, 1, 4)
    done = torch.zeros(2, 1, 4, dtype=torch.bool)
    done[0, 0, 1] = True
    reward[0, 0, 1] = 1.0
    before, _ = gae(reward, value, done, gamma=0.9, lam=0.9)
    value[0, 0, 2:], value[1:], reward[1] = 100.0, 100.0, 100.0
    after, _ = gae(reward, value, done, gamma=0.9, lam=0.9)
    torch.testing.assert_close(before[0, 0, :2], after[0, 0, :2])
    assert before[0, 0, :2].tolist() == pytest.approx([0.81, 1.0])


def test_chunk_level_is_action_level_over_chunks():
    generator = torch.Generator().manual_seed(1)
    reward, value = torch.rand(4, 3, 5, generator=generator), torch.rand(5, 3, 1, generator=generator)
    done = torch.rand(4, 3, 5, generator=generator) < 0.1
    chunk = gae(reward, value, done, gamma=0.9, lam=0.7, level="chunk")
    summed, ended = reward.sum(-1, keepdim=True), done.any(-1, keepdim=True)
    action = gae(summed, value, ended, gamma=0.9, lam=0.7)
    torch.testing.assert_close(chunk, action)
    assert chunk[0].shape == (4, 3, 1)


@pytest.mark.parametrize(("level", "width"), [("action", 1), ("chunk", 5)])
def test_gae_refuses_values_of_the_other_level(level, width):
    with pytest.raises(ValueError, match="value head's level"):
        gae(
            torch.zeros(4, 3, 5),
            torch.zeros(5, 3, width),
            torch.zeros(4, 3, 5, dtype=torch.bool),
            gamma=0.9,
            lam=0.9,
            level=level,
        )


def test_a_bootstrapped_truncation_is_worth_as_much_as_going_on():
    """λ = 1: cut after two of four actions, with the true value of the rest, the return is unchanged."""
    gamma = 0.5
    reward, value = torch.ones(1, 1, 4), torch.zeros(2, 1, 4)
    done = torch.tensor([[[False, False, False, True]]])
    _, whole = gae(reward, value, done, gamma=gamma, lam=1.0)
    rest = whole[:, :, 2:3]
    cut = torch.tensor([[[False, True]]])
    rewarded = bootstrap(reward[..., :2], rest, cut, gamma=gamma)
    assert rewarded.tolist() == [[[1.0, 1.0 + gamma * 1.5]]]
    _, returns = gae(rewarded, value[..., :2], cut, gamma=gamma, lam=1.0)
    torch.testing.assert_close(returns, whole[..., :2])


def test_group_relative_by_hand():
    advantage = group_relative(torch.tensor([0.0, 1.0, 5.0, 5.0]), 2)
    assert advantage.tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5, 0.0, 0.0], abs=1e-5)


@pytest.mark.parametrize(("episodes", "group_size"), [(4, 1), (5, 2), (4, 8)])
def test_group_relative_refuses_sizes_that_form_no_groups(episodes, group_size):
    with pytest.raises(ValueError, match="cannot form groups"):
        group_relative(torch.zeros(episodes), group_size)


def test_normalize_takes_statistics_from_the_mask_and_transforms_everything():
    advantage = torch.tensor([[1.0, 3.0, 100.0]])
    mask = torch.tensor([[True, True, False]])
    normal = normalize(advantage, mask)
    std = 2**0.5
    assert normal.flatten().tolist() == pytest.approx([-1 / std, 1 / std, 98 / std], rel=1e-4)


def test_normalize_survives_masks_without_spread():
    advantage = torch.tensor([[2.0, 7.0]])
    assert normalize(advantage, torch.tensor([[True, False]])).tolist()[0] == pytest.approx(
        [0.0, 5.0], rel=1e-4
    )
    assert normalize(advantage, torch.zeros(1, 2, dtype=torch.bool)).isfinite().all()


def test_explained_variance():
    returns = torch.tensor([[1.0, 2.0, 3.0, 50.0]])
    mask = torch.tensor([[True, True, True, False]])
    assert explained_variance(returns, returns, mask) == pytest.approx(1.0)
    assert explained_variance(torch.full_like(returns, 2.0), returns, mask) == pytest.approx(0.0)
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3.0)
    assert explained_variance(returns, torch.ones_like(returns), mask) == 0.0
