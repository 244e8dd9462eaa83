"""Expert demonstrations: what the policy would have seen at each chunk, and what the expert did then."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rove.envs.base import Demonstrator, VectorEnv
from rove.errors import RoveError
from rove.rollout.sampler import EpisodeSampler
from rove.types import Observation


@dataclass(frozen=True, slots=True, eq=False)
class Demonstrations:
    """N chunks of successful expert episodes."""

    images: Tensor
    """uint8 [N, n, H, W, 3], at the beginning of the chunk."""
    instruction: tuple[str, ...]
    task: tuple[str, ...]
    actions: Tensor
    """float32 [N, C, A], as executed, in the environment's units."""
    mask: Tensor
    """bool [N, C]: executed."""

    def __len__(self) -> int:
        return len(self.actions)

    def observation(self) -> Observation:
        """What the policy sees, N rows."""
        return Observation(self.images, self.instruction)

    def statistics(self) -> dict[str, list[float]]:
        """Per action dimension, over executed actions: q01, q99, min, max, mean, std."""
        executed = self.actions[self.mask].double().numpy()
        found = {
            "q01": np.quantile(executed, 0.01, axis=0),
            "q99": np.quantile(executed, 0.99, axis=0),
            "min": executed.min(0),
            "max": executed.max(0),
            "mean": executed.mean(0),
            "std": executed.std(0),
        }
        return {name: values.tolist() for name, values in found.items()}

    def save(self, path: Path) -> None:
        """Write one compressed file; nothing in it can run code."""
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.draft.npz")
        np.savez_compressed(
            draft,
            images=self.images.numpy(),
            actions=self.actions.numpy(),
            mask=self.mask.numpy(),
            instruction=np.array(self.instruction),
            task=np.array(self.task),
        )
        draft.rename(path)

    @staticmethod
    def load(path: Path) -> Demonstrations:
        """Read what `save` wrote; RoveError where it is something else."""
        with np.load(path, allow_pickle=False) as file:
            if missing := {"images", "actions", "mask", "instruction", "task"} - set(file.files):
                raise RoveError(f"{path} is not a demonstration file: it lacks {', '.join(sorted(missing))}.")
            return Demonstrations(
                torch.from_numpy(file["images"]),
                tuple(file["instruction"].tolist()),
                tuple(file["task"].tolist()),
                torch.from_numpy(file["actions"]),
                torch.from_numpy(file["mask"]),
            )


def collect(
    env: VectorEnv,
    *,
    episodes: int,
    noise: float,
    seed: int,
    on_episode: Callable[[], None] = lambda: None,
) -> Demonstrations:
    """The first `episodes` successes of the environment's scripted expert on train states, failures left out.

    `noise`: see `Demonstrator.step_expert_chunk`. Raises RoveError where the suite has no expert, or where it
    fails more than half of the time.
    """
    if not isinstance(env, Demonstrator):
        raise RoveError(f"Suite {env.suite.name!r} has no scripted expert; bring demonstrations in a file.")
    sampler, generator = EpisodeSampler(env.suite, seed), np.random.default_rng(seed)
    pending: dict[int, list[tuple]] = defaultdict(list)
    rows: list[tuple] = []
    successes = failures = 0
    observation = env.reset(sampler.take(env.num_envs))
    while successes < episodes:
        env.enqueue(sampler.take(max(0, env.num_envs - env.queued)))
        specs = env.specs
        actions, result = env.step_expert_chunk(noise, generator)
        for slot, spec in enumerate(specs):
            assert spec is not None
            seen = (observation.images[slot], observation.instruction[slot], spec.task)
            pending[slot].append((*seen, actions[slot], result.executed[slot]))
        for record in result.finished:
            chunks = pending.pop(record.slot)
            failures += not record.success
            if record.success and successes < episodes:
                successes += 1
                rows += chunks
                on_episode()
        if failures > max(successes, env.num_envs):
            raise RoveError(
                f"The expert of {env.suite.name!r} fails too often ({failures} of {failures + successes} episodes). "
                "Lower sft.noise, or look at the tasks."
            )
        observation = result.observation
    images, instruction, task, actions, mask = zip(*rows, strict=True)
    return Demonstrations(
        torch.stack(images), tuple(instruction), tuple(task), torch.stack(actions), torch.stack(mask)
    )
