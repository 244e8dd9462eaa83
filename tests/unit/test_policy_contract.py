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
from rove.policies.base import Locator, Policy


def test_a_method_that_lacks_a_parameter_is_refused_where_it_is_defined():
    expected = (
        "Late.evaluate lacks temperature, smoothing, which Rove passes: write it as "
        "def evaluate(self, observation, tokens, temperature=None, smoothing=0.0)"
    )
    with pytest.raises(RoveError, match=re.escape(expected)):

        class Late(Policy):
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

        class Scaled(Policy):
            def tokenize(self, actions, scale): ...

    class More(Policy):
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


def test_the_signatures_of_abilities_are_checked_too():
    with pytest.raises(RoveError, match=r"point lacks observation.*def point\(self, observation\)"):

        class Blind(Locator):
            def point(self): ...


class Unfinished(Policy):
    def act(self, observation, mode, noise=None, samples=None): ...

    def tokenize(self, actions): ...

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
