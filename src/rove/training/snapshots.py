"""Supervised training on disk as it goes, so that a warm-up that was stopped goes on where it was."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from rove import checkpoint

State = Callable[[], dict[str, Any]]


class Snapshots:
    """The newest state of the newest phase of supervised training, in a directory of its own.

    What was made from other settings than `made_from`, or is damaged, counts as not there.
    """

    def __init__(
        self,
        directory: Path,
        made_from: Mapping[str, Any],
        *,
        check: Callable[[], None] = lambda: None,
        seconds: float = 60.0,
    ) -> None:
        """`check` raises where the training has to end now, which is saved first; else it is saved every so
        many `seconds`."""
        self._directory, self._check, self._seconds = directory, check, seconds
        self._key = json.dumps(made_from, sort_keys=True)
        self._saved = time.monotonic()
        self.parameters: set[str] = set()
        """Names of the parameters that any phase has trained until now, and a state therefore holds."""
        self.phase, self._state = self._load()
        if self.phase:
            self.parameters = set(self._state["policy"])

    def _load(self) -> tuple[str | None, dict[str, Any]]:
        if not self._directory.exists() or checkpoint.damage(self._directory) is not None:
            return None, {}
        file = self._directory / "state.pt"
        content = torch.load(file, weights_only=True, map_location="cpu")
        return (content["phase"], content["state"]) if content["key"] == self._key else (None, {})

    @property
    def step(self) -> int:
        """Optimizer steps that had been taken in `phase`."""
        return self._state["optimizer"]["steps"] if self.phase else 0

    def take(self, phase: str) -> dict[str, Any] | None:
        """The state in which this phase was left; None where it has not begun. It is given away, not kept."""
        if phase != self.phase:
            return None
        state, self._state = self._state, {}
        return state

    def keep(self, phase: str, state: State) -> None:
        """After each step: save where that is due, or where the training has to end."""
        try:
            self._check()
        except BaseException:  # an interrupt, for which the state is saved
            self._save(phase, state)
            raise
        if time.monotonic() - self._saved >= self._seconds:
            self._save(phase, state)

    def _save(self, phase: str, state: State) -> None:
        content = {"key": self._key, "phase": phase, "state": state()}
        checkpoint.write_atomically(self._directory, lambda draft: torch.save(content, draft / "state.pt"))
        self._saved = time.monotonic()

    def delete(self) -> None:
        """The training is complete."""
        shutil.rmtree(self._directory, ignore_errors=True)
