"""Tensors that travel together: what arrives is what left, whatever it was part of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rove import transfer


class Pair(NamedTuple):
    first: Tensor
    second: Tensor | None


@dataclass(frozen=True)
class Record:
    name: str
    tensor: Tensor
    parts: list[Tensor]
    by_name: dict[str, Tensor]
    pair: Pair


def record() -> Record:
    return Record(
        "r",
        torch.arange(6, dtype=torch.int64).view(2, 3),
        [torch.rand(3), torch.empty(0, 2)],
        {"mask": torch.tensor([True, False, True]), "image": torch.randint(0, 256, (5,), dtype=torch.uint8)},
        Pair(torch.rand(2, 4).T, None),
    )


def test_what_is_there_already_is_the_same_object() -> None:
    value = record()
    assert transfer.to(value, "cpu") is value
    assert transfer.to(None, "cpu") is None and transfer.to((), "cpu") == ()


def test_a_record_moves_whole() -> None:
    moved = transfer.to(record(), "meta")
    tensors = (moved.tensor, *moved.parts, *moved.by_name.values(), moved.pair.first)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.name == "r" and moved.pair.second is None and isinstance(moved.pair, Pair)


def test_tensors_of_every_dtype_keep_their_values_in_one_block() -> None:
    """By the block that a transfer makes, on one device: values, shapes and strides of what is not
    contiguous."""
    value = record()
    tensors = [value.tensor, *value.parts, *value.by_name.values(), value.pair.first, torch.tensor(3.5)]
    cpu = torch.device("cpu")
    for tensor, copy in zip(tensors, transfer._move(tensors, cpu, cpu), strict=True):
        assert copy.dtype == tensor.dtype and torch.equal(copy, tensor)
        assert copy is not tensor
