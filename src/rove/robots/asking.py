"""Asking a served policy while the arm moves: a thread that has at most one question under way."""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass

import numpy as np
import torch

from rove.errors import RoveError
from rove.policies.actions import ActionConverter
from rove.robots.base import RobotObservation
from rove.serving.remote import Gone, RemotePolicy
from rove.types import ActionSpec, Observation


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What became of a question."""

    period: int
    """Number of the period whose observation was sent."""
    seconds: float
    """How long it took."""
    actions: np.ndarray | None = None
    """float64 [C, A] in the arm's convention; None where there are none."""
    problem: str = ""
    """Why there are none."""
    gone: bool = False
    """Whether that is because the server does not answer."""


class Asker:
    """Asks a served policy, without making anybody wait."""

    def __init__(self, policy: RemotePolicy, spec: ActionSpec, instruction: str) -> None:
        """`spec` is the arm's convention. Raises RoveError where the policy's cannot be turned into it."""
        self._policy, self._instruction = policy.placed(spec), instruction
        self._convert = None
        if self._policy.action_spec != spec:
            self._convert = ActionConverter(self._policy.action_spec, spec)
        self._questions: queue.SimpleQueue[tuple[int, Observation] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self._asked: float | None = None
        self._thread = threading.Thread(target=self._run, name="asks the policy", daemon=True)
        self._thread.start()

    @property
    def chunk(self) -> int:
        """C, actions of an answer."""
        return self._policy.chunk

    @property
    def waiting(self) -> float | None:
        """Seconds that the question under way has taken; None where there is none."""
        return None if self._asked is None else time.monotonic() - self._asked

    def ask(self, seen: RobotObservation, period: int) -> None:
        """Ask for the actions from a period on. Nothing may be under way."""
        assert self._asked is None, "a question is under way"
        images = np.stack([frame.image for frame in seen.frames.values()])
        state = torch.from_numpy(seen.state[None]) if len(seen.state) else None
        self._asked = time.monotonic()
        self._questions.put(
            (period, Observation(torch.from_numpy(images[None]), (self._instruction,), state))
        )

    def poll(self) -> Answer | None:
        """Return the answer, once it is there."""
        try:
            answer = self._answers.get_nowait()
        except queue.Empty:
            return None
        self._asked = None
        return answer

    def settle(self, patience: float) -> None:
        """Wait for what is under way, and forget it: it was asked in an episode that is over."""
        until = time.monotonic() + patience
        while self._asked is not None and time.monotonic() < until:
            if self.poll() is None:
                time.sleep(0.01)

    def close(self) -> None:
        """Ask no more; an answer that is under way is not waited for."""
        self._questions.put(None)

    def _run(self) -> None:
        while (question := self._questions.get()) is not None:
            period, observation = question
            begun = time.monotonic()
            actions, problem, gone = None, "", False
            try:
                answered = self._policy.act(observation, "greedy").actions
                if self._convert is not None:
                    answered = self._convert(answered)
                actions = answered[0].numpy().astype(float)
            except Gone as error:
                problem, gone = str(error), True
            except RoveError as error:
                problem = str(error)
            except Exception as error:  # noqa: BLE001  # the loop decides, and is not to wait for ever
                problem = f"{type(error).__name__}: {error}"
            seconds = time.monotonic() - begun
            self._answers.put(Answer(period, seconds, actions, problem, gone))
        self._policy.close()
