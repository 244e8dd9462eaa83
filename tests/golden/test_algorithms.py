"""Advantages and losses against a reference implementation's own answers, gradients included."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rove.algorithms.advantages import gae, group_relative, normalize
from rove.algorithms.losses import policy_loss, value_loss
from rove.algorithms.masking import episode_mask, per_chunk

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = (ROOT / os.environ.get("ROVE_GOLDEN", "../shared/golden")) / "algorithms.npz"
pytestmark = pytest.mark.skipif(
    not GOLDEN.exists(), reason=f"no golden data: {GOLDEN} does not exist; point ROVE_GOLDEN at its folder"
)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with np.load(GOLDEN, allow_pickle=False) as file:
        return {name: torch.from_numpy(np.asarray(file[name])) for name in file}


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=1e-5, atol=1e-5)


def test_episode_mask(golden: dict[str, Tensor]) -> None:
    mask, length = episode_mask(golden["done"])
    assert torch.equal(mask, golden["mask"])
    assert torch.equal(length, golden["episode_length"])


@pytest.mark.parametrize("level", ["action", "chunk"])
def test_gae(golden: dict[str, Tensor], level: str) -> None:
    mask = golden["mask"] if level == "action" else per_chunk(golden["mask"])
    advantage, returns = gae(
        golden["reward"], golden[f"values_{level}"], golden["done"], gamma=0.97, lam=0.9, level=level
    )
    close(advantage, golden[f"gae_{level}_adv_raw"])
    close(returns, golden[f"gae_{level}_ret"])
    close(normalize(advantage, mask), golden[f"gae_{level}_adv_norm"])


def test_gae_of_several_episodes_in_a_row(golden: dict[str, Tensor]) -> None:
    advantage, returns = gae(
        golden["reward"], golden["values_action"], golden["stream_done"], gamma=0.97, lam=0.9
    )
    close(advantage, golden["stream_gae_adv"])
    close(returns, golden["stream_gae_ret"])


def test_group_relative(golden: dict[str, Tensor]) -> None:
    score = (golden["sparse_reward"] * golden["mask"]).sum((0, 2))
    advantage = group_relative(score, int(golden["shape"][4]))
    close(advantage[None, :, None] * golden["mask"], golden["grpo_action_adv"])
    close(advantage[None, :, None] * per_chunk(golden["mask"]), golden["grpo_chunk_adv"])


@pytest.mark.parametrize("dual", [None, 3.0], ids=["plain", "dual"])
@pytest.mark.parametrize("form", ["masked", "lengthnorm"])
@pytest.mark.parametrize("level", ["token", "action", "chunk"])
def test_policy_loss(golden: dict[str, Tensor], level: str, form: str, dual: float | None) -> None:
    entry = "chunk" if level == "chunk" else "action"
    logprob = golden["logprob"].clone().requires_grad_()
    normalized = form == "lengthnorm"
    loss, _ = policy_loss(
        logprob,
        golden["old_logprob"],
        golden[f"adv_{entry}"],
        golden[f"mask_{entry}"],
        level=level,
        clip_low=0.2,
        clip_high=0.28,
        dual_clip=dual,
        episode_length=golden["mb_episode_length"] if normalized else None,
        horizon=int(golden["max_episode_steps"]) if normalized else None,
    )
    loss.backward()
    name = f"ppo_{level}_{form}_{'plain' if dual is None else 'dual'}"
    close(loss.detach(), golden[name])
    close(logprob.grad, golden[f"{name}_grad"])


def test_value_loss(golden: dict[str, Tensor]) -> None:
    value = golden["value"].clone().requires_grad_()
    loss, _ = value_loss(
        value, golden["old_value"], golden["ret"], golden["mask_action"], clip=0.2, huber_delta=1.0
    )
    loss.backward()
    close(loss.detach(), golden["critic"])
    close(value.grad, golden["critic_grad"])
