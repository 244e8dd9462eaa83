"""The Policy contract: images and text in, chunks of action tokens out.

`act` and `evaluate` are the same function of the same inputs: on one set of weights they agree on
log-probabilities to float tolerance, whatever the batch around a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rove.findings import Finding
from rove.types import ActionChunk, ActionSpec, Conventions, Mode, Observation, PolicyOutput


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele et al. 2014) on int64 with wrap-around."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@dataclass(frozen=True, slots=True)
class SamplingNoise:
    """Counter-based noise keyed by (seed, episode, chunk): never by arrival order, batch or device."""

    seed: int
    episode: Tensor
    """int64 [B], `EpisodeSpec.seed` of each row."""
    chunk: Tensor
    """int64 [B], index of the chunk in its episode."""

    def uniform(self, count: int) -> Tensor:
        """float64 [B, count] in (0, 1), on the host; entry j of a row does not depend on `count`."""
        golden = -7046029254386353131  # 0x9E3779B97F4A7C15
        seed = _mix(torch.tensor(self.seed, dtype=torch.int64) + golden)
        row = _mix(_mix(seed ^ self.episode.to(torch.int64)) ^ (self.chunk.to(torch.int64) + 1))
        index = torch.arange(1, count + 1, dtype=torch.int64)
        bits = _mix(row[:, None] + index[None, :] * golden)
        mantissa = (bits >> 11) & ((1 << 53) - 1)
        return (mantissa.double() + 0.5) / (1 << 53)


@dataclass(frozen=True, slots=True)
class Work:
    """What a policy costs a device: floating-point operations of a row, and bytes."""

    forward: float
    """FLOPs of one row in a forward pass, as in acting."""
    training: float
    """FLOPs of one row forward and backward."""
    weights: float
    """Bytes that each pass over the weights reads."""
    passes: int
    """Passes over the weights that an act takes, one after the other."""
    published: float
    """Bytes of what training changes."""


def through(block: nn.Module, *args: Any) -> Tensor:
    """`block(*args)`. Where the learner has set `block.recompute`, activations inside are dropped and
    computed again in the backward pass. Nothing inside may draw numbers, as dropout does: `act` and
    `evaluate` would not agree either.

    A policy that calls its repeated blocks through here can be trained with
    `training.gradient_checkpointing`.
    """
    if getattr(block, "recompute", False) and torch.is_grad_enabled():
        # The generators' states need not be kept; on a GPU that waits for it.
        return checkpoint(  # pyright: ignore[reportReturnType]
            block, *args, use_reentrant=False, preserve_rng_state=False
        )
    return block(*args)


@runtime_checkable
class Actor(Protocol):
    """What acts: all of a policy that an evaluation needs."""

    chunk: int
    """C."""
    action_spec: ActionSpec
    """The convention of `ActionChunk.actions`."""

    def act(
        self,
        observation: Observation,
        mode: Mode,
        noise: SamplingNoise | None = None,
        samples: int | None = None,
    ) -> ActionChunk:
        """Choose a chunk of actions for each row; "sample" needs `noise`, "greedy" ignores it.

        With `samples` = G that many for each row, [B, G, C, A]; the first is the one drawn without.
        """
        ...


@runtime_checkable
class Policy(Actor, Protocol):
    """A torch module that also answers these."""

    value_head: nn.Module | None
    """The critic; None without one."""

    def evaluate(
        self,
        observation: Observation,
        tokens: Tensor,
        temperature: float | None = None,
        smoothing: float = 0.0,
    ) -> PolicyOutput:
        """Log-probability, entropy and value of given tokens, differentiable.

        Tokens are int64 [B, C, A], or [B, G, C, A] with G chunks for each row. At the policy's own sampling
        temperature, as `act` reports them, unless another is given. With `smoothing`, a number of bins, the
        log-probability is a Gaussian-weighted mean over the bins around each token, for imitation.
        """
        ...

    def tokenize(self, actions: Tensor) -> Tensor:
        """int64 [B, C, A] token ids of actions [B, C, A] in the units of `action_spec`."""
        ...

    def value(self, observation: Observation) -> Tensor:
        """Values alone, float32 [B, C] or [B, 1]; raises ValueError without a critic."""
        ...

    def save_pretrained(self, directory: Path) -> None:
        """Write a self-contained checkpoint directory that the registry can load."""
        ...


@runtime_checkable
class Preflighted(Protocol):
    """Optional: a policy that can check whether it fits a suite."""

    def preflight(self, conventions: Conventions, *, rl: bool) -> list[Finding]:
        """One finding a check: "pass", "warn" or "fail"; `rl`: the policy is to be trained by RL."""
        ...


def examine(policy: Actor, wanted: Conventions, *, rl: bool) -> list[Finding]:
    """What `policy` finds of a suite, one finding a check; nothing where it cannot check itself."""
    return policy.preflight(wanted, rl=rl) if isinstance(policy, Preflighted) else []


@runtime_checkable
class Regressor(Protocol):
    """Optional: a policy that can give actions outright, without a distribution, as OpenVLA-OFT's L1 head."""

    @property
    def regresses(self) -> bool:
        """Whether this one does; then it can act greedily and be imitated, but not trained by RL."""
        ...

    def regress(self, observation: Observation) -> Tensor:
        """Normalised actions, float32 [B, C, A], differentiable."""
        ...

    def normalize(self, actions: Tensor) -> Tensor:
        """float32 [..., A] of actions in the units of `action_spec`, as `regress` gives them."""
        ...


@runtime_checkable
class Locator(Protocol):
    """Optional: a policy that points at what an instruction is about before it acts."""

    def point(self, observation: Observation) -> Tensor:
        """`PolicyOutput.pointing` alone, differentiable; raises RoveError where the policy does not point."""
        ...
