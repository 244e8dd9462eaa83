"""A flow policy apart from text and chance: tensors in, velocities, densities and units out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rove import transfer
from rove.config.schema import FlowSampling, LoraConfig, ValueHeadConfig
from rove.errors import RoveError
from rove.policies import lora
from rove.policies.critic import ValueHead
from rove.policies.flow import chain, images
from rove.policies.flow.chain import Step
from rove.policies.flow.config import FREEZES, FlowConfig, Freeze
from rove.policies.flow.heads import NoiseNetwork, Pointer
from rove.policies.flow.network import FlowNetwork, Prefix
from rove.policies.flow.pi import Pi
from rove.policies.flow.prompts import Prompts
from rove.policies.flow.smolvla import SmolVLA
from rove.policies.flow.statistics import Statistics
from rove.policies.lora import LoraLinear
from rove.policies.pointers import too_few
from rove.types import ActionSpec

Processors = tuple[list[dict[str, Any]], list[dict[str, Any]]]
_NETWORKS: dict[str, type[FlowNetwork]] = {"smolvla": SmolVLA, "pi0": Pi, "pi05": Pi}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that a flow policy is made from."""

    config: FlowConfig
    statistics: Statistics
    chunk: int
    """Number of executed actions of each prediction, C."""
    action_spec: ActionSpec
    """The action spec of un-normalised actions, whose size is A."""
    sampling: FlowSampling = FlowSampling()
    freeze: Freeze = "none"
    value_head: ValueHeadConfig | None = None
    pointers: int = 0
    """Points that a policy from scratch picks out in a picture."""
    pointed: int = 1
    """Pictures in which it does, from the first on."""
    prompts: Prompts | None = None
    """None: the policy reads token ids only."""
    prefixed: bool = True
    """True where the names of weights begin with "model." when they are saved, as LeRobot has them."""
    processors: Processors | None = None
    """Steps of LeRobot's processors before and after the policy, as read; None where there were none."""

    @property
    def reads_state(self) -> bool:
        """True where the state is read, by the network or in the prompt."""
        in_prompt = self.config.prompt in ("state", "padded_state")
        return self.config.family != "pi05" or in_prompt

    def __post_init__(self) -> None:
        config = self.config
        if not 1 <= self.chunk <= config.horizon:
            raise RoveError(
                f"The chunk has {self.chunk} actions, but the policy predicts {config.horizon}: set "
                f"rollout.chunk to at most {config.horizon}."
            )
        if self.action_spec.dim > config.max_action:
            raise RoveError(
                f"The action spec has {self.action_spec.dim} dimensions, the policy {config.max_action}."
            )
        if self.value_head is not None and self.value_head.level != "chunk":
            raise RoveError(
                "The critic of a flow policy reads the prefix, before there are actions: set "
                "policy.value_head.level to chunk."
            )
        points = self.pointers * self.pointed
        read = (config.state or 0) + 2 * points
        if self.pointers and config.family != "pi05" and read > config.max_state:
            raise RoveError(
                f"{points} pointers and a state of {config.state or 0} are {read} numbers, more than "
                f"the {config.max_state} that the policy reads: raise --policy.flow.sizes.max_dim."
            )
        for problem in self.sampling.problems():
            raise RoveError(problem)
        if self.freeze not in FREEZES:
            raise RoveError(f"freeze = {self.freeze!r}: choose one of {', '.join(FREEZES)}.")


def _pointer(settings: Settings) -> Pointer | None:
    """Make the pointer of a policy from scratch, where it has one."""
    config = settings.config
    if not settings.pointers:
        return None
    return Pointer(settings.pointers, settings.pointed, config.image_tokens, config.text.width)


class FlowModel(nn.Module):
    """A network of the flow family with its normalisation, its critic and its freezing."""

    model: FlowNetwork
    value_head: ValueHead | None
    noise_network: NoiseNetwork | None
    pointer: Pointer | None
    low: Tensor
    high: Tensor

    def __init__(self, settings: Settings) -> None:
        """Make the modules on the meta device; `FlowVLA.build` or `from_pretrained` fills in the weights."""
        super().__init__()
        config, spec = settings.config, settings.action_spec
        self.config = config
        self.sampling = settings.sampling
        self.chunk, self.action_spec = settings.chunk, spec
        self.num_images = config.cameras
        self.statistics = settings.statistics
        self.prompts = settings.prompts
        self.prefixed = settings.prefixed
        self.processors = settings.processors
        self.unused: dict[str, Tensor] = {}
        """Tensors of the checkpoint by their published names that nothing computes with, on the host."""
        self.freeze: Freeze = settings.freeze
        self.lora: LoraConfig | None = None
        self.adapters: tuple[LoraLinear, ...] = ()
        self.state_normalizer, self.action_normalizer = settings.statistics.normalizers(config.where)
        self.reads_state = settings.reads_state
        self.state_size = (config.state or self.state_normalizer.dim) if settings.reads_state else 0
        head, sampling = settings.value_head, settings.sampling
        with torch.device("meta"):
            self.model = _NETWORKS[config.family](config)
            width = config.text.width
            self.value_head = None if head is None else ValueHead(head, width=width, chunk=settings.chunk)
            learned = sampling.sampler == "flow_noise"
            dims = (config.expert.width, config.max_action)
            self.noise_network = NoiseNetwork(*dims, sampling) if learned else None
            self.pointer = _pointer(settings)
        for name, values in (("low", spec.low), ("high", spec.high)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32), persistent=False)
        self.thaw()

    @property
    def horizon(self) -> int:
        """Number of actions that are predicted at once, H."""
        return self.config.horizon

    @property
    def device(self) -> torch.device:
        """The device that holds the weights."""
        return self.model.action_out_proj.weight.device

    # --- what is trained ----------------------------------------------------------------------------

    def thaw(self) -> None:
        """Let gradients reach what `freeze` and the adapters leave to train, and nothing else."""
        self.model.requires_grad_(True)
        frozen: list[nn.Module] = []
        if self.freeze == "vision":
            frozen.append(self.model.tower)
        elif self.freeze == "vlm":
            frozen.append(self.model.vlm)
            if isinstance(self.model, SmolVLA):
                frozen.append(self.model.state_proj)
        for module in frozen:
            module.requires_grad_(False)

    def adapt(self, config: LoraConfig, generator: torch.Generator) -> None:
        """Put new adapters beside the weights of VLM and expert that are not frozen; see `lora.inject`.

        The projections of actions, state and time, which are small, are trained themselves.
        """
        lora.inject(self.model.towers, config, generator)
        self.lora, self.adapters = config, tuple(lora.adapted(self.model.towers).values())

    def merge(self) -> Self:
        """Add the adapters to the weights, so that a checkpoint stands by itself; returns self."""
        if self.lora is not None:
            lora.merge(self.model.towers)
            self.lora, self.adapters = None, ()
            self.thaw()
        return self

    # --- inputs -------------------------------------------------------------------------------------

    def process_images(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Convert uint8 pictures [B, h, w, 3] of each camera to pixel values, float32 [B, 3, S, S].

        Pixel values are in [−1, 1]. Pictures of cameras that are always absent, all −1, follow those given.
        Raises RoveError on another number of cameras than the policy has.
        """
        self._check_cameras(len(images))
        size = self.config.image_size
        pixels = [images_of(camera, size, self) for camera in images]
        shape = (len(images[0]), 3, *size)
        absent = [torch.full(shape, -1.0, device=self.device) for _ in range(self.config.absent)]
        return pixels + absent

    def _check_cameras(self, given: int) -> None:
        wanted = self.config.cameras
        if given == 0 or (wanted is not None and given != wanted):
            raise RoveError(
                f"The policy sees {wanted or 'one or more'} pictures ({self.config.where}: input_features), "
                f"the suite gives {given}: use a suite or its settings that give as many, or, to train it on "
                f"others, read it with cameras={given}."
            )

    def normalize_state(self, state: Tensor) -> Tensor:
        """Normalise states [B, P], and pad them with zeros to [B, 32] where the network reads them.

        π0.5 reads them in its prompt: they stay [B, P].
        """
        normalized = self.state_normalizer.normalize(transfer.to(state, self.device))
        if self.config.family == "pi05":
            return normalized
        if normalized.shape[-1] > self.config.max_state:
            raise RoveError(
                f"The state has {normalized.shape[-1]} numbers, the policy reads at most "
                f"{self.config.max_state}."
            )
        return F.pad(normalized, (0, self.config.max_state - normalized.shape[-1]))

    def normalize_actions(self, actions: Tensor, state: Tensor | None = None) -> Tensor:
        """Normalise actions [B, H, A], and pad them with zeros to [B, H, 32]; `state` [B, P] is raw.

        The state is subtracted first where the policy's actions are relative to it.
        """
        actions = transfer.to(actions, self.device)
        offset = self._offset(state, actions.shape[-1])
        actions = actions if offset is None else actions - offset
        normalized = self.action_normalizer.normalize(actions)
        return F.pad(normalized, (0, self.config.max_action - normalized.shape[-1]))

    def unnormalize(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        """Convert normalised actions [B, H, 32] to the data's units, [B, H, A]; `state` [B, P] is raw.

        The state is added where the policy's actions are relative to it; RoveError where it is None then.
        """
        actions = self.action_normalizer.unnormalize(x[..., : self.action_spec.dim])
        offset = self._offset(state, actions.shape[-1])
        return actions if offset is None else actions + offset

    def _offset(self, state: Tensor | None, dim: int) -> Tensor | None:
        """Return what is added to actions [B, H, dim], [B, 1, dim]; None where nothing is."""
        if not self.config.delta:
            return None
        if state is None:
            raise RoveError("The policy's actions are relative to the robot's state: pass it.")
        first = transfer.to(state, self.device)[:, None, : self.config.delta].float()
        return F.pad(first, (0, dim - first.shape[-1]))

    # --- the flow -----------------------------------------------------------------------------------

    def prefix(
        self,
        pixel_values: Sequence[Tensor],
        image_masks: Tensor,
        lang_tokens: Tensor,
        lang_masks: Tensor,
        state_normalized: Tensor | None,
        *,
        output: bool = True,
    ) -> Prefix:
        """See pictures and prompt once, for all that follows.

        `pixel_values` are those of `process_images`, `image_masks` bool [B, n] says which are there;
        `lang_tokens` int64 [B, L] and `lang_masks` bool [B, L] are the prompt, padded on the right;
        `state_normalized` is that of `normalize_state`. `output` False leaves out `Prefix.output`, which only
        a critic reads.
        """
        if len(pixel_values) != image_masks.shape[1]:
            raise RoveError(f"There are {len(pixel_values)} pictures, but masks of {image_masks.shape[1]}.")
        inputs = (list(pixel_values), image_masks, lang_tokens, lang_masks, state_normalized)
        inputs = transfer.to(inputs, self.device)
        if self.config.family != "pi05" and state_normalized is None:
            raise RoveError("The policy reads the robot's state, which this suite does not give.")
        if self.pointer is not None and len(pixel_values) < self.pointer.pictures:
            raise too_few(self.pointer.pictures, len(pixel_values))
        embedded = self.model.embed_prefix(*inputs)
        return self.model.prefix(embedded, inputs[-1], output=output, pointer=self.pointer)

    def velocity(self, prefix: Prefix, x_t: Tensor, time: Tensor) -> Tensor:
        """Compute velocities, float32 [B, H, 32], of points `x_t` [B, H, 32] at times [B]; 1 is noise."""
        return self.model.velocity_of(self.model.suffix(prefix, x_t, time))

    def denoise(self, prefix: Prefix, noise: Tensor, steps: int) -> Tensor:
        """Follow the flow from `noise` [B, H, 32] in `steps` of Euler's method to normalised actions."""
        return chain.integrate(lambda x, t: self.velocity(prefix, x, t), noise, steps)[:, -1]

    def loss_elements(self, prefix: Prefix, target_normalized: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """Compute the squared errors of flow matching, [B, H, 32], at x = t·noise + (1 − t)·target.

        `target_normalized` [B, H, 32] is padded with zeros; see `normalize_actions`. `time` is [B].
        """
        t = time[:, None, None]
        x_t = t * noise + (1 - t) * target_normalized
        return (self.velocity(prefix, x_t, time) - (noise - target_normalized)) ** 2

    def step(self, prefix: Prefix, x: Tensor, k: Tensor | int) -> Step:
        """Compute the step `k` (an int, or int64 [B]) of the chain from points `x` [B, H, 32], float32."""
        sampling = self.sampling
        rows = torch.full((len(x),), k, device=x.device) if isinstance(k, int) else k
        time = 1 - rows.double() / sampling.steps
        hidden = self.model.suffix(prefix, x, time)
        v = self.model.velocity_of(hidden)
        plain = chain.ode(x, v, sampling.steps)
        if self.noise_network is not None:
            return Step(plain, plain, self.noise_network(hidden))
        stochastic = chain.sde if sampling.sampler == "flow_sde" else chain.cps
        return Step(plain, *stochastic(x, v, k, sampling.steps, sampling.level))

    def features(self, prefix: Prefix) -> Tensor:
        """Return the mean of `Prefix.output` over the tokens there are, float32 [B, D]."""
        assert prefix.output is not None
        weight = prefix.pad_mask[..., None].to(torch.float32)
        # Padding holds arbitrary numbers: zeros times those would still be them if they were not finite.
        hidden = torch.where(prefix.pad_mask[..., None], prefix.output.float(), 0.0)
        return hidden.sum(1) / weight.sum(1)

    def last(self, prefix: Prefix) -> Tensor:
        """Return `Prefix.output` of the last token that is there, float32 [B, D].

        In SmolVLA that is the state's, which has seen pictures and words; in π0 and π0.5 the prompt's last.
        """
        assert prefix.output is not None
        places = torch.arange(prefix.pad_mask.shape[1], device=prefix.output.device)
        last = torch.where(prefix.pad_mask, places, 0).amax(1)
        return prefix.output[torch.arange(len(last), device=last.device), last].float()

    def value_of(self, prefix: Prefix) -> Tensor | None:
        """Compute values, float32 [B, 1]; None without a critic."""
        if self.value_head is None:
            return None
        pooled = self.last(prefix) if self.value_head.config.source == "first" else self.features(prefix)
        return self.value_head(pooled[:, None])


def images_of(camera: Tensor, size: tuple[int, int], model: FlowModel) -> Tensor:
    """Convert one camera's pictures on the model's device; see `images.process`."""
    return images.process(transfer.to(camera, model.device), size, model.config.resizer)
