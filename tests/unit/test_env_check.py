"""The contract check itself: an environment that keeps it passes, and each breach is caught by its rule."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from tests.point_env import PointEnv, PointSuite

from rove.envs.base import Brancher, Corrector, VectorEnv
from rove.testing.check import CHECKS, check_env
from rove.testing.playthrough import Envs
from rove.types import EpisodeSpec


class VariantCalledNone(PointEnv):
    def __init__(self, *args):
        super().__init__(*args)
        self.suite = PointSuite()
        self.suite.variants = {"none": "vision"}


class PublishedIsAFlag(PointEnv):
    def __init__(self, *args):
        super().__init__(*args)
        self.suite = PointSuite()
        self.suite.published_success = True


class OverlappingSplits(PointEnv):
    def __init__(self, *args):
        super().__init__(*args)
        self.suite = PointSuite()
        self.suite.initial_states = lambda task, split: (
            range(30) if PointSuite().initial_states(task, split)[0] == 0 else range(29, 60)
        )


class HeldOutLooksLikeTrain(PointEnv):
    def start(self, slot, episode):
        super().start(slot, replace(episode, initial_state=episode.initial_state % 1000))
        self.spec[slot] = episode


class DoubleRewards(PointEnv):
    def step_chunk(self, actions):
        result = super().step_chunk(actions)
        return replace(result, reward=result.reward.double())


class WrongInstruction(PointEnv):
    def observe(self, slots):
        return replace(super().observe(slots), instruction=("do something",) * len(slots))


class GoesOnAfterAnEnd(PointEnv):
    def step_chunk(self, actions):
        running = torch.tensor([spec is not None for spec in self.spec])
        result = super().step_chunk(actions)
        return replace(result, executed=running[:, None].expand_as(result.executed).clone())


class RewardAfterAnEnd(PointEnv):
    def step_chunk(self, actions):
        result = super().step_chunk(actions)
        return replace(result, reward=result.reward - 0.01 * (~result.executed).float())


class TruncationIsTermination(PointEnv):
    def step_chunk(self, actions):
        result = super().step_chunk(actions)
        return replace(result, terminated=result.terminated | result.truncated)


class FinalObservationOfTheNextEpisode(PointEnv):
    def step_chunk(self, actions):
        result = super().step_chunk(actions)
        if result.final_observation is None:
            return result
        following = ("move sideways",) * len(result.final_slots)
        return replace(result, final_observation=replace(result.final_observation, instruction=following))


class LengthIsTheHorizon(PointEnv):
    def conclude(self, *args):
        return replace(super().conclude(*args), length=self.horizon)


class RewardForgotten(PointEnv):
    def conclude(self, *args):
        return replace(super().conclude(*args), total_reward=-1.0)


class ElapsedIsOneAhead(PointEnv):
    @property
    def elapsed(self):
        return torch.tensor(self.steps) + 1


class RefillsUnderStop(PointEnv):
    def follow(self, slot):
        spec = self.spec[slot]
        super().follow(slot)
        if self.autoreset == "stop":
            self.start(slot, spec)


class NeverRefills(PointEnv):
    def follow(self, slot):
        self.spec[slot] = None


class RefillKeepsThePosition(PointEnv):
    def follow(self, slot):
        x = self.x[slot]
        super().follow(slot)
        self.x[slot] = x


class DependsOnTheSlot(PointEnv):
    def execute(self, slot, push):
        return super().execute(slot, push * (1 - 0.01 * slot))


class DependsOnTheNeighbours(PointEnv):
    def execute(self, slot, push):
        return super().execute(slot, push * (1 - 0.01 * self.specs.count(None)))


class ForgetsTheQueue(PointEnv):
    def state_dict(self):
        return super().state_dict() | {"waiting": []}


class ForgetsThePosition(PointEnv):
    def state_dict(self):
        return super().state_dict() | {"x": [0.0] * self.num_envs}


class StateHoldsObjects(PointEnv):
    def state_dict(self):
        return super().state_dict() | {"spec": self.spec}


class ResetDisturbsOthers(PointEnv):
    def reset(self, episodes, where=None):
        super().reset(episodes, where)
        if where is not None:
            self.x = [x + 0.001 for x in self.x]
        return self.observe(range(self.num_envs))


class ResetDropsTheQueue(PointEnv):
    def reset(self, episodes, where=None):
        self.waiting = []
        return super().reset(episodes, where)


class RefusesIdleRows(PointEnv):
    def check_actions(self, actions):
        if not actions.isfinite().all():
            raise ValueError("actions must be finite")
        super().check_actions(actions)


class IdleSlotsRun(PointEnv):
    def reset(self, episodes, where=None):
        if where is None and len(episodes) == 2:
            episodes = [*episodes, *episodes]
        return super().reset(episodes, where)


class ResetKeepsTheQueue(PointEnv):
    def reset(self, episodes, where=None):
        waiting = self.waiting
        observation = super().reset(episodes, where)
        self.waiting = waiting
        return observation


class QueueStartsIdleSlots(PointEnv):
    def step_chunk(self, actions):
        result = super().step_chunk(actions)
        for slot in range(self.num_envs):
            if self.autoreset == "refill" and self.waiting and self.spec[slot] is None:
                self.start(slot, self.waiting.pop(0))
        return replace(result, observation=self.observe(range(self.num_envs)))


class ClampsActions(PointEnv):
    def step_chunk(self, actions):
        return super().step_chunk(actions.clamp(-1, 1))


class LetsNaNThrough(PointEnv):
    def step_chunk(self, actions):
        return super().step_chunk(actions.nan_to_num())


class ExecutesBeforeItRefuses(PointEnv):
    def check_actions(self, actions):
        try:
            super().check_actions(actions)
        except ValueError:
            self.steps = [n + 1 for n in self.steps]
            raise


class AcceptsAnyVariant(PointEnv):
    def check_episodes(self, episodes):
        super().check_episodes([EpisodeSpec(e.task, e.initial_state) for e in episodes])


class RecordsOneFrameAChunk(PointEnv):
    def step_chunk(self, actions):
        result = super().step_chunk(actions)
        return replace(result, frames={slot: frames[-1:] for slot, frames in result.frames.items()})


class IgnoresFinals(PointEnv):
    def step_chunk(self, actions):
        self.finals = "truncated"
        return super().step_chunk(actions)


class Tries(PointEnv):
    """Keeps the contract."""

    def try_chunks(self, actions):
        results = [deepcopy(self).step_chunk(actions[:, g]) for g in range(actions.shape[1])]
        return tuple(torch.stack([getattr(r, name) for r in results], 1) for name in ("reward", "executed"))


class TryingLeavesATrace(PointEnv):
    def try_chunks(self, actions):
        results = [self.step_chunk(actions[:, g]) for g in range(actions.shape[1])]
        return tuple(torch.stack([getattr(r, name) for r in results], 1) for name in ("reward", "executed"))


class TriesSomethingElse(Tries):
    def try_chunks(self, actions):
        return super().try_chunks(-actions)


class LooksOn(PointEnv):
    """Keeps the contract: an expert that stays where it is."""

    given = None

    def watch(self, slots, actions):
        self.given = torch.as_tensor(slots)[:, None, None] * actions

    def step_expert_chunk(self, noise, generator):
        wanted = torch.zeros(self.num_envs, self.chunk, self.action_spec.dim)
        given, self.given = self.given, None
        return wanted, self.step_chunk(wanted if given is None else given)


class ActsWhereItShouldLookOn(LooksOn):
    def watch(self, slots, actions):
        pass


class PushesWhereItLooksOn(LooksOn):
    def step_expert_chunk(self, noise, generator):
        if self.given is not None:
            self.given = self.given * (1 - 0.5 * noise)
        return super().step_expert_chunk(noise, generator)


class ClosesOnce(PointEnv):
    closed = False

    def close(self):
        if self.closed:
            raise ValueError("closed already")
        self.closed = True


BREACHES = {
    VariantCalledNone: "suite",
    PublishedIsAFlag: "suite",
    OverlappingSplits: "splits",
    HeldOutLooksLikeTrain: "splits",
    DoubleRewards: "shapes",
    WrongInstruction: "shapes",
    GoesOnAfterAnEnd: "ends",
    RewardAfterAnEnd: "ends",
    TruncationIsTermination: "truncation",
    FinalObservationOfTheNextEpisode: "truncation",
    LengthIsTheHorizon: "records",
    RewardForgotten: "records",
    ElapsedIsOneAhead: "elapsed",
    RefillsUnderStop: "stop",
    NeverRefills: "refill",
    RefillKeepsThePosition: "refill",
    DependsOnTheSlot: "determinism",
    DependsOnTheNeighbours: "determinism",
    ForgetsTheQueue: "state",
    ForgetsThePosition: "state",
    StateHoldsObjects: "state",
    ResetDisturbsOthers: "where",
    ResetDropsTheQueue: "where",
    RefusesIdleRows: "idle",
    IdleSlotsRun: "idle",
    ResetKeepsTheQueue: "queue",
    QueueStartsIdleSlots: "queue",
    ClampsActions: "bad_actions",
    LetsNaNThrough: "bad_actions",
    ExecutesBeforeItRefuses: "bad_actions",
    AcceptsAnyVariant: "bad_episodes",
    RecordsOneFrameAChunk: "record",
    IgnoresFinals: "finals",
    TryingLeavesATrace: "tries",
    TriesSomethingElse: "tries",
    ActsWhereItShouldLookOn: "watching",
    PushesWhereItLooksOn: "watching",
    ClosesOnce: "close",
}


def test_an_environment_that_keeps_the_contract_passes():
    assert isinstance(PointEnv(2, "stop"), VectorEnv)
    assert isinstance(Tries(2, "stop"), Brancher)
    assert [result for result in check_env(Tries) if not result.ok] == []
    assert isinstance(LooksOn(2, "stop"), Corrector)
    assert [result for result in check_env(LooksOn) if not result.ok] == []
    results = check_env(PointEnv)
    assert [result for result in results if not result.ok] == []
    assert [result.name for result in results] == [check.__name__ for check in CHECKS]
    assert all(result.detail for result in results)


def test_the_playthrough_sees_every_kind_of_end():
    """Else the rules about ends would hold for want of any."""
    results = [taken.result for taken in Envs(PointEnv).refilled]
    ends = {
        (bool(r.success[slot].any()), bool(r.truncated[slot].any()))
        for r in results
        for slot in range(4)
        if (r.terminated | r.truncated)[slot].any()
    }
    assert (True, False) in ends
    assert (False, True) in ends
    assert any((r.executed.any(1) & ~r.executed.all(1)).any() for r in results), "no end inside a chunk"


@pytest.mark.parametrize(("broken", "rule"), BREACHES.items(), ids=lambda x: getattr(x, "__name__", x))
def test_a_breach_is_caught_by_its_rule(broken, rule):
    failed = [result.name for result in check_env(broken) if not result.ok]
    assert rule in failed


def test_every_rule_can_fail():
    assert {check.__name__ for check in CHECKS} == set(BREACHES.values())
