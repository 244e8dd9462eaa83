"""The registry of policies by kind, which knows which class builds or reads each of them."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rove.config.schema import PolicyConfig, Run
from rove.errors import RoveError, nearest
from rove.policies import hub
from rove.policies.base import Policy, Work
from rove.policies.reading import read_json
from rove.runtime.setup import repeat
from rove.types import ActionSpec

_ENTRY_POINTS = {
    "openvla": "rove.policies.openvla:OpenVLA",
    **dict.fromkeys(("smolvla", "pi0", "pi05"), "rove.policies.flow:FlowVLA"),
}
_OPENPI = "pi0"
"""Kind of a checkpoint in openpi's layout, which names none: its class tells its families apart."""


def register(kind: str, entry_point: str) -> None:
    """Make "module:Class" the policy `kind`, imported when it is first used.

    The class derives from `policies.base.Policy`; its checkpoints need a config.json whose "model_type", or
    "type", is `kind`. Raises RoveError where the name is taken.
    """
    if _ENTRY_POINTS.get(kind, entry_point) != entry_point:
        raise RoveError(f"The policy {kind!r} is already registered as {_ENTRY_POINTS[kind]}.")
    _ENTRY_POINTS[kind] = entry_point
    repeat(register, kind, entry_point)


def kinds() -> tuple[str, ...]:
    """Return the registered names."""
    return tuple(sorted(_ENTRY_POINTS))


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
    """Make a policy on `device` as `config` says: new, or read from `config.checkpoint`.

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


def load(directory: Path | str, *, device: torch.device | str = "cpu", **settings: Any) -> Policy:
    """Read the policy of a checkpoint (a directory, or a name on the hub) as saved, except for `settings`.

    A "dtype" may be named, "bfloat16". Raises RoveError on a setting that its class does not take.
    """
    policy = _policy_class(_kind(directory))
    known = inspect.signature(policy.from_pretrained).parameters
    if wrong := [name for name in settings if name not in known]:
        raise RoveError(f"A {policy.__name__} takes no {wrong[0]!r} when it is read: leave it out.")
    if isinstance(dtype := settings.get("dtype"), str):
        settings["dtype"] = getattr(torch, dtype)
    return policy.from_pretrained(directory, device=device, **settings)


def restore(run: Run, directory: Path, action_spec: ActionSpec, device: torch.device) -> Policy:
    """Read the policy of a checkpoint directory of `run`, set up as the run says."""
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


def check(run: Run) -> None:
    """Raise RoveError where the run's policy lacks a method, or cannot do what the run asks of it."""
    _class_of(run).check(run)


def unknown_word(run: Run, vocabulary: Sequence[str], instructions: Sequence[str]) -> str | None:
    """Return the first word of `instructions` that the run's new policy could not read; None: none."""
    return _class_of(run).unknown_word(vocabulary, instructions)


def horizon(run: Run) -> int:
    """Return H, the number of actions that the run's policy predicts at once."""
    return _class_of(run).horizon_of(run)


def memory(run: Run) -> str | None:
    """Describe what the run's policy needs on the device that holds it; None where its class cannot say."""
    return _class_of(run).memory(run)


def work(run: Run) -> Work:
    """Count what the run's policy costs a device. Raises RoveError where its class cannot say."""
    return _class_of(run).work(run)


def _class_of(run: Run) -> type[Policy]:
    """Return the class of the run's policy, without reading a checkpoint that may not be here."""
    name = run.policy.checkpoint
    if name is None or (hub.is_hub_name(name) and not Path(name).is_dir()):
        return _policy_class(run.policy.kind)
    return _policy_class(_kind(name))


def _kind(checkpoint: Path | str) -> str:
    """Return the kind of a checkpoint's policy, by its config.json or that of the base of its adapter.

    openpi's checkpoints are known by their statistics, in norm_stats.json.
    """
    local = Path(checkpoint)
    if local.is_dir() and not (local / "config.json").exists() and any(local.glob("**/norm_stats.json")):
        return _OPENPI
    path = hub.locate(checkpoint) / "config.json"
    if not path.exists():
        adapter = path.with_name("adapter_config.json")
        base = read_json(adapter).need("base_model_name_or_path", str)
        path = hub.locate(base) / "config.json"
        if not path.exists():
            raise RoveError(
                f"{adapter} names {base} as its base, which has no config.json: give a whole model."
            )
    about = read_json(path)
    key = "type" if "type" in about else "model_type"  # LeRobot's name of it, and everybody else's
    if key not in about and any(path.parent.glob("**/norm_stats.json")):
        return _OPENPI
    kind = about.need(key, str)
    if kind not in _ENTRY_POINTS:
        raise RoveError(f"{path}: unknown policy, {key} = {kind!r}. {nearest(kind, _ENTRY_POINTS)}")
    return kind


def _policy_class(kind: str) -> type[Policy]:
    """Import the class of a kind. Raises RoveError where it is not a `Policy`, or lacks a method."""
    if kind not in _ENTRY_POINTS:
        raise RoveError(
            f"Unknown policy {kind!r}. {nearest(kind, _ENTRY_POINTS)} One of your own is known where the "
            "file that registers it is named: rove eval --import FILE.py."
        )
    module, _, name = _ENTRY_POINTS[kind].partition(":")
    found = getattr(importlib.import_module(module), name)
    if not (isinstance(found, type) and issubclass(found, Policy)):
        raise RoveError(
            f"The policy {kind!r} ({_ENTRY_POINTS[kind]}): derive it from rove.policies.base.Policy."
        )
    if lacking := sorted(found.__abstractmethods__):
        raise RoveError(
            f"The policy {kind!r} ({_ENTRY_POINTS[kind]}) lacks {', '.join(lacking)}: write them as "
            "rove.policies.base.Policy describes them."
        )
    return found
