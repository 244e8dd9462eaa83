"""The built-in suite on a laptop: a tiny VLA, warmed up by SFT, then trained by RL."""

from dataclasses import replace

from rove.config.schema import (
    GRPO,
    PPO,
    EvaluationConfig,
    LlamaConfig,
    OptimConfig,
    PolicyConfig,
    RolloutConfig,
    Run,
    SFTConfig,
    TabletopConfig,
    TowerConfig,
    TrainingConfig,
    ValueHeadConfig,
)
from rove.recipes import recipe

TINY = PolicyConfig(
    towers=(TowerConfig(width=64, depth=3, heads=2, mlp=256),),
    llama=LlamaConfig(width=64, depth=2, heads=2, mlp=128),
    film=True,
    proprio=True,
    pointers=3,
    placeholders="learned",
)
"""A third of a million weights: 300 training and 650 acting chunks a second on one 2.5 GHz core."""


@recipe
def tabletop_grpo() -> Run:
    """GRPO on eight tasks of all four families, no critic."""
    return Run(
        name="tabletop_grpo",
        algorithm=GRPO(group_size=16, ratio_level="action"),
        env=TabletopConfig(tasks="demo"),
        policy=TINY,
        rollout=RolloutConfig(num_envs=128),
        # A policy from scratch first has to see: it learns to point at what a sentence names, then to act.
        sft=SFTConfig(
            episodes=3000,
            noise=0.3,
            steps=1200,
            batch=64,
            micro_batch=64,
            grounding=6000,
            grounding_steps=400,
            optim=OptimConfig(lr=2e-3, warmup=50, schedule="cosine", weight_decay=0.01),
        ),
        training=TrainingConfig(
            iterations=120,
            batch=128,
            micro_batch=64,
            # Adam's first steps are as long as the rate, whatever the gradient: 1e-3 undoes the warm-up.
            optim=OptimConfig(lr=1e-4, betas=(0.9, 0.99), warmup=20),
            max_minutes=8,
        ),
        evaluation=EvaluationConfig(every=20, episodes=256),
    )


@recipe
def tabletop_ppo() -> Run:
    """PPO on the same eight tasks: an action-level critic, slots refilled as episodes end."""
    base = tabletop_grpo()
    return replace(
        base,
        name="tabletop_ppo",
        algorithm=PPO(epochs=2),
        policy=replace(base.policy, value_head=ValueHeadConfig()),
    )


@recipe
def tabletop_all() -> Run:
    """GRPO on every training task; takes as long as it takes."""
    return replace(tabletop_grpo(), name="tabletop_all", env=TabletopConfig(tasks="train"))


@recipe
def demo() -> Run:
    """What `make demo` runs: tabletop_grpo, sized for two cores and a few minutes."""
    return replace(tabletop_grpo(), name="demo")
