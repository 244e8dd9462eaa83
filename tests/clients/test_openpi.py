"""openpi's own client, unmodified, asks a served checkpoint: the answers are those of the policy in process.

It needs NumPy 1, so it runs where `OPENPI_PYTHON` names the interpreter of an environment of its own:
`make test-openpi`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.clients.observations import CLIENTS, TURNS, observation

from rove import recipes
from rove.cluster import measure
from rove.policies import registry as policies
from rove.types import Observation

PYTHON = os.environ.get("OPENPI_PYTHON")
COMMAND = (sys.executable, "-c", "import sys; from rove.cli import main; sys.exit(main())")


@pytest.mark.skipif(not PYTHON, reason="needs openpi's client in an environment of its own: make test-openpi")
def test_eight_clients_at_once_get_what_the_policy_does_in_process(tmp_path: Path) -> None:
    assert PYTHON is not None
    checkpoint = measure.start_of(recipes.get("tabletop_ppo").build(), tmp_path)
    policy = policies.load(checkpoint)
    command = [*COMMAND, "serve", str(checkpoint), "--suite", "tabletop", "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        said = next((line for line in server.stdout if "ws://" in line), "")
        port = said.partition("ws://127.0.0.1:")[2].partition(";")[0]
        script = Path(__file__).with_name("with_openpi.py")
        words = [PYTHON, str(script), port, str(policy.state_size), str(tmp_path / "answers.npz")]
        done = subprocess.run(words, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    finally:
        server.kill()
        server.wait()
    with np.load(tmp_path / "answers.npz") as found:
        assert str(found["numpy"]).startswith("1.") and found["chunk"] == policy.chunk
        assert "Error in inference server" in str(found["refused"])
        assert "lacks 'observation/image'" in str(found["refused"])
        answers, after = found["answers"], found["after"]
    assert answers.dtype == np.float32
    for client in range(CLIENTS):
        for turn in range(TURNS):
            asked = observation(client, turn, policy.state_size)
            seen = Observation(
                torch.from_numpy(asked["observation/image"])[None, None],
                (asked["prompt"],),
                torch.from_numpy(asked["observation/state"])[None],
            )
            np.testing.assert_allclose(
                answers[client, turn], policy.act(seen, "greedy").actions[0], atol=1e-5
            )
    np.testing.assert_allclose(after, answers[0, 0], atol=1e-5)
    assert len(np.unique(answers.reshape(CLIENTS * TURNS, -1), axis=0)) > CLIENTS, "answers hardly differ"
