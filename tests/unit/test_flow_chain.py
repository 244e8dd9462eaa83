"""The chain of flow policies where the velocity is known in closed form, and its bookkeeping."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rove.policies.flow import chain
from rove.policies.flow.chain import Step

MEAN, SPREAD = 0.7, 0.4


def velocity(x: Tensor, t: Tensor) -> Tensor:
    """The field E[noise − data | x_t = x] for data N(0.7, 0.4²) at x_t = t·noise + (1 − t)·data."""
    t = t.to(x.dtype).reshape(-1, 1, 1)
    variance = t**2 + (1 - t) ** 2 * SPREAD**2
    away = (x - (1 - t) * MEAN) / variance
    return t * away - (MEAN + (1 - t) * SPREAD**2 * away)


@pytest.mark.parametrize("kind", ["ode", "sde"])
def test_gaussian_data_ends_at_their_mean_and_spread(kind: str) -> None:
    generator, steps = torch.Generator().manual_seed(0), 400
    x = torch.randn(200, 20, 10, generator=generator)
    for k in range(steps):
        v = velocity(x, torch.full((200,), 1 - k / steps))
        if kind == "ode":
            x = chain.ode(x, v, steps)
        else:
            mean, std = chain.sde(x, v, k, steps, 0.5)
            x = mean + std * torch.randn(x.shape, generator=generator)
    # 40,000 numbers: the mean is known to 0.002, the spread to 0.0015.
    assert abs(float(x.mean()) - MEAN) < 0.01
    assert abs(float(x.std()) - SPREAD) < 0.01


def test_few_steps_are_off_as_published() -> None:
    x = torch.randn(200, 20, 10, generator=torch.Generator().manual_seed(0))
    end = chain.integrate(velocity, x, 10)[:, -1]
    assert float(end.std()) == pytest.approx(0.34, abs=0.01)


def test_no_number_is_lost_in_a_sample() -> None:
    points = torch.randn(2, 3, 4, 5, 6)
    k = torch.randint(0, 1000, (2, 3))
    packed = chain.pack(points, k)
    assert packed.shape == (2, 3, 4 * 5 * 6 + 1)
    back, number = chain.unpack(packed, 5, 6)
    assert torch.equal(back, points) and torch.equal(number, k)


def test_density_and_entropy_are_those_of_a_normal_distribution() -> None:
    normal = torch.distributions.Normal(torch.tensor([0.3, -1.0]), torch.tensor([0.2, 1.5]))
    at = torch.tensor([0.1, 2.0])
    torch.testing.assert_close(chain.logprob(at, normal.mean, normal.stddev), normal.log_prob(at))
    torch.testing.assert_close(chain.entropy(normal.stddev), normal.entropy())


def test_the_first_step_has_the_second_times_denominator() -> None:
    _, std = chain.sde(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), 0, 4, 0.5)
    assert float(std) == pytest.approx(0.5 * math.sqrt(4) * math.sqrt(1 / 4))


def test_one_step_alone_is_drawn() -> None:
    """Elsewhere the chain is Euler's."""
    x, noise = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    k = torch.tensor([0, 2, 3])

    def transition(x: Tensor, i: int) -> Step:
        v = velocity(x, torch.full((3,), 1 - i / 4))
        return Step(chain.ode(x, v, 4), *chain.sde(x, v, i, 4, 0.5))

    points, end, step = chain.draw_one(transition, x, k, noise, 4)
    for row in range(3):
        at = x
        for i in range(4):
            one = transition(at, i)
            if i == k[row]:
                assert torch.equal(points[row, 0], at[row])
                assert torch.equal(step.mean[row], one.mean[row])
                drawn = one.mean + one.std * noise
                assert torch.equal(points[row, 1], drawn[row])
                at = drawn
            else:
                at = one.plain
        assert torch.equal(end[row], at[row])
