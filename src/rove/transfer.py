"""Tensors between host and device: what goes together is moved together.

A copy from ordinary host memory makes the host wait until the device has reached it, and each copy has a cost
of its own. So all tensors of a record travel as one block: to a GPU through pinned memory, without waiting;
back to the host with one wait for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def to(value: T, device: torch.device | str) -> T:
    """`value` with every tensor in it on `device`.

    `value` is a tensor, a dataclass, a tuple, a list or a dict, nested at will; what is neither stays as it
    is. The very same object is returned where nothing has to move. Tensors that were moved are views of one
    block.
    """
    device = torch.device(device)
    elsewhere: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        if not _is_on(tensor, device):
            elsewhere[id(tensor)] = tensor
        return tensor

    _map(value, note)
    moved: dict[int, Tensor] = {}
    for source in {tensor.device for tensor in elsewhere.values()}:
        some = {key: tensor for key, tensor in elsewhere.items() if tensor.device == source}
        moved |= zip(some, _move(list(some.values()), source, device), strict=True)
    return _map(value, lambda tensor: moved.get(id(tensor), tensor)) if moved else value


def _is_on(tensor: Tensor, device: torch.device) -> bool:
    return tensor.device.type == device.type and device.index in (None, tensor.device.index)


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with `change` applied to its tensors; the same object where that leaves all as they are."""
    if isinstance(value, Tensor):
        return change(value)
    if is_dataclass(value) and not isinstance(value, type):
        old = {f.name: getattr(value, f.name) for f in fields(value)}
        new = {name: _map(part, change) for name, part in old.items()}
        different = {name: part for name, part in new.items() if part is not old[name]}
        return replace(value, **different) if different else value
    if isinstance(value, dict):
        parts = [_map(part, change) for part in value.values()]
        same = all(new is old for new, old in zip(parts, value.values(), strict=True))
        return value if same else dict(zip(value, parts, strict=True))
    if isinstance(value, list | tuple):
        parts = [_map(part, change) for part in value]
        if all(new is old for new, old in zip(parts, value, strict=True)):
            return value
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _move(tensors: Sequence[Tensor], source: torch.device, device: torch.device) -> list[Tensor]:
    """Copies on `device` of tensors that are on `source`, in one transfer."""
    pinned = source.type == "cpu" and device.type == "cuda" and _can_pin()
    if len(tensors) == 1:
        one = tensors[0].pin_memory() if pinned else tensors[0]
        return [one.to(device, non_blocking=pinned)]
    # Elements of more bytes come first, so that every offset is a multiple of what begins there.
    order = sorted(range(len(tensors)), key=lambda i: -tensors[i].element_size())
    sizes = [tensors[i].numel() * tensors[i].element_size() for i in order]
    block = torch.empty(sum(sizes), dtype=torch.uint8, device=source, pin_memory=pinned)
    for i, part in zip(order, block.split(sizes), strict=True):
        _shaped(part, tensors[i]).copy_(tensors[i])
    there = block.to(device, non_blocking=pinned)
    moved = dict(zip(order, there.split(sizes), strict=True))
    return [_shaped(moved[i], tensor) for i, tensor in enumerate(tensors)]


@cache
def _can_pin() -> bool:
    """Whether host memory can be pinned: not in a container that may lock none, where copies then wait."""
    try:
        torch.empty(1, pin_memory=True)
    except RuntimeError:
        return False
    return True


def _shaped(part: Tensor, like: Tensor) -> Tensor:
    """The bytes `part` as a tensor of the dtype and shape of `like`."""
    return part.view(like.dtype).view(like.shape)
