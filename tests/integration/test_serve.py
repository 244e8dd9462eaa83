"""`rove serve` as a process of its own, and `rove eval` of what it serves."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.unit.test_serving import request
from websockets.sync.client import connect

from rove import recipes
from rove.api import evaluate
from rove.cluster import measure
from rove.policies import registry as policies
from rove.serving import wire
from rove.types import Observation

COMMAND = (sys.executable, "-c", "import sys; from rove.cli import main; sys.exit(main())")
TEXT = "put the red cube on the blue plate"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return measure.start_of(recipes.get("tabletop_ppo").build(), tmp_path_factory.mktemp("policy"))


@pytest.fixture
def server(checkpoint) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, and its address."""
    command = [*COMMAND, "serve", str(checkpoint), "--suite", "tabletop", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said = next((line for line in process.stdout if "ws://" in line), "")
        yield process, said.partition(" at ")[2].partition(";")[0]
    finally:
        process.kill()
        process.wait()


def test_a_served_checkpoint_answers_as_it_acts_and_ends_when_told(server, checkpoint):
    process, address = server
    policy = policies.load(checkpoint)
    with connect(address, compression=None) as client:
        said = wire.unpack(client.recv())["rove"]
        assert said["chunk"] == policy.chunk
        assert said["keys"]["images"] == ["observation/image"]
        for value in (0, 120, 255):
            state = torch.linspace(-0.5, 0.5, policy.state_size)[None]
            message = request(value, size=64) | {"prompt": TEXT, "observation/state": state[0].numpy()}
            client.send(wire.pack(message))
            answer = client.recv(timeout=120)
            assert isinstance(answer, bytes), answer
            images = torch.full((1, 1, 64, 64, 3), value, dtype=torch.uint8)
            expected = policy.act(Observation(images, (TEXT,), state), "greedy").actions[0]
            torch.testing.assert_close(torch.tensor(wire.unpack(answer)["actions"]), expected)
        # Mistakes of one client's, which nobody else notices.
        for wrong, reason in (
            ({"observation/state": np.zeros(3)}, "numbers of the robot's state"),
            ({"prompt": "zorgle"}, "zorgle"),
        ):
            client.send(wire.pack(message | wrong))
            assert reason in str(client.recv(timeout=120))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_a_served_policy_is_evaluated_as_the_checkpoint_itself(server, checkpoint, tmp_path):
    _, address = server
    settings = {"env.horizon": 16}
    here, there = (
        evaluate(place, "tabletop", episodes=8, num_envs=4, settings=settings, out=tmp_path / name)
        for place, name in ((checkpoint, "here.json"), (address, "there.json"))
    )
    assert here.records == there.records
    assert json.loads((tmp_path / "there.json").read_text())["policy"] == address


def test_mistakes_are_said_in_a_line(checkpoint, tmp_path):
    for words, reason in (
        ((str(checkpoint), "--port", "70000"), "a whole number from 0 to 65535"),
        ((str(checkpoint), "--keys", "libro"), "Did you mean 'libero'"),
        ((str(tmp_path), "--port", "0"), str(tmp_path)),
        ((str(checkpoint), "--port", "0"), "--images KEY"),
    ):
        done = subprocess.run([*COMMAND, "serve", *words], capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("rove: error: ")
        assert reason in done.stderr
        assert done.stderr.count("\n") == 1
