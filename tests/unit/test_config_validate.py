"""Cross-checks: a sound run passes, and each broken one gets its own message with a fix that works."""

from __future__ import annotations

import re
from dataclasses import dataclass, is_dataclass, replace
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

from rove import recipes
from rove.config import load as config
from rove.config import schema
from rove.config.needs import Needs, needs, optimizer_steps
from rove.config.ranges import Fraction, range_of
from rove.config.schema import GRPO, PPO, LiberoConfig, Run, TabletopConfig, ValueHeadConfig, Vine
from rove.config.validate import RULES, validate
from rove.errors import RoveError

GRPO_RUN = Run(name="grpo", algorithm=GRPO(), env=TabletopConfig(horizon=32))
PPO_RUN = config.apply(GRPO_RUN, ["--algorithm.kind", "ppo", "--policy.value_head.level", "action"])
LIBERO_RUN = replace(GRPO_RUN, env=LiberoConfig(horizon=32))
VINE_RUN = config.apply(GRPO_RUN, ["--algorithm.kind", "vine"])
PLATE_RUN = recipes.build("put_on_plate_tiny_ppo")


@pytest.mark.parametrize("run", [GRPO_RUN, PPO_RUN, VINE_RUN, LIBERO_RUN])
def test_sound_runs_pass_unchanged(run):
    before = config.to_dict(run)
    validate(run)
    assert config.to_dict(run) == before


@pytest.mark.parametrize(
    ("run", "words", "problem", "fix"),
    [
        (GRPO_RUN, "--algorithm.group_size 7", "group_size = 7 does not divide rollout.num_envs = 64", 0),
        (GRPO_RUN, "--algorithm.group_size 1", "a group compares episodes", "--algorithm.group_size 8"),
        (GRPO_RUN, "--rollout.chunks 3", "24, but GRPO scores whole episodes of env.horizon = 32", 0),
        (GRPO_RUN, "--policy.value_head.level action", "GRPO has no critic", 0),
        (GRPO_RUN, "--algorithm.keep_low 0.8 --algorithm.keep_high 0.2", "no group could be kept", None),
        (GRPO_RUN, "--algorithm.keep_uniform true --algorithm.keep_low 0.1", "left out or made up for", 0),
        (GRPO_RUN, "--algorithm.keep_uniform true --algorithm.max_rounds 4", "left out or made up for", 0),
        (
            GRPO_RUN,
            "--algorithm.valid_action_mask false --algorithm.ratio_level chunk",
            "no effect where a chunk counts as a whole",
            "--algorithm.valid_action_mask true",
        ),
        (
            GRPO_RUN,
            "--algorithm.valid_action_mask false --rollout.chunk 1 --rollout.chunks 32",
            "no effect where a chunk counts as a whole",
            "--algorithm.valid_action_mask true",
        ),
        (
            PPO_RUN,
            "--algorithm.refill false --rollout.chunks 3",
            "24, but PPO with algorithm.refill = false plays whole episodes of env.horizon = 32",
            0,
        ),
        (PPO_RUN, "--algorithm.decoupled false", "but placement.ahead = 0", "--placement.ahead 1"),
        (
            PPO_RUN,
            "--algorithm.decoupled false --placement.ahead 1 --algorithm.max_behavior_weight 3",
            "weights nothing",
            "--algorithm.max_behavior_weight 2",
        ),
        (GRPO_RUN, "--training.max_simulated_steps 0", "expected a number at least 1", None),
        (GRPO_RUN, "--algorithm.keep_high 1.5", "keep_high = 1.5: expected a number between 0 and 1", None),
        (GRPO_RUN, "--algorithm.dual_clip 1", "set it above 1", "--algorithm.dual_clip none"),
        (GRPO_RUN, "--algorithm.clip_low 1", "set it below 1", "--algorithm.clip_low 0.2"),
        (GRPO_RUN, "--algorithm.max_rounds 0", "expected a number at least 1", "--algorithm.max_rounds 1"),
        (GRPO_RUN, "--algorithm.kl_coef -0.1", "expected a number at least 0", "--algorithm.kl_coef 0"),
        (PPO_RUN, "--algorithm.gamma 1.1", "expected a number between 0 and 1", "--algorithm.gamma 1"),
        (PPO_RUN, "--algorithm.huber_delta 0", "expected a number above 0", "--algorithm.huber_delta 1"),
        (PPO_RUN, "--policy.value_head none", "PPO needs a critic", 0),
        (PPO_RUN, "--policy.value_head.level chunk", "level = 'chunk', but .*advantage_level = 'action'", 0),
        (
            PPO_RUN,
            "--algorithm.advantage_level chunk",
            "level = 'action', but .*advantage_level = 'chunk'",
            0,
        ),
        (LIBERO_RUN, "--env.wait -1", "expected a number at least 0", "--env.wait 0"),
        (LIBERO_RUN, "--env.scenes 0", "expected a number at least 1", "--env.scenes 1"),
        (VINE_RUN, "--algorithm.branches 1", "nothing to compare", "--algorithm.branches 8"),
        (
            VINE_RUN,
            "--env.kind maniskill_put_on_plate --env.horizon 32 --env.image_size 64 --env.backend physx_cuda",
            "'physx_cuda' cannot put everything back after a try",
            0,
        ),
        (VINE_RUN, "--algorithm.spread_floor -1", "expected a number at least 0", None),
        (VINE_RUN, "--policy.value_head.level action", "VINE has no critic", 0),
        (GRPO_RUN, "--sft.smoothing -1", "expected a number at least 0", "--sft.smoothing 0"),
        (PPO_RUN, "--algorithm.critic_warmup 100", "never train", "--algorithm.critic_warmup 99"),
        (PPO_RUN, "--algorithm.ratio_level chunk", "one ratio a chunk", None),
        (
            GRPO_RUN,
            "--training.micro_batch 300",
            "micro_batch = 300 does not divide training.batch = 1024",
            0,
        ),
        (GRPO_RUN, "--sft.micro_batch 48", "sft.micro_batch = 48 does not divide sft.batch = 64", 0),
        (PPO_RUN, "--rollout.chunk 7", "rollout.chunk = 7 does not divide env.horizon = 32", 0),
        (GRPO_RUN, "--rollout.chunk 5", "rollout.chunk = 5 does not divide env.horizon = 32", None),
        (
            GRPO_RUN,
            "--policy.temperature 0",
            "policy.temperature = 0.0: expected a number at least",
            None,
        ),
        (GRPO_RUN, "--policy.llama.heads 3", "heads = 3 does not divide policy.llama.width = 128", 0),
        (GRPO_RUN, "--policy.towers.0.patch 7", "patch = 7 does not divide env.image_size = 64", 0),
        (GRPO_RUN, "--policy.towers.0.depth 0", "depth = 0: expected a number at least 1", None),
        (GRPO_RUN, "--policy.towers []", "needs at least one vision tower", None),
        (
            GRPO_RUN,
            "--training.optim.warmup 100",
            "at most 100 optimizer steps",
            "--training.optim.warmup 99",
        ),
        (GRPO_RUN, "--sft.grounding 64", "but sft.grounding_steps = 0", "--sft.grounding 0"),
        (GRPO_RUN, "--sft.optim.warmup 1000", "but sft.steps = 1000", "--sft.steps 1001"),
        (
            GRPO_RUN,
            "--sft.grounding 64 --sft.grounding_steps 50",
            "but sft.grounding_steps = 50",
            "--sft.grounding 64 --sft.grounding_steps 51",
        ),
        (GRPO_RUN, "--policy.pointers 3", "nothing teaches them where to point", "--policy.pointers 0"),
        (
            GRPO_RUN,
            "--policy.pointers 3 --policy.pointed 2 --sft.grounding 64 --sft.grounding_steps 51",
            "but the suite has 1 picture:",
            "--policy.pointers 3 --policy.pointed 1 --sft.grounding 64 --sft.grounding_steps 51",
        ),
        (PLATE_RUN, "--policy.pointed 2", "but the suite has 1 picture:", 0),
        (
            GRPO_RUN,
            "--policy.pointers 6 --sft.grounding 64 --sft.grounding_steps 51",
            "the suite says where 3 things are",
            "--policy.pointers 3 --sft.grounding 64 --sft.grounding_steps 51",
        ),
        (GRPO_RUN, "--sft.freeze vlm.towers", "would stay random", "--sft.freeze []"),
        (
            GRPO_RUN,
            "--sft.pointing_weight 1",
            "sft.grounding = 0 does not read it",
            "--sft.pointing_weight 0.3",
        ),
        (GRPO_RUN, "--sft.relabel_steps 100", "sft.relabel = 0 does not read it", "--sft.relabel_steps 900"),
        (GRPO_RUN, "--sft.relabel 1 --sft.data d.npz", "rounds add to what the expert", "--sft.relabel 0"),
        (
            GRPO_RUN,
            "--sft.relabel 1 --sft.relabel_steps 50",
            "but sft.relabel_steps = 50",
            "--sft.relabel 1 --sft.relabel_steps 51",
        ),
        (GRPO_RUN, "--training.optim.betas 0.9,1", "both are decay rates", "--training.optim.betas 0.9,0.95"),
        (GRPO_RUN, "--training.optim.value_lr 1e-4", "no critic is trained there", 0),
        (PPO_RUN, "--sft.optim.value_lr 1e-4", "no critic is trained there", 0),
        (PPO_RUN, "--training.optim.muon_lr 1e-2", "RL trains by AdamW alone", 0),
        (GRPO_RUN, "--training.optim.final_lr_fraction 0.5", "'constant' does not read it", 0),
        (
            GRPO_RUN,
            "--policy.decoding autoregressive --policy.attention bidirectional",
            "autoregressive decoding has not produced yet",
            0,
        ),
        (PPO_RUN, "--policy.decoding autoregressive", "value see the actions that it judges", 0),
        (GRPO_RUN, "--sft none", "nothing to start from", "--sft.steps 100"),
        (GRPO_RUN, "--evaluation.every 5 --evaluation.episodes 0", "but evaluation.episodes = 0", None),
        (GRPO_RUN, "--evaluation.num_envs 0", "expected a number at least 1", None),
        (GRPO_RUN, "--training.max_minutes 0", "expected a number above 0", None),
        (GRPO_RUN, "--seed -1", "seed = -1: expected a number at least 0", None),
        (
            GRPO_RUN,
            "--placement.device gpu",
            "expected auto, cpu, cuda, or cuda:N",
            "--placement.device cuda:1",
        ),
        (GRPO_RUN, "--placement.device cpu:1", "expected auto, cpu, cuda, or cuda:N", None),
        (GRPO_RUN, "--name a/b", "it becomes a folder", "--name a_b"),
    ],
)
def test_each_problem_is_found_and_its_fix_works(run, words, problem, fix):
    """`fix` 0: the last one that the message itself gives; text: this one; None: not tried."""
    broken = config.apply(run, words.split())
    with pytest.raises(RoveError, match=problem) as caught:
        validate(broken)
    assert str(caught.value).startswith(f"Run {broken.name!r} has a problem:")
    if fix is None:
        return
    if fix == 0:
        fix = re.findall(r"--[\w.]+ [\w.]*\w", str(caught.value))[-1]
    validate(config.apply(broken, fix.split()))


def test_every_problem_is_listed_at_once():
    broken = config.apply(GRPO_RUN, "--algorithm.group_size 7 --policy.temperature 0 --sft.batch 63".split())
    with pytest.raises(RoveError) as caught:
        validate(broken)
    assert "has 3 problems" in str(caught.value)
    for key in ("algorithm.group_size = 7", "policy.temperature = 0.0", "sft.batch = 63"):
        assert key in str(caught.value)


def test_a_checkpoint_decides_the_architecture():
    broken = config.apply(GRPO_RUN, ["--policy.llama.heads", "3"])
    validate(config.apply(broken, ["--policy.checkpoint", "somewhere", "--sft", "none"]))


CHECKPOINT = ["--policy.checkpoint", "owner/name", "--sft", "none"]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["--policy.unnorm_key", "bridge_orig"], "policy.unnorm_key is set, but a policy from scratch"),
        (["--policy.dtype", "bfloat16"], "policy.dtype is set, but a policy from scratch"),
        ([*CHECKPOINT, "--policy.dtype", "bfloat16"], "without policy.lora trains weights of 8 bits"),
        ([*CHECKPOINT, "--policy.lora.rank", "0"], "policy.lora.rank = 0"),
        ([*CHECKPOINT, "--policy.lora.alpha", "-1"], "policy.lora.alpha = -1"),
        (
            ["--policy.head", "l1", "--policy.decoding", "autoregressive"],
            "policy.head = 'l1' reads all actions",
        ),
        (
            ["--policy.checkpoint", "owner/name", "--policy.unnorm_key", "bridge_orig"],
            "sft replaces a checkpoint's statistics",
        ),
    ],
)
def test_checkpoints_and_adapters(settings, problem):
    with pytest.raises(RoveError) as caught:
        validate(config.apply(GRPO_RUN, settings))
    assert problem in str(caught.value)


@pytest.mark.parametrize("value", ["32", 32.0, True, None])
def test_types_are_checked_in_runs_made_in_python_too(value):
    broken = replace(GRPO_RUN, rollout=replace(GRPO_RUN.rollout, num_envs=value))
    with pytest.raises(RoveError, match="rollout.num_envs = .*expected an integer"):
        validate(broken)


def test_choices_are_checked_in_runs_made_in_python_too():
    head = ValueHeadConfig(level="step")  # type: ignore[arg-type]
    with pytest.raises(RoveError, match="policy.value_head.level = 'step'. Choose one of: action, chunk"):
        validate(replace(PPO_RUN, policy=replace(PPO_RUN.policy, value_head=head)))


def test_every_number_of_the_schema_has_a_range_or_a_reason():
    """A new numeric setting must be bounded beside its field, or named here with who bounds it."""
    elsewhere = {"group_size", "dual_clip", "branches", "sim_freq"}  # validate.py; the suite itself
    sections = [section for section in vars(schema).values() if is_dataclass(section)]
    assert len(sections) > 15
    for section in sections:
        for name, annotation in get_type_hints(section, include_extras=True).items():
            if range_of(annotation) is None and {int, float} & {annotation, *get_args(annotation)}:
                assert name in elsewhere or get_origin(annotation) is tuple, f"{section}.{name}"


def test_a_range_is_read_beside_its_field():
    @dataclass(frozen=True, slots=True)
    class Settings:
        kind: Literal["own"] = "own"
        share: Fraction | None = 2.0
        free: float = -1.0

    run = replace(GRPO_RUN, algorithm=Settings(), policy=replace(GRPO_RUN.policy, value_head=None))
    found = [problem for rule in RULES for problem in rule(run)]
    assert found == ["algorithm.share = 2.0: expected a number between 0 and 1."]
    assert not [problem for rule in RULES for problem in rule(replace(run, algorithm=Settings(share=None)))]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (
            ("--env.kind", "maniskill", "--env.workers", "2"),
            "env.workers = 2, but env.backend = 'physx_cuda'",
        ),
        (("--env.kind", "maniskill", "--env.tasks", "PickCube-v1,StackCube-v1"), "simulates one task"),
        (("--env.kind", "maniskill_put_on_plate", "--env.settle", "true"), "cannot reset one world"),
    ],
)
def test_what_a_gpu_simulation_cannot_do(words, problem):
    run = config.apply(PPO_RUN, [*words, "--env.backend", "physx_cuda", "--env.image_size", "64"])
    with pytest.raises(RoveError, match=problem):
        validate(run)


def test_where_libero_draws_is_read_by_one_of_its_renderers():
    run = config.apply(LIBERO_RUN, ["--env.render", "cuda", "--env.renderer", "gl"])
    with pytest.raises(
        RoveError, match=r"env\.render = 'cuda'.*set --env\.render cpu, or --env\.renderer warp"
    ):
        validate(run)


def test_an_algorithm_of_ones_own_needs_no_more_than_a_kind():
    @dataclass(frozen=True, slots=True)
    class Settings:
        kind: Literal["own"] = "own"

    assert needs(Settings()) == Needs()
    run = replace(GRPO_RUN, algorithm=Settings(), policy=replace(GRPO_RUN.policy, value_head=None))
    assert [problem for rule in RULES for problem in rule(run)] == []
    assert optimizer_steps(run, 2 * run.training.batch + 1) == 3


def test_an_algorithm_declares_what_it_needs():
    assert needs(PPO(bootstrap="always")) == Needs(critic=True, bootstrap="always")
    assert needs(GRPO(group_size=4, kl_coef=0.1)) == Needs(
        group_size=4, kl_coef=0.1, length_normalization=True
    )
    assert needs(Vine(branches=3)).branches == 3
