"""Memory that a run needs on one device, as every policy describes it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from rove.config.needs import needs
from rove.config.schema import Run

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory, in bytes, on one device that holds policy and learner."""

    parameters: int
    trained: int
    """Number of parameters that have a gradient."""
    weights: float
    """Bytes of the policy's weights; trained ones count twice where GRPO's KL term keeps a reference."""
    optimizer: float
    """Bytes of gradients and of Adam's two moments."""
    training: float
    """Bytes of the activations of one micro-batch."""
    rollout: float
    """Bytes of activations, keys and values of one step of all environments."""

    @classmethod
    def of(cls, policy: nn.Module, run: Run, *, training: float, rollout: float) -> Memory:
        """Count the weights of `policy`, which may be on the meta device, as `run` trains them.

        `training` and `rollout` are the bytes of activations of one micro-batch, and of one step of all
        environments.
        """
        everything = list(policy.parameters())
        trained = [p for p in everything if p.requires_grad]
        reference = _bytes(trained) if needs(run.algorithm).kl_coef else 0.0
        return cls(
            parameters=sum(p.numel() for p in everything),
            trained=sum(p.numel() for p in trained),
            weights=_bytes(everything) + reference,
            optimizer=3 * _bytes(trained),
            training=training,
            rollout=rollout,
        )

    @property
    def total(self) -> float:
        """Bytes in all; rollout and training take turns, so the larger of the two counts."""
        return self.weights + self.optimizer + max(self.training, self.rollout)

    def __str__(self) -> str:
        parts = {
            "weights": self.weights,
            "gradients and Adam": self.optimizer,
            "a micro-batch": self.training,
            "a rollout step": self.rollout,
        }
        listed = ", ".join(f"{name} {value / GIB:.1f}" for name, value in parts.items())
        return (
            f"{self.parameters / 1e6:,.0f} M parameters, {self.trained / 1e6:,.1f} M trained; memory per "
            f"device about {self.total / GIB:.1f} GiB ({listed})"
        )


def _bytes(parameters: Iterable[nn.Parameter]) -> float:
    return float(sum(p.numel() * p.element_size() for p in parameters))
