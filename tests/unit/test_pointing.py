"""Pointing: points lie on what they name, and a policy learns to find it from the instruction."""

from contextlib import closing
from dataclasses import replace

import pytest
import torch
from torch import nn

from rove.config.schema import LlamaConfig, OptimConfig, PolicyConfig, SFTConfig, TabletopConfig, TowerConfig
from rove.envs import registry as envs
from rove.envs.tabletop.layout import RGB
from rove.errors import RoveError
from rove.policies import registry as policies
from rove.training.demonstrations import (
    collect_demonstrations,
    collect_grounding_images,
    join,
    load_demonstrations,
    save_demonstrations,
)
from rove.training.pointing import bilinear_targets, learn_to_point, pointed_at, pointing_loss, present
from rove.types import Observation

SMALL = PolicyConfig(
    towers=(TowerConfig(width=32, depth=3, heads=2, mlp=64),),
    llama=LlamaConfig(width=32, depth=2, heads=2, mlp=64),
    film=True,
    placeholders="learned",
    pointers=3,
)


@pytest.fixture(scope="module")
def env():
    config = TabletopConfig(tasks="pick/red_cube,put/yellow_cube/black_tray")
    with closing(envs.make(config, num_envs=16, chunk=4, autoreset="refill")) as made:
        yield made


@pytest.fixture(scope="module")
def pictures(env):
    return collect_grounding_images(env, images=192, seed=1, on_image=lambda n: None)


def build(env, config: PolicyConfig = SMALL):
    return policies.build(
        config,
        chunk=4,
        action_spec=env.action_spec,
        image_size=64,
        vocabulary=env.suite.vocabulary,
        statistics=None,
        seed=1,
    )


@pytest.fixture
def policy(env):
    return build(env)


@pytest.mark.parametrize(("role", "color"), [(0, "red"), (1, "cyan")])
def test_a_point_lies_on_what_it_names(pictures, role, color):
    """Most things are not hidden: their points are on pixels of their colour; of zones only the rim is."""
    named = [
        color in text.split()[:: 1 - 2 * role][: 6 - 2 * role] and not (role and "zone" in text)
        for text in pictures.instruction
    ]
    rows = torch.tensor(named) & present(pictures.points)[:, role]
    x, y = pictures.points[rows, role].round().long().unbind(-1)
    seen = pictures.images[pictures.frame[rows], 0, y, x].float() / 255
    off = (seen - torch.tensor(RGB[color])).norm(dim=-1)
    assert len(off) > 50 and (off < 0.35).float().mean() > 0.7


def test_pictures_show_the_hand_where_episodes_take_it(pictures):
    """Not at its start alone: what has only seen that finds neither hand nor object once it has moved."""
    hand = pictures.points[:, 2]
    assert (hand > -16).all() and (hand < 80).all()
    assert hand.std(0).min() > 8
    held = (pictures.points[:, 0] - hand).norm(dim=-1) < 2
    assert 0.02 < held.float().mean() < 0.2


def test_a_pick_has_no_destination_all_else_has(pictures):
    picks = ("pick up the", "lift the", "grab the", "take the")
    for text, there in zip(pictures.instruction, present(pictures.points).tolist(), strict=True):
        pick = text.startswith(picks) and not any(word in text for word in ("put", "place"))
        assert there == [True, not pick, True]


def test_demonstrations_know_their_points_and_keep_them_on_disk(env, tmp_path):
    made = collect_demonstrations(env, episodes=8, noise=0.05, seed=1)
    assert made.points is not None and made.points.shape == (len(made), 3, 2)
    assert ((made.points > 0) & (made.points < 64) | made.points.isnan()).all()
    for text, there in zip(made.instruction, (~made.points.isnan().any(-1)).tolist(), strict=True):
        assert there == [True, "tray" in text.split(), True]
    save_demonstrations(made, tmp_path / "d.npz")
    torch.testing.assert_close(load_demonstrations(tmp_path / "d.npz").points, made.points, equal_nan=True)


def test_spread_weights_give_the_point_back():
    points = 4 + 56 * torch.rand(50, 2, generator=torch.Generator().manual_seed(0))
    weight = bilinear_targets(points, size=64, side=8)
    centres = (torch.arange(8) + 0.5) * 8
    grid = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), -1).flatten(0, 1)
    torch.testing.assert_close(weight.sum(-1), torch.ones(50))
    torch.testing.assert_close(weight @ grid, points)


def _learn(policy: nn.Module, pictures, steps: int) -> float:
    losses: list[float] = []
    config = SFTConfig(
        batch=32, micro_batch=16, grounding=1, grounding_steps=steps, optim=OptimConfig(lr=3e-3, warmup=10)
    )
    learn_to_point(
        policy,
        pictures,
        config,
        1,
        max_bad_steps=0,
        on_step=lambda step, metrics: losses.append(metrics["pointing/loss"]),
    )
    return sum(losses[-10:]) / 10


def test_pointing_is_learned_from_the_instruction(policy, pictures):
    """One instruction for all bounds what pictures alone can say: with the right ones the loss goes below."""
    blind = replace(pictures, instruction=("lift the red cube",) * len(pictures))
    start = {name: value.clone() for name, value in policy.state_dict().items()}
    right = _learn(policy, pictures, steps=150)
    policy.load_state_dict(start)
    without = _learn(policy, blind, steps=150)
    assert right < without - 0.3


def test_word_order_decides_what_goes_where(policy, pictures):
    """FiLM alone reads the prompt here: as a bag of words it would point at the same places."""
    observation = Observation(
        pictures.images[:1].expand(2, -1, -1, -1, -1),
        ("stack the red cube on the blue cube", "stack the blue cube on the red cube"),
    )
    one, two = policy.point(observation)
    assert (one - two).abs().max() > 1e-3


def test_what_is_read_of_a_point_follows_the_picture(policy):
    """A peak between two patches is read as the place between them, with the robot's state beside it."""
    pointer = policy.vlm.pointer
    logits = torch.full((3, 3, 64), -20.0)
    logits[0, :, 27] = logits[1, :, 28] = logits[2, :, 27] = logits[2, :, 28] = 0.0
    seen = []
    pointer.projector.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    state = torch.rand(3, pointer.projector.fc1.in_features - 6)
    assert pointer(logits, state).shape == (3, 1, SMALL.llama.width)
    torch.testing.assert_close(seen[0][:, 6:], state)
    left, right, between = seen[0][:, :2]
    torch.testing.assert_close(between, (left + right) / 2)
    torch.testing.assert_close(right - left, torch.tensor([0.25, 0.0]))


def test_micro_batches_do_not_change_the_gradient(policy, env):
    """In demonstrations the number of points differs from row to row."""
    pictures = collect_demonstrations(env, episodes=24, noise=0.05, seed=1)
    rows = torch.arange(24)
    count = int(present(pictures.points[rows]).sum())
    assert 48 < count < 72
    grads = []
    for size in (24, 8):
        policy.zero_grad()
        for part in rows.split(size):
            pointing_loss(
                policy.point(pictures.observation(part)), pictures.points[part], 64, count
            ).backward()
        grads.append(policy.vlm.projector.fc1.weight.grad.clone())
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)


def test_a_second_picture_is_pointed_in_too(pictures, env):
    """By queries of its own: the second picture is the first, mirrored, and so are its points."""
    mirrored = pictures.points * torch.tensor([-1.0, 1.0]) + torch.tensor([64.0, 0.0])
    both = replace(
        pictures,
        images=torch.cat((pictures.images, pictures.images.flip(3)), dim=1),
        points=torch.cat((pictures.points, mirrored), dim=1),
    )
    policy = build(env, replace(SMALL, pointed=2))
    assert policy.vlm.pointer.queries.shape[0] == 6
    blind = replace(both, images=torch.cat((both.images[:, :1], torch.zeros_like(both.images[:, 1:])), dim=1))
    start = {name: value.clone() for name, value in policy.state_dict().items()}
    sees = _learn(policy, both, steps=150)
    seen = both.observation(torch.arange(8))
    moved = replace(seen, images=torch.cat((seen.images[:, :1], seen.images[:, 1:].roll(16, 3)), dim=1))
    first, second = (policy.point(moved) - policy.point(seen)).abs().amax((0, 2)).split(3)
    assert first.max() < 1e-5 < 0.1 < second.min(), "each picture's points are read in it alone"
    policy.load_state_dict(start)
    assert sees < _learn(policy, blind, steps=150) - 0.2
    with pytest.raises(RoveError, match=r"points in 2 pictures, the observation has 1"):
        policy.point(pictures.observation(torch.arange(2)))


def test_points_of_further_pictures_are_for_policies_that_point_in_them():
    """The first picture's come first, so that a policy that points in it alone learns what it always did."""
    points, logits = torch.rand(4, 6, 2), torch.zeros(4, 3, 64)
    assert torch.equal(pointed_at(points, logits), points[:, :3])
    assert torch.equal(pointed_at(points, logits.repeat(1, 2, 1)), points)


def test_demonstrations_from_before_further_pictures_were_pointed_in_are_joined(pictures):
    """What a finished warm-up learned from knows the first picture's points; a round of relabelling more."""
    further = replace(pictures, points=torch.cat((pictures.points, pictures.points + 1), dim=1))
    for parts in ((pictures, further), (further, pictures)):
        points = join(parts).points
        assert points is not None
        torch.testing.assert_close(points, pictures.points.repeat(2, 1, 1), equal_nan=True)
    assert join((further, further)).points.shape[1] == 6
    assert join((further, replace(pictures, points=None))).points is None


def test_what_cannot_be_learned_is_refused(policy, pictures):
    with pytest.raises(RoveError, match=r"sft\.grounding"):
        learn_to_point(policy, replace(pictures, points=None), SFTConfig(), 1, max_bad_steps=0)
    for known in (2, 4):
        with pytest.raises(RoveError, match=rf"3 pointers, the demonstrations say where {known} points are"):
            pointed_at(torch.zeros(4, known, 2), torch.zeros(4, 3, 64))
    policy.vlm.pointer = None
    with pytest.raises(RoveError, match=r"policy\.pointers"):
        policy.point(pictures.observation(torch.tensor([0])))
