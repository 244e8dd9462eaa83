"""Recipes for the published 7B checkpoint: LoRA in bfloat16 on one large GPU, SFT on demonstrations, then RL.

OpenVLA decodes token by token, OpenVLA-OFT a chunk at once; both start from the same weights. For a
checkpoint that already knows the suite, leave the warm-up out and name its data set:

    rove train openvla_oft_grpo --sft none --policy.checkpoint OWNER/NAME --policy.unnorm_key KEY
"""

from dataclasses import replace

from rove.config.schema import (
    GRPO,
    PPO,
    EvaluationConfig,
    LoraConfig,
    OptimConfig,
    PolicyConfig,
    RolloutConfig,
    Run,
    SFTConfig,
    TabletopConfig,
    TrainingConfig,
    ValueHeadConfig,
)
from rove.recipes import recipe

PUBLISHED = PolicyConfig(
    checkpoint="openvla/openvla-7b",
    dtype="bfloat16",
    lora=LoraConfig(rank=32),
    center_crop=False,
    decoding="autoregressive",
)
"""The published OpenVLA 7B: 7.5 billion frozen weights, with adapters beside every linear layer."""

CRITIC = ValueHeadConfig(level="action", source="first", hidden=(512, 128))


@recipe
def openvla_ppo() -> Run:
    """PPO on OpenVLA 7B: one action at a time, decoded token by token, LoRA."""
    return Run(
        name="openvla_ppo",
        algorithm=PPO(gamma=0.99, lam=0.95, ratio_level="action", clip_high=0.2),
        env=TabletopConfig(tasks="demo", image_size=224, reward="shaped"),
        policy=replace(PUBLISHED, value_head=CRITIC),
        rollout=RolloutConfig(num_envs=64, chunk=1, chunks=32),
        sft=SFTConfig(
            episodes=800,
            steps=2000,
            batch=64,
            micro_batch=16,
            optim=OptimConfig(lr=5e-4, warmup=50, schedule="cosine"),
        ),
        training=TrainingConfig(
            iterations=200,
            batch=640,
            # Activations are kept, 46 to 50 GiB in all: computing them again would be half as much work more.
            micro_batch=16,
            optim=OptimConfig(lr=1e-4, value_lr=3e-3, clip_grad=10.0),
        ),
        evaluation=EvaluationConfig(every=20, episodes=256),
    )


@recipe
def openvla_grpo() -> Run:
    """GRPO on OpenVLA 7B: groups of 8 episodes, nothing but success, LoRA."""
    base = openvla_ppo()
    return replace(
        base,
        name="openvla_grpo",
        algorithm=GRPO(group_size=8, ratio_level="action", clip_high=0.2),
        env=replace(base.env, reward="sparse"),
        policy=PUBLISHED,
        training=replace(base.training, optim=OptimConfig(lr=1e-4)),
    )


@recipe
def openvla_oft_ppo() -> Run:
    """PPO on OpenVLA-OFT 7B with discrete tokens: 8 actions a pass, causal attention, LoRA."""
    base = openvla_ppo()
    return replace(
        base,
        name="openvla_oft_ppo",
        algorithm=PPO(gamma=0.99, lam=0.95),
        policy=replace(base.policy, decoding="parallel", value_head=CRITIC),
        rollout=RolloutConfig(num_envs=64, chunk=8, chunks=8),
        training=replace(base.training, batch=256),
    )


@recipe
def openvla_oft_grpo() -> Run:
    """GRPO on OpenVLA-OFT 7B with discrete tokens: sampled hot, asymmetric clipping, LoRA."""
    base = openvla_oft_ppo()
    return replace(
        base,
        name="openvla_oft_grpo",
        algorithm=GRPO(group_size=8),
        env=replace(base.env, reward="sparse"),
        policy=replace(PUBLISHED, decoding="parallel", temperature=1.6),
        rollout=replace(base.rollout, chunks=4),
        training=replace(base.training, optim=OptimConfig(lr=2e-5)),
    )
