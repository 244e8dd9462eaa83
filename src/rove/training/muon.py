"""Muon with an orthogonalisation that a CPU is quick at."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor


class Muon(torch.optim.Muon):
    """`torch.optim.Muon`, with matrices of one shape orthogonalised at once, quick on a CPU too.

    PyTorch does it one by one in bfloat16, for which most CPUs have no instructions: with matrices of
    128 x 128 that took nearly as long as the rest of a tiny policy's training step. Steps, state and groups
    are PyTorch's.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Take a step. There is no closure."""
        assert closure is None
        for group in self.param_groups:
            alike: dict[tuple[torch.Size, torch.device], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[parameter.shape, parameter.device].append(parameter)
            for (shape, _), parameters in alike.items():
                steps = torch.stack([self._averaged(parameter, group) for parameter in parameters])
                steps = orthogonalized(steps, group["ns_coefficients"], group["ns_steps"], group["eps"])
                length = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for parameter, towards in zip(parameters, steps, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(towards, alpha=-length)

    def _averaged(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """The gradient with Nesterov's momentum."""
        gradient, own = parameter.grad, self.state[parameter]
        assert gradient is not None
        if "momentum_buffer" not in own:
            own["momentum_buffer"] = torch.zeros_like(gradient)
        average = own["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        return gradient.lerp(average, group["momentum"])


def orthogonalized(
    matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """Matrices [n, r, c] with all of their singular values near 1, by `steps` of a Newton-Schulz iteration.

    The quintic one of Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks": after
    five steps singular values that were not close to zero are between 0.5 and 1.5. It is computed in
    bfloat16, by a CPU in float32 that is rounded to it.
    """
    a, b, c = coefficients
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices.bfloat16()
    x = x if wide else x.mT
    x = x / x.flatten(1).norm(dim=1).clamp_min(eps)[:, None, None]
    if matrices.device.type == "cpu":
        x = x.float()
    # Rounding is a part of PyTorch's steps, and so of ours: it fills the directions in which a gradient has
    # nothing, a fifth of the step's length for one of rank 32 in 128 dimensions, and 0.6 for one of rank 2.
    for _ in range(steps):
        gram = _rounded(x @ x.mT)
        gram = _rounded(torch.baddbmm(gram, gram, gram, beta=b, alpha=c))
        x = _rounded(torch.baddbmm(x, gram, x, beta=a))
    return x if wide else x.mT


def _rounded(x: Tensor) -> Tensor:
    """Round to numbers that bfloat16 has; what is in bfloat16 stays as it is."""
    return x.bfloat16().to(x.dtype)
