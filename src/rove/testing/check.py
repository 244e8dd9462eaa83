"""The VectorEnv contract as runnable code: `check_env` plays a few episodes and reports on every rule.

Most rules compare two playthroughs of the same episodes, see `playthrough.py`. A chunk that does not divide
the horizon makes episodes end in mid-chunk, which is where mistakes hide: prefer one.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from rove.envs.base import Brancher, Corrector
from rove.errors import RoveError
from rove.testing import check_results
from rove.testing.check_results import require_tensor
from rove.testing.playthrough import (
    NUM_ENVS,
    Envs,
    Make,
    Step,
    Violation,
    actions,
    play,
    require,
    resume,
    running,
    same,
    step,
    transcript,
)
from rove.types import EpisodeSpec


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One rule of the contract."""

    name: str
    ok: bool
    detail: str
    """The breach, or what the rule demands where there was none."""


def check_env(make: Make) -> list[CheckResult]:
    """Run every check, in the order of CHECKS.

    Makes three environments of 4 slots and one of 1, and closes them; plays about 50 episodes in all.
    A ValueError out of place is a failed check; any other error is a defect, and passes through.
    """
    envs = Envs(make)
    try:
        return [_run(check, envs) for check in CHECKS]
    finally:
        envs.close()


def _run(check: Callable[[Envs], None], envs: Envs) -> CheckResult:
    name = check.__name__
    try:
        check(envs)
    except Violation as violation:
        return CheckResult(name, False, str(violation))
    except ValueError as error:
        return CheckResult(name, False, f"refused what it should accept: {error}")
    return CheckResult(name, True, (check.__doc__ or "").split("\n")[0])


def _require_same(
    left: Mapping[EpisodeSpec, list[tuple[Step, int]]],
    right: Mapping[EpisodeSpec, list[tuple[Step, int]]],
    when: str,
) -> None:
    """Require that the episodes of `right` went in `left` as they did there: seen, earned and ended alike."""
    for spec, chunks in right.items():
        others = left.get(spec, [])
        require(len(others) == len(chunks), f"{spec} took {len(others)} chunks, then {len(chunks)} {when}")
        for t, ((a, i), (b, j)) in enumerate(zip(others, chunks, strict=True)):
            require(same(a.observation, i, b.observation, j), f"{spec}: chunk {t} saw another picture {when}")
            for name in ("reward", "terminated", "truncated", "success", "executed"):
                first, second = getattr(a.result, name)[i], getattr(b.result, name)[j]
                require(torch.equal(first, second), f"{spec}: {name} of chunk {t} differs {when}")


# --- the suite ------------------------------------------------------------------------------------


def suite(envs: Envs) -> None:
    """Tasks are unique; unknown ones are refused; variants name a known axis; published numbers a row."""
    suite = envs.suite
    require(
        len(suite.tasks) > 0 and len(set(suite.tasks)) == len(suite.tasks),
        "tasks must be unique, at least one",
    )
    require(
        _refuses(lambda: suite.initial_states("no such task", "train")),
        "an unknown task must raise ValueError",
    )
    axes = {"vision", "semantics", "execution"}
    require("none" not in suite.variants, "'none' is not a variant")
    require(set(suite.variants.values()) <= axes, f"the axis of a variant must be one of {sorted(axes)}")
    require(
        isinstance(getattr(suite, "published_success", None), Mapping)
        and all(isinstance(column, Mapping) for column in suite.published_success.values()),
        "published_success must map names to rows of percent; derive from TaskSuite for an empty one",
    )


def splits(envs: Envs) -> None:
    """Held-out states are no train states, in name or picture, and no episode runs that was not asked for."""
    for task in envs.suite.tasks:
        train, held_out = (envs.suite.initial_states(task, split) for split in ("train", "held_out"))
        require(len(train) > 0 and len(held_out) > 0, f"{task}: both splits need initial states")
        # Some splits have billions of states: the small one is walked, the large one asked.
        few, many = sorted((train, held_out), key=len)
        shared = [state for state in few if state in many]
        require(not shared, f"{task}: initial states {shared[:5]} are in both splits")
    asked = set(envs.episodes)
    run = {spec for taken in envs.refilled for _, spec in running(taken)}
    require(
        run == asked,
        f"episodes were run that nobody asked for, or not at all: {sorted(map(str, run ^ asked))[:3]}",
    )
    task = envs.suite.tasks[0]
    seen = {
        split: envs.stop.reset(
            [EpisodeSpec(task, s) for s in envs.suite.initial_states(task, split)[:NUM_ENVS]]
        )
        for split in ("train", "held_out")
    }
    for i in range(sum(spec is not None for spec in envs.stop.specs)):
        copies = [j for j in range(NUM_ENVS) if same(seen["held_out"], i, seen["train"], j)]
        require(not copies, f"{task}: held-out state {i} looks exactly like train state {copies}")


# --- two playthroughs, compared -----------------------------------------------------------------


def determinism(envs: Envs) -> None:
    """Same episodes and actions give the same bytes, in any slot and beside any neighbours."""
    refilled = transcript(envs.refilled)
    _require_same(refilled, transcript(envs.stopped), 'under "stop"')
    shuffled = play(envs.twin, envs.episodes[NUM_ENVS - 1 :: -1])
    _require_same(refilled, transcript(shuffled), "in another slot")
    alone = play(envs.twin, envs.episodes[-1:])
    _require_same(refilled, transcript(alone), "alone")


def state(envs: Envs) -> None:
    """A state saved in mid-episode goes on bit for bit in another environment, its queue included.

    It passes through a file first: a checkpoint holds tensors and plain values only.
    """
    observation = envs.refill.reset(envs.episodes[:NUM_ENVS])
    envs.refill.enqueue(envs.episodes[NUM_ENVS:])
    observation = step(envs.refill, observation).result.observation
    specs, elapsed, queued = envs.refill.specs, envs.refill.elapsed.clone(), envs.refill.queued
    file = io.BytesIO()
    torch.save(envs.refill.state_dict(), file)
    expected = transcript(resume(envs.refill, observation))
    file.seek(0)
    try:
        state = torch.load(file, weights_only=True)
    except pickle.UnpicklingError as error:
        raise Violation(f"state_dict() holds more than tensors and plain values: {error}") from error
    restored = envs.twin.load_state_dict(state)
    require(envs.twin.specs == specs, f"specs are {envs.twin.specs} after loading, were {specs}")
    require(torch.equal(envs.twin.elapsed, elapsed), "elapsed was not restored")
    require(envs.twin.queued == queued, f"{envs.twin.queued} episodes queued after loading, were {queued}")
    for slot in range(NUM_ENVS):
        require(same(restored, slot, observation, slot), f"slot {slot}: another observation after loading")
    _require_same(transcript(resume(envs.twin, restored)), expected, "after loading")


def where(envs: Envs) -> None:
    """`reset(where=)` replaces the episodes of its slots and disturbs neither the others nor the queue."""
    env, swapped, fresh = envs.refill, 1, envs.episodes[-1]
    observation = env.reset(envs.episodes[:NUM_ENVS])
    env.enqueue(envs.episodes[NUM_ENVS:-1])
    history = [step(env, observation)]
    queued = env.queued
    observation = env.reset([fresh], where=[swapped])
    require(env.queued == queued, f"{env.queued} episodes queued after reset(where=), {queued} before")
    expected = [fresh if slot == swapped else spec for slot, spec in enumerate(history[0].specs_after)]
    require(list(env.specs) == expected, f"specs after reset(where=[1]) are {env.specs}")
    require(int(env.elapsed[swapped]) == 0, "elapsed of a reset slot must be 0")
    history += resume(env, observation)
    changed = transcript(history)
    changed.pop(envs.episodes[swapped])
    _require_same(transcript(envs.refilled), changed, "beside a reset slot")


def idle(envs: Envs) -> None:
    """Slots that a reset does not name idle: their actions are ignored, and nothing is executed in them."""
    env = envs.stop
    env.reset(envs.episodes[:NUM_ENVS])
    observation = env.reset(envs.episodes[:2])
    require(
        env.specs == (*envs.episodes[:2], *[None] * (NUM_ENVS - 2)),
        f"specs after a partial reset: {env.specs}",
    )
    steps = []
    while any(env.specs) and len(steps) * env.chunk < env.horizon:
        chosen = actions(env)
        chosen[[spec is None for spec in env.specs]] = float("nan")
        steps.append(step(env, observation, chosen))
        observation = steps[-1].result.observation
        require(not steps[-1].result.executed[2:].any(), "an idle slot executed actions")
    _require_same(transcript(envs.stopped), transcript(steps), "beside idle slots")


def queue(envs: Envs) -> None:
    """`enqueue` appends, idle slots wait for a reset all the same, and a whole reset clears the queue."""
    env = envs.refill
    env.reset(envs.episodes[:1])
    require(env.queued == 0, f"{env.queued} episodes queued after a reset")
    env.enqueue(envs.episodes[1:3])
    env.enqueue(envs.episodes[3:4])
    require(env.queued == 3, f"{env.queued} episodes queued after enqueueing 3")
    env.step_chunk(actions(env))
    require(env.specs[1] is None, "an idle slot took an episode from the queue without a reset")
    env.reset(envs.episodes[:NUM_ENVS])
    require(env.queued == 0, f"{env.queued} episodes queued after a whole reset, which clears the queue")


# --- what must be refused -----------------------------------------------------------------------


def _refuses(call: Callable[[], object]) -> bool:
    try:
        call()
    except ValueError as error:
        return bool(str(error))
    return False


def bad_actions(envs: Envs) -> None:
    """NaN, infinite, out-of-bounds and misshapen actions raise ValueError, and nothing is executed."""
    env = envs.stop
    observation = env.reset(envs.episodes[:NUM_ENVS])
    good = actions(env)
    cases = {
        "a wrong shape": good[:, :, :-1],
        "a missing row": good[1:],
        "a chunk too long": good.repeat(1, 2, 1),
    }
    for name, value in {
        "NaN": float("nan"),
        "infinity": float("inf"),
        "a value above the bound": env.action_spec.high[0] + 0.1,
        "a value below the bound": env.action_spec.low[0] - 0.1,
    }.items():
        cases[name] = good.clone()
        cases[name][-1, -1, 0] = value
    for name, bad in cases.items():
        require(_refuses(lambda bad=bad: env.step_chunk(bad)), f"{name} must raise ValueError with a message")
        require(not env.elapsed.any(), f"{name} was refused, but actions were executed")
    _require_same(transcript(envs.stopped), transcript(resume(env, observation)), "after refused actions")


def bad_episodes(envs: Envs) -> None:
    """Unknown tasks, states and variants, and slots that are not there, raise ValueError."""
    good = envs.episodes[0]
    bad = {
        "an unknown task": EpisodeSpec("no such task", good.initial_state),
        "an unknown initial state": EpisodeSpec(good.task, -1),
        "an unknown variant": EpisodeSpec(good.task, good.initial_state, "no such variant"),
    }
    for name, spec in bad.items():
        require(
            _refuses(lambda spec=spec: envs.stop.reset([spec])), f"reset with {name} must raise ValueError"
        )
        require(
            _refuses(lambda spec=spec: envs.refill.enqueue([spec])),
            f"enqueueing {name} must raise ValueError",
        )
    calls = {
        "too many episodes": lambda: envs.stop.reset([good] * (NUM_ENVS + 1)),
        "a slot out of range": lambda: envs.stop.reset([good], where=[NUM_ENVS]),
        "a slot named twice": lambda: envs.stop.reset([good, good], where=[0, 0]),
        "fewer episodes than slots": lambda: envs.stop.reset([good], where=[0, 1]),
    }
    for name, call in calls.items():
        require(_refuses(call), f"reset with {name} must raise ValueError")


# --- the rest -------------------------------------------------------------------------------------


def record(envs: Envs) -> None:
    """A recorded slot gets a frame for each executed action; the others get none."""
    env = envs.stop
    observation = env.reset(envs.episodes[:NUM_ENVS])
    env.record([2])
    taken = step(env, observation)
    env.record(())
    unrecorded = step(env, taken.result.observation)
    frames, executed = taken.result.frames, int(taken.result.executed[2].sum())
    require(set(frames) == {2}, f"frames of slots {sorted(frames)}, of which only 2 was recorded")
    require_tensor("frames", frames[2], (executed, *frames[2].shape[1:3], 3), torch.uint8)
    require(unrecorded.result.frames == {}, "frames go on after record(())")


def tries(envs: Envs) -> None:
    """`try_chunks`, where there is one, answers what `step_chunk` would, and leaves no trace."""
    env = envs.refill
    if not isinstance(env, Brancher):
        return
    observation = env.reset(envs.episodes[:NUM_ENVS])
    env.enqueue(envs.episodes[NUM_ENVS:])
    chosen = actions(env)
    reward, executed = env.try_chunks(torch.stack([chosen.flip(1), chosen], dim=1))
    shape = (NUM_ENVS, 2, env.chunk)
    require(reward.shape == shape == executed.shape, f"reward and executed must be {shape} [B, G, C]")
    steps = resume(env, observation)
    _require_same(transcript(envs.refilled), transcript(steps), "after trying")
    first = steps[0].result
    agrees = torch.equal(first.reward, reward[:, 1]) and torch.equal(first.executed, executed[:, 1])
    require(agrees, "step_chunk answers otherwise than try_chunks did")


def watching(envs: Envs) -> None:
    """Where an expert looks on, what is given is carried out as by `step_chunk`: neither the noise that there
    would be nor what the expert wants makes a difference."""
    env, generator = envs.refill, np.random.default_rng(0)
    if not isinstance(env, Corrector):
        return
    env.reset(envs.episodes[:NUM_ENVS])
    try:
        env.step_expert_chunk(0.0, generator)
    except RoveError:  # these tasks have no expert
        return
    env.reset(envs.episodes[:NUM_ENVS])
    env.enqueue(envs.episodes[NUM_ENVS:])
    env.watch(np.ones(NUM_ENVS, bool), actions(env))
    _, result = env.step_expert_chunk(1.0, generator)
    expected = envs.refilled[0].result
    for name in ("reward", "terminated", "truncated", "success", "executed"):
        agrees = torch.equal(getattr(result, name), getattr(expected, name))
        require(agrees, f"an expert that looks on changes {name}")
    for slot in range(NUM_ENVS):
        agrees = same(result.observation, slot, expected.observation, slot)
        require(agrees, f"slot {slot}: an expert that looks on changes the picture")


def finals(envs: Envs) -> None:
    """`finals` chooses whose last observation is given: "none", "truncated" (the default) or "ended"."""
    env = envs.refill
    require(env.finals == "truncated", f"finals must be 'truncated' unless set, not {env.finals!r}")
    for choice in ("none", "ended"):
        env.finals = choice
        observation = env.reset(envs.episodes[:NUM_ENVS])
        for _ in range(-(-env.horizon // env.chunk)):
            result = step(env, observation).result
            observation = result.observation
            ended = (result.terminated | result.truncated).any(1) & (choice == "ended")
            expected = ended.nonzero().flatten().tolist()
            got = result.final_slots.tolist()
            require(got == expected, f"finals={choice!r}: final_slots must be {expected}, not {got}")
            rows = 0 if result.final_observation is None else len(result.final_observation)
            require(rows == len(expected), f"finals={choice!r}: {rows} final observations of {len(expected)}")
    env.finals = "truncated"


def close(envs: Envs) -> None:
    """Closing twice is harmless."""
    env = envs.make(1, "stop")
    env.close()
    env.close()


CHECKS = (
    suite,
    splits,
    check_results.shapes,
    check_results.ends,
    check_results.truncation,
    check_results.records,
    check_results.elapsed,
    check_results.stop,
    check_results.refill,
    determinism,
    state,
    where,
    idle,
    queue,
    bad_actions,
    bad_episodes,
    record,
    finals,
    tries,
    watching,
    close,
)
"""The checks, in their order; a check's name is its function's, and what it demands the first line of its
docstring."""
