"""The Policy contract: images and text in, chunks of actions out.

What a policy drew to come to its actions is its `sample`: action tokens (`TokenPolicy`), the points of a
flow's stochastic step, or whatever else it declares. Nobody else reads it: it is kept, and given back to
`evaluate`. `act` and `evaluate` are the same function of the same inputs: on one set of weights they agree on
log-probabilities to float tolerance, whatever the batch around a row.

Shape letters: `B` rows, `C` actions that are executed of a chunk, `H` ≥ C actions that are predicted, `A`
action dimensions, `G` samples of a row.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rove import transfer
from rove.config.schema import PolicyConfig, Run, SFTConfig
from rove.errors import RoveError
from rove.findings import Finding
from rove.types import ActionChunk, ActionSpec, Conventions, Mode, Observation, PolicyOutput

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15, splitmix64's increment


def _mix(x: Tensor) -> Tensor:
    """Apply the finaliser of splitmix64 (Steele et al. 2014) to int64, with wrap-around."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@dataclass(frozen=True, slots=True)
class SamplingNoise:
    """Counter-based noise keyed by (seed, episode, chunk), independent of arrival order, batch and device.

    Uniform numbers are those of splitmix64 (Steele et al. 2014); normal ones come from others of them by the
    inverse of the normal distribution function, in float64, so that they are the same everywhere.
    """

    seed: int
    episode: Tensor
    """`EpisodeSpec.seed` of each row, int64 [B]."""
    chunk: Tensor
    """Index of the chunk in its episode, int64 [B]."""

    def uniform(self, count: int) -> Tensor:
        """Draw float64 [B, count] in (0, 1), on the host; entry j of a row does not depend on `count`."""
        return _uniform(self._row(), count)

    def normal(self, count: int) -> Tensor:
        """Draw float64 [B, count] from the standard normal distribution, on the host, independent of what
        `uniform` draws; entry j of a row does not depend on `count`."""
        return torch.special.ndtri(_uniform(_mix(self._row() ^ _GOLDEN), count))

    def _row(self) -> Tensor:
        """Return the counter that each row's numbers begin from, int64 [B]."""
        seed = _mix(torch.tensor(self.seed, dtype=torch.int64) + _GOLDEN)
        return _mix(_mix(seed ^ self.episode.to(torch.int64)) ^ (self.chunk.to(torch.int64) + 1))


def _uniform(row: Tensor, count: int) -> Tensor:
    """Draw float64 [B, count] in (0, 1) by counting on from `row`, int64 [B]."""
    index = torch.arange(1, count + 1, dtype=torch.int64)
    bits = _mix(row[:, None] + index[None, :] * _GOLDEN)
    mantissa = (bits >> 11) & ((1 << 53) - 1)
    return (mantissa.double() + 0.5) / (1 << 53)


@dataclass(frozen=True, slots=True, eq=False)
class Imitation:
    """Answer of `Policy.imitation_loss`; each is a sum over the numbers of the actions that count, mask × A,
    so that the sums of micro-batches, divided by the whole batch's count, are its mean."""

    loss: Tensor
    """float32 scalar, differentiable; logged as `sft/loss`."""
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """float32 scalars, detached, logged under `sft/`: names that `reporting.metrics` declares."""
    pointing: Tensor | None = None
    """`PolicyOutput.pointing` of the same pass, where there is one: it is trained beside the actions."""


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


_NOT_TAUGHT = (
    "{} cannot learn from demonstrations: set --sft none and --policy.checkpoint, or give it a method "
    "imitation_loss, as rove.policies.base.Policy describes it."
)


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
    that lacks a method when the registry first looks it up. A subclass declares what it draws by
    `sample_shape` and `sample_dtype`; one that draws action tokens derives from `TokenPolicy`, which does so.
    One with a critic also overrides `value`, one that can learn from demonstrations `imitation_loss`, and one
    that predicts more actions than are executed `horizon` and `horizon_of`.
    """

    chunk: int
    """Number of actions in a chunk that are executed, C."""
    sample_shape: tuple[int, ...]
    """Shape of a row of `ActionChunk.sample`, such as (2, H, D) for two points of a flow."""
    sample_dtype: torch.dtype
    """Number format of `ActionChunk.sample`."""
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
        """Choose a chunk of actions for each row; "sample" needs `noise`.

        "greedy" is what a policy is judged by: the likeliest tokens, which need no noise, or a flow without
        noise on its way, whose first point is drawn from `noise` where it is given.

        With `samples` = G it chooses G chunks for each row, actions and log-probabilities [B, G, C, A] and
        sample [B, G, *sample_shape]; the first is the one drawn without `samples`.
        """

    @abstractmethod
    def evaluate(self, observation: Observation, sample: Tensor, /) -> PolicyOutput:
        """Compute log-probability, entropy and value of what `act` drew, differentiable.

        `sample` is [B, *sample_shape], or [B, G, *sample_shape] with G samples for each row, as in
        `ActionChunk.sample`. Log-probabilities and entropy are float32 [B, C, A] or [B, G, C, A], by executed
        action, whatever the sample looks like: ratios of a chunk sum over C and A.
        """

    @abstractmethod
    def save_pretrained(self, directory: Path) -> None:
        """Write a self-contained checkpoint directory that the registry can load."""

    def value(self, observation: Observation) -> Tensor:
        """Return values alone, float32 [B, C] or [B, 1]; raises RoveError without a critic."""
        raise RoveError(f"{type(self).__name__} has no critic: train it by GRPO or vine sampling.")

    @property
    def horizon(self) -> int:
        """Number of actions that are predicted at once, H ≥ C; by default the C that are executed."""
        return self.chunk

    @staticmethod
    def horizon_of(run: Run) -> int:
        """Return H of the policy of `run`, before it is built or read: demonstrations are collected by it.

        By default it is `rollout.chunk`. A subclass that overrides `horizon` overrides this too.
        """
        return run.rollout.chunk

    def imitation_loss(
        self,
        observation: Observation,
        actions: Tensor,
        mask: Tensor,
        /,
        config: SFTConfig,
        noise: SamplingNoise,
    ) -> Imitation:
        """Compute how far the policy is from demonstrated actions, differentiable.

        `actions` are float32 [B, H, A], in the units of `action_spec`, and `mask`, bool [B, H], says which of
        them count; both are on the host. What is random is drawn from `noise`, which no two calls share. Of
        `config` a policy reads what concerns it, as token policies do `smoothing`. Raises RoveError where the
        policy cannot be imitated into; `check` says so before anything is made.
        """
        raise RoveError(_NOT_TAUGHT.format(type(self).__name__))

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
        if run.sft is not None and cls.imitation_loss is Policy.imitation_loss:
            raise RoveError(_NOT_TAUGHT.format(cls.__name__))
        if (horizon := cls.horizon_of(run)) < run.rollout.chunk:
            raise RoveError(
                f"rollout.chunk = {run.rollout.chunk} actions are to be executed of a chunk, but "
                f"{cls.__name__} predicts {horizon}: set --rollout.chunk {horizon} or less."
            )
        if run.sft is not None and run.sft.smoothing and not issubclass(cls, TokenPolicy):
            raise RoveError(f"{cls.__name__} has no bins to spread a label over: set --sft.smoothing 0.")
        if run.sft is not None and run.sft.draws != 1 and issubclass(cls, TokenPolicy):
            raise RoveError(f"{cls.__name__} has no noisy points to draw: set --sft.draws 1.")
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

    def unreadable(self, instruction: str, /) -> str | None:
        """Return the first word of an instruction that this policy cannot read; None where it reads all."""
        return None

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


class TokenPolicy(Policy):
    """A policy that draws an action token for each number of a chunk: its sample is int64 [B, C, A]."""

    @property
    def sample_shape(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The shape of a row's tokens, (C, A)."""
        return self.chunk, self.action_spec.dim

    sample_dtype = torch.int64

    @abstractmethod
    def evaluate(
        self,
        observation: Observation,
        tokens: Tensor,
        /,
        temperature: float | None = None,
        smoothing: float = 0.0,
    ) -> PolicyOutput:
        """Compute log-probability, entropy and value of given tokens, differentiable; see `Policy.evaluate`.

        Tokens are int64 [B, C, A], or [B, G, C, A] with G chunks for each row. Log-probabilities are at the
        policy's own sampling temperature, as `act` reports them, unless `temperature` is given. With
        `smoothing`, a number of bins, the log-probability is a Gaussian-weighted mean over the bins around
        each token, for imitation.
        """

    @abstractmethod
    def tokenize(self, actions: Tensor) -> Tensor:
        """Return the int64 [B, C, A] token ids of actions [B, C, A] in the units of `action_spec`."""

    def imitation_loss(
        self,
        observation: Observation,
        actions: Tensor,
        mask: Tensor,
        /,
        config: SFTConfig,
        noise: SamplingNoise,
    ) -> Imitation:
        """Compute the cross-entropy of the actions' tokens, nats, at temperature 1, spread over the bins
        around them by `config.smoothing`; and, as "token_probability", the tokens' probability."""
        output = self.evaluate(
            observation, self.tokenize(actions), temperature=1.0, smoothing=config.smoothing
        )
        counts = transfer.to(mask, output.logprob.device)[..., None]
        probability = (output.logprob.detach().exp() * counts).sum()
        loss = -(output.logprob * counts).sum()
        return Imitation(loss, {"token_probability": probability}, output.pointing)


class Regressor(Policy):
    """A policy that can give actions outright, without a distribution, as OpenVLA-OFT's L1 head does.

    Where it does it is imitated by the mean absolute error of normalised actions (Kim et al. 2025, section
    4); a class that can do more than regress names its other base after this one.
    """

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

    def imitation_loss(
        self,
        observation: Observation,
        actions: Tensor,
        mask: Tensor,
        /,
        config: SFTConfig,
        noise: SamplingNoise,
    ) -> Imitation:
        """Compute the absolute error of normalised actions where the policy regresses."""
        if not self.regresses:
            return super().imitation_loss(observation, actions, mask, config, noise)
        output = self.regress(observation)
        wanted, counts = transfer.to((self.normalize(actions), mask), output.device)
        return Imitation(((output - wanted).abs() * counts[..., None]).sum())


class Locator(Policy):
    """A policy that points at an instruction's objects before it acts, so that images can ground it."""

    @abstractmethod
    def point(self, observation: Observation) -> Tensor:
        """Compute `PolicyOutput.pointing` alone, differentiable; RoveError if the policy does not point."""
