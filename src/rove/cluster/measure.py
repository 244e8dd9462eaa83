"""Measures what a run costs on the machine at hand: its parts, for a profile; and whole placements.

What a part costs on a card that is not here follows from what the policy computes and moves; see `bound`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch

from rove import algorithms, checkpoint, host
from rove.cluster import execute, inventory_of
from rove.config.needs import needs
from rove.config.schema import Run
from rove.envs import registry as envs
from rove.envs.base import Demonstrator
from rove.placement.cards import Card
from rove.placement.plan import make_plan
from rove.placement.profile import CPU, Line, Profile
from rove.policies import registry as policies
from rove.policies.base import Policy, SamplingNoise
from rove.rollout.buffer import Layout
from rove.rollout.stage import StagePlan
from rove.runtime.local import Packed
from rove.training.deal import step_of_rank
from rove.training.demonstrations import collect_demonstrations, dataset_statistics
from rove.training.learner import Learner
from rove.types import Observation, TrainBatch
from rove.workers import weights

REPEATS = 3
REACHED = {"inference": 0.60, "training": 0.56}
"""Shares of a card's rate of matrix products that a 7B with adapters is taken to reach: four fifths of what
the counts of `benchmarks/policy.py --pretend h100` leave within reach."""


def measure(run: Run, start: Path) -> Profile:
    """Take the times of this run's parts on the machine at hand, with the policy in `start`."""
    cores = host.cores() or (0,)
    one, every = cores[:1], cores
    b = run.rollout.num_envs
    sizes = sorted({max(1, b // 4), max(1, b // 2), b})
    gpu = torch.cuda.is_available() and run.placement.device != "cpu"
    device = torch.device("cuda" if gpu else "cpu")
    simulation, speed_up = _simulations(run, every)
    with closing(StagePlan(_sized(run, b), 0, 1, b).build(0)) as stage:
        observation = stage.ready()
        policy = policies.restore(run, start, stage.env.action_spec, device)

    def infer(n: int) -> float:
        noise = SamplingNoise(0, torch.arange(n), torch.zeros(n, dtype=torch.long))
        seen = observation.select(range(n))

        @torch.inference_mode()
        def act() -> None:
            policy.act(seen, "sample", noise).actions.cpu()

        return _median(act)

    learner, batch = _learner(run, policy, observation, device)

    def train(n: int) -> float:
        part = batch.select(torch.arange(n))

        def step() -> None:
            learner.accumulate(part, step_of_rank(part, torch.arange(n)))
            learner.optimizer.step()

        return _median(step)

    with host.bound(one, 1):
        inferred = {n: infer(n) for n in sizes}
        trained = {n: train(n) for n in sizes}
        anchored = {n: _median(lambda n=n: learner.anchored(batch.select(torch.arange(n)))) for n in sizes}
    with host.bound(every, len(every)):
        faster = (infer(b), train(b))
    scaling = {
        "simulation": speed_up,
        "inference": 1.0 if gpu else inferred[b] / faster[0],
        "training": 1.0 if gpu else trained[b] / faster[1],
    }
    return Profile(
        simulation=simulation,
        inference=Line.fit(list(inferred.items())),
        training=Line.fit(list(trained.items())),
        anchoring=Line.fit(list(anchored.items())),
        sync=_median(lambda: _publish(learner)),
        scaling=scaling,
        cores=len(every),
        device=torch.cuda.get_device_name(device) if gpu else CPU,
    )


def bound(run: Run, card: Card) -> Profile:
    """A profile for a card that is not here: simulation is measured on this machine's cores, the rest follows
    from what the policy computes and moves, at the card's rates."""
    work, cores = policies.work(run), host.cores() or (0,)
    simulation, speed_up = _simulations(run, cores)
    forward, training = (
        flops / card.matrices / REACHED[what]
        for flops, what in ((work.forward, "inference"), (work.training, "training"))
    )
    once = work.weights / card.bandwidth
    return Profile(
        simulation=simulation,
        inference=Line(work.passes * once, forward),
        training=Line(once, training),
        anchoring=Line(once, forward),
        sync=2 * work.published / card.bus,
        scaling={"simulation": speed_up, "inference": 1.0, "training": 1.0},
        cores=len(cores),
        device=card.name,
    )


def _simulations(run: Run, cores: Sequence[int]) -> tuple[Line, float]:
    """Seconds a chunk, of slots, on one core; and how much faster all cores are with all slots."""
    b = run.rollout.num_envs
    sizes = sorted({max(1, b // 4), max(1, b // 2), b})
    with host.bound(cores[:1], 1):
        one = {n: _simulation(run, n) for n in sizes}
    together = one[b]
    if len(cores) > 1:
        with host.bound(cores, len(cores)):
            together = _simulation(run, b)
    return Line.fit(list(one.items())), one[b] / together


def _sized(run: Run, num_envs: int) -> Run:
    """`run` with another number of environments."""
    return replace(run, rollout=replace(run.rollout, num_envs=num_envs))


def start_of(run: Run, directory: Path) -> Path:
    """A policy of this run's kind to measure with: its checkpoint, or one with random weights, made below
    `directory`. What weights say does not change what they cost."""
    if run.policy.checkpoint is not None:
        return Path(run.policy.checkpoint)
    env = envs.make(run.env, num_envs=32, chunk=run.rollout.chunk, autoreset="refill")
    with closing(env):
        known = None
        if isinstance(env, Demonstrator):
            shown = collect_demonstrations(env, episodes=32, noise=0.0, seed=run.seed)
            known = {env.suite.name: dataset_statistics(shown, run.rollout.chunk)}
        policy = policies.build(
            run.policy,
            chunk=run.rollout.chunk,
            action_spec=env.action_spec,
            image_size=run.env.image_size,
            vocabulary=env.suite.vocabulary,
            statistics=known,
            seed=run.seed,
        )
    return checkpoint.save_policy(directory / "start", policy)


def _median(call: Callable[[], object]) -> float:
    call()
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _simulation(run: Run, slots: int) -> float:
    """Seconds a chunk of an environment with so many slots, with random actions, resets included."""
    sized = _sized(run, slots)
    chunks = max(4, run.env.horizon // run.rollout.chunk)
    with closing(StagePlan(sized, 0, 1, slots).build(0)) as stage:
        seen, spec = stage.ready(), stage.env.action_spec
        state = None if seen.state is None else seen.state.shape[1]
        layout = Layout(chunks, slots, run.rollout.chunk, spec.dim, tuple(seen.images.shape[1:]), state)
        exchange = layout.allocate()
        stage.begin(exchange)
        low, high = torch.tensor(spec.low), torch.tensor(spec.high)
        generator = torch.Generator().manual_seed(0)
        began = time.perf_counter()
        for t in range(chunks):
            draw = torch.rand(exchange.actions.shape, generator=generator)
            exchange.actions.copy_(low + (high - low) * draw)
            stage.step(t)
        return (time.perf_counter() - began) / chunks


def _learner(
    run: Run, policy: Policy, observation: Observation, device: torch.device
) -> tuple[Learner, TrainBatch]:
    """A learner, and a batch of its policy's own choices."""
    n = len(observation)
    noise = SamplingNoise(0, torch.arange(n), torch.zeros(n, dtype=torch.long))
    with torch.no_grad():
        chunk = policy.act(observation, "sample", noise)
    value = None if chunk.value is None else chunk.value.cpu()
    critic = needs(run.algorithm).critic
    grouped = needs(run.algorithm).length_normalization
    per = getattr(run.algorithm, "ratio_level", "action") == "chunk"
    shape = (n, 1) if per else tuple(chunk.logprob.shape[:2])
    batch = TrainBatch(
        observation=observation,
        sample=chunk.sample.cpu(),
        logprob=chunk.logprob.cpu(),
        advantage=torch.zeros(shape),
        mask=torch.ones(shape, dtype=torch.bool),
        returns=value if critic else None,
        value=value if critic else None,
        episode_length=torch.full((n, 1), run.rollout.chunk) if grouped else None,
        horizon=run.rollout.chunk if grouped else None,
        denominator=float(n * run.rollout.chunk) if grouped else None,
    )
    return Learner(policy, algorithms.get(run.algorithm.kind), run, device), batch


def _publish(learner: Learner) -> None:
    """Do what a transfer to another process costs this one: gather, pack, copy."""
    Packed(weights.publish(0, learner.trainable()))


def try_out(run: Run, start: Path, iterations: int = 3) -> float:
    """Median seconds of an iteration of this placement as it really runs here, the first left out."""
    plan = make_plan(run, inventory_of(run))
    algorithm = algorithms.get(run.algorithm.kind)
    seconds: list[float] = []
    with closing(execute(run, plan, start)) as executor:
        for iteration in range(iterations + 1):
            began = time.perf_counter()
            executor.sync(iteration)
            batch, _ = algorithm.prepare([executor.collect(lambda: None)], run.algorithm)
            executor.update(batch, iteration, lambda: None)
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])
