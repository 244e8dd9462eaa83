"""Overrides, and the JSON round trip."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Literal

import pytest

from rove.config import load as config
from rove.config.schema import GRPO, PPO, Run, SFTConfig, TowerConfig, ValueHeadConfig
from rove.errors import RoveError

RUN = Run(name="test", algorithm=GRPO())


def test_import_needs_the_standard_library_only():
    code = (
        "import sys, rove.config.load, rove.config.validate, rove.recipes; rove.recipes.all();"
        "heavy = {'torch', 'numpy', 'ray', 'mujoco', 'transformers', 'rich'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("words", "read", "expected"),
    [
        (["--rollout.num_envs", "32"], lambda r: r.rollout.num_envs, 32),
        (["--rollout.num_envs=32"], lambda r: r.rollout.num_envs, 32),
        (["--seed", "1_000"], lambda r: r.seed, 1000),
        (["--name", "3"], lambda r: r.name, "3"),
        (["--policy.temperature", "2"], lambda r: r.policy.temperature, 2.0),
        (["--policy.temperature", ".5"], lambda r: r.policy.temperature, 0.5),
        (["--sft.optim.weight_decay", "1e-3"], lambda r: r.sft.optim.weight_decay, 1e-3),
        (["--training.optim.betas", "0.8,0.9"], lambda r: r.training.optim.betas, (0.8, 0.9)),
        (
            ["--training.freeze", "vlm.towers, vlm.film"],
            lambda r: r.training.freeze,
            ("vlm.towers", "vlm.film"),
        ),
        (["--training.freeze", ""], lambda r: r.training.freeze, ()),
        (["--training.optim.schedule", "cosine"], lambda r: r.training.optim.schedule, "cosine"),
        (["--training.max_minutes", "8"], lambda r: r.training.max_minutes, 8.0),
        (["--policy.checkpoint", "a/b.c"], lambda r: r.policy.checkpoint, "a/b.c"),
        (["--logging.wandb", "True"], lambda r: r.logging.wandb, True),
        (["--algorithm.dual_clip", "3"], lambda r: r.algorithm.dual_clip, 3.0),
        (["--sft", "none"], lambda r: r.sft, None),
        (["--policy.value_head", "{}"], lambda r: r.policy.value_head, ValueHeadConfig()),
        (["--policy.value_head.hidden", "64"], lambda r: r.policy.value_head, ValueHeadConfig(hidden=(64,))),
        (["--policy.value_head.hidden", "64,32"], lambda r: r.policy.value_head.hidden, (64, 32)),
        (["--policy.towers.0.width", "64"], lambda r: r.policy.towers, (TowerConfig(width=64),)),
        (
            ["--policy.towers", '[{"kind": "dinov2"}, {"width": 64}]'],
            lambda r: r.policy.towers,
            (TowerConfig(kind="dinov2"), TowerConfig(width=64)),
        ),
        (["--algorithm.kind", "ppo"], lambda r: r.algorithm, PPO()),
        (
            ["--algorithm.kind", "grpo", "--algorithm.kl_coef", "0.1"],
            lambda r: r.algorithm,
            GRPO(kl_coef=0.1),
        ),
        (["--algorithm.lam", "0.9", "--algorithm.kind", "ppo"], lambda r: r.algorithm, PPO(lam=0.9)),
        (["--seed", "1", "--seed", "2"], lambda r: r.seed, 2),
    ],
)
def test_apply(words, read, expected):
    changed = config.apply(RUN, words)
    assert read(changed) == expected
    assert type(read(changed)) is type(expected)
    assert RUN == Run(name="test", algorithm=GRPO())


def test_choosing_the_same_variant_keeps_its_values():
    run = replace(RUN, algorithm=GRPO(group_size=4))
    assert config.apply(run, ["--algorithm.kind", "grpo"]) == run


def test_an_unset_optional_section_starts_from_its_defaults():
    run = config.apply(replace(RUN, sft=None), ["--sft.steps", "10"])
    assert run.sft == replace(SFTConfig(), steps=10)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_envs", "32"], "--rollout.num_envs or --evaluation.num_envs"),
        (["--rollout.num_env", "32"], "Did you mean --rollout.num_envs"),
        (["--rolout.chunk", "8"], "Did you mean --rollout.chunk"),
        (["--group_size", "4"], "Did you mean --algorithm.group_size"),
        (["--gruop_size", "4"], "Did you mean --algorithm.group_size"),
        (["--xyzzy", "1"], "Sections: name, algorithm"),
        (["--policy.towers.1.width", "8"], "Did you mean --policy.towers.0.width"),
        (["--policy.towers.x.width", "8"], "Did you mean --policy.towers.0.width"),
        (["--seed.x", "8"], "Unknown setting --seed.x"),
        (["--algorithm.lam", "0.9"], "with --algorithm.kind ppo only.*algorithm is 'grpo'"),
        (["--algorithm.kind", "pppo"], "Did you mean 'ppo'"),
        (["--policy.decoding", "paralel"], "policy.decoding = 'paralel'. Did you mean 'parallel'"),
        (["--rollout.num_envs", "many"], "rollout.num_envs = 'many': expected an integer"),
        (["--rollout.num_envs", "3.5"], "expected an integer"),
        (["--rollout.num_envs", "true"], "expected an integer"),
        (["--rollout.num_envs", "none"], "rollout.num_envs = None: expected an integer"),
        (["--policy.temperature", "nan"], "expected a finite number"),
        (["--policy.temperature", "1e999"], "expected a finite number"),
        (["--training.max_minutes", "soon"], "expected a finite number or none"),
        (["--logging.wandb", "1"], "expected true or false"),
        (["--training.optim.betas", "0.9"], "expected 2 values separated by commas, each a finite number"),
        (
            ["--policy.value_head.hidden", "64,x"],
            "policy.value_head.hidden = .*expected any number of values",
        ),
        (["--algorithm", "ppo"], "a section; set its keys, e.g. algorithm.kind"),
        (
            ["--policy.towers", '[{"widht": 64}]'],
            "policy.towers.0.widht is not a setting. Did you mean 'width'",
        ),
        (["--seed"], "--seed needs a value"),
        (["--seed", "--name", "x"], "--seed needs a value"),
        (["seed", "3"], "Unexpected argument 'seed'"),
    ],
)
def test_apply_refuses(words, message):
    with pytest.raises(RoveError, match=message):
        config.apply(RUN, words)


def test_a_key_of_the_other_variant_is_refused_under_ppo(monkeypatch):
    # Without an algorithm of one's own, such as a documented one that another test has imported.
    monkeypatch.setattr(config, "_extra", {})
    with pytest.raises(RoveError, match="--algorithm.group_size is read with --algorithm.kind grpo only"):
        config.apply(replace(RUN, algorithm=PPO()), ["--algorithm.group_size", "4"])


@pytest.mark.parametrize(
    "run",
    [
        RUN,
        Run(name="x", algorithm=PPO(dual_clip=3.0, lam=0.1 + 0.2), sft=None),
        config.apply(RUN, ["--policy.value_head.hidden", "64,32", "--policy.towers.0.kind", "dinov2"]),
    ],
)
def test_round_trip_is_exact(run, tmp_path):
    config.save(run, tmp_path / "run.json")
    assert config.load(tmp_path / "run.json") == run


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.update(sede=1), "sede is not a setting. Did you mean 'seed'"),
        (lambda d: d["algorithm"].update(kind="gropo"), "algorithm.kind = 'gropo'. Did you mean 'grpo'"),
        (lambda d: d["algorithm"].update(gamma=0.9), "algorithm.gamma is not a setting"),
        (lambda d: d["algorithm"].pop("kind"), "algorithm.kind = None"),
        (lambda d: d["rollout"].update(chunk="8"), "rollout.chunk = '8': expected an integer"),
        (lambda d: d.pop("name"), "name is missing: expected text"),
        (lambda d: d.update(rollout=3), "rollout = 3: a section"),
        (lambda d: d["env"].update(kind="libro"), "env.kind = 'libro'"),
    ],
)
def test_load_refuses(edit, message, tmp_path):
    data = config.to_dict(RUN)
    edit(data)
    (tmp_path / "run.json").write_text(json.dumps(data))
    with pytest.raises(RoveError, match=message):
        config.load(tmp_path / "run.json")


def test_load_names_a_missing_or_broken_file(tmp_path):
    with pytest.raises(RoveError, match="No run configuration at"):
        config.load(tmp_path / "run.json")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RoveError, match="is not valid JSON"):
        config.load(tmp_path / "run.json")


@dataclass(frozen=True, slots=True)
class LineConfig:
    kind: Literal["line"] = "line"
    tasks: str = "all"
    horizon: int = 16


def suite(settings):
    return "suite of", settings


class LineRoom:
    suite = staticmethod(suite)


def test_a_registered_variant_is_overridden_saved_and_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(config, "_extra", {})
    with pytest.raises(RoveError, match="env.kind = 'line'"):
        config.apply(RUN, ["--env.kind", "line"])
    config.register("env", LineConfig)
    run = config.apply(RUN, ["--env.horizon", "8", "--env.kind", "line"])
    assert run.env == LineConfig(horizon=8)
    config.save(run, tmp_path / "run.json")
    assert config.load(tmp_path / "run.json") == run


@pytest.mark.parametrize("entry_point", [__name__, f"{__name__}:LineRoom"])
def test_an_environment_is_registered_once(monkeypatch, entry_point):
    from rove.envs import registry

    monkeypatch.setattr(config, "_extra", {})
    monkeypatch.setattr(registry, "_ENTRY_POINTS", dict(registry._ENTRY_POINTS))
    monkeypatch.setattr(registry, "repeat", lambda function, *args: None)
    for _ in range(2):
        registry.register(LineConfig, entry_point)
    assert config._extra == {"env": [LineConfig]}
    line = config.apply(RUN, ["--env.kind", "line"]).env
    assert registry.suite(line) == ("suite of", line)
    with pytest.raises(RoveError, match="'line' is already registered as"):
        registry.register(LineConfig, "another.module")


def test_a_variant_without_a_tag_cannot_be_registered():
    with pytest.raises(RoveError, match="SFTConfig needs to be a dataclass with a `kind"):
        config.register("env", SFTConfig)
