"""Demonstrations that a user brings, in place of those of a suite's scripted expert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rove.config import load
from rove.config.schema import Run
from rove.envs.base import VectorEnv
from rove.envs.sampler import EpisodeSampler
from rove.errors import RoveError
from rove.policies import registry as policies
from rove.training.demonstrations import described, lengthened, load_demonstrations
from rove.types import ActionSpec, Demonstrations


def bring(run: Run, env: VectorEnv) -> tuple[Demonstrations, int]:
    """The demonstrations in `run.sft.data`, as many actions a row as the policy predicts, and the number of
    actions between two rows.

    Raises RoveError where they are not what the environment shows a policy.
    """
    assert run.sft is not None and run.sft.data is not None
    path = Path(run.sft.data)
    made, _, _ = described(path)
    refuse_other_actions(path, made, env.action_spec, env.suite.name)
    demonstrations = load_demonstrations(path)
    _refuse_other_sights(run, path, demonstrations, env)
    every, horizon = made.get("chunk", demonstrations.actions.shape[1]), policies.horizon(run)
    if "chunk" in made and horizon > demonstrations.actions.shape[1]:
        # Rows in which the expert missed on purpose are not there: what follows a row may be another time.
        raise RoveError(
            f"{path} shows {demonstrations.actions.shape[1]} actions from each picture on, and the policy "
            f"predicts {horizon}: collect them for this recipe."
        )
    return lengthened(demonstrations, horizon), every


def refuse_other_actions(path: Path, made: dict[str, Any], spec: ActionSpec, suite: str) -> None:
    """Raise RoveError where the file's actions were recorded in another convention than the suite's.

    `made` is what the file was made from; where that does not say, nothing is compared.
    """
    if "action_spec" not in made:
        return
    own, wanted = made["action_spec"], load.to_dict(spec)
    for name in wanted:
        if own.get(name) != wanted[name]:
            raise RoveError(
                f"{path} was imported for {made['suite']}, with {name} = {own.get(name)!r} of its actions, "
                f"and {suite} has {wanted[name]!r}: import it again, --suite {suite}."
            )


def _refuse_other_sights(run: Run, path: Path, demonstrations: Demonstrations, env: VectorEnv) -> None:
    """Raise RoveError where pictures or the robot's state differ from those of the environment."""
    seen = env.reset(EpisodeSampler(env.suite, run.seed, stream=1).take(1))
    theirs, ours = tuple(demonstrations.images.shape[1:]), tuple(seen.images.shape[1:])
    if theirs != ours:
        raise RoveError(
            f"{path} shows {_pictures(theirs)}, and {env.suite.name} {_pictures(ours)}: import the data "
            f"again with --image-size {ours[1]} and as many cameras (--images KEY,KEY), or change env."
        )
    if demonstrations.actions.shape[2] != env.action_spec.dim:
        raise RoveError(
            f"{path} has actions of {demonstrations.actions.shape[2]} numbers, {env.suite.name} of "
            f"{env.action_spec.dim}: import the data for this suite."
        )
    state = demonstrations.state
    if state is None and run.policy.proprio:
        raise RoveError(
            f"policy.proprio reads the robot's state, and {path} has none: set --policy.proprio false, or "
            "import it with --state KEY."
        )
    if state is not None and seen.state is not None and state.shape[1] != seen.state.shape[1]:
        raise RoveError(
            f"{path} has {state.shape[1]} numbers of the robot's state, {env.suite.name} "
            f"{seen.state.shape[1]}: import the data again with other --state KEYS."
        )


def _pictures(shape: tuple[int, ...]) -> str:
    count, height, width, _ = shape
    return f"{count} picture{'s' if count > 1 else ''} of {height} × {width}"
