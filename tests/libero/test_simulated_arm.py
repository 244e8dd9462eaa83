"""The simulated Franka: it moves as the environment does, and answers as a Franka's server."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tests.fake_arm import stayed_inside
from tests.unit import test_serving
from torch import Tensor

from rove.config.schema import LiberoConfig
from rove.envs import registry
from rove.envs.libero.env import LiberoEnv
from rove.errors import RoveError
from rove.robots import franka, session
from rove.robots.limits import Guard, Stopped
from rove.robots.runner import Pace
from rove.robots.simulated import BOX, COLUMNS, SimulatedArm
from rove.serving.faults import FaultyServer
from rove.types import EpisodeSpec, Observation

TASK = "object/pick_up_the_alphabet_soup_and_place_it_in_the_basket"
COMMAND = (sys.executable, "-c", "import sys; from rove.cli import main; sys.exit(main())")
CHUNK = 8


class InProcess(franka.Franka):
    """The adapter's own way from an observation to a target, without a server in between; the arm's time
    passes when it is told to."""

    speed = 0.0

    def __init__(self, arm: SimulatedArm) -> None:
        self.arm = arm
        super().__init__("http://127.0.0.1:1", {}, franka.limits(*BOX), rate=20, origin=arm.task()["origin"])

    def _state(self) -> Any:
        return self.arm.state()


def test_a_target_moves_the_arm_as_the_action_does_in_the_environment() -> None:
    config = LiberoConfig(tasks=TASK, renderer="none", phase="end", threads=1)
    env = registry.make(config, num_envs=1, chunk=1, autoreset="stop")
    assert isinstance(env, LiberoEnv)
    arm = SimulatedArm(TASK, image_size=16, wrist=False)
    robot = InProcess(arm)
    guard = Guard(franka.limits(*BOX), 0.05)
    generator = np.random.default_rng(0)
    try:
        for episode in (0, 3):
            arm.reset(episode)
            state = arm.task()["initial_state"]
            env.reset([EpisodeSpec(TASK, state)])
            seen = robot.observe()
            previous = seen.position
            np.testing.assert_allclose(seen.state, env.worlds.observed([0])[0], atol=2e-5)
            for step in range(30):
                action = generator.uniform(-0.7, 0.7, 7)
                action[3:6] *= step % 3 == 0  # a hand that is not turned keeps the turn that was wanted
                action[6] = -1.0 if step < 10 else 1.0
                env.step_chunk(torch.from_numpy(action[None, None]).float())
                target = robot.aim(seen, action, previous)
                allowed = guard.allow(target, seen, previous)
                assert not allowed.counted, allowed.clipped
                previous = allowed.target
                pose = [*previous[:3], *franka.turns.down(previous[3:6])]
                arm.go(np.array(pose))
                arm.grip(previous[6])
                arm.advance(5)
                seen = robot.observe()
                guard.check(seen, previous)
                np.testing.assert_allclose(seen.state[:6], env.worlds.observed([0])[0][:6], atol=2e-3)
                np.testing.assert_allclose(seen.state[6:], env.worlds.observed([0])[0][6:], atol=4e-3)
    finally:
        env.close()
        arm.close()
    record = arm.record()
    assert record.shape == (300, len(COLUMNS))
    np.testing.assert_allclose(np.diff(record[:, 0]), 0.01)
    assert record[:, COLUMNS.index("speed")].max() < 1.0


def test_what_was_carried_out_is_the_action_again() -> None:
    arm = SimulatedArm(TASK, image_size=16, wrist=False)
    robot = InProcess(arm)
    seen = robot.observe()
    action = np.array([0.3, -0.5, 0.1, 0.2, -0.1, 0.4, 1.0])
    target = robot.aim(seen, action, seen.position)
    np.testing.assert_allclose(robot.carried_out(seen, target, action), action, atol=1e-9)
    still = np.array([0.3, -0.5, 0.1, 0.0, 0.0, 0.0, 0.0])
    target = robot.aim(seen, still, seen.position)
    np.testing.assert_array_equal(target[3:], seen.position[3:])
    np.testing.assert_allclose(robot.carried_out(seen, target, still), still, atol=1e-9)


def test_a_task_is_one_that_there_is() -> None:
    with pytest.raises(RoveError, match="10 tasks: name one"):
        SimulatedArm("object", image_size=16)
    with pytest.raises(RoveError, match="soup"):
        SimulatedArm("object/pick_up_the_alphabet_soup", image_size=16)


# --- processes ------------------------------------------------------------------------------------


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return answer.read()


def post(url: str, body: Any = None) -> Any:
    content = b"" if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, content, method="POST"), timeout=30) as answer:
        said = answer.read()
    return json.loads(said) if said.startswith(b"{") else said.decode()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A simulated arm in a process of its own."""
    words = ("simulate", TASK, "--port", "0", "--image-size", "32", "--one-camera", "--speed", "0.5")
    process = subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = next((line for line in process.stdout if "Simulating" in line), "")
        found = re.search(r"http://[0-9.]+:\d+", line)
        assert found
        yield found[0]
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


def test_it_answers_as_a_frankas_server_does(address: str) -> None:
    state = post(f"{address}/getstate")
    sizes = {"pose": 7, "vel": 6, "force": 3, "torque": 3, "q": 7, "dq": 7}
    assert {name: len(state[name]) for name in sizes} == sizes
    assert np.array(state["jacobian"]).shape == (6, 7)
    assert 0.9 < state["gripper_pos"] <= 1.01
    assert set(post(f"{address}/getpos")) == {"pose"}
    assert set(post(f"{address}/get_gripper")) == {"gripper"}
    assert post(f"{address}/clearerr") == "Clear"
    assert post(f"{address}/pose", {"arr": state["pose"]}) == "Moved"
    for path, body in (
        ("/pose", {"arr": [1, 2]}),
        ("/pose", {"arr": [float("nan")] * 7}),
        ("/pose", {"arr": [0.5, 0, 0.3, 0, 0, 0, 0]}),
        ("/move_gripper", {"gripper_pos": "open"}),
        ("/jointreset", {"episode": -1}),
        ("/fault", {"name": "tired"}),
        ("/nowhere", None),
    ):
        with pytest.raises(urllib.error.HTTPError) as error:
            post(address + path, body)
        assert error.value.code == 400
    assert get(f"{address}/camera/agentview").startswith(b"\x89PNG")


def leaning(seen: Observation) -> Tensor:
    """Forward and down, out of the box in the end; the gripper shuts."""
    actions = torch.zeros(len(seen), CHUNK, 7)
    actions[..., 0], actions[..., 2], actions[..., 6] = 0.6, -0.3, 1.0
    return actions


def test_a_policy_on_the_arm_over_sockets_never_leaves_its_box(address: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(test_serving, "SPEC", franka.ACTIONS)
    monkeypatch.setattr(test_serving, "CHUNK", CHUNK)
    box = ((0.35, -0.3, 0.15), (0.55, 0.3, 0.4))
    setup = tmp_path / "arm.toml"
    setup.write_text(
        f'adapter = "simulated"\naddress = "{address}"\n'
        "[limits]\ncamera_late = 3.0\nloop_late = 2.0\n[limits.axes]\n"
        + "\n".join(f"{n} = {{ low = {a}, high = {b} }}" for n, a, b in zip("xyz", *box, strict=True))
    )
    said: list[str] = []
    with test_serving.serving(leaning) as served, FaultyServer(f"ws://{served.address}") as policy:
        asked = session.Session(policy.address, str(setup), pace=Pace(10.0, 300), episodes=(1,))
        threading.Timer(1.0, lambda: setattr(policy, "fault", "late")).start()
        with pytest.raises(Stopped) as stopped:
            session.run(asked, said.append)
    assert stopped.value.cause == "out_of_limits"
    assert any("alphabet soup" in text for text in said)
    task = post(f"{address}/task")
    assert task["episode"] == 1 and task["success"] is False
    record = np.load(io.BytesIO(get(f"{address}/record")))
    # Of the episode: it begins where the scene was put back, and the hand with it.
    moved = record[np.flatnonzero(record[:, COLUMNS.index("speed")] == 0.0)[-1] :]
    stayed_inside(moved, box)
    assert moved[:, 1].max() > 0.5  # it did go as far as it may
    assert moved[:, COLUMNS.index("speed")].max() < 1.0
    assert moved[-1, COLUMNS.index("gripper")] < 0.3
    assert np.ptp(moved[-20:, 1:4], axis=0).max() < 5e-3  # and rests
