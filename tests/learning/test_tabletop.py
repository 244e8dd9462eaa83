"""The built-in suite cannot be solved without reading the instruction, nor without looking at the picture."""

from contextlib import closing
from dataclasses import replace

import pytest
import torch

from rove import host, recipes
from rove.envs import registry as envs
from rove.envs.tabletop.tasks import OBJECT_COLORS
from rove.evaluation.evaluate import episodes, evaluate
from rove.policies import registry as policies
from rove.reporting.log import Logger
from rove.reporting.progress import Progress
from rove.training.sft import warm_up
from rove.types import Observation

EPISODES = 128
DEMO = recipes.get("demo").build()
RUN = replace(
    DEMO,
    env=replace(DEMO.env, tasks="pick/red_cube,pick/blue_brick,pick/green_cylinder"),
    rollout=replace(DEMO.rollout, emphasis=()),
    sft=replace(DEMO.sft, emphasis=()),
)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """The demo's policy, warmed up for its easiest tasks, so that there is something to lose."""
    optim = replace(RUN.sft.optim, muon_lr=0.02)
    sft = replace(RUN.sft, episodes=240, steps=150, grounding=8000, grounding_steps=600, optim=optim)
    run = replace(RUN, sft=sft)
    directory = tmp_path_factory.mktemp("tabletop")
    host.prepare(1)
    with Logger(directory, tensorboard=False, wandb=False) as log, Progress("test", 1) as progress:
        return policies.load(warm_up(run, directory, log, progress))


class Misled:
    """A policy that is told or shown something else than what is."""

    def __init__(self, policy, change):
        self.policy, self.change = policy, change
        self.chunk, self.action_spec = policy.chunk, policy.action_spec

    def act(self, observation, mode, noise=None):
        return self.policy.act(self.change(observation), mode, noise)


def another_object(observation: Observation) -> Observation:
    """Ask for the next colour in place of the first that is named, the object's."""

    def change(text: str) -> str:
        words = text.split()
        place = next(i for i, word in enumerate(words) if word in OBJECT_COLORS)
        words[place] = OBJECT_COLORS[(OBJECT_COLORS.index(words[place]) + 1) % len(OBJECT_COLORS)]
        return " ".join(words)

    return replace(observation, instruction=tuple(map(change, observation.instruction)))


def darkness(observation: Observation) -> Observation:
    return replace(observation, images=torch.zeros_like(observation.images))


def success(policy, change=lambda observation: observation) -> float:
    with closing(envs.make(RUN.env, num_envs=64, chunk=policy.chunk, autoreset="refill")) as worlds:
        report = evaluate(worlds, Misled(policy, change), episodes(worlds.suite, EPISODES))
    return sum(record.success for record in report.records) / EPISODES


def test_the_wrong_instruction_fails_and_so_does_a_black_picture(policy):
    assert success(policy) >= 0.4
    assert success(policy, another_object) <= 0.1
    assert success(policy, darkness) <= 0.1
