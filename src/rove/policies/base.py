"""The Policy contract: images and text in, chunks of action tokens out.

`act` and `evaluate` are the same function of the same inputs: on one set of weights they agree on
log-probabilities to float tolerance, whatever the batch around a row.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rove.config.schema import PolicyConfig, Run
from rove.errors import RoveError
from rove.findings import Finding
from rove.types import ActionChunk, ActionSpec, Conventions, Mode, Observation, PolicyOutput


def _mix(x: Tensor) -> Tensor:
    """Apply the finaliser of splitmix64 (Steele et al. 2014) to int64, with wrap-around."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@dataclass(frozen=True, slots=True)
class SamplingNoise:
    """Counter-based noise keyed by (seed, episode, chunk), independent of arrival order, batch and device."""

    seed: int
    episode: Tensor
    """`EpisodeSpec.seed` of each row, int64 [B]."""
    chunk: Tensor
    """Index of the chunk in its episode, int64 [B]."""

    def uniform(self, count: int) -> Tensor:
        """Draw float64 [B, count] in (0, 1), on the host; entry j of a row does not depend on `count`."""
        golden = -7046029254386353131  # 0x9E3779B97F4A7C15
        seed = _mix(torch.tensor(self.seed, dtype=torch.int64) + golden)
        row = _mix(_mix(seed ^ self.episode.to(torch.int64)) ^ (self.chunk.to(torch.int64) + 1))
        index = torch.arange(1, count + 1, dtype=torch.int64)
        bits = _mix(row[:, None] + index[None, :] * golden)
        mantissa = (bits >> 11) & ((1 << 53) - 1)
        return (mantissa.double() + 0.5) / (1 << 53)


@dataclass(frozen=True, slots=True)
class Work:
    """Costs of a policy on a device: floating-point operations of a row, and bytes."""

    forward: float
    """FLOPs of one row in a forward pass, as in acting."""
    training: float
    """FLOPs of one row forward and backward."""
    weights: float
    """Bytes that each pass over the weights reads."""
    passes: int
    """Number of passes over the weights that one act takes, one after the other."""
    published: float
    """Bytes of the weights that training changes, which each update publishes to the workers."""


def maybe_checkpoint(block: nn.Module, *args: Any) -> Tensor:
    """Call `block(*args)`, recomputing its activations in the backward pass where `block.recompute` is set.

    The learner sets it; activations inside are then dropped after the forward pass. Nothing inside may draw
    random numbers, as dropout does: `act` and `evaluate` would not agree either.

    A policy that calls its repeated blocks by this can be trained with `training.gradient_checkpointing`.
    """
    if getattr(block, "recompute", False) and torch.is_grad_enabled():
        # The generators' states need not be kept; on a GPU that waits for it.
        return checkpoint(  # pyright: ignore[reportReturnType]
            block, *args, use_reentrant=False, preserve_rng_state=False
        )
    return block(*args)


class ActingPolicy(Protocol):
    """The part of a policy that acts: an evaluation needs no more."""

    chunk: int
    """Number of actions in a chunk, C."""
    action_spec: ActionSpec
    """The action spec of `ActionChunk.actions`."""

    def act(
        self,
        observation: Observation,
        mode: Mode,
        noise: SamplingNoise | None = None,
        samples: int | None = None,
    ) -> ActionChunk:
        """Choose a chunk of actions for each row; see `Policy.act`."""
        ...


def _refuse_signature(cls: type, name: str, base: type) -> None:
    """Raise RoveError where a method of `cls` does not take the parameters of the one in `base`, by name.

    Parameters that are positional in `base` may have any name.
    """
    own = inspect.signature(getattr(cls, name)).parameters
    contract = inspect.signature(getattr(base, name))
    named = [n for n, p in contract.parameters.items() if p.kind is not p.POSITIONAL_ONLY]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in own.values())
    lacking = [] if takes_any else [name for name in named if name not in own]
    rest = list(own.values())[len(contract.parameters) - len(named) :]
    fixed = (p for p in rest if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
    surplus = [p.name for p in fixed if p.name not in contract.parameters and p.default is p.empty]
    problems = [f"lacks {', '.join(lacking)}, which Rove passes"] if lacking else []
    problems += [f"needs {', '.join(surplus)}, which Rove does not pass"] if surplus else []
    if problems:
        plain = [p.replace(annotation=p.empty) for p in contract.parameters.values()]
        expected = contract.replace(parameters=plain, return_annotation=contract.empty)
        raise RoveError(
            f"{cls.__name__}.{name} {' and '.join(problems)}: write it as def {name}{expected}, which "
            f"{base.__module__}.{base.__name__} describes."
        )


class Policy(nn.Module, ABC):
    """Base class of all policies that Rove trains; implement the abstract methods with these parameters.

    A class whose methods do not take the parameters that Rove passes is refused when it is defined, and one
    that lacks a method when the registry first looks it up. A subclass with a critic also overrides `value`.
    """

    chunk: int
    """Number of actions in a chunk, C."""
    action_spec: ActionSpec
    """The action spec of `ActionChunk.actions`."""
    value_head: nn.Module | None
    """The critic; None for a policy without one."""
    num_images: int | None = None
    """Number of pictures that it was trained to see at once; None where that is left open."""
    state_size: int = 0
    """P, the size of the robot's own state that it reads; 0: it reads none."""

    def __init__(self) -> None:
        super().__init__()
        self.value_head = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for base in cls.__mro__[1:]:
            if base.__module__ == __name__:
                for name in vars(base):
                    if not name.startswith("_") and callable(getattr(base, name)):
                        _refuse_signature(cls, name, base)

    @classmethod
    @abstractmethod
    def build(
        cls,
        config: PolicyConfig,
        *,
        chunk: int,
        action_spec: ActionSpec,
        image_size: int,
        vocabulary: Sequence[str],
        statistics: Mapping[str, Any] | None,
        seed: int,
        device: torch.device,
    ) -> Self:
        """Make a policy on `device`: new, or read from `config.checkpoint` and run as `config` says.

        The parameters are those of `policies.registry.build`.
        """

    @classmethod
    @abstractmethod
    def from_pretrained(cls, path: Path | str, /, *, device: torch.device | str = "cpu") -> Self:
        """Read a checkpoint directory as `save_pretrained` wrote it, on `device`.

        A subclass may take more settings, which then differ from those that were saved.
        """

    @abstractmethod
    def act(
        self,
        observation: Observation,
        mode: Mode,
        noise: SamplingNoise | None = None,
        samples: int | None = None,
    ) -> ActionChunk:
        """Choose a chunk of actions for each row; "sample" needs `noise`, "greedy" ignores it.

        With `samples` = G it chooses G chunks for each row, [B, G, C, A]; the first is the one drawn without
        `samples`.
        """

    @abstractmethod
    def evaluate(
        self,
        observation: Observation,
        tokens: Tensor,
        temperature: float | None = None,
        smoothing: float = 0.0,
    ) -> PolicyOutput:
        """Compute log-probability, entropy and value of given tokens, differentiable.

        Tokens are int64 [B, C, A], or [B, G, C, A] with G chunks for each row. Log-probabilities are at the
        policy's own sampling temperature, as `act` reports them, unless `temperature` is given. With
        `smoothing`, a number of bins, the log-probability is a Gaussian-weighted mean over the bins around
        each token, for imitation.
        """

    @abstractmethod
    def tokenize(self, actions: Tensor) -> Tensor:
        """Return the int64 [B, C, A] token ids of actions [B, C, A] in the units of `action_spec`."""

    @abstractmethod
    def save_pretrained(self, directory: Path) -> None:
        """Write a self-contained checkpoint directory that the registry can load."""

    def value(self, observation: Observation) -> Tensor:
        """Return values alone, float32 [B, C] or [B, 1]; raises RoveError without a critic."""
        raise RoveError(f"{type(self).__name__} has no critic: train it by GRPO or vine sampling.")

    def preflight(self, conventions: Conventions, *, rl: bool) -> list[Finding]:
        """Check whether this policy fits a suite; each check gives one finding, "pass", "warn" or "fail".

        `rl` says that the policy is to be trained by RL. The default checks nothing.
        """
        return []

    @classmethod
    def check(cls, run: Run) -> None:
        """Raise RoveError where a policy of this class cannot do what `run` asks of it.

        It is called before anything is built or collected. A subclass that can do less extends it.
        """
        if run.sft is not None and run.sft.grounding and not issubclass(cls, Locator):
            raise RoveError(
                f"{cls.__name__} cannot be taught to point: set --sft.grounding 0 --sft.grounding_steps 0, "
                "or derive it from rove.policies.base.Locator."
            )
        if run.policy.value_head is not None and cls.value is Policy.value:
            raise RoveError(
                f"{cls.__name__} has no critic: set --policy.value_head none and train it by GRPO or vine "
                "sampling, or give it one (value_head and value)."
            )

    @staticmethod
    def unknown_word(vocabulary: Sequence[str], instructions: Sequence[str]) -> str | None:
        """Return the first word of `instructions` that a new policy, built with `vocabulary`, cannot read.

        None where it reads all of them, or reads any text; so the default.
        """
        return None

    @staticmethod
    def memory(run: Run) -> str | None:
        """Describe what a run needs on the device that holds its policy; None where that is not known."""
        return None

    @staticmethod
    def work(run: Run) -> Work:
        """Count what acting and training cost a device. Raises RoveError where that is not known."""
        raise RoveError(
            f"The policy {run.policy.kind!r} does not say what it costs (a static method work(run) -> Work): "
            "measure it on such a machine, rove plan RECIPE --save FILE, and plan with --profile FILE."
        )


class Regressor(Policy):
    """A policy that can give actions outright, without a distribution, as OpenVLA-OFT's L1 head does."""

    @property
    @abstractmethod
    def regresses(self) -> bool:
        """True where this policy regresses: it can act greedily and be imitated, but not be trained by RL."""

    @abstractmethod
    def regress(self, observation: Observation) -> Tensor:
        """Predict normalised actions, float32 [B, C, A], differentiable."""

    @abstractmethod
    def normalize(self, actions: Tensor) -> Tensor:
        """Normalise actions in the units of `action_spec` to the units of `regress`, float32 [..., A]."""


class Locator(Policy):
    """A policy that points at an instruction's objects before it acts, so that images can ground it."""

    @abstractmethod
    def point(self, observation: Observation) -> Tensor:
        """Compute `PolicyOutput.pointing` alone, differentiable; RoveError if the policy does not point."""
