"""Rates of GPUs, for bounds on time. Imports nothing, so that a plan can be made for cards that are not
here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Card:
    """Rates of a GPU, as large operations reach them and not as its data sheet has them."""

    name: str
    matrices: float
    """FLOP/s of bfloat16 matrix products."""
    float32: float
    """FLOP/s of float32 matrix products, without TF32."""
    bandwidth: float
    """Bytes/s of its memory."""
    bus: float
    """Bytes/s to and from pinned host memory."""
    memory: int
    """Bytes."""
    kernel: float = 2.0e-6
    """Seconds that the shortest kernel takes."""
    launch: float = 6.0e-6
    """Seconds that a launch from eager Python takes the host."""


CARDS = {"h100": Card("H100 SXM", 798e12, 52e12, 3.0e12, 50e9, 80 * 2**30)}
"""By the names that `rove plan --card` takes."""
