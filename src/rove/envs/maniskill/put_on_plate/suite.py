"""The put-on-plate benchmark as a suite: the published training task, and its shifted variants."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from rove.config.schema import PutOnPlateConfig
from rove.envs.base import TaskSuite
from rove.envs.maniskill.put_on_plate import catalog
from rove.envs.maniskill.put_on_plate.families import PlateScene, Space, family_of
from rove.errors import RoveError, nearest
from rove.types import EpisodeSpec, Split

VARIANTS: dict[str, tuple[str, str]] = {
    "unseen_table": ("vision", "VisionImage-v1:test"),
    "texture_weak": ("vision", "VisionTexture03-v1:test"),
    "texture_strong": ("vision", "VisionTexture05-v1:test"),
    "noise_weak": ("vision", "VisionWhole03-v1:test"),
    "noise_strong": ("vision", "VisionWhole05-v1:test"),
    "unseen_object": ("semantics", "Carrot-v1:test"),
    "unseen_receptacle": ("semantics", "Plate-v1:test"),
    "unseen_instruction": ("semantics", "Instruct-v1:test"),
    "two_objects_seen": ("semantics", "MultiCarrot-v1:train"),
    "two_objects_unseen": ("semantics", "MultiCarrot-v1:test"),
    "distracting_receptacle": ("semantics", "MultiPlate-v1:train"),
    "two_receptacles_unseen": ("semantics", "MultiPlate-v1:test"),
    "position": ("execution", "Position-v1:test"),
    "robot_pose": ("execution", "EEPose-v1:test"),
    "object_moved": ("execution", "PositionChangeTo-v1:test"),
}
"""Variant -> axis and environment. Thirteen are test splits; the two "train" ones belong to the published
tables too. Of the published runs the sixteenth, "Carrot-v1:train", is "Main-v3:train" under another name."""

_HELD_OUT = 8192

PUBLISHED_SUCCESS: dict[str, dict[str, float]] = {
    "RL4VLA SFT": {
        "in distribution": 78.1,
        "unseen_table": 71.9,
        "texture_weak": 71.9,
        "texture_strong": 55.7,
        "noise_weak": 70.8,
        "noise_strong": 50.5,
        "unseen_object": 45.3,
        "unseen_receptacle": 61.5,
        "unseen_instruction": 67.2,
        "two_objects_seen": 61.5,
        "two_objects_unseen": 29.7,
        "distracting_receptacle": 67.2,
        "two_receptacles_unseen": 45.8,
        "position": 56.8,
        "robot_pose": 33.9,
        "object_moved": 28.6,
    },
    "RL4VLA PPO": {
        "in distribution": 93.8,
        "unseen_table": 84.4,
        "texture_weak": 83.3,
        "texture_strong": 63.0,
        "noise_weak": 85.4,
        "noise_strong": 66.7,
        "unseen_object": 71.4,
        "unseen_receptacle": 75.0,
        "unseen_instruction": 89.1,
        "two_objects_seen": 75.0,
        "two_objects_unseen": 57.8,
        "distracting_receptacle": 81.2,
        "two_receptacles_unseen": 59.9,
        "position": 80.7,
        "robot_pose": 79.7,
        "object_moved": 74.5,
    },
    "RLinf PPO OpenVLA": {"in distribution": 96.1, "shifted": 81.9},
    "RLinf PPO OFT": {"in distribution": 97.7, "shifted": 77.1},
    "RLinf GRPO OFT": {"in distribution": 94.1, "shifted": 60.6},
}
"""Success in percent, as published. RL4VLA (Liu et al. 2025, "What Can RL Bring to VLA Generalization?"):
at the end of an episode; RLinf-VLA (2025): at any time; the latter gives the mean of the axes."""


class PutOnPlateSuite(TaskSuite):
    """Tasks are published environments, e.g. "PutOnPlateInScene25Main-v3"; variants replace the environment.

    An initial state is a place in the seeded order of an environment's ids (`Space`).
    """

    name = "maniskill_put_on_plate"
    variants: Mapping[str, str] = {name: axis for name, (axis, _) in VARIANTS.items()}
    published_success = PUBLISHED_SUCCESS

    def __init__(
        self,
        tasks: tuple[str, ...],
        objects: tuple[int, ...] = (),
        tables: tuple[int, ...] = (),
        settle: bool = False,
    ) -> None:
        self.vocabulary = catalog.vocabulary()
        self._limits = (objects, tables, settle)
        self.tasks = tuple(self._task_id(task) for task in tasks)
        self._spaces = cache(self._space)

    @staticmethod
    def from_config(config: PutOnPlateConfig) -> PutOnPlateSuite:
        names = tuple(name.strip() for name in config.tasks.split(",") if name.strip())
        if not names or len(set(names)) != len(names):
            raise RoveError(f"env.tasks = {config.tasks!r}: task ids separated by commas, each once.")
        for name, chosen, size in (
            ("objects", config.objects, 25),
            ("tables", config.tables, catalog.TABLES),
        ):
            if bad := [i for i in chosen if not 0 <= i < size]:
                raise RoveError(f"env.{name} = {bad[0]}: expected numbers 0..{size - 1}.")
        if config.sim_freq <= 0 or config.sim_freq % 5:
            raise RoveError(f"env.sim_freq = {config.sim_freq}: expected a multiple of 5 (published: 500).")
        return PutOnPlateSuite(names, config.objects, config.tables, config.settle)

    @staticmethod
    def _task_id(name: str) -> str:
        family, split = family_of(name)
        return family.id if split == "train" else f"{family.id}:{split}"

    def _space(self, task: str) -> Space:
        return Space(*family_of(task), *self._limits)

    def space(self, episode: EpisodeSpec) -> Space:
        """Return the episodes among which this one is. Raises RoveError on an unknown task or variant."""
        if episode.task not in self.tasks:
            raise RoveError(f"Unknown task {episode.task!r}. {nearest(episode.task, self.tasks)}")
        if episode.variant == "none":
            return self._spaces(episode.task)
        if episode.variant not in VARIANTS:
            raise RoveError(
                f"Unknown variant {episode.variant!r}. {nearest(episode.variant, ('none', *VARIANTS))}"
            )
        return self._spaces(VARIANTS[episode.variant][1])

    def scene(self, episode: EpisodeSpec) -> PlateScene:
        """Return the start state of an episode. Raises RoveError where the initial state is out of range."""
        return self.space(episode).scene(episode.initial_state)

    def instruction(self, episode: EpisodeSpec) -> str:
        return self.scene(episode).instruction

    def initial_states(self, task: str, split: Split) -> range:
        if task not in self.tasks:
            raise RoveError(f"Unknown task {task!r}. {nearest(task, self.tasks)}")
        total = len(self._spaces(task))
        held_out = min(_HELD_OUT, total // 8)
        return range(held_out) if split == "held_out" else range(held_out, total)
