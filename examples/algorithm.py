"""An algorithm of your own, in one file: REINFORCE with the group's mean reward as baseline, no clipping.

    rove train examples/algorithm.py:tabletop_reinforce

An algorithm is three functions, `wants_more`, `prepare` and `loss` (see `rove.algorithms.registry`). What it
shares with a built-in one it takes from there: this one differs from GRPO in its loss alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Literal

from torch import Tensor

from rove import algorithms
from rove.algorithms import grpo, losses
from rove.config.schema import Run
from rove.recipes import recipe
from rove.recipes.tabletop import tabletop_grpo
from rove.types import PolicyOutput, TrainBatch


@dataclass(frozen=True, slots=True)
class Reinforce:
    """The settings, from which Rove also reads what the algorithm needs: see `rove.config.needs`."""

    kind: Literal["reinforce"] = "reinforce"
    group_size: int = 8
    ratio_level: Literal["token", "action", "chunk"] = "token"
    keep_low: float = 0.0
    keep_high: float = 1.0
    max_rounds: int = 1
    length_normalization: bool = True


def loss(
    output: PolicyOutput,
    batch: TrainBatch,
    config: Reinforce,
    *,
    denominator: float,
    value_denominator: float,
    reference: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """-log π(a|s) · A, averaged over what counts (Williams 1992); on-policy, so one epoch."""
    policy = losses.token_mean(
        -output.logprob * batch.advantage[..., None],
        batch.mask,
        level=config.ratio_level,
        episode_length=batch.episode_length,
        horizon=batch.horizon,
        denominator=denominator,
    )
    return policy, {"policy_loss": policy.detach()}


algorithms.register(Reinforce, SimpleNamespace(wants_more=grpo.wants_more, prepare=grpo.prepare, loss=loss))


@recipe
def tabletop_reinforce() -> Run:
    """REINFORCE with a group baseline on the eight demo tasks."""
    return replace(tabletop_grpo(), name="tabletop_reinforce", algorithm=Reinforce())
