"""Facts about an algorithm that others have to know: rollouts, placement, memory, validation."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from rove.config.schema import Run


@dataclass(frozen=True, slots=True)
class Needs:
    """An algorithm's needs, each the attribute of the same name of its section of the run, where it has one.

    So a settings class of a user's own declares them by its fields and class variables, without inheriting
    from a built-in one.
    """

    critic: bool = False
    """The policy has to have a value head, whose values are stored with each chunk."""
    group_size: int | None = None
    """Episodes that share a task and an initial state and run from start to end within a rollout; None:
    episodes are refilled one by one as they end."""
    branches: int = 1
    """Chunks tried from each state, of which the first is carried on; more than 1 needs a `Brancher`."""
    bootstrap: Literal["truncated", "always"] | None = None
    """Ends of episodes after which the critic's value of the last observation is asked for; None: none."""
    refill: bool = True
    """Where there are no groups: a slot's next episode begins as soon as one ends, not with the next rollout
    only."""
    decoupled: bool = True
    """What an older policy has collected is trained on by the decoupled objective; see
    `losses.policy_loss`."""
    max_rounds: int = 1
    """Rollouts that an iteration may take, at most."""
    length_normalization: bool = False
    """Each row's loss is divided by the length of its episode."""
    kl_coef: float = 0.0
    """Weight of the divergence from the policy that the run started from; above 0 the learner keeps it."""
    epochs: int = 1
    """Passes over the batch that an iteration makes."""
    critic_warmup: int = 0
    """Iterations in which only the value head is trained."""


def needs(algorithm: Any) -> Needs:
    """The needs that the settings of an algorithm declare."""
    declared = {f.name: getattr(algorithm, f.name) for f in fields(Needs) if hasattr(algorithm, f.name)}
    return Needs(**declared)


def optimizer_steps(run: Run, rows: int) -> int:
    """The optimizer steps that an iteration takes on a batch of `rows` chunks."""
    return -(-rows // max(run.training.batch, 1)) * needs(run.algorithm).epochs
