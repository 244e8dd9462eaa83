"""Calls of an environment, with what it answers checked: an environment of one's own may be wrong.

What is wrong is said here, by name, and not cast: pictures in 0..1 would become black, an end of 0.5 True,
and a reward for a chunk would be spread over its actions. Shapes, types, devices, slots and records are
compared with the contract of `rove.envs.base` and with what the environment said first; numbers have to be
finite. Pixels are not read, so that it costs microseconds a chunk.
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from rove.envs.base import Brancher, Demonstrator, Grounder, VectorEnv
from rove.errors import RoveError
from rove.interrupt import Interrupted
from rove.runtime.guard import foreign
from rove.types import ChunkResult, Demonstrations, EpisodeRecord, EpisodeSpec, Observation

_LARGEST = 1e9
"""Bound on the size of a reward: squares of larger ones soon leave float32."""
_PLAIN = (str, int, float, bool, bytes, type(None))
_FLAGS = ("terminated", "truncated", "success", "executed")


class _Shape(NamedTuple):
    """Shape of every observation of an environment, as its first one was."""

    image: tuple[int, ...]
    """(n, H, W, 3)."""
    state: int | None
    device: torch.device


class Checked:
    """The calls of one environment; each raises RoveError on an answer that breaks the contract.

    The error names the environment, the call, the field, what came and what was expected.
    """

    def __init__(self, env: VectorEnv) -> None:
        self.env = env
        self._shape: _Shape | None = None

    def reset(self, episodes: Sequence[EpisodeSpec]) -> Observation:
        """See `VectorEnv.reset`."""
        with ends_no_process(self.env.suite.name, "reset"):
            observation = self.env.reset(episodes)
        self._observation("reset", observation, self.env.num_envs)
        self._slots("reset")
        return observation

    def step_chunk(self, actions: Tensor) -> ChunkResult:
        """See `VectorEnv.step_chunk`."""
        specs = self.env.specs
        with ends_no_process(self.env.suite.name, "step_chunk"):
            result = self.env.step_chunk(actions)
        self._result("step_chunk", result, specs)
        return result

    def step_expert_chunk(self, noise: float, generator: np.random.Generator) -> tuple[Tensor, ChunkResult]:
        """See `Demonstrator.step_expert_chunk`."""
        env, call = self.env, "step_expert_chunk"
        assert isinstance(env, Demonstrator)
        specs = env.specs
        with ends_no_process(env.suite.name, call):
            answer = env.step_expert_chunk(noise, generator)
        if not (isinstance(answer, tuple) and len(answer) == 2):
            self._wrong(call, "its answer", _say(answer), "(actions, ChunkResult)")
        actions, result = answer
        self._tensor(call, "actions", actions, (env.num_envs, env.chunk, env.action_spec.dim), torch.float32)
        if not _within(actions, math.inf):
            self._wrong(call, "actions", "numbers that are not finite", "finite ones")
        self._result(call, result, specs)
        return answer

    def try_chunks(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        """See `Brancher.try_chunks`."""
        env, call = self.env, "try_chunks"
        assert isinstance(env, Brancher)
        with ends_no_process(env.suite.name, call):
            answer = env.try_chunks(actions)
        if not (isinstance(answer, tuple) and len(answer) == 2):
            self._wrong(call, "its answer", _say(answer), "(reward, executed)")
        reward, executed = answer
        self._tensor(call, "reward", reward, tuple(actions.shape[:3]), torch.float32)
        self._tensor(call, "executed", executed, tuple(actions.shape[:3]), torch.bool)
        self._reward(call, reward)
        return answer

    def points(self) -> Tensor | None:
        """See `Grounder.points`; None where the environment has none."""
        env = self.env
        if not isinstance(env, Grounder):
            return None
        with ends_no_process(env.suite.name, "points"):
            points = env.points()
        count = points.shape[1] if isinstance(points, Tensor) and points.dim() == 3 else "K"
        self._tensor("points", "its answer", points, (env.num_envs, count, 2), torch.float32)
        return points

    def ground(self, episodes: Sequence[EpisodeSpec]) -> Demonstrations:
        """See `Grounder.ground`."""
        env, call = self.env, "ground"
        assert isinstance(env, Grounder)
        with ends_no_process(env.suite.name, call):
            found = env.ground(episodes)
        if not isinstance(found, Demonstrations):
            self._wrong(call, "its answer", _say(found), "Demonstrations")
        n = len(found.instruction)
        self._images(call, "images", found.images, None)
        self._tensor(call, "frame", found.frame, (n,), torch.int64)
        if n and not 0 <= int(found.frame.min()) <= int(found.frame.max()) < len(found.images):
            self._wrong(call, "frame", "a picture that is not there", f"0 to {len(found.images) - 1}")
        count = found.points.shape[1] if found.points is not None and found.points.dim() == 3 else "K"
        self._tensor(call, "points", found.points, (n, count, 2), torch.float32)
        return found

    def state_dict(self) -> dict[str, Any]:
        """See `VectorEnv.state_dict`: what is not plain could be written, and not read again."""
        with ends_no_process(self.env.suite.name, "state_dict"):
            state = self.env.state_dict()
        if not isinstance(state, Mapping):
            self._wrong("state_dict", "its answer", _say(state), "a dict")
        self._plain(state, "")
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> Observation:
        """See `VectorEnv.load_state_dict`."""
        with ends_no_process(self.env.suite.name, "load_state_dict"):
            observation = self.env.load_state_dict(state)
        self._observation("load_state_dict", observation, self.env.num_envs)
        self._slots("load_state_dict")
        return observation

    def close(self) -> None:
        """See `VectorEnv.close`."""
        with ends_no_process(self.env.suite.name, "close"):
            self.env.close()

    # --- what is compared -------------------------------------------------------------------------

    def _result(self, call: str, result: ChunkResult, specs: Sequence[EpisodeSpec | None]) -> None:
        """`specs` ran in the slots before the call."""
        if not isinstance(result, ChunkResult):
            self._wrong(call, "its answer", _say(result), "a ChunkResult")
        shape = (self.env.num_envs, self.env.chunk)
        self._tensor(call, "reward", result.reward, shape, torch.float32)
        for name in _FLAGS:
            self._tensor(call, name, getattr(result, name), shape, torch.bool)
        self._reward(call, result.reward)
        acted = result.executed.any(1).tolist()
        running = [spec is not None for spec in specs]
        if acted != running:
            slot = next(slot for slot, (a, b) in enumerate(zip(acted, running, strict=True)) if a != b)
            said = "actions in" if acted[slot] else "no action in"
            runs = "runs an episode" if running[slot] else "idles"
            self._wrong(call, "executed", f"{said} slot {slot}", f"otherwise, for the slot {runs}")
        self._observation(call, result.observation, shape[0])
        self._slots(call)
        truncated = result.truncated.any(1)
        ended = (truncated | result.terminated.any(1)).nonzero().flatten().tolist()
        self._records(call, result.finished, ended, specs)
        wanted = {"none": [], "truncated": truncated.nonzero().flatten().tolist(), "ended": ended}
        self._finals(call, result, wanted[self.env.finals])
        for slot, frames in result.frames.items():
            size = tuple(frames.shape[1:3]) if isinstance(frames, Tensor) and frames.dim() == 4 else "HW"
            count = int(result.executed[slot].sum())
            self._tensor(call, f"frames of slot {slot}", frames, (count, *size, 3), torch.uint8)

    def _observation(self, call: str, observation: Observation, rows: int, own: str = "") -> None:
        """`own` begins the names of the fields of one that is not of all slots."""
        if not isinstance(observation, Observation):
            self._wrong(call, f"{own}observation", _say(observation), "an Observation")
        self._images(call, f"{own}images", observation.images, rows)
        told, state = observation.instruction, observation.state
        if not isinstance(told, tuple | list) or len(told) != rows or not all(type(t) is str for t in told):
            kinds = ", ".join(sorted({type(text).__name__ for text in told})) if told else "nothing"
            expected = f"{rows} strings"
            self._wrong(call, f"{own}instruction", f"{len(told or ())} of {kinds}", expected)
        if self._shape is None:
            size = state.shape[1] if isinstance(state, Tensor) and state.dim() == 2 else None
            if state is not None and size is None:
                self._wrong(call, f"{own}state", _say(state), f"float32 [{rows}, P]")
            self._shape = _Shape(tuple(observation.images.shape[1:]), size, observation.images.device)
        if (size := self._shape.state) is None:
            if state is not None:
                self._wrong(call, f"{own}state", _say(state), "None, as in its first observation")
            return
        self._tensor(call, f"{own}state", state, (rows, size), torch.float32)
        assert state is not None
        if not _within(state, math.inf):
            wrong = (~state.isfinite().all(1)).nonzero().flatten().tolist()
            if own == "":  # of a slot that idles nobody reads it
                wrong = [slot for slot in wrong if self.env.specs[slot] is not None]
            if wrong:
                self._wrong(call, f"{own}state", f"no finite numbers in row {wrong[0]}", "finite ones")

    def _images(self, call: str, name: str, images: Tensor, rows: int | None) -> None:
        if not isinstance(images, Tensor) or images.dim() != 5 or images.dtype != torch.uint8:
            self._wrong(call, name, _say(images), "uint8 [B, n, H, W, 3]")
        given, first = tuple(images.shape), self._shape
        shape = given[1:] if first is None else first.image
        if given[-1] != 3 or 0 in given[1:]:
            self._wrong(call, name, _say(images), "uint8 [B, n, H, W, 3]")
        if given != (given[0] if rows is None else rows, *shape):
            self._wrong(call, name, _say(images), f"uint8 {[rows or 'F', *shape]}")
        if first is not None and images.device != first.device:
            self._wrong(call, name, f"a tensor on {images.device}", f"one on {first.device}, as its first")

    def _records(
        self, call: str, records: Sequence[EpisodeRecord], ended: list[int], specs: Sequence[Any]
    ) -> None:
        if not isinstance(records, tuple | list) or not all(isinstance(r, EpisodeRecord) for r in records):
            self._wrong(call, "finished", _say(records), "EpisodeRecords")
        if (slots := [record.slot for record in records]) != ended:
            self._wrong(call, "finished", f"records of slots {slots}", f"those of {ended}, which ended")
        for record in records:
            if record.spec != specs[record.slot]:
                self._wrong(call, "finished", f"{record.spec}", f"{specs[record.slot]} in slot {record.slot}")
            number = isinstance(record.total_reward, int | float) and math.isfinite(record.total_reward)
            length = isinstance(record.length, int) and record.length > 0
            if not (number and length and isinstance(record.success, bool)):
                self._wrong(call, "finished", f"{record}", "a length, a finite reward and success as a bool")

    def _finals(self, call: str, result: ChunkResult, wanted: list[int]) -> None:
        slots, last = result.final_slots, result.final_observation
        self._tensor(call, "final_slots", slots, (len(wanted),), torch.int64)
        if slots.tolist() != wanted:
            expected = f"{wanted}, as finals = {self.env.finals!r}"
            self._wrong(call, "final_slots", f"{slots.tolist()}", expected)
        if wanted or last is not None:
            if last is None or not wanted:
                expected = "an Observation" if wanted else "None where no slot is final"
                self._wrong(call, "final_observation", _say(last), expected)
            self._observation(call, last, len(wanted), own="final_observation.")

    def _slots(self, call: str) -> None:
        """What the environment says of its slots after a call."""
        b, specs = self.env.num_envs, self.env.specs
        if len(specs) != b:
            self._wrong(call, "specs", f"{len(specs)} entries", f"{b}")
        self._tensor(call, "elapsed", self.env.elapsed, (b,), torch.int64)

    def _tensor(
        self, call: str, name: str, value: Any, shape: Sequence[int | str], dtype: torch.dtype
    ) -> None:
        if not isinstance(value, Tensor) or tuple(value.shape) != tuple(shape) or value.dtype != dtype:
            self._wrong(call, name, _say(value), f"{_kind(dtype)} {_sizes(shape)}")

    def _reward(self, call: str, reward: Tensor) -> None:
        if not _within(reward, _LARGEST):
            self._wrong(
                call,
                "reward",
                f"one of {float(reward.abs().max()):g}",
                f"finite ones, at most {_LARGEST:g} in size",
            )

    def _plain(self, value: Any, at: str) -> None:
        if type(value) in _PLAIN or type(value) is Tensor:
            return
        if type(value) in (list, tuple, set):
            for number, item in enumerate(value):
                self._plain(item, f"{at}[{number}]")
        elif isinstance(value, Mapping):
            for key, item in value.items():
                self._plain(key, f"a key of {at or 'it'}")
                self._plain(item, f"{at}[{key!r}]")
        else:
            kind = f"{type(value).__module__}.{type(value).__qualname__}"
            self._wrong("state_dict", at, f"a {kind}", "tensors and plain values only, which a file can hold")

    def _wrong(self, call: str, field: str, came: str, expected: str) -> NoReturn:
        raise RoveError(
            f"Environment {self.env.suite.name!r}: {call} gave {came} as {field}, expected {expected}. "
            "rove.testing.check_env tries every rule of the contract."
        )


@contextmanager
def ends_no_process(environment: str, call: str) -> Iterator[None]:
    """Have code of an environment's that ends its process, or that pretends to be Ctrl-C, raise RoveError.

    How long it may take is watched, see `guard.guarded`.
    """
    try:
        with foreign(f"Environment {environment!r}", call):
            yield
    except SystemExit as error:
        raise RoveError(
            f"Environment {environment!r} called sys.exit({error.code!r}) in {call}: have it raise what is "
            "wrong instead."
        ) from error
    except KeyboardInterrupt as error:
        # In the main thread, with Python's own handler, it may be the user's; a run's raises `Interrupted`.
        main = threading.current_thread() is threading.main_thread()
        asked = main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if asked or isinstance(error, Interrupted):
            raise
        raise RoveError(
            f"Environment {environment!r} raised KeyboardInterrupt in {call}, though nobody pressed Ctrl-C: "
            "have it raise what is wrong instead."
        ) from error


def _within(values: Tensor, bound: float) -> bool:
    """Whether all of `values` are finite, and none is larger than `bound` in size."""
    if not values.numel():
        return True
    low, high = (float(x) for x in torch.aminmax(values))  # NaN where any is
    return -bound <= low and high <= bound and math.isfinite(low) and math.isfinite(high)


def _kind(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sizes(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _say(value: Any) -> str:
    """What came, in a few words: "float64 [16, 1]"."""
    if isinstance(value, Tensor):
        return f"{_kind(value.dtype)} {_sizes(tuple(value.shape))}"
    return "None" if value is None else f"a {type(value).__name__}"
