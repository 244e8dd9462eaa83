"""Findings of checks: one line of a table, with the fix."""

from __future__ import annotations

import importlib.util
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


def optional_package(name: str, module: str, extra: str, purpose: str) -> Finding:
    """Tell whether a package that `extra` of Rove installs is there, without importing it."""
    if importlib.util.find_spec(module):
        return Finding(name, "ok", f"installed, for {purpose}")
    return Finding(name, "missing", f"optional, for {purpose}", f'.venv/bin/pip install -e ".[{extra}]"')


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
