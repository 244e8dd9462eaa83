"""ManiSkill's own tasks: their instructions, and what counts. Needs no simulator until one is made."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rove.config.schema import ManiSkillConfig
from rove.envs.base import TaskSuite
from rove.envs.chunked import Outcome
from rove.envs.maniskill import simulator
from rove.envs.maniskill.world import begin
from rove.errors import RoveError, nearest
from rove.types import ActionSpec, EpisodeSpec, Split

INSTRUCTIONS: dict[str, str] = {
    "PickCube-v1": "pick up the red cube and bring it to the green goal",
    "StackCube-v1": "stack the red cube on the green cube",
    "PushCube-v1": "push the blue cube to the goal in front of it",
    "PullCube-v1": "pull the blue cube to the goal behind it",
    "PokeCube-v1": "poke the cube to the goal with the peg",
    "LiftPegUpright-v1": "lift the peg and stand it upright",
    "PegInsertionSide-v1": "insert the peg into the hole in the side of the box",
    "PlugCharger-v1": "plug the charger into the receptacle",
    "PlaceSphere-v1": "place the blue sphere into the bin",
    "RollBall-v1": "roll the ball into the goal",
    "PullCubeTool-v1": "pull the cube closer with the tool",
    "StackPyramid-v1": "put the red cube next to the green cube and stack the blue cube on both",
    "PushT-v1": "push the T into its outline",
    "PickSingleYCB-v1": "pick up the object and bring it to the green goal",
    "TwoRobotPickCube-v1": "pick up the cube together and bring it to the goal",
    "PutCarrotOnPlateInScene-v1": "put carrot on plate",
    "PutSpoonOnTableClothInScene-v1": "put the spoon on the towel",
    "StackGreenCubeOnYellowCubeBakedTexInScene-v1": "stack the green block on the yellow block",
    "PutEggplantInBasketScene-v1": "put eggplant into yellow basket",
}
"""Tabletop tasks with their instruction; a further task of ManiSkill's has its name for one."""

HELD_OUT, TRAIN = 4096, 1 << 16
"""Number of seeds in each split."""

_POSE = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
_NAMES = {
    "pd_ee_delta_pose": _POSE,
    "pd_ee_target_delta_pose": _POSE,
    "pd_ee_delta_pos": (*_POSE[:3], "gripper"),
}


def instruction(task: str) -> str:
    """Return a task's instruction; one that is not in the table has the words of its name."""
    if task in INSTRUCTIONS:
        return INSTRUCTIONS[task]
    words = re.findall(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+", task.rpartition("-v")[0])
    return " ".join(words).lower()


class StockSuite(TaskSuite):
    """Tasks of ManiSkill's; an initial state is a seed."""

    name = "maniskill"
    variants: Mapping[str, str] = {}

    def __init__(self, tasks: Sequence[str]) -> None:
        self.tasks = tuple(tasks)
        sentences = " ".join(map(instruction, self.tasks)).lower()
        self.vocabulary = tuple(sorted(set(re.findall(r"\w+|[^\w\s]+", sentences))))

    @staticmethod
    def from_config(config: ManiSkillConfig) -> StockSuite:
        names = [name.strip() for name in config.tasks.split(",") if name.strip()]
        if not names or len(set(names)) != len(names):
            raise RoveError(f"env.tasks = {config.tasks!r}: task ids separated by commas, each once.")
        return StockSuite(names)

    def instruction(self, episode: EpisodeSpec) -> str:
        states = self.initial_states(episode.task, "train")
        if not 0 <= episode.initial_state < states.stop:
            raise RoveError(f"Initial state {episode.initial_state} is out of range 0..{states.stop - 1}.")
        if episode.variant != "none":
            raise RoveError(f"Suite {self.name!r} has no variant {episode.variant!r}; use 'none'.")
        return instruction(episode.task)

    def initial_states(self, task: str, split: Split) -> range:
        if task not in self.tasks:
            raise RoveError(f"Unknown task {task!r}. {nearest(task, self.tasks)}")
        return range(HELD_OUT) if split == "held_out" else range(HELD_OUT, HELD_OUT + TRAIN)


def action_spec(config: ManiSkillConfig, env: Any) -> ActionSpec:
    """Describe the actions as the environment's control mode says."""
    space = env.single_action_space
    mode, size = env.control_mode, space.shape[0]
    names = _NAMES.get(mode, ())
    if len(names) != size:
        names = tuple(f"action {i}" for i in range(size))
    control = "delta" if "delta" in mode else "absolute"
    low, high = (tuple(float(x) for x in side) for side in (space.low, space.high))
    return ActionSpec(names, ("1",) * size, low, high, control=control)


class StockTask:
    """One of ManiSkill's own tasks, a `world.ManiSkillTask`."""

    pointers = 0

    def __init__(self, config: ManiSkillConfig, task: str, gpu: int | None) -> None:
        """Nothing is simulated before `make`; for `gpu` see `simulator.backends`."""
        self.config, self.id, self._gpu = config, task, gpu
        self._potential: Tensor | None = None

    @property
    def image(self) -> tuple[int, ...]:
        return len(self._cameras), self.config.image_size, self.config.image_size, 3

    def make(self, num_envs: int) -> Any:
        simulator.load()
        from mani_skill.utils.registration import REGISTERED_ENVS

        if self.id not in REGISTERED_ENVS:
            raise RoveError(f"ManiSkill has no task {self.id!r}. {nearest(self.id, REGISTERED_ENVS)}")
        registered = REGISTERED_ENVS[self.id]
        config = self.config
        sim, render = simulator.backends(config, self._gpu)
        size = {"width": config.image_size, "height": config.image_size}
        options, both = dict(registered.default_kwargs), "rgb+segmentation"
        try:
            env = simulator.make(
                registered.cls,
                **options
                | {
                    "num_envs": num_envs,
                    "obs_mode": both if both in registered.cls.SUPPORTED_OBS_MODES else "rgb",
                    "control_mode": config.control_mode,
                    "sim_backend": sim,
                    "render_backend": render,
                    "sensor_configs": size,
                },
            )
        except (AssertionError, KeyError) as error:
            raise RoveError(
                f"env.control_mode = {config.control_mode!r} is none of {self.id}'s robot: {error}. "
                "Usual ones: pd_ee_delta_pose, pd_ee_delta_pos, pd_joint_delta_pos."
            ) from error
        there = list(env.scene.sensors)
        if unknown := [name for name in config.cameras if name not in there]:
            raise RoveError(f"{self.id} has no camera {unknown[0]!r}. {nearest(unknown[0], there)}")
        self._cameras = config.cameras or tuple(there)
        return env

    def start(self, env: Any, rows: Sequence[int], episodes: Sequence[EpisodeSpec]) -> None:
        begin(env, rows, [episode.initial_state for episode in episodes], {})
        if self.config.reward == "shaped":
            now = self._dense(env, torch.zeros(env.num_envs, *env.single_action_space.shape), env.get_info())
            if self._potential is None:
                self._potential = now
            self._potential[list(rows)] = now[list(rows)]

    def outcome(self, env: Any, action: Tensor, info: dict[str, Any]) -> Outcome:
        success = _flags(info, "success", env.num_envs)
        failed = _flags(info, "fail", env.num_envs) & ~success
        reward = success.astype(np.float64)
        if self.config.reward == "shaped":
            now = self._dense(env, action, info)
            assert self._potential is not None
            reward += (now - self._potential).cpu().numpy()
            self._potential = now
        return Outcome(reward, success, success | failed)

    def _dense(self, env: Any, action: Tensor, info: dict[str, Any]) -> Tensor:
        try:
            return env.compute_normalized_dense_reward(
                obs=None, action=action.to(env.device), info=info
            ).float()
        except NotImplementedError:
            raise RoveError(f"{self.id} has no dense reward: set --env.reward sparse.") from None

    def frames(self, env: Any, rows: Sequence[int]) -> Tensor:
        seen = env._get_obs_sensor_data()
        return torch.stack([seen[name]["rgb"][list(rows)].cpu() for name in self._cameras], dim=1)

    def points(self, env: Any, rows: Sequence[int]) -> Tensor:
        return torch.zeros(len(rows), 0, 2)

    def expert(self, env: Any, row: int, spec: EpisodeSpec, elapsed: int) -> tuple[np.ndarray, np.ndarray]:
        from rove.envs.maniskill import experts

        return experts.stock(self.id, env, row, elapsed)


def _flags(info: dict[str, Any], name: str, count: int) -> np.ndarray:
    """Return a flag of each row, bool [count]; False where the task does not say."""
    return info[name].cpu().numpy().astype(bool) if name in info else np.zeros(count, bool)
