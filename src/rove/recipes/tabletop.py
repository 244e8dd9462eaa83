"""The built-in suite on a laptop: a tiny VLA, warmed up by SFT, then trained by RL."""

from dataclasses import replace

from rove.config.schema import GRPO, PPO, Run, TabletopConfig, ValueHeadConfig
from rove.recipes import recipe


@recipe
def tabletop_grpo() -> Run:
    """GRPO on eight tasks of all four families, no critic."""
    return Run(name="tabletop_grpo", algorithm=GRPO(), env=TabletopConfig(tasks="demo"))


@recipe
def tabletop_ppo() -> Run:
    """PPO on the same eight tasks: an action-level critic, slots refilled as episodes end."""
    base = tabletop_grpo()
    return replace(
        base,
        name="tabletop_ppo",
        algorithm=PPO(),
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
