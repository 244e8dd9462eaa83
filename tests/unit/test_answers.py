"""What an environment answers is checked, not cast: each wrong answer is named."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.point_env import PointEnv

from rove.envs.answers import Checked, ends_no_process
from rove.errors import RoveError
from rove.types import ChunkResult, EpisodeSpec, Observation

B, C = 4, 5
EPISODES = [EpisodeSpec("forwards", state) for state in range(B)]


class Lying(PointEnv):
    """The point environment, whose answers are bent."""

    def __init__(self, reset: Callable[[Any], Any] = lambda o: o, step: Callable[[Any], Any] = lambda r: r):
        super().__init__(B, "stop", chunk=C, horizon=12)
        self.bend_reset, self.bend_step = reset, step

    def reset(self, episodes, where=None):
        return self.bend_reset(super().reset(episodes, where))

    def step_chunk(self, actions):
        return self.bend_step(super().step_chunk(actions))


def pictures(change: Callable[[torch.Tensor], Any]) -> Callable[[Observation], Observation]:
    return lambda o: replace(o, images=change(o.images))


SEEN: dict[str, tuple[Callable[[Observation], Any], str]] = {
    "another size": (pictures(lambda i: i[:, :, :2]), r"uint8 \[4, 1, 2, 4, 3\] as images, expected uint8"),
    "0 to 1": (pictures(lambda i: i.float() / 255), r"float32 \[4, 1, 4, 4, 3\] as images"),
    "channels first": (pictures(lambda i: i.permute(0, 1, 4, 2, 3)), r"\[4, 1, 3, 4, 4\] as images"),
    "a row less": (pictures(lambda i: i[:-1]), r"uint8 \[3, 1, 4, 4, 3\] as images"),
    "an array": (pictures(lambda i: i.numpy()), "a ndarray as images"),
    "no words": (lambda o: replace(o, instruction=(None,) * B), "4 of NoneType as instruction"),
    "a word less": (lambda o: replace(o, instruction=o.instruction[1:]), "3 of str as instruction"),
    "one text": (lambda o: replace(o, instruction="move"), "as instruction, expected 4 strings"),
    "NaN": (lambda o: replace(o, state=o.state * torch.nan), "no finite numbers in row 0 as state"),
    "doubles": (lambda o: replace(o, state=o.state.double()), r"float64 \[4, 1\] as state"),
    "another device": (pictures(lambda i: i.to("meta")), "on meta as images, expected one on cpu"),
    "nothing": (lambda o: None, "None as observation"),
}
DONE: dict[str, tuple[Callable[[ChunkResult], Any], str]] = {
    "NaN": (lambda r: replace(r, reward=r.reward * torch.nan), "one of nan as reward"),
    "infinity": (lambda r: replace(r, reward=r.reward + torch.inf), "one of inf as reward"),
    "far too much": (lambda r: replace(r, reward=r.reward + 1e38), "one of 1e[+]38 as reward"),
    "one a chunk": (
        lambda r: replace(r, reward=r.reward[:, :1].double()),
        r"float64 \[4, 1\] as reward, expected float32 \[4, 5\]",
    ),
    "a list": (lambda r: replace(r, reward=r.reward.tolist()), "a list as reward"),
    "half an end": (lambda r: replace(r, terminated=r.terminated.float() * 0.5), "float32 .* as terminated"),
    "idle": (lambda r: replace(r, executed=r.executed & False), "no action in slot 0 as executed"),
    "a slot that is not there": (
        lambda r: replace(r, finished=tuple(replace(f, slot=99) for f in r.finished)),
        r"records of slots \[99.*as finished",
    ),
    "no records": (lambda r: replace(r, finished=()), r"slots \[\] as finished"),
    "others' records": (
        lambda r: replace(r, finished=tuple(replace(f, spec=EPISODES[0]) for f in r.finished)),
        "as finished, expected EpisodeSpec",
    ),
    "a record of numpy": (
        lambda r: replace(r, finished=tuple(replace(f, success=np.bool_(True)) for f in r.finished)),
        "success as a bool",
    ),
    "no final observation": (lambda r: replace(r, final_observation=None), "None as final_observation"),
    "other final slots": (lambda r: replace(r, final_slots=r.final_slots.flip(0)), "as final_slots"),
    "None": (lambda r: None, "step_chunk gave None as its answer, expected a ChunkResult"),
}


def play(env: Lying, chunks: int = 3) -> None:
    """Idle pushes: every episode is cut by the horizon in the third chunk."""
    calls = Checked(env)
    calls.reset(EPISODES)
    for _ in range(chunks):
        calls.step_chunk(torch.zeros(B, C, 2))


def test_what_is_right_passes() -> None:
    play(Lying(), 4)
    checked = Checked(Lying())
    checked.reset(EPISODES)
    assert checked.load_state_dict(checked.state_dict()).instruction == ("move forwards",) * B


@pytest.mark.parametrize("how", SEEN)
def test_a_wrong_observation_is_named(how: str) -> None:
    """From a reset, where there is nothing to compare it with, and after a chunk."""
    bend, said = SEEN[how]
    with pytest.raises(RoveError, match=f"'point': step_chunk gave .*{said}"):
        play(Lying(step=lambda r: replace(r, observation=bend(r.observation))))
    if how not in ("another size", "another device", "doubles"):
        with pytest.raises(RoveError, match="'point': reset gave"):
            play(Lying(reset=bend))


@pytest.mark.parametrize("how", DONE)
def test_a_wrong_result_is_named(how: str) -> None:
    bend, said = DONE[how]
    with pytest.raises(RoveError, match=f"(?s){said}"):
        play(Lying(step=bend))


def test_a_state_that_a_file_cannot_hold_is_found_before_it_is_written() -> None:
    env = Lying()
    for wrong, said in (({"f": lambda: 0}, "function"), ({"x": {"y": np.ones(2)}}, "numpy.ndarray as .*'y'")):
        env.state_dict = lambda wrong=wrong: wrong  # type: ignore[method-assign]
        with pytest.raises(RoveError, match=said):
            Checked(env).state_dict()


def test_code_that_ends_the_process_or_pretends_ctrl_c_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RoveError, match=r"'point' called sys.exit\(3\) in step_chunk"):
        play(Lying(step=lambda r: sys.exit(3)))
    with pytest.raises(KeyboardInterrupt), ends_no_process("point", "reset"):
        raise KeyboardInterrupt  # with Python's own handler it may be the user's
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    with pytest.raises(RoveError, match="nobody pressed Ctrl-C"), ends_no_process("point", "reset"):
        raise KeyboardInterrupt


def test_it_costs_microseconds() -> None:
    env = Lying()
    calls = Checked(env)
    env.reset(EPISODES)
    specs = env.specs
    result = env.step_chunk(torch.zeros(B, C, 2))
    calls._result("step_chunk", result, specs)
    began = time.perf_counter()
    for _ in range(100):
        calls._result("step_chunk", result, specs)
    assert time.perf_counter() - began < 0.2, "more than 2 ms a chunk"
