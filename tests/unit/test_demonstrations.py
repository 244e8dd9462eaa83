"""Demonstrations and grounding: kept whole on disk, and true of the scenes they were made in."""

from contextlib import closing

import numpy as np
import pytest
import torch

from rove.config.schema import TabletopConfig
from rove.envs import registry
from rove.errors import RoveError
from rove.evaluation.report import tally
from rove.policies.openvla import bins
from rove.training.demonstrations import (
    collect_demonstrations,
    collect_grounding_images,
    dataset_statistics,
    load_demonstrations,
    save_demonstrations,
)
from rove.types import Demonstrations


@pytest.fixture(scope="module")
def env():
    config = TabletopConfig(tasks="pick/red_cube,put/yellow_cube/black_tray")
    with closing(registry.make(config, num_envs=8, chunk=8, autoreset="refill")) as made:
        yield made


def test_demonstrations_are_successes_and_survive_the_disk(env, tmp_path):
    told = []
    made = collect_demonstrations(env, episodes=6, noise=0.05, seed=3, on_episode=told.append)
    assert sum(record.success for record in told) == 6 <= len(told)
    assert f"{6 / len(told):.1%}".replace("%", " %") in tally(told).splitlines()[-1]
    assert made.mask[:, 0].all(), "a chunk of which nothing was executed"
    assert len(made.instruction) == len(made.actions) == len(made.frame)
    low, high = torch.tensor(env.action_spec.low), torch.tensor(env.action_spec.high)
    assert ((made.actions >= low - 1e-6) & (made.actions <= high + 1e-6)).all()
    save_demonstrations(made, tmp_path / "d.npz")
    again = load_demonstrations(tmp_path / "d.npz")
    assert again.instruction == made.instruction
    for name in ("images", "frame", "actions", "mask", "state"):
        assert torch.equal(getattr(again, name), getattr(made, name))
    found = dataset_statistics(made)
    assert len(found["proprio"]["mean"]) == made.state.shape[1]
    for spread in found.values():
        assert np.all(np.array(spread["q01"]) <= np.array(spread["q99"]))


def test_rows_show_as_many_actions_as_a_policy_predicts(env):
    """20 actions from each chunk of 8 on: its own, the next ones', and none beyond the episode's end."""
    made, longer = (
        collect_demonstrations(env, episodes=6, noise=0.05, seed=3, horizon=h) for h in (None, 20)
    )
    assert longer.actions.shape == (len(made), 20, env.action_spec.dim) and longer.mask.shape == (
        len(made),
        20,
    )
    assert torch.equal(longer.actions[:, :8], made.actions) and torch.equal(longer.mask[:, :8], made.mask)
    assert torch.equal(longer.images, made.images)
    whole = longer.mask[:, 8]  # the episode goes on after the row's own chunk
    assert whole.any() and not whole.all() and not whole[-1]
    following = whole.nonzero().squeeze(1) + 1
    assert torch.equal(longer.actions[whole, 8:16], made.actions[following])
    assert torch.equal(longer.mask[whole, 8:16], made.mask[following])
    assert not longer.mask[~whole, 8:].any()
    assert (longer.mask.long().diff(dim=1) <= 0).all(), "nothing follows what is not there"
    assert dataset_statistics(longer, 8) == dataset_statistics(made)


def test_rows_end_before_a_miss(env):
    made = collect_demonstrations(env, episodes=20, noise=0.05, slips=0.5, seed=3, horizon=32)
    plain = collect_demonstrations(env, episodes=20, noise=0.05, slips=0.5, seed=3)
    assert torch.equal(made.actions[:, :8], plain.actions) and torch.equal(made.mask[:, :8], plain.mask)
    assert made.mask[:, 0].all() and (made.mask.long().diff(dim=1) <= 0).all()
    # An episode is seldom over after a chunk that was whole and is followed by nothing: a miss came next.
    assert (plain.mask.all(1) & ~made.mask[:, 8]).any()


def test_what_follows_a_slip_shows_how_to_try_again(env):
    """A closed hand with nothing in it: only an expert that has missed is seen so, and it opens."""

    def empty_handed(slips):
        made = collect_demonstrations(env, episodes=40, noise=0.05, slips=slips, seed=3)
        return made, made.state[:, 4] < 0.01

    made, empty = empty_handed(0.5)
    assert not empty_handed(0.0)[1].any()
    assert empty.sum() >= 3
    assert (made.actions[empty, 0, 4] > 0).float().mean() > 0.9, "the hand stays closed"
    assert made.mask[:, 0].all()


def test_the_same_seed_demonstrates_the_same(env):
    one, two, other = (collect_demonstrations(env, episodes=4, noise=0.05, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.actions, two.actions) and torch.equal(one.images, two.images)
    assert not torch.equal(one.actions[:2], other.actions[:2])


def test_a_file_of_something_else_is_refused(tmp_path):
    np.savez(tmp_path / "x.npz", images=np.zeros(1))
    with pytest.raises(RoveError, match="not a demonstration file: it lacks actions"):
        load_demonstrations(tmp_path / "x.npz")


def test_a_file_of_which_a_bit_has_changed_is_refused_or_the_same(tmp_path):
    rows = torch.arange(8)
    made = Demonstrations(
        torch.zeros(8, 1, 4, 4, 3, dtype=torch.uint8),
        rows,
        ("go",) * 8,
        torch.ones(8, 2, 1),
        rows[:, None] > 3,
    )
    save_demonstrations(made, tmp_path / "d.npz", {"seed": 1})
    whole, said = (tmp_path / "d.npz").read_bytes(), []
    # Sizes and names at the end of the file may change so that it is another whole one.
    for place in range(whole.index(b"PK\1\2")):
        content = bytearray(whole)
        content[place] ^= 1 << place % 8
        (tmp_path / "d.npz").write_bytes(content)
        try:
            again = load_demonstrations(tmp_path / "d.npz")
        except RoveError as error:
            said.append(str(error))
        else:
            assert again.instruction == made.instruction and torch.equal(again.images, made.images)
            assert torch.equal(again.actions, made.actions) and torch.equal(again.mask, made.mask)
    assert len(said) > 100 and all("d.npz is damaged" in text for text in said)


def test_grounding_asks_for_tasks_of_all_families_but_none_held_out(env):
    made = collect_grounding_images(env, images=64, seed=5, on_image=lambda n: None)
    assert len(made.images) == 64 and made.frame.max() == 63 and not made.mask.any()
    said = " ".join(made.instruction)
    assert all(word in said for word in ("lift", "plate", "tray", "zone", "stack", "block"))
    asked = set(made.instruction)
    assert "pick up the purple cube" not in asked and asked & {"pick up the red cube", "lift the red cube"}


def test_an_environment_without_an_expert_says_so(env):
    class Bare:
        suite = env.suite

    with pytest.raises(RoveError, match="no scripted expert"):
        collect_demonstrations(Bare(), episodes=1, noise=0.0, seed=0)  # type: ignore[arg-type]
    with pytest.raises(RoveError, match=r"sft\.grounding"):
        collect_grounding_images(Bare(), images=1, seed=0, on_image=lambda n: None)  # type: ignore[arg-type]


def test_a_dimension_that_is_often_at_rest_has_a_bin_at_zero():
    generator = torch.Generator().manual_seed(0)
    actions = torch.rand(64, 8, 3, generator=generator) * torch.tensor([0.3, 0.3, 1.0]) - 0.1
    actions[..., 0] *= torch.rand(64, 8, generator=generator) > 0.5
    made = Demonstrations(
        images=torch.zeros(1, 1, 4, 4, 3, dtype=torch.uint8),
        frame=torch.zeros(64, dtype=torch.long),
        instruction=("go",) * 64,
        actions=actions,
        mask=torch.ones(64, 8, dtype=torch.bool),
    )
    plain, centred = (dataset_statistics(made, zero_centred=flag)["action"] for flag in (False, True))
    assert plain["q01"][0] != -plain["q99"][0]
    assert centred["q99"][0] == -centred["q01"][0] == max(abs(plain["q01"][0]), abs(plain["q99"][0]))
    assert [centred[name][1:] for name in ("q01", "q99")] == [plain[name][1:] for name in ("q01", "q99")]
    normalizer = bins.Normalizer(centred)
    assert normalizer.centred.tolist() == [True, False, False]
    tokens = bins.tokenize(normalizer.normalize(torch.zeros(3)), 1000)
    back = normalizer.unnormalize(bins.detokenize(tokens, 1000))
    assert back[0] == 0
    assert (back[1:] != 0).all()
    assert tokens[0] - (1000 - bins.BINS) == bins.ZERO


def test_a_label_at_rest_is_spread_over_no_neighbour():
    logp = torch.randn(2, 4, 256, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    column = torch.tensor([bins.ZERO, bins.ZERO, 5, bins.ZERO + 1]).expand(2, -1)[..., None]
    rests = torch.tensor([True, False, True, True])[:, None] & (column == bins.ZERO)
    found, spread = bins.smooth(logp, column, 3.0, rests), bins.smooth(logp, column, 3.0)
    assert torch.equal(found[:, 0], logp.gather(-1, column)[:, 0])
    assert torch.equal(found[:, 1:], spread[:, 1:])
