"""Policies that draw points instead of tokens go through everything: rollouts, every algorithm, warm-up,
resume and evaluation know nothing of what they draw."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from tests.gaussian_policy import GaussianPolicy, H
from tests.integration.test_resume import NO_EVALUATION, measured

from rove import checkpoint
from rove.config.schema import (
    GRPO,
    PPO,
    EvaluationConfig,
    FlowPolicyConfig,
    FlowSampling,
    FlowSizes,
    LoggingConfig,
    OptimConfig,
    PolicyConfig,
    RolloutConfig,
    Run,
    SFTConfig,
    TabletopConfig,
    TrainingConfig,
    ValueHeadConfig,
    Vine,
)
from rove.config.validate import validate
from rove.errors import RoveError
from rove.evaluation.report import load
from rove.policies import registry
from rove.policies.base import SamplingNoise
from rove.rollout.buffer import Layout, RolloutBuffer
from rove.train import train
from rove.training.demonstrations import load_demonstrations
from rove.training.sft import fit
from rove.training.snapshots import Snapshots
from rove.types import ActionChunk, ActionSpec, Demonstrations, Observation
from rove.workers.pipeline import Pipeline

SPEC = ActionSpec(("x", "gripper"), ("m", "1"), (-0.1, -1.0), (0.1, 1.0))
C, ROWS = 4, 5
RUN = Run(
    name="gaussian",
    algorithm=PPO(advantage_level="chunk", ratio_level="chunk"),
    env=TabletopConfig(tasks="pick/red_cube", horizon=8, reward="shaped"),
    policy=PolicyConfig(kind="gaussian", value_head=ValueHeadConfig(level="chunk")),
    rollout=RolloutConfig(num_envs=8, chunk=C, chunks=2),
    training=TrainingConfig(iterations=2, batch=16, micro_batch=8, optim=OptimConfig(lr=1e-2)),
    sft=SFTConfig(episodes=4, noise=0.05, steps=6, batch=8, micro_batch=4, optim=OptimConfig(lr=1e-2)),
    evaluation=EvaluationConfig(episodes=4, variant_episodes=0, num_envs=4),
    logging=LoggingConfig(tensorboard=False, save_every=1, keep=10),
)
ALGORITHMS = {
    "ppo": RUN.algorithm,
    "grpo": GRPO(group_size=4, ratio_level="chunk", keep_high=1.0, kl_coef=0.1),
    "vine": Vine(branches=3, ratio_level="chunk"),
}
SIZES = FlowSizes(
    vision_width=16, vision_layers=1, vision_mlp=32, patch=16, width=32, layers=2, mlp=48, expert_mlp=48
)
FLOW = FlowPolicyConfig(horizon=H, sizes=SIZES)


def run_of(algorithm: str, kind: str = "gaussian", flow: FlowPolicyConfig | None = None, **policy) -> Run:
    """RUN by another algorithm, with another policy."""
    head = RUN.policy.value_head if algorithm == "ppo" else None
    config = PolicyConfig(kind=kind, flow=flow, value_head=head, **policy)
    return replace(RUN, algorithm=ALGORITHMS[algorithm], policy=config)


POINTING = run_of("vine", "smolvla", FLOW, pointers=3)
assert POINTING.sft is not None
RUNS = {
    **{algorithm: run_of(algorithm) for algorithm in ALGORITHMS},
    "smolvla ppo": run_of("ppo", "smolvla", FLOW),
    "smolvla vine, pointing": replace(
        POINTING,
        sft=replace(POINTING.sft, grounding=16, grounding_steps=2, freeze=("model.vlm_with_expert.vlm",)),
    ),
    "pi0 ppo, every step": run_of(
        "ppo", "pi0", replace(FLOW, sampling=FlowSampling(steps=2, sampler="flow_noise", hidden=(8,)))
    ),
    "pi05 grpo, frozen": run_of("grpo", "pi05", replace(FLOW, freeze="vlm")),
}


@pytest.fixture(autouse=True)
def _registered():
    registry.register("gaussian", "tests.gaussian_policy:GaussianPolicy")


def make() -> GaussianPolicy:
    policy = registry.build(
        RUN.policy, chunk=C, action_spec=SPEC, image_size=16, vocabulary=(), statistics=None, seed=0
    )
    assert isinstance(policy, GaussianPolicy)
    return policy


def noise(rows: int = ROWS) -> SamplingNoise:
    return SamplingNoise(3, torch.arange(rows) + 7, torch.arange(rows) % 2)


@pytest.fixture(scope="module")
def observation() -> Observation:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (ROWS, 1, 16, 16, 3), dtype=torch.uint8, generator=generator)
    return Observation(images, ("go",) * ROWS)


def test_it_acts_and_evaluates_alike_whatever_is_around_a_row(observation):
    policy = make()
    with torch.no_grad():
        chunk = policy.act(observation, "sample", noise())
        assert chunk.actions.shape == chunk.logprob.shape == (ROWS, C, 2)
        assert (
            chunk.sample.shape == (ROWS, *policy.sample_shape) and chunk.sample.dtype == policy.sample_dtype
        )
        torch.testing.assert_close(policy.evaluate(observation, chunk.sample).logprob, chunk.logprob)
        many = policy.act(observation, "sample", noise(), samples=3)
        assert torch.equal(many.sample[:, 0], chunk.sample)
        torch.testing.assert_close(policy.evaluate(observation, many.sample).logprob, many.logprob)
        few = policy.act(observation.select([0, 1]), "sample", noise(2))
        torch.testing.assert_close(few.sample, chunk.sample[:2])


def test_a_sample_that_is_not_as_declared_is_refused():
    layout = Layout(chunks=1, num_envs=2, chunk=C, action_dim=2, image=(1, 4, 4, 3), state=None)
    buffer = RolloutBuffer(layout, layout.allocate(), (3,), torch.float32)
    numbers = torch.zeros(2, C, 2)
    wrong = {"shape": torch.zeros(2, 4), "dtype": torch.zeros(2, 3).long()}
    for sample in wrong.values():
        with pytest.raises(RoveError, match=r"declares samples of shape \[3\] and torch.float32"):
            buffer.put_action(0, torch.arange(2), ActionChunk(numbers, sample, numbers, None))
    kept = torch.tensor([[1.5, 2.5, 3.5], [4.5, 5.5, 6.5]])
    buffer.put_action(0, torch.tensor([1, 0]), ActionChunk(numbers, kept, numbers, None))
    assert torch.equal(buffer.trajectory(0, ()).sample[0], kept.flip(0))
    buffer.clear(0, 1)
    assert torch.equal(buffer.sample[0, :, 0], torch.stack([torch.zeros(3), kept[0]]))


@pytest.mark.parametrize("name", RUNS)
def test_it_is_warmed_up_trained_resumed_and_evaluated(name, tmp_path):
    run = RUNS[name]
    validate(run)
    whole = train(run, tmp_path / "whole")
    expected = measured(whole)
    assert [line["step"] for line in expected] == [1, 2]
    assert sum(line["train/rows"] for line in expected) > 0
    trained = [line for line in expected if line["train/rows"]]
    assert all(abs(line["train/ratio"] - 1) < 0.2 for line in trained)
    assert len(load(whole / "eval" / "after.json").records) == 4
    shown = load_demonstrations(whole / "demonstrations.npz")
    assert shown.actions.shape[1] == shown.mask.shape[1] == H
    for path in (whole / "checkpoints").glob("iteration_000002"):
        shutil.rmtree(path)
    assert measured(train(run, whole, resume=True)) == expected


def test_numbers_that_are_not_finite_end_the_run_by_name(tmp_path, monkeypatch):
    collect = Pipeline.collect

    def ill(self, version, *args):
        if version == 1:
            with torch.no_grad():
                self.policy.model.action_out_proj.bias[0] = torch.nan
        return collect(self, version, *args)

    monkeypatch.setattr(Pipeline, "collect", ill)
    directory = tmp_path / "run"
    with pytest.raises(RoveError, match="FlowVLA gave actions that are not finite in iteration 2, chunk 1"):
        train(RUNS["smolvla ppo"], directory)
    assert [line["step"] for line in measured(directory)] == [1]
    assert checkpoint.damage(directory / "checkpoints" / "iteration_000001") is None


def test_the_same_seed_gives_the_same_run(tmp_path):
    run = replace(RUNS["vine"], evaluation=NO_EVALUATION)
    first, second = (measured(train(run, tmp_path / name)) for name in ("first", "second"))
    assert first == second
    assert first[-1]["train/rows"] > 0


def shown(count: int = 12) -> Demonstrations:
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (count, 1, 16, 16, 3), dtype=torch.uint8, generator=generator)
    actions = (torch.rand(count, H, 2, generator=generator) - 0.5) * torch.tensor([0.2, 2.0])
    mask = torch.ones(count, H, dtype=torch.bool)
    mask[::3, 2:] = False
    return Demonstrations(images, torch.arange(count), ("go",) * count, actions, mask)


def fitted(data: Demonstrations, micro_batch: int, steps: int = 20) -> tuple[GaussianPolicy, list[float]]:
    policy, losses = make(), []
    config = SFTConfig(steps=steps, batch=8, micro_batch=micro_batch, optim=OptimConfig(lr=1e-2))
    fit(
        policy,
        data,
        config,
        5,
        max_bad_steps=1,
        on_step=lambda _, metrics: losses.append(metrics["sft/loss"]),
    )
    return policy, losses


def test_its_own_loss_is_learned_by_whatever_the_micro_batches_are():
    whole, losses = fitted(shown(), 8)
    again, _ = fitted(shown(), 8)
    parts, _ = fitted(shown(), 2)
    assert losses[-1] < 0.5 * losses[0]
    for name, weight in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
        torch.testing.assert_close(parts.state_dict()[name], weight, atol=1e-4, rtol=1e-3)


def test_a_warm_up_that_was_stopped_draws_what_it_would_have_drawn(tmp_path):
    whole, _ = fitted(shown(), 4, steps=6)
    config = SFTConfig(steps=6, batch=8, micro_batch=4, optim=OptimConfig(lr=1e-2))
    taken = []

    def stop() -> None:
        taken.append(1)
        if len(taken) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(make(), shown(), config, 5, max_bad_steps=1, snapshots=Snapshots(tmp_path / "s", {}, check=stop))
    policy = make()
    fit(policy, shown(), config, 5, max_bad_steps=1, snapshots=Snapshots(tmp_path / "s", {}))
    assert all(torch.equal(policy.state_dict()[name], weight) for name, weight in whole.state_dict().items())


def test_actions_that_are_not_there_teach_nothing():
    data = shown()
    other = replace(data, actions=torch.where(data.mask[..., None], data.actions, torch.tensor([0.1, -1.0])))
    one, two = (fitted(part, 8, steps=3)[0] for part in (data, other))
    assert all(torch.equal(one.state_dict()[name], weight) for name, weight in two.state_dict().items())


def test_demonstrations_of_another_horizon_are_refused():
    data = shown()
    with pytest.raises(RoveError, match="show 4 actions from each picture on, but the policy predicts 6"):
        fitted(replace(data, actions=data.actions[:, :4], mask=data.mask[:, :4]), 8)


def test_bins_that_it_has_not_are_refused():
    assert RUN.sft is not None
    with pytest.raises(RoveError, match=r"GaussianPolicy has no bins.*--sft\.smoothing 0"):
        registry.check(replace(RUN, sft=replace(RUN.sft, smoothing=1.0)))


def test_more_actions_than_are_predicted_cannot_be_executed():
    run = replace(RUN, env=replace(RUN.env, horizon=16), rollout=RolloutConfig(num_envs=8, chunk=8, chunks=2))
    with pytest.raises(RoveError, match=r"GaussianPolicy predicts 6: set --rollout\.chunk 6 or less"):
        registry.check(run)
