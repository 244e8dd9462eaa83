"""Findings of checks: one line of a table, with the fix."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "pass", "warn", "missing", "fail", "error"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the table."""

    name: str
    status: Status
    detail: str
    fix: str = ""
    """The remedy; empty where nothing need be done."""


def table(findings: Iterable[Finding]) -> str:
    """The findings as aligned text, each fix on a line of its own."""
    rows = list(findings)
    width = max(len(row.name) for row in rows)
    lines = []
    for row in rows:
        lines.append(f"{row.status:>7}  {row.name:<{width}}  {row.detail}")
        if row.fix:
            lines.append(f"{'':>7}  {'':<{width}}  → {row.fix}")
    return "\n".join(lines)
