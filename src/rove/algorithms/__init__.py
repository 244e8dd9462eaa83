"""Reinforcement learning as pure functions on tensors, which import torch and, of Rove, `rove.types` alone.

`ppo.py`, `grpo.py` and `vine.py` say which functions, in what order; each is an `Algorithm`.
"""

from rove.algorithms.registry import Algorithm, get, register

__all__ = ["Algorithm", "get", "register"]
