"""A class that cannot serve as a policy is refused when it is loaded, with the fix."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from rove import recipes
from rove.config.validate import validate
from rove.errors import RoveError
from rove.policies import registry
from rove.policies.base import Locator, Policy, SamplingNoise, TokenPolicy


def test_a_method_that_lacks_a_parameter_is_refused_where_it_is_defined():
    expected = (
        "Late.evaluate lacks temperature, smoothing, which Rove passes: write it as "
        "def evaluate(self, observation, tokens, /, temperature=None, smoothing=0.0)"
    )
    with pytest.raises(RoveError, match=re.escape(expected)):

        class Late(TokenPolicy):
            def evaluate(self, observation, tokens): ...


@pytest.mark.parametrize("lacking", ["noise", "samples"])
def test_an_act_that_lacks_a_parameter_is_refused(lacking):
    class Whole(Policy):
        def act(self, observation, mode, noise=None, samples=None): ...

    text = f"def act(self, observation, mode, {'samples' if lacking == 'noise' else 'noise'}=None): ..."
    made = {}
    exec(text, made)
    with pytest.raises(RoveError, match=f"act lacks {lacking}, which Rove passes"):
        type("Partial", (Whole,), {"act": made["act"]})


def test_a_parameter_that_rove_does_not_pass_is_refused_without_a_default():
    with pytest.raises(RoveError, match="tokenize needs scale, which Rove does not pass"):

        class Scaled(TokenPolicy):
            def tokenize(self, actions, scale): ...

    class More(TokenPolicy):
        def tokenize(self, actions, scale=1.0): ...

        def act(self, *args, **settings): ...


def test_a_checkpoint_is_read_from_a_path_of_any_name_onto_a_device():
    class Placed(Policy):
        @classmethod
        def from_pretrained(cls, directory, device="cpu"): ...

    with pytest.raises(RoveError, match="from_pretrained lacks device, which Rove passes"):

        class Fixed(Policy):
            @classmethod
            def from_pretrained(cls, directory): ...


def noise(rows, seed=3):
    return SamplingNoise(seed, torch.arange(rows) + 5, torch.arange(rows) % 4)


def test_noise_is_keyed_and_knows_no_batch():
    for draw in ("uniform", "normal"):
        of = {rows: getattr(noise(rows), draw)(9) for rows in (2, 6)}
        assert torch.equal(of[2], of[6][:2]) and of[2].dtype == torch.float64
        assert torch.equal(getattr(noise(6), draw)(4), of[6][:, :4])
        assert not torch.equal(getattr(noise(2, seed=4), draw)(9), of[2])
        one = SamplingNoise(3, torch.tensor([6]), torch.tensor([1]))
        assert torch.equal(getattr(one, draw)(9)[0], of[6][1])
    # The seeds of published runs stand for these numbers.
    expected = torch.tensor([[0.1330427852, 0.8029990726], [0.1206020169, 0.9208847276]], dtype=torch.float64)
    torch.testing.assert_close(noise(2).uniform(2), expected, atol=1e-7, rtol=0)


def test_normal_noise_is_normal_and_independent_of_the_uniform():
    rows = SamplingNoise(0, torch.arange(400), torch.zeros(400, dtype=torch.long))
    x, u = rows.normal(100), rows.uniform(100)
    assert x.isfinite().all() and abs(x.mean()) < 0.02 and abs(x.std() - 1) < 0.02
    assert abs((x**3).mean()) < 0.06 and abs((x**4).mean() - 3) < 0.15
    for a, b in ((x, u), (x[:, 1:], x[:, :-1]), (x[1:], x[:-1])):
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.02


class Untaught(Policy):
    """It acts, and cannot be imitated into anything."""

    def act(self, observation, mode, noise=None, samples=None): ...

    def evaluate(self, observation, sample): ...

    def save_pretrained(self, directory): ...

    @classmethod
    def build(cls, config, **settings): ...

    @classmethod
    def from_pretrained(cls, path, *, device="cpu"): ...


def test_a_policy_that_cannot_be_imitated_is_not_warmed_up(monkeypatch):
    monkeypatch.setattr(registry, "_ENTRY_POINTS", dict(registry._ENTRY_POINTS))
    registry.register("untaught", f"{__name__}:Untaught")
    run = recipes.get("tabletop_grpo").build()
    with pytest.raises(RoveError, match=r"Untaught cannot learn from demonstrations: set --sft none"):
        registry.check(replace(run, policy=replace(run.policy, kind="untaught")))
    registry.check(replace(run, sft=None, policy=replace(run.policy, kind="untaught")))


def test_the_signatures_of_abilities_are_checked_too():
    with pytest.raises(RoveError, match=r"point lacks observation.*def point\(self, observation\)"):

        class Blind(Locator):
            def point(self): ...


class Unfinished(Policy):
    def act(self, observation, mode, noise=None, samples=None): ...

    @classmethod
    def build(cls, config, **settings): ...


class Module(torch.nn.Module):
    """It has nothing of a policy."""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Unfinished", "lacks evaluate, from_pretrained, save_pretrained: write them"),
        ("Module", "derive it from rove.policies.base.Policy"),
    ],
)
def test_a_class_that_is_not_a_whole_policy_is_refused_when_it_is_looked_up(name, message, monkeypatch):
    monkeypatch.setattr(registry, "_ENTRY_POINTS", dict(registry._ENTRY_POINTS))
    registry.register(name, f"{__name__}:{name}")
    run = recipes.get("tabletop_grpo").build()
    with pytest.raises(RoveError, match=message):
        registry.check(replace(run, policy=replace(run.policy, kind=name)))


def test_a_policy_from_scratch_without_pointers_is_not_grounded():
    run = recipes.get("tabletop_grpo").build()
    registry.check(run)
    run = replace(run, policy=replace(run.policy, pointers=0))
    validate(run)
    with pytest.raises(RoveError, match=r"set policy\.pointers, or sft\.grounding to 0"):
        registry.check(run)
