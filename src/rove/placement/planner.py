"""Which placement is fastest: a profile of measured costs → predicted seconds an iteration, by map and k."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rove.config.needs import needs, optimizer_steps
from rove.config.schema import PlacementConfig, Run
from rove.errors import RoveError
from rove.placement.inventory import Inventory
from rove.placement.plan import EnvironmentPlan, Plan, WorkerPlan, make_plan
from rove.placement.profile import CPU, Profile

CANDIDATES = ("colocated", "hybrid", "disaggregated")
STAGES = (1, 2, 4)


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predicted times of one placement."""

    plan: Plan
    placement: PlacementConfig
    rollout: float
    """Seconds."""
    training: float
    sync: float
    contended: float
    """Seconds in which an asynchronous run's rollout leaves the learner no device."""

    @property
    def iteration(self) -> float:
        """Seconds; the rollout and the training of an asynchronous run overlap, as far as they do not want
        the same devices."""
        if self.placement.ahead:
            return max(self.rollout, self.training + self.sync + self.contended)
        return self.rollout + self.training + self.sync


def predict(run: Run, plan: Plan, profile: Profile) -> Prediction:
    """Seconds an iteration.

    A rollout worker with k stages, each with simulation s and inference p a chunk, whose simulation and
    inference overlap, takes max(k·s, k·p, s + p) a chunk of all its slots: the busier of the two works
    without a pause, but no stage can come round faster than its own simulation and inference. In turn it
    takes s + p. The pipeline fills once, with the shorter of the two. A critic's values of what was seen last
    fill the policy's pauses, all but those of the last stage.
    An asynchronous run's learner also anchors each batch. On a GPU that it shares it waits while the policy
    infers. Where its cores are those of the rollout, it waits while simulation and policy are both busy: what
    either leaves idle it takes.
    """
    largest = max(plan.rollouts, key=lambda rollout: rollout.slots)
    env = largest.environments[0]
    s = profile.simulation(env.slots) / profile.on("simulation", _sim_cores(plan, env))
    p = profile.inference(env.slots) / profile.on("inference", largest.threads)
    k, t = env.stages, run.rollout.chunks
    shared = not largest.in_process and not env.cores and env.simulates == "core"
    load = k * len(largest.environments)
    critic = needs(run.algorithm).critic  # values of what was seen last, as long as a chunk's inference
    inference = (t + critic) * load * p
    if largest.in_process or shared:
        rollout = t * load * (s + p) + critic * load * p
    else:
        rollout = t * max(k * s, load * p, s + p) + min(s, p)
        if critic:
            rollout = max(rollout + p, inference)
    collected = run.rollout.num_envs * t
    steps = max(1, optimizer_steps(run, collected))
    learner = next(worker for worker in plan.workers if worker.rank is not None)
    training = steps * profile.training(collected * needs(run.algorithm).epochs / steps / plan.ranks)
    if run.placement.ahead:
        share = collected / plan.ranks
        passes = max(1.0, share / run.training.micro_batch)
        training += passes * profile.anchoring(share / passes)
    training /= profile.on("training", learner.threads)
    apart = [plan.workers[n] for n in plan.apart]
    contended = 0.0
    if any(_contended(plan, worker) for worker in apart):
        contended = inference if learner.gpu is not None else max(0.0, t * k * s + inference - rollout)
    return Prediction(plan, run.placement, rollout, training, profile.sync if apart else 0.0, contended)


def _contended(plan: Plan, worker: WorkerPlan) -> bool:
    """Whether a worker computes on a device that was reserved for another."""
    if worker.gpu is not None:
        return worker.gpu_share < 1.0
    assert worker.rollout is not None
    rollout = plan.rollouts[worker.rollout]
    return worker.cores < len({*rollout.cores, *(core for e in rollout.environments for core in e.cores)})


def _sim_cores(plan: Plan, env: EnvironmentPlan) -> int:
    if env.simulates == "gpu":
        return 1
    return len(env.cores) if env.cores else len(plan.inventory.nodes[0].cores)


def candidates(run: Run, inventory: Inventory) -> list[Run]:
    """The run under every placement that the inventory can hold: each map and k, asynchronous or not."""
    found = []
    for name in CANDIDATES:
        for stages in STAGES if name != "colocated" else (1,):
            for ahead in (0, 1) if name == "disaggregated" else (0,):
                placement = replace(run.placement, map=name, stages=stages, ahead=ahead)
                if ahead and run.placement.deterministic:
                    continue
                found.append(replace(run, placement=placement))
    return [candidate for candidate in found if _fits(candidate, inventory)]


def _fits(run: Run, inventory: Inventory) -> bool:
    try:
        make_plan(run, inventory)
    except RoveError:
        return False
    return True


def ranked(run: Run, inventory: Inventory, profile: Profile) -> list[Prediction]:
    """Every placement that fits, fastest first. Raises RoveError where the profile is of another kind of
    device."""
    if (inventory.kind == "gpu") != (profile.device != CPU):
        wanted = "a GPU" if inventory.kind == "gpu" else "a CPU"
        raise RoveError(
            f"The profile is of {profile.device}, and says nothing of inference and training on {wanted}: "
            f"{'name a card with --card, ' if inventory.kind == 'gpu' else ''}measure on such a machine with "
            "rove plan RECIPE --save FILE, or give such a FILE with --profile."
        )
    found = [predict(r, make_plan(r, inventory), profile) for r in candidates(run, inventory)]
    return sorted(found, key=lambda prediction: prediction.iteration)


def choose(run: Run, inventory: Inventory, profile: Profile) -> Run:
    """The run with the fastest placement that keeps `ahead`, which changes what is learned."""
    for best in ranked(run, inventory, profile):
        if best.placement.ahead == run.placement.ahead:
            return replace(run, placement=best.placement)
    raise RoveError(f"No placement fits {inventory}: set --placement.map colocated --placement.ahead 0.")


def table(predictions: Sequence[Prediction], measured: dict[int, float] | None = None) -> str:
    """The predictions, aligned; `measured` seconds by place in the list."""
    head = f"{'placement':<16}{'k':>3}{'ahead':>7}{'rollout s':>11}{'training s':>12}{'iteration s':>13}"
    lines = [head + (f"{'measured s':>12}" if measured else "")]
    for i, one in enumerate(predictions):
        k = one.plan.rollouts[0].environments[0].stages
        line = (
            f"{one.plan.name:<16}{k:>3}{one.placement.ahead:>7}{one.rollout:>11.3f}{one.training:>12.3f}"
            f"{one.iteration:>13.3f}"
        )
        if measured:
            line += f"{measured[i]:>12.3f}" if i in measured else f"{'':>12}"
        lines.append(line)
    return "\n".join(lines)
