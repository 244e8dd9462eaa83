"""Compute and memory traffic of acting and training, counted from sizes before anything is loaded."""

from __future__ import annotations

from rove.config.schema import Run
from rove.policies.base import Work
from rove.policies.openvla.memory import ChunkMemory, skeleton


def count_work(run: Run) -> Work:
    """Count the matrix products of layers and attention of `run`'s policy; the rest is small beside them."""
    policy = skeleton(run)
    text, towers = ChunkMemory(policy, views=1, half=True).layers()
    forward = sum(
        2.0 * depth * tokens * ((4 * width + (3 if layer is text else 2) * mlp) * width + 2 * tokens * width)
        for layer in (text, *towers)
        for tokens, width, mlp, depth in (layer,)
    )
    parameters = list(policy.parameters())
    trained = [p for p in parameters if p.requires_grad]
    # Backward, gradients of activations cost as much as the forward pass, those of weights as much again.
    everything = run.policy.lora is None
    passes = (3 if everything else 2) + run.training.gradient_checkpointing
    serial = policy.chunk * policy.action_spec.dim if policy.decoding == "autoregressive" else 1
    return Work(
        forward=forward,
        training=passes * forward,
        weights=float(sum(p.numel() * p.element_size() for p in parameters)),
        passes=serial,
        published=float(sum(p.numel() * p.element_size() for p in trained)),
    )
