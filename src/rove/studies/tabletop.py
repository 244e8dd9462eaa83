"""What RLinf-VLA (Yu et al. 2025) found of RL algorithms, asked again on the built-in suite.

All runs of a seed begin with one policy, warmed up once for all of these studies, and each is judged by the
same 512 held-out episodes. The paper's experiments are of OpenVLA (7B) in ManiSkill and LIBERO: what differs
here may differ for that reason, too.
"""

from rove.studies import Arm, Pair, Study, study

WARM_UP = Arm(
    "tabletop_vine", "--sft.episodes 660 --sft.steps 200 --sft.grounding_steps 1000 --sft.optim.muon_lr 0.02"
)
"""The tiny policy of the demo, without a critic, with half of its demonstrations and of its pointing and a
third of its steps: more is left to learn."""
STEPS = 250_000
"""Budget of a run, in simulated actions. What studies have in common is run once for all of them."""
JUDGED = (
    "--evaluation.every 0 --evaluation.episodes 512 --evaluation.variant_episodes 0 "
    "--logging.tensorboard false --logging.keep 1"
)
SHAPED = "--env.reward shaped"


@study
def value_level() -> Study:
    """PPO: a value for each action, or for each chunk."""
    chunk = "--policy.value_head.level chunk --algorithm.advantage_level chunk"
    return Study(
        claim="RLinf-VLA: values of actions beat values of chunks.",
        expected="The same, but by little: an episode is four chunks, so a chunk's value says much already.",
        arms={
            "action": Arm("tabletop_ppo"),
            # Discounts are per chunk there: 0.9 an action is 0.43 for eight.
            "chunk, same horizon": Arm(
                "tabletop_ppo", f"{chunk} --algorithm.gamma 0.43 --algorithm.lam 0.43"
            ),
            "chunk, same discount": Arm("tabletop_ppo", chunk),
        },
        pairs=(
            Pair("action", "chunk, same horizon", "higher"),
            Pair("action", "chunk, same discount", "higher"),
        ),
        steps=STEPS,
        hours=0.7,
        settings=JUDGED,
        warm_up=WARM_UP,
    )


@study
def partial_reset() -> Study:
    """PPO: begin the next episode when one ends, or when all have ended."""
    return Study(
        claim="RLinf-VLA: resetting each environment as its episode ends is markedly more sample-efficient.",
        expected=(
            "No difference for the same number of simulated actions: a slot that waits is not simulated, so "
            "that waiting wastes no sample, only parallel width."
        ),
        arms={
            "partial reset": Arm("tabletop_ppo"),
            "waiting for all": Arm("tabletop_ppo", "--algorithm.refill false"),
        },
        pairs=(Pair("partial reset", "waiting for all", "higher"),),
        steps=STEPS,
        hours=0.5,
        settings=JUDGED,
        warm_up=WARM_UP,
    )


@study
def length_normalization() -> Study:
    """GRPO: every episode counts alike, or every action."""
    return Study(
        claim="RLinf-VLA: normalising by an episode's length helps to keep GRPO stable.",
        expected="Little: lengths differ by a factor of three at most before the horizon of 32 actions.",
        arms={
            "normalised": Arm("tabletop_grpo"),
            "not normalised": Arm("tabletop_grpo", "--algorithm.length_normalization false"),
        },
        pairs=(Pair("normalised", "not normalised", "higher"),),
        steps=STEPS,
        hours=0.5,
        settings=JUDGED,
        warm_up=WARM_UP,
    )


@study
def valid_action_mask() -> Study:
    """GRPO: train on executed actions only, or on the rest of an episode's last chunk, too."""
    return Study(
        claim="RLinf-VLA: masking actions after the end of an episode helps to keep GRPO stable.",
        expected=(
            "Little: what is not executed is at most seven actions of an episode here, where the paper's "
            "environments act on until the horizon."
        ),
        arms={
            "masked": Arm("tabletop_grpo"),
            "not masked": Arm("tabletop_grpo", "--algorithm.valid_action_mask false"),
        },
        pairs=(Pair("masked", "not masked", "higher"),),
        steps=STEPS,
        hours=0.5,
        settings=JUDGED,
        warm_up=WARM_UP,
    )


@study
def group_filter() -> Study:
    """GRPO: which groups are trained on, and whether those left out are replaced."""
    filtered = "--algorithm.keep_low 0.1 --algorithm.keep_high 0.9"
    return Study(
        claim="RLinf-VLA: keeping groups of middling success speeds GRPO up.",
        expected=(
            "A filter alone changes little, since groups without a difference have no gradient; replacing "
            "them makes steps less noisy, and fewer for the same number of actions."
        ),
        arms={
            "all groups": Arm("tabletop_grpo", "--algorithm.keep_uniform true"),
            "groups that differ": Arm("tabletop_grpo"),
            "10 to 90 %": Arm("tabletop_grpo", filtered),
            "10 to 90 %, replaced": Arm("tabletop_grpo", f"{filtered} --algorithm.max_rounds 4"),
        },
        pairs=(
            Pair("groups that differ", "all groups"),
            Pair("10 to 90 %", "all groups", "higher"),
            Pair("10 to 90 %, replaced", "10 to 90 %"),
        ),
        steps=STEPS,
        hours=0.9,
        settings=JUDGED,
        warm_up=WARM_UP,
    )


@study
def rollout_size() -> Study:
    """PPO: many small rollouts or few large ones."""
    return Study(
        claim="RLinf-VLA: larger rollout batches help.",
        expected=(
            "The middle one: a small rollout has few tasks in it, a large one is trained on with a policy "
            "that has moved away from the one that acted."
        ),
        arms={
            "32 environments": Arm("tabletop_ppo", "--rollout.num_envs 32"),
            "128 environments": Arm("tabletop_ppo"),
            "512 environments": Arm("tabletop_ppo", "--rollout.num_envs 512"),
        },
        pairs=(
            Pair("128 environments", "32 environments", "higher"),
            Pair("512 environments", "128 environments", "higher"),
        ),
        steps=STEPS,
        hours=0.7,
        settings=JUDGED,
        warm_up=WARM_UP,
    )


PPO_AND_GRPO = {"PPO": Arm("tabletop_ppo"), "GRPO": Arm("tabletop_grpo")}


@study
def ppo_grpo() -> Study:
    """PPO against GRPO, for the same number of simulated actions."""
    return Study(
        claim="RLinf-VLA: in ManiSkill PPO is consistently better than GRPO, and steadier.",
        expected="PPO ends higher: a critic says which chunk was good, a group only which episode.",
        arms=PPO_AND_GRPO,
        pairs=(Pair("PPO", "GRPO", "higher"),),
        steps=STEPS,
        hours=0.5,
        settings=f"{JUDGED} {SHAPED}",
        warm_up=WARM_UP,
    )


@study
def ppo_grpo_time() -> Study:
    """PPO against GRPO, for the same time."""
    return Study(
        claim="RLinf-VLA: in ManiSkill PPO is consistently better than GRPO, and steadier.",
        expected="PPO ends higher, by less than for the same actions: GRPO has no values to compute.",
        arms=PPO_AND_GRPO,
        pairs=(Pair("PPO", "GRPO", "higher"),),
        minutes=4.0,
        hours=0.5,
        settings=f"{JUDGED} {SHAPED}",
        warm_up=WARM_UP,
    )


@study
def lora() -> Study:
    """PPO: adapters of two ranks and rates against full fine-tuning."""
    return Study(
        claim="RLinf-VLA trains adapters at 5 to 10 times the rate of all weights (1e-4; 1e-5 to 2e-5).",
        expected=(
            "Adapters need the higher rate; whether they then reach full fine-tuning is open for a model of "
            "756 thousand weights."
        ),
        arms={
            "all weights, 2e-4": Arm("tabletop_ppo"),
            "LoRA 32, 2e-4": Arm("tabletop_ppo", "--policy.lora.rank 32"),
            "LoRA 32, 1e-3": Arm("tabletop_ppo", "--policy.lora.rank 32 --training.optim.lr 1e-3"),
            "LoRA 8, 1e-3": Arm("tabletop_ppo", "--policy.lora.rank 8 --training.optim.lr 1e-3"),
        },
        pairs=(
            Pair("LoRA 32, 1e-3", "LoRA 32, 2e-4", "higher"),
            Pair("all weights, 2e-4", "LoRA 32, 1e-3"),
            Pair("LoRA 32, 1e-3", "LoRA 8, 1e-3"),
        ),
        steps=STEPS,
        hours=0.9,
        settings=JUDGED,
        warm_up=WARM_UP,
    )


@study
def vine_tries() -> Study:
    """Vine sampling with 2, 4, 8 and 16 tries against PPO and GRPO, for the same simulated actions."""
    # A rate that falls would fall over iterations, of which each number of tries has others.
    tries = {
        f"{n} tries": Arm("tabletop_vine", f"--algorithm.branches {n} --training.optim.schedule constant")
        for n in (2, 4, 8, 16)
    }
    return Study(
        claim="None: the paper has no vine sampling.",
        expected=(
            "Vine sampling ends higher than both, also where each try counts as simulated; most with few "
            "tries, of which there are more iterations."
        ),
        arms={**PPO_AND_GRPO, **tries},
        pairs=(
            Pair("8 tries", "PPO"),
            Pair("8 tries", "GRPO"),
            Pair("8 tries", "2 tries"),
            Pair("8 tries", "4 tries"),
            Pair("8 tries", "16 tries"),
        ),
        steps=STEPS,
        hours=0.8,
        settings=f"{JUDGED} {SHAPED}",
        warm_up=WARM_UP,
    )


@study
def staleness() -> Study:
    """PPO: rollouts by weights none, one and two versions old, with and without the correction."""
    return Study(
        claim="RLinf: asynchronous PPO with a corrected objective ends as high as synchronous, or nearly.",
        expected="One version costs nothing that can be seen; two without the correction may.",
        arms={
            "0": Arm("tabletop_ppo"),
            "1": Arm("tabletop_ppo", "--placement.ahead 1"),
            "1, uncorrected": Arm("tabletop_ppo", "--placement.ahead 1 --algorithm.decoupled false"),
            "2": Arm("tabletop_ppo", "--placement.ahead 2"),
            "2, uncorrected": Arm("tabletop_ppo", "--placement.ahead 2 --algorithm.decoupled false"),
        },
        pairs=(
            Pair("0", "1", "same"),
            Pair("0", "2", "same"),
            Pair("1", "1, uncorrected"),
            Pair("2", "2, uncorrected"),
        ),
        steps=STEPS,
        hours=1.5,
        settings=f"{JUDGED} --placement.map disaggregated",
        warm_up=WARM_UP,
    )
