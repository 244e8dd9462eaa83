"""Supervised steps: which rows each sees, and the loop that takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from rove.config.schema import SFTConfig
from rove.training.optim import Optimizer

Gradient = Callable[[Tensor], dict[str, Tensor]]
"""Given the rows of a batch, int64 [batch]: adds their gradient to the parameters, answers its metrics, which
may be on a device still."""
OnStep = Callable[[int, dict[str, float]], None]
"""Told the number of each optimizer step and its metrics."""


def gradient_descent(
    policy: nn.Module,
    rows: int,
    config: SFTConfig,
    seed: int,
    gradient: Gradient,
    *,
    name: str,
    steps: int,
    max_bad_steps: int,
    on_step: OnStep,
) -> None:
    """Train `policy` in place for `steps` optimizer steps on batches of `rows` examples.

    What is measured, by `gradient` and here, begins with `name`.
    """
    optimizer = Optimizer(policy, config.optim, steps, max_bad_steps)
    rows_of = batches(rows, config.batch, seed)
    policy.train()
    while optimizer.steps < steps:
        metrics = gradient(torch.from_numpy(next(rows_of)))
        lr = optimizer.lr
        numbers, _ = optimizer.step(metrics)
        on_step(optimizer.steps, {f"{name}/{key}": value for key, value in (numbers | {"lr": lr}).items()})
    policy.eval()


def batches(count: int, size: int, seed: int) -> Iterator[np.ndarray]:
    """Endless batches of row indices, int64 [size], every pass a fresh permutation of `count` rows; a
    remainder opens the next pass."""
    left = np.empty(0, dtype=np.int64)
    lap = 0
    while True:
        while len(left) < size:
            left = np.concatenate([left, np.random.default_rng((seed, lap)).permutation(count)])
            lap += 1
        yield left[:size]
        left = left[size:]
