"""How many clients a served policy answers: python benchmarks/serving.py [--seconds 5] [--clients 1 8]

Prints JSON: requests a second and latency percentiles against the number of clients, with forward passes that
they share (and how many observations those hold) and one at a time, by turns. The policy is the tiny one of
the tabletop recipes, with random weights; the clients are in a process of their own, each in a thread with a
connection. `alone` is what the policy can do without a server: observations a second in batches of as many.
`cpu_ms_per_request` is the server's processor time for a request, its policy's included: where other programs
have the machine too, it says more than requests a second do.

At last `soak`: so many requests of clients that come and go, and what the server then holds of memory and
descriptors, beside what it held after the first fifth of them. A policy that takes no time answers there.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
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
VISIT = 50
"""Requests after which a client of the soak leaves, and another comes."""
GROWTH = 16 << 20
"""Bytes that the server's memory may grow in the last four fifths: a sixth of the pictures that pass by."""
BAR = 3.0
"""How many times the requests a second of one at a time the batched ones have to reach."""


def observation(policy: Policy, rows: int) -> Observation:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 255, (rows, 1, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator)
    return Observation(images, (TEXT,) * rows, torch.zeros(rows, policy.state_size))


@contextmanager
def server(
    policy: Policy, limit: int, answer: Callable[[Observation], Tensor] | None = None
) -> Iterator[tuple[str, PolicyServer]]:
    """The policy behind a socket, in a thread, or what answers in its place: its address, and the server."""
    metadata = {
        "rove": {"chunk": policy.chunk, "action_spec": asdict(policy.action_spec), "keys": asdict(KEYS)}
    }
    serving = PolicyServer(
        answer or (lambda seen: act(policy, policy.action_spec, seen, None).actions),
        KEYS,
        metadata,
        ServerOptions(limit=limit),
    )
    taken, ready = bind("127.0.0.1", 0), threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(serving.run(taken, lambda port: ready.set())))
    thread.start()
    ready.wait()
    try:
        yield f"ws://127.0.0.1:{taken.getsockname()[1]}", serving
    finally:
        serving.stop()
        thread.join()


def request(state: int) -> bytes:
    """An observation as a client sends it."""
    return wire.pack(
        {
            "observation/image": np.zeros((SIDE, SIDE, 3), np.uint8),
            "observation/state": np.zeros(state, np.float32),
            "prompt": TEXT,
        }
    )


def ask(address: str, clients: int, seconds: float, state: int) -> dict[str, Any]:
    """Ask from `clients` threads for so long; in the process of the clients."""
    message = request(state)
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


def visit(address: str, clients: int, requests: int, state: int) -> None:
    """Ask so often in all from `clients` threads, in visits; in the process of the clients."""
    message = request(state)

    def once(_: int) -> None:
        with connect(address, compression=None) as client:
            client.recv()
            for _ in range(VISIT):
                client.send(message)
                assert isinstance(client.recv(), bytes)

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(once, range(requests // VISIT)))


def held() -> dict[str, int]:
    """What this process, the server's, holds."""
    process = psutil.Process()
    return {
        "resident_bytes": process.memory_info().rss,
        "descriptors": process.num_fds(),
        "threads": process.num_threads(),
    }


def soak(policy: Policy, clients: int, requests: int) -> dict[str, Any]:
    """Let clients come and go: what the server holds after a fifth of the requests, and after all."""
    chunk = torch.zeros(policy.chunk, policy.action_spec.dim)
    with server(policy, 32, lambda seen: chunk.repeat(len(seen), 1, 1)) as (address, serving):
        before = None
        for part in (requests // 5, requests - requests // 5):
            command = [sys.executable, __file__, "--visit", address, "--clients", str(clients)]
            subprocess.check_call([*command, "--requests", str(part), "--state", str(policy.state_size)])
            gc.collect()
            before, after = (held(), held()) if before is None else (before, held())
        answered = sample(serving, 'rove_requests_total{outcome="answered"}')
    grown = {name: after[name] - before[name] for name in after}
    kept = grown["resident_bytes"] <= GROWTH and grown["descriptors"] <= 0 and grown["threads"] <= 0
    return {
        "requests": int(answered), "clients_at_once": clients, "requests_a_client": VISIT,
        "after_a_fifth": before, "after_all": after, "grown": grown,
        "passed": kept and answered == requests,
    }  # fmt: skip


def sample(serving: PolicyServer, name: str) -> float:
    """A number of the server's metrics."""
    return next(
        float(line.rpartition(" ")[2])
        for line in serving.metrics.text().splitlines()
        if line.startswith(name)
    )


def alone(policy: Policy, rows: int, seconds: float) -> float:
    """Observations a second without a server, in batches of `rows`."""
    seen, count, start = observation(policy, rows), 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        act(policy, policy.action_spec, seen, None)
        count += rows
    return round(count / (time.perf_counter() - start), 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--soak", type=int, default=10_000, help="requests of the soak (10,000)")
    parser.add_argument("--ask", help=argparse.SUPPRESS)
    parser.add_argument("--visit", help=argparse.SUPPRESS)
    parser.add_argument("--requests", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--state", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ask:
        print(json.dumps(ask(args.ask, args.clients[0], args.seconds, args.state)))
        return
    if args.visit:
        visit(args.visit, args.clients[0], args.requests, args.state)
        return
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        policy = policies.load(measure.start_of(recipes.get("tabletop_ppo").build(), Path(folder)))
    for clients in args.clients:  # the first pass of each size allocates
        act(policy, policy.action_spec, observation(policy, clients), None)
    rows = []
    for clients in args.clients:
        row: dict[str, Any] = {"clients": clients, "alone": alone(policy, clients, args.seconds)}
        for name, limit in (("batched", 32), ("one_at_a_time", 1)):
            with server(policy, limit) as (address, serving):
                command = [sys.executable, __file__, "--ask", address, "--clients", str(clients)]
                command += ["--seconds", str(args.seconds), "--state", str(policy.state_size)]
                before = time.process_time()
                row[name] = json.loads(subprocess.check_output(command))
                spent = 1000 * (time.process_time() - before)
                row[name]["cpu_ms_per_request"] = round(
                    spent / sample(serving, 'rove_requests_total{outcome="answered"}'), 2
                )
                passes = sample(serving, "rove_batch_size_count")
                row[name]["mean_batch"] = round(sample(serving, "rove_batch_size_sum") / passes, 1)
        row["ratio"] = round(
            row["batched"]["requests_per_second"] / row["one_at_a_time"]["requests_per_second"], 2
        )
        row["cpu_ratio"] = round(
            row["one_at_a_time"]["cpu_ms_per_request"] / row["batched"]["cpu_ms_per_request"], 2
        )
        print(json.dumps(row), file=sys.stderr)
        rows.append(row)
    report = {
        "benchmark": "a served policy",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": round(load, 2),
        "rows": rows,
        "soak": soak(policy, 8, args.soak),
        "bar": BAR,
    }
    report["passed"] = max(row["ratio"] for row in rows) >= BAR and report["soak"]["passed"]
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
