"""Playing episodes with scripted random actions, and keeping what happened: `check.py` examines it.

Actions are a function of the episode and of the actions executed in it so far. So one episode must go the
same way in any slot, beside any neighbours, before and after a resume.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rove.envs.base import TaskSuite, VectorEnv
from rove.types import Autoreset, ChunkResult, EpisodeSpec, Observation, Split

Make = Callable[[int, Autoreset], VectorEnv]
"""Function of (num_envs, autoreset) that makes a new environment."""

NUM_ENVS = 4


class Violation(Exception):
    """A rule of the contract does not hold."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise Violation(message)


@dataclass(frozen=True, slots=True)
class Step:
    """One call of `step_chunk`, with what was true before it and after."""

    specs: tuple[EpisodeSpec | None, ...]
    elapsed: Tensor
    observation: Observation
    result: ChunkResult
    specs_after: tuple[EpisodeSpec | None, ...]
    elapsed_after: Tensor


class Envs:
    """The environments under test and one recorded playthrough of each kind, made when first asked for."""

    def __init__(self, make: Make) -> None:
        self.stop, self.refill = make(NUM_ENVS, "stop"), make(NUM_ENVS, "refill")
        self.twin = make(NUM_ENVS, "refill")
        self.suite = self.stop.suite
        self.episodes = choose_episodes(self.suite, "train", NUM_ENVS + 3)
        self.make = make
        self._stopped: list[Step] | None = None
        self._refilled: list[Step] | None = None

    @property
    def stopped(self) -> list[Step]:
        """Playthrough of one episode a slot, to its end, under autoreset="stop"."""
        if self._stopped is None:
            self._stopped = play(self.stop, self.episodes[:NUM_ENVS])
        return self._stopped

    @property
    def refilled(self) -> list[Step]:
        """Playthrough of all episodes, the rest of them from the queue, under autoreset="refill"."""
        if self._refilled is None:
            self._refilled = play(self.refill, self.episodes[:NUM_ENVS], self.episodes[NUM_ENVS:])
        return self._refilled

    def close(self) -> None:
        for env in (self.stop, self.refill, self.twin):
            env.close()


def choose_episodes(suite: TaskSuite, split: Split, count: int) -> list[EpisodeSpec]:
    """Different episodes over the suite's tasks, the last two in shifted variants where there are any."""
    chosen = []
    for i in range(count):
        task = suite.tasks[i % len(suite.tasks)]
        states = suite.initial_states(task, split)
        chosen.append(EpisodeSpec(task, states[i % len(states)], seed=i))
    for i, variant in enumerate(list(suite.variants)[:2], start=count - 2):
        chosen[i] = EpisodeSpec(chosen[i].task, chosen[i].initial_state, variant, seed=i)
    return chosen


def actions(env: VectorEnv) -> Tensor:
    """Draw actions, float32 [B, C, A], uniform within bounds, keyed by each slot's episode and its elapsed
    actions."""
    low, high = torch.tensor(env.action_spec.low), torch.tensor(env.action_spec.high)
    unit = torch.zeros(env.num_envs, env.chunk, env.action_spec.dim)
    for slot, (spec, elapsed) in enumerate(zip(env.specs, env.elapsed.tolist(), strict=True)):
        key = zlib.crc32(f"{spec} {elapsed}".encode())
        unit[slot] = torch.rand(unit.shape[1:], generator=torch.Generator().manual_seed(key))
    return low + (0.01 + 0.98 * unit) * (high - low)  # rounding must not cross a bound


def step(env: VectorEnv, observation: Observation, chosen: Tensor | None = None) -> Step:
    """Execute `chosen`, by default `actions(env)`."""
    specs, elapsed = env.specs, env.elapsed.clone()
    result = env.step_chunk(actions(env) if chosen is None else chosen)
    return Step(specs, elapsed, observation, result, env.specs, env.elapsed.clone())


def resume(env: VectorEnv, observation: Observation) -> list[Step]:
    """Step until every slot idles, at most three horizons."""
    steps: list[Step] = []
    for _ in range(3 * -(-env.horizon // env.chunk)):
        if not any(env.specs):
            break
        steps.append(step(env, observation))
        observation = steps[-1].result.observation
    return steps


def play(env: VectorEnv, first: Sequence[EpisodeSpec], queue: Sequence[EpisodeSpec] = ()) -> list[Step]:
    """Play `first` in slots 0, 1, …, then the queue, to the end."""
    observation = env.reset(first)
    if queue:
        env.enqueue(queue)
    return resume(env, observation)


def running(step: Step) -> Iterator[tuple[int, EpisodeSpec]]:
    """Yield the slots that ran an episode during the chunk."""
    return ((slot, spec) for slot, spec in enumerate(step.specs) if spec is not None)


def same(a: Observation, i: int, b: Observation, j: int) -> bool:
    """Tell whether row i of `a` and row j of `b` are byte-equal."""
    if a.state is not None and b.state is not None and not torch.equal(a.state[i], b.state[j]):
        return False
    return torch.equal(a.images[i], b.images[j]) and a.instruction[i] == b.instruction[j]


def transcript(steps: Sequence[Step]) -> dict[EpisodeSpec, list[tuple[Step, int]]]:
    """Return the chunks of each episode, with its slot."""
    chunks: dict[EpisodeSpec, list[tuple[Step, int]]] = {}
    for taken in steps:
        for slot, spec in running(taken):
            chunks.setdefault(spec, []).append((taken, slot))
    return chunks
