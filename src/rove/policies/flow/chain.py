"""The denoising chain of a flow-matching policy, as pure functions: its grid, its steps, their densities.

A chain has K steps from t = 1, where x is noise, to t = 0, where x is a normalised chunk of actions. Its
points are `x_0, …, x_K`, at t_k = 1 − k/K. `x` and the velocity `v` are [B, H, D] here: B rows, H predicted
actions, D padded action dimensions. A stochastic step is a Gaussian whose mean and standard deviation follow
from `x` and `v`, so a chain of such steps has a density, which is what reinforcement learning needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
"""A velocity field: points [B, H, D] and their times [B] to velocities [B, H, D]."""


class Step(NamedTuple):
    """What may follow a point of a chain."""

    plain: Tensor
    """The next point of Euler's method, [B, H, D]."""
    mean: Tensor
    """Mean of the next point where the step is stochastic, [B, H, D]."""
    std: Tensor
    """Its standard deviation, to be broadcast over the mean."""


Transition = Callable[[Tensor, int], Step]
"""The step k from points [B, H, D]."""

_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


def times(steps: int) -> Tensor:
    """Return the grid t_k = 1 − k/K of K = `steps` steps, float32 [K + 1], from 1 to 0."""
    return (1 - torch.arange(steps + 1, dtype=torch.float64) / steps).float()


def time_of(k: Tensor | int, steps: int, like: Tensor) -> Tensor:
    """Return t_k in the dtype and on the device of `like` [B, …], shaped to be broadcast over it.

    `k` is one number for all rows, or int64 [B].
    """
    if not isinstance(k, Tensor):
        return torch.full((), 1 - k / steps, dtype=like.dtype, device=like.device)
    t = (1 - k.double() / steps).to(like.dtype)
    return t.reshape(k.shape + (1,) * (like.ndim - k.ndim))


def ode(x: Tensor, v: Tensor, steps: int) -> Tensor:
    """Return the next point of Euler's method, x − v/K."""
    return x - v / steps


def sde(x: Tensor, v: Tensor, k: Tensor | int, steps: int, level: float) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of step `k` by Flow-SDE (Flow-GRPO, Liu et al. 2025, section 4.2).

    It keeps the marginal distributions of the chain. `level` is the noise level a, in σ_k = a·√(t/(1 − t));
    in the first step, where t = 1, the second time of the grid stands in the denominator. `k` is an int or
    int64 [B]; the deviation is shaped to be broadcast over the mean.
    """
    t, delta = time_of(k, steps, x), 1 / steps
    sigma = level * (t / (1 - t).clamp_min(delta)).sqrt()
    drift = v + sigma**2 / (2 * t) * (x + (1 - t) * v)
    return x - delta * drift, sigma * math.sqrt(delta)


def cps(x: Tensor, v: Tensor, k: Tensor | int, steps: int, level: float) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of step `k` by Flow-CPS, coefficient-preserving sampling (Wang & Yu
    2025).

    The deviation of the last step is zero: it has no density, and is never the one that is drawn.
    """
    t = time_of(k, steps, x)
    # The last time is zero exactly; 1/K − 1/K by float32 need not be.
    u = time_of(k + 1, steps, x)
    clean, noise = x - t * v, x + (1 - t) * v
    angle = math.pi * level / 2
    return clean * (1 - u) + noise * u * math.cos(angle), u * math.sin(angle)


def logprob(next: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return the log-density of each number of `next` under a normal distribution, in nats; any shape."""
    return -0.5 * ((next - mean) / std) ** 2 - std.log() - _HALF_LOG_TWO_PI


def entropy(std: Tensor) -> Tensor:
    """Return the entropy of a normal distribution, ½·ln(2πe·std²), in nats; any shape."""
    return std.log() + 0.5 + _HALF_LOG_TWO_PI


def integrate(velocity: Velocity, x: Tensor, steps: int) -> Tensor:
    """Return all points of Euler's method from `x` [B, H, D], [B, K + 1, H, D]."""
    points = [x]
    for k in range(steps):
        points.append(ode(points[-1], velocity(points[-1], _row_times(x, k, steps)), steps))
    return torch.stack(points, dim=1)


def draw_one(
    transition: Transition, x: Tensor, k: Tensor, noise: Tensor, steps: int
) -> tuple[Tensor, Tensor, Step]:
    """Draw a chain from `x` [B, H, D] whose step `k` (int64 [B]) alone is stochastic, with `noise` [B, H, D].

    Returns the points before and after that step, [B, 2, H, D], the last point, [B, H, D], and the step. No
    number is read on the host.
    """
    kept: tuple[Tensor, ...] = ()
    for i in range(steps):
        step = transition(x, i)
        drawn = step.mean + step.std * noise
        now = (x, drawn, *step)
        here = (k == i).reshape(-1, *(1,) * (x.ndim - 1))
        kept = tuple(torch.where(here, a, b) for a, b in zip(now, kept, strict=True)) if kept else now
        x = torch.where(here, drawn, step.plain)
    return torch.stack(kept[:2], dim=1), x, Step(*kept[2:])


def draw_all(transition: Transition, x: Tensor, noise: Tensor, steps: int) -> tuple[Tensor, Step]:
    """Draw a chain from `x` [B, H, D] whose steps are all stochastic, with `noise` [B, K, H, D].

    Returns all points, [B, K + 1, H, D], and all steps, [B, K, H, D] each.
    """
    points, taken = [x], []
    for i in range(steps):
        step = transition(points[-1], i)
        points.append(step.mean + step.std * noise[:, i])
        taken.append(Step(*(part.expand_as(x) for part in step)))
    return torch.stack(points, dim=1), Step(*(torch.stack(part, dim=1) for part in zip(*taken, strict=True)))


def _row_times(x: Tensor, k: int, steps: int) -> Tensor:
    return torch.full((len(x),), 1 - k / steps, dtype=torch.float64, device=x.device)


def pack(points: Tensor, k: Tensor) -> Tensor:
    """Return points [..., S, H, D] and the number of a step, int64 [...], as one sample, [..., S·H·D + 1].

    float32 holds the number exactly.
    """
    return torch.cat((points.flatten(-3), k[..., None].to(points.dtype)), dim=-1)


def unpack(sample: Tensor, horizon: int, dim: int) -> tuple[Tensor, Tensor]:
    """Return points [..., S, H, D] and the number of a step, int64 [...]: the inverse of `pack`."""
    return sample[..., :-1].unflatten(-1, (-1, horizon, dim)), sample[..., -1].long()
