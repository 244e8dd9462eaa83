"""Policies by name: the one place that knows which class builds or reads which."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rove.config.schema import PolicyConfig, Run
from rove.errors import RoveError, nearest
from rove.policies import hub
from rove.policies.base import Policy, Work
from rove.types import ActionSpec

_ENTRY_POINTS = {"openvla": "rove.policies.openvla:OpenVLA"}


def register(kind: str, entry_point: str) -> None:
    """Make "module:Class" the policy `kind`, imported when it is first used.

    The class needs `build(config, *, chunk, action_spec, image_size, vocabulary, statistics, seed, device)`,
    which makes a policy or, where `config.checkpoint` is set, reads one and runs it as `config` says, and
    `from_pretrained(directory)`, which reads one as it was saved; its checkpoints need a config.json whose
    "model_type" is `kind`. Raises RoveError where the name is taken.
    """
    if _ENTRY_POINTS.get(kind, entry_point) != entry_point:
        raise RoveError(f"The policy {kind!r} is already registered as {_ENTRY_POINTS[kind]}.")
    _ENTRY_POINTS[kind] = entry_point


def kinds() -> tuple[str, ...]:
    """The registered names."""
    return tuple(sorted(_ENTRY_POINTS))


def entry_points() -> dict[str, str]:
    """Kind -> entry point, for a worker process to register the same."""
    return dict(_ENTRY_POINTS)


def build(
    config: PolicyConfig,
    *,
    chunk: int,
    action_spec: ActionSpec,
    image_size: int,
    vocabulary: Sequence[str],
    statistics: Mapping[str, Any] | None,
    seed: int,
    device: torch.device | str = "cpu",
) -> Policy:
    """A policy as `config` says, on `device`: new, or read from `config.checkpoint`.

    `chunk` is C; `vocabulary` the words of the suite's instructions; `statistics` those of the
    demonstrations, `{key: {"action": {"q01", "q99", "mask"}}}`, or None for the bounds of `action_spec`.
    A checkpoint keeps its own vocabulary, and without `statistics` its own and its action spec too: see
    `actions.ActionConverter`.
    """
    kind = config.kind if config.checkpoint is None else _kind(config.checkpoint)
    return _policy_class(kind).build(
        config,
        chunk=chunk,
        action_spec=action_spec,
        image_size=image_size,
        vocabulary=vocabulary,
        statistics=statistics,
        seed=seed,
        device=torch.device(device),
    )


def load(directory: Path | str, **settings: Any) -> Policy:
    """The policy that a checkpoint (a directory, or a name on the hub) holds, as saved but for `settings`."""
    return _policy_class(_kind(directory)).from_pretrained(directory, **settings)


def restore(run: Run, directory: Path, action_spec: ActionSpec, device: torch.device) -> Policy:
    """The policy that a checkpoint directory of `run` holds, set up as the run says."""
    return build(
        replace(run.policy, checkpoint=str(directory)),
        chunk=run.rollout.chunk,
        action_spec=action_spec,
        image_size=run.env.image_size,
        vocabulary=(),
        statistics=None,
        seed=run.seed,
        device=device,
    )


def memory(run: Run) -> str | None:
    """What the run's policy needs on the device that holds it, in words; None where its class cannot say."""
    say = getattr(_class_of(run), "memory", None)
    return None if say is None else say(run)


def work(run: Run) -> Work:
    """What the run's policy costs a device. Raises RoveError where its class cannot say."""
    count = getattr(_class_of(run), "work", None)
    if count is None:
        raise RoveError(
            f"The policy {run.policy.kind!r} does not say what it costs (a static method work(run) -> Work): "
            "measure it on such a machine, rove plan RECIPE --save FILE, and plan with --profile FILE."
        )
    return count(run)


def _class_of(run: Run) -> Any:
    """The class of the run's policy, without a look at a checkpoint that may not be here."""
    if run.policy.checkpoint is None or hub.is_hub_name(run.policy.checkpoint):
        return _policy_class(run.policy.kind)
    return _policy_class(_kind(run.policy.checkpoint))


def _kind(checkpoint: Path | str) -> str:
    directory = hub.locate(checkpoint)
    path = directory / "config.json"
    if not path.is_file() and (directory / "adapter_config.json").is_file():
        return _kind(json.loads((directory / "adapter_config.json").read_text())["base_model_name_or_path"])
    if not path.is_file():
        raise RoveError(f"{directory} is not a checkpoint directory: it has no config.json.")
    return str(json.loads(path.read_text()).get("model_type"))


def _policy_class(kind: str) -> Any:
    if kind not in _ENTRY_POINTS:
        raise RoveError(f"Unknown policy {kind!r}. {nearest(kind, _ENTRY_POINTS)}")
    module, _, name = _ENTRY_POINTS[kind].partition(":")
    return getattr(importlib.import_module(module), name)
