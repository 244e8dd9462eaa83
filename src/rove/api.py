"""The functions of the public API that the command line does not share as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rove.config import load
from rove.config.schema import EvaluationConfig
from rove.envs import registry as envs
from rove.envs.base import VectorEnv
from rove.evaluation.checkpoint import evaluate_checkpoint
from rove.types import Autoreset, EvalReport, Mode


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
    """Run a checkpoint, or "random", on held-out episodes of a suite, as `rove eval` does.

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
    return evaluate_checkpoint(
        Path(checkpoint), suite, None, variants, config, seed=seed, settings=words, out=file
    )


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
