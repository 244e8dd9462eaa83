"""How many clients a served policy answers: python benchmarks/serving.py [--seconds 5] [--clients 1 8 32]

Prints JSON: requests a second and latency percentiles, with forward passes that clients share and one at a
time, by turns. The policy is the tiny one of the tabletop recipes, with random weights; the clients are in a
process of their own, each in a thread with a connection. `alone` is what the policy can do without a server:
observations a second in batches of as many.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from websockets.sync.client import connect

from rove import recipes
from rove.cluster import measure
from rove.policies import registry as policies
from rove.policies.base import Policy
from rove.rollout.collect import act
from rove.serving import wire
from rove.serving.keys import Keys
from rove.serving.server import PolicyServer, ServerOptions, bind
from rove.types import Observation

TEXT = "put the red cube on the blue plate"
SIDE = 64
KEYS = Keys(("observation/image",), ("observation/state",))
BAR = 3.0
"""How many times the requests a second of one at a time the batched ones have to reach."""


def observation(policy: Policy, rows: int) -> Observation:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 255, (rows, 1, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator)
    return Observation(images, (TEXT,) * rows, torch.zeros(rows, policy.state_size))


@contextmanager
def server(policy: Policy, limit: int) -> Iterator[str]:
    """The policy behind a socket, in a thread; its address."""
    metadata = {
        "rove": {"chunk": policy.chunk, "action_spec": asdict(policy.action_spec), "keys": asdict(KEYS)}
    }
    serving = PolicyServer(
        lambda seen: act(policy, policy.action_spec, seen, None).actions,
        KEYS,
        metadata,
        ServerOptions(limit=limit),
    )
    taken, ready = bind("127.0.0.1", 0), threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(serving.run(taken, lambda port: ready.set())))
    thread.start()
    ready.wait()
    try:
        yield f"ws://127.0.0.1:{taken.getsockname()[1]}"
    finally:
        serving.stop()
        thread.join()


def ask(address: str, clients: int, seconds: float, state: int) -> dict[str, Any]:
    """Ask from `clients` threads for so long; in the process of the clients."""
    message = wire.pack(
        {
            "observation/image": np.zeros((SIDE, SIDE, 3), np.uint8),
            "observation/state": np.zeros(state, np.float32),
            "prompt": TEXT,
        }
    )
    start = threading.Barrier(clients)

    def converse(_: int) -> list[float]:
        latencies = []
        with connect(address, compression=None) as client:
            client.recv()
            start.wait()
            until = time.perf_counter() + seconds
            while (asked := time.perf_counter()) < until:
                client.send(message)
                assert isinstance(client.recv(), bytes)
                latencies.append(time.perf_counter() - asked)
        return latencies

    with ThreadPoolExecutor(clients) as pool:
        latencies = np.concatenate(list(pool.map(converse, range(clients))))
    return {
        "requests_per_second": round(len(latencies) / seconds, 1),
        "latency_ms": {f"p{q}": round(1000 * float(np.percentile(latencies, q)), 1) for q in (50, 99)},
    }


def alone(policy: Policy, rows: int, seconds: float) -> float:
    """Observations a second without a server, in batches of `rows`."""
    seen, count, start = observation(policy, rows), 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        policy.act(seen, "greedy")
        count += rows
    return round(count / (time.perf_counter() - start), 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--ask", help=argparse.SUPPRESS)
    parser.add_argument("--state", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ask:
        print(json.dumps(ask(args.ask, args.clients[0], args.seconds, args.state)))
        return
    with tempfile.TemporaryDirectory() as folder:
        policy = policies.load(measure.start_of(recipes.get("tabletop_ppo").build(), Path(folder)))
    policy.act(observation(policy, 1), "greedy")
    rows = []
    for clients in args.clients:
        row: dict[str, Any] = {"clients": clients, "alone": alone(policy, clients, args.seconds)}
        for name, limit in (("batched", 32), ("one_at_a_time", 1)):
            with server(policy, limit) as address:
                command = [sys.executable, __file__, "--ask", address, "--clients", str(clients)]
                command += ["--seconds", str(args.seconds), "--state", str(policy.state_size)]
                row[name] = json.loads(subprocess.check_output(command))
        row["ratio"] = round(
            row["batched"]["requests_per_second"] / row["one_at_a_time"]["requests_per_second"], 2
        )
        rows.append(row)
    report = {
        "benchmark": "a served policy",
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "rows": rows,
        "bar": BAR,
        "passed": max(row["ratio"] for row in rows) >= BAR,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
