"""Every setting of a run, once: its type, its default, its unit. Standard library only.

A recipe is a function that returns a full `Run`; a variant is `dataclasses.replace` on it. Tagged unions
(`EnvConfig`, `AlgorithmConfig`) carry their tag in `kind`. Nothing here is changed after loading, and no
other file holds a default. Cross-checks between sections live in `validate.py`; those of an environment's own
settings are its method `problems`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from rove.config.ranges import (
    MOST,
    Actions,
    Cameras,
    Chunk,
    Count,
    Delta,
    Draws,
    Fraction,
    Layers,
    LearningRate,
    Level,
    Nodes,
    NonNegativeFloat,
    NonNegativeInt,
    Pieces,
    Pixels,
    PositiveFloat,
    PositiveInt,
    Ratio,
    Seed,
    Size,
    Slots,
    SomePieces,
    Steps,
    Temperature,
    above,
    at_least,
)

# --- environments -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TabletopConfig:
    """The built-in suite: `envs/tabletop`."""

    kind: Literal["tabletop"] = "tabletop"
    tasks: str = "demo"
    """A named set ("demo", "train", "unseen") or task ids separated by commas."""
    image_size: Pixels = 64
    """Pixels, height and width."""
    horizon: Actions = 32
    """Actions before an episode is truncated."""
    reward: Literal["sparse", "shaped"] = "sparse"
    render: Literal["cpu", "cuda"] = "cpu"
    """Device that renders images. Physics is always on the CPU."""
    threads: Count = 0
    """Physics threads; 0 uses every core."""


@dataclass(frozen=True, slots=True)
class LiberoConfig:
    """LIBERO: `envs/libero`."""

    kind: Literal["libero"] = "libero"
    tasks: str = "spatial"
    """A suite ("spatial", "object", "goal", "10", "90", "130", or a perturbed one of LIBERO-PRO such as
    "goal_swap"), or suites and task ids separated by commas."""
    image_size: Pixels = 128
    """Pixels, height and width; published checkpoints see 256."""
    wrist: bool = True
    """Also give the picture of the camera in the hand."""
    horizon: Actions = 240
    """Actions before an episode is truncated. Published: 240 in spatial and object, 320 in goal, 512 in 10,
    90 and 130."""
    wait: NonNegativeInt = 15
    """Actions that pass, doing nothing, before an episode begins, while things settle."""
    protocol: Literal["split", "published", "generated", "generated_wide"] = "split"
    """"split" trains on 40 of a task's 50 initial states and keeps 10 to evaluate on; "published" does both
    on all 50, as published numbers were obtained; "generated" trains on states that are drawn anew, as those
    were, and keeps all 50 to evaluate on; "generated_wide" likewise, but with things anywhere in reach, never
    where LIBERO-PRO shifts them to, and the arm's start varied (not in spatial, whose instructions name
    places)."""
    reward: Literal["sparse", "shaped"] = "sparse"
    """"sparse": 1 on success. "shaped": besides, what an action takes off the way that the hand still has to
    go, in units of 1.5 m. It is read off where everything is, which no robot knows: for training only."""
    renderer: Literal["warp", "gl", "none"] = "warp"
    """Renderer: a rasteriser on Warp, without OpenGL; OpenGL, the way the pictures of published checkpoints
    were made; or black pictures, for who looks at states only."""
    render: Literal["cpu", "cuda"] = "cpu"
    """Device on which "warp" renders; "gl" takes a GPU where there is one. Physics is always on the CPU."""
    phase: Literal["stock", "end"] = "stock"
    """Observe two substeps of 2 ms before an action's end, as the stock environment does, or at its end."""
    scenes: Size = 4
    """Scenes that stay in memory, about 0.1 GB each, though no episode is running in them."""
    threads: Count = 0
    """Physics and rendering threads; 0 uses every core."""

    def problems(self) -> Iterator[str]:
        """Find settings that contradict each other: a sentence each, with the fix."""
        if self.render == "cuda" and self.renderer != "warp":
            yield (
                f"env.render = 'cuda' is read by the renderer 'warp', but env.renderer = {self.renderer!r}: "
                "set --env.render cpu, or --env.renderer warp."
            )


@dataclass(frozen=True, slots=True)
class ManiSkillConfig:
    """ManiSkill's own tasks: `envs/maniskill`."""

    kind: Literal["maniskill"] = "maniskill"
    tasks: str = "PickCube-v1"
    """Task ids separated by commas; on a GPU one."""
    image_size: Pixels = 128
    """Pixels, height and width."""
    horizon: Actions = 48
    """Actions before an episode is truncated."""
    reward: Literal["sparse", "shaped"] = "sparse"
    """"sparse": 1 on success. "shaped": besides, the change of the task's own normalised dense reward."""
    control_mode: str = "pd_ee_delta_pose"
    """Control mode of the robot, by ManiSkill's name."""
    cameras: tuple[str, ...] = ()
    """Names of the task's cameras, in the order of the pictures; empty: all of them."""
    backend: Literal["auto", "physx_cpu", "physx_cuda"] = "auto"
    """Simulation backend. "auto" is `physx_cpu`, also where there is a GPU: `physx_cuda` has never been
    run."""
    render: Literal["auto", "cpu", "cuda"] = "auto"
    """Device that renders images; "auto" is the GPU where there is one, whatever simulates."""
    workers: Count = 0
    """Processes that share the slots of a `physx_cpu` simulation; 0: one a core; 1: none but this one."""

    def problems(self) -> Iterator[str]:
        """Find settings that contradict each other: a sentence each, with the fix."""
        if self.backend == "physx_cuda":
            yield from _one_simulation(self.workers)
            if "," in self.tasks:
                yield (
                    f"env.tasks = {self.tasks!r}: env.backend = 'physx_cuda' simulates one task: name one, "
                    "or set --env.backend physx_cpu."
                )


@dataclass(frozen=True, slots=True)
class PutOnPlateConfig:
    """The 25-object put-on-plate benchmark: `envs/maniskill/put_on_plate`."""

    kind: Literal["maniskill_put_on_plate"] = "maniskill_put_on_plate"
    tasks: str = "PutOnPlateInScene25Main-v3"
    """Ids of published environments separated by commas, each with ":test" or ":all" for another split than
    "train"."""
    objects: tuple[NonNegativeInt, ...] = ()
    """Numbers of the source objects to use; empty: all of the split."""
    tables: tuple[NonNegativeInt, ...] = ()
    """Numbers of the tables to use; empty: all of the split."""
    image_size: Pixels = 224
    """Pixels, height and width, of the picture, which has the published camera's view squashed."""
    full_frame: bool = False
    """Render 480 × 640 as published, and leave the squashing to the policy."""
    horizon: Actions = 80
    """Actions before an episode is truncated."""
    reward: Literal["sparse", "shaped", "dense"] = "shaped"
    """"shaped": change of the published potential, at best 1.2 in all: a grasp 0.1, held 0.1, success 1.
    "sparse": of success alone. "dense": of success and of the way that the hand and the object have left."""
    terminate: bool = True
    """End an episode at its first success. Off, it goes on to its horizon, and both are reported: success at
    any time, and at the end."""
    settle: bool = False
    """Let things come to rest before an episode, as RL4VLA does; RLinf does not."""
    sim_freq: Annotated[int, at_least(5, 100_000)] = 500
    """Physics steps a second, a multiple of the 5 actions; fewer is faster, and another simulation."""
    backend: Literal["auto", "physx_cpu", "physx_cuda"] = "auto"
    """Simulation backend. "auto" is `physx_cpu`, also where there is a GPU: `physx_cuda` has never been
    run."""
    render: Literal["auto", "cpu", "cuda"] = "auto"
    """Device that renders images; "auto" is the GPU where there is one, whatever simulates."""
    workers: Count = 0
    """Processes that share the slots of a `physx_cpu` simulation; 0: one a core; 1: none but this one."""

    def problems(self) -> Iterator[str]:
        """Find settings that contradict each other: a sentence each, with the fix."""
        if self.backend == "physx_cuda":
            yield from _one_simulation(self.workers)
            if self.settle:
                yield (
                    "env.settle = true cannot reset one world of a shared simulation: set --env.settle "
                    "false, or --env.backend physx_cpu."
                )


def _one_simulation(workers: int) -> Iterator[str]:
    if workers:
        yield (
            f"env.workers = {workers}, but env.backend = 'physx_cuda' holds all slots in one simulation: "
            "set --env.workers 0, or --env.backend physx_cpu."
        )


EnvConfig = TabletopConfig | LiberoConfig | ManiSkillConfig | PutOnPlateConfig

# --- policy -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TowerConfig:
    """One vision tower, a `transformers` vision transformer whose last block is never computed."""

    kind: Literal["dinov2", "siglip"] = "siglip"
    width: Size = 128
    depth: Layers = 3
    heads: Size = 4
    patch: Pixels = 8
    """Pixels along an edge of a patch."""
    mlp: Size = 512


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """The language model, a `transformers` Llama."""

    width: Size = 128
    depth: Layers = 3
    heads: Size = 4
    mlp: Size = 384


@dataclass(frozen=True, slots=True)
class ValueHeadConfig:
    """The critic: a small MLP on the language model's hidden states."""

    level: Literal["action", "chunk"] = "action"
    """One value per action, [B, C], or one per chunk, [B, 1]."""
    source: Literal["first", "mean"] = "mean"
    """Hidden state of the position that predicts the first action token, or the mean of action positions. In
    a flow policy, whose critic reads what is before the actions: of its last token, which in SmolVLA is the
    robot's state, or the mean of all."""
    hidden: tuple[Size, ...] = (256,)
    detach: bool = False
    """Keep the critic's gradient out of the language model."""


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021): the weights themselves stay as they are."""

    rank: Size = 32
    alpha: PositiveFloat | None = None
    """The adapter's output is scaled by alpha / rank; None: by 1."""
    targets: tuple[str, ...] = ("all-linear",)
    """Linear layers that get adapters: parts of their names ("towers", "q_proj"), or "all-linear"."""


@dataclass(frozen=True, slots=True)
class FlowSampling:
    """How a flow-matching policy draws actions: the steps of its chain, and their noise."""

    steps: Steps = 4
    """Denoising steps, K."""
    sampler: Literal["flow_sde", "flow_cps", "flow_noise"] = "flow_sde"
    """Flow-SDE, Flow-CPS, or Flow-Noise, whose deviation is a small network's and is trained too."""
    level: Level = 0.5
    """Noise level a of Flow-SDE and Flow-CPS."""
    start: Fraction = 1.0
    """Standard deviation of the noise that a chain starts from, 0 to 1. The flow is learned from 1, and
    published policies are evaluated so; with less, chunks lie closer to the flow's middle, and with 0 all
    that they differ by is drawn on the way and has a density."""
    stochastic: Literal["one", "last", "all"] = "one"
    """"one": a single step, drawn for each chunk, so that training needs one pass of the expert; the others
    follow the flow. "last": the last that has noise, always: it has the least, so that its log-probability
    says most about a chunk. "all": every step, as Flow-Noise always has it; training needs K passes."""
    low: PositiveFloat = 0.08
    high: PositiveFloat = 0.16
    """Bounds of Flow-Noise's standard deviation."""
    hidden: tuple[Size, ...] = (128, 64)
    """Widths of the hidden layers of Flow-Noise's network."""

    @property
    def joint(self) -> bool:
        """True where every step is stochastic."""
        return self.stochastic == "all" or self.sampler == "flow_noise"

    @property
    def choices(self) -> range:
        """Numbers of the steps that may be the stochastic one."""
        noisy = self.steps - 1 if self.sampler == "flow_cps" else self.steps
        return range(noisy - 1 if self.stochastic == "last" else 0, noisy)

    @property
    def points(self) -> int:
        """Number of points of the chain that a sample holds, S."""
        return self.steps + 1 if self.joint else 2

    def problems(self) -> Iterator[str]:
        """Find settings that contradict each other: a sentence each, with the fix."""
        if self.sampler == "flow_cps" and self.steps < 2:
            yield "flow_cps has no noise in its last step: set --policy.flow.sampling.steps to 2 or more."
        if self.sampler == "flow_cps" and self.stochastic == "all":
            yield (
                "flow_cps has no density in its last step: draw one step "
                "(--policy.flow.sampling.stochastic one)."
            )
        if self.low >= self.high:
            yield (
                f"The deviation of flow_noise is to lie between low = {self.low} and high = {self.high}: set "
                "--policy.flow.sampling.low below high."
            )


@dataclass(frozen=True, slots=True)
class FlowSizes:
    """Sizes of a flow-matching policy from scratch."""

    vision_width: Size = 64
    vision_layers: Layers = 3
    vision_heads: Size = 2
    vision_mlp: Size = 256
    patch: Pixels = 8
    """Pixels along an edge of a patch."""
    shuffle: Size = 1
    """SmolVLA: edge of a square of patches that become one token."""
    width: Size = 128
    layers: Layers = 3
    heads: Size = 4
    kv_heads: Size = 2
    """Heads of keys and values; π has one."""
    mlp: Size = 256
    expert_width: PositiveFloat = 0.75
    """Width of the expert, as a part of the language model's."""
    expert_mlp: Size = 256
    """π: width of the expert's MLP; SmolVLA's follows from its width."""
    max_dim: Size = 32
    """Size to which states and actions are padded, D."""


@dataclass(frozen=True, slots=True)
class FlowPolicyConfig:
    """What flow-matching policies (`policies/flow`: SmolVLA, π0, π0.5) have of their own.

    Settings that may be None are then those of the checkpoint, or of the layout that it is published in.
    """

    sampling: FlowSampling = FlowSampling()
    horizon: Chunk | None = None
    """H, actions predicted at once, of which `rollout.chunk` are executed; None, from scratch: as many."""
    freeze: Literal["none", "vision", "vlm"] | None = None
    """What neither demonstrations nor RL train: nothing, the vision tower, or all that the prefix is made by
    (the VLM, and in SmolVLA the projection of the state). None, from scratch: nothing."""
    cameras: Cameras | None = None
    """Pictures that are read; None, from scratch: one."""
    resizer: Literal["smolvla", "lerobot", "openpi"] | None = None
    """How pictures are resized; see `rove.policies.flow.images`."""
    prompt: Literal["newline", "openpi", "state", "padded_state"] | None = None
    """Format of the prompt; see `rove.policies.flow.prompts`."""
    delta: Delta | None = None
    """First numbers of the state that actions are relative to, as in openpi's π0 for LIBERO; 0: none."""
    sizes: FlowSizes = FlowSizes()


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """A policy: a Prismatic VLA (`policies/openvla`) or a flow-matching one (`policies/flow`)."""

    kind: str = "openvla"
    """A name in `policies/registry.py`: openvla, smolvla, pi0 or pi05."""
    checkpoint: str | None = None
    """A checkpoint directory, or a name on the Hugging Face hub ("openvla/openvla-7b"). Set, it decides the
    architecture; the sizes below are then not read."""
    unnorm_key: str | None = None
    """The data set whose statistics un-normalise a checkpoint's actions; None: the one saved with it, or the
    only one."""
    center_crop: bool | None = None
    """Cut the centre out of every picture, as after random crops; None: as the checkpoint says."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of a checkpoint's weights in memory. Adapters and critic are always float32."""
    lora: LoraConfig | None = None
    """Train adapters beside a checkpoint's weights; None: the weights. A warm-up from scratch trains all."""
    compile: bool = False
    """Run blocks through torch.compile and, on a GPU, rollouts through CUDA graphs. Starts slowly."""
    head: Literal["discrete", "l1"] = "discrete"
    """The head that turns hidden states into actions: 256 tokens a dimension, or OpenVLA-OFT's regression
    head, which is deterministic and so serves inference and SFT only."""
    decoding: Literal["parallel", "autoregressive"] = "parallel"
    attention: Literal["causal", "bidirectional"] = "causal"
    towers: tuple[TowerConfig, ...] = (TowerConfig(),)
    llama: LlamaConfig = LlamaConfig()
    film: bool = False
    """Scale and shift the vision towers' features by the instruction (FiLM, as in OpenVLA-OFT+)."""
    proprio: bool = False
    """Also read the robot's own state (OpenVLA-OFT's proprio projector)."""
    pointers: Count = 0
    """Points in a picture that the policy picks out and reads as tokens before it acts, as a policy from
    scratch learns to do by `sft.grounding`; 0: none."""
    pointed: PositiveInt = 1
    """Pictures, the first and those after it, in which it picks them out: 2 where the second is a camera at
    the wrist, which shows what is about to be held from near by."""
    placeholders: Literal["zero", "learned"] = "zero"
    """Embeddings of the action positions in parallel decoding. Published checkpoints zero them; a small model
    trained from scratch tells the positions apart much sooner when it may learn them."""
    value_head: ValueHeadConfig | None = None
    temperature: Temperature = 1.0
    """Sampling temperature; log-probabilities are taken under it too."""
    flow: FlowPolicyConfig | None = None
    """Settings of flow-matching policies, which read those of decoding, sizes and heads above not."""


# --- algorithms ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PPO:
    """Proximal policy optimisation with a critic, slots refilled as episodes end (partial reset)."""

    kind: Literal["ppo"] = "ppo"
    critic: ClassVar[bool] = True
    gamma: Fraction = 0.99
    """Discount per action, or per chunk with `advantage_level="chunk"`."""
    lam: Fraction = 0.95
    advantage_level: Literal["action", "chunk"] = "action"
    ratio_level: Literal["token", "action", "chunk"] = "token"
    clip_low: PositiveFloat = 0.2
    clip_high: Ratio = 0.28
    dual_clip: Ratio | None = None
    value_clip: PositiveFloat = 0.2
    huber_delta: PositiveFloat = 10.0
    value_coef: NonNegativeFloat = 1.0
    entropy_coef: NonNegativeFloat = 0.0
    max_behavior_weight: Ratio = 2.0
    """Asynchronous mode: cap on the ratio of the learner's policy to the older one that acted, by which a
    sample counts."""
    decoupled: bool = True
    """Asynchronous mode: updates stay close to the policy as it is when they begin, and samples are weighted
    as `max_behavior_weight` says. Off, they stay close to the older policy that acted, unweighted: the
    objective without a correction, to compare with."""
    refill: bool = True
    """Begin a slot's next episode as soon as one ends (partial reset). Off, slots whose episode has ended
    idle until all begin anew with the next rollout, to compare with; that needs T·C = horizon."""
    bootstrap: Literal["truncated", "always"] = "truncated"
    """"always" adds the discounted value after every end, success included: published ManiSkill setting."""
    normalize_advantage: bool = True
    critic_warmup: NonNegativeInt = 0
    """Iterations in which only the value head is trained."""
    epochs: PositiveInt = 1
    """Passes over the batch an iteration."""


@dataclass(frozen=True, slots=True)
class GRPO:
    """Group-relative policy optimisation: groups of episodes from one task and initial state, no critic."""

    kind: Literal["grpo"] = "grpo"
    group_size: Slots = 8
    """G, episodes that share a task and an initial state."""
    ratio_level: Literal["token", "action", "chunk"] = "token"
    clip_low: PositiveFloat = 0.2
    clip_high: Ratio = 0.28
    dual_clip: Ratio | None = None
    keep_low: Fraction = 0.0
    keep_high: Fraction = 1.0
    """A group is kept when its success rate is inside [keep_low, keep_high] and not uniform."""
    keep_uniform: bool = False
    """Train on groups whose episodes all score alike, too: their advantage is zero, so that they cost time
    and teach nothing. No filter at all, to compare with."""
    max_rounds: PositiveInt = 1
    """Rollout rounds an iteration may take to fill the batch with kept groups (dynamic sampling); 1: off."""
    max_behavior_weight: Ratio = 2.0
    """Asynchronous mode: cap on the ratio of the learner's policy to the older one that acted, by which a
    sample counts."""
    decoupled: bool = True
    """As in `PPO`."""
    length_normalization: bool = True
    valid_action_mask: bool = True
    """Train on executed actions only. Off, the rest of the chunk in which an episode ended, drawn but never
    executed, counts like what was: to compare with."""
    kl_coef: NonNegativeFloat = 0.0
    """Weight of KL(policy ‖ the policy that the run started from)."""
    entropy_coef: NonNegativeFloat = 0.0
    epochs: PositiveInt = 1


@dataclass(frozen=True, slots=True)
class Vine:
    """Several chunks tried from each state, one of them carried on (vine sampling); no critic.

    For environments that can put everything back (`Brancher`) and rewards that come at once.
    """

    kind: Literal["vine"] = "vine"
    branches: Size = 8
    """G, chunks tried from each state."""
    gamma: Fraction = 0.97
    """Discount per action, up to the end of the chunk."""
    spread_floor: NonNegativeFloat = 0.05
    """Added to the standard deviation that advantages are divided by, in units of reward."""
    ratio_level: Literal["token", "action", "chunk"] = "action"
    clip_low: PositiveFloat = 0.2
    clip_high: Ratio = 0.28
    dual_clip: Ratio | None = None
    max_behavior_weight: Ratio = 2.0
    """Asynchronous mode: cap on the ratio of the learner's policy to the older one that acted, by which a
    sample counts."""
    decoupled: bool = True
    """As in `PPO`."""
    entropy_coef: NonNegativeFloat = 0.0
    epochs: PositiveInt = 1


AlgorithmConfig = PPO | GRPO | Vine

# --- the rest -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RolloutConfig:
    num_envs: Slots = 64
    """B, environments that run side by side."""
    chunk: Chunk = 8
    """C, actions in a chunk."""
    chunks: Actions = 4
    """T, chunks in a rollout. GRPO needs T·C = horizon."""
    emphasis: tuple[str, ...] = ()
    """Tasks that come up more often: with "push:4" those whose names begin with "push", four times as often.
    Hard tasks need it where what is learned of the easy ones gets in their way. Evaluations have all tasks
    alike."""


@dataclass(frozen=True, slots=True)
class OptimConfig:
    """Settings of AdamW and of its learning rate."""

    lr: LearningRate = 3e-4
    value_lr: LearningRate | None = None
    """Learning rate of the value head; None: `lr`."""
    muon_lr: LearningRate | None = None
    """Learning rate of Muon (Jordan et al. 2024), which makes steps orthogonal, for the weight matrices of a
    network's repeated blocks; SFT only. None: AdamW trains them, as everything else."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    clip_grad: PositiveFloat = 1.0
    """Maximum global norm of the gradient."""
    warmup: NonNegativeInt = 0
    """Optimizer steps of linear warm-up."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Course of the learning rate, from `lr` to `final_lr_fraction`·`lr` over the run."""
    final_lr_fraction: Fraction = 0.1


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    iterations: PositiveInt = 100
    batch: Pieces = 1024
    """Chunks an optimizer step sees; the rollout is split into as many steps as it fills."""
    micro_batch: Pieces = 256
    """Chunks a forward-backward pass sees; divides `batch`. Changes memory, not results."""
    optim: OptimConfig = OptimConfig()
    freeze: tuple[str, ...] = ()
    """Beginnings of the names of parameters that RL leaves as they are, e.g. `vlm.towers`."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Division among several learners: "ddp" keeps all weights on each, "fsdp" (FSDP2) a share of them."""
    gradient_checkpointing: bool = False
    """Compute the activations of each block again in the backward pass instead of keeping them: a fraction
    of the memory, a third more work."""
    offload: bool = False
    """Keep the optimizer's state in host memory: with "fsdp" and several learners weights too, always; else
    while no training step runs, so that a rollout on the same GPU has that memory."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Number format of a training step: bfloat16 is autocast; weights and optimizer stay float32."""
    max_bad_steps: PositiveInt = 5
    """Consecutive steps with a non-finite loss or gradient, each skipped, after which the run stops."""
    max_minutes: Annotated[float, above(0, MOST)] | None = None
    """Stop after this long, saved and resumable; schedules still run over `iterations`."""
    max_simulated_steps: PositiveInt | None = None
    """Stop after the iteration in which so many actions have been simulated, those that vine sampling only
    tries included; schedules still run over `iterations`."""


@dataclass(frozen=True, slots=True)
class SFTConfig:
    """Supervised warm-up on expert demonstrations."""

    data: str | None = None
    """A file of demonstrations to learn from, as `rove data import` and `rove collect` write them; None: they
    are collected from the suite's scripted expert. Set, `episodes`, `emphasis`, `noise` and `slips` are not
    read."""
    episodes: Pieces = 400
    """Demonstrations, collected from the suite's scripted expert on train initial states."""
    emphasis: tuple[str, ...] = ()
    """Tasks that are shown more often, as in `RolloutConfig.emphasis`; pictures to point in have all
    alike."""
    noise: NonNegativeFloat = 0.3
    """Standard deviation of the noise that pushes the expert off its way between chunks, as a fraction of the
    bounds of an action: the demonstrations then show the way back."""
    slips: Fraction = 0.0
    """Share of the expert's chunks that miss, 0 to 1. They are carried out but not learned from; what follows
    shows how to try again. For experts that can: see `rove.envs.base.Fallible`."""
    steps: PositiveInt = 1000
    """Optimizer steps on the demonstrations."""
    relabel: Count = 0
    """Rounds after these steps in which policy and expert take turns acting, and the policy goes on learning,
    at half of the learning rate, from what the expert did until then and from where the policy had gone
    (DAgger, Ross et al. 2011); 0: none. A finished warm-up that is to have more of them goes on with those.
    For experts that can: see `rove.envs.base.Corrector`."""
    relabel_episodes: Pieces = 300
    """Successes of both together in a round."""
    relabel_steps: PositiveInt = 900
    """Optimizer steps in a round."""
    grounding: SomePieces = 0
    """Pictures in which the policy first learns to point at what a sentence names; 0: none. For policies
    trained from scratch."""
    grounding_steps: NonNegativeInt = 0
    """Optimizer steps on pictures to point in, before any action is learned."""
    freeze: tuple[str, ...] = ()
    """Beginnings of the names of parameters that demonstrations do not train, as in `TrainingConfig.freeze`.
    Pictures to point in do: what they taught is else blurred by the fewer that a demonstration shows."""
    pointing_weight: NonNegativeFloat = 0.3
    """Weight of the pointing loss, beside that of the actions, while the demonstrations are learned; read
    where `grounding` is not 0."""
    color_jitter: Fraction = 0.0
    """Fraction by which the brightness of training pictures varies; see `rove.training.augment`."""
    smoothing: NonNegativeFloat = 0.0
    """Standard deviation, in bins, of the Gaussian that the label of an action token is spread over: what is
    learned of a bin then counts for its neighbours too; 0: the bin alone."""
    draws: Draws = 1
    """Noisy points at which a step teaches a flow policy each demonstration, from one pass of the VLM."""
    zero_centred: bool = False
    """Give every dimension that the expert often leaves at rest a bin whose centre is zero itself, by a range
    that is as wide on both sides, and spread no label over it: a hand then keeps its orientation, where it
    would else turn a little at every action and drift."""
    batch: Pieces = 64
    """Chunks that an optimizer step sees."""
    micro_batch: Pieces = 64
    optim: OptimConfig = OptimConfig(lr=1e-3, warmup=50, schedule="cosine", weight_decay=0.01)


@dataclass(frozen=True, slots=True)
class EvaluationConfig:
    every: NonNegativeInt = 0
    """Iterations between evaluations during training; 0: only at the end."""
    episodes: SomePieces = 256
    """Held-out episodes, spread evenly over the tasks."""
    variant_episodes: SomePieces = 64
    """Held-out episodes per shifted variant, at the end; 0: none."""
    decoding: Literal["greedy", "sample"] = "greedy"
    num_envs: Slots = 64


@dataclass(frozen=True, slots=True)
class LoggingConfig:
    tensorboard: bool = True
    wandb: bool = False
    save_every: PositiveInt = 10
    """Iterations between checkpoints."""
    keep: PositiveInt = 2
    """Newest checkpoints kept, besides the best."""


@dataclass(frozen=True, slots=True)
class PlacementConfig:
    """Placement of roles on devices; see `docs/placement.md`. Only `ahead` changes what is learned."""

    map: str = "colocated"
    """"colocated", "hybrid", "disaggregated", "auto" (measure, then choose), or the devices of each role,
    such as "learner: 0-7, env: 0-3, policy: 4-7"."""
    stages: Count = 0
    """Parts of an environment worker's slots that are simulated in turn, so that the policy serves one while
    another is simulated; 0: one where environments and policy share their devices, or where two would cut a
    group, else two."""
    ahead: Count = 0
    """Rollouts that may be under way or waiting while the learner trains: asynchronous mode; 0: none, each is
    begun when the one before it has been trained on. Nothing is then off-policy."""
    executor: Literal["local", "ray"] = "local"
    """"local": processes of this machine. "ray": actors of a Ray cluster."""
    ray_address: str | None = None
    """Address of the Ray cluster; "auto": the one that this machine belongs to; None: start one here."""
    nodes: Nodes = 0
    """Nodes of the Ray cluster to wait for before the run is placed; 0: those that are there."""
    device: str = "auto"
    """"auto", "cpu", "cuda" or "cuda:N": restricts what the run may use, environments included."""
    threads: Count = 1
    """CPU threads for tensor work; 0 uses every core. Simulation and rendering have threads of their own."""
    env_workers: Count = 0
    """Environment processes for each of a policy's simulating GPUs, or for all of its cores; 0: one, and
    none where environments and policy take turns."""
    learners: Count = 0
    """Training processes for each node's cores; 0: one. A GPU has one."""
    deterministic: bool = False
    """Serve stages in a fixed order, one at a time: the same trajectories on every executor and run."""
    deadline: PositiveFloat = 600.0
    """Seconds without a sign of life, an answer or headway after which a process counts as hung: it is
    replaced, or ends the run where it trains. See "When something fails" in `docs/placement.md`."""
    max_restarts: NonNegativeInt = 3
    """Replacements of one worker without a completed rollout in between, after which the run ends."""


@dataclass(frozen=True, slots=True)
class Run:
    """Everything `rove train` needs."""

    name: str
    algorithm: AlgorithmConfig
    seed: Seed = 1
    env: EnvConfig = TabletopConfig()
    policy: PolicyConfig = PolicyConfig()
    rollout: RolloutConfig = RolloutConfig()
    training: TrainingConfig = TrainingConfig()
    sft: SFTConfig | None = SFTConfig()
    """Warm-up before RL, of `policy.checkpoint` where that is set; None starts from it as it is."""
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    placement: PlacementConfig = PlacementConfig()
    output: str = "runs"
    """Run directories are made below this folder."""
