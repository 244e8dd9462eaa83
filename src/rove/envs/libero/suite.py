"""LIBERO's suites: their tasks, instructions and initial states. Runs no simulation."""

from __future__ import annotations

from collections.abc import Mapping

from rove.config.schema import LiberoConfig
from rove.envs.base import TaskSuite
from rove.envs.libero import package
from rove.errors import RoveError, nearest
from rove.types import EpisodeSpec, Split

TRAIN = 0.8
"""Share of a task's initial states, from the first on, that RL may see under protocol "split": 40 of 50."""
GENERATED = 2**31
"""Initial states of a task under protocol "generated": those after the published ones are drawn anew."""
WIDE = 2**32
"""Initial states under protocol "generated_wide", which trains on those from `GENERATED` on."""
VARIED = ("object", "goal", "10", "90")
"""Folders of tasks that stay what they are when things lie anywhere: in `spatial` the instruction tells a
bowl by what stands about it."""
HORIZONS = {"spatial": 240, "object": 240, "goal": 320, "10": 512, "90": 512}
"""Actions of an episode, by the suite's first word; see `LiberoConfig.horizon`."""
VARIANTS = {"object": "vision", "swap": "execution", "lan": "semantics", "task": "semantics"}
"""LIBERO-PRO's perturbations of a task, by what they change: how its object looks, where things stand, how
the instruction is worded, and what is asked for."""
REWORDED = ("lan", "task")
"""Perturbations that change the instruction."""


def chosen(tasks: str) -> tuple[str, ...]:
    """List the task ids of suites and ids separated by commas. Raises RoveError on an unknown one."""
    found: list[str] = []
    for word in tasks.split(","):
        if "/" in word:
            package.bddl(word)
            found.append(word)
        else:
            for folder in package.SUITES.get(word, (word,)):
                found.extend(package.tasks(folder))
    return tuple(dict.fromkeys(found))


def horizon(tasks: str) -> int:
    """Return the published number of actions of the longest of these tasks."""
    folders = {task.partition("/")[0].partition("_")[0] for task in chosen(tasks)}
    return max(HORIZONS.get(folder, max(HORIZONS.values())) for folder in folders)


def perturbed(task: str, variant: str) -> str:
    """The id of a task's variant."""
    if variant == "none":
        return task
    folder, _, name = task.partition("/")
    return f"{folder}_{variant}/{name}"


def _exists(task: str) -> bool:
    folder = task.partition("/")[0]
    return folder in package.folders() and task in package.tasks(folder)


class LiberoSuite(TaskSuite):
    """The tasks of a configuration; see `rove.envs.base.TaskSuite`."""

    def __init__(self, config: LiberoConfig) -> None:
        self.name = f"libero:{config.tasks}"
        self.tasks = chosen(config.tasks)
        self._protocol = config.protocol
        fixed = [task for task in self.tasks if task.partition("/")[0] not in VARIED]
        if fixed and config.protocol == "generated_wide":
            raise RoveError(
                f"env.protocol = 'generated_wide' puts things anywhere, which {fixed[0]!r} does not allow: "
                "in spatial the instruction tells a bowl by what stands about it, and LIBERO-PRO's sets are "
                "there to be evaluated on. Choose among "
                f"{', '.join(VARIED)}, or set --env.protocol generated."
            )
        self.variants: Mapping[str, str] = {
            name: axis
            for name, axis in VARIANTS.items()
            if all(_exists(perturbed(task, name)) for task in self.tasks)
        }
        """Those that every task of the suite has."""
        texts = [self._text(task, variant) for task in self.tasks for variant in ("none", *self.variants)]
        self.vocabulary = tuple(sorted({word for text in texts for word in text.split()}))

    def _text(self, task: str, variant: str) -> str:
        told = perturbed(task, variant)
        # A perturbed set may also be chosen as the suite itself: "goal_lan", or a task of it.
        if told.partition("/")[0].partition("_")[2] in REWORDED:
            return package.written_instruction(told).lower()
        return package.published_instruction(told)

    def instruction(self, episode: EpisodeSpec) -> str:
        if episode.task not in self.tasks:
            raise RoveError(f"{self.name} has no task {episode.task!r}. {nearest(episode.task, self.tasks)}")
        known = ("none", *self.variants)
        if episode.variant not in known:
            raise RoveError(
                f"Unknown variant {episode.variant!r} of {self.name}. {nearest(episode.variant, known)}"
            )
        states = len(package.initial_states(perturbed(episode.task, episode.variant)))
        states = {"generated": GENERATED, "generated_wide": WIDE}.get(self._protocol, states)
        if not 0 <= episode.initial_state < states:
            raise RoveError(
                f"{episode.task} has the initial states 0 to {states - 1}, not {episode.initial_state}."
            )
        return self._text(episode.task, episode.variant)

    def initial_states(self, task: str, split: Split) -> range:
        if task not in self.tasks:
            raise RoveError(f"{self.name} has no task {task!r}. {nearest(task, self.tasks)}")
        states = len(package.initial_states(task))
        if self._protocol == "published":
            return range(states)
        if self._protocol == "generated":
            return range(states, GENERATED) if split == "train" else range(states)
        if self._protocol == "generated_wide":
            return range(GENERATED, WIDE) if split == "train" else range(states)
        train = round(TRAIN * states)
        return range(train) if split == "train" else range(train, states)
