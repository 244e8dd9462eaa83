"""The put-on-plate task as worlds see it, a `rove.envs.maniskill.world.ManiSkillTask`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rove.config.schema import PutOnPlateConfig
from rove.envs import conventions
from rove.envs.chunked import Outcome
from rove.envs.maniskill import assets, simulator
from rove.envs.maniskill.put_on_plate import overlay, progress
from rove.envs.maniskill.put_on_plate.suite import PutOnPlateSuite
from rove.envs.maniskill.world import begin
from rove.errors import RoveError
from rove.types import ActionSpec, EpisodeSpec

ACTION_SPEC: ActionSpec = conventions.of(PutOnPlateSuite.name).action_spec


class PlateTask:
    """Every published environment: scenes differ, the simulation does not."""

    def __init__(self, config: PutOnPlateConfig, gpu: int | None) -> None:
        """Nothing is simulated before `make`; for `gpu` see `simulator.backends`."""
        self.config, self.suite, self._gpu = config, PutOnPlateSuite.from_config(config), gpu
        size = (config.image_size, config.image_size)
        self.size = (overlay.HEIGHT, overlay.WIDTH) if config.full_frame else size
        self.image, self.pointers = (1, *self.size, 3), 3
        self._potential = np.zeros(0)

    def make(self, num_envs: int) -> Any:
        folder = assets.data()
        simulator.load()
        from rove.envs.maniskill.put_on_plate.task import PutOnPlate

        sim, render = simulator.backends(self.config, self._gpu)
        if self.config.settle and num_envs > 1:
            raise RoveError("env.settle = true cannot reset one world of a shared simulation: use physx_cpu.")
        self._potential = np.zeros(num_envs)
        height, width = self.size
        return simulator.make(
            PutOnPlate,
            data=folder,
            height=height,
            width=width,
            settle=self.config.settle,
            sim_config={"sim_freq": self.config.sim_freq},
            num_envs=num_envs,
            sim_backend=sim,
            render_backend=render,
        )

    def start(self, env: Any, rows: Sequence[int], episodes: Sequence[EpisodeSpec]) -> None:
        scenes = [self.suite.scene(episode) for episode in episodes]
        begin(env, rows, None, {"scenes": scenes})
        self._potential[list(rows)] = 0.0
        if self.config.reward == "dense":
            nothing = torch.zeros(env.num_envs, dtype=torch.bool, device=env.device)
            first = progress.dense_potential(env.way_left(nothing), nothing)
            self._potential[list(rows)] = first.cpu().numpy()[list(rows)]

    def outcome(self, env: Any, action: Tensor, info: dict[str, Any]) -> Outcome:
        potential = env.count(info)  # in any case: it keeps the statistics
        if self.config.reward == "sparse":
            potential = info["success"]
        elif self.config.reward == "dense":
            potential = progress.dense_potential(env.way_left(info["is_grasped"]), info["success"])
        potential = potential.cpu().numpy().astype(np.float64)
        success = info["success"].cpu().numpy()
        reward, self._potential = potential - self._potential, potential
        return Outcome(reward, success, success & self.config.terminate)

    def frames(self, env: Any, rows: Sequence[int]) -> Tensor:
        return env.frames(list(rows))[:, None]

    def points(self, env: Any, rows: Sequence[int]) -> Tensor:
        return env.points(rows)

    def expert(self, env: Any, row: int, spec: EpisodeSpec, elapsed: int) -> tuple[np.ndarray, np.ndarray]:
        from rove.envs.maniskill.put_on_plate import expert

        return expert.action(env, row, elapsed)
