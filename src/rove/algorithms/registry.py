"""Algorithm kinds by name, and the three functions that the loop and the learner call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from rove.algorithms import grpo, ppo, vine
from rove.config import load
from rove.types import PolicyOutput, TrainBatch, Trajectory


class Algorithm(Protocol):
    """A module, or an object, with these functions; `config` is the algorithm's own section of the run."""

    def wants_more(self, rounds: Sequence[Trajectory], config: Any, num_envs: int) -> bool:
        """Whether this iteration needs another rollout; asked before each, the first included."""
        ...

    def prepare(self, rounds: Sequence[Trajectory], config: Any) -> tuple[TrainBatch, dict[str, float]]:
        """Rollouts → what to train on, possibly nothing, and metrics under their full names."""
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
        """Loss of a micro-batch and its metrics, detached; both sum to the batch's over its micro-batches.

        The denominators are the whole batch's: of the policy's terms (see `TrainBatch.denominator`), and of
        the value loss. reference: float [N, C, A], log-probs of the frozen reference policy; None without.
        """
        ...


_ALGORITHMS: dict[str, Algorithm] = {"ppo": ppo, "grpo": grpo, "vine": vine}


def register(settings: type, algorithm: Algorithm) -> None:
    """Make an algorithm known by the `kind` of its settings, to recipes and on the command line.

    `settings` is a frozen dataclass with `kind: Literal["name"] = "name"`; what the rest of Rove has to know
    of the algorithm it declares by attributes of the names in `rove.config.needs.Needs`. Raises ValueError
    where the kind is taken, RoveError where `settings` is no such dataclass.
    """
    kind = load.kind_of(settings)
    if kind in _ALGORITHMS:
        raise ValueError(f"algorithm {kind!r} is registered already: choose another name")
    load.register("algorithm", settings)
    _ALGORITHMS[kind] = algorithm


def get(kind: str) -> Algorithm:
    """The algorithm registered as `kind`. Raises ValueError, naming the choices, where there is none."""
    if kind not in _ALGORITHMS:
        raise ValueError(f"no algorithm {kind!r}: choose one of {', '.join(sorted(_ALGORITHMS))}")
    return _ALGORITHMS[kind]
