"""The registry of algorithms by kind, and the three functions that the training loop and the learner call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from rove.algorithms import grpo, ppo, vine
from rove.config import load
from rove.types import PolicyOutput, TrainBatch, Trajectory


class Algorithm(Protocol):
    """A module or object with the three functions of an algorithm; `config` is its own section of the run."""

    def wants_more(self, rounds: Sequence[Trajectory], config: Any, num_envs: int) -> bool:
        """Return whether this iteration needs another rollout; called before each one, the first included."""
        ...

    def prepare(self, rounds: Sequence[Trajectory], config: Any) -> tuple[TrainBatch, dict[str, float]]:
        """Turn rollouts into a batch to train on, possibly empty, and metrics under their full names."""
        ...

    def loss(
        self,
        output: PolicyOutput,
        batch: TrainBatch,
        config: Any,
        *,
        denominator: float,
        value_denominator: float,
        reference: Tensor | None,
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Compute the loss of a micro-batch and its detached metrics; both sum to those of the batch.

        The denominators are the whole batch's: `denominator` that of the policy's terms (see
        `TrainBatch.denominator`), `value_denominator` that of the value loss. reference: float [N, C, A],
        log-probs of the frozen reference policy, or None.
        """
        ...


_ALGORITHMS: dict[str, Algorithm] = {"ppo": ppo, "grpo": grpo, "vine": vine}


def register(settings: type, algorithm: Algorithm) -> None:
    """Make an algorithm known by the `kind` of its settings, to recipes and on the command line.

    `settings` is a frozen dataclass with `kind: Literal["name"] = "name"`; it declares the properties that
    the rest of Rove has to know by attributes of the names in `rove.config.needs.Needs`. Raises ValueError
    where the kind is taken, RoveError where `settings` is no such dataclass.
    """
    kind = load.kind_of(settings)
    if kind in _ALGORITHMS:
        raise ValueError(f"algorithm {kind!r} is registered already: choose another name")
    load.register("algorithm", settings)
    _ALGORITHMS[kind] = algorithm


def get(kind: str) -> Algorithm:
    """Return the algorithm registered as `kind`. Raises ValueError, naming the choices, if there is none."""
    if kind not in _ALGORITHMS:
        raise ValueError(f"no algorithm {kind!r}: choose one of {', '.join(sorted(_ALGORITHMS))}")
    return _ALGORITHMS[kind]
