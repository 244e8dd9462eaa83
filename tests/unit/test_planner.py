"""The planner: lines through points, what a placement is predicted to take, and what is picked."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rove.cluster import measure
from rove.config.schema import PPO, PlacementConfig, RolloutConfig, Run, TrainingConfig
from rove.errors import RoveError
from rove.placement.cards import CARDS
from rove.placement.inventory import Inventory
from rove.placement.plan import make_plan
from rove.placement.planner import Prediction, choose, predict, ranked, table
from rove.placement.profile import Line, Profile
from rove.recipes import get

LAPTOP = Inventory.of(cores=2)


def profile_of(
    simulation: float,
    inference: float,
    training: float = 1e-3,
    anchoring: float = 0.0,
    scaling: float = 1.0,
) -> Profile:
    """Costs a row; every speed-up on two cores is `scaling`."""
    lines = [Line(0.0, each) for each in (simulation, inference, training, anchoring)]
    speed_up = dict.fromkeys(("simulation", "inference", "training"), scaling)
    return Profile(*lines, sync=0.5, scaling=speed_up, cores=2)


def run_of(**placement) -> Run:
    return Run(
        "test",
        PPO(),
        rollout=RolloutConfig(num_envs=64, chunks=32),
        training=TrainingConfig(batch=64, micro_batch=64),
        placement=PlacementConfig(**{"threads": 0, **placement}),
    )


def test_a_line_goes_through_what_was_measured():
    line = Line.fit([(10, 1.1), (20, 2.1), (40, 4.1)])
    assert line(30) == pytest.approx(3.1)
    assert Line.fit([(10, 0.5), (20, 2.0)])(0) == 0.0, "no rows cannot take less than no time"


def test_overlap_takes_the_longer_of_the_two_and_turns_take_their_sum():
    profile = profile_of(simulation=0.01, inference=0.01)

    def rollout(**placement) -> float:
        run = run_of(**placement)
        return predict(run, make_plan(run, LAPTOP), profile).rollout

    chunk = 64 * 0.01
    bootstrap = chunk
    assert rollout(map="colocated") == pytest.approx(32 * 2 * chunk + bootstrap)
    overlapped = rollout(map="hybrid", stages=2)
    assert overlapped == pytest.approx(32 * chunk + chunk / 2 + bootstrap / 2), "half of it in a pause"
    assert rollout(map="hybrid", stages=1) == pytest.approx(32 * 2 * chunk + chunk + bootstrap)


def test_an_asynchronous_iteration_takes_the_longer_of_rollout_and_training():
    run = run_of(map="disaggregated", ahead=1)
    profile = profile_of(0.01, 0.01, training=0.02)
    one = predict(run, make_plan(run, Inventory.of(cores=4)), profile)
    assert one.sync == 0.5
    assert one.iteration == max(one.rollout, one.training + one.sync)


def test_an_asynchronous_learner_also_looks_at_what_older_weights_collected():
    profile = profile_of(0.01, 0.01, training=0.02, anchoring=0.005)
    rows = 32 * 64
    for ahead, each in ((0, 0.02), (1, 0.025)):
        run = run_of(map="disaggregated", ahead=ahead)
        one = predict(run, make_plan(run, Inventory.of(cores=4)), profile)
        assert one.training == pytest.approx(rows * each)


def test_a_learner_waits_while_policy_and_environments_are_both_busy_on_its_cores():
    profile = profile_of(0.01, 0.01, training=0.02)

    def one(**placement) -> Prediction:
        run = run_of(map="disaggregated", **placement)
        return predict(run, make_plan(run, LAPTOP), profile)

    chunk = 64 * 0.01
    assert one(ahead=1, stages=1).contended == pytest.approx(0.0), "they take turns: one core is always free"
    overlapped = one(ahead=1, stages=2)
    simulation, inference = 32 * chunk, 33 * chunk  # of 32 chunks, and the values of what was seen last
    assert overlapped.contended == pytest.approx(simulation + inference - overlapped.rollout)
    assert overlapped.contended > 0.9 * simulation
    assert overlapped.iteration == overlapped.training + overlapped.sync + overlapped.contended
    assert one(ahead=0, stages=2).contended == 0.0


def test_a_learner_waits_while_the_policy_infers_on_their_gpu():
    run = run_of(map="learner: gpu 0, env: core all, policy: gpu 0", ahead=1, stages=2)
    one = predict(run, make_plan(run, Inventory.of(gpus=1, cores=8)), profile_of(0.01, 0.01))
    assert one.contended == pytest.approx(33 * 64 * 0.01)


def test_what_is_picked_depends_on_how_well_cores_scale():
    poorly, well = (profile_of(0.01, 0.01, scaling=s) for s in (1.05, 1.95))
    assert choose(run_of(map="auto"), LAPTOP, poorly).placement.map in ("hybrid", "disaggregated")
    assert choose(run_of(map="auto", ahead=1), LAPTOP, poorly).placement.ahead == 1
    single = replace(run_of(map="auto"), rollout=RolloutConfig(num_envs=64, chunks=32))
    assert choose(single, Inventory.of(cores=1), well).placement.map == "colocated"


@pytest.mark.parametrize("nodes", [1, 4, 128])
def test_machines_that_are_not_here_can_be_planned_for(nodes):
    run = run_of(executor="ray")
    run = replace(run, rollout=replace(run.rollout, num_envs=8192))
    profile = replace(profile_of(0.01, 0.001), device="H100")
    found = ranked(run, Inventory.of(nodes, gpus=8, cores=64), profile)
    assert found and found[0].iteration <= found[-1].iteration
    assert "colocated" in table(found)


def test_a_profile_survives_being_saved_and_a_wrong_file_is_named(tmp_path):
    profile = profile_of(0.01, 0.02)
    profile.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == profile
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(RoveError, match=r"other\.json is not a profile"):
        Profile.load(tmp_path / "other.json")


def test_a_profile_of_a_cpu_says_nothing_of_gpus():
    """Before, its times were taken for a GPU's, and the table was nonsense."""
    profile = profile_of(simulation=0.01, inference=0.01)
    with pytest.raises(RoveError, match=r"profile is of cpu, .* on a GPU: name a card with --card"):
        ranked(run_of(), Inventory.of(gpus=8, cores=64), profile)
    with pytest.raises(RoveError, match="profile is of H100, .* on a CPU"):
        ranked(run_of(), LAPTOP, replace(profile, device="H100"))


def test_a_card_that_is_not_here_is_bound_by_its_rates(monkeypatch):
    run = get("openvla_oft_ppo").build()
    monkeypatch.setattr(measure, "_simulations", lambda run, cores: (Line(0.1, 0.01), 2.0))
    profile = measure.bound(run, CARDS["h100"])
    # 38.3 TFLOP for eight rows, 158 for a LoRA step of sixteen, as counted operation by operation.
    flops = CARDS["h100"].matrices
    counted = {"inference": 38.8e12 / 8, "training": 158.1e12 / 16}
    for name, each in counted.items():
        got = getattr(profile, name).each * measure.REACHED[name] * flops
        assert got == pytest.approx(each, rel=0.05), name
    assert profile.inference.fixed == pytest.approx(15.5e9 / 3e12, rel=0.1)
    best = ranked(run, Inventory.of(gpus=8, cores=64), profile)[0]
    assert best.plan.ranks == 8 and best.training > 0
