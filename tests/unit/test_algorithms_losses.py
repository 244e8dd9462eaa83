"""What the golden file cannot show: the dual clip biting, δ other than 1, whole chunks masked, splits."""

import math

import pytest
import torch

from rove.algorithms.losses import kl_estimate, policy_loss, token_mean, value_loss

N, C, A = 12, 4, 3
LEVELS = ["token", "action", "chunk"]


def minibatch(level, seed=0):
    generator = torch.Generator().manual_seed(seed)
    width = 1 if level == "chunk" else C
    old = -torch.rand(N, C, A, generator=generator)
    logprob = old + 0.5 * torch.randn(N, C, A, generator=generator)
    advantage = torch.randn(N, width, generator=generator)
    mask = torch.rand(N, width, generator=generator) < 0.6
    mask[3] = False  # a chunk masked whole
    return logprob, old, advantage, mask


def surrogate(ratio, advantage, dual_clip=None):
    """Loss and its gradient with respect to the log-probability, of one ratio."""
    logprob = torch.full((1, 1, 1), math.log(ratio)).requires_grad_()
    loss, metrics = policy_loss(
        logprob,
        torch.zeros(1, 1, 1),
        torch.tensor([[advantage]]),
        torch.tensor([[True]]),
        clip_low=0.2,
        clip_high=0.28,
        dual_clip=dual_clip,
    )
    loss.backward()
    assert logprob.grad is not None
    return loss.item(), logprob.grad.item(), metrics


@pytest.mark.parametrize(
    ("ratio", "advantage", "dual_clip", "loss", "gradient"),
    [
        (1.1, 2.0, None, -2.2, -2.2),  # inside
        (1.5, 2.0, None, -2.56, 0.0),  # clipped above, at 1.28
        (0.5, 2.0, None, -1.0, -1.0),  # below, but it may recover
        (0.5, -2.0, None, 1.6, 0.0),  # clipped below, at 0.8
        (5.0, -2.0, None, 10.0, 10.0),  # unbounded without the dual clip
        (5.0, -2.0, 3.0, 6.0, 0.0),  # held at 3·|A|
        (5.0, 2.0, 3.0, -2.56, 0.0),  # a positive advantage is no business of the dual clip
    ],
)
def test_surrogate_by_hand(ratio, advantage, dual_clip, loss, gradient):
    actual, slope, _ = surrogate(ratio, advantage, dual_clip)
    assert actual == pytest.approx(loss, rel=1e-5)
    assert slope == pytest.approx(gradient, rel=1e-5)


@pytest.mark.parametrize("level", LEVELS)
def test_dual_clip_bites_at_every_level(level):
    logprob, old, advantage, mask = minibatch(level)
    plain, _ = policy_loss(logprob + 1, old, advantage, mask, level=level, clip_low=0.2, clip_high=0.28)
    dual, metrics = policy_loss(
        logprob + 1, old, advantage, mask, level=level, clip_low=0.2, clip_high=0.28, dual_clip=1.5
    )
    assert dual < plain - 0.1
    assert 0 < metrics["dual_clip_fraction"] < 1


def test_metrics_are_means_over_ratios():
    _, _, metrics = surrogate(1.5, 2.0)
    assert metrics["clip_fraction"] == 1
    assert metrics["ratio"].item() == pytest.approx(1.5)
    assert metrics["approx_kl"].item() == pytest.approx(0.5 - math.log(1.5))
    logprob = torch.full((2, C, A), math.log(1.5))
    logprob[0] = 0.0
    _, metrics = policy_loss(
        logprob,
        torch.zeros(2, C, A),
        torch.ones(2, C),
        torch.ones(2, C, dtype=torch.bool),
        clip_low=0.2,
        clip_high=0.28,
    )
    assert metrics["clip_fraction"].item() == pytest.approx(0.5)
    assert metrics["ratio"].item() == pytest.approx(1.25)


@pytest.mark.parametrize("level", LEVELS)
def test_masked_entries_have_neither_value_nor_gradient(level):
    logprob, old, advantage, mask = minibatch(level)
    spoiled = logprob.clone()
    spoiled[~mask.expand(N, C)] = 1e4  # a ratio that overflows
    losses = []
    for values in (logprob, spoiled):
        leaf = values.clone().requires_grad_()
        loss, _ = policy_loss(leaf, old, advantage, mask, level=level, clip_low=0.2, clip_high=0.28)
        loss.backward()
        assert leaf.grad is not None
        assert leaf.grad[~mask.expand(N, C)].abs().max() == 0
        losses.append(loss.detach())
    assert losses[0] == losses[1]


@pytest.mark.parametrize("level", LEVELS)
def test_a_batch_masked_whole_has_zero_loss_and_gradient(level):
    logprob, old, advantage, mask = minibatch(level)
    leaf = logprob.clone().requires_grad_()
    loss, _ = policy_loss(
        leaf, old, advantage, torch.zeros_like(mask), level=level, clip_low=0.2, clip_high=0.28
    )
    loss.backward()
    assert loss == 0
    assert leaf.grad is not None
    assert leaf.grad.abs().max() == 0


@pytest.mark.parametrize("normalized", [False, True], ids=["masked", "lengthnorm"])
@pytest.mark.parametrize("level", LEVELS)
def test_a_split_into_micro_batches_changes_nothing(level, normalized):
    logprob, old, advantage, mask = minibatch(level)
    length = torch.arange(1, N + 1)[:, None]

    def run(parts, denominator):
        leaf, total, sums = logprob.clone().requires_grad_(), 0.0, {}
        for rows in parts:
            loss, metrics = policy_loss(
                leaf[rows],
                old[rows],
                advantage[rows],
                mask[rows],
                level=level,
                clip_low=0.2,
                clip_high=0.28,
                dual_clip=1.5,
                episode_length=length[rows] if normalized else None,
                horizon=24 if normalized else None,
                denominator=denominator,
            )
            loss.backward()
            total += loss.detach()
            sums = {name: sums.get(name, 0.0) + value for name, value in metrics.items()}
        return total, leaf.grad, sums

    elements = N * {"token": C * A, "action": C, "chunk": 1}[level]
    denominator = float(elements if normalized else mask.sum())
    uneven = torch.arange(N).split([1, 2, 4, 5])
    whole = run([torch.arange(N)], None)
    torch.testing.assert_close(run(uneven, denominator), whole)


@pytest.mark.parametrize("level", ["token", "action"])
def test_one_advantage_a_chunk_is_shared_by_its_actions(level):
    logprob, old, advantage, mask = minibatch(level)
    shared = advantage[:, :1]
    one, _ = policy_loss(logprob, old, shared, mask, level=level, clip_low=0.2, clip_high=0.28)
    many, _ = policy_loss(logprob, old, shared.expand(N, C), mask, level=level, clip_low=0.2, clip_high=0.28)
    assert one == many


def test_shapes_that_do_not_fit_the_level_are_refused():
    logprob, old, advantage, mask = minibatch("token")
    with pytest.raises(ValueError, match="mask"):
        policy_loss(logprob, old, advantage, mask, level="chunk", clip_low=0.2, clip_high=0.28)
    with pytest.raises(ValueError, match="advantage"):
        policy_loss(logprob, old, advantage, mask[:, :1], level="chunk", clip_low=0.2, clip_high=0.28)
    with pytest.raises(ValueError, match="mask"):
        policy_loss(logprob, old, advantage, mask[:, :1], level="token", clip_low=0.2, clip_high=0.28)


@pytest.mark.parametrize(
    ("error", "delta", "loss"),
    [(0.3, 0.5, 0.045), (2.0, 0.5, 0.5 * (2.0 - 0.25)), (2.0, 10.0, 2.0), (20.0, 10.0, 10 * (20 - 5))],
)
def test_huber_on_both_sides_of_delta(error, delta, loss):
    value = torch.tensor([[error]])
    actual, _ = value_loss(
        value, value, torch.zeros(1, 1), torch.tensor([[True]]), clip=100.0, huber_delta=delta
    )
    assert actual.item() == pytest.approx(loss)


def test_value_loss_takes_the_larger_error_and_stops_a_value_that_ran_too_far():
    value = torch.tensor([[1.0]], requires_grad=True)
    one = torch.tensor([[True]])
    # The old value is 0 and the target 1: clipped to 0.2 the prediction is still 0.8 short.
    loss, metrics = value_loss(value, torch.zeros(1, 1), torch.ones(1, 1), one, clip=0.2, huber_delta=10.0)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * 0.8**2)
    assert value.grad is not None
    assert value.grad.item() == 0.0
    assert metrics["value_clip_fraction"] == 1.0


def test_value_loss_splits_and_masks():
    generator = torch.Generator().manual_seed(0)
    value, old, returns = (torch.randn(N, C, generator=generator) for _ in range(3))
    mask = torch.rand(N, C, generator=generator) < 0.5
    mask[2] = False

    def run(parts, denominator):
        leaf, total = value.clone().requires_grad_(), 0.0
        for rows in parts:
            loss, _ = value_loss(
                leaf[rows],
                old[rows],
                returns[rows],
                mask[rows],
                clip=0.2,
                huber_delta=0.7,
                denominator=denominator,
            )
            loss.backward()
            total += loss.detach()
        return total, leaf.grad

    whole = run([torch.arange(N)], None)
    torch.testing.assert_close(run(torch.arange(N).split([3, 9]), float(mask.sum())), whole)
    assert whole[1][~mask].abs().max() == 0


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("level", LEVELS)
def test_token_mean_keeps_the_unit_of_a_token(level, normalized):
    """Executed whole, one episode of N chunks with entropy 1.5 everywhere has a mean entropy of 1.5."""
    mask = torch.ones(N, 1 if level == "chunk" else C, dtype=torch.bool)
    mean = token_mean(
        torch.full((N, C, A), 1.5),
        mask,
        level=level,
        episode_length=torch.full((N, 1), N * C) if normalized else None,
        horizon=N * C if normalized else None,
    )
    assert mean.item() == pytest.approx(1.5)


def test_kl_estimate_is_unbiased_and_never_negative():
    policy, reference = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.2, 0.2, 0.6]).log()
    k3 = kl_estimate(policy, reference)
    assert (k3 >= 0).all()
    expected = (policy.exp() * (policy - reference)).sum()
    torch.testing.assert_close((policy.exp() * k3).sum(), expected)
    assert kl_estimate(policy, policy).abs().max() == 0


def test_what_older_weights_sampled_counts_as_the_proximal_policy_would_have_sampled_it():
    """A choice of three, as often as the older policy makes it: means are then expectations."""
    behavior = torch.tensor([0.5, 0.25, 0.25])
    proximal, new = torch.tensor([0.4, 0.25, 0.35]), torch.tensor([0.36, 0.28, 0.36])
    gain = torch.tensor([1.0, -2.0, 0.5])
    drawn = torch.tensor([0, 0, 1, 2])
    loss, metrics = policy_loss(
        new.log()[drawn].view(4, 1, 1),
        behavior.log()[drawn].view(4, 1, 1),
        gain[drawn].view(4, 1),
        torch.ones(4, 1, dtype=torch.bool),
        clip_low=0.2,
        clip_high=0.2,
        proximal=proximal.log()[drawn].view(4, 1, 1),
        max_behavior_weight=2.0,
    )
    torch.testing.assert_close(loss, -(new * gain).sum())
    torch.testing.assert_close(metrics["ratio"], torch.tensor(1.0))
    torch.testing.assert_close(metrics["approx_kl"], (proximal * (proximal / new).log()).sum())
    torch.testing.assert_close(metrics["behavior_weight"], torch.tensor(1.0))


def test_the_weight_of_an_older_sample_is_capped():
    half = torch.full((1, 1, 1), 0.5).log()
    rare, mask = torch.full((1, 1, 1), 0.05).log(), torch.ones(1, 1, dtype=torch.bool)
    loss, _ = policy_loss(
        half,
        rare,
        torch.ones(1, 1),
        mask,
        clip_low=0.2,
        clip_high=0.2,
        proximal=half,
        max_behavior_weight=2.0,
    )
    assert loss == -2.0
