"""ManiSkill recipes: the put-on-plate benchmark, for the tiny policy on a CPU and for 7B checkpoints on GPUs.

`put_on_plate_*` train OpenVLA 7B and OpenVLA-OFT 7B after a warm-up on the scripted expert's demonstrations;
`put_on_plate_tiny_*` train 756 thousand weights on a reduced set: three objects, one table, 64²;
`put_on_plate_tiny_all_ppo` on all train objects and tables, in the same small pictures.
"""

from dataclasses import replace

from rove.config.schema import (
    GRPO,
    PPO,
    EvaluationConfig,
    ManiSkillConfig,
    OptimConfig,
    PlacementConfig,
    PutOnPlateConfig,
    RolloutConfig,
    Run,
    SFTConfig,
    TrainingConfig,
    ValueHeadConfig,
    Vine,
)
from rove.recipes import recipe
from rove.recipes.openvla import CRITIC, PUBLISHED, openvla_oft_grpo, openvla_oft_ppo, openvla_ppo
from rove.recipes.tabletop import PERCEPTION, TINY

BENCHMARK = PutOnPlateConfig(full_frame=True)
"""The benchmark as published: images of 640 × 480, which the policy resizes to a square, and 80 actions."""

REDUCED = PutOnPlateConfig(objects=(2, 5, 13), tables=(0,), image_size=64, horizon=40, sim_freq=100)
"""A reduced set for two cores, with a fifth of the published physics steps: the expert fails no more often,
and an action costs half."""


@recipe
def put_on_plate_ppo() -> Run:
    """PPO on OpenVLA 7B and the put-on-plate benchmark, as published: a value after every end."""
    base = openvla_ppo()
    return replace(
        base,
        name="put_on_plate_ppo",
        env=BENCHMARK,
        algorithm=PPO(gamma=0.99, lam=0.95, ratio_level="action", clip_high=0.2, bootstrap="always"),
        policy=replace(PUBLISHED, value_head=CRITIC),
        rollout=RolloutConfig(num_envs=64, chunk=1, chunks=80),
        evaluation=EvaluationConfig(every=20, episodes=256, variant_episodes=192, decoding="sample"),
    )


@recipe
def put_on_plate_ppo_truncated() -> Run:
    """put_on_plate_ppo with a value after the horizon's ends alone: success is then worth what it is."""
    base = put_on_plate_ppo()
    assert isinstance(base.algorithm, PPO)
    algorithm = replace(base.algorithm, bootstrap="truncated")
    return replace(base, name="put_on_plate_ppo_truncated", algorithm=algorithm)


@recipe
def put_on_plate_grpo() -> Run:
    """GRPO on OpenVLA 7B and the put-on-plate benchmark: groups of 8, nothing but success."""
    base = put_on_plate_ppo()
    return replace(
        base,
        name="put_on_plate_grpo",
        algorithm=GRPO(group_size=8, ratio_level="action", clip_high=0.2),
        env=replace(BENCHMARK, reward="sparse"),
        policy=PUBLISHED,
        training=replace(base.training, optim=OptimConfig(lr=1e-4)),
    )


@recipe
def put_on_plate_oft_ppo() -> Run:
    """PPO on OpenVLA-OFT 7B and the put-on-plate benchmark: 8 actions a pass, a value after every end."""
    base = openvla_oft_ppo()
    return replace(
        base,
        name="put_on_plate_oft_ppo",
        env=BENCHMARK,
        algorithm=PPO(gamma=0.99, lam=0.95, bootstrap="always"),
        rollout=RolloutConfig(num_envs=64, chunk=8, chunks=10),
        evaluation=EvaluationConfig(every=20, episodes=256, variant_episodes=192, decoding="sample"),
    )


@recipe
def put_on_plate_oft_grpo() -> Run:
    """GRPO on OpenVLA-OFT 7B and the put-on-plate benchmark: sampled hot, asymmetric clipping."""
    base = openvla_oft_grpo()
    return replace(
        base,
        name="put_on_plate_oft_grpo",
        env=replace(BENCHMARK, reward="sparse"),
        rollout=RolloutConfig(num_envs=64, chunk=8, chunks=10),
        evaluation=EvaluationConfig(every=20, episodes=256, variant_episodes=192, decoding="sample"),
    )


@recipe
def put_on_plate_tiny_ppo() -> Run:
    """PPO for the tiny policy on a reduced put-on-plate set: three objects, one table, 64²."""
    return Run(
        name="put_on_plate_tiny_ppo",
        # A critic that knew nothing took success from 48 to 6 %, in four passes over each rollout.
        algorithm=PPO(gamma=0.9, lam=0.9, critic_warmup=5),
        # The published reward says nothing between a grasp and success, and episodes are few here.
        env=replace(REDUCED, reward="dense"),
        policy=replace(TINY, value_head=ValueHeadConfig(detach=True)),
        rollout=RolloutConfig(num_envs=32, chunk=8, chunks=10),
        # A tenth of this ended at 52 %, from which an hour of RL came to 69.
        sft=SFTConfig(
            episodes=1500,
            noise=0.5,
            smoothing=3.0,
            color_jitter=0.2,
            steps=2400,
            batch=64,
            micro_batch=64,
            grounding=12000,
            grounding_steps=2500,
            freeze=PERCEPTION,
            optim=OptimConfig(lr=2e-3, muon_lr=0.02, warmup=50, schedule="cosine", weight_decay=0.01),
        ),
        training=TrainingConfig(
            iterations=200,
            batch=80,
            micro_batch=80,
            freeze=PERCEPTION,
            optim=OptimConfig(lr=4e-4, value_lr=1e-3, betas=(0.9, 0.99), warmup=20, schedule="linear"),
            max_minutes=60,
        ),
        evaluation=EvaluationConfig(every=100, episodes=1000, variant_episodes=64, num_envs=32),
        placement=PlacementConfig(threads=0),
    )


@recipe
def put_on_plate_tiny_all_ppo() -> Run:
    """PPO for the tiny policy on all train objects and tables of the benchmark, sixteen of each, 64²."""
    base = put_on_plate_tiny_ppo()
    assert base.sft is not None
    return replace(
        base,
        name="put_on_plate_tiny_all_ppo",
        env=replace(base.env, objects=(), tables=()),
        sft=replace(base.sft, episodes=3000, steps=5400, grounding=16000, grounding_steps=3500),
    )


@recipe
def put_on_plate_tiny_ppo_always() -> Run:
    """put_on_plate_tiny_ppo with the published bootstrap: a value after every end, success included."""
    base = put_on_plate_tiny_ppo()
    assert isinstance(base.algorithm, PPO)
    algorithm = replace(base.algorithm, bootstrap="always")
    return replace(base, name="put_on_plate_tiny_ppo_always", algorithm=algorithm)


@recipe
def put_on_plate_tiny_grpo() -> Run:
    """GRPO for the tiny policy on the same reduced set: nothing but success."""
    base = put_on_plate_tiny_ppo()
    return replace(
        base,
        name="put_on_plate_tiny_grpo",
        rollout=replace(base.rollout, chunks=5),
        algorithm=GRPO(group_size=8, ratio_level="action"),
        env=replace(REDUCED, reward="sparse"),
        policy=TINY,
        training=replace(base.training, optim=replace(base.training.optim, value_lr=None)),
    )


@recipe
def put_on_plate_tiny_vine() -> Run:
    """Vine sampling for the tiny policy on the same reduced set: eight chunks tried from each state."""
    base = put_on_plate_tiny_ppo()
    return replace(
        base,
        name="put_on_plate_tiny_vine",
        # Eight times the actions of PPO's rollouts of as many chunks, and as many pictures.
        rollout=replace(base.rollout, chunks=4),
        algorithm=Vine(epochs=2),
        policy=TINY,
        training=replace(
            base.training, batch=64, micro_batch=64, optim=replace(base.training.optim, value_lr=None)
        ),
    )


@recipe
def maniskill_tiny_ppo() -> Run:
    """PPO for the tiny policy on ManiSkill's own PickCube, after a warm-up on its scripted expert."""
    base = put_on_plate_tiny_ppo()
    assert base.sft is not None
    return replace(
        base,
        name="maniskill_tiny_ppo",
        env=ManiSkillConfig(tasks="PickCube-v1", image_size=64, horizon=48, reward="shaped"),
        policy=replace(base.policy, pointers=0),
        rollout=replace(base.rollout, chunks=6),
        # These tasks do not say where things are: a policy finds it out from the demonstrations alone.
        sft=replace(
            base.sft,
            episodes=150,
            steps=1500,
            grounding=0,
            grounding_steps=0,
            freeze=(),
            optim=replace(base.sft.optim, muon_lr=None),
        ),
        training=replace(base.training, freeze=()),
        evaluation=replace(base.evaluation, variant_episodes=0),
    )
