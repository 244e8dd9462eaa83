"""The physics of many LIBERO worlds: batches of the C engine, one or more for each scene that is played.

A group is one batch of one scene, with a controller a world, and runs on one thread at a time; groups run
side by side. What a world does follows from its task, its initial state and its actions alone.
"""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

import mujoco
import numpy as np
from mujoco.batch import Batch, SimulationError

from rove.envs.libero import controller as control
from rove.envs.libero import predicates
from rove.envs.libero.controller import SUBSTEPS, Controller
from rove.envs.libero.predicates import Goal
from rove.envs.libero.progress import Guide, Sight
from rove.envs.libero.scenes import LiberoScene, TaskModel, load_task
from rove.envs.rotations import axis_angle

Phase = Literal["stock", "end"]
"""Time at which an action's observation is taken: as the stock environment's clocks do, after 23 of 25
substeps (joints after 24), or at the action's end."""
SEEN, FELT = 23, 24
"""Substeps after which the stock environment looks at bodies, and at joints."""
WAIT_ACTION = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])
"""Action while things settle: none, with the gripper opening."""
LARGEST_GROUP = 16
"""Worlds in a batch at most: enough that the controller's fixed cost is small beside the physics."""
TRIED = 64
"""Worlds at most in which chunks are tried side by side: they come and go, so there may be more of them."""
SETTLED = 2048
"""Initial states of which it is remembered how they settle, some 10 KB each."""
STATE_DIM = 8
"""Size of the robot's own state, see `LiberoWorlds.observed`."""

_NONE, _VEL = mujoco.mjtStage.mjSTAGE_NONE.value, mujoco.mjtStage.mjSTAGE_VEL.value
_FAULTS = [int(getattr(mujoco.mjtWarning, f"mjWARN_{name}")) for name in (
    "BADQPOS", "BADQVEL", "BADQACC", "BADCTRL", "CONTACTFULL", "CNSTRFULL",
)]  # fmt: skip
_CONTROL = ("goal_position", "goal_rotation", "gripper", "fresh")
_OWN = ("hand_position", "hand_quaternion", "fingers", "pose", "broken")


class Group:
    """Worlds of one scene, stepped together."""

    def __init__(
        self,
        scene: LiberoScene,
        size: int,
        phase: Phase,
        make: Callable[..., Controller] = Controller,
        *,
        guided: bool = False,
    ):
        """`guided` worlds can tell the way that is `left`."""
        self.scene, self.size = scene, size
        self.phase: Phase = phase
        self.arm = scene.arm
        self.batch = Batch(scene.model, size, nthread=1, persistent=True)
        bound = dict.fromkeys((*control.BOUND, *predicates.BOUND))
        self.data = {name: self.batch.bind(name) for name in bound}
        self.ctrl = self.batch.bind("ctrl")
        self._position, self._quaternion = self.batch.expand("body_pos"), self.batch.expand("body_quat")
        self.controller = make(self.arm, size)
        self.tasks: list[TaskModel | None] = [None] * size
        self._goals: dict[str, Goal] = {}
        self._scratch = mujoco.MjData(scene.model)
        self.broken = np.zeros(size, bool)
        """Worlds that diverged before their episode began: its first action ends it."""
        self.hand_position, self.hand_quaternion = np.zeros((size, 3)), np.zeros((size, 4))
        self.fingers, self.pose = np.zeros((size, 2)), np.zeros((size, scene.model.nq))
        """The last observation: hand (m; w, x, y, z), finger joints (m), all positions for a picture."""
        self._guide = Guide(self.arm, size) if guided else None
        self._spare: Group | None = None

    def free(self) -> list[int]:
        """List the rows that run nothing."""
        return [row for row, task in enumerate(self.tasks) if task is None]

    def start(self, row: int, task: TaskModel, initial_state: int) -> None:
        """Put a world into an initial state, as a stock reset and `set_init_state` leave it."""
        self.place(row, task, initial_state)
        model, start = self.scene.model, task.start(initial_state)[0]
        self.data["qpos"][row] = start[1 : 1 + model.nq]
        self.data["qvel"][row] = start[1 + model.nq :]
        self.controller.reset(row)
        rows = np.array([row])
        self.batch.forward(rows, stage=_VEL)
        self._see(rows)
        self._feel(rows)

    def begin(self, row: int) -> None:
        """Begin an episode in a world that has settled: choose the grasps that its potential is measured to,
        where it has one."""
        if self._guide is not None:
            task = self.tasks[row]
            assert task is not None
            self._guide.begin(row, task, self.data)

    def sight(self, rows: np.ndarray) -> Sight:
        """Return how things stand in guided worlds, as of the last forward pass: what `left` reads."""
        assert self._guide is not None, "these worlds are not guided"
        return self._guide.sight(rows, self.data, self.controller.gripper)

    def left(self, rows: np.ndarray, sight: Sight) -> np.ndarray:
        """Measure the way [n] that the hand still has to go in guided worlds, metres, see `progress.py`;
        `sight` says how things stand in each of `rows`."""
        assert self._guide is not None, "these worlds are not guided"
        return self._guide.left(rows, sight)

    def place(self, row: int, task: TaskModel, initial_state: int) -> None:
        """Give a row to a task: its fixtures are placed, the rest is reset."""
        self._assign(row, task)
        poses, bodies = task.start(initial_state)[1], list(task.fixtures)
        self._position[row], self._quaternion[row] = self.scene.model.body_pos, self.scene.model.body_quat
        self._position[row, bodies], self._quaternion[row, bodies] = poses[:, :3], poses[:, 3:]
        self.batch.reset([row], stage=_NONE)
        self.broken[row] = False

    def _assign(self, row: int, task: TaskModel) -> None:
        self.tasks[row] = task
        if task.task not in self._goals:
            self._goals[task.task] = Goal(self.scene.model, task.goal)
        if self._guide is not None:
            self._guide.place(row, task)

    def act(
        self, rows: np.ndarray, actions: np.ndarray, substeps: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Execute an action [n, 7], or its first `substeps`, in each of `rows`; returns where the goal holds
        and where the world diverged."""
        substeps = SUBSTEPS if substeps is None else substeps
        batch, data, controller = self.batch, self.data, self.controller
        warned, grip = self._faults(rows), np.ascontiguousarray(actions[:, 6], np.float64)
        bad, placed = self.broken[rows], np.zeros(len(rows), bool)
        stepped = rows if len(rows) < self.size else None  # all of them: MuJoCo need not check which
        controller.aim(rows, data, actions)
        for substep in range(substeps):
            if substep == SEEN:
                self._see(rows)
            elif substep == FELT:
                self._feel(rows)
            controller.command(rows, data, grip, self.ctrl)
            if substep == substeps - 1:
                placed = self._judge(rows, Goal.placed)
            try:
                # positions and velocities of the new state are the next substep's first half
                batch.step(stepped, stage=_VEL)
            except SimulationError as error:
                bad |= np.isin(rows, error.ids)
        bad |= self._faults(rows) > warned
        holds = placed & self._judge(rows, Goal.joined) & ~bad
        if self.phase == "end":
            self._see(rows)
            self._feel(rows)
        return holds, bad

    def _faults(self, rows: np.ndarray) -> np.ndarray:
        """Count how often MuJoCo found a world's numbers bad, or had no room for its contacts: int [n]."""
        return self.batch.warning[rows][:, _FAULTS, 1].sum(-1)

    def judge(self, rows: np.ndarray) -> np.ndarray:
        """Tell where the goals hold, bool [n], as of the last forward pass."""
        return self._judge(rows, Goal.placed) & self._judge(rows, Goal.joined)

    def _judge(self, rows: np.ndarray, part: Callable[..., np.ndarray]) -> np.ndarray:
        names = [task.task for row in rows if (task := self.tasks[row]) is not None]
        holds = np.zeros(len(rows), bool)
        for name in dict.fromkeys(names):
            where = np.array([n == name for n in names])
            holds[where] = part(self._goals[name], self.data, rows[where], self._touching)
        return holds

    def _touching(self, row: int, geoms: np.ndarray, others: np.ndarray) -> bool:
        """Looks through a world's contacts, as the stock environment does.

        A contact sensor for each pair would answer the same, but at every substep, and would tie a scene to
        the tasks that were known when it was compiled.
        """
        self.batch.get_data(int(row), self._scratch)
        pairs = self._scratch.contact.geom
        one, two = np.isin(pairs, geoms), np.isin(pairs, others)
        return bool(((one[:, 0] & two[:, 1]) | (one[:, 1] & two[:, 0])).any())

    # --- what is observed -------------------------------------------------------------------------

    def _see(self, rows: np.ndarray) -> None:
        self.hand_position[rows] = self.data["site_xpos"][rows, self.arm.site]
        self.hand_quaternion[rows] = self.data["xquat"][rows, self.arm.hand]
        self.pose[rows] = self.data["qpos"][rows]

    def refresh(self, rows: np.ndarray) -> None:
        """Bring what is derived from positions and velocities up to date; an action does so itself."""
        self.batch.forward(rows, stage=_VEL)

    def body_poses(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the poses of a world's bodies in their parents' frames: positions, quaternions."""
        return self._position[row], self._quaternion[row]

    def _feel(self, rows: np.ndarray) -> None:
        self.fingers[rows] = self.data["qpos"][rows[:, None], self.arm.fingers]

    # --- saving -----------------------------------------------------------------------------------

    def _fields(self) -> dict[str, np.ndarray]:
        """List what is known of a world beside its physics, [B, …] each."""
        fields = {name: getattr(self.controller, name) for name in _CONTROL}
        fields |= {name: getattr(self, name) for name in _OWN}
        return fields if self._guide is None else fields | {"grasp": self._guide.grasp}

    def save(self, row: int) -> dict[str, np.ndarray]:
        """Return everything about a world that its task and initial state do not say."""
        saved = {name: field[row].copy() for name, field in self._fields().items()}
        return saved | {"physics": self.batch.state[row].copy()}

    def restore(self, row: int, task: TaskModel, initial_state: int, saved: dict[str, np.ndarray]) -> None:
        """Put a world into a saved state of the same task and initial state."""
        self.place(row, task, initial_state)
        self.batch.state[row] = saved["physics"]
        self.batch.forward([row], stage=_VEL)
        for name, field in self._fields().items():
            field[row] = saved[name]

    def spare(self, wanted: int) -> Group:
        """Return worlds of the same scene to try things in, as many as are wanted, or `TRIED`."""
        size = min(wanted, TRIED)
        if self._spare is None or self._spare.size < size:
            guided = self._guide is not None
            self._spare = Group(self.scene, size, self.phase, type(self.controller), guided=guided)
        return self._spare

    def copy(self, own: np.ndarray, other: Group, rows: np.ndarray) -> None:
        """Make the worlds in rows `own` those in `rows` of another group of this scene, which may come more
        than once."""
        for row, theirs in zip(own.tolist(), rows, strict=True):
            task = other.tasks[theirs]
            assert task is not None
            if self.tasks[row] is not task:
                self._assign(row, task)
        self._position[own], self._quaternion[own] = other._position[rows], other._quaternion[rows]
        self.batch.state[own] = other.batch.state[rows]
        for field, theirs in zip(self._fields().values(), other._fields().values(), strict=True):
            field[own] = theirs[rows]
        self.batch.forward(own, stage=_VEL)


@dataclass(frozen=True, slots=True)
class Place:
    """Place of a slot's world: its group and its row there."""

    group: Group
    row: int
    task: TaskModel
    initial_state: int


class LiberoWorlds:
    """Slots, each with a world of whatever scene its task takes place in."""

    def __init__(
        self,
        count: int,
        threads: int,
        *,
        wait: int,
        phase: Phase,
        scenes: int,
        guided: bool = False,
        on_drop: Callable[[str], None] = lambda scene: None,
    ) -> None:
        """`wait` actions pass before an episode begins. `scenes` scenes stay in memory though nothing runs in
        them; `on_drop` is called with the key of each that leaves. `guided` worlds can tell the way that is
        left."""
        self.places: list[Place | None] = [None] * count
        self._wait, self._kept, self._on_drop, self._guided = wait, scenes, on_drop, guided
        self._dropped: set[str] = set()
        self._warned = False
        self._phase: Phase = phase
        self._size = max(1, min(LARGEST_GROUP, -(-count // threads)))
        self._groups: dict[str, list[Group]] = {}
        self._tasks: dict[str, TaskModel] = {}
        self._settled: dict[tuple[str, int], dict[str, np.ndarray]] = {}
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="physics") if threads > 1 else None

    @property
    def scenes(self) -> tuple[str, ...]:
        """Keys of the scenes in memory, the one used last at the end."""
        return tuple(self._groups)

    def task(self, name: str) -> TaskModel:
        """A task's model, which stays in memory as long as its scene does."""
        if name not in self._tasks:
            self._tasks[name] = load_task(name)
        return self._tasks[name]

    def start(self, slots: Sequence[int], tasks: Sequence[str], initial_states: Sequence[int]) -> None:
        """Begin episodes: the initial state, then the wait, simulated once for each initial state."""
        self.release(slots)
        scenes = {(task := self.task(name)).scene.key: task for name in tasks}
        for key, count in Counter(self.task(name).scene.key for name in tasks).items():
            self._reserve(scenes[key], count, besides=scenes)
        states = list(zip(tasks, initial_states, strict=True))
        known = {state: self._settled[state] for state in states if state in self._settled}
        first: dict[tuple[str, int], int] = {}
        again = []
        for slot, state in zip(slots, states, strict=True):
            place = self._occupy(slot, *state)
            if state in known or state in first:
                again.append(place)
            else:
                place.group.start(place.row, place.task, place.initial_state)
                first[state] = slot
        for _ in range(self._wait if first else 0):
            self.run(list(first.values()), self._settle)
        for state, slot in first.items():
            place = self._place(slot)
            place.group.begin(place.row)
            known[state] = place.group.save(place.row)
        for place in again:
            saved = known[place.task.task, place.initial_state]
            place.group.restore(place.row, place.task, place.initial_state, saved)
        self._settled |= known
        for state in list(self._settled)[: max(0, len(self._settled) - SETTLED)]:
            del self._settled[state]

    def _settle(self, group: Group, slots: np.ndarray, rows: np.ndarray) -> None:
        _, diverged = group.act(rows, np.tile(WAIT_ACTION, (len(rows), 1)))
        group.broken[rows[diverged]] = True

    def release(self, slots: Sequence[int]) -> None:
        """Free the worlds of slots."""
        for slot in slots:
            if (place := self.places[slot]) is not None:
                place.group.tasks[place.row] = None
                self.places[slot] = None

    def _occupy(self, slot: int, name: str, initial_state: int) -> Place:
        """Find a world for a slot, and claim it."""
        task = self.task(name)
        self._reserve(task, 1, besides=(task.scene.key,))
        group = next(group for group in self._groups[task.scene.key] if group.free())
        row = group.free()[0]
        group.place(row, task, initial_state)
        place = self.places[slot] = Place(group, row, task, initial_state)
        return place

    def _reserve(self, task: TaskModel, wanted: int, besides: Container[str]) -> None:
        """See to it that so many worlds of a task's scene are free: groups grow before another is made. The
        scenes `besides` are not dropped for it."""
        key = task.scene.key
        groups = self._groups.pop(key, [])
        self._groups[key] = groups  # the scene that was used last is dropped last
        missing = wanted - sum(len(group.free()) for group in groups)
        if missing > 0 and not groups:
            self._warn_of_rebuilding(key)
            self._drop_idle_scenes(besides)
        while missing > 0:
            small = groups.pop() if groups and groups[-1].size < self._size else None
            before = small.size if small else 0
            size = min(self._size, max(before + missing, 2 * before))
            groups.append(group := Group(task.scene, size, self._phase, guided=self._guided))
            if small is not None:
                self._move(small, group)
            missing -= size - before

    def _move(self, old: Group, new: Group) -> None:
        """Put the worlds of a group into a larger one, to go on there as they would have."""
        rows = np.array([row for row, task in enumerate(old.tasks) if task is not None], int)
        if len(rows):
            new.copy(rows, old, rows)
        for slot, place in enumerate(self.places):
            if place is not None and place.group is old:
                self.places[slot] = replace(place, group=new)

    def _drop_idle_scenes(self, besides: Container[str]) -> None:
        idle = [
            key
            for key, groups in self._groups.items()
            if key not in besides and all(len(group.free()) == group.size for group in groups)
        ]
        for key in idle[: max(0, len(self._groups) - self._kept)]:
            del self._groups[key]
            self._dropped.add(key)
            self._tasks = {name: task for name, task in self._tasks.items() if task.scene.key != key}
            self._on_drop(key)

    def _warn_of_rebuilding(self, key: str) -> None:
        """Say once that a scene was dropped too early: building it takes longer than the episode's reset."""
        if key in self._dropped and not self._warned:
            self._warned = True
            played = len(self._dropped | self._groups.keys())
            warnings.warn(
                f"Scene {key} left memory and is built again, which makes resets slow: the tasks that are "
                f"played have {played} scenes or more, and env.scenes = "
                f"{self._kept} stay though nothing runs in them. If there is memory (0.1 GB each), set "
                f"--env.scenes {played}.",
                stacklevel=2,
            )

    def _place(self, slot: int) -> Place:
        place = self.places[slot]
        assert place is not None, f"slot {slot} idles"
        return place

    def run(
        self, slots: Sequence[int] | np.ndarray, work: Callable[[Group, np.ndarray, np.ndarray], None]
    ) -> None:
        """Call `work(group, slots, rows)` for each group that has worlds of `slots`, side by side."""
        parts: dict[int, tuple[Group, list[int], list[int]]] = {}
        for slot in slots:
            place = self._place(int(slot))
            _, own, rows = parts.setdefault(id(place.group), (place.group, [], []))
            own.append(int(slot))
            rows.append(place.row)
        # the longest first, so that the threads end together
        jobs = sorted(parts.values(), key=lambda part: -len(part[1]))
        calls = []
        for group, own, rows in jobs:
            order = np.argsort(rows)  # MuJoCo's batch wants them ascending
            calls.append((group, np.array(own)[order], np.array(rows)[order]))
        if self._pool is None or len(calls) == 1:
            for call in calls:
                work(*call)
        else:
            for done in [self._pool.submit(work, *call) for call in calls]:
                done.result()

    def observed(self, slots: Sequence[int]) -> np.ndarray:
        """Return the robot's state, float32 [n, 8], as published policies read it: the hand's position (m)
        and axis-angle (rad), the finger joints (m)."""
        state = np.zeros((len(slots), STATE_DIM))
        for i, slot in enumerate(slots):
            place = self._place(slot)
            group, row = place.group, place.row
            state[i] = [
                *group.hand_position[row],
                *axis_angle(group.hand_quaternion[row]),
                *group.fingers[row],
            ]
        return state.astype(np.float32)

    def save(self, slot: int) -> dict[str, np.ndarray]:
        """Return the state of a slot's world that its task and initial state do not determine."""
        place = self._place(slot)
        return place.group.save(place.row)

    def restore(self, slot: int, name: str, initial_state: int, saved: dict[str, np.ndarray]) -> None:
        """Put a slot's world into a state that `save` gave."""
        self.release([slot])
        place = self._occupy(slot, name, initial_state)
        place.group.restore(place.row, place.task, initial_state, saved)

    def close(self) -> None:
        """Stop the threads; harmless when called twice."""
        if self._pool is not None:
            self._pool.shutdown()
