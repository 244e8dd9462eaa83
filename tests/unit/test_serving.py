"""The server over real sockets: what clients are told and share, and that nothing of theirs ends it."""

from __future__ import annotations

import asyncio
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from rove.errors import RoveError
from rove.serving import wire
from rove.serving.keys import PRESETS, Keys, read_keys
from rove.serving.remote import RemotePolicy
from rove.serving.server import PolicyServer, ServerOptions, bind
from rove.types import ActionSpec, Observation

SPEC = ActionSpec(("x", "gripper"), ("1", "1"), (-1.0, -1.0), (1.0, 1.0))
KEYS = Keys(("observation/image",), ("observation/state",))
CHUNK = 3


def answer(seen: Observation) -> Tensor:
    """Actions that only depend on the row, whatever is in the batch around it."""
    mean = seen.images.double().mean(dim=(1, 2, 3, 4)) / 255
    first = torch.zeros(len(seen)) if seen.state is None else seen.state[:, 0]
    return torch.stack((mean, first.double()), -1)[:, None].expand(-1, CHUNK, -1).float()


class Served:
    """A server in a thread, and its address."""

    def __init__(self, act: Callable[[Observation], Tensor] = answer, **options: Any) -> None:
        metadata = {"rove": {"chunk": CHUNK, "action_spec": asdict(SPEC), "keys": asdict(KEYS)}}
        self.server = PolicyServer(act, KEYS, metadata, ServerOptions(port=0, **options))
        taken, ready = bind("127.0.0.1", 0), threading.Event()
        self.port = taken.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self.thread = threading.Thread(
            target=lambda: asyncio.run(self.server.run(taken, lambda port: ready.set())), daemon=True
        )
        self.thread.start()
        assert ready.wait(60)

    @contextmanager
    def connect(self, **options: Any) -> Iterator[ClientConnection]:
        with connect(f"ws://{self.address}", compression=None, max_size=None, **options) as client:
            assert "rove" in wire.unpack(client.recv())
            yield client

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://{self.address}{path}", timeout=30) as response:
            return response.read().decode()


@contextmanager
def serving(act: Callable[[Observation], Tensor] = answer, **options: Any) -> Iterator[Served]:
    served = Served(act, **options)
    try:
        yield served
    finally:
        served.server.stop()
        served.thread.join(60)
        assert not served.thread.is_alive()


def request(value: int = 7, size: int = 8, state: float = 0.5) -> dict[str, Any]:
    return {
        "observation/image": np.full((size, size, 3), value, np.uint8),
        "observation/state": np.array([state, 0.0]),
        "prompt": "pick up the cube",
    }


def asked(client: ClientConnection, message: Any) -> Any:
    client.send(message if isinstance(message, str | bytes) else wire.pack(message))
    got = client.recv(timeout=60)
    return got if isinstance(got, str) else wire.unpack(got)


def test_a_client_gets_the_policys_actions_and_how_long_they_took() -> None:
    with serving() as served, served.connect() as client:
        first, second = asked(client, request(51)), asked(client, request(102, state=0.25))
    np.testing.assert_allclose(first["actions"], [[0.2, 0.5]] * CHUNK, atol=1e-6)
    np.testing.assert_allclose(second["actions"], [[0.4, 0.25]] * CHUNK, atol=1e-6)
    assert set(first["server_timing"]) == {"infer_ms"}
    assert set(second["server_timing"]) == {"infer_ms", "prev_total_ms"}


def test_clients_share_forward_passes_and_each_gets_its_own_actions() -> None:
    sizes: list[int] = []

    def slow(seen: Observation) -> Tensor:
        sizes.append(len(seen))
        time.sleep(0.02)
        return answer(seen)

    def converse(number: int) -> None:
        with served.connect() as client:
            everyone.wait()
            for turn in range(10):
                value = (13 * number + turn) % 255
                got = asked(client, request(value, size=8 if number else 16))["actions"]
                np.testing.assert_allclose(got[:, 0], value / 255, atol=1e-6)

    everyone = threading.Barrier(8)
    with serving(slow, limit=4, wait=0.5) as served, ThreadPoolExecutor(8) as pool:
        list(pool.map(converse, range(8)))
    assert sum(sizes) == 80
    assert max(sizes) <= 4
    # Seven of eight send pictures of one size.
    assert len(sizes) < 50


REFUSED = {
    "text": ("hello", "is text"),
    "no msgpack": (b"\xc1", "msgpack"),
    "a list": (wire.pack([1]), "send a dict"),
    "no picture": ({"prompt": "go"}, "lacks 'observation/image'"),
    "another key": ({"observation/imag": 1, "prompt": "go"}, "Did you mean 'observation/imag'"),
    "no prompt": ({key: value for key, value in request().items() if key != "prompt"}, "lacks 'prompt'"),
    "an empty prompt": (request() | {"prompt": " "}, "instruction as text"),
    "a picture of floats": (request() | {"observation/image": np.zeros((8, 8, 3))}, "uint8"),
    "a picture of four channels": (request() | {"observation/image": np.zeros((8, 8, 4), np.uint8)}, "shape"),
    "no pixels": (request() | {"observation/image": np.zeros((0, 8, 3), np.uint8)}, "shape"),
    "a state of text": (request() | {"observation/state": "x"}, "no vector"),
    "a state that is not finite": (request() | {"observation/state": np.array([np.nan])}, "not finite"),
}


def test_what_cannot_be_answered_is_answered_by_text_and_the_connection_goes_on() -> None:
    with serving() as served, served.connect() as client:
        for name, (message, reason) in REFUSED.items():
            got = asked(client, message)
            assert isinstance(got, str), name
            assert reason in got, (name, got)
        assert asked(client, request())["actions"].shape == (CHUNK, 2)
        metrics = served.get("/metrics")
    assert f'rove_requests_total{{outcome="refused"}} {len(REFUSED)}.0' in metrics
    assert 'rove_requests_total{outcome="answered"} 1.0' in metrics


def test_one_clients_trouble_is_not_its_neighbours() -> None:
    def fails(seen: Observation) -> Tensor:
        if (seen.images == 66).all(dim=(1, 2, 3, 4)).any():
            raise RuntimeError("out of order")
        actions = answer(seen)
        actions[(seen.images == 77).all(dim=(1, 2, 3, 4))] = float("nan")
        return actions

    with serving(fails, wait=1.0) as served, ThreadPoolExecutor(3) as pool, ExitStack() as stack:
        clients = [stack.enter_context(served.connect()) for _ in range(3)]
        raised, infinite, good = pool.map(
            lambda client, value: asked(client, request(value)), clients, (66, 77, 51)
        )
    assert "out of order" in raised
    assert "not finite" in infinite
    np.testing.assert_allclose(good["actions"][:, 0], 0.2, atol=1e-6)


def test_health_metrics_and_the_key() -> None:
    with serving(api_key="secret") as served:
        assert served.get("/healthz") == "OK\n"
        for header in (None, {"Authorization": "Api-Key wrong"}):
            with pytest.raises(InvalidStatus, match="401"), served.connect(additional_headers=header):
                pass
        with served.connect(additional_headers={"Authorization": "Api-Key secret"}) as client:
            asked(client, request())
            metrics = served.get("/metrics")
    for line in (
        'rove_latency_seconds{quantile="0.5"}',
        'rove_latency_seconds{quantile="0.99"}',
        "rove_queue_length 0.0",
        "rove_clients 1.0",
        'rove_batch_size_bucket{le="1.0"} 1.0',
    ):
        assert line in metrics, metrics


def test_a_message_that_is_too_large_ends_its_own_connection_alone() -> None:
    with serving(message_limit=10_000) as served, served.connect() as other:
        with served.connect() as client, pytest.raises(ConnectionClosed, match="1009"):
            asked(client, request(size=100))
        assert asked(other, request())["actions"].shape == (CHUNK, 2)


def test_a_server_that_is_stopped_answers_what_is_under_way() -> None:
    begun = threading.Event()

    def slow(seen: Observation) -> Tensor:
        begun.set()
        time.sleep(0.5)
        return answer(seen)

    with serving(slow) as served, served.connect() as client, ThreadPoolExecutor(1) as pool:
        got = pool.submit(asked, client, request(51))
        assert begun.wait(60)
        served.server.stop()
        np.testing.assert_allclose(got.result()["actions"][:, 0], 0.2, atol=1e-6)
        served.thread.join(60)
        assert not served.thread.is_alive()
        with pytest.raises(ConnectionRefusedError), served.connect():
            pass


def test_a_port_that_is_taken_is_said_before_anything_is_loaded() -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(RoveError, match="--port 0"):
            bind("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(RoveError, match="--host"):
        bind("no.such.host.invalid", 8000)


def test_entries_are_found_by_name_or_by_path_and_channels_may_come_first() -> None:
    aloha = {
        "state": np.arange(14.0),
        "images": {
            name: np.full((3, 4, 5), i, np.uint8)
            for i, name in enumerate(("cam_high", "cam_left_wrist", "cam_right_wrist"))
        },
        "prompt": "fold",
    }
    seen = PRESETS["aloha"].observation(aloha)
    assert seen.images.shape == (1, 3, 4, 5, 3)
    assert seen.images[0, :, 0, 0, 0].tolist() == [0, 1, 2]
    assert seen.state is not None
    assert seen.state.shape == (1, 14)
    droid = PRESETS["droid"]
    message = {name: np.zeros((4, 4, 3), np.uint8) for name in droid.images} | {
        "observation/joint_position": np.arange(7.0),
        "observation/gripper_position": np.array([1.0]),
        "prompt": "go",
    }
    state = droid.observation(message).state
    assert state is not None
    assert state.tolist() == [[0, 1, 2, 3, 4, 5, 6, 1]]
    del message["observation/gripper_position"]
    with pytest.raises(RoveError, match="lacks 'observation/gripper_position'"):
        droid.observation(message)
    message["observation/gripper_position"] = np.array([1.0])
    message[droid.images[0]] = np.zeros((5, 4, 3), np.uint8)
    with pytest.raises(RoveError, match="differ in size"):
        droid.observation(message)
    with pytest.raises(RoveError, match="Did you mean 'libero'"):
        read_keys("libro")


def test_a_remote_policy_answers_as_the_one_behind_it() -> None:
    images = torch.randint(0, 255, (8, 1, 6, 6, 3), dtype=torch.uint8)
    seen = Observation(images, ("pick up the cube",) * 8, torch.linspace(-0.9, 0.9, 8)[:, None])
    with serving() as served:
        policy = RemotePolicy(f"ws://{served.address}", connections=4).placed(replace(SPEC, names=("a", "b")))
        assert policy.chunk == CHUNK
        assert policy.action_spec == SPEC
        torch.testing.assert_close(policy.act(seen, "greedy").actions, answer(seen))
        policy.close()
        short = RemotePolicy(f"ws://{served.address}", connections=1, execute=2).placed(SPEC)
        assert short.act(seen, "greedy").actions.shape == (8, 2, 2)
        short.close()
    with pytest.raises(RoveError, match="Nobody serves a policy"):
        RemotePolicy(f"ws://{served.address}", connections=1)


def test_another_protocol_behind_the_port_is_told_apart() -> None:
    from websockets.sync.server import serve

    def chat(connection: Any) -> None:
        connection.send("Hello, who are you?")

    with serve(chat, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(RoveError, match="another protocol"):
            RemotePolicy(f"ws://127.0.0.1:{server.socket.getsockname()[1]}", connections=1)
        server.shutdown()


def test_a_wrong_path_is_no_health() -> None:
    with serving() as served, pytest.raises(urllib.error.HTTPError):
        served.get("/elsewhere")
