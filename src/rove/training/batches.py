"""Supervised training steps: the rows of each batch, and the loop over batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from rove.config.schema import SFTConfig
from rove.training.optim import Optimizer

Gradient = Callable[[Tensor], dict[str, Tensor]]
"""A function of a batch's rows, int64 [batch], that adds their gradient to the parameters and returns its
metrics, which may still be on a device."""
OnStep = Callable[[int, dict[str, float]], None]
"""A function that is called with the number and the metrics of each optimizer step."""


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

    Names of metrics, those of `gradient` and those measured here, begin with `name`.
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
    """Yield endless batches of row indices, int64 [size]; every pass is a fresh permutation of `count` rows,
    and a remainder opens the next pass."""
    left = np.empty(0, dtype=np.int64)
    lap = 0
    while True:
        while len(left) < size:
            left = np.concatenate([left, np.random.default_rng((seed, lap)).permutation(count)])
            lap += 1
        yield left[:size]
        left = left[size:]
