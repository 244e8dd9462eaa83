"""SmolVLA, π0 and π0.5 as one policy: it draws chunks of actions by a flow, and says how likely they were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from rove import transfer
from rove.config.schema import (
    FlowPolicyConfig,
    FlowSampling,
    LoraConfig,
    PolicyConfig,
    Run,
    SFTConfig,
    ValueHeadConfig,
)
from rove.errors import RoveError
from rove.findings import Finding
from rove.policies import lora as adapters
from rove.policies.base import Imitation, Locator, SamplingNoise, Work
from rove.policies.flow import chain, loading, preflight, scratch
from rove.policies.flow.chain import Step
from rove.policies.flow.config import Freeze
from rove.policies.flow.core import FlowModel
from rove.policies.flow.images import Resizer
from rove.policies.flow.memory import estimate, skeleton
from rove.policies.flow.network import Prefix
from rove.policies.flow.prompts import NO_TOKENIZER, Style, word_tokenizer
from rove.policies.flow.statistics import Layout
from rove.policies.flow.work import count_work
from rove.policies.words import unknown_word
from rove.types import ActionChunk, ActionSpec, Conventions, Mode, Observation, PolicyOutput


class Noise(NamedTuple):
    """The chance of one draw, B rows."""

    start: Tensor
    """Standard normal x at t = 1, float32 [B, H, 32]."""
    steps: Tensor
    """Standard normal noise of the stochastic steps, float32 [B, H, 32], or [B, K, H, 32] where all are."""
    k: Tensor
    """Number of the stochastic step, int64 [B]; not read where all are."""


_UNREAD = (
    "center_crop",
    "compile",
    "head",
    "decoding",
    "attention",
    "film",
    "proprio",
    "placeholders",
    "temperature",
)
"""Settings of `PolicyConfig` that are of token policies alone."""
_NO_POINTERS = "This policy does not point; set policy.pointers, or sft.grounding to 0."
_PUBLISHED_HORIZON = 50
"""Actions that the published checkpoints predict, but for openpi's π0.5 for LIBERO."""


class FlowVLA(FlowModel, Locator):
    """A flow-matching policy, made by `build` or `from_pretrained`."""

    @classmethod
    def build(
        cls,
        config: PolicyConfig,
        *,
        chunk: int,
        action_spec: ActionSpec,
        image_size: int,
        vocabulary: Sequence[str],
        statistics: Mapping[str, Any] | None,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Make a policy as `config` says: read from its checkpoint, or new, with random float32 weights.

        The same seed gives the same weights. `chunk` of the predicted actions are executed; `vocabulary`
        lists the words of instructions; `statistics` are those of demonstrations, and None stands for the
        bounds of `action_spec`, or for what the checkpoint has. Raises RoveError where sizes do not fit.
        """
        flow = config.flow or FlowPolicyConfig()
        if config.checkpoint is not None:
            return cls.from_pretrained(
                config.checkpoint,
                dtype=loading.DTYPES[config.dtype],
                device=device,
                lora=config.lora,
                value_head=config.value_head,
                sampling=None if config.flow is None else flow.sampling,
                freeze=flow.freeze,
                chunk=chunk,
                horizon=flow.horizon,
                cameras=flow.cameras,
                action_spec=None if statistics is None else action_spec,
                statistics=statistics,
                unnorm_key=config.unnorm_key if statistics is None else None,
                resizer=flow.resizer,
                prompt=flow.prompt,
                delta=flow.delta,
                seed=seed,
            )
        settings = scratch.settings(
            config,
            chunk=chunk,
            action_spec=action_spec,
            image_size=image_size,
            vocabulary=vocabulary,
            statistics=statistics,
        )
        policy = cls(settings)
        scratch.initialize(policy, torch.Generator().manual_seed(seed))
        return policy.to(device)

    @classmethod
    def from_pretrained(
        cls,
        path: Path | str,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        lora: LoraConfig | Literal["saved"] | None = "saved",
        value_head: ValueHeadConfig | Literal["saved"] | None = "saved",
        sampling: FlowSampling | Mapping[str, Any] | None = None,
        freeze: Freeze | None = None,
        chunk: int | None = None,
        horizon: int | None = None,
        cameras: int | None = None,
        action_spec: ActionSpec | None = None,
        statistics: Mapping[str, Any] | None = None,
        unnorm_key: str | None = None,
        resizer: Resizer | None = None,
        prompt: Style | None = None,
        delta: int | None = None,
        seed: int = 0,
    ) -> Self:
        """Read a checkpoint of LeRobot, openpi, RLinf or Rove: a directory, or a name on the hub.

        Parameters that are None are as saved, or as published for the layout; of `sampling`, a mapping names
        the fields that are not. `chunk` of the `horizon` predicted actions are executed. `statistics`, those
        of data to be trained on, replace the checkpoint's; `unnorm_key` names one of several data sets.
        `resizer`, `prompt` and `delta` (first numbers of the state that actions are relative to) say how the
        data were prepared. VLM and expert are converted to `dtype` one tensor at a time; the projections of
        actions, state and time, the critic and adapters are float32. A new critic, or new adapters, are drawn
        from `seed`. Raises RoveError, naming the key or the file, where weights are missing, left over,
        misshapen, or would execute code, and where there are no statistics.
        """
        parts = loading.read(
            path,
            loading.Asked(
                lora=lora,
                value_head=value_head,
                sampling=sampling,
                freeze=freeze,
                chunk=chunk,
                horizon=horizon,
                cameras=cameras,
                action_spec=action_spec,
                statistics=statistics,
                unnorm_key=unnorm_key,
                resizer=resizer,
                prompt=prompt,
                delta=delta,
            ),
        )
        policy = cls(parts.settings)
        loading.complete(policy, parts, seed=seed, dtype=dtype, device=torch.device(device))
        return policy.to(device)

    def save_pretrained(
        self, directory: Path | str, *, layout: Layout | None = None, max_shard_bytes: int = 10**15
    ) -> None:
        """Write a checkpoint directory in one of the published layouts; None: the one that it was read in.

        LeRobot reads a single file of weights, so they are split only where `max_shard_bytes` says so.
        """
        loading.save(self, Path(directory), layout, max_shard_bytes)

    @classmethod
    def check(cls, run: Run) -> None:
        """Check that the policy can do what `run` asks, and that the files of a checkpoint that is here are
        whole; a new one is grounded by its pointers only."""
        super().check(run)
        policy, default = run.policy, PolicyConfig()
        for name in _UNREAD:
            if (value := getattr(policy, name)) != getattr(default, name):
                usual = str(getattr(default, name)).lower()
                raise RoveError(
                    f"policy.{name} = {value!r}: a flow policy does not read it: set --policy.{name} {usual}."
                )
        if policy.value_head is not None and policy.value_head.level != "chunk":
            raise RoveError(
                "The critic of a flow policy reads the prefix, before there are actions: set "
                "--policy.value_head.level chunk and --algorithm.advantage_level chunk."
            )
        if run.sft is not None and run.sft.grounding and not policy.pointers and policy.checkpoint is None:
            raise RoveError(_NO_POINTERS)
        if policy.checkpoint is None:
            skeleton(run)
        elif Path(policy.checkpoint).is_dir():
            loading.check(policy.checkpoint, statistics=run.sft is None, unnorm_key=policy.unnorm_key)

    @staticmethod
    def horizon_of(run: Run) -> int:
        """Return H: as set, as the checkpoint says, or from scratch the actions that are executed."""
        flow, name = run.policy.flow, run.policy.checkpoint
        if flow is not None and flow.horizon is not None:
            return flow.horizon
        return run.rollout.chunk if name is None else loading.horizon(name, _PUBLISHED_HORIZON)

    def unreadable(self, instruction: str, /) -> str | None:
        """Return the first word that is not in the vocabulary; see `Policy.unreadable`."""
        return None if self.prompts is None else self.prompts.unknown(instruction)

    @staticmethod
    def unknown_word(vocabulary: Sequence[str], instructions: Sequence[str]) -> str | None:
        """Return the first word that a new policy's tokenizer lacks; see `Policy.unknown_word`."""
        tokenizer = word_tokenizer(vocabulary)
        words = (unknown_word(tokenizer, text) for text in instructions)
        return next((word for word in words if word is not None), None)

    @staticmethod
    def memory(run: Run) -> str:
        """Describe what a run needs on the device that holds its policy, before anything is loaded."""
        return str(estimate(run))

    @staticmethod
    def work(run: Run) -> Work:
        """Count what acting and training cost a device, before anything is loaded."""
        return count_work(run)

    def preflight(self, conventions: Conventions, *, rl: bool) -> list[Finding]:
        """Check whether this policy fits a suite; see `Policy.preflight`."""
        return preflight.examine(self, conventions)

    # --- acting and training ------------------------------------------------------------------------

    sample_dtype = torch.float32

    @property
    def sample_shape(self) -> tuple[int]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Shape of a row's sample: the points of the chain that its density needs, and a step's number."""
        return (self.sampling.points * self.horizon * self.config.max_action + 1,)

    def act(
        self,
        observation: Observation,
        mode: Mode,
        noise: SamplingNoise | None = None,
        samples: int | None = None,
    ) -> ActionChunk:
        """Draw a chunk of actions for each row; "greedy" follows the flow from noise without any on the way.

        "sample" needs `noise`. "greedy" starts from the noise of `noise` too, or from that of a fixed key
        where there is none. With `samples` = G it draws G chunks for each row, [B, G, C, A], from one prefix;
        the first is the one drawn without `samples`.
        """
        if noise is None:
            if mode == "sample":
                raise RoveError("act(mode='sample') needs noise; pass a SamplingNoise, or mode='greedy'.")
            same = torch.zeros(len(observation), dtype=torch.int64)
            noise = SamplingNoise(0, same, same)
        drawn = self.noise(noise, samples or 1)
        with torch.inference_mode(), adapters.lowered(self.adapters):
            prefix = self.observe(observation, output=self.value_head is not None)
            chunk = self.draw(prefix, drawn, observation.state, greedy=mode == "greedy")
        # Clones made outside of inference mode may enter a graph, as old log-probabilities do.
        actions, sample, logprob, value = chunk.actions, chunk.sample, chunk.logprob, chunk.value
        if samples:
            actions, sample, logprob = (x.unflatten(0, (-1, samples)) for x in (actions, sample, logprob))
        value = None if value is None else value.clone()
        return ActionChunk(actions.clone(), sample.clone(), logprob.clone(), value)

    def evaluate(self, observation: Observation, sample: Tensor, /) -> PolicyOutput:
        """Compute log-probability, entropy and value of samples, differentiable, by one pass of the expert.

        `sample` is that of `act`, [B, *sample_shape], or [B, G, *sample_shape] with G for each row; it is
        refused where its size is another. Chains whose steps are all stochastic take K passes, at once.
        """
        if sample.shape[-1:] != self.sample_shape:
            raise RoveError(
                f"The sample has {sample.shape[-1]} numbers, the policy draws {self.sample_shape[0]}: it was "
                "drawn by a policy of other settings."
            )
        prefix = self.observe(observation, output=self.value_head is not None)
        groups = sample.shape[1] if sample.ndim == 3 else None
        rows = sample.flatten(0, 1) if groups else sample
        logprob, entropy = self.density(prefix.repeat(groups) if groups else prefix, rows)
        if groups:
            logprob, entropy = (x.unflatten(0, (-1, groups)) for x in (logprob, entropy))
        return PolicyOutput(logprob, entropy, self.value_of(prefix), prefix.pointing)

    def value(self, observation: Observation) -> Tensor:
        """Compute values alone, float32 [B, 1]. Raises RoveError without a critic."""
        value = self.value_of(self.observe(observation)) if self.value_head is not None else None
        if value is None:
            raise RoveError("This policy has no critic; set policy.value_head.")
        return value

    def imitation_loss(
        self,
        observation: Observation,
        actions: Tensor,
        mask: Tensor,
        /,
        config: SFTConfig,
        noise: SamplingNoise,
    ) -> Imitation:
        """Compute the flow-matching loss of demonstrations, differentiable: a sum over numbers that count.

        `actions` [B, H, A] are in the units of `action_spec`, `mask` bool [B, H] says which count. A batch's
        loss is this sum over mask × A, as LeRobot has it. Actions that do not count enter as zeros in
        normalised units. Times are 0.001 + 0.999·Beta(1.5, 1), drawn from `noise`; of `config.draws` noisy
        points of each row, which one prefix serves, the loss is the mean.
        """
        target = self.normalize_actions(actions, observation.state)
        target = torch.where(transfer.to(mask, self.device)[..., None], target, 0.0)
        draws, shape = config.draws, (self.horizon, self.config.max_action)
        # The inverse of Beta(1.5, 1)'s distribution function, t^1.5.
        time = 0.001 + 0.999 * noise.uniform(draws).flatten() ** (1 / 1.5)
        at = noise.normal(draws * shape[0] * shape[1]).view(-1, *shape)
        time, at, mask = transfer.to((time.float(), at.float(), mask), self.device)
        prefix = self.observe(observation, output=False)
        several = prefix if draws == 1 else prefix.repeat(draws)
        elements = self.loss_elements(several, target.repeat_interleave(draws, dim=0), at, time)
        counts = mask[..., None].repeat_interleave(draws, dim=0)
        loss = (elements[..., : self.action_spec.dim] * counts).sum() / draws
        return Imitation(loss, pointing=prefix.pointing)

    def point(self, observation: Observation) -> Tensor:
        """Compute pointing logits alone; see `Locator.point`. They do not depend on the state."""
        nothing = torch.zeros(len(observation), self.state_size)
        pointing = self.observe(replace(observation, state=nothing), output=False).pointing
        if pointing is None:
            raise RoveError(_NO_POINTERS)
        return pointing

    # --- their parts --------------------------------------------------------------------------------

    def noise(self, noise: SamplingNoise, samples: int = 1) -> Noise:
        """Draw the chance of `samples` chunks for each row, [B · samples], on the model's device.

        The chunks of a row start from one noise, and have the same stochastic step: where they are compared,
        as vine sampling does, they differ only by what has a density. What a start of its own does to a chunk
        is more, and no gradient knows it.
        """
        sampling, horizon, dim = self.sampling, self.horizon, self.config.max_action
        steps = sampling.steps if sampling.joint else 1
        choices = sampling.choices
        k = (choices.start + (noise.uniform(1) * len(choices)).long()).expand(-1, samples).flatten()
        normal = noise.normal((1 + samples * steps) * horizon * dim).float().unflatten(-1, (-1, horizon, dim))
        k, normal = transfer.to((k, normal), self.device)
        start = self.sampling.start * normal[:, :1].expand(-1, samples, -1, -1).flatten(0, 1)
        drawn = normal[:, 1:].unflatten(1, (samples, steps)).flatten(0, 1)
        return Noise(start, drawn if sampling.joint else drawn[:, 0], k)

    def observe(self, observation: Observation, *, output: bool = True) -> Prefix:
        """Compute the prefix of observations; see `FlowModel.prefix`.

        Absent cameras, which nothing sees, are left out, and prompts are padded to the longest only.
        """
        if self.prompts is None:
            raise RoveError(f"{Path(self.config.where).parent} {NO_TOKENIZER}")
        cameras = observation.images.unbind(1)
        self._check_cameras(len(cameras))
        normalized = None
        if self.reads_state:
            if observation.state is None:
                raise RoveError("The policy reads the robot's state, which this suite does not give.")
            normalized = self.normalize_state(observation.state)
        tokens, mask = self.prompts(observation.instruction, normalized)
        images = transfer.to(cameras, self.device)
        pixels = self.process_images(images)[: len(images)]
        there = torch.ones(len(observation), len(pixels), dtype=torch.bool)
        return self.prefix(pixels, there, tokens, mask, normalized, output=output)

    def draw(
        self, prefix: Prefix, noise: Noise, state: Tensor | None = None, *, greedy: bool = False
    ) -> ActionChunk:
        """Draw chunks from a prefix of B rows with `noise` of B·G rows, G for each; `state` [B, P] is raw.

        A greedy chunk's sample holds the chain's end alone and has log-probability zero.
        """
        groups = len(noise.start) // len(prefix.pad_mask)
        value = self.value_of(prefix)
        seen = prefix if groups == 1 else prefix.repeat(groups)
        steps, k = self.sampling.steps, noise.k
        if greedy:
            end = self.denoise(seen, noise.start, steps)
            points = end[:, None].expand(-1, self.sampling.points, -1, -1)
            logprob = end.new_zeros(len(end), self.chunk, self.action_spec.dim)
        elif self.sampling.joint:
            points, step = chain.draw_all(lambda x, i: self.step(seen, x, i), noise.start, noise.steps, steps)
            end, logprob = points[:, -1], self._joint(points, step)[0]
        else:
            points, end, step = chain.draw_one(
                lambda x, i: self.step(seen, x, i), noise.start, k, noise.steps, steps
            )
            logprob = self._single(points, step)[0]
        if state is not None and groups > 1:
            state = state.repeat_interleave(groups, dim=0)
        actions = self.unnormalize(end, state)[:, : self.chunk].clamp(self.low, self.high)
        return ActionChunk(actions, chain.pack(points, k), logprob, value)

    def density(self, prefix: Prefix, sample: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probability and entropy, float32 [B, C, A], of samples [B, *sample_shape]."""
        points, k = chain.unpack(transfer.to(sample, self.device), self.horizon, self.config.max_action)
        if not self.sampling.joint:
            return self._single(points, self.step(prefix, points[:, 0], k))
        steps = self.sampling.steps
        k = torch.arange(steps, device=points.device).repeat(len(points))
        step = self.step(prefix.repeat(steps), points[:, :-1].flatten(0, 1), k)
        parts = (part.expand_as(step.plain).unflatten(0, (-1, steps)) for part in step)
        return self._joint(points, Step(*parts))

    def _single(self, points: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Return log-probability and entropy of one step between points [B, 2, H, 32]."""
        mean, std = self._counted(step.mean), self._counted(step.std.expand_as(step.mean))
        return chain.logprob(self._counted(points[:, 1]), mean, std), chain.entropy(std)

    def _joint(self, points: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Return log-probability and entropy of all steps between points [B, K + 1, H, 32].

        The start counts as if it were drawn from 1, which is the same for any weights and goes into no ratio.
        """
        mean, std = self._counted(step.mean), self._counted(step.std)
        start = self._counted(points[:, 0])
        nothing, one = torch.zeros_like(start), torch.ones_like(start)
        logprob = chain.logprob(self._counted(points[:, 1:]), mean, std).sum(1)
        return logprob + chain.logprob(start, nothing, one), chain.entropy(std).sum(1)

    def _counted(self, x: Tensor) -> Tensor:
        """Return the executed actions' real dimensions of [..., H, 32]."""
        return x[..., : self.chunk, : self.action_spec.dim]
