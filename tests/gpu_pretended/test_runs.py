"""Whole runs on a GPU: warm-up, rollouts, updates, evaluation, checkpoints and a resume, with environments in
processes of their own, as the plan has them beside a GPU."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tests.gpu_pretended import pretend

from rove import recipes  # isort: skip
from rove.config.schema import (
    GRPO,
    PPO,
    EvaluationConfig,
    LlamaConfig,
    LoggingConfig,
    LoraConfig,
    PolicyConfig,
    Run,
    TowerConfig,
)
from rove.envs import registry as envs
from rove.envs.sampler import EpisodeSampler
from rove.evaluation.checkpoint import evaluate_checkpoint
from rove.policies.openvla import OpenVLA, bins
from rove.train import train

ITERATIONS = 2
SMALL = PolicyConfig(
    towers=(
        TowerConfig(kind="dinov2", width=16, depth=2, heads=2, patch=14, mlp=64),
        TowerConfig(kind="siglip", width=16, depth=2, heads=2, patch=14, mlp=40),
    ),
    llama=LlamaConfig(width=32, depth=2, heads=2, mlp=48),
)
"""In place of the published 7B: both towers, and so every kind of layer."""


def shrunk(name: str) -> Run:
    """The recipe with its parts in place and little of each."""
    run = recipes.get(name).build()
    sft, training = run.sft, run.training
    if sft is not None:
        sft = replace(
            sft, episodes=4, emphasis=(), steps=1, batch=4, micro_batch=4, slips=0.0,
            grounding=min(sft.grounding, 4), grounding_steps=min(sft.grounding_steps, 1),
            optim=replace(sft.optim, warmup=0),
        )  # fmt: skip
    chunk, grpo = run.rollout.chunk, isinstance(run.algorithm, GRPO)
    return replace(
        run,
        algorithm=replace(run.algorithm, group_size=4) if isinstance(run.algorithm, GRPO) else run.algorithm,
        env=replace(run.env, image_size=56 if run.policy.checkpoint else 32, horizon=2 * chunk),
        rollout=replace(run.rollout, num_envs=8 if grpo else 4, chunks=2, emphasis=()),
        sft=sft,
        training=replace(
            training, iterations=ITERATIONS, batch=8, micro_batch=8, offload=True, max_minutes=None,
            optim=replace(training.optim, warmup=0),
        ),
        evaluation=EvaluationConfig(every=2, episodes=2, variant_episodes=0, num_envs=2),
        logging=LoggingConfig(tensorboard=False, save_every=1),
    )  # fmt: skip


def started(run: Run, policy: PolicyConfig, directory: Path, size: int) -> Run:
    """Begun from a checkpoint with random weights, without a warm-up."""
    env = envs.make(run.env, num_envs=1, chunk=run.rollout.chunk, autoreset="refill")
    state = env.reset(EpisodeSampler(env.suite, 0).take(1)).state
    action = bins.statistics_of_bounds(env.action_spec)["bounds"]
    if state is not None:
        action["proprio"] = {"q01": [-1.0] * state.shape[1], "q99": [1.0] * state.shape[1]}
    made = OpenVLA.build(
        policy,
        chunk=run.rollout.chunk,
        action_spec=env.action_spec,
        image_size=size,
        vocabulary=env.suite.vocabulary,
        statistics={env.suite.name: action},
        seed=1,
    )
    env.close()
    made.save_pretrained(directory)
    return replace(run, policy=replace(run.policy, checkpoint=str(directory)), sft=None)


def published(run: Run, directory: Path) -> Run:
    """With a checkpoint that has the layout of the published 7B and a fraction of its size."""
    here = started(run, SMALL, directory, 56)
    return replace(here, policy=replace(here.policy, lora=LoraConfig(rank=4)), sft=run.sft)


def complete(run: Run, directory: Path, cuda: pretend.Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, and look at what has to be there, on which device it was computed, and how often the host
    waited."""
    if isinstance(run.algorithm, GRPO):  # nothing comes back from the device, so all groups would be alike
        monkeypatch.setattr("rove.algorithms.grpo._kept_slots", _all_slots)
    train(run, directory)
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    steps = [line["train/steps"] for line in lines if "train/steps" in line]
    assert len(steps) == ITERATIONS and min(steps) > 0
    assert (directory / "checkpoints" / f"iteration_{ITERATIONS:06d}" / "policy").is_dir()
    assert (directory / "report.html").is_file()
    assert set(cuda.devices) == {0} and cuda.devices[0] > 1000


def _all_slots(trajectory, config):
    import torch

    return torch.arange(trajectory.shape[1])


@pytest.fixture(autouse=True)
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRETENDED_GPUS", "1")


def test_tabletop_ppo_and_its_resume_and_evaluation(cuda, tmp_path, monkeypatch) -> None:
    run = shrunk("tabletop_ppo")
    complete(run, tmp_path / "run", cuda, monkeypatch)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"iteration_{ITERATIONS:06d}")
    train(run, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "checkpoints" / f"iteration_{ITERATIONS:06d}").is_dir()
    for device, used in (("cpu", False), ("auto", True)):
        cuda.devices.clear()
        config = EvaluationConfig(episodes=2, num_envs=2)
        settings = ("--placement.device", device)
        saved = tmp_path / "run" / "sft"
        report = evaluate_checkpoint(saved, "tabletop", None, "none", config, seed=0, settings=settings)
        assert len(report.records) == 2 and bool(cuda.devices) is used


def test_tabletop_grpo(cuda, tmp_path, monkeypatch) -> None:
    complete(shrunk("tabletop_grpo"), tmp_path / "run", cuda, monkeypatch)


def test_vine_sampling(cuda, tmp_path, monkeypatch) -> None:
    complete(shrunk("tabletop_vine"), tmp_path / "run", cuda, monkeypatch)


def test_the_published_checkpoint_with_adapters(cuda, tmp_path, monkeypatch) -> None:
    """PPO on OpenVLA-OFT: SFT first, bfloat16, LoRA, a critic, activations computed again."""
    run = published(shrunk("openvla_oft_ppo"), tmp_path / "published")
    assert isinstance(run.algorithm, PPO) and run.policy.dtype == "bfloat16"
    complete(run, tmp_path / "run", cuda, monkeypatch)


def test_libero(cuda, tmp_path, monkeypatch) -> None:
    pytest.importorskip("libero")
    run = shrunk("libero_object_grpo")
    task = "object/pick_up_the_alphabet_soup_and_place_it_in_the_basket"
    run = replace(run, env=replace(run.env, tasks=task, scenes=1, threads=1))
    run = started(run, run.policy, tmp_path / "start", run.env.image_size)
    complete(run, tmp_path / "run", cuda, monkeypatch)


def test_put_on_plate(cuda, tmp_path, monkeypatch) -> None:
    from tests import maniskill

    maniskill.require()
    run = shrunk("put_on_plate_ppo")
    env = replace(run.env, full_frame=False, objects=(2,), tables=(0,), backend="physx_cpu", render="cpu")
    run = replace(run, env=replace(env, workers=1), sft=None, evaluation=EvaluationConfig(episodes=0))
    complete(published(run, tmp_path / "published"), tmp_path / "run", cuda, monkeypatch)
