"""Rules that one playthrough shows: what observations and results must be, and which slots go on or idle."""

from __future__ import annotations

import torch
from torch import Tensor

from rove.testing.playthrough import NUM_ENVS, Envs, require, running, same, transcript
from rove.types import EpisodeSpec, Observation


def shapes(envs: Envs) -> None:
    """Observations and results have the shapes and dtypes of the contract, and the suite's instructions."""
    for env, steps in ((envs.stop, envs.stopped), (envs.refill, envs.refilled)):
        for taken in steps:
            _require_observation(taken.observation, env.num_envs)
            _require_observation(taken.result.observation, env.num_envs)
            for slot, spec in running(taken):
                told, expected = taken.observation.instruction[slot], env.suite.instruction(spec)
                require(
                    told == expected, f"slot {slot} says {told!r}; the suite's instruction is {expected!r}"
                )
            require_tensor("reward", taken.result.reward, (env.num_envs, env.chunk), torch.float32)
            for name in ("terminated", "truncated", "success", "executed"):
                require_tensor(name, getattr(taken.result, name), (env.num_envs, env.chunk), torch.bool)
            require_tensor("elapsed", taken.elapsed, (env.num_envs,), torch.int64)
            require(len(taken.specs) == env.num_envs, f"specs must have {env.num_envs} entries")


def _require_observation(observation: Observation, rows: int) -> None:
    images = observation.images
    require(
        images.dim() == 5 and images.shape[-1] == 3,
        f"images must be [B, n, H, W, 3], not {list(images.shape)}",
    )
    require_tensor("images", images, (rows, *images.shape[1:]), torch.uint8)
    require(
        len(observation.instruction) == rows, f"{len(observation.instruction)} instructions for {rows} rows"
    )
    if observation.state is not None:
        require(observation.state.dim() == 2, "state must be [B, P]")
        require_tensor("state", observation.state, (rows, observation.state.shape[1]), torch.float32)
        require(bool(observation.state.isfinite().all()), "state must be finite")


def require_tensor(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    require(
        tuple(x.shape) == shape and x.dtype == dtype,
        f"{name} must be {dtype} {list(shape)}, not {x.dtype} {list(x.shape)}",
    )


def ends(envs: Envs) -> None:
    """A running slot executes its chunk up to an end, and nothing after it: zero, False, not executed."""
    for taken in (*envs.stopped, *envs.refilled):
        result = taken.result
        done = result.terminated | result.truncated
        for slot, spec in enumerate(taken.specs):
            executed = result.executed[slot].tolist()
            ends = done[slot].nonzero().flatten().tolist()
            count = 0 if spec is None else (ends[0] + 1 if ends else len(executed))
            require(
                executed == [c < count for c in range(len(executed))],
                f"slot {slot} with ends at {ends} executed {executed}: expected the first {count} actions",
            )
            require(len(ends) <= 1, f"slot {slot}: an episode ended twice in a chunk, at {ends}")
        idle = ~result.executed
        for name in ("reward", "terminated", "truncated", "success"):
            require(not getattr(result, name)[idle].any(), f"{name} is set where nothing was executed")


def truncation(envs: Envs) -> None:
    """`truncated` is the horizon, apart from termination, and comes with the final observation."""
    for env, steps in ((envs.stop, envs.stopped), (envs.refill, envs.refilled)):
        for taken in steps:
            result = taken.result
            require(
                not (result.terminated & result.truncated).any(), "an end is terminated and truncated at once"
            )
            for slot, _ in running(taken):
                length = int(taken.elapsed[slot] + result.executed[slot].sum())
                over = length >= env.horizon and not result.terminated[slot].any()
                require(
                    bool(result.truncated[slot].any()) == over,
                    f"slot {slot}, {length} of {env.horizon} actions: truncated must be {over}",
                )
            slots = result.truncated.any(1).nonzero().flatten()
            require(
                result.final_slots.dtype == torch.int64 and torch.equal(result.final_slots, slots),
                f"final_slots must be {slots.tolist()}, int64, not {result.final_slots.tolist()}",
            )
            final = result.final_observation
            require(
                (final is None) == (len(slots) == 0), "final_observation must be None exactly when F is 0"
            )
            if final is not None:
                _require_observation(final, len(slots))
                texts = tuple(taken.observation.instruction[slot] for slot in slots.tolist())
                require(final.instruction == texts, "a final observation has its own episode's instruction")


def records(envs: Envs) -> None:
    """`finished` names every episode that ended, by slot, with its length, reward and outcome."""
    for steps in (envs.stopped, envs.refilled):
        reward: dict[EpisodeSpec, float] = {}
        won: set[EpisodeSpec] = set()
        for taken in steps:
            result, expected = taken.result, []
            for slot, spec in running(taken):
                reward[spec] = reward.get(spec, 0.0) + float(result.reward[slot].sum())
                won |= {spec} if result.success[slot].any() else set()
                if (result.terminated | result.truncated)[slot].any():
                    length = int(taken.elapsed[slot] + result.executed[slot].sum())
                    success, cut = spec in won, bool(result.truncated[slot].any())
                    expected.append((spec, slot, success, length, cut))
            found = [(r.spec, r.slot, r.success, r.length, r.truncated) for r in result.finished]
            require(found == expected, f"finished is {found}; expected {expected}")
            for record in result.finished:
                total, expected_total = record.total_reward, reward[record.spec]
                near = abs(total - expected_total) < 1e-4
                require(
                    near, f"total_reward of {record.spec} is {total}; its rewards sum to {expected_total}"
                )


def elapsed(envs: Envs) -> None:
    """`elapsed` counts the executed actions of the running episode, and starts at zero."""
    started: set[EpisodeSpec] = set()
    for taken in envs.refilled:
        for slot, spec in running(taken):
            require(
                spec in started or int(taken.elapsed[slot]) == 0,
                f"{spec} began with elapsed {taken.elapsed[slot]}",
            )
            started.add(spec)
            if taken.specs_after[slot] == spec:
                expected = int(taken.elapsed[slot] + taken.result.executed[slot].sum())
                require(
                    int(taken.elapsed_after[slot]) == expected, f"slot {slot}: elapsed must be {expected}"
                )


def stop(envs: Envs) -> None:
    """Under "stop" an ended slot idles until a reset names it; the others go on."""
    for taken in envs.stopped:
        done = (taken.result.terminated | taken.result.truncated).any(1)
        for slot, spec in enumerate(taken.specs):
            expected = None if done[slot] else spec
            require(taken.specs_after[slot] == expected, f"slot {slot} must run {expected} after the chunk")
    require(len(transcript(envs.stopped)) == NUM_ENVS, "an episode that was reset never ran")


def refill(envs: Envs) -> None:
    """Under "refill" an ended slot starts the queue's next episode at once, and idles where there is none."""
    waiting = list(envs.episodes[NUM_ENVS:])
    for taken in envs.refilled:
        done = (taken.result.terminated | taken.result.truncated).any(1)
        begun = [taken.specs_after[slot] for slot in done.nonzero().flatten().tolist()]
        expected = [*waiting[: len(begun)], *[None] * (len(begun) - len(waiting))]
        require(
            sorted(map(str, begun)) == sorted(map(str, expected)), f"began {begun}; the queue had {expected}"
        )
        del waiting[: len(begun)]
        for slot, spec in enumerate(taken.specs):
            require(
                bool(done[slot]) or taken.specs_after[slot] == spec,
                f"slot {slot} lost its episode in mid-flight",
            )
    first = {spec: chunks[0] for spec, chunks in transcript(envs.refilled).items()}
    queued = envs.episodes[NUM_ENVS:]
    opening = envs.twin.reset(queued)
    for row, spec in enumerate(queued):
        require(spec in first, f"{spec} waited in the queue and never ran")
        taken, slot = first[spec]
        require(
            same(opening, row, taken.observation, slot), f"{spec}: a refill and a reset begin differently"
        )
