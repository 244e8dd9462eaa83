"""Every example is loaded as a user would load it, and does what docs/extending.md says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rove import algorithms, recipes
from rove.cli import COMMANDS
from rove.config import load
from rove.config.validate import validate
from rove.envs import registry as envs
from rove.envs.base import Demonstrator
from rove.errors import RoveError
from rove.policies import registry as policies
from rove.policies.base import SamplingNoise
from rove.testing import check_env
from rove.train import train
from rove.training.demonstrations import collect_demonstrations
from rove.types import EpisodeSpec, Observation, PolicyOutput, TrainBatch

ROOT = Path(__file__).resolve().parents[2]


def test_the_recipe_in_the_documentation(tmp_path):
    text = (ROOT / "docs" / "extending.md").read_text()
    block = next(b for b in text.split("```")[1::2] if b.startswith("python") and "@recipe" in b)
    (tmp_path / "documented_recipe.py").write_text(block.removeprefix("python"))
    run = recipes.get(f"{tmp_path / 'documented_recipe.py'}:patient").build()
    validate(run)
    assert run.algorithm.gamma == 0.999


def test_links_and_commands_in_the_documentation_are_real():
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text()
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
        for command in re.findall(r"^rove (\S+)", text, flags=re.MULTILINE):
            assert command in COMMANDS
    assert "make demo" in "".join((ROOT / "README.md").read_text().splitlines()[:30])


def example(name: str, recipe: str):
    """The recipe's run, and the module it lives in."""
    run = recipes.get(f"{ROOT / 'examples' / name}.py:{recipe}").build()
    validate(run)
    return run, sys.modules[name]


@pytest.fixture(scope="module")
def observation():
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (6, 1, 64, 64, 3), dtype=torch.uint8, generator=generator)
    return Observation(images, ("put the red cube on the blue plate", "unheard of", "") * 2)


def test_the_environment_keeps_the_contract(tmp_path):
    run, _ = example("environment", "reach")
    load.save(run, tmp_path / "run.json")
    assert load.load(tmp_path / "run.json") == run
    results = check_env(
        lambda num_envs, autoreset: envs.make(run.env, num_envs=num_envs, chunk=4, autoreset=autoreset)
    )
    assert results
    assert not [result for result in results if not result.ok]


def test_the_environment_has_an_expert():
    run, _ = example("environment", "reach")
    env = envs.make(run.env, num_envs=4, chunk=6, autoreset="stop")
    assert isinstance(env, Demonstrator)
    states = env.suite.initial_states("left", "train")
    env.reset([EpisodeSpec(task, states[i]) for i, task in enumerate(("left", "right") * 2)])
    _, result = env.step_expert_chunk(0.3, np.random.default_rng(0))
    assert [record.success for record in result.finished] == [True] * 4
    with pytest.raises(RoveError, match=r"cannot miss; set sft\.slips to 0"):
        collect_demonstrations(env, episodes=1, noise=0.0, slips=0.1, seed=0)


@pytest.fixture
def small():
    run, module = example("policy", "tabletop_small")
    spec = module.ActionSpec(("x", "gripper"), ("m", "1"), (-0.1, -1.0), (0.1, 1.0))
    words = ("put", "red", "cube")
    return policies.build(
        run.policy, chunk=4, action_spec=spec, image_size=64, vocabulary=words, statistics=None, seed=3
    )


def test_the_policy_acts_and_evaluates_alike(small, observation):
    noise = SamplingNoise(0, torch.arange(6), torch.zeros(6, dtype=torch.long))
    for mode in ("sample", "greedy"):
        chunk = small.act(observation, mode, noise)
        torch.testing.assert_close(small.evaluate(observation, chunk.sample).logprob, chunk.logprob)
        assert torch.equal(small.tokenize(chunk.actions), chunk.sample)
    assert not torch.equal(small.act(observation, "sample", noise).sample, chunk.sample)


def test_the_policy_draws_several_chunks_from_a_row(small, observation):
    noise = SamplingNoise(0, torch.arange(6), torch.zeros(6, dtype=torch.long))
    several, one = small.act(observation, "sample", noise, samples=3), small.act(observation, "sample", noise)
    assert several.actions.shape == (6, 3, 4, 2)
    assert torch.equal(several.sample[:, 0], one.sample)
    evaluated = small.evaluate(observation, several.sample)
    torch.testing.assert_close(evaluated.logprob, several.logprob)
    assert evaluated.entropy.shape == several.sample.shape


def test_the_policy_spreads_a_label_over_neighbouring_bins(small, observation):
    tokens = torch.full((6, 4, 2), 9)
    sharp = small.evaluate(observation, tokens, temperature=0.5, smoothing=1e-3).logprob
    torch.testing.assert_close(sharp, small.evaluate(observation, tokens, temperature=0.5).logprob)
    wide = small.evaluate(observation, tokens, smoothing=1e6).logprob
    every = [small.evaluate(observation, torch.full_like(tokens, i)).logprob for i in range(32)]
    torch.testing.assert_close(wide, torch.stack(every).mean(0))


def test_the_policy_trains_by_its_headline_command(tmp_path):
    text = (ROOT / "examples" / "policy.py").read_text()
    command = next(line.split() for line in text.splitlines() if line.startswith("    rove "))
    short = {
        "output": tmp_path,
        "sft.episodes": 12,
        "sft.steps": 60,
        "rollout.num_envs": 16,
        "training.iterations": 1,
        "training.optim.warmup": 0,
        "evaluation.every": 0,
        "evaluation.episodes": 8,
        "evaluation.variant_episodes": 0,
    }
    settings = [word for key, value in short.items() for word in (f"--{key}", str(value))]
    rove = [sys.executable, "-c", "import sys; from rove.cli import main; sys.exit(main())"]
    ran = subprocess.run(
        [*rove, *command[1:], *settings], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert (tmp_path / "tabletop_small" / "report.html").is_file()
    run, module = example("policy", "tabletop_small")
    trained = policies.load(tmp_path / "tabletop_small" / "sft")
    assert isinstance(trained, module.SmallPolicy)
    assert trained.chunk == run.rollout.chunk


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        ({"sft.grounding": "100", "sft.grounding_steps": "100"}, "--sft.grounding 0 --sft.grounding_steps 0"),
        (
            {"algorithm.kind": "ppo", "policy.value_head.level": "action", "env.reward": "shaped"},
            "--policy.value_head none",
        ),
    ],
)
def test_what_the_policy_cannot_do_is_refused_before_anything_is_made(settings, fix, tmp_path):
    run, _ = example("policy", "tabletop_small")
    run = load.apply(run, [f"--{key}={value}" for key, value in settings.items()])
    validate(run)
    with pytest.raises(RoveError, match=fix):
        train(run, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_policy_survives_its_checkpoint(small, observation, tmp_path):
    small.save_pretrained(tmp_path / "saved")
    read = policies.load(tmp_path / "saved")
    assert torch.equal(read.act(observation, "greedy").logprob, small.act(observation, "greedy").logprob)


def test_the_algorithm_weighs_log_probabilities_by_advantage(observation):
    run, _ = example("algorithm", "tabletop_reinforce")
    algorithm = algorithms.get(run.algorithm.kind)
    logprob = torch.full((6, 2, 1), -0.5, requires_grad=True)
    batch = TrainBatch(
        observation=observation,
        sample=torch.zeros(6, 2, 1, dtype=torch.long),
        logprob=logprob.detach(),
        advantage=torch.tensor([1.0, -1.0, 2.0, 0.0, 0.0, 0.0])[:, None],
        mask=torch.ones(6, 2, dtype=torch.bool),
        returns=None,
        value=None,
        episode_length=None,
    )
    loss, _ = algorithm.loss(
        PolicyOutput(logprob, torch.zeros_like(logprob), None),
        batch,
        run.algorithm,
        denominator=12.0,
        value_denominator=12.0,
        reference=None,
    )
    loss.backward()
    assert logprob.grad is not None
    torch.testing.assert_close(logprob.grad[:, 0, 0], -batch.advantage[:, 0] / 12)
