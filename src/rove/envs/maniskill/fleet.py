"""The worlds of one process, and what it answers to the environment that drives it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rove.config.schema import EnvConfig
from rove.envs.maniskill.world import Played, World
from rove.runtime.fork import in_copy
from rove.types import ActionSpec, EpisodeSpec, Finals


class Hello(NamedTuple):
    """Shapes and conventions of the worlds."""

    action_spec: ActionSpec
    image: tuple[int, ...]
    """Shape of a picture: (cameras, H, W, 3)."""
    state: int
    pointers: int
    """K, the number of points in `Seen.points`."""


class Begin(NamedTuple):
    """The order to start these episodes, and to carry out what has been done in them."""

    slots: tuple[int, ...]
    specs: tuple[EpisodeSpec, ...]
    history: tuple[Tensor, ...]
    """Actions that have been done, [k, A], one tensor an episode."""


class Play(NamedTuple):
    """The order to play one chunk in these slots."""

    slots: tuple[int, ...]
    actions: Tensor
    """float32 [slots, C, A]; where the expert acts, standard normal noise for the last action."""
    expert: bool
    watched: tuple[bool, ...]
    """Slots in which the expert only looks on, and `actions` are carried out."""
    finals: Finals
    recorded: tuple[int, ...]


class Try(NamedTuple):
    """The order to try chunks in these slots, and to leave them as they are."""

    slots: tuple[int, ...]
    actions: Tensor
    """float32 [slots, G, C, A]: G chunks for each."""


class Tried(NamedTuple):
    """The answer to `Try`."""

    reward: Tensor
    """float32 [slots, G, C]."""
    executed: Tensor
    """bool [slots, G, C]."""


class Seen(NamedTuple):
    """Observations of some slots."""

    slots: tuple[int, ...]
    images: Tensor
    """uint8 [slots, cameras, H, W, 3]."""
    state: Tensor
    """float32 [slots, P]."""
    points: Tensor
    """Pixels float32 [slots, K, 2], see `ManiSkillTask.points`."""


class Answer(NamedTuple):
    """The answer to `Play`."""

    slots: tuple[int, ...]
    played: Played
    done: Tensor
    """float32 [slots, C, A]: the actions that were carried out."""
    wanted: Tensor
    """float32 [slots, C, A]: what the expert meant to do; as `done` where it did not act."""
    seen: Seen
    """Slots that go on, and ended ones whose last observation is asked for."""
    films: dict[int, Tensor]
    """Pictures uint8 [actions, H, W, 3] of recorded slots."""


class Fleet:
    """The worlds of the slots given: one each on a CPU, one for all on a GPU. They are made when needed."""

    def __init__(self, config: EnvConfig, slots: Sequence[int], chunk: int, gpu: int | None) -> None:
        from rove.envs.maniskill import tasks

        self._config, self._slots, self._chunk = config, tuple(slots), chunk
        self._make, self._gpu = tasks.world, gpu
        self._single = tasks.one_world(config)
        self._shares = tasks.shares(config)
        self._worlds: dict[tuple[int, str], World] = {}
        """(slot, task) -> its world; on a GPU slot is 0 for all, and where tasks share a world "" is any."""
        self._at: dict[int, tuple[World, int]] = {}
        """Slot -> world and row of its episode."""

    def _world(self, slot: int, task: str) -> tuple[World, int]:
        row = 0 if self._single else self._slots.index(slot)
        key = (slot if self._single else 0, "" if self._shares else task)
        if key not in self._worlds:
            count = 1 if self._single else len(self._slots)
            self._worlds[key] = self._make(self._config, task, count, self._gpu)
        return self._worlds[key], row

    def hello(self, task: str) -> Hello:
        world, _ = self._world(self._slots[0], task)
        size = world.env.agent.robot.max_dof
        return Hello(world.action_spec, world.task.image, size, world.task.pointers)  # type: ignore[attr-defined]

    def begin(self, order: Begin) -> Seen:
        groups: dict[World, list[tuple[int, int]]] = {}
        for i, (slot, spec) in enumerate(zip(order.slots, order.specs, strict=True)):
            self._at[slot] = world, row = self._world(slot, spec.task)
            groups.setdefault(world, []).append((i, row))
        for world, members in groups.items():
            world.start(
                [row for _, row in members],
                [order.specs[i] for i, _ in members],
                [order.history[i] for i, _ in members],
            )
        return self._see(order.slots)

    def idle(self, slots: Sequence[int]) -> None:
        for slot in slots:
            if slot in self._at:
                world, row = self._at.pop(slot)
                world.stop([row])

    def play(self, order: Play) -> Answer:
        size = (len(order.slots), self._chunk, order.actions.shape[-1])
        done, wanted = order.actions.clone().expand(size).clone(), torch.zeros(size)
        films: dict[int, list[Tensor]] = {slot: [] for slot in order.slots if slot in order.recorded}

        def choose(i: int, c: int) -> np.ndarray:
            if not order.expert:
                return done[i, c].numpy()
            world, row = self._at[order.slots[i]]
            action, reach = world.expert(row)
            wanted[i, c:] = torch.from_numpy(action)
            wanted[i, c + 1 :, : len(reach) - 1] = 0.0  # padded with "stay"
            if order.watched[i]:
                return done[i, c].numpy()
            if c == self._chunk - 1:
                action = action + reach * order.actions[i, 0].numpy()
            low, high = np.array(world.action_spec.low), np.array(world.action_spec.high)
            action = np.clip(action, low, high).astype(np.float32)
            done[i, c] = torch.from_numpy(action)
            return action

        def film(i: int) -> None:
            if (slot := order.slots[i]) in films:
                world, row = self._at[slot]
                films[slot].append(world.frames([row])[0, 0])

        joined = self._carry_out(order.slots, choose, film)
        over = {
            "none": joined.terminated & False,
            "truncated": joined.truncated,
            "ended": joined.truncated | joined.terminated,
        }[order.finals]
        ended = (joined.truncated | joined.terminated).any(1)
        shown = [slot for i, slot in enumerate(order.slots) if over[i].any() or not ended[i]]
        seen = self._see(shown)
        self.idle([slot for i, slot in enumerate(order.slots) if ended[i]])
        return Answer(
            order.slots,
            joined,
            done,
            wanted if order.expert else done,
            seen,
            {slot: torch.stack(frames) for slot, frames in films.items() if frames},
        )

    def _carry_out(
        self,
        slots: Sequence[int],
        choose: Callable[[int, int], np.ndarray],
        film: Callable[[int], None] = lambda place: None,
    ) -> Played:
        """Play a chunk in these slots: `choose` returns the action [A] of the slot at a place among them and
        of an index in the chunk; `film` is told the place of a slot that has acted."""
        groups: dict[World, list[int]] = {}
        for i, slot in enumerate(slots):
            groups.setdefault(self._at[slot][0], []).append(i)
        columns: list[Any] = [None] * len(slots)
        for world, members in groups.items():
            place = {self._at[slots[i]][1]: i for i in members}

            def act(row: int, c: int, place: dict[int, int] = place) -> np.ndarray:
                return choose(place[row], c)

            def watch(row: int, place: dict[int, int] = place) -> None:
                film(place[row])

            played = world.play(list(place), self._chunk, act, watch)
            for k, i in enumerate(members):
                columns[i] = [column[k] for column in played]
        return Played(*(torch.stack(list(column)) for column in zip(*columns, strict=True)))

    def attempt(self, order: Try) -> Tried:
        """Try chunks one after the other, all slots in each, and each try in a copy of this process: what
        PhysX knows of earlier contacts can be neither read nor put back. Raises Lost where a copy fails."""
        tries = [
            in_copy("a try", partial(self._attempt, order.slots, chosen))
            for chosen in order.actions.unbind(1)
        ]
        return Tried(*(torch.stack(column, dim=1) for column in zip(*tries, strict=True)))

    def _attempt(self, slots: Sequence[int], actions: Tensor) -> tuple[Tensor, Tensor]:
        played = self._carry_out(slots, lambda i, c: actions[i, c].numpy())
        return played.reward.float(), played.executed

    def _see(self, slots: Sequence[int]) -> Seen:
        groups: dict[World, list[int]] = {}
        for slot in slots:
            groups.setdefault(self._at[slot][0], []).append(slot)
        order, images, states, points = [], [], [], []
        for world, members in groups.items():
            rows = [self._at[slot][1] for slot in members]
            order += members
            images.append(world.frames(rows))
            states.append(world.proprioception(rows))
            points.append(world.points(rows))
        if not order:
            return Seen((), torch.zeros(0, dtype=torch.uint8), torch.zeros(0), torch.zeros(0))
        return Seen(tuple(order), torch.cat(images), torch.cat(states), torch.cat(points))

    def close(self) -> None:
        for world in self._worlds.values():
            world.close()
        self._worlds.clear()
        self._at.clear()


def alone(config: EnvConfig, slots: Sequence[int], chunk: int, gpu: int | None) -> Fleet:
    """A fleet that has a process to itself, one of several on a machine."""
    torch.set_num_threads(1)
    return Fleet(config, slots, chunk, gpu)
