"""ManiSkill behind the `VectorEnv` contract: see `rove.envs.base` for the rules.

The slots are spread over worker processes, one a core, or stay in this one. What an episode is, is its start
and the actions carried out in it: that is what a checkpoint holds, and what a new worker is told when one has
died, which then goes on where the old one was.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rove.config.schema import ManiSkillConfig, PutOnPlateConfig
from rove.envs.maniskill import tasks
from rove.envs.maniskill.fleet import Answer, Begin, Call, Hello, Play, Seen
from rove.envs.maniskill.members import Died, Local, Member, Remote
from rove.envs.slots import EpisodeSlots
from rove.errors import RoveError
from rove.types import (
    Autoreset,
    ChunkResult,
    Demonstrations,
    EpisodeRecord,
    EpisodeSpec,
    Observation,
)

MAX_RESTARTS = 3
"""Replacements of one worker in a row, without an answer in between."""


class ManiSkillEnv(EpisodeSlots):
    """B worlds of ManiSkill's."""

    def __init__(
        self,
        config: ManiSkillConfig | PutOnPlateConfig,
        num_envs: int,
        chunk: int,
        autoreset: Autoreset,
        gpu: int | None = None,
    ) -> None:
        """`gpu` is the CUDA index of the one that simulates or renders, where one does; None: ManiSkill's
        choice."""
        suite = tasks.suite(config)
        super().__init__(suite, num_envs=num_envs, chunk=chunk, horizon=config.horizon, autoreset=autoreset)
        self._config, self._gpu = config, gpu
        self._history: list[list[Tensor]] = [[] for _ in range(num_envs)]
        """Of each slot's episode, the actions carried out: [k, A] a chunk."""
        self._total = np.zeros(num_envs)
        self._won = np.zeros(num_envs, bool)
        """Whether each slot's episode has been a success at any time."""
        self.restarts = 0
        """Worker processes replaced so far."""
        self._parts = self._divide()
        self._members: list[Member] = []
        try:
            self._members = [self._enlist(part) for part in self._parts]
            for member in self._members:
                member.send("hello", self.suite.tasks[0])
            hellos: list[Hello] = [member.recv() for member in self._members]
        except Died as error:
            self.close()
            raise RoveError(f"The simulation does not start: {error}") from error
        hello = hellos[0]
        self.action_spec = hello.action_spec
        self._images = torch.zeros(num_envs, *hello.image, dtype=torch.uint8)
        self._state = torch.zeros(num_envs, hello.state)
        self._points = torch.full((num_envs, hello.pointers, 2), torch.nan)

    # --- workers ------------------------------------------------------------------------------------

    def _divide(self) -> list[list[int]]:
        """The slots of each worker; one part where one simulation holds them all."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        many = tasks.one_world(self._config)
        count = min(self._config.workers or cores, self.num_envs) if many else 1
        self._threads = max(1, cores // count)
        bounds = np.linspace(0, self.num_envs, count + 1).round().astype(int).tolist()
        return [list(range(a, b)) for a, b in pairwise(bounds)]

    def _enlist(self, part: Sequence[int]) -> Member:
        if len(self._parts) == 1:
            return Local(self._config, part, self.chunk, self._gpu)
        return Remote(self._config, part, self.chunk, self._gpu, self._threads)

    def _ask(self, call: Call, orders: Mapping[int, Any]) -> dict[int, Any]:
        """Send each worker its order, and collect the answers; one that dies is replaced and asked again."""
        for number, order in orders.items():
            self._members[number].send(call, order)
        return {number: self._answer(number, call, order) for number, order in orders.items()}

    def _answer(self, number: int, call: Call, order: Any) -> Any:
        for attempt in range(MAX_RESTARTS + 1):
            try:
                if attempt:
                    self._replace(number, order if call == "begin" else None)
                    self._members[number].send(call, order)
                return self._members[number].recv()
            except Died as died:
                if attempt == MAX_RESTARTS:
                    raise RoveError(f"A worker died {attempt + 1} times in a row; the last: {died}") from died
        raise AssertionError("the loop returns or raises")

    def _replace(self, number: int, beginning: Begin | None) -> None:
        """A new process in the place of a dead one, with its episodes as they were before this order."""
        self._members[number].close()
        self._members[number] = self._enlist(self._parts[number])
        self.restarts += 1
        about_to_begin = () if beginning is None else beginning.slots
        slots = [s for s in self._parts[number] if self._specs[s] is not None and s not in about_to_begin]
        if slots:
            self._members[number].send("begin", self._beginning(slots))
            self._members[number].recv()

    def _beginning(self, slots: Sequence[int]) -> Begin:
        specs = [self._specs[slot] for slot in slots]
        return Begin(tuple(slots), tuple(s for s in specs if s is not None), tuple(map(self._past, slots)))

    def _past(self, slot: int) -> Tensor:
        return torch.cat([torch.zeros(0, self.action_spec.dim), *self._history[slot]])

    def _by_worker(self, slots: Sequence[int]) -> dict[int, list[int]]:
        wanted = set(slots)
        parts = {n: [slot for slot in part if slot in wanted] for n, part in enumerate(self._parts)}
        return {n: part for n, part in parts.items() if part}

    # --- the slots ----------------------------------------------------------------------------------

    @property
    def elapsed(self) -> Tensor:
        return torch.tensor([sum(map(len, past)) for past in self._history], dtype=torch.int64)

    def reset(self, episodes: Sequence[EpisodeSpec], where: Sequence[int] | None = None) -> Observation:
        slots = self._named(episodes, where)
        if where is None:
            self._idle([slot for slot in self._running().tolist() if slot not in slots])
        self._start(dict(zip(slots, episodes, strict=True)))
        return self._observation(range(self.num_envs))

    def _start(self, episodes: Mapping[int, EpisodeSpec]) -> None:
        for slot, episode in episodes.items():
            self._specs[slot], self._history[slot] = episode, []
            self._total[slot], self._won[slot] = 0.0, False
        self._begin(list(episodes))

    def _begin(self, slots: Sequence[int]) -> None:
        """Have the workers start what these slots hold, and look at it."""
        orders = {n: self._beginning(part) for n, part in self._by_worker(slots).items()}
        for seen in self._ask("begin", orders).values():
            self._take(seen)

    def _idle(self, slots: Sequence[int]) -> None:
        self._ask("idle", self._by_worker(slots))
        for slot in slots:
            self._clear(slot)

    def _clear(self, slot: int) -> None:
        self._specs[slot], self._history[slot] = None, []
        self._images[slot], self._state[slot], self._points[slot] = 0, 0.0, torch.nan

    # --- stepping -----------------------------------------------------------------------------------

    def step_chunk(self, actions: Tensor) -> ChunkResult:
        return self._run(torch.from_numpy(self._checked(actions)).float(), expert=False)[1]

    def step_expert_chunk(self, noise: float, generator: np.random.Generator) -> tuple[Tensor, ChunkResult]:
        """See `rove.envs.base.Demonstrator`; the noise is a fraction of the expert's own longest step."""
        shape = (self.num_envs, 1, self.action_spec.dim)
        pushed = torch.from_numpy(noise * generator.normal(size=shape).astype(np.float32))
        return self._run(pushed.expand(-1, self.chunk, -1), expert=True)

    def _run(self, actions: Tensor, expert: bool) -> tuple[Tensor, ChunkResult]:
        orders = {
            n: Play(tuple(part), actions[part], expert, self.finals, self._recorded)
            for n, part in self._by_worker(self._running().tolist()).items()
        }
        answers: list[Answer] = list(self._ask("play", orders).values())
        shape = (self.num_envs, self.chunk)
        reward = torch.zeros(shape)
        terminated, truncated, success, executed = (torch.zeros(shape, dtype=torch.bool) for _ in range(4))
        wanted = torch.zeros(*shape, self.action_spec.dim)
        films: dict[int, Tensor] = {}
        for answer in answers:
            rows = list(answer.slots)
            reward[rows], terminated[rows], truncated[rows], success[rows], executed[rows] = answer.played
            wanted[rows] = answer.wanted
            films |= answer.films
            self._take(answer.seen)
            for i, slot in enumerate(rows):
                self._history[slot].append(answer.done[i, executed[slot]])
                self._total[slot] += float(reward[slot].sum())
                self._won[slot] |= bool(success[slot].any())
        ended = (terminated | truncated).any(1)
        final_slots = torch.from_numpy(self._final_slots(terminated.numpy(), truncated.numpy()))
        final = self._observation(final_slots.tolist()) if len(final_slots) else None
        finished = self._finish(ended, truncated, success, executed)
        result = ChunkResult(
            observation=self._observation(range(self.num_envs)),
            reward=reward,
            terminated=terminated,
            truncated=truncated,
            success=success,
            executed=executed,
            final_slots=final_slots,
            final_observation=final,
            finished=finished,
            frames=films,
        )
        return wanted, result

    def _finish(
        self, ended: Tensor, truncated: Tensor, success: Tensor, executed: Tensor
    ) -> tuple[EpisodeRecord, ...]:
        """Records of the episodes that ended, and the next ones in their slots."""
        records, slots = [], ended.nonzero().flatten().tolist()
        for slot in slots:
            spec = self._specs[slot]
            assert spec is not None
            last = int(executed[slot].sum()) - 1
            records.append(
                EpisodeRecord(
                    spec=spec,
                    slot=slot,
                    success=bool(self._won[slot]),
                    length=int(self.elapsed[slot]),
                    total_reward=float(self._total[slot]),
                    truncated=bool(truncated[slot].any()),
                    success_at_end=bool(success[slot, last]),
                )
            )
            self._clear(slot)
        if successors := self._successors(slots):
            self._start(successors)
        return tuple(records)

    # --- pictures -----------------------------------------------------------------------------------

    def _take(self, seen: Seen) -> None:
        if seen.slots:
            rows = list(seen.slots)
            self._images[rows], self._state[rows] = seen.images, seen.state
            self._points[rows] = seen.points

    def _observation(self, rows: Sequence[int]) -> Observation:
        """Copies of the rows named; black and without an instruction where one idles."""
        specs = [self._specs[row] for row in rows]
        text = tuple("" if spec is None else self.suite.instruction(spec) for spec in specs)
        index = list(rows)
        return Observation(self._images[index], text, self._state[index])

    # --- saving -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            **self._saved_slots(),
            "history": [self._past(slot) for slot in range(self.num_envs)],
            "total_reward": torch.from_numpy(self._total.copy()),
            "won": torch.from_numpy(self._won.copy()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> Observation:
        self._check_saved(state)
        self._idle(self._running().tolist())
        self._load_slots(state)
        self._history = [[past] for past in state["history"]]
        self._total, self._won = state["total_reward"].numpy().copy(), state["won"].numpy().copy()
        self._begin(self._running().tolist())
        return self._observation(range(self.num_envs))

    def close(self) -> None:
        for member in self._members:
            member.close()
        self._members = []


class PutOnPlateEnv(ManiSkillEnv):
    """The put-on-plate worlds, which say where things are."""

    def points(self) -> Tensor:
        """Object, receptacle and hand: see `rove.envs.base.Grounder`."""
        return self._points.clone()

    def ground(self, episodes: Sequence[EpisodeSpec]) -> Demonstrations:
        """Where what each episode is about is: at its start, and after a chunk of the expert's that ends
        with a push off its way. What has only seen starts does not find things behind the hand.

        See `rove.envs.base.Grounder`.
        """
        seen = [self.reset(episodes).select(range(len(episodes)))]
        where = [self.points()[: len(episodes)]]
        astray = np.random.default_rng([episode.seed for episode in episodes])
        _, result = self.step_expert_chunk(noise=1.0, generator=astray)
        running = self._running().tolist()
        seen.append(result.observation.select(running))
        where.append(self.points()[running])
        pictures = Observation.cat(seen)
        return self._pointed(pictures.images, range(len(pictures)), pictures.instruction, torch.cat(where))
