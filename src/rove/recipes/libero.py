"""LIBERO recipes: a tiny policy on a laptop, and OpenVLA-OFT 7B on GPUs in a published RL setting.

The published setting (SimpleVLA-RL, Li et al. 2025) has groups of eight episodes from one initial state,
success as the only reward, dynamic sampling (groups without a difference are left out and replaced), tokens
weighted by one over their episode's length, asymmetric clipping, and sampling at temperature 1.6.
"""

from dataclasses import replace

from rove.config.schema import (
    GRPO,
    PPO,
    EvaluationConfig,
    LiberoConfig,
    OptimConfig,
    PlacementConfig,
    RolloutConfig,
    Run,
    SFTConfig,
    TrainingConfig,
    ValueHeadConfig,
)
from rove.recipes import recipe
from rove.recipes.openvla import PUBLISHED
from rove.recipes.tabletop import PERCEPTION, TINY

PUBLISHED_GRPO = GRPO(
    group_size=8,
    clip_low=0.2,
    clip_high=0.28,
    keep_low=0.1,
    keep_high=0.9,
    max_rounds=4,
    length_normalization=True,
)
"""GRPO as published, with at most four rollouts to make up for groups that all succeed or all fail."""


@recipe
def libero_object_grpo() -> Run:
    """GRPO on libero_object for a laptop: a tiny policy, 64 pixels, warmed up by scripted experts."""
    return Run(
        name="libero_object_grpo",
        algorithm=replace(PUBLISHED_GRPO, ratio_level="action", max_rounds=1),
        # Each task has its own scene: one that is dropped takes seconds to come back, in every other rollout.
        # Initial states are drawn anew, so that all 50 published ones of a task are left to evaluate on.
        env=LiberoConfig(tasks="object", image_size=64, horizon=160, protocol="generated", scenes=10),
        # Sampled at 1.0: so small a policy is less sure, and 1.3 already costs it a quarter of its successes.
        policy=TINY,
        rollout=RolloutConfig(num_envs=32, chunk=8, chunks=20),
        # A policy from scratch first has to see: it learns to point at what a sentence names, then to act.
        sft=SFTConfig(
            episodes=600,
            smoothing=3.0,
            zero_centred=True,
            color_jitter=0.2,
            steps=1800,
            grounding=6000,
            grounding_steps=2000,
            freeze=PERCEPTION,
            optim=OptimConfig(lr=2e-3, warmup=50, schedule="cosine", weight_decay=0.01),
        ),
        training=TrainingConfig(
            iterations=100,
            batch=128,
            micro_batch=128,
            freeze=PERCEPTION,
            # What the warm-up ends with is sharp: at ten times this rate it is ruined within 70 iterations.
            optim=OptimConfig(lr=2e-5, betas=(0.9, 0.99), warmup=20),
        ),
        evaluation=EvaluationConfig(every=20, episodes=100, variant_episodes=0, num_envs=20),
        placement=PlacementConfig(threads=0),
    )


@recipe
def libero_object_ppo() -> Run:
    """PPO on libero_object for a laptop: slots are refilled as episodes end, a critic in place of groups."""
    base = libero_object_grpo()
    return replace(
        base,
        name="libero_object_ppo",
        algorithm=PPO(gamma=0.99, lam=0.95),
        policy=replace(TINY, value_head=ValueHeadConfig(detach=True)),
        rollout=RolloutConfig(num_envs=32, chunk=8, chunks=8),
        training=replace(base.training, optim=replace(base.training.optim, value_lr=1e-3)),
    )


@recipe
def libero_spatial_grpo() -> Run:
    """GRPO on libero_spatial for a laptop: two bowls that look alike, and words that say which."""
    base = libero_object_grpo()
    assert base.sft is not None
    return replace(
        base,
        name="libero_spatial_grpo",
        env=replace(base.env, tasks="spatial", horizon=240),
        # An edge is held within millimetres, anywhere on the table: that takes the eye at the wrist, to which
        # a pixel is 3 mm, not 2 cm, and more demonstrations.
        policy=replace(base.policy, pointed=2),
        rollout=replace(base.rollout, chunks=30),
        # A bowl has to be put down within 3 cm: pushed further off its way, the expert shows how to correct.
        sft=replace(
            base.sft,
            episodes=1200,
            steps=2400,
            noise=0.8,
            optim=replace(base.sft.optim, muon_lr=0.02),
        ),
    )


@recipe
def libero_goal_grpo() -> Run:
    """GRPO on libero_goal for a laptop: one scene, and ten things to do in it."""
    base = libero_object_grpo()
    assert base.sft is not None
    return replace(
        base,
        name="libero_goal_grpo",
        env=replace(base.env, tasks="goal", horizon=320, scenes=1),
        policy=replace(base.policy, pointed=2),
        rollout=replace(base.rollout, chunks=40),
        sft=replace(base.sft, episodes=1200, steps=2400),
    )


LONG = (
    "KITCHEN_SCENE3_turn_on_the_stove_and_put_the_moka_pot_on_it",
    "KITCHEN_SCENE4_put_the_black_bowl_in_the_bottom_drawer_of_the_cabinet_and_close_it",
    "KITCHEN_SCENE8_put_both_moka_pots_on_the_stove",
    "LIVING_ROOM_SCENE1_put_both_the_alphabet_soup_and_the_cream_cheese_box_in_the_basket",
    "LIVING_ROOM_SCENE2_put_both_the_alphabet_soup_and_the_tomato_sauce_in_the_basket",
    "LIVING_ROOM_SCENE2_put_both_the_cream_cheese_box_and_the_butter_in_the_basket",
    "LIVING_ROOM_SCENE5_put_the_white_mug_on_the_left_plate_and_put_the_yellow_and_white_mug_on_the_right_plate",
    "LIVING_ROOM_SCENE6_put_the_white_mug_on_the_plate_and_put_the_chocolate_pudding_to_the_right_of_the_plate",
    "STUDY_SCENE1_pick_up_the_book_and_place_it_in_the_back_compartment_of_the_caddy",
)
"""Tasks of libero_10 that have an expert: all but the mug in the microwave."""


@recipe
def libero_10_grpo() -> Run:
    """GRPO on nine of libero_10's long tasks for a laptop: all but the one without a scripted expert."""
    base = libero_goal_grpo()
    assert base.sft is not None
    tasks = ",".join(f"10/{task}" for task in LONG)
    return replace(
        base,
        name="libero_10_grpo",
        env=replace(base.env, tasks=tasks, horizon=400, scenes=10),
        rollout=replace(base.rollout, chunks=50),
        sft=replace(
            base.sft,
            episodes=1500,
            steps=4000,
            noise=0.8,
            optim=replace(base.sft.optim, muon_lr=0.02),
        ),
    )


@recipe
def libero_milk() -> Run:
    """One task of libero_object, one camera: warmed up in a minute or two, for `rove demo robot`."""
    base = libero_object_grpo()
    assert base.sft is not None
    return replace(
        base,
        name="libero_milk",
        env=replace(
            base.env,
            tasks="object/pick_up_the_milk_and_place_it_in_the_basket",
            wrist=False,
            protocol="split",
            scenes=1,
        ),
        sft=replace(
            base.sft,
            episodes=30,
            zero_centred=False,
            steps=180,
            grounding=300,
            grounding_steps=200,
        ),
        evaluation=replace(base.evaluation, episodes=10, num_envs=10),
    )


@recipe
def libero_multitask_grpo() -> Run:
    """GRPO on libero_object and libero_spatial at once, 20 tasks: one tiny policy, 64 pixels."""
    base = libero_object_grpo()
    assert base.sft is not None
    return replace(
        base,
        name="libero_multitask_grpo",
        env=replace(base.env, tasks="object,spatial", scenes=11),
        sft=replace(base.sft, episodes=1200, steps=3600, grounding=12000, grounding_steps=4000),
        training=replace(base.training, iterations=200),
        evaluation=replace(base.evaluation, episodes=200),
    )


def _oft(name: str, tasks: str, horizon: int, checkpoint: str) -> Run:
    """Build a recipe for OpenVLA-OFT 7B: discrete tokens, LoRA, a checkpoint warmed up on demonstrations.

    It has one camera, images rendered by OpenGL and all 50 initial states, as in published results.
    """
    return Run(
        name=name,
        algorithm=PUBLISHED_GRPO,
        env=LiberoConfig(
            tasks=tasks,
            image_size=256,
            wrist=False,
            horizon=horizon,
            protocol="published",
            renderer="gl",
            scenes=10,
        ),
        policy=replace(
            PUBLISHED, checkpoint=checkpoint, center_crop=True, decoding="parallel", temperature=1.6
        ),
        rollout=RolloutConfig(num_envs=64, chunk=8, chunks=horizon // 8),
        sft=None,
        training=TrainingConfig(
            iterations=300,
            batch=512,
            micro_batch=16,
            optim=OptimConfig(lr=2e-5),
        ),
        evaluation=EvaluationConfig(every=10, episodes=500, variant_episodes=0),
    )


@recipe
def libero_spatial_oft() -> Run:
    """GRPO on libero_spatial: OpenVLA-OFT 7B from one demonstration a task, LoRA."""
    return _oft("libero_spatial_oft", "spatial", 240, "Haozhan72/Openvla-oft-SFT-libero-spatial-traj1")


@recipe
def libero_object_oft() -> Run:
    """GRPO on libero_object: OpenVLA-OFT 7B from one demonstration a task, LoRA."""
    return _oft("libero_object_oft", "object", 240, "Haozhan72/Openvla-oft-SFT-libero-object-traj1")


@recipe
def libero_goal_oft() -> Run:
    """GRPO on libero_goal: OpenVLA-OFT 7B from one demonstration a task, LoRA."""
    return _oft("libero_goal_oft", "goal", 320, "Haozhan72/Openvla-oft-SFT-libero-goal-traj1")


@recipe
def libero_10_oft() -> Run:
    """GRPO on libero_10, the long tasks: OpenVLA-OFT 7B from one demonstration a task, LoRA."""
    return _oft("libero_10_oft", "10", 512, "Haozhan72/Openvla-oft-SFT-libero10-traj1")


@recipe
def libero_90_oft() -> Run:
    """GRPO on libero_90: OpenVLA-OFT 7B from a checkpoint that was warmed up on all 90 tasks, LoRA."""
    return _oft("libero_90_oft", "90", 512, "RLinf/RLinf-OpenVLAOFT-LIBERO-90-Base-Lora")


@recipe
def libero_130_oft() -> Run:
    """GRPO on all 130 tasks at once: one OpenVLA-OFT 7B, LoRA."""
    run = _oft("libero_130_oft", "130", 512, "RLinf/RLinf-OpenVLAOFT-LIBERO-130-Base-Lora")
    # 16 groups of other tasks in each rollout
    return replace(run, rollout=replace(run.rollout, num_envs=128))
