"""Errors that a user can act on: what was wrong, what was expected, and the nearest valid choice."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RoveError(ValueError):
    """A mistake in input, configuration or environment, with the fix in its message."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """A sentence that offers the closest valid choice, or lists them all.

    Example: `nearest("tabeltop", ["tabletop", "libero"])` -> `"Did you mean 'tabletop'?"`
    """
    options = sorted(choices)
    close = difflib.get_close_matches(word, options, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Choose one of: {', '.join(options)}."
