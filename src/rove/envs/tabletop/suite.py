"""The suite that enumerates the tabletop tasks, and says what could be asked for in a scene."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from rove.config.schema import TabletopConfig
from rove.envs.base import TaskSuite
from rove.envs.tabletop.layout import Layout
from rove.envs.tabletop.scene import HALF_HEIGHT
from rove.envs.tabletop.tasks import (
    DESTINATIONS,
    FAMILIES,
    GENERIC_NOUNS,
    INITIAL_STATES,
    TASK_SETS,
    TEMPLATES,
    TRAIN_TASKS,
    UNSEEN_TASKS,
    VARIANTS,
    instruction_of,
    parse,
    sentence,
    vocabulary_words,
)
from rove.errors import RoveError, nearest
from rove.types import EpisodeSpec, Split


class TabletopSuite(TaskSuite):
    """The tasks that a `TabletopConfig` selects; see `rove.envs.base.TaskSuite`."""

    name = "tabletop"
    variants: Mapping[str, str] = VARIANTS
    vocabulary: tuple[str, ...] = vocabulary_words()
    """Every word that an instruction of the suite can contain, sorted."""

    def __init__(self, tasks: tuple[str, ...]) -> None:
        self.tasks = tasks

    @classmethod
    def from_config(cls, config: TabletopConfig) -> TabletopSuite:
        """Select the tasks of a named set, or of task ids separated by commas; ValueError where one does not
        exist."""
        if config.tasks in TASK_SETS:
            return cls(TASK_SETS[config.tasks])
        names = tuple(name.strip() for name in config.tasks.split(","))
        for name in names:
            if "/" not in name:
                known = (*TASK_SETS, *TRAIN_TASKS, *UNSEEN_TASKS)
                raise RoveError(f"Unknown task or task set {name!r}. {nearest(name, known)}")
            parse(name)
        return cls(tuple(dict.fromkeys(names)))

    def instruction(self, episode: EpisodeSpec) -> str:
        """The instruction of an episode, a function of its task, initial state and variant."""
        return instruction_of(episode.task, episode.initial_state, episode.variant)

    def requests(
        self,
        scene: Layout,
        places: np.ndarray,
        count: int,
        rng: np.random.Generator,
        carried: tuple[int, int] | None = None,
    ) -> list[tuple[str, np.ndarray]]:
        """Draw things that could be asked for in a scene whose objects have come to `places` [OBJECTS, 3]:
        `count` random instructions, of all families alike, and where the object and its destination (NaN
        without one) are, [2, 3] metres. No held-out tasks.

        `carried`: see `TabletopWorlds.catch_in_the_act`. Half of the instructions then are to put it there:
        it is then that an episode shows such a picture.
        """
        objects = list(zip(scene.objects, places, strict=True))
        receptacles = [
            (thing, np.array([*xy, 0.0]))
            for thing, xy in zip(scene.receptacles, scene.receptacle_xy, strict=True)
        ]
        supports = [(thing, at + np.array([0.0, 0.0, HALF_HEIGHT])) for thing, at in objects]
        found: list[tuple[str, np.ndarray]] = []
        while len(found) < count:
            family = FAMILIES[rng.integers(len(FAMILIES))]
            target, at = objects[rng.integers(len(objects))]
            around = supports if family == "stack" else receptacles
            if carried and rng.random() < 0.5:
                target, at = objects[carried[0]]
                family = "stack" if carried[1] < len(supports) else "put"
                around = [(supports + receptacles)[carried[1]]]
            valid = DESTINATIONS.get(family, {}).values()
            goals = [(d, p) for d, p in around if d in valid and d != target]
            goal, there = goals[rng.integers(len(goals))] if goals else (None, np.full(3, np.nan))
            names = [family, *(f"{thing.color}_{thing.kind}" for thing in (target, goal) if thing)]
            if (goal is None) != (family == "pick") or "/".join(names) in UNSEEN_TASKS:
                continue
            template = TEMPLATES[family][rng.integers(len(TEMPLATES[family]))]
            noun = (*GENERIC_NOUNS, target.kind, target.kind)[rng.integers(4)]
            found.append((sentence(template, target, noun, goal), np.stack([at, there])))
        return found

    def initial_states(self, task: str, split: Split) -> range:
        """Return the ids of 4,096 train states, or of 256 held-out ones, the same for every task."""
        parse(task)
        if split not in INITIAL_STATES:
            raise RoveError(f"Unknown split {split!r}. {nearest(split, INITIAL_STATES)}")
        return INITIAL_STATES[split]
