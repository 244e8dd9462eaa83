"""ManiSkill behind the `VectorEnv` contract: see `rove.envs.base` for the rules.

The slots are spread over worker processes, one a core, or stay in this one. What an episode is, is its start
and the actions carried out in it: that is what a checkpoint holds, and what a new worker is told when one has
died, which then goes on where the old one was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from rove import host
from rove.config.schema import ManiSkillConfig, PutOnPlateConfig
from rove.envs.chunked import Actions, ChunkedEnv, Frames, Played
from rove.envs.maniskill import tasks
from rove.envs.maniskill.fleet import Begin, Fleet, Play, Seen, Try, alone
from rove.errors import RoveError
from rove.runtime.actor import Actor, Future, Lost, Supervisor
from rove.runtime.local import InChild, InProcess
from rove.types import Autoreset, ChunkResult, Demonstrations, EpisodeSpec, Observation

Order = TypeVar("Order")
Reply = TypeVar("Reply")


class ManiSkillEnv(ChunkedEnv):
    """B worlds of ManiSkill's."""

    outlives_success = True

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
        """Actions carried out in each slot's episode: [k, A] a chunk."""
        self.supervisor = Supervisor(3)
        self._parts = self._divide()
        self._members: list[Actor[Fleet]] = []
        try:
            self._members = [self._enlist(number) for number in range(len(self._parts))]
            asked = [member.call(Fleet.hello, self.suite.tasks[0]) for member in self._members]
            hellos = [future.result() for future in asked]
        except Lost as lost:
            self.close()
            raise lost.reason("The simulation does not start: ") from lost
        hello = hellos[0]
        self.action_spec, self.image_shape, self.state_size = hello.action_spec, hello.image, hello.state
        self._images = torch.zeros(num_envs, *hello.image, dtype=torch.uint8)
        self._state = torch.zeros(num_envs, hello.state)
        self._points = torch.full((num_envs, hello.pointers, 2), torch.nan)

    # --- workers ------------------------------------------------------------------------------------

    def _divide(self) -> list[list[int]]:
        """Divide the slots among workers; one part where one simulation holds them all."""
        cores = host.core_count()
        many = tasks.one_world(self._config)
        count = min(self._config.workers or cores, self.num_envs) if many else 1
        self._threads = max(1, cores // count)
        bounds = np.linspace(0, self.num_envs, count + 1).round().astype(int).tolist()
        return [list(range(a, b)) for a, b in pairwise(bounds)]

    def _enlist(self, number: int) -> Actor[Fleet]:
        order = (self._config, tuple(self._parts[number]), self.chunk, self._gpu)
        name = f"simulator {number}"
        if len(self._parts) == 1:
            return InProcess(name, partial(Fleet, *order))
        # Mesa's software renderer takes every core unless told otherwise.
        return InChild(name, partial(alone, *order), environment={"LP_NUM_THREADS": str(self._threads)})

    def _ask(self, method: Callable[[Fleet, Order], Reply], orders: Mapping[int, Order]) -> dict[int, Reply]:
        """Send each worker its order, and collect the answers; one that dies is replaced and asked again."""
        asked = {number: self._members[number].call(method, order) for number, order in orders.items()}
        return {
            number: self._answer(number, future, method, orders[number]) for number, future in asked.items()
        }

    def _answer(
        self, number: int, future: Future[Reply], method: Callable[[Fleet, Order], Reply], order: Order
    ) -> Reply:
        while True:
            try:
                reply = future.result()
            except Lost as lost:
                if isinstance(lost.error, RoveError):
                    raise lost.error from lost
                self.supervisor.note(lost)
                self._replace(number, order if isinstance(order, Begin) else None)
                future = self._members[number].call(method, order)
            else:
                self.supervisor.works(self._members[number].name)
                return reply

    def _replace(self, number: int, beginning: Begin | None) -> None:
        """Start a new process in the place of a dead one, with its episodes as they were before this
        order."""
        self._members[number].kill()
        self._members[number] = self._enlist(number)
        about_to_begin = () if beginning is None else beginning.slots
        slots = [s for s in self._parts[number] if self._specs[s] is not None and s not in about_to_begin]
        if slots:
            # Should this fail, the order that is sent next says so.
            self._members[number].call(Fleet.begin, self._beginning(slots))

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

    def start(self, rows: Sequence[int], episodes: Sequence[EpisodeSpec]) -> None:
        for slot in rows:
            self._history[slot] = []
        self._catch_up(rows)

    def _catch_up(self, slots: Sequence[int]) -> None:
        """Have the workers start what these slots hold, carry out its history, and look at it."""
        orders = {n: self._beginning(part) for n, part in self._by_worker(slots).items()}
        for seen in self._ask(Fleet.begin, orders).values():
            self._take(seen)

    def release(self, rows: Sequence[int]) -> None:
        self._ask(Fleet.idle, self._by_worker(rows))
        for slot in rows:
            self._history[slot], self._elapsed[slot] = [], 0
            self._images[slot], self._state[slot], self._points[slot] = 0, 0.0, torch.nan

    # --- stepping -----------------------------------------------------------------------------------

    def play(self, rows: np.ndarray, actions: Actions) -> tuple[Played, Frames]:
        chosen = np.stack([actions(c, rows) for c in range(self.chunk)], axis=1)
        return self._play(rows, torch.from_numpy(chosen).float(), expert=False)[1:]

    def try_chunks(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Try chunks in copies of the processes that hold the worlds; see `rove.envs.base.Brancher`.

        Raises RoveError where one simulation holds all worlds, on a GPU: that cannot be copied.
        """
        if not tasks.one_world(self._config):
            raise RoveError("Chunks cannot be tried under env.backend = 'physx_cuda': use physx_cpu.")
        values = np.stack([self._checked(actions[:, g]) for g in range(actions.shape[1])], axis=1)
        orders = {
            n: Try(tuple(part), torch.from_numpy(values[part]).float())
            for n, part in self._by_worker(self._running().tolist()).items()
        }
        reward = torch.zeros(values.shape[:3])
        executed = torch.zeros(values.shape[:3], dtype=torch.bool)
        try:
            answers = self._ask(Fleet.attempt, orders)
        except Lost as lost:
            raise lost.reason("The simulation goes on, but ") from lost
        for n, tried in answers.items():
            slots = list(orders[n].slots)
            reward[slots], executed[slots] = tried.reward, tried.executed
        return reward, executed

    def step_expert_chunk(self, noise: float, generator: np.random.Generator) -> tuple[Tensor, ChunkResult]:
        """Let the expert act for one chunk; the noise is a fraction of its own longest step.

        See `rove.envs.base.Demonstrator`.
        """
        shape, rows = (self.num_envs, 1, self.action_spec.dim), self._running()
        pushed = torch.from_numpy(noise * generator.normal(size=shape).astype(np.float32))
        actions = pushed.repeat(1, self.chunk, 1)
        watched = torch.from_numpy(self._watched)
        actions[watched] = torch.from_numpy(self._given).float()[watched]
        wanted, played, films = self._play(rows, actions[rows], expert=True)
        self._watched[:] = False
        return self._spread(rows, wanted), self._result(rows, played, films)

    def _play(self, rows: np.ndarray, actions: Tensor, expert: bool) -> tuple[Tensor, Played, Frames]:
        """Play a chunk of `actions` [n, C, A], or of the expert's, in running rows; returns first what it
        wanted."""
        place = {slot: i for i, slot in enumerate(rows.tolist())}
        orders = {
            n: Play(
                tuple(part),
                actions[[place[slot] for slot in part]],
                expert,
                tuple(self._watched[part].tolist()),
                self.finals,
                self._recorded,
            )
            for n, part in self._by_worker(list(place)).items()
        }
        answers = list(self._ask(Fleet.play, orders).values())
        whole, wanted = Played.nothing(len(rows), self.chunk), torch.zeros_like(actions)
        films: Frames = {}
        for answer in answers:
            index = [place[slot] for slot in answer.slots]
            wanted[index] = answer.wanted
            for column, part in zip(whole, answer.played, strict=True):
                column[index] = part
            films |= answer.films
            self._take(answer.seen)
            for i, slot in enumerate(answer.slots):
                self._history[slot].append(answer.done[i, answer.played.executed[i]])
        self._elapsed[rows] += whole.executed.numpy().sum(1)
        return wanted, whole, films

    # --- pictures -----------------------------------------------------------------------------------

    def _take(self, seen: Seen) -> None:
        if seen.slots:
            rows = list(seen.slots)
            self._images[rows], self._state[rows] = seen.images, seen.state
            self._points[rows] = seen.points

    def observe(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Copy the rows named, as their workers saw them last."""
        return self._images[rows], self._state[rows]

    # --- saving -------------------------------------------------------------------------------------

    def save(self) -> dict[str, list[Tensor]]:
        return {"history": [self._past(slot) for slot in range(self.num_envs)]}

    def load(self, state: Mapping[str, list[Tensor]]) -> None:
        self._history = [[past] for past in state["history"]]
        self._catch_up(self._running().tolist())

    def close(self) -> None:
        for member in self._members:
            member.close()
        self._members = []


class PutOnPlateEnv(ManiSkillEnv):
    """The put-on-plate worlds, which say where things are."""

    def points(self) -> Tensor:
        """Locate object, receptacle and hand in the pictures: see `rove.envs.base.Grounder`."""
        return self._points.clone()

    def ground(self, episodes: Sequence[EpisodeSpec]) -> Demonstrations:
        """Locate in the image what each episode is about: at its start, and after a chunk of the expert's
        that ends with a push off its way. What has only seen starts does not find things behind the hand.

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
        return self._grounding(pictures.images, range(len(pictures)), pictures.instruction, torch.cat(where))
