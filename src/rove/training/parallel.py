"""Data-parallel training: one learner or several ranks, whose gradients are joined.

    ddp    every rank holds all weights; gradients are summed over ranks in the backward pass
    fsdp   every rank holds a share of each weight, its gradient and its moments (FSDP2)

Losses are divided by denominators of the whole batch, so the sum of the ranks' gradients is the gradient that
one learner would have: results do not depend on the number of ranks, rounding aside.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from rove.config.schema import TrainingConfig
from rove.policies.base import Policy
from rove.types import Observation, PolicyOutput

Evaluate = Callable[[Observation, Tensor], PolicyOutput]


@dataclass(frozen=True, slots=True)
class Ranks:
    """The rank of this learner, and the number of ranks."""

    rank: int = 0
    world: int = 1

    def sum(self, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sum each metric over the ranks, on its own device."""
        if self.world == 1 or not metrics:
            return metrics
        total = torch.stack(list(metrics.values())).double()
        distributed.all_reduce(total)
        return dict(zip(metrics, total.unbind(), strict=True))


def free_address() -> str:
    """Return "host:port" of this machine, free for a rendezvous."""
    with socket.socket() as sock:
        sock.bind(("", 0))
        return f"{_own_address()}:{sock.getsockname()[1]}"


def _own_address() -> str:
    """Return the address by which other machines reach this one; no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("10.255.255.255", 1))
        except OSError:
            return "127.0.0.1"
        return sock.getsockname()[0]


def join(rank: int, world: int, address: str, device: torch.device) -> Ranks:
    """Meet the other ranks at "host:port", which rank 0 serves. Needed only where `world` is not 1."""
    if world > 1:
        on_gpu = device.type == "cuda"
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            init_method=f"tcp://{address}",
            rank=rank,
            world_size=world,
            device_id=device if on_gpu else None,
        )
    return Ranks(rank, world)


def leave() -> None:
    """Leave the process group that `join` entered."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


class ParallelModel:
    """A policy whose `evaluate` runs on this rank's rows and joins gradients; it wraps the policy in place.

    See `recompute` for `config.gradient_checkpointing`.
    """

    def __init__(self, policy: Policy, config: TrainingConfig, device: torch.device, ranks: Ranks) -> None:
        self.policy, self.ranks = policy, ranks
        self.sharded = ranks.world > 1 and config.parallel == "fsdp"
        if config.gradient_checkpointing:
            recompute(policy)
        self._joined: DistributedDataParallel | None = None
        self._trained: list[FSDPModule] = []
        if self.sharded:
            _shard(policy, config, device, ranks)
            self._trained = _trained(policy)
        elif ranks.world > 1:
            self._joined = DistributedDataParallel(_Evaluation(policy))

    def evaluate(self, observation: Observation, sample: Tensor) -> PolicyOutput:
        """Evaluate samples as `Policy.evaluate` does."""
        if self._joined is None:
            return self.policy.evaluate(observation, sample)
        return PolicyOutput(*self._joined(observation, sample))

    @property
    def loss_scale(self) -> int:
        """Factor on a rank's loss: DDP and FSDP average gradients where a sum is wanted."""
        return self.ranks.world

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Wrap the passes over one micro-batch: gradients are exchanged with the last one only."""
        if self.ranks.world == 1:
            yield
        elif self._joined is not None:
            if last:
                yield
            else:
                with self._joined.no_sync():
                    yield
        else:
            for module in self._trained:
                module.set_requires_gradient_sync(last, recurse=False)
            yield


class _Evaluation(nn.Module):
    """A policy's `evaluate` as a module's forward pass, which DDP can wrap."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, observation: Observation, sample: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        output = self.policy.evaluate(observation, sample)
        return output.logprob, output.entropy, output.value


def blocks(module: nn.Module) -> list[nn.Module]:
    """Return the repeated modules of a model: the items of its innermost `nn.ModuleList`s, so a tower's
    blocks and not the tower."""
    lists = [child for child in module.modules() if isinstance(child, nn.ModuleList)]
    items = [item for one in lists for item in one]
    return [item for item in items if not any(isinstance(part, nn.ModuleList) for part in item.modules())]


def recompute(policy: nn.Module) -> None:
    """Make every block recompute its activations in the backward pass; see
    `policies.base.maybe_checkpoint`."""
    for module in policy.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                block.recompute = True  # pyright: ignore[reportArgumentType]


def _shard(policy: nn.Module, config: TrainingConfig, device: torch.device, ranks: Ranks) -> None:
    """Shard a policy by FSDP2: a block's weights are gathered when it is computed, the rest with the whole.

    Gathering begins when a module is called: a policy calls its blocks as modules (see
    `policies.base.maybe_checkpoint`), and may read whatever else it holds without calling it. The critic,
    which is small and computes in float32, keeps that precision.
    """
    low = torch.bfloat16 if config.precision == "bfloat16" else None
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (ranks.world,)),
        # What leaves a module stays as it is: log-probabilities and values are float32.
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False
        ),
        "offload_policy": CPUOffloadPolicy() if config.offload and device.type == "cuda" else OffloadPolicy(),
    }
    critic = getattr(policy, "value_head", None)
    if critic is not None:
        exact: dict[str, Any] = {"mp_policy": MixedPrecisionPolicy(cast_forward_inputs=False)}
        fully_shard(critic, **{**options, **exact})
    for block in blocks(policy):
        fully_shard(block, **options)
    fully_shard(policy, **options)
    register_fsdp_forward_method(policy, "evaluate")


def _trained(policy: nn.Module) -> list[FSDPModule]:
    """Return the sharded modules that have gradients. Others must not be told when to join theirs: FSDP2
    would look for gradients of a block that is never computed, and so never gathered."""
    return [
        module
        for module in policy.modules()
        if isinstance(module, FSDPModule) and any(p.requires_grad for p in module.parameters())
    ]


# --- whole tensors of sharded ones ------------------------------------------------------------------


def gather_full(value: Any) -> Any:
    """Return `value` with every sharded tensor in it gathered, on the CPU; every rank has to call it."""
    if isinstance(value, DTensor):
        return value.full_tensor().detach().cpu()
    if isinstance(value, dict):
        return {key: gather_full(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(gather_full(item) for item in value)
    return value


def shard_like(value: Tensor, model: Tensor) -> Tensor:
    """Return a whole tensor laid out as `model` is: sharded where it is, on its device."""
    if isinstance(model, DTensor):
        return distribute_tensor(value.to(model.device_mesh.device_type), model.device_mesh, model.placements)
    return value.to(model.device)
