"""The VectorEnv contract: B environments stepped a chunk of C actions at a time.

`rove.testing.check_env` is this page as runnable code. The rules:

- One observation is rendered per slot and chunk, at its end (the final one besides, of the episodes that
  `finals` names; every frame only while `record` asks for it).
- An episode that ends inside a chunk executes nothing more of it: the rest of its row is zero or False,
  and `executed` says so.
- `autoreset="refill"`: the next episode of the queue starts in that slot at once; with an empty queue
  the slot idles. `autoreset="stop"`: the slot idles until `reset` names it.
- An idle slot (`specs[b] is None`) costs neither simulation nor rendering; its action row is ignored.
- Same episodes and actions give the same bytes.
- Environments live for the whole run: a reset restores state, it does not rebuild the scene.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from rove.runtime.actor import Supervisor
from rove.types import (
    ActionSpec,
    Autoreset,
    ChunkResult,
    Demonstrations,
    EpisodeSpec,
    Finals,
    Observation,
    Split,
)


class Resources(NamedTuple):
    """Devices that the environments of a suite run on, as its configuration says."""

    simulation: Literal["core", "gpu"] = "core"
    rendering: Literal["core", "gpu"] = "core"

    @property
    def gpu(self) -> bool:
        """Whether the environments have to be given a GPU."""
        return "gpu" in self


@runtime_checkable
class TaskSuite(Protocol):
    """Enumerates tasks, instructions and initial states; the source of every `EpisodeSpec`."""

    name: str
    tasks: tuple[str, ...]
    """Task ids, in a fixed order."""
    vocabulary: tuple[str, ...]
    """Every word that an instruction can contain; a policy made from scratch reads no others."""
    variants: Mapping[str, str]
    """Shifted variants: name -> axis ("vision", "semantics", "execution"). "none" is not among them."""
    published_success: Mapping[str, Mapping[str, float]] = {}
    """Success rates that others have published for this suite, in percent: name of the result -> row of the
    table (a variant, an axis, "in distribution", "shifted") -> percent. Empty where there are none."""

    def instruction(self, episode: EpisodeSpec) -> str:
        """The instruction the policy is given in this episode."""
        ...

    def initial_states(self, task: str, split: Split) -> range:
        """Initial-state ids of one split; the splits are disjoint. Raises ValueError on an unknown task."""
        ...


@runtime_checkable
class VectorEnv(Protocol):
    """B environments of one suite."""

    num_envs: int
    chunk: int
    """C, actions in a chunk."""
    horizon: int
    """Actions after which an episode is truncated."""
    autoreset: Autoreset
    finals: Finals
    """Episodes whose final observation `step_chunk` renders: "truncated" unless set otherwise."""
    action_spec: ActionSpec
    suite: TaskSuite

    @property
    def specs(self) -> tuple[EpisodeSpec | None, ...]:
        """B entries: the episode running in each slot, None where the slot idles."""
        ...

    @property
    def elapsed(self) -> Tensor:
        """int64 [B]: actions executed so far in each slot's running episode."""
        ...

    def reset(self, episodes: Sequence[EpisodeSpec], where: Sequence[int] | None = None) -> Observation:
        """Start `episodes[i]` in slot `where[i]` (default: slot i; slots not named are left idle).

        With `where`, other slots keep running. Drops nothing from the queue unless `where` is None,
        which clears it. Returns the observation of all B slots.
        """
        ...

    def enqueue(self, episodes: Sequence[EpisodeSpec]) -> None:
        """Append to the queue that refills slots; an idle slot stays idle until reset."""
        ...

    @property
    def queued(self) -> int:
        """Episodes waiting in the queue."""
        ...

    def step_chunk(self, actions: Tensor) -> ChunkResult:
        """Execute float [B, C, A] in the units of `action_spec`.

        Raises ValueError on a wrong shape, a non-finite value, or one out of bounds in a running slot;
        nothing is executed then.
        """
        ...

    def record(self, slots: Sequence[int]) -> None:
        """From now on render every action of these slots into `ChunkResult.frames`; `()` stops it."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything a bit-exact resume needs, physics in flight included; tensors and plain values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> Observation:
        """Restore; returns the observation of all B slots, byte-equal to the one saved."""
        ...

    def close(self) -> None:
        """Free threads and device memory; calling it twice is harmless."""
        ...


@runtime_checkable
class Diverging(Protocol):
    """Optional: an environment that tells how often its physics failed."""

    diverged: int
    """Episodes so far that were ended because their simulation diverged."""


@runtime_checkable
class Brancher(VectorEnv, Protocol):
    """Optional: an environment that can try something and put everything back."""

    def try_chunks(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Try G chunks, float [B, G, C, A], from where things stand, as `step_chunk` would carry out each.

        Returns reward, float32 [B, G, C], and executed, bool [B, G, C]. Afterwards everything is as it was:
        nothing is rendered, recorded, refilled or counted. Raises as `step_chunk` does.
        """
        ...


@runtime_checkable
class Supervised(VectorEnv, Protocol):
    """Optional: an environment with processes of its own, which it replaces where they are lost."""

    supervisor: Supervisor
    """Record of lost processes: a run sets how many are replaced, and counts the faults."""


@runtime_checkable
class Demonstrator(VectorEnv, Protocol):
    """Optional: an environment that comes with a scripted expert."""

    def step_expert_chunk(self, noise: float, generator: np.random.Generator) -> tuple[Tensor, ChunkResult]:
        """Let the expert act for one chunk, closed loop, action by action.

        `noise` is the standard deviation of a Gaussian that is added to the translation of a chunk's last
        action, as a fraction of its bounds (where those lie far beyond it, of the expert's reach), less of it
        near contact: the next chunk then starts where the expert would not have gone, and shows the way back
        (DART, Laskey et al. 2017). Returns the actions that the expert wanted, [B, C, A], padded with "stay"
        after the end of an episode, and what `step_chunk` would have answered.
        """
        ...


@runtime_checkable
class Fallible(Demonstrator, Protocol):
    """Optional: a demonstrator whose expert can be made to miss, so that it shows how to try again."""

    def slip(self, slots: np.ndarray, generator: np.random.Generator) -> None:
        """Make the expert of these slots (bool [B]) miss in the coming chunk: it is wrong about where things
        are and whether it has them. What it does then is nothing to learn from, what follows is."""
        ...


@runtime_checkable
class Corrector(Demonstrator, Protocol):
    """Optional: a demonstrator whose expert looks on while a policy acts, and can go on from there."""

    def watch(self, slots: np.ndarray, actions: Tensor) -> None:
        """Have these slots (bool [B]) execute `actions` [B, C, A] in the coming expert chunk, without noise.
        The expert looks on; what it then answers there is what it would have done at each action."""
        ...


@runtime_checkable
class Grounder(VectorEnv, Protocol):
    """Optional: an environment that can say where the things in a scene are."""

    def points(self) -> Tensor:
        """float32 [B, K, 2]: pixels of what each slot's instruction is about, as of the last observation.

        The object, its destination and the hand in the first camera's picture, so that K = 3, or in those of
        the following cameras too, three each; NaN for what is not there. See `Demonstrations.points`.
        """
        ...

    def ground(self, episodes: Sequence[EpisodeSpec]) -> Demonstrations:
        """Look at the scenes of `episodes` (at most B), at their start or under way, and say where the things
        are that an instruction could ask for in them. The rows have points; no action of theirs counts.

        What the slots hold afterwards is no episode to go on with: reset them.
        """
        ...
