"""The functions of the public API that the command line does not share as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rove import host
from rove.config import load
from rove.config.schema import EvaluationConfig
from rove.envs import conventions
from rove.envs import registry as envs
from rove.envs.base import VectorEnv
from rove.errors import RoveError
from rove.evaluation.checkpoint import configured, evaluate_checkpoint, policy_of, run_of
from rove.policies import registry as policies
from rove.policies.base import Policy, SamplingNoise
from rove.preflight import before_run
from rove.rollout.collect import act
from rove.serving import installed
from rove.serving.keys import read_keys
from rove.types import Autoreset, Conventions, EpisodeSpec, EvalReport, Mode, Observation

if TYPE_CHECKING:
    from rove.serving.server import ServerOptions


def evaluate(
    checkpoint: Path | str,
    suite: str,
    *,
    variants: str = "none",
    episodes: int = 256,
    num_envs: int = 64,
    decoding: Mode = "greedy",
    seed: int = 0,
    settings: dict[str, Any] | None = None,
    out: Path | str | None = None,
) -> EvalReport:
    """Run a policy on held-out episodes of a suite, as `rove eval` does: a checkpoint, a served one
    ("ws://HOST:PORT"), or "random".

    `suite` is an environment, with or without tasks: "tabletop", "libero:130". `episodes` are run for each of
    `variants` ("none", names separated by commas, or "all"), `num_envs` at once. `settings` change the
    environment and the policy: `{"env.protocol": "published", "policy.dtype": "bfloat16"}`. With `out` the
    outcomes are written there as JSON, and a stopped evaluation goes on. Raises RoveError before the first
    episode where something does not fit.
    """
    words = [f"--{key}={value}" for key, value in (settings or {}).items()]
    config = load.decode(
        EvaluationConfig, {"episodes": episodes, "num_envs": num_envs, "decoding": decoding}, "evaluation"
    )
    file = None if out is None else Path(out)
    return evaluate_checkpoint(checkpoint, suite, None, variants, config, seed=seed, settings=words, out=file)


def make_env(
    suite: str,
    *,
    num_envs: int = 1,
    chunk: int = 8,
    autoreset: Autoreset = "refill",
    gpu: int | None = None,
    **settings: Any,
) -> VectorEnv:
    """`num_envs` environments of a suite ("tabletop", "libero:object"), idle until they are reset.

    They are stepped `chunk` actions at a time. `settings` are those of the suite's section of a run, such as
    `image_size=128`. `gpu` is the CUDA index of the device that they simulate or render on, where they use
    one. Raises RoveError on an unknown suite or setting.
    """
    return envs.make(
        envs.configure(suite, **settings), num_envs=num_envs, chunk=chunk, autoreset=autoreset, gpu=gpu
    )


def serve(
    checkpoint: Path | str,
    suite: str | None = None,
    *,
    keys: str = "libero",
    images: Sequence[str] | None = None,
    state: Sequence[str] | None = None,
    prompt: str = "",
    options: ServerOptions | None = None,
    settings: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> None:
    """Serve a checkpoint by openpi's websocket protocol until SIGINT or SIGTERM, as `rove serve` does.

    It answers greedily, in the conventions of `suite`; None: those of the run that the checkpoint is of, or
    else its own. `keys` names the entries that clients send ("libero", "droid", "aloha"), `images`, `state`
    and `prompt` some of them. `settings` are words such as "--policy.dtype=bfloat16". Raises RoveError where
    the port is taken or the policy does not fit the suite, before anybody can connect.
    """
    import asyncio

    with installed():
        from rove.serving.server import PolicyServer, ServerOptions, bind

    options, entries = options or ServerOptions(), read_keys(keys, images, state, prompt)
    with closing(bind(options.host, options.port)) as taken:
        policy, known, instruction = _policy_to_serve(Path(checkpoint), suite, settings, say)
        spec = known.action_spec if known else policy.action_spec
        if images is None:
            entries = replace(entries, images=entries.images[: _pictures(policy, known)])
        blank = Observation(
            torch.zeros(1, len(entries.images), _SIDE, _SIDE, 3, dtype=torch.uint8),
            (instruction,),
            torch.zeros(1, policy.state_size) if policy.state_size else None,
        )

        def answer(observation: Observation) -> Tensor:
            words = ((text, policy.unreadable(text)) for text in observation.instruction)
            if unread := next(((text, word) for text, word in words if word is not None), None):
                raise RoveError(
                    f"The policy cannot read {unread[1]!r} of {unread[0]!r}: use words that it knows."
                )
            # A policy that begins with noise begins with the same each time: one observation, one answer.
            nothing = torch.zeros(len(observation), dtype=torch.long)
            return act(policy, spec, observation, SamplingNoise(0, nothing, nothing), mode="greedy").actions

        # The first pass of each size compiles, allocates and may fail: before anybody waits for it.
        for size in {1, options.limit}:
            answer(Observation.cat([blank] * size))
        metadata = {
            "rove": {
                "version": version("rove"),
                "policy": str(checkpoint),
                "chunk": policy.chunk,
                "action_spec": asdict(spec),
                "keys": asdict(entries),
            }
        }
        server = PolicyServer(answer, entries, metadata, options)

        def ready(port: int) -> None:
            say(f"Serving {checkpoint} at ws://{options.host}:{port}; /healthz and /metrics there too.")

        asyncio.run(server.run(taken, ready))


_SIDE = 224
"""Pixels of a picture's side, as openpi's clients send it."""


def _policy_to_serve(
    path: Path, suite: str | None, settings: Sequence[str], say: Callable[[str], None]
) -> tuple[Policy, Conventions | None, str]:
    """Return the policy at `path`, the conventions that it is to answer in (None: its own), and an
    instruction that it understands."""
    run = run_of(path)
    name = suite or (run.env.kind if run else None)
    if name is None:
        return policies.load(path, device=host.device("auto")), None, ""
    kind, _, tasks = name.partition(":")
    asked, known = configured(run, kind, tasks or None, settings), conventions.of(name)
    listed = envs.suite(asked.env)
    _, placed = policy_of(path, asked, run is not None, settings)
    policy = placed(known.action_spec)
    assert isinstance(policy, Policy)
    if warnings := before_run(partial(policy.preflight, rl=False), listed, known.action_spec):
        say(warnings)
    task = listed.tasks[0]
    episode = EpisodeSpec(task, listed.initial_states(task, "train")[0])
    return policy, known, listed.instruction(episode)


def _pictures(policy: Policy, known: Conventions | None) -> int:
    """Return the number of pictures that the policy sees. Raises RoveError where nothing says it."""
    if policy.num_images is not None:
        return policy.num_images
    if known is not None and len(known.images) == 1:
        return known.images[0]
    raise RoveError(
        "The checkpoint does not say how many pictures it sees: name those that it takes, in their order, "
        "with --images KEY or --images KEY,KEY."
    )
