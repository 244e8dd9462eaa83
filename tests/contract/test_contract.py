"""Every registered environment that is installed keeps the VectorEnv contract, rule by rule."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import get_args

import pytest
from tests import maniskill

from rove.config import schema
from rove.envs import registry
from rove.testing.check import CHECKS, CheckResult, check_env

CONFIGS = {(config := kind()).kind: config for kind in get_args(schema.EnvConfig)} | {
    "maniskill": schema.ManiSkillConfig(image_size=48, horizon=6, workers=1),
    "maniskill_put_on_plate": schema.PutOnPlateConfig(image_size=48, horizon=6, workers=1),
}
# Two scenes, small pictures, and few actions.
CONFIGS["libero"] = schema.LiberoConfig(
    tasks="goal/turn_on_the_stove,object/pick_up_the_milk_and_place_it_in_the_basket",
    image_size=32,
    horizon=12,
    wait=2,
    reward="shaped",
)
CHUNK = 5  # divides no suite's horizon, so that episodes are truncated in mid-chunk


@cache
def results(kind: str) -> Mapping[str, CheckResult]:
    config = CONFIGS[kind]
    if kind.startswith("maniskill"):
        maniskill.require()
    try:
        registry.suite(config)
    except ValueError as error:
        missing = error.__cause__
        if kind == "tabletop" or not isinstance(missing, ModuleNotFoundError):
            raise
        pytest.skip(str(error))
    assert config.horizon % CHUNK, f"{CHUNK} divides the horizon of {kind}: choose another chunk"
    checked = check_env(
        lambda num_envs, autoreset: registry.make(config, num_envs=num_envs, chunk=CHUNK, autoreset=autoreset)
    )
    return {result.name: result for result in checked}


@pytest.mark.parametrize("rule", [check.__name__ for check in CHECKS])
@pytest.mark.parametrize("kind", registry.kinds())
def test_contract(kind: str, rule: str) -> None:
    result = results(kind)[rule]
    assert result.ok, result.detail
