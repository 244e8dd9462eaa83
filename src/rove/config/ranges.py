"""Ranges of numbers, which stand beside the fields of settings: `horizon: PositiveInt = 32`."""

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


PositiveInt = Annotated[int, Range("at least 1", lambda x: x >= 1)]
NonNegativeInt = Annotated[int, Range("at least 0", lambda x: x >= 0)]
PositiveFloat = Annotated[float, Range("above 0", lambda x: x > 0)]
NonNegativeFloat = Annotated[float, Range("at least 0", lambda x: x >= 0)]
Fraction = Annotated[float, Range("between 0 and 1", lambda x: 0 <= x <= 1)]


def range_of(annotation: Any) -> Range | None:
    """The range that a field is annotated with, also one that may be None; None where there is no range."""
    options = (annotation, *get_args(annotation))
    found = (each for option in options for each in getattr(option, "__metadata__", ()))
    return next((each for each in found if isinstance(each, Range)), None)
