"""Supervised training steps: the rows of each batch, and the loop over batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rove.config.schema import SFTConfig
from rove.training.augment import ColorJitter
from rove.training.optim import Optimizer
from rove.training.snapshots import Snapshots

Gradient = Callable[[Tensor, int], dict[str, Tensor]]
"""A function of a batch's rows, int64 [batch], and of the number of optimizer steps before, that adds their
gradient to the parameters and returns its metrics, which may still be on a device."""
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
    jitter: ColorJitter,
    snapshots: Snapshots | None = None,
    phase: str | None = None,
) -> None:
    """Train `policy` in place for `steps` optimizer steps on batches of `rows` examples.

    Names of metrics, those of `gradient` and those measured here, begin with `name`. `gradient` draws from
    `jitter`. With `snapshots` the training goes on where it was stopped, to the bit, as `phase` of a
    warm-up; None: `name`.
    """
    phase = phase or name
    kept = {key for key, parameter in policy.named_parameters() if parameter.requires_grad}
    if snapshots is not None:
        kept = snapshots.parameters = snapshots.parameters | kept
    optimizer = Optimizer(policy, config.optim, steps, max_bad_steps)
    rows_of = batches(rows, config.batch, seed)
    if snapshots is not None and (saved := snapshots.take(phase)) is not None:
        policy.load_state_dict(saved["policy"], strict=False)
        optimizer.load_state_dict(saved["optimizer"])
        jitter.load_state_dict(saved["jitter"])
        for _ in range(optimizer.steps):
            next(rows_of)

    def state() -> dict[str, Any]:
        return {
            "policy": {key: p.detach().cpu() for key, p in policy.named_parameters() if key in kept},
            "optimizer": optimizer.state_dict(),
            "jitter": jitter.state_dict(),
        }

    policy.train()
    while optimizer.steps < steps:
        metrics = gradient(torch.from_numpy(next(rows_of)), optimizer.steps)
        numbers, _ = optimizer.step(metrics)
        numbers["lr"] = optimizer.last_lr
        on_step(optimizer.steps, {f"{name}/{key}": value for key, value in numbers.items()})
        if snapshots is not None:
            snapshots.keep(phase, state)
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
