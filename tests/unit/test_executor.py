"""What an executor asks of whom, with workers that only take note."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.test_learner import SPEC, make_policy
from tests.unit.test_plan import NODE

from rove.cluster.executor import Executor
from rove.config.schema import PPO, LoraConfig, PlacementConfig, RolloutConfig, Run
from rove.envs import conventions
from rove.errors import RoveError
from rove.placement.plan import make_plan
from rove.policies import registry as policies
from rove.policies.openvla import loading
from rove.runtime.actor import Actor, Done, Future, Given, Lost
from rove.runtime.channel import Channel, pack
from rove.runtime.local import Packed
from rove.training.deal import Share
from rove.types import Observation, TrainBatch
from rove.workers import weights
from rove.workers.policy import Assignment, PolicyWorker, Updated


class Noting(Actor[PolicyWorker]):
    """Takes note of what it is asked for."""

    here = False

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def call(self, method: Any, *args: Any) -> Done[Any]:
        self.asked.append((method.__name__, *args))
        return Done(Updated({}, {}, []) if method is PolicyWorker.update else None)

    def close(self) -> None: ...
    def kill(self) -> None: ...


class Noted(Executor):
    """Eight GPUs that are not there."""

    def __init__(self, **placement: Any) -> None:
        run = Run("t", PPO(), rollout=RolloutConfig(num_envs=64), placement=PlacementConfig(**placement))
        super().__init__(run, make_plan(run, NODE), Path("nowhere"))
        self._start_all()

    def _put(self, assignment: Assignment) -> Noting:
        return Noting()

    def _share(self, value: Any) -> Given[Any]:
        return Given(value)

    def asked(self) -> list[list[tuple[Any, ...]]]:
        return [worker.asked for worker in self._workers]


def pictures(rows: int) -> TrainBatch:
    """A batch that is nearly all pictures."""
    number = torch.arange(rows).view(rows, 1, 1)
    flat = torch.ones(rows, 1)
    return TrainBatch(
        observation=Observation(torch.zeros(rows, 1, 64, 64, 3, dtype=torch.uint8), ("go",) * rows),
        sample=number,
        logprob=number.float(),
        advantage=flat,
        mask=flat.bool(),
        returns=None,
        value=None,
        episode_length=None,
    )


def test_a_policy_is_examined_and_saved_where_its_weights_are():
    executor = Noted()
    wanted = conventions.of("tabletop")
    executor.preflight(wanted)
    executor.save_policy(Path("there"))
    assert executor.asked() == [[("preflight", wanted), ("save", Path("there"))], *[[("save", None)]] * 7]


class Pending(Future[Updated]):
    """A call whose end does not come, or came with its worker's."""

    def __init__(self, lost: Lost | None = None) -> None:
        self.lost = lost

    def result(self) -> Updated:
        assert self.lost is not None, "it would be waited for without end"
        raise self.lost

    def ready(self) -> bool:
        return self.lost is not None

    def fileno(self) -> None:
        return None


@pytest.mark.parametrize("asked", [True, False], ids=["that was asked too", "that was not"])
def test_a_rank_that_is_lost_is_told_of_while_others_wait_for_it(asked, monkeypatch):
    """They wait for each other: the first in line would be waited for without end."""
    executor = Noted()
    lost = Pending(Lost("learner 1", "is gone"))
    second = executor._workers[1]
    if not asked:
        monkeypatch.setattr(Noting, "gone", property(lambda self: self is second))
        monkeypatch.setattr(second, "call", lambda *args: lost)
    with pytest.raises(RoveError, match="The learner failed: learner 1 is gone"):
        executor._answers([Pending(), lost] if asked else [Pending()])


def test_each_rank_is_sent_its_rows_and_no_others():
    executor = Noted()
    batch = pictures(64)
    executor.update(batch, 0, lambda: None)
    sent = [sum(map(len, pack(asked)[1])) for asked in executor.asked()]
    whole = sum(map(len, pack(batch)[1]))
    assert len(sent) == 8 and max(sent) < 1.05 * whole / 8, "it was eight times the whole"
    shares: list[Share] = [asked[0][1] for asked in executor.asked()]
    rows = torch.cat([share.batch.sample[:, 0, 0] for share in shares])
    assert sorted(rows.tolist()) == list(range(64))


def test_weights_travel_end_to_end(monkeypatch, tmp_path: Path):
    """Adapters of float32 and a bfloat16 matrix: a copy from the device for each type, and nothing frozen."""
    make_policy(critic=True).save_pretrained(tmp_path)
    how: dict[str, Any] = {"lora": LoraConfig(rank=2), "dtype": torch.bfloat16}
    mine, theirs = (policies.load(tmp_path, **how) for _ in range(2))
    assert isinstance(mine, torch.nn.Module) and isinstance(theirs, torch.nn.Module)
    mine.get_parameter("vlm.projector.fc1.base_layer.bias").requires_grad_(True)
    trained = {name: p for name, p in mine.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.data.normal_()
    cpu, copies = torch.Tensor.cpu, []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: (copies.append(self.dtype), cpu(self))[1])
    sent = weights.publish(3, trained)
    assert set(copies) == {torch.float32, torch.bfloat16} and len(copies) == 2
    assert sent.bytes == sum(p.nbytes for p in trained.values())
    assert 5 * sent.bytes < sum(p.nbytes for p in mine.parameters())
    with torch.no_grad():
        first = next(iter(trained.values()))
        before = first.clone()
        first.add_(1)  # what was published stays as it was
    weights.load(theirs, sent)
    got = dict(theirs.named_parameters())
    assert torch.equal(got.pop(next(iter(trained))), before)
    assert all(torch.equal(got[name], trained[name]) for name in trained if name in got)
    monkeypatch.setattr(weights, "_BLOCK", 1000)  # a device needs room for no more than that
    parts = weights.publish(4, trained)
    assert len(parts.flat) >= 5 and parts.bytes == sent.bytes
    weights.load(theirs, parts)
    assert torch.equal(dict(theirs.named_parameters())[next(iter(trained))], first)


def test_what_several_are_sent_is_packed_once():
    """It lies in memory once, however many have it."""
    given = {"a": torch.arange(1 << 16), "b": torch.ones(3, 5, dtype=torch.bfloat16)}
    packed = Packed(given)
    given["a"].zero_()  # it is a copy
    for _ in range(2):
        ours, theirs = map(Channel, socket.socketpair())
        ours.send(("load", (packed,)))
        method, (read,) = theirs.recv()
        assert method == "load" and packed.segment is not None
        assert os.path.sameopenfile(read.segment.fd, packed.segment.fd)
        assert torch.equal(read.value["a"], torch.arange(1 << 16)) and read.value["b"].shape == (3, 5)


def test_weights_are_read_onto_the_device_they_are_for(monkeypatch, tmp_path: Path):
    """Eight processes on one host would else hold eight copies there first."""
    make_policy(critic=False).save_pretrained(tmp_path)
    fill, seen = loading.fill, []
    monkeypatch.setattr(
        loading, "fill", lambda policy, *args, **how: (fill(policy, *args, **how), seen.append(policy.device))
    )
    policy = policies.restore(Run("t", PPO()), tmp_path, SPEC, torch.device("meta"))
    assert seen == [torch.device("meta")]
    assert isinstance(policy, torch.nn.Module)
    assert {parameter.device.type for parameter in policy.parameters()} == {"meta"}
