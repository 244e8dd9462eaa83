"""Values of arguments: text in, a value out, or an error that says what was expected."""

from __future__ import annotations

import argparse


def whole(text: str, low: int = 0, high: int | None = None) -> int:
    """A whole number from `low` to `high`; None: to any that has at most ten digits."""
    if not text.isdecimal() or len(text) > 10 or int(text) < low or (high is not None and int(text) > high):
        wanted = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise argparse.ArgumentTypeError(f"expected a whole number {wanted}, got {text[:40]!r}")
    return int(text)


def number(text: str, low: float, high: float) -> float:
    """A number from `low` to `high`."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"expected a number from {low:g} to {high:g}, got {text[:40]!r}")
    return value


def milliseconds(text: str) -> float:
    """Milliseconds, at most ten seconds of them, as seconds."""
    return number(text, 0, 10_000) / 1000


def names(text: str) -> tuple[str, ...]:
    """Names separated by commas."""
    return tuple(name for name in text.split(",") if name)
