"""Conversion of actions between a policy's convention and an environment's."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rove.errors import RoveError, nearest
from rove.types import ActionSpec

_UNITS = {"m": ("length", 1.0), "cm": ("length", 0.01), "mm": ("length", 0.001),
          "rad": ("angle", 1.0), "deg": ("angle", torch.pi / 180), "1": ("none", 1.0)}  # fmt: skip


class ActionConverter:
    """A map of actions from one `ActionSpec` to another: reorders, scales units, flips the gripper, clips.

    Dimensions are matched by name. Lengths and angles are scaled by their units; a dimensionless ("1")
    dimension is mapped linearly from the source's bounds onto the target's, mirrored where it is the
    gripper and the two disagree on which bound opens it. The result is clipped to the target's bounds.
    """

    def __init__(self, source: ActionSpec, target: ActionSpec) -> None:
        """Prepare the map. Raises RoveError where frame or control mode differ, or a dimension is missing."""
        for name in ("frame", "control"):
            ours, theirs = getattr(source, name), getattr(target, name)
            if ours != theirs:
                raise RoveError(
                    f"The policy's actions have {name}={ours!r}, the environment expects {theirs!r}. No "
                    f"constant factor maps one onto the other: use a policy trained with {name}={theirs!r}."
                )
        index, scale, offset = [], [], []
        for i, name in enumerate(target.names):
            if name not in source.names:
                raise RoveError(
                    f"The environment expects an action dimension {name!r} that the policy lacks. "
                    f"{nearest(name, source.names)}"
                )
            j = source.names.index(name)
            factor, shift = _affine(source, j, target, i)
            index.append(j)
            scale.append(factor)
            offset.append(shift)
        self._index = torch.tensor(index)
        self._scale = torch.tensor(scale, dtype=torch.float32)
        self._offset = torch.tensor(offset, dtype=torch.float32)
        self._low = torch.tensor(target.low, dtype=torch.float32)
        self._high = torch.tensor(target.high, dtype=torch.float32)

    def __call__(self, actions: Tensor) -> Tensor:
        """Convert actions [..., A of the source] to float32 [..., A of the target], on the CPU."""
        picked = actions.cpu().float()[..., self._index]
        return (picked * self._scale + self._offset).clamp(self._low, self._high)


def _affine(source: ActionSpec, j: int, target: ActionSpec, i: int) -> tuple[float, float]:
    """Return factor and offset of one dimension."""
    for unit in (source.units[j], target.units[i]):
        if unit not in _UNITS:
            raise RoveError(f"Unknown unit {unit!r} of {target.names[i]!r}. {nearest(unit, _UNITS)}")
    (quantity, per_source), (expected, per_target) = _UNITS[source.units[j]], _UNITS[target.units[i]]
    if quantity != expected:
        raise RoveError(
            f"Action dimension {target.names[i]!r} is in {source.units[j]!r} in the policy and in "
            f"{target.units[i]!r} in the environment. Give both a unit of the same quantity."
        )
    if quantity != "none":
        return per_source / per_target, 0.0
    low, high = source.low[j], source.high[j]
    if not math.isfinite(high - low):
        raise RoveError(
            f"The policy does not say between which bounds its action dimension {target.names[i]!r} lies, so "
            "it cannot be mapped onto the environment's. Give its config.json an action_spec, below rove."
        )
    onto_low, onto_high = target.low[i], target.high[i]
    if target.names[i] == "gripper" and source.gripper != target.gripper:
        onto_low, onto_high = onto_high, onto_low
    if (low, high) == (onto_low, onto_high):
        return 1.0, 0.0
    factor = (onto_high - onto_low) / (high - low)
    return factor, onto_low - factor * low
