"""Supervised warm-up: cross-entropy on the action tokens of expert demonstrations."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from rove import checkpoint, transfer
from rove.config.schema import Run, SFTConfig
from rove.envs import registry as envs
from rove.envs.base import VectorEnv
from rove.errors import RoveError
from rove.policies import registry as policies
from rove.policies.base import Locator, Policy, Regressor
from rove.reporting.log import Logger
from rove.reporting.progress import Progress
from rove.training.augment import ColorJitter
from rove.training.batches import Gradient, OnStep, gradient_descent
from rove.training.demonstrations import (
    collect_demonstrations,
    collect_grounding_images,
    dataset_statistics,
    load_demonstrations,
    save_demonstrations,
)
from rove.training.learner import freeze
from rove.training.pointing import learn_to_point, pointing_loss, present
from rove.types import Demonstrations, EpisodeRecord


def warm_up(run: Run, directory: Path, log: Logger, progress: Progress, device: str = "cpu") -> Path:
    """Return the checkpoint that RL starts from.

    Where `run.sft` is None it is `policy.checkpoint` as it is; otherwise it is trained here on
    demonstrations, from that checkpoint or from scratch. `directory/demonstrations.npz` and `directory/sft`
    are made once and used again.
    """
    if run.sft is None:
        if run.policy.checkpoint is None:
            raise RoveError("Nothing to start from: set policy.checkpoint, or keep the sft section.")
        return Path(run.policy.checkpoint)
    target = directory / "sft"
    if target.exists():
        return target
    with closing(make_env(run, device)) as env:
        demonstrations = demonstrate(run, env, directory / "demonstrations.npz", progress)
        suite = env.suite
        policy = policies.build(
            run.policy,
            chunk=run.rollout.chunk,
            action_spec=env.action_spec,
            image_size=run.env.image_size,
            vocabulary=suite.vocabulary,
            statistics={suite.name: dataset_statistics(demonstrations)},
            seed=run.seed,
            device=device,
        )
        grounding = None
        if run.sft.grounding:
            progress.phase("picture", run.sft.grounding)
            grounding = collect_grounding_images(
                env, images=run.sft.grounding, seed=run.seed, on_image=progress.advance
            )

    def on_step(step: int, metrics: dict[str, float]) -> None:
        progress.advance()
        if step % 50 == 0:
            log.log_sft(step, metrics)

    common = {"max_bad_steps": run.training.max_bad_steps, "on_step": on_step}
    if grounding is not None:
        assert isinstance(policy, Locator)  # or `Policy.check` has refused the run
        progress.phase("point", run.sft.grounding_steps)
        learn_to_point(policy, grounding, run.sft, run.seed, **common)
    freeze(policy, run.sft.freeze, "sft.freeze")
    progress.phase("sft", run.sft.steps)
    fit(policy, demonstrations, run.sft, run.seed, **common)
    return checkpoint.save_policy(target, policy)


def make_env(run: Run, device: str = "cpu") -> VectorEnv:
    """Make the environment that demonstrations are collected in; a GPU environment uses `device`."""
    return envs.make(
        run.env,
        num_envs=run.rollout.num_envs,
        chunk=run.rollout.chunk,
        autoreset="refill",
        gpu=torch.device(device).index,
    )


def demonstrate(
    run: Run,
    env: VectorEnv,
    path: Path,
    progress: Progress,
    on_episode: Callable[[EpisodeRecord], None] = lambda record: None,
) -> Demonstrations:
    """Collect demonstrations of the run's tasks from the scripted expert; read from `path` if it exists."""
    assert run.sft is not None
    if path.exists():
        return load_demonstrations(path)
    progress.phase("demonstrate", run.sft.episodes)

    def count(record: EpisodeRecord) -> None:
        on_episode(record)
        if record.success:
            progress.advance()

    demonstrations = collect_demonstrations(
        env,
        episodes=run.sft.episodes,
        noise=run.sft.noise,
        seed=run.seed,
        slips=run.sft.slips,
        emphasis=run.sft.emphasis,
        on_episode=count,
    )
    save_demonstrations(demonstrations, path)
    return demonstrations


def fit(
    policy: Policy,
    demonstrations: Demonstrations,
    config: SFTConfig,
    seed: int,
    *,
    max_bad_steps: int,
    on_step: OnStep = lambda step, metrics: None,
) -> None:
    """Train `policy` in place for `config.steps` optimizer steps.

    Every pass over the demonstrations is a fresh permutation. Actions are learned by the cross-entropy of
    their tokens or, where the policy regresses, by the mean absolute error of their normalised values. Where
    the policy points and the demonstrations have points, the pointing loss is added, times
    `config.pointing_weight`.
    """
    jitter = ColorJitter(config.color_jitter, seed)
    if isinstance(policy, Regressor) and policy.regresses:
        gradient = _l1(policy, demonstrations, config, jitter)
    else:
        gradient = _cross_entropy(policy, demonstrations, config, jitter)
    gradient_descent(
        policy,
        len(demonstrations),
        config,
        seed,
        gradient,
        name="sft",
        steps=config.steps,
        max_bad_steps=max_bad_steps,
        on_step=on_step,
    )


def _cross_entropy(
    policy: Policy, demonstrations: Demonstrations, config: SFTConfig, jitter: ColorJitter
) -> Gradient:
    points, size = demonstrations.points, demonstrations.images.shape[-2]
    tokens = transfer.to(policy.tokenize(demonstrations.actions), "cpu")

    def gradient(rows: Tensor) -> dict[str, Tensor]:
        counted = float(demonstrations.mask[rows].sum()) * tokens.shape[-1]
        losses, right = [], []
        for part in rows.split(config.micro_batch):
            output = policy.evaluate(
                jitter(demonstrations.observation(part)),
                tokens[part],
                temperature=1.0,
                smoothing=config.smoothing,
            )
            mask = transfer.to(demonstrations.mask[part], output.logprob.device)[..., None]
            loss = -(output.logprob * mask).sum() / counted
            losses.append(loss.detach())
            if output.pointing is not None and points is not None:
                named = int(present(points[rows]).sum())
                pointed = pointing_loss(output.pointing, points[part], size, named)
                loss = loss + config.pointing_weight * pointed
            loss.backward()
            right.append((output.logprob.detach().exp() * mask).sum() / counted)
        return {"loss": torch.stack(losses).sum(), "token_probability": torch.stack(right).sum()}

    return gradient


def _l1(
    policy: Regressor, demonstrations: Demonstrations, config: SFTConfig, jitter: ColorJitter
) -> Gradient:
    """Return the gradient function for a policy that gives actions outright (Kim et al. 2025, section 4)."""
    target = transfer.to(policy.normalize(demonstrations.actions), "cpu")

    def gradient(rows: Tensor) -> dict[str, Tensor]:
        counted = float(demonstrations.mask[rows].sum()) * target.shape[-1]
        losses = []
        for part in rows.split(config.micro_batch):
            output = policy.regress(jitter(demonstrations.observation(part)))
            wanted, mask = transfer.to((target[part], demonstrations.mask[part]), output.device)
            loss = ((output - wanted).abs() * mask[..., None]).sum() / counted
            loss.backward()
            losses.append(loss.detach())
        return {"loss": torch.stack(losses).sum()}

    return gradient
