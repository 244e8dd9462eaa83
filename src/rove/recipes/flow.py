"""Recipes for flow-matching VLAs: tiny SmolVLA and π0.5 on a CPU, and the published sizes for LIBERO.

RL draws one stochastic step of Flow-SDE for each chunk and weighs a chunk by one ratio, with a critic on the
VLM's prefix, as πRL (Chen et al. 2025) does for π0 and π0.5; its settings are those of the published sizes.

`libero_object_smolvla_24gb` fits a card of 24 GB. Of the 404 M weights that are computed with, vision tower,
connector and language model, 302.9 M, are frozen in bfloat16: 0.56 GiB. The expert with its projections and
the critic, 101.5 M, stay float32, 0.38 GiB, and have a gradient and Adam's two moments beside them: 1.13 GiB.
A row of a micro-batch keeps 54 MiB for its backward pass: keys and values of the prefix (2 x 64 tokens of
pictures, 21 of text and state, in 16 layers), and one pass of the expert over 51 tokens; 64 rows are 3.4 GiB.
64 environments that act at once take 66 MiB each, 4.1 GiB, by turns with training. Together 6.2 GiB, as `rove
show libero_object_smolvla_24gb` prints: what is left is for larger batches, CUDA's own needs, and the
simulator's pictures.
"""

from dataclasses import replace

from rove.config.schema import (
    GRPO,
    PPO,
    EvaluationConfig,
    FlowPolicyConfig,
    FlowSampling,
    FlowSizes,
    LiberoConfig,
    OptimConfig,
    PolicyConfig,
    RolloutConfig,
    Run,
    SFTConfig,
    TrainingConfig,
    ValueHeadConfig,
    Vine,
)
from rove.recipes import recipe
from rove.recipes.libero import libero_object_grpo
from rove.recipes.tabletop import tabletop_ppo

TINY = FlowSizes(
    vision_width=64,
    vision_layers=3,
    vision_heads=2,
    vision_mlp=256,
    width=128,
    layers=3,
    heads=4,
    kv_heads=2,
    mlp=256,
    expert_width=1.0,
    expert_mlp=256,
)
"""Sizes of a tiny policy of about a million weights, whose picture of 64 pixels becomes 64 tokens."""

# A chain starts from no noise: what a start does to a chunk has no density, and RL learns nothing of it. The
# last step is the stochastic one: gradients of the others' log-probabilities are mostly noise (docs/flow.md).
TINY_SAMPLING = FlowSampling(steps=4, start=0.0, stochastic="last")

SMOLVLA = PolicyConfig(kind="smolvla", pointers=3, flow=FlowPolicyConfig(sampling=TINY_SAMPLING, sizes=TINY))
# The robot's state is not in the prompt, as in openpi's LIBERO: the picture shows the hand.
PI05 = replace(
    SMOLVLA,
    kind="pi05",
    flow=FlowPolicyConfig(sampling=TINY_SAMPLING, prompt="openpi", sizes=TINY),
)

CRITIC = ValueHeadConfig(level="chunk", detach=True)

SMOLVLA_PERCEPTION = ("model.vlm_with_expert.vlm", "pointer")
PI05_PERCEPTION = ("model.paligemma_with_expert.paligemma", "pointer")
"""What has learned to point is frozen afterwards: gradients of actions through it are mostly noise."""

# --- tiny, on a CPU -------------------------------------------------------------------------------


def _tiny(
    base: Run, name: str, policy: PolicyConfig, perception: tuple[str, ...], *, episodes: int, steps: int
) -> Run:
    """Build a PPO recipe for a tiny flow policy from that of another policy, with `episodes` to imitate in
    `steps` of an optimizer."""
    assert base.sft is not None
    return replace(
        base,
        name=name,
        algorithm=PPO(gamma=0.8, lam=0.9, advantage_level="chunk", ratio_level="action", clip_high=0.2),
        policy=replace(policy, value_head=CRITIC),
        # Pictures and words that see each other soon point. The expert knows a few hundred
        # demonstrations by heart before long: there are more, each at several noisy points of one pass.
        sft=replace(
            base.sft,
            episodes=episodes,
            smoothing=0.0,
            steps=steps,
            draws=8,
            grounding=min(base.sft.grounding, 10000),
            grounding_steps=600,
            freeze=perception,
            # By AdamW alone 300 steps end at 27 % where these end at 91, and 1,000 end no higher.
            optim=replace(base.sft.optim, muon_lr=0.02),
        ),
        training=replace(
            base.training,
            freeze=perception,
            optim=OptimConfig(lr=2e-4, value_lr=1e-3, betas=(0.9, 0.99), warmup=20),
        ),
    )


def _grpo(base: Run, name: str) -> Run:
    """Turn a PPO recipe into GRPO: groups of 8, nothing but success."""
    return replace(
        base,
        name=name,
        algorithm=GRPO(group_size=8, ratio_level="action", clip_high=0.2),
        env=replace(base.env, reward="sparse"),
        policy=replace(base.policy, value_head=None),
        rollout=replace(base.rollout, chunks=base.env.horizon // base.rollout.chunk),
        training=replace(
            base.training,
            optim=replace(base.training.optim, lr=base.training.optim.lr / 2, value_lr=None),
        ),
    )


def _vine(base: Run, name: str) -> Run:
    """Turn a PPO recipe into vine sampling: eight chunks tried from each state, which share one prefix."""
    optim = replace(base.training.optim, value_lr=None, schedule="linear")
    return replace(
        base,
        name=name,
        algorithm=Vine(clip_high=0.2, epochs=2),
        env=replace(base.env, reward="shaped"),
        policy=replace(base.policy, value_head=None),
        rollout=replace(base.rollout, num_envs=base.rollout.num_envs // 2),
        training=replace(base.training, optim=optim),
    )


@recipe
def tabletop_smolvla_ppo() -> Run:
    """PPO for a tiny SmolVLA on eight tabletop tasks: Flow-SDE, a critic on the prefix."""
    return _tiny(tabletop_ppo(), "tabletop_smolvla_ppo", SMOLVLA, SMOLVLA_PERCEPTION, episodes=990, steps=300)


@recipe
def tabletop_smolvla_grpo() -> Run:
    """GRPO for a tiny SmolVLA on the same eight tasks: no critic, nothing but success."""
    return _grpo(tabletop_smolvla_ppo(), "tabletop_smolvla_grpo")


@recipe
def tabletop_smolvla_vine() -> Run:
    """Vine sampling for a tiny SmolVLA on the same eight tasks: eight chunks from one prefix."""
    return _vine(tabletop_smolvla_ppo(), "tabletop_smolvla_vine")


@recipe
def tabletop_pi05_ppo() -> Run:
    """PPO for a tiny π0.5 on eight tabletop tasks."""
    return _tiny(tabletop_ppo(), "tabletop_pi05_ppo", PI05, PI05_PERCEPTION, episodes=990, steps=1000)


@recipe
def tabletop_pi05_grpo() -> Run:
    """GRPO for a tiny π0.5 on the same eight tasks."""
    return _grpo(tabletop_pi05_ppo(), "tabletop_pi05_grpo")


@recipe
def tabletop_pi05_vine() -> Run:
    """Vine sampling for a tiny π0.5 on the same eight tasks."""
    return _vine(tabletop_pi05_ppo(), "tabletop_pi05_vine")


def _libero_tiny(name: str, policy: PolicyConfig, perception: tuple[str, ...]) -> Run:
    base = libero_object_grpo()
    assert base.sft is not None
    # No bins that zero could be the centre of.
    base = replace(base, sft=replace(base.sft, zero_centred=False))
    policy = replace(policy, flow=replace(policy.flow, cameras=2)) if policy.flow else policy
    run = _tiny(base, name, policy, perception, episodes=600, steps=1000)
    return replace(
        run,
        rollout=RolloutConfig(num_envs=32, chunk=8, chunks=8),
        # At the tabletop's 2e-4 fourteen iterations of vine sampling brought SmolVLA from 99 % to 31.
        training=replace(run.training, optim=replace(run.training.optim, lr=2e-5)),
    )


@recipe
def libero_object_smolvla_ppo() -> Run:
    """PPO for a tiny SmolVLA on libero_object, on a laptop, after scripted experts."""
    return _libero_tiny("libero_object_smolvla_ppo", SMOLVLA, SMOLVLA_PERCEPTION)


@recipe
def libero_object_smolvla_grpo() -> Run:
    """GRPO for a tiny SmolVLA on libero_object, on a laptop."""
    return _grpo(libero_object_smolvla_ppo(), "libero_object_smolvla_grpo")


@recipe
def libero_object_smolvla_vine() -> Run:
    """Vine sampling for a tiny SmolVLA on libero_object, on a laptop."""
    return _vine(libero_object_smolvla_ppo(), "libero_object_smolvla_vine")


@recipe
def libero_object_pi05_ppo() -> Run:
    """PPO for a tiny π0.5 on libero_object, on a laptop."""
    return _libero_tiny("libero_object_pi05_ppo", PI05, PI05_PERCEPTION)


@recipe
def libero_object_pi05_grpo() -> Run:
    """GRPO for a tiny π0.5 on libero_object, on a laptop."""
    return _grpo(libero_object_pi05_ppo(), "libero_object_pi05_grpo")


@recipe
def libero_object_pi05_vine() -> Run:
    """Vine sampling for a tiny π0.5 on libero_object, on a laptop."""
    return _vine(libero_object_pi05_ppo(), "libero_object_pi05_vine")


# --- published sizes ------------------------------------------------------------------------------


def _published(
    name: str,
    tasks: str,
    horizon: int,
    kind: str,
    checkpoint: str,
    flow: FlowPolicyConfig,
    *,
    chunk: int,
    epochs: int,
) -> Run:
    """Build a PPO recipe for a published checkpoint: both cameras, all 50 initial states, VLM frozen."""
    return Run(
        name=name,
        algorithm=PPO(
            gamma=0.99,
            lam=0.95,
            advantage_level="chunk",
            ratio_level="chunk",
            clip_high=0.2,
            dual_clip=3.0,
            epochs=epochs,
        ),
        env=LiberoConfig(
            tasks=tasks, image_size=256, horizon=horizon, protocol="published", renderer="gl", scenes=10
        ),
        policy=PolicyConfig(
            kind=kind,
            checkpoint=checkpoint,
            dtype="bfloat16",
            value_head=ValueHeadConfig(level="chunk", hidden=(1024, 512, 256)),
            flow=replace(flow, freeze="vlm", cameras=2),
        ),
        rollout=RolloutConfig(num_envs=64, chunk=chunk, chunks=horizon // chunk),
        sft=None,
        training=TrainingConfig(
            iterations=300,
            batch=2048,
            micro_batch=64,
            optim=OptimConfig(lr=5e-6, value_lr=1e-4, weight_decay=0.01),
        ),
        evaluation=EvaluationConfig(every=10, episodes=500, variant_episodes=0),
    )


@recipe
def libero_spatial_smolvla() -> Run:
    """PPO on libero_spatial: SmolVLA as fine-tuned on LIBERO, 450 M."""
    return _smolvla("libero_spatial_smolvla", "spatial", 240)


@recipe
def libero_object_smolvla() -> Run:
    """PPO on libero_object: SmolVLA as fine-tuned on LIBERO, 450 M."""
    return _smolvla("libero_object_smolvla", "object", 240)


@recipe
def libero_goal_smolvla() -> Run:
    """PPO on libero_goal: SmolVLA as fine-tuned on LIBERO, 450 M."""
    return _smolvla("libero_goal_smolvla", "goal", 320)


@recipe
def libero_10_smolvla() -> Run:
    """PPO on libero_10, the long tasks: SmolVLA as fine-tuned on LIBERO, 450 M."""
    return _smolvla("libero_10_smolvla", "10", 480)


def _smolvla(name: str, tasks: str, horizon: int) -> Run:
    flow = FlowPolicyConfig(sampling=FlowSampling(steps=4, level=0.5))
    checkpoint = "HuggingFaceVLA/smolvla_libero"
    return _published(name, tasks, horizon, "smolvla", checkpoint, flow, chunk=10, epochs=4)


@recipe
def libero_object_smolvla_24gb() -> Run:
    """SmolVLA's base, 450 M, on a card of 24 GB: SFT on scripted experts, then PPO, VLM frozen."""
    base = libero_object_smolvla()
    return replace(
        base,
        name="libero_object_smolvla_24gb",
        policy=replace(base.policy, checkpoint="lerobot/smolvla_base"),
        env=LiberoConfig(tasks="object", image_size=256, horizon=240, scenes=10),
        sft=SFTConfig(
            episodes=400,
            steps=20000,
            batch=64,
            micro_batch=64,
            optim=OptimConfig(lr=1e-4, warmup=1000, schedule="cosine", clip_grad=10.0),
        ),
    )


@recipe
def libero_spatial_pi0() -> Run:
    """PPO on libero_spatial: π0 from few demonstrations, VLM frozen."""
    return _pi0("libero_spatial_pi0", "spatial", 240)


@recipe
def libero_object_pi0() -> Run:
    """PPO on libero_object: π0 from few demonstrations, VLM frozen."""
    return _pi0("libero_object_pi0", "object", 240)


@recipe
def libero_goal_pi0() -> Run:
    """PPO on libero_goal: π0 from few demonstrations, VLM frozen."""
    return _pi0("libero_goal_pi0", "goal", 320)


@recipe
def libero_10_pi0() -> Run:
    """PPO on libero_10, the long tasks: π0 from few demonstrations, VLM frozen."""
    return _pi0("libero_10_pi0", "10", 480, long=True)


def _pi0(name: str, tasks: str, horizon: int, *, long: bool = False) -> Run:
    checkpoint = f"RLinf/RLinf-Pi0-LIBERO-{'Long' if long else 'Spatial-Object-Goal'}-SFT"
    flow = FlowPolicyConfig(sampling=FlowSampling(steps=4, level=0.5))
    return _published(name, tasks, horizon, "pi0", checkpoint, flow, chunk=10 if long else 5, epochs=4)


@recipe
def libero_spatial_pi05() -> Run:
    """PPO on libero_spatial: π0.5 from 40 demonstrations, VLM frozen."""
    return _pi05("libero_spatial_pi05", "spatial", 240, FlowSampling(steps=3, level=0.5))


@recipe
def libero_object_pi05() -> Run:
    """PPO on libero_object: π0.5 from 40 demonstrations, VLM frozen."""
    return _pi05("libero_object_pi05", "object", 240, FlowSampling(steps=5, level=0.3))


@recipe
def libero_goal_pi05() -> Run:
    """PPO on libero_goal: π0.5 from 40 demonstrations, VLM frozen."""
    return _pi05("libero_goal_pi05", "goal", 320, FlowSampling(steps=5, level=0.3), epochs=4)


@recipe
def libero_10_pi05() -> Run:
    """PPO on libero_10, the long tasks: π0.5 from 40 demonstrations, VLM frozen."""
    return _pi05("libero_10_pi05", "10", 480, FlowSampling(steps=5, level=0.5), chunk=10, epochs=4)


def _pi05(
    name: str, tasks: str, horizon: int, sampling: FlowSampling, *, chunk: int = 5, epochs: int = 1
) -> Run:
    flow = FlowPolicyConfig(sampling=sampling)
    checkpoint = "RLinf/RLinf-Pi05-LIBERO-SFT"
    return _published(name, tasks, horizon, "pi05", checkpoint, flow, chunk=chunk, epochs=epochs)


@recipe
def libero_10_pi05_full() -> Run:
    """PPO on libero_10 from LeRobot's π0.5, fine-tuned on all of LIBERO's demonstrations."""
    run = libero_10_pi05()
    policy = replace(run.policy, checkpoint="lerobot/pi05_libero_finetuned")
    return replace(run, name="libero_10_pi05_full", policy=policy)
