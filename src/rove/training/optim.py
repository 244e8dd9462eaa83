"""AdamW and Muon, their parameter groups, and the learning-rate schedule as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rove import transfer
from rove.config.schema import OptimConfig
from rove.errors import RoveError
from rove.training.muon import Muon
from rove.training.parallel import blocks, shard_like


def learning_rate_factor(step: float, total: int, config: OptimConfig) -> float:
    """Return the factor on the base rate at `step` of `total`: linear warm-up, then the schedule."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    if config.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - config.warmup) / max(1, total - config.warmup))
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.final_lr_fraction + (1 - config.final_lr_fraction) * shape


def make_optimizer(
    module: nn.Module, config: OptimConfig, head: nn.Module | None = None
) -> torch.optim.AdamW:
    """Make AdamW with groups for the model and for the value head `head`; only matrices have weight decay.

    What `make_muon` trains is left out.
    """
    in_head = {id(p) for p in head.parameters()} if head is not None else set()
    others = {id(p) for p in _of_muon(module, config)}
    trained = [p for p in module.parameters() if p.requires_grad and id(p) not in others]
    groups = []
    for is_head, lr in ((False, config.lr), (True, config.value_lr or config.lr)):
        mine = [p for p in trained if (id(p) in in_head) == is_head]
        for decays in (True, False):
            params = [p for p in mine if (p.ndim > 1) == decays]
            if params:
                decay = config.weight_decay if decays else 0.0
                groups.append({"params": params, "lr": lr, "base_lr": lr, "weight_decay": decay})
    return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, foreach=True)


def make_muon(module: nn.Module, config: OptimConfig) -> Muon | None:
    """Make Muon for the weight matrices of the model's blocks; None where AdamW trains them."""
    lr, params = config.muon_lr, _of_muon(module, config)
    if lr is None or not params:
        return None
    group = {"params": params, "lr": lr, "base_lr": lr, "weight_decay": config.weight_decay}
    return Muon([group])


def _of_muon(module: nn.Module, config: OptimConfig) -> list[nn.Parameter]:
    """The parameters that Muon trains: embeddings and heads are not among the blocks'."""
    if config.muon_lr is None:
        return []
    parts = [part for block in blocks(module) for part in block.modules()]
    matrices = [cast(nn.Parameter, part.weight) for part in parts if isinstance(part, nn.Linear)]
    return [matrix for matrix in matrices if matrix.requires_grad]


class Optimizer:
    """AdamW, and Muon where it is asked for, with schedule and clipping; skips non-finite gradients, and
    raises after too many in a row."""

    def __init__(
        self,
        module: nn.Module,
        config: OptimConfig,
        total_steps: int,
        max_bad_steps: int,
        head: nn.Module | None = None,
    ) -> None:
        self.config, self.total_steps, self.max_bad_steps = config, total_steps, max_bad_steps
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.adamw, self.muon = make_optimizer(module, config, head), make_muon(module, config)
        self._both = [one for one in (self.adamw, self.muon) if one is not None]
        self.steps = 0
        self.bad_streak = 0
        self.last_lr = 0.0
        """Learning rate of the last step that was taken."""

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for optimizer in self._both:
            optimizer.zero_grad(set_to_none=True)

    def step(
        self, metrics: Mapping[str, Tensor] | None = None, at: float | None = None
    ) -> tuple[dict[str, float], bool]:
        """Clip and apply the gradients. Returns numbers and whether the step was taken.

        The numbers are those of `metrics` and the gradients' norm, "grad_norm", read from the device at once.
        `at` is the place in the schedule, of `total_steps`, where that is not the number of steps taken. A
        non-finite gradient (a non-finite loss makes one) leaves the weights as they are. Raises RoveError
        after more than `max_bad_steps` of them in a row.
        """
        norm = self._clip(self.parameters)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        read = {**(metrics or {}), "grad_norm": norm}
        numbers = torch.stack([value.double() for value in read.values()])
        read = dict(zip(read, transfer.to(numbers, "cpu").tolist(), strict=True))
        taken = math.isfinite(read["grad_norm"])
        if taken:
            factor = self._factor(at)
            self.last_lr = self.config.lr * factor
            self._return()
            for optimizer in self._both:
                for group in optimizer.param_groups:
                    group["lr"] = group["base_lr"] * factor
                optimizer.step()
            self.bad_streak = 0
        else:
            self.bad_streak += 1
            if self.bad_streak > self.max_bad_steps:
                raise RoveError(
                    f"{self.bad_streak} optimizer steps in a row, up to step {self.steps + 1}, had a loss or "
                    "gradient that is not finite and were skipped. Lower training.optim.lr, or look at the "
                    "last checkpoint's metrics."
                )
        self.steps += 1
        self.zero_grad()
        return read, taken

    def _ordered(self) -> list[nn.Parameter]:
        """Return the parameters in the order in which the saved state numbers them."""
        return [p for group in self.adamw.param_groups for p in group["params"]]

    def move(self, device: torch.device | str) -> None:
        """Move the moments to `device`; the next step moves them back to the device of their parameters."""
        for own in self.adamw.state.values():
            for name, value in own.items():
                if isinstance(value, torch.Tensor) and value.dim():
                    own[name] = value.to(device, non_blocking=True)

    def _return(self) -> None:
        for parameter, own in self.adamw.state.items():
            for name, value in own.items():
                if isinstance(value, torch.Tensor) and value.dim() and value.device != parameter.device:
                    own[name] = value.to(parameter.device, non_blocking=True)

    def _clip(self, parameters: Iterable[nn.Parameter]) -> torch.Tensor:
        return nn.utils.clip_grad_norm_(parameters, self.config.clip_grad, foreach=True)

    def _factor(self, at: float | None) -> float:
        place = self.steps if at is None or self.steps < self.config.warmup else max(at, self.config.warmup)
        return learning_rate_factor(place, self.total_steps, self.config)

    def check_weights(self) -> None:
        """Raise RoveError where a weight is not finite, or so large that their norm is not."""
        norm = nn.utils.get_total_norm([p.detach() for p in self.parameters], foreach=True)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not math.isfinite(norm.item()):
            raise RoveError(
                f"The weights are not finite after optimizer step {self.steps}; they are not saved. Lower "
                "training.optim.lr, and go on from the last checkpoint or start again."
            )

    def state_dict(self) -> dict:
        """Return moments and counters."""
        muon = {} if self.muon is None else {"muon": self.muon.state_dict()}
        counters = {"steps": self.steps, "bad_streak": self.bad_streak}
        return {"adamw": self.adamw.state_dict(), **muon, **counters}

    def load_state_dict(self, state: dict) -> None:
        """Restore the state that `state_dict` returned."""
        adamw = state["adamw"]
        # Saved whole: each moment is laid out as its parameter is here, on one device or over several.
        index = dict(enumerate(self._ordered()))
        moments = {
            number: {k: shard_like(v, index[number]) if v.dim() else v for k, v in own.items()}
            for number, own in adamw["state"].items()
        }
        self.adamw.load_state_dict({**adamw, "state": moments})
        if self.muon is not None:
            self.muon.load_state_dict(state["muon"])
        self.steps, self.bad_streak = state["steps"], state["bad_streak"]
