"""The records that cross borders between rooms, frozen, each field with shape, dtype and unit.

Shape letters: `B` parallel environments, `T` chunks in a rollout, `C` actions in a chunk, `A` action
dimensions, `N` chunks in a batch, `n` cameras, `H, W` pixels. A policy may predict more actions than the C
that are executed. A mask is True where an entry counts.
`terminated` and `truncated` are never merged before bootstrapping has used them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

Split = Literal["train", "held_out"]
Autoreset = Literal["refill", "stop"]
Mode = Literal["sample", "greedy"]
Finals = Literal["none", "truncated", "ended"]
"""Which episodes' last observation is rendered: a bootstrap needs it, nothing else does."""


@dataclass(frozen=True, slots=True)
class EpisodeSpec:
    """An episode is data: everything that decides what happens, but for the actions.

    Example: `EpisodeSpec("put/red_cube/blue_plate", initial_state=17, variant="light", seed=4021)`
    """

    task: str
    initial_state: int
    variant: str = "none"
    seed: int = 0
    """Keys the policy's sampling noise, nothing else: members of a GRPO group differ in it alone."""


@dataclass(frozen=True, slots=True)
class EpisodeRecord:
    """Outcome of one episode."""

    spec: EpisodeSpec
    slot: int
    success: bool
    length: int
    """Executed actions."""
    total_reward: float
    """Undiscounted sum of rewards."""
    truncated: bool
    """Ended by the horizon, not by the task."""
    success_at_end: bool | None = None
    """Whether the last action left it a success; `success` says whether any action did. None: the suite does
    not tell the two apart."""


@dataclass(frozen=True, slots=True)
class ActionSpec:
    """One side's convention for an action vector; `policies.actions.convert` maps between two."""

    names: tuple[str, ...]
    """One a dimension, e.g. `("x", "y", "z", "yaw", "gripper")`."""
    units: tuple[str, ...]
    """One a dimension: "m", "rad", or "1" for a dimensionless one."""
    low: tuple[float, ...]
    high: tuple[float, ...]
    """Inclusive bounds; an action outside them is refused by the environment."""
    frame: Literal["world", "end_effector"] = "world"
    control: Literal["delta", "absolute"] = "delta"
    gripper: Literal["open_high", "open_low"] = "open_high"
    """Whether the upper bound of the last dimension opens or closes the gripper."""

    @property
    def dim(self) -> int:
        """A, the number of action dimensions."""
        return len(self.names)


@dataclass(frozen=True, slots=True)
class Conventions:
    """A suite's expectations of the policies that act in it. Where the two differ nothing raises: the
    success rate falls. A preflight compares them."""

    suite: str
    action_spec: ActionSpec
    images: tuple[int, ...]
    """Numbers of pictures, n, that the suite can give; empty: not known."""
    statistics: tuple[str, ...]
    """Names of data sets, with `*`, whose statistics un-normalise actions here."""
    instructions: tuple[str, ...]
    """Examples, or all that there are where `complete`."""
    state: int | None
    """P, size of the robot's own state; 0: it gives none; None: not known."""
    center_crop: bool | None = None
    """Whether published checkpoints of this suite were trained to have the centre cut out; None: there are
    none."""
    prompt: str | None = None
    """The template that they were trained with."""
    rate: float | None = None
    """Actions a second; None: not known."""
    complete: bool = False
    """True where `instructions` are those that the policy will be given, and no mere examples."""


@dataclass(frozen=True, slots=True, eq=False)
class Observation:
    """Input of a policy: uint8 images and text. Pixel tensors are made by the policy, on its device."""

    images: Tensor
    """uint8 [B, n, H, W, 3]."""
    instruction: tuple[str, ...]
    """B instructions."""
    state: Tensor | None = None
    """Proprioception, float32 [B, P], in the suite's units; None where the suite has none."""

    def __len__(self) -> int:
        return len(self.instruction)

    def select(self, rows: Sequence[int] | Tensor) -> Observation:
        """The rows named, in that order."""
        index = torch.as_tensor(rows, dtype=torch.long)
        return Observation(
            self.images[index],
            tuple(self.instruction[i] for i in index.tolist()),
            None if self.state is None else self.state[index],
        )

    @staticmethod
    def cat(parts: Sequence[Observation]) -> Observation:
        """The rows of all parts, in order."""
        states = [part.state for part in parts if part.state is not None]
        return Observation(
            torch.cat([part.images for part in parts]),
            tuple(text for part in parts for text in part.instruction),
            torch.cat(states) if states else None,
        )


@dataclass(frozen=True, slots=True, eq=False)
class ActionChunk:
    """Answer of `Policy.act`; [B, G, C, A] where it says [B, C, A], if G samples were asked for."""

    actions: Tensor
    """float32 [B, C, A], in the environment's units: the C actions that are executed."""
    sample: Tensor
    """[B, *sample_shape] of `sample_dtype`, as the policy declares them: what was drawn, which `evaluate` is
    given again. Only the policy that drew it can read it; token policies' are int64 [B, C, A], vocabulary
    ids."""
    logprob: Tensor
    """float32 [B, C, A], of what was drawn, under the policy's sampling distribution, by executed action."""
    value: Tensor | None
    """float32 [B, C] or [B, 1]; None without a critic."""


@dataclass(frozen=True, slots=True, eq=False)
class PolicyOutput:
    """Answer of `Policy.evaluate`: the same function of the same inputs as `act`."""

    logprob: Tensor
    """float32 [B, C, A], or [B, G, C, A] for G samples of each row; so is the entropy."""
    entropy: Tensor
    """float32 [B, C, A], nats."""
    value: Tensor | None
    """float32 [B, C] or [B, 1]; None without a critic."""
    pointing: Tensor | None = None
    """float32 [B, K, P]: logits of where among the P patches of the first picture (row by row, in a square)
    each of K points is; None where the policy does not point."""


@dataclass(frozen=True, slots=True, eq=False)
class ChunkResult:
    """Answer of `VectorEnv.step_chunk`."""

    observation: Observation
    """After the chunk; in a refilled slot the new episode's first; in an idle slot unspecified."""
    reward: Tensor
    """float32 [B, C]; zero where nothing was executed."""
    terminated: Tensor
    """bool [B, C]; the task itself ended here (success, or a failure that cannot be undone)."""
    truncated: Tensor
    """bool [B, C]; the horizon ended the episode here."""
    success: Tensor
    """bool [B, C]."""
    executed: Tensor
    """bool [B, C]; False after an end inside the chunk, and in idle slots."""
    final_slots: Tensor
    """int64 [F]; the slots whose episode ended in this chunk and whose last observation was asked for
    (`VectorEnv.finals`: by default the truncated ones), ascending."""
    final_observation: Observation | None
    """Their last observation, F rows; None when F is 0."""
    finished: tuple[EpisodeRecord, ...] = ()
    """Episodes that ended in this chunk, by slot."""
    frames: dict[int, Tensor] = field(default_factory=dict)
    """Recorded slots only: uint8 [executed frames, H, W, 3] of this chunk, see `VectorEnv.record`."""


@dataclass(frozen=True, slots=True, eq=False)
class Demonstrations:
    """N chunks that are right: those of successful expert episodes, or, with no action that counts, what an
    instruction is about."""

    images: Tensor
    """uint8 [F, n, H, W, 3]."""
    frame: Tensor
    """int64 [N]: the picture at the beginning of each chunk."""
    instruction: tuple[str, ...]
    """N instructions."""
    actions: Tensor
    """float32 [N, H, A], in the environment's units: the actions from that picture on, as many as the policy
    predicts (`Policy.horizon`; C where it predicts what it executes)."""
    mask: Tensor
    """bool [N, H]: the actions that count; fewer at an episode's end."""
    points: Tensor | None = None
    """float32 [N, K, 2]: where in a picture each thing is that an instruction is about, in pixels (right,
    down) from its upper left corner; NaN where there is none. The first camera's come first, then as many of
    each that follows, if any. None: not known."""
    state: Tensor | None = None
    """float32 [F, P]: proprioception at each picture, see `Observation.state`."""
    episode: Tensor | None = None
    """int64 [N]: the number of the episode that each row is of, whose rows follow one another in order. None:
    not known."""

    def __len__(self) -> int:
        return len(self.actions)

    def observation(self, rows: Tensor) -> Observation:
        """Return the observation of the rows named, int64 [M]."""
        frames = self.frame[rows]
        return Observation(
            self.images[frames],
            tuple(self.instruction[i] for i in rows.tolist()),
            None if self.state is None else self.state[frames],
        )


@dataclass(frozen=True, slots=True, eq=False)
class Branches:
    """The G chunks that were tried from each state of a rollout; the first of them was carried on."""

    sample: Tensor
    """[T, B, G, *sample_shape]; see `ActionChunk.sample`."""
    logprob: Tensor
    """float32 [T, B, G, C, A]."""
    reward: Tensor
    """float32 [T, B, G, C]."""
    executed: Tensor
    """bool [T, B, G, C]."""

    def slots(self, index: Tensor) -> Branches:
        """Return the branches of the slots `index` (int64 [B']) only."""
        return Branches(*(getattr(self, f.name)[:, index] for f in fields(self)))

    @staticmethod
    def cat(parts: Sequence[Branches]) -> Branches:
        """The slots of all parts side by side."""
        columns = ([getattr(part, f.name) for part in parts] for f in fields(Branches))
        return Branches(*(torch.cat(column, dim=1) for column in columns))


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """A rollout of T chunks in B slots, as collected, before any algorithm has looked at it."""

    observation: Observation
    """T·B rows, row t·B + b."""
    sample: Tensor
    """[T, B, *sample_shape]; see `ActionChunk.sample`."""
    logprob: Tensor
    """float32 [T, B, C, A]."""
    value: Tensor | None
    """float32 [T + 1, B, C or 1]; the last entry judges the observation after the last chunk."""
    final_value: Tensor | None
    """float32 [T, B, 1]: V(final observation) where an episode was truncated (with `bootstrap="always"`:
    where one ended), zero elsewhere."""
    reward: Tensor
    """float32 [T, B, C]."""
    terminated: Tensor
    """bool [T, B, C]."""
    truncated: Tensor
    """bool [T, B, C]."""
    executed: Tensor
    """bool [T, B, C]."""
    finished: tuple[EpisodeRecord, ...]
    version: int
    """Version of the weights that acted."""
    branches: Branches | None = None
    """Chunks that were tried beside; None unless the rollout branches."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """T, B, C."""
        t, b, c = self.reward.shape
        return t, b, c

    @property
    def done(self) -> Tensor:
        """bool [T, B, C]; only for use after bootstrapping."""
        return self.terminated | self.truncated

    def slots(self, index: Tensor) -> Trajectory:
        """The same rollout with the slots `index` (int64 [B']) only; `finished` keeps theirs, renumbered."""
        t, b, _ = self.shape
        rows = (torch.arange(t)[:, None] * b + index[None, :]).flatten()
        number = {slot: i for i, slot in enumerate(index.tolist())}
        kept = {
            f.name: value[:, index]
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(
            self,
            observation=self.observation.select(rows),
            finished=tuple(replace(r, slot=number[r.slot]) for r in self.finished if r.slot in number),
            branches=None if self.branches is None else self.branches.slots(index),
            **kept,
        )

    @staticmethod
    def cat(parts: Sequence[Trajectory]) -> Trajectory:
        """The slots of all parts side by side; T must agree."""
        t = parts[0].shape[0]
        per_step = [
            p.observation.select(range(s * p.shape[1], (s + 1) * p.shape[1])) for s in range(t) for p in parts
        ]
        finished, offset = [], 0
        for part in parts:
            finished += [replace(r, slot=r.slot + offset) for r in part.finished]
            offset += part.shape[1]
        joined = {
            f.name: torch.cat([getattr(p, f.name) for p in parts], dim=1)
            for f in fields(Trajectory)
            if isinstance(getattr(parts[0], f.name), Tensor)
        }
        tried = [part.branches for part in parts if part.branches is not None]
        return replace(
            parts[0],
            observation=Observation.cat(per_step),
            finished=tuple(finished),
            branches=Branches.cat(tried) if tried else None,
            **joined,
        )


@dataclass(frozen=True, slots=True, eq=False)
class TrainBatch:
    """N chunks to train on; rows in which nothing counts are not in it.

    With G chunks tried from each state a row is a state: [N, G, ...] where it says [N, ...].
    """

    observation: Observation
    sample: Tensor
    """[N, *sample_shape]; see `ActionChunk.sample`."""
    logprob: Tensor
    """float32 [N, C, A], of the weights that acted."""
    advantage: Tensor
    """float32 [N, C] or, at chunk level, [N, 1]."""
    mask: Tensor
    """bool [N, C] or [N, 1]."""
    returns: Tensor | None
    """float32, shaped like `value`; None without a critic."""
    value: Tensor | None
    """float32 [N, C] or [N, 1], of the weights that acted, or, beside `proximal`, of its weights."""
    episode_length: Tensor | None
    """int64 [N, 1], executed actions of the row's episode; set where the loss is length-normalised."""
    horizon: int | None = None
    """Actions; set together with `episode_length`."""
    denominator: float | None = None
    """Denominator of the policy loss, for the whole batch; None: see `losses.policy_loss`."""
    version: int | None = None
    """The oldest weights that acted; None where that is not known."""
    proximal: Tensor | None = None
    """float32 [N, C, A], of the weights that the update starts from, where older ones acted."""

    def __len__(self) -> int:
        return self.sample.shape[0]

    def select(self, rows: Tensor) -> TrainBatch:
        """The rows named (int64 [M]); the denominator stays the whole batch's."""
        picked = {
            f.name: value[rows] for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, observation=self.observation.select(rows), **picked)


@dataclass(frozen=True, slots=True)
class EvalReport:
    """Every episode of an evaluation, and what is needed to repeat it."""

    suite: str
    split: Split
    decoding: Mode
    records: tuple[EpisodeRecord, ...]
    seconds: float
    policy: str = ""
    """Checkpoint path or a name."""
    about: dict[str, Any] = field(default_factory=dict)
    """Versions, seed, protocol: plain JSON values."""
