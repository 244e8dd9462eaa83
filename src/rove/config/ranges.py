"""Ranges of numbers, which stand beside the fields of settings: `horizon: PositiveInt = 32`.

Every number has an upper bound: one that no machine, no number format or no lifetime reaches is a slip of the
hand, and would end in an overflow or never.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, get_args


@dataclass(frozen=True, slots=True)
class Range:
    """Values that a number may have."""

    words: str
    """The range in words: "at least 1"."""
    holds: Callable[[float], bool]


def at_least(low: float, most: float) -> Range:
    """Numbers from `low` to `most`."""
    return Range(f"at least {low} and at most {most}", lambda x: low <= x <= most)


def above(low: float, most: float) -> Range:
    """Numbers above `low`, up to `most`."""
    return Range(f"above {low} and at most {most}", lambda x: low < x <= most)


MAX_SEED = 2**32 - 1
"""Seeds of generators have 32 bits."""
MOST = 10**9
"""Steps, episodes and the like that a run may count: more would take years."""
HUGE = 10**6
"""Factors and thresholds: float32 still holds what such a one is multiplied with."""

PositiveInt = Annotated[int, at_least(1, MOST)]
NonNegativeInt = Annotated[int, at_least(0, MOST)]
PositiveFloat = Annotated[float, above(0, HUGE)]
NonNegativeFloat = Annotated[float, at_least(0, HUGE)]
Fraction = Annotated[float, Range("between 0 and 1", lambda x: 0 <= x <= 1)]

Seed = Annotated[int, at_least(0, MAX_SEED)]
Pixels = Annotated[int, at_least(1, 1024)]
"""Height and width of a picture: published policies see 224 to 448."""
Slots = Annotated[int, at_least(1, 65536)]
"""Environments side by side: the largest simulators on GPUs hold tens of thousands."""
Count = Annotated[int, at_least(0, 1024)]
"""Threads, processes, stages: no machine has more cores."""
Nodes = Annotated[int, at_least(0, 65536)]
Size = Annotated[int, at_least(1, 65536)]
"""Width of a layer: the largest models have 16384."""
Layers = Annotated[int, at_least(1, 1024)]
Chunk = Annotated[int, at_least(1, 1024)]
Pieces = Annotated[int, at_least(1, HUGE)]
"""Episodes or pictures to make, or chunks that an optimizer step sees: all of them are in memory."""
SomePieces = Annotated[int, at_least(0, HUGE)]
Actions = Annotated[int, at_least(1, HUGE)]
"""Length of an episode, or of a rollout in chunks."""
Temperature = Annotated[float, Range("at least 0.001 and at most 1000", lambda x: 1e-3 <= x <= 1e3)]
"""A sampling temperature that logits are divided by, in float32."""
Ratio = Annotated[float, above(0, 1000)]
"""A bound on the ratio of two probabilities: float32 has to hold its powers."""

Steps = Annotated[int, at_least(1, 1000)]
"""Denoising steps of a flow: published policies take 3 to 10."""
Level = Annotated[float, Range("above 0 and at most 1", lambda x: 0 < x <= 1)]
"""Noise level of a flow's stochastic steps."""
Draws = Annotated[int, at_least(1, 1024)]
Cameras = Annotated[int, at_least(1, 64)]
Delta = Annotated[int, at_least(0, 64)]
"""Numbers of a robot's state."""

LearningRate = Annotated[float, above(0, 1000)]
"""More moves every weight of AdamW further in a step than it may ever be."""


def range_of(annotation: Any) -> Range | None:
    """The range that a field, or each item of a tuple, is annotated with, also one that may be None; None
    where there is no range."""
    options = (annotation, *get_args(annotation))
    found = (each for option in options for each in getattr(option, "__metadata__", ()))
    return next((each for each in found if isinstance(each, Range)), None)
