"""Splitting a batch among the learner's ranks, each of which is given only the rows that it trains on.

The rows of an optimizer step and the denominators of its losses are properties of the whole batch and are
decided here: results do not depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rove.config.needs import needs
from rove.config.schema import Run
from rove.types import TrainBatch


@dataclass(frozen=True, slots=True, eq=False)
class OptimizerStep:
    """One optimizer step, as one rank takes it. All ranks have equally many rows in it, so that they run the
    same passes and meet in every collective."""

    rows: Tensor
    """Indices into the rank's rows, int64 [M]."""
    real: Tensor
    """Mask of real rows, bool [M]; a row that is False only pads and counts nothing."""
    denominator: float
    """Denominator of the policy loss, over the whole batch."""
    value_denominator: float
    """Denominator of the value loss: the number of values that count."""

    def select(self, batch: TrainBatch) -> TrainBatch:
        """Return the rows of the step; those that are not real have an empty mask."""
        part = batch.select(self.rows)
        return replace(part, mask=part.mask & self.real.view(-1, *(1,) * (part.mask.ndim - 1)))


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """The part of a batch that one rank trains on."""

    batch: TrainBatch
    """The rank's rows, as many as each other rank has."""
    steps: tuple[OptimizerStep, ...]
    """The optimizer steps, in the order in which they are taken."""
    size: int
    """Number of rows of the whole batch."""


def schedule(rows: int, run: Run, iteration: int) -> list[Tensor]:
    """Return the rows of each optimizer step of an iteration, int64 [M]: every epoch goes through all `rows`,
    in an order of its own."""
    steps: list[Tensor] = []
    for epoch in range(needs(run.algorithm).epochs if rows else 0):
        order = np.random.default_rng((run.seed, iteration, epoch)).permutation(rows)
        steps += map(torch.from_numpy, np.array_split(order, -(-rows // run.training.batch)))
    return steps


def step_of_rank(batch: TrainBatch, rows: Tensor, rank: int = 0, world: int = 1) -> OptimizerStep:
    """Return the part of rank `rank` of `world` in an optimizer step over `rows` (int64 [M]) of `batch`."""
    mask = batch.mask[rows]
    at_value_level = mask if batch.value is None or batch.value.shape == batch.mask.shape else mask.any(-1)
    if batch.denominator is None:
        denominator = float(mask.sum())
    else:
        # Length-normalised: this step's share of the batch's denominator.
        denominator = batch.denominator * len(rows) / len(batch)
    own, real = _part(rows, rank, world)
    return OptimizerStep(
        rows=own,
        real=real,
        denominator=denominator,
        value_denominator=float(at_value_level.sum()),
    )


def _part(rows: Tensor, rank: int, world: int) -> tuple[Tensor, Tensor]:
    """Return the rows of a rank, int64 [M], and which of them are real; M is the same for all ranks."""
    each = -(-len(rows) // world)
    place = torch.arange(rank * each, (rank + 1) * each)
    return rows[place.clamp(max=len(rows) - 1)], place < len(rows)


def deal(batch: TrainBatch, steps: Sequence[Tensor], rank: int = 0, world: int = 1) -> Share:
    """Return the share of rank `rank` of `world` in training on `batch` in `steps`, each row once."""
    taken = [step_of_rank(batch, rows, rank, world) for rows in steps]
    if world == 1 or not steps:
        return Share(batch, tuple(taken), len(batch))
    owned = [_owned(steps, other, world) for other in range(world)]
    mine = owned[rank]
    filled = torch.cat((mine, mine[-1:].expand(max(map(len, owned)) - len(mine))))
    placed = (replace(step, rows=torch.searchsorted(mine, step.rows)) for step in taken)
    return Share(batch.select(filled), tuple(placed), len(batch))


def _owned(steps: Sequence[Tensor], rank: int, world: int) -> Tensor:
    """Return the rows that a rank has in any of the steps, ascending."""
    return torch.cat([_part(rows, rank, world)[0] for rows in steps]).unique()
