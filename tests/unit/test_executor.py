"""What an executor asks of whom, with seats that only take note."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tests.unit.test_plan import NODE

from rove.config.schema import PPO, PlacementConfig, RolloutConfig, Run
from rove.envs import conventions
from rove.placement.executor import Done, Executor
from rove.placement.plan import make_plan
from rove.placement.seat import SeatPlan, build_policy
from rove.policies.openvla import loading


class Seat:
    """Takes note of what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def call(self, method: str, *args: Any) -> Done:
        self.asked.append((method, *args))
        return Done(None)

    def close(self) -> None: ...


class Noted(Executor):
    """Eight GPUs that are not there."""

    def __init__(self, **placement: Any) -> None:
        run = Run("t", PPO(), rollout=RolloutConfig(num_envs=64), placement=PlacementConfig(**placement))
        super().__init__(run, make_plan(run, NODE), Path("nowhere"))
        self._seat_all()

    def _put(self, seat: SeatPlan) -> Seat:
        return Seat()

    def asked(self) -> list[list[tuple[Any, ...]]]:
        return [seat.asked for seat in self._seats]


def test_a_policy_is_examined_and_saved_where_its_weights_are():
    executor = Noted()
    wanted = conventions.of("tabletop")
    executor.preflight(wanted)
    executor.save_policy(Path("there"))
    assert executor.asked() == [[("preflight", wanted), ("save", Path("there"))], *[[("save", None)]] * 7]


def test_weights_are_read_onto_the_device_they_are_for(monkeypatch, tmp_path: Path):
    """Eight processes on one host would else hold eight copies there first."""
    from tests.unit.test_learner import SPEC, make_policy

    make_policy(critic=False).save_pretrained(tmp_path)
    fill, seen = loading.fill, []
    monkeypatch.setattr(
        loading, "fill", lambda policy, *args, **how: (fill(policy, *args, **how), seen.append(policy.device))
    )
    policy = build_policy(Run("t", PPO()), tmp_path, SPEC, torch.device("meta"))
    assert seen == [torch.device("meta")]
    assert isinstance(policy, torch.nn.Module)
    assert {parameter.device.type for parameter in policy.parameters()} == {"meta"}
