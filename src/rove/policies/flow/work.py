"""Compute and memory traffic of acting and training, counted from sizes before anything is loaded."""

from __future__ import annotations

from rove.config.schema import Run
from rove.policies.base import Work
from rove.policies.flow.memory import Row, skeleton


def count_work(run: Run) -> Work:
    """Count the matrix products of layers and attention of `run`'s policy; the rest is small beside them."""
    policy = skeleton(run)
    row = Row(policy, half=True, expert_half=True)
    vision, text, expert = (part.flops for part in row.stacks)
    tower, language = row.trained()
    # Backward, gradients of activations cost as much as the forward pass, those of weights as much again.
    grown = (3 if run.policy.lora is None else 2) + run.training.gradient_checkpointing
    training = vision * (grown if tower else 1) + text * (grown if language else 1)
    parameters = list(policy.parameters())
    steps = policy.sampling.steps
    return Work(
        forward=vision + text + steps * expert,
        training=training + row.passes * grown * expert,
        weights=float(sum(p.numel() * p.element_size() for p in parameters)),
        passes=1 + steps,
        published=float(sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)),
    )
