"""Checks between settings. Pure: reads a run, changes nothing; every problem names the fix.

Each rule is a generator of problems, one sentence each; `validate` runs all of them, so that a user sees
everything that is wrong at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_type_hints

from rove.config.load import decode, shown, to_dict
from rove.config.needs import needs, optimizer_steps
from rove.config.ranges import range_of
from rove.config.schema import (
    PPO,
    LiberoConfig,
    OptimConfig,
    PutOnPlateConfig,
    Run,
    SFTConfig,
    TabletopConfig,
)
from rove.errors import RoveError

Problems = Iterator[str]


def validate(run: Run) -> None:
    """Raise RoveError listing every problem of this run; the first wrong type ends the search at once."""
    decode(Run, to_dict(run), "")
    problems = [problem for rule in RULES for problem in rule(run)]
    if problems:
        count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise RoveError(f"Run {shown(run.name)} has {count}:\n" + "\n".join(f"  - {p}" for p in problems))


def check_ranges(part: Any, prefix: str) -> None:
    """Raise RoveError on a number of a part of a run that is out of its range."""
    if problem := next(_ranges(part, prefix), None):
        raise RoveError(problem)


# --- ranges ---------------------------------------------------------------------------------------


def _ranges(part: Any, prefix: str = "") -> Problems:
    """Compare each number of a run, or of a part of it, with the range that stands beside its field."""
    hints = get_type_hints(type(part), include_extras=True)
    for f in fields(part):
        value, key = getattr(part, f.name), prefix + f.name
        allowed = range_of(hints[f.name])
        numbers = value if isinstance(value, tuple) else () if value is None else (value,)
        if allowed is not None and not all(map(allowed.holds, numbers)):
            kind = "numbers, each" if isinstance(value, tuple) else "a number"
            yield f"{key} = {shown(value)}: expected {kind} {allowed.words}."
        elif is_dataclass(value):
            yield from _ranges(value, f"{key}.")
        elif isinstance(value, tuple):
            for index, item in enumerate(value):
                if is_dataclass(item):
                    yield from _ranges(item, f"{key}.{index}.")


def _algorithm_ranges(run: Run) -> Problems:
    low, dual = _get(run, "algorithm.clip_low"), _get(run, "algorithm.dual_clip")
    if low is not None and low >= 1:
        yield f"algorithm.clip_low = {low}: it is subtracted from 1; set it below 1, e.g. 0.2."
    if dual is not None and dual <= 1:
        yield (
            f"algorithm.dual_clip = {dual}: it bounds the loss at that many advantages; "
            "set it above 1 (3 is usual), or none."
        )
    for section, optim in _optims(run):
        if not all(0 <= beta < 1 for beta in optim.betas):
            yield f"{section}.betas = {optim.betas}: both are decay rates; set them in [0, 1), e.g. 0.9,0.95."


def _names(run: Run) -> Problems:
    name = run.name
    folder = name.isprintable() and not set("/\\") & set(name) and name not in ("", ".", "..")
    if not folder or len(name.encode()) > 200:
        yield (
            f"name = {shown(name)}: it becomes a folder below `output`; use letters, digits, - and _, "
            "at most 200."
        )
    if not run.output or not run.output.isprintable():
        yield f"output = {shown(run.output)}: expected the name of a folder."
    if not re.fullmatch(r"auto|cpu|cuda|cuda:[0-9]{1,4}", run.placement.device):
        yield f"placement.device = {shown(run.placement.device)}: expected auto, cpu, cuda, or cuda:N."
    for section, part in (("rollout", run.rollout), ("sft", run.sft)):
        for entry in part.emphasis if part else ():
            if not re.fullmatch(r".+:[0-9]{1,3}", entry, re.DOTALL):
                yield (
                    f"{section}.emphasis has {shown(entry)}: expected a task's beginning and how often, "
                    "at most 999, as push:4."
                )


# --- sizes that must fit together -----------------------------------------------------------------


def _divisibility(run: Run) -> Problems:
    sections = [("training", run.training), *([("sft", run.sft)] if run.sft else [])]
    for name, s in sections:
        if s.micro_batch > 0 and s.batch % s.micro_batch:
            yield (
                f"{name}.micro_batch = {s.micro_batch} does not divide {name}.batch = {s.batch}: "
                f"set --{name}.micro_batch {_divisor(s.batch, s.micro_batch)}."
            )
    horizon, chunk = run.env.horizon, run.rollout.chunk
    if chunk > 0 and horizon > 0 and horizon % chunk:
        yield (
            f"rollout.chunk = {chunk} does not divide env.horizon = {horizon}: set --rollout.chunk "
            f"{_divisor(horizon, chunk)} or --env.horizon {-(-horizon // chunk) * chunk}."
        )


def _model_sizes(run: Run) -> Problems:
    if run.policy.checkpoint is not None or run.policy.flow is not None:
        return  # the checkpoint decides the architecture, or sizes of another kind
    if not run.policy.towers:
        yield "policy.towers is empty: the policy needs at least one vision tower."
    parts = [(f"policy.towers.{i}", tower) for i, tower in enumerate(run.policy.towers)]
    for name, part in [*parts, ("policy.llama", run.policy.llama)]:
        if part.heads > 0 and part.width % part.heads:
            yield (
                f"{name}.heads = {part.heads} does not divide {name}.width = {part.width}: "
                f"set --{name}.heads {_divisor(part.width, part.heads)}."
            )
    for name, tower in parts:
        if tower.patch > 0 and run.env.image_size % tower.patch:
            yield (
                f"{name}.patch = {tower.patch} does not divide env.image_size = {run.env.image_size}: "
                f"set --{name}.patch {_divisor(run.env.image_size, tower.patch)}."
            )


def _schedules(run: Run) -> Problems:
    optim, limit = run.training.optim, _max_optimizer_steps(run)
    if optim.warmup >= limit:
        yield (
            f"training.optim.warmup = {optim.warmup}, but the run takes at most {limit} optimizer steps: "
            "lower it, or raise --training.iterations."
        )
    if run.sft and run.sft.optim.warmup >= run.sft.steps:
        yield (
            f"sft.optim.warmup = {run.sft.optim.warmup}, but sft.steps = {run.sft.steps}: "
            "lower the warm-up, or raise --sft.steps."
        )
    if run.sft and run.sft.relabel and run.sft.optim.warmup >= run.sft.relabel_steps:
        yield (
            f"sft.optim.warmup = {run.sft.optim.warmup}, but sft.relabel_steps = {run.sft.relabel_steps}: "
            "lower the warm-up, or raise --sft.relabel_steps."
        )
    if run.sft and 0 < run.sft.grounding_steps <= run.sft.optim.warmup:
        yield (
            f"sft.optim.warmup = {run.sft.optim.warmup}, but sft.grounding_steps = "
            f"{run.sft.grounding_steps}: lower the warm-up, or raise --sft.grounding_steps."
        )


# --- settings that must agree ---------------------------------------------------------------------


def _groups(run: Run) -> Problems:
    size, rollout = needs(run.algorithm).group_size, run.rollout
    if size is None:
        return
    if size < 2:
        yield f"algorithm.group_size = {size}: a group compares episodes; set at least 2, e.g. 8."
    elif rollout.num_envs % size:
        yield (
            f"algorithm.group_size = {size} does not divide rollout.num_envs = {rollout.num_envs}: set "
            f"--algorithm.group_size {_divisor(rollout.num_envs, size, least=2)} "
            f"or --rollout.num_envs {-(-rollout.num_envs // size) * size}."
        )
    low, high = _get(run, "algorithm.keep_low"), _get(run, "algorithm.keep_high")
    if low is not None and high is not None and low > high:
        yield (
            f"algorithm.keep_low = {low} is above algorithm.keep_high = {high}: no group could be kept; swap "
            "them."
        )
    bounded = low is not None and high is not None and (low > 0 or high < 1)
    if _get(run, "algorithm.keep_uniform") and (bounded or needs(run.algorithm).max_rounds > 1):
        yield (
            "algorithm.keep_uniform = true trains on every group: nothing is left out or made up for. Set "
            "--algorithm.keep_low 0 --algorithm.keep_high 1 --algorithm.max_rounds 1, or "
            "--algorithm.keep_uniform false."
        )
    if _get(run, "algorithm.valid_action_mask") is False and (
        rollout.chunk == 1 or _get(run, "algorithm.ratio_level") == "chunk"
    ):
        yield (
            "algorithm.valid_action_mask = false has no effect where a chunk counts as a whole: set "
            "--algorithm.valid_action_mask true, or --algorithm.ratio_level action and a longer chunk."
        )


def _whole_episodes(run: Run) -> Problems:
    wanted, rollout, horizon = needs(run.algorithm), run.rollout, run.env.horizon
    if wanted.group_size is None and wanted.refill:
        return
    if rollout.chunks * rollout.chunk != horizon and horizon % max(rollout.chunk, 1) == 0:
        kind = run.algorithm.kind.upper()
        whole = "scores" if wanted.refill else "with algorithm.refill = false plays"
        yield (
            f"rollout.chunks = {rollout.chunks} of rollout.chunk = {rollout.chunk} actions are "
            f"{rollout.chunks * rollout.chunk}, but {kind} {whole} whole episodes of env.horizon = "
            f"{horizon}: set --rollout.chunks {horizon // max(rollout.chunk, 1)}."
        )


def _branches(run: Run) -> Problems:
    branches = _get(run, "algorithm.branches")
    if branches is not None and branches < 2:
        yield f"algorithm.branches = {branches}: nothing to compare; set at least 2, e.g. 8."
    if needs(run.algorithm).branches > 1 and _get(run, "env.backend") == "physx_cuda":
        yield (
            "env.backend = 'physx_cuda' cannot put everything back after a try, as "
            f"{run.algorithm.kind!r} needs it: set --env.backend physx_cpu."
        )


def _critic(run: Run) -> Problems:
    wanted, kind, head = needs(run.algorithm), run.algorithm.kind.upper(), run.policy.value_head
    level = _get(run, "algorithm.advantage_level") or "action"
    if head is not None and not wanted.critic:
        yield f"policy.value_head is set, but {kind} has no critic: set --policy.value_head none."
    if not wanted.critic:
        return
    if head is None:
        yield f"{kind} needs a critic, and policy.value_head is none: set --policy.value_head.level {level}."
    elif head.level != level:
        yield (
            f"policy.value_head.level = {head.level!r}, but algorithm.advantage_level = {level!r}: "
            f"set --policy.value_head.level {level}."
        )
    if _get(run, "algorithm.ratio_level") == "chunk" and level == "action":
        yield (
            "algorithm.ratio_level = 'chunk' gives one ratio a chunk, but algorithm.advantage_level = "
            "'action' one advantage an action: set --algorithm.advantage_level chunk."
        )
    if wanted.critic_warmup >= run.training.iterations:
        yield (
            f"algorithm.critic_warmup = {wanted.critic_warmup}, but training.iterations = "
            f"{run.training.iterations}: the policy would never train; lower the warm-up."
        )


def _decoding(run: Run) -> Problems:
    policy = run.policy
    if policy.decoding == "parallel":
        return
    if policy.attention == "bidirectional":
        yield (
            "policy.attention = 'bidirectional' lets a token see later ones, which autoregressive decoding "
            "has not produced yet: set --policy.attention causal or --policy.decoding parallel."
        )
    if policy.value_head is not None and policy.value_head.source == "mean":
        yield (
            "policy.value_head.source = 'mean' would let an autoregressive policy's value see the actions "
            "that it judges: set --policy.value_head.source first."
        )


def _flow(run: Run) -> Problems:
    flow = run.policy.flow
    if flow is not None:
        yield from flow.sampling.problems()


def _start(run: Run) -> Problems:
    if run.sft is None and run.policy.checkpoint is None:
        yield (
            "sft is none and policy.checkpoint is none: RL has nothing to start from; set "
            "--policy.checkpoint DIRECTORY, or --sft.steps to warm up here."
        )
    if run.sft and run.sft.relabel and run.sft.data is not None:
        yield (
            f"sft.data = {run.sft.data} and sft.relabel = {run.sft.relabel}: rounds add to what the "
            "expert has demonstrated itself; set --sft.relabel 0, or --sft.data none."
        )
    if run.sft and bool(run.sft.grounding) != bool(run.sft.grounding_steps):
        yield (
            f"sft.grounding = {run.sft.grounding} pictures, but sft.grounding_steps = "
            f"{run.sft.grounding_steps}: set both, or --sft.grounding 0 --sft.grounding_steps 0."
        )
    if run.sft and run.policy.checkpoint is None and run.policy.pointers and not run.sft.grounding:
        yield (
            f"policy.pointers = {run.policy.pointers}, but sft.grounding = 0: nothing teaches them where to "
            "point; set --policy.pointers 0, or --sft.grounding and --sft.grounding_steps."
        )
    pictures = _pictures(run.env)
    if run.policy.pointers and pictures is not None and run.policy.pointed > pictures:
        yield (
            f"policy.pointed = {run.policy.pointed}, but the suite has {pictures} "
            f"picture{'s' if pictures > 1 else ''}: set --policy.pointed {pictures}"
            f"{', or --env.wrist true' if isinstance(run.env, LiberoConfig) and not run.env.wrist else ''}."
        )
    if run.sft and run.sft.grounding and pictures is not None and run.policy.pointers not in (0, _THINGS):
        # points of one thing, or picture, would else be learned for those of another
        yield (
            f"policy.pointers = {run.policy.pointers}, but the suite says where {_THINGS} things are in a "
            f"picture: set --policy.pointers {_THINGS}."
        )
    if run.sft and run.sft.freeze and not run.sft.grounding and run.policy.checkpoint is None:
        yield (
            "sft.freeze is set, but in a policy from scratch with sft.grounding = 0 what it names would stay "
            "random: set --sft.freeze [], or --sft.grounding and --sft.grounding_steps."
        )


_THINGS = 3
"""Points that `rove.envs.base.Grounder` says in a picture."""


def _pictures(env: object) -> int | None:
    """How many pictures an observation has; None where its settings do not say."""
    if isinstance(env, LiberoConfig):
        return 1 + env.wrist
    return 1 if isinstance(env, TabletopConfig | PutOnPlateConfig) else None


def _checkpoint(run: Run) -> Problems:
    policy = run.policy
    if policy.checkpoint is None:
        for name, unset in (("unnorm_key", None), ("dtype", "float32")):
            if getattr(policy, name) != unset:
                yield (
                    f"policy.{name} is set, but a policy from scratch does not read it: "
                    f"set --policy.{name} {str(unset).lower()}, or --policy.checkpoint."
                )
    elif run.sft and policy.unnorm_key is not None:
        yield (
            "policy.unnorm_key is set, but sft replaces a checkpoint's statistics by those of the "
            "demonstrations: set --policy.unnorm_key none, or --sft none."
        )
    frozen = policy.flow is not None and policy.flow.freeze == "vlm"  # what is trained stays float32
    if policy.dtype == "bfloat16" and policy.lora is None and not frozen:
        yield (
            "policy.dtype = 'bfloat16' without policy.lora trains weights of 8 bits, which lose most steps: "
            "set --policy.lora.rank 32, or --policy.dtype float32 --training.precision bfloat16."
        )
    if policy.head == "l1" and policy.decoding == "autoregressive":
        yield "policy.head = 'l1' reads all actions at once: set --policy.decoding parallel."


def _environment(run: Run) -> Problems:
    """Ask the environment's settings for contradictions among them, where they look for any."""
    yield from getattr(run.env, "problems", tuple)()


def _placement(run: Run) -> Problems:
    placement = run.placement
    parts = max(placement.stages, 1) * max(placement.env_workers, 1)
    if parts > 0 and run.rollout.num_envs % parts:
        yield (
            f"rollout.num_envs = {run.rollout.num_envs} cannot be split over placement.stages = "
            f"{placement.stages} × placement.env_workers = {max(placement.env_workers, 1)}: set "
            f"--rollout.num_envs {-(-run.rollout.num_envs // parts) * parts}."
        )
    if placement.ahead and placement.deterministic:
        yield (
            f"placement.ahead = {placement.ahead} lets the learner and the rollout race, which "
            "placement.deterministic = true forbids: set one of them off."
        )


def _evaluation(run: Run) -> Problems:
    if run.evaluation.every and not run.evaluation.episodes:
        yield (
            f"evaluation.every = {run.evaluation.every}, but evaluation.episodes = 0: "
            "set --evaluation.episodes, or --evaluation.every 0."
        )


# --- settings that nothing would read -------------------------------------------------------------


def _unread(run: Run) -> Problems:
    has_critic = needs(run.algorithm).critic and run.policy.value_head is not None
    for section, optim in _optims(run):
        critic_here = has_critic and section == "training.optim"
        if optim.value_lr is not None and not critic_here:
            yield f"{section}.value_lr is set, but no critic is trained there: set --{section}.value_lr none."
        if optim.muon_lr is not None and section == "training.optim":
            yield f"{section}.muon_lr is set, but RL trains by AdamW alone: set --{section}.muon_lr none."
        default = _default(OptimConfig, "final_lr_fraction")
        if optim.schedule == "constant" and optim.final_lr_fraction != default:
            yield (
                f"{section}.final_lr_fraction is set, but {section}.schedule = 'constant' does not read it: "
                f"set --{section}.schedule cosine."
            )
    default = _default(PPO, "max_behavior_weight")
    if not run.placement.ahead and _get(run, "algorithm.max_behavior_weight") not in (None, default):
        yield (
            "algorithm.max_behavior_weight is set, but placement.ahead = 0 collects nothing off-policy: "
            f"set --algorithm.max_behavior_weight {default}, or "
            "--placement.ahead 1."
        )
    if _get(run, "algorithm.decoupled") is False:
        if not run.placement.ahead:
            yield (
                "algorithm.decoupled = false is read where a rollout may be off-policy, but placement.ahead "
                "= 0: set --algorithm.decoupled true, or --placement.ahead 1."
            )
        elif _get(run, "algorithm.max_behavior_weight") not in (None, default):
            yield (
                "algorithm.max_behavior_weight is set, but algorithm.decoupled = false weights nothing: set "
                f"--algorithm.max_behavior_weight {default}, or --algorithm.decoupled true."
            )
    placement = run.placement
    if placement.ray_address is not None and placement.executor != "ray":
        yield (
            f"placement.ray_address = {placement.ray_address!r}, but placement.executor = 'local' does not "
            "read it: set --placement.executor ray, or --placement.ray_address none."
        )
    if placement.nodes and placement.executor != "ray":
        yield (
            f"placement.nodes = {placement.nodes}, but placement.executor = 'local' runs on one machine: set "
            "--placement.executor ray, or --placement.nodes 0."
        )
    default = _default(SFTConfig, "pointing_weight")
    if run.sft and not run.sft.grounding and run.sft.pointing_weight != default:
        yield (
            "sft.pointing_weight is set, but sft.grounding = 0 does not read it: "
            f"set --sft.pointing_weight {default}, or --sft.grounding and --sft.grounding_steps."
        )
    for name in ("relabel_episodes", "relabel_steps"):
        default = _default(SFTConfig, name)
        if run.sft and not run.sft.relabel and getattr(run.sft, name) != default:
            yield (
                f"sft.{name} is set, but sft.relabel = 0 does not read it: set --sft.{name} {default}, or "
                "--sft.relabel to the number of rounds."
            )


RULES: tuple[Callable[[Run], Problems], ...] = (
    _names,
    _ranges,
    _algorithm_ranges,
    _divisibility,
    _model_sizes,
    _schedules,
    _groups,
    _whole_episodes,
    _branches,
    _critic,
    _decoding,
    _flow,
    _start,
    _checkpoint,
    _evaluation,
    _environment,
    _placement,
    _unread,
)


# --- helpers --------------------------------------------------------------------------------------


def _get(run: Run, key: str) -> Any:
    """The value at a dotted key; None where the run's variant or an unset section does not have it."""
    value: Any = run
    for name in key.split("."):
        value = getattr(value, name, None)
    return value


def _optims(run: Run) -> Iterator[tuple[str, OptimConfig]]:
    yield "training.optim", run.training.optim
    if run.sft:
        yield "sft.optim", run.sft.optim


def _max_optimizer_steps(run: Run) -> int:
    rows = run.rollout.num_envs * run.rollout.chunks * needs(run.algorithm).max_rounds
    return run.training.iterations * max(needs(run.algorithm).epochs, optimizer_steps(run, rows))


def _divisor(number: int, near: int, least: int = 1) -> int:
    """The divisor of `number`, at least `least`, that lies nearest to `near`."""
    small = [d for d in range(1, math.isqrt(max(number, 0)) + 1) if number % d == 0]
    divisors = [d for d in sorted({*small, *(number // d for d in small)}) if d >= least]
    return min(divisors, key=lambda d: abs(d - near), default=number)


def _default(section: type, name: str) -> Any:
    default = next(f.default for f in fields(section) if f.name == name)
    assert default is not MISSING
    return default
