"""Two of the questions of `tabletop.py` on libero_object, once each: a run takes a quarter of an hour."""

from rove.studies import Arm, Pair, Study, study
from rove.studies.tabletop import ppo_grpo, value_level

WARM_UP = Arm("libero_object_grpo")
JUDGED = "--evaluation.every 0 --logging.tensorboard false --logging.keep 1"


@study
def libero_ppo_grpo() -> Study:
    """PPO against GRPO on libero_object, for the same number of simulated actions."""
    return Study(
        claim=ppo_grpo().claim,
        expected="GRPO ends higher: success is all that is rewarded, and is far away for a critic.",
        arms={"PPO": Arm("libero_object_ppo"), "GRPO": Arm("libero_object_grpo")},
        pairs=(Pair("PPO", "GRPO", "higher"),),
        steps=100_000,
        hours=0.5,
        settings=JUDGED,
        warm_up=WARM_UP,
        seeds=(1,),
    )


@study
def libero_value_level() -> Study:
    """PPO on libero_object: a value for each action, or for each chunk."""
    chunk = "--policy.value_head.level chunk --algorithm.advantage_level chunk"
    return Study(
        claim=value_level().claim,
        expected="No difference that one seed could show.",
        arms={
            "action": Arm("libero_object_ppo"),
            # 0.99 and 0.95 an action are these for eight.
            "chunk": Arm("libero_object_ppo", f"{chunk} --algorithm.gamma 0.923 --algorithm.lam 0.663"),
        },
        pairs=(Pair("action", "chunk", "higher"),),
        steps=100_000,
        hours=0.5,
        settings=JUDGED,
        warm_up=WARM_UP,
        seeds=(1,),
    )
