"""Supervised warm-up: cross-entropy on the action tokens of expert demonstrations."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rove import checkpoint, rundir, transfer
from rove.config import load
from rove.config.schema import Run, SFTConfig
from rove.envs import registry as envs
from rove.envs.base import VectorEnv
from rove.errors import RoveError
from rove.interrupt import Interrupt
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
    made_from,
    save_demonstrations,
)
from rove.training.learner import freeze
from rove.training.pointing import learn_to_point, pointing_loss, present
from rove.training.snapshots import Snapshots
from rove.types import Demonstrations, EpisodeRecord

_MADE_FROM = "made_from.json"
"""In the directory of a warm-up: the settings that it was made from."""
_PHASES = ("pointing", "sft")
"""Phases of a warm-up that take optimizer steps, in order; their metrics begin with these."""


def warm_up(
    run: Run,
    directory: Path,
    log: Logger,
    progress: Progress,
    device: str = "cpu",
    interrupt: Interrupt | None = None,
) -> Path:
    """Return the checkpoint that RL starts from.

    Where `run.sft` is None it is `policy.checkpoint` as it is; otherwise it is trained here on
    demonstrations, from that checkpoint or from scratch. `directory/demonstrations.npz` and
    `directory/sft` are used again where they were made from the same settings, and a warm-up that was stopped
    goes on where it was. A signal that `interrupt` hears between two steps is raised once they are saved.
    """
    if run.policy.checkpoint is not None:
        checkpoint.refuse_damaged(Path(run.policy.checkpoint))
    if run.sft is None:
        if run.policy.checkpoint is None:
            raise RoveError("Nothing to start from: set policy.checkpoint, or keep the sft section.")
        return Path(run.policy.checkpoint)
    target, key = directory / "sft", _made_from(run)
    interrupt = interrupt or Interrupt()
    snapshots = Snapshots(directory / "warm_up", key, check=interrupt.check)
    if target.exists():
        if (wrong := _unfit(target, key)) is None:
            snapshots.delete()  # where a kill came before that
            return target
        progress.message(f"{target} {wrong}: the warm-up is made anew.")
    log.keep(partial(_logged_before, snapshots.phase, snapshots.step))

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
        if run.sft.grounding and snapshots.phase != "sft":
            progress.phase("picture", run.sft.grounding)
            grounding = collect_grounding_images(
                env, images=run.sft.grounding, seed=run.seed, on_image=progress.advance
            )

    def on_step(step: int, metrics: dict[str, float]) -> None:
        progress.advance()
        if step % 50 == 0:
            log.log_sft(step, metrics)

    common = {"max_bad_steps": run.training.max_bad_steps, "on_step": on_step, "snapshots": snapshots}
    with interrupt.patient("this step"):
        if grounding is not None:
            assert isinstance(policy, Locator)  # or `Policy.check` has refused the run
            progress.phase("point", run.sft.grounding_steps)
            if snapshots.phase == "pointing":
                progress.advance(snapshots.step)
            learn_to_point(policy, grounding, run.sft, run.seed, **common)
        freeze(policy, run.sft.freeze, "sft.freeze")
        progress.phase("sft", run.sft.steps)
        if snapshots.phase == "sft":
            progress.advance(snapshots.step)
        fit(policy, demonstrations, run.sft, run.seed, **common)

    def write(draft: Path) -> None:
        policy.save_pretrained(draft)
        (draft / _MADE_FROM).write_text(json.dumps(key, indent=1))

    checkpoint.write_atomically(target, write)
    snapshots.delete()
    return target


def _made_from(run: Run) -> dict[str, Any]:
    """All that a warm-up depends on."""
    return {
        **_demonstrated_with(run),
        "policy": load.to_dict(rundir.settled(run).policy),
        "sft": load.to_dict(run.sft),
    }


def _demonstrated_with(run: Run) -> dict[str, Any]:
    """All that demonstrations depend on."""
    assert run.sft is not None
    return {
        "env": load.to_dict(run.env),
        "num_envs": run.rollout.num_envs,
        "chunk": run.rollout.chunk,
        "seed": run.seed,
        "sft": {name: load.to_dict(run.sft)[name] for name in ("episodes", "noise", "slips", "emphasis")},
    }


def _unfit(target: Path, key: dict[str, Any]) -> str | None:
    """Why a warm-up cannot be used for a run: it is damaged, or was made from other settings."""
    if (damaged := checkpoint.damage(target)) is not None:
        return f"cannot be used, since {damaged}"
    return _difference(json.loads((target / _MADE_FROM).read_text()), key)


def _difference(made: Any, wanted: Any, name: str = "") -> str | None:
    """The first setting in which two differ, in words: "was made with sft.steps = 5, not 6"."""
    if isinstance(made, dict) and isinstance(wanted, dict):
        for key in sorted(made.keys() | wanted.keys()):
            inside = f"{name}.{key}" if name else key
            if (found := _difference(made.get(key), wanted.get(key), inside)) is not None:
                return found
        return None
    return None if made == wanted else f"was made with {name} = {made!r}, not {wanted!r}"


def _logged_before(phase: str | None, step: int, line: Mapping[str, Any]) -> bool:
    """Whether a line of the log is of a warm-up until `step` of `phase`; no line is where that is None."""
    of = (number for number, name in enumerate(_PHASES) if any(key.startswith(f"{name}/") for key in line))
    own = next(of, None)
    return own is not None and phase is not None and (own, line["sft_step"]) <= (_PHASES.index(phase), step)


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
    keep: bool = False,
) -> Demonstrations:
    """Demonstrations of the run's tasks from the suite's scripted expert.

    Those in `path` are read where they were made from the same settings, or do not say from which; others are
    collected anew, in their place unless `keep`: then RoveError says how they differ.
    """
    assert run.sft is not None
    key = _demonstrated_with(run)
    if path.exists():
        made = made_from(path)
        if made is None or (wrong := _difference(made, key)) is None:
            if made is None:
                progress.message(f"{path} is used as it is: it does not say what it was made from.")
            return load_demonstrations(path)
        if keep:
            raise RoveError(f"{path} {wrong}: delete it, or name another --out.")
        progress.message(f"{path} {wrong}: the demonstrations are collected anew.")
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
    save_demonstrations(demonstrations, path, key)
    return demonstrations


def fit(
    policy: Policy,
    demonstrations: Demonstrations,
    config: SFTConfig,
    seed: int,
    *,
    max_bad_steps: int,
    on_step: OnStep = lambda step, metrics: None,
    snapshots: Snapshots | None = None,
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
        jitter=jitter,
        snapshots=snapshots,
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
