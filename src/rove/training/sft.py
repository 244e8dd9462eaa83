"""Supervised warm-up: a policy imitates expert demonstrations, by a loss of its own."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rove import checkpoint, rundir, transfer
from rove.config import load
from rove.config.schema import Run, SFTConfig
from rove.envs import registry as envs
from rove.envs.base import Corrector, VectorEnv
from rove.errors import RoveError
from rove.interrupt import Interrupt
from rove.policies import registry as policies
from rove.policies.base import Locator, Policy, SamplingNoise
from rove.reporting.log import Logger
from rove.reporting.progress import Progress
from rove.training.augment import ColorJitter
from rove.training.batches import Gradient, OnStep, gradient_descent
from rove.training.brought import bring
from rove.training.demonstrations import (
    collect_demonstrations,
    collect_grounding_images,
    dataset_statistics,
    described,
    join,
    load_demonstrations,
    made_from,
    save_demonstrations,
)
from rove.training.learner import freeze
from rove.training.pointing import learn_to_point, pointed_at, pointing_loss, present
from rove.training.snapshots import Snapshots
from rove.types import Demonstrations, EpisodeRecord, Observation

_MADE_FROM = "made_from.json"
"""In the directory of a warm-up: the settings that it was made from."""
_PHASES = ("pointing", "sft")
"""Phases of a warm-up that take optimizer steps, in order; their metrics begin with these. Rounds of
relabelling, which follow, count on the steps of the second."""
_ROUND = "relabelled_"
"""What the phase of a round of relabelling begins with, and the file of what it has learned from; its number
follows."""


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
    demonstrations, the expert's or those of `run.sft.data`, from that checkpoint or from scratch.
    `directory/demonstrations.npz` and `directory/sft` are used again where they were made from the same
    settings, `directory/relabelled_N.npz` as well, what a round of taking turns with the expert showed. A
    warm-up that was stopped goes on where it was, and one that is to have more rounds than it had goes on
    with those. A signal that `interrupt` hears between two steps is raised once they are saved.
    """
    if run.policy.checkpoint is not None:
        checkpoint.refuse_damaged(Path(run.policy.checkpoint))
    if run.sft is None:
        if run.policy.checkpoint is None:
            raise RoveError("Nothing to start from: set policy.checkpoint, or keep the sft section.")
        return Path(run.policy.checkpoint)
    target, key, interrupt = directory / "sft", _made_from(run), interrupt or Interrupt()
    begun = _Begun.look(run, directory, key, progress, interrupt.check)
    if begun.rounds == run.sft.relabel:
        begun.snapshots.delete()  # where a kill came before that
        return target
    snapshots, first, taken = begun.snapshots, begun.next_round, begun.steps_taken
    log.keep(
        partial(_logged_before, "sft" if first else snapshots.phase, _steps_before(run.sft, first) + taken)
    )
    policy, demonstrations, grounding = _materials(run, directory, begun, progress, device)

    def on_step(step: int, metrics: dict[str, float], before: int = 0) -> None:
        progress.advance()
        if step % 50 == 0:
            log.log_sft(before + step, metrics)

    common = {"max_bad_steps": run.training.max_bad_steps, "on_step": on_step, "snapshots": snapshots}
    with interrupt.patient("this step"):
        if grounding is not None:
            assert isinstance(policy, Locator)  # or `Policy.check` has refused the run
            progress.phase("point", run.sft.grounding_steps)
            if snapshots.phase == "pointing":
                progress.advance(taken)
            learn_to_point(policy, grounding, run.sft, run.seed, **common)
        freeze(policy, run.sft.freeze, "sft.freeze")
        if not first:
            progress.phase("sft", run.sft.steps)
            if snapshots.phase == "sft":
                progress.advance(taken)
            fit(policy, demonstrations, run.sft, run.seed, **common)
    for number in range(1, run.sft.relabel + 1):
        relabelled = relabel(run, policy, number, _round_file(directory, number), progress, device)
        demonstrations = join([demonstrations, relabelled])
        if number < first:
            continue
        progress.phase(f"sft, round {number}", run.sft.relabel_steps)
        if number == first:
            progress.advance(taken)
        common["on_step"] = partial(on_step, before=_steps_before(run.sft, number))
        with interrupt.patient("this step"):
            fit(
                policy,
                demonstrations,
                _lessons(run.sft),
                run.seed + number,
                phase=f"{_ROUND}{number}",
                **common,
            )

    def write(draft: Path) -> None:
        policy.save_pretrained(draft)
        (draft / _MADE_FROM).write_text(json.dumps(key, indent=1))

    checkpoint.write_atomically(target, write)
    snapshots.delete()
    return target


class _Begun(NamedTuple):
    """What is left of a warm-up that was begun in a directory."""

    rounds: int | None
    """Rounds of relabelling that its checkpoint has had; None: there is no checkpoint that can be used."""
    snapshots: Snapshots
    """The phase that it was stopped in, if any."""

    @staticmethod
    def look(
        run: Run, directory: Path, key: Mapping[str, Any], progress: Progress, check: Callable[[], None]
    ) -> _Begun:
        """Look what of a warm-up in `directory` can be used for `run`, which has to be made from `key`; what
        cannot is said. For `check` see `Snapshots`."""
        assert run.sft is not None
        target, rounds = directory / "sft", None
        snapshots = Snapshots(directory / "warm_up", key, check=check)
        if target.exists():
            rounds, wrong = _rounds_done(target, run)
            if rounds is None:
                progress.message(f"{target} {wrong}: the warm-up is made anew.")
        if rounds == run.sft.relabel:
            return _Begun(rounds, snapshots)
        learned_from = max(_round(snapshots.phase), rounds or 0)
        files = [_round_file(directory, number) for number in range(1, learned_from + 1)]
        if (missing := next((path for path in files if not path.exists()), None)) is not None:
            progress.message(f"{missing} is missing: the warm-up is made anew.")
            snapshots.delete()
            return _Begun(None, Snapshots(directory / "warm_up", key, check=check))
        return _Begun(rounds, snapshots)

    @property
    def next_round(self) -> int:
        """The round of relabelling to go on with; 0: the demonstrations themselves."""
        return max(_round(self.snapshots.phase), 0 if self.rounds is None else self.rounds + 1)

    @property
    def steps_taken(self) -> int:
        """Optimizer steps that were taken in the phase to go on with."""
        stopped_in_it = not self.next_round or self.next_round == _round(self.snapshots.phase)
        return self.snapshots.step if stopped_in_it else 0


def _materials(
    run: Run, directory: Path, begun: _Begun, progress: Progress, device: str
) -> tuple[Policy, Demonstrations, Demonstrations | None]:
    """Build the policy that a warm-up begins with, and collect or read its demonstrations and the pictures to
    point in; no pictures where that is behind it."""
    assert run.sft is not None
    with closing(make_env(run, device)) as env:
        if run.sft.relabel and not isinstance(env, Corrector):
            raise RoveError(f"The expert of {env.suite.name!r} cannot look on: set --sft.relabel 0.")
        if run.sft.data is None:
            demonstrations = demonstrate(run, env, directory / "demonstrations.npz", progress)
            every = run.rollout.chunk
        else:
            demonstrations, every = bring(run, env)
        start = run.policy.checkpoint if begun.rounds is None else str(directory / "sft")
        policy = policies.build(
            replace(run.policy, checkpoint=start),
            chunk=run.rollout.chunk,
            action_spec=env.action_spec,
            image_size=run.env.image_size,
            vocabulary=env.suite.vocabulary,
            statistics={env.suite.name: dataset_statistics(demonstrations, every, run.sft.zero_centred)},
            seed=run.seed,
            device=device,
        )
        grounding = None
        if run.sft.grounding and not begun.next_round and begun.snapshots.phase in (None, "pointing"):
            progress.phase("picture", run.sft.grounding)
            grounding = collect_grounding_images(
                env, images=run.sft.grounding, seed=run.seed, on_image=progress.advance
            )
    return policy, demonstrations, grounding


def _rounds_done(target: Path, run: Run) -> tuple[int | None, str | None]:
    """How many rounds of relabelling a warm-up has had that `run` can use, or go on from; else why it cannot:
    it is damaged, or was made from other settings."""
    assert run.sft is not None
    if (damaged := checkpoint.damage(target)) is not None:
        return None, f"cannot be used, since {damaged}"
    made, wrong = json.loads((target / _MADE_FROM).read_text()), None
    for number in range(run.sft.relabel, -1, -1):
        key = _made_from(replace(run, sft=replace(run.sft, relabel=number)))
        if (difference := _difference(made, key)) is None:
            return number, None
        wrong = wrong or difference
    return None, wrong


def _round(phase: str | None) -> int:
    """The round of relabelling that a phase is; 0: none."""
    return int(phase.removeprefix(_ROUND)) if phase and phase.startswith(_ROUND) else 0


def _round_file(directory: Path, number: int) -> Path:
    """The file of what a round of relabelling showed."""
    return directory / f"{_ROUND}{number}.npz"


def _steps_before(config: SFTConfig, number: int) -> int:
    """Optimizer steps on demonstrations before those of a round of relabelling; 0: before any."""
    return config.steps + (number - 1) * config.relabel_steps if number else 0


def _lessons(config: SFTConfig) -> SFTConfig:
    """How a round of relabelling is learned from."""
    muon = config.optim.muon_lr
    optim = replace(config.optim, lr=config.optim.lr / 2, muon_lr=None if muon is None else muon / 2)
    return replace(config, steps=config.relabel_steps, optim=optim)


def relabel(
    run: Run, policy: Policy, number: int, path: Path, progress: Progress, device: str
) -> Demonstrations:
    """What the expert did in a round of taking turns with the policy: read from `path` where it is there and
    was made from the same settings, else collected and kept there."""
    assert run.sft is not None
    # More rounds do not change what is collected in those before.
    upto = replace(run, sft=replace(run.sft, relabel=number))
    key = _made_from(upto)
    if path.exists() and (made := made_from(path)) is not None and _difference(made, key) is None:
        return load_demonstrations(path)
    progress.phase(f"take turns, round {number}", run.sft.relabel_episodes)

    def drive(seen: Observation) -> Tensor:
        with torch.inference_mode():  # it has learned actions in the environment's own convention
            return transfer.to(policy.act(seen, "greedy"), "cpu").actions

    with closing(make_env(run, device)) as env:
        found = collect_demonstrations(
            env,
            episodes=run.sft.relabel_episodes,
            noise=run.sft.noise,
            seed=run.seed,
            horizon=policies.horizon(run),
            emphasis=run.sft.emphasis,
            on_episode=lambda record: progress.advance() if record.success else None,
            drive=drive,
            stream=2 + number,
        )
    save_demonstrations(found, path, key)
    return found


def _made_from(run: Run) -> dict[str, Any]:
    """All that a warm-up depends on."""
    run = rundir.settled(run)
    assert run.sft is not None
    sft = load.to_dict(run.sft)
    if not run.sft.relabel:  # which warm-ups from before there was any do not say
        sft = {name: value for name, value in sft.items() if not name.startswith("relabel")}
    policy = load.to_dict(run.policy)
    if run.policy.pointed == 1:  # likewise
        del policy["pointed"]
    key = {**_demonstrated_with(run), "policy": policy, "sft": sft}
    return key if run.sft.data is None else key | {"data": described(Path(run.sft.data))[2]}


def _demonstrated_with(run: Run) -> dict[str, Any]:
    """All that demonstrations depend on."""
    assert run.sft is not None
    horizon = policies.horizon(run)
    return {
        "env": load.to_dict(run.env),
        "num_envs": run.rollout.num_envs,
        "chunk": run.rollout.chunk,
        "seed": run.seed,
        "sft": {name: load.to_dict(run.sft)[name] for name in ("episodes", "noise", "slips", "emphasis")},
        # Files from before policies could predict more than is executed do not say this.
        **({} if horizon == run.rollout.chunk else {"horizon": horizon}),
    }


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
        horizon=policies.horizon(run),
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
    phase: str = "sft",
) -> None:
    """Train `policy` in place for `config.steps` optimizer steps.

    Every pass over the demonstrations is a fresh permutation. The loss is the policy's own, see
    `Policy.imitation_loss`; what it draws is keyed by seed, row and place in the order of training, so that
    neither micro-batches nor a stop change it. Where the policy points and the demonstrations have points,
    the pointing loss is added, times `config.pointing_weight`. Raises RoveError where the demonstrations
    show another number of actions than the policy predicts.
    """
    jitter = ColorJitter(config.color_jitter, seed)
    if (shown := demonstrations.actions.shape[1]) != policy.horizon:
        raise RoveError(
            f"The demonstrations show {shown} actions from each picture on, but the policy predicts "
            f"{policy.horizon}: collect them anew, for this policy."
        )
    gradient = _imitation(policy, demonstrations, config, seed, jitter)
    gradient_descent(
        policy,
        len(demonstrations),
        config,
        seed,
        gradient,
        name="sft",
        phase=phase,
        steps=config.steps,
        max_bad_steps=max_bad_steps,
        on_step=on_step,
        jitter=jitter,
        snapshots=snapshots,
    )


def _imitation(
    policy: Policy, demonstrations: Demonstrations, config: SFTConfig, seed: int, jitter: ColorJitter
) -> Gradient:
    points, size = demonstrations.points, demonstrations.images.shape[-2]
    actions, mask = demonstrations.actions, demonstrations.mask

    def gradient(rows: Tensor, step: int) -> dict[str, Tensor]:
        counted = float(mask[rows].sum()) * actions.shape[-1]
        draws = torch.arange(len(rows)) + step * len(rows)
        sums: dict[str, list[Tensor]] = defaultdict(list)
        for part, drawn in zip(rows.split(config.micro_batch), draws.split(config.micro_batch), strict=True):
            seen = jitter(demonstrations.observation(part))
            noise = SamplingNoise(seed, part, drawn)
            output = policy.imitation_loss(seen, actions[part], mask[part], config=config, noise=noise)
            loss = output.loss / counted
            sums["loss"].append(loss.detach())
            if output.pointing is not None and points is not None:
                named = int(present(pointed_at(points[rows], output.pointing)).sum())
                wanted = pointed_at(points[part], output.pointing)
                pointed = pointing_loss(output.pointing, wanted, size, named)
                loss = loss + config.pointing_weight * pointed
            loss.backward()
            for name, value in output.metrics.items():
                sums[name].append(value / counted)
        return {name: torch.stack(values).sum() for name, values in sums.items()}

    return gradient
