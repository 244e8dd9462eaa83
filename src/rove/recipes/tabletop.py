"""Recipes for the built-in suite on a laptop: a tiny VLA, warmed up by SFT, then trained by RL."""

from dataclasses import replace

from rove.config.schema import (
    GRPO,
    PPO,
    EvaluationConfig,
    LlamaConfig,
    OptimConfig,
    PlacementConfig,
    PolicyConfig,
    RolloutConfig,
    Run,
    SFTConfig,
    TabletopConfig,
    TowerConfig,
    TrainingConfig,
    ValueHeadConfig,
    Vine,
)
from rove.recipes import recipe

TINY = PolicyConfig(
    towers=(TowerConfig(width=64, depth=3, heads=2, mlp=256),),
    llama=LlamaConfig(width=128, depth=2, heads=2, mlp=256),
    film=True,
    proprio=True,
    pointers=3,
    placeholders="learned",
)
"""A tiny VLA of about 756 thousand weights."""

PERCEPTION = (
    "vlm.towers",
    "vlm.film",
    "vlm.projector",
    "vlm.pointer.queries",
    "vlm.language_model.embed_tokens",
)
"""Prefixes of perception parameters, frozen after grounding: RL gradients through them are mostly noise."""


@recipe
def tabletop_ppo() -> Run:
    """PPO on eight tasks of all four families: an action-level critic, slots refilled as episodes end."""
    return Run(
        name="tabletop_ppo",
        algorithm=PPO(gamma=0.9, lam=0.9),
        env=TabletopConfig(tasks="demo", reward="shaped"),
        policy=replace(TINY, value_head=ValueHeadConfig(detach=True)),
        # As often as it takes to learn them: stacking is the longest, and the least forgiving.
        rollout=RolloutConfig(num_envs=128, emphasis=("put:2", "push:6", "stack:6")),
        # A policy from scratch first has to see: it learns to point at what a sentence names, then to act.
        sft=SFTConfig(
            episodes=1320,
            emphasis=("put:4", "push:6", "stack:8"),
            noise=0.3,
            slips=0.3,
            smoothing=3.0,
            color_jitter=0.3,
            # Demonstrations cost seconds: fewer are known by heart before all of their worth is learned.
            steps=600,
            batch=64,
            micro_batch=64,
            grounding=12000,
            grounding_steps=2000,
            freeze=PERCEPTION,
            optim=OptimConfig(lr=2e-3, warmup=50, schedule="cosine", weight_decay=0.01),
        ),
        training=TrainingConfig(
            iterations=400,
            batch=128,
            micro_batch=128,
            freeze=PERCEPTION,
            # The gradient of a few hundred chunks is mostly noise, and Adam's steps are as long as the rate
            # whatever it is. At twice this one asynchronous runs end below the others (docs/placement.md).
            optim=OptimConfig(lr=2e-4, value_lr=1e-3, betas=(0.9, 0.99), warmup=20),
            max_minutes=8,
        ),
        evaluation=EvaluationConfig(every=100, episodes=1024),
        placement=PlacementConfig(threads=0),
    )


@recipe
def tabletop_vine() -> Run:
    """Vine sampling on the same eight tasks: four chunks tried from each state, no critic."""
    base = tabletop_ppo()
    return replace(
        base,
        name="tabletop_vine",
        # Four tries take 0.7 of the time of eight; 130 iterations of them ended no lower than 80 of those.
        algorithm=Vine(branches=4, epochs=2),
        policy=TINY,
        rollout=replace(base.rollout, num_envs=64),
        training=replace(
            base.training,
            batch=64,
            micro_batch=64,
            # So much work, however fast the machine is: the result is the recipe's.
            iterations=110,
            max_minutes=None,
            optim=OptimConfig(lr=5e-4, betas=(0.9, 0.99), warmup=20, schedule="linear"),
        ),
        evaluation=replace(base.evaluation, every=55),
    )


@recipe
def tabletop_grpo() -> Run:
    """GRPO on the same eight tasks: no critic, nothing but success."""
    base = tabletop_ppo()
    return replace(
        base,
        name="tabletop_grpo",
        algorithm=GRPO(group_size=16, ratio_level="action"),
        env=replace(base.env, reward="sparse"),
        policy=TINY,
        # Success alone says less of a chunk than a critic does: at PPO's rate the policy falls first.
        training=replace(base.training, optim=replace(base.training.optim, lr=1e-4, value_lr=None)),
    )


@recipe
def tabletop_all() -> Run:
    """PPO on every training task; takes as long as it takes."""
    base = tabletop_ppo()
    assert base.sft is not None
    return replace(
        base,
        name="tabletop_all",
        env=replace(base.env, tasks="train"),
        rollout=replace(base.rollout, emphasis=()),
        sft=replace(base.sft, episodes=3000, emphasis=(), steps=1500, grounding=30000, grounding_steps=4000),
        training=replace(base.training, iterations=2000, max_minutes=None),
    )


@recipe
def demo() -> Run:
    """The recipe of `make demo`: tabletop_vine, sized for two cores and a few minutes."""
    return replace(tabletop_vine(), name="demo")
