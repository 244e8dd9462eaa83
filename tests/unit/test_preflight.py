"""The preflight: one policy that passes every check, and for each check one that does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from rove import cli, preflight
from rove.config.schema import LlamaConfig, PolicyConfig, TowerConfig
from rove.envs import conventions
from rove.errors import RoveError
from rove.findings import Finding
from rove.policies.openvla import OpenVLA
from rove.policies.openvla import preflight as checks
from rove.policies.openvla.config import PROMPT
from rove.types import ActionSpec, Conventions

LIBERO = conventions.of("libero_spatial")
POSE = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
SPEC = ActionSpec(POSE, ("1",) * 7, (*[-1.0] * 6, 0.0), (1.0,) * 7)
CONFIG = PolicyConfig(
    towers=(TowerConfig(width=16, depth=2, heads=2, patch=8, mlp=24),),
    llama=LlamaConfig(width=32, depth=2, heads=2, mlp=32),
    center_crop=True,
)
STATISTICS = {
    "libero_spatial_no_noops": {
        "action": {"q01": [*[-0.9] * 6, 0.0], "q99": [*[0.9] * 6, 1.0], "mask": [True] * 6 + [False]},
        "proprio": {"q01": [-1.0] * 8, "q99": [1.0] * 8},
    }
}


def build(**changes: Any) -> OpenVLA:
    """A small policy that fits LIBERO; `changes` are of its config, or arguments of `build`."""
    config = {name: changes.pop(name) for name in list(changes) if hasattr(CONFIG, name)}
    words = {word for text in (*LIBERO.instructions, PROMPT) for word in text.replace("\n", " ").split()}
    words |= {"in", "out", ":", "?", "{", "}"}
    settings = {"chunk": 2, "action_spec": SPEC, "image_size": 16, "vocabulary": sorted(words), "seed": 0}
    settings |= {"statistics": STATISTICS} | changes
    return OpenVLA.build(replace(CONFIG, **config), **settings)


def libero(prompt: str = "{instruction}") -> Conventions:
    """LIBERO's conventions, for a policy whose prompt is the instruction alone."""
    return replace(LIBERO, prompt=prompt)


def find(policy: OpenVLA, name: str, wanted: Conventions | None = None, rl: bool = True) -> Finding:
    findings = {f.name: f for f in policy.preflight(wanted or libero(), rl=rl)}
    return findings[name]


def assert_fails(finding: Finding, *words: str) -> None:
    assert finding.status == "fail"
    assert finding.fix
    for word in words:
        assert word in finding.detail


@pytest.mark.parametrize(
    "changes", [{}, {"attention": "bidirectional"}, {"decoding": "autoregressive"}], ids=lambda c: str(c)
)
def test_a_policy_that_fits_passes_everything(changes: dict[str, Any]) -> None:
    findings = build(**changes).preflight(libero(), rl=True)
    assert [f for f in findings if f.status != "pass"] == []
    names = "statistics images actions gripper state crop prompt likelihood attention".split()
    assert [f.name for f in findings] == [*names, "action tokens", "trained for"]


def test_statistics() -> None:
    stats = STATISTICS["libero_spatial_no_noops"]
    other = build(statistics={"bridge_orig": stats})
    assert_fails(find(other, "statistics"), "bridge_orig is not of libero_spatial")
    undecided = build(statistics={"bridge_orig": stats, "libero_spatial": stats})
    assert_fails(find(undecided, "statistics"), "no data set is chosen")
    assert find(other, "statistics", replace(libero(), statistics=())).status == "warn"


def test_images() -> None:
    policy = build()
    policy.num_images = 2
    assert find(policy, "images").status == "pass"
    assert_fails(find(policy, "images", replace(libero(), images=(1,))), "reads 2 at a time", "gives 1")


def test_a_policy_that_points_in_two_pictures_is_given_two() -> None:
    """Also by the checks themselves, where the checkpoint leaves their number open."""
    policy = build(pointers=3, pointed=2)
    policy.num_images = None
    assert find(policy, "images").status == find(policy, "action tokens").status == "pass"
    assert_fails(find(policy, "images", replace(libero(), images=(1,))), "points in 2 pictures", "gives 1")


def test_actions() -> None:
    assert_fails(find(build(), "actions", replace(libero(), action_spec=replace(SPEC, frame="end_effector"))))
    spec = ActionSpec(("x", "tilt"), ("1", "1"), (-1.0, -1.0), (1.0, 1.0))
    assert_fails(
        find(build(), "actions", replace(libero(), action_spec=spec)), "'tilt' that the policy lacks"
    )
    endless = replace(SPEC, low=(-torch.inf,) * 7, high=(torch.inf,) * 7)
    assert_fails(find(build(action_spec=endless), "actions"), "does not say between which bounds")


def test_gripper() -> None:
    action = STATISTICS["libero_spatial_no_noops"]["action"] | {"q01": [*[-0.9] * 6, -1.0]}
    turned = build(statistics={"libero_spatial": {"action": action}})
    assert_fails(find(turned, "gripper"), "span [-1, 1]", "convention [0, 1]")
    assert "mirrored" in find(build(), "gripper").detail
    assert "as it is" in find(build(), "gripper", replace(libero(), action_spec=SPEC)).detail


def test_state() -> None:
    policy = build(proprio=True)
    assert find(policy, "state").status == "pass"
    assert_fails(find(policy, "state", replace(libero(), state=5)), "reads 8", "gives 5")


def test_crop() -> None:
    assert_fails(find(build(center_crop=None), "crop"), "usually cropped")
    assert find(build(center_crop=False), "crop").status == "warn"
    bare = replace(libero(), center_crop=False)
    assert find(build(center_crop=None), "crop", bare).status == "pass"


def test_prompt() -> None:
    policy = build()
    assert_fails(find(policy, "prompt", LIBERO), "'{instruction}'", "checkpoints of libero_spatial read")
    unknown = replace(libero(), instructions=("fetch the basket",))
    assert_fails(find(policy, "prompt", unknown), "does not know every word of 'fetch the basket'")
    assert policy.tokenizer is not None
    policy.tokenizer.tokenizer.post_processor = None  # a tokenizer that adds no BOS  # pyright: ignore
    policy.tokenizer._cache.clear()
    assert_fails(find(policy, "prompt"), "expected 1 …")
    policy.tokenizer = None
    assert_fails(find(policy, "prompt"), "no tokenizer")


def test_a_policy_of_the_suites_own_demonstrations_is_not_held_to_published_ones() -> None:
    own = {"libero:object": STATISTICS["libero_spatial_no_noops"]}
    wanted = conventions.of("libero:object")
    policy = build(statistics=own, center_crop=None, vocabulary=["pick", "up", "the", "soup"])
    assert not [
        f
        for f in policy.preflight(wanted, rl=True)
        if f.name in ("statistics", "crop", "prompt") and f.status != "pass"
    ]
    elsewhere = build(statistics={"libero_object": own["libero:object"]}, center_crop=None)
    assert_fails(find(elsewhere, "crop", wanted), "does not say")
    assert_fails(find(elsewhere, "prompt", wanted), "checkpoints of libero:object read")


def test_likelihood() -> None:
    policy = build(head="l1")
    assert_fails(find(policy, "likelihood"), "L1 head")
    assert find(policy, "likelihood", rl=False).status == "warn"


def test_attention(monkeypatch) -> None:
    """A library that computes another mask than the one asked for is found out."""
    real = F.scaled_dot_product_attention

    def always(causal: bool):
        def attend(query, key, value, attn_mask=None, is_causal=False, **settings):
            queries, keys = query.shape[-2], key.shape[-2]
            mask = torch.ones(queries, keys, dtype=torch.bool)
            return real(
                query, key, value, attn_mask=mask.tril(keys - queries) if causal else mask, **settings
            )

        return attend

    for attention, causal in (("bidirectional", True), ("causal", False)):
        policy = build(attention=attention)
        assert find(policy, "attention").status == "pass"
        with monkeypatch.context() as patch:
            patch.setattr("rove.policies.openvla.language.F.scaled_dot_product_attention", always(causal))
            assert_fails(find(policy, "attention"), f"set to {attention}")


@torch.no_grad()
def test_action_tokens() -> None:
    policy = build(vocabulary=[f"w{i}" for i in range(300)])
    wanted = replace(libero(), instructions=())
    head = policy.vlm.lm_head.weight
    head *= 0.01
    assert find(policy, "action tokens", wanted).status == "warn"
    # A vocabulary that is off by some rows: the model is sure of what is read as no action.
    prefix = checks._example(policy, wanted)
    hidden = checks.decoding.parallel(policy.vlm, prefix, 14, "causal", 2)[0]
    head[7] = torch.linalg.lstsq(hidden, torch.full((14, 1), 20.0)).solution[:, 0]
    assert_fails(find(policy, "action tokens", wanted), "prefers other tokens")


def test_weights_that_were_trained_with_the_other_attention() -> None:
    policy = build()
    seen = checks._example(policy, libero())
    prefix = seen._replace(embeddings=seen.embeddings.detach())
    target = torch.randint(0, 256, (1, 14), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam(policy.vlm.language_model.parameters(), lr=3e-3)
    for _ in range(80):
        loss = torch.zeros(())
        for attention, weight in (("bidirectional", 0.0), ("causal", 1.0)):
            hidden = checks.decoding.parallel(policy.vlm, prefix, 14, attention, 2)
            logp = policy.vlm.action_logits(hidden).log_softmax(-1)
            sure = -logp.gather(-1, target[..., None]).mean()
            loss = loss + (-logp.mean() if weight else sure)  # sure of the target, or of nothing
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    finding = find(policy, "trained for")
    assert finding.status == "warn" and "attention bidirectional" in finding.fix
    policy.attention = "bidirectional"
    assert find(policy, "trained for").status == "pass"


# --- where it is asked ----------------------------------------------------------------------------


def test_doctor_prints_the_table_and_fails_where_a_check_does(tmp_path: Path, capsys) -> None:
    policy = build()
    policy.save_pretrained(tmp_path)
    words = ["doctor", "--policy", str(tmp_path), "--suite", "libero_spatial"]
    assert cli.main(words) == 1
    table = capsys.readouterr().out
    assert "   fail  prompt" in table and "   pass  statistics" in table and '→ correct "prompt"' in table
    config = json.loads((tmp_path / "config.json").read_text())
    config["rove"] |= {"prompt": PROMPT}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert cli.main([*words, "--attention", "bidirectional", "--center_crop", "false"]) == 0
    table = capsys.readouterr().out
    assert "bidirectional, as an early token shows" in table and "   warn  crop" in table
    assert cli.main(["doctor", "--policy", str(tmp_path)]) == 2
    assert cli.main(["doctor", "--policy", str(tmp_path), "--suite", "libreo_spatial"]) == 2
    assert "Choose one of: libero" in capsys.readouterr().err


def asking(policy: OpenVLA) -> Callable[[Conventions], list[Finding]]:
    """How a run asks it."""
    return partial(policy.preflight, rl=True)


def test_a_run_is_stopped_before_it_starts() -> None:
    from rove.config.schema import TabletopConfig
    from rove.envs import registry

    env = registry.make(TabletopConfig(tasks="pick/red_cube"), num_envs=1, chunk=2, autoreset="refill")
    with pytest.raises(RoveError, match=r"(?s)does not fit tabletop:.*fail +statistics.*libero_spatial"):
        preflight.before_run(asking(build()), env.suite, env.action_spec)
    fits = build(action_spec=env.action_spec, statistics=None, vocabulary=env.suite.vocabulary)
    preflight.before_run(asking(fits), env.suite, env.action_spec)
    env.close()


def test_an_environment_of_somebody_elses_is_taken_at_its_word() -> None:
    from tests.point_env import PointEnv

    env = PointEnv(1, "refill")
    policy = build(action_spec=env.action_spec, statistics=None, vocabulary=env.suite.vocabulary)
    warnings = preflight.before_run(asking(policy), env.suite, env.action_spec).splitlines()
    assert len(warnings) == 1 and "names no gripper" in warnings[0]


@pytest.mark.parametrize("suite", ["tabletop", "libero_10", "maniskill_put_on_plate"])
def test_conventions_are_sound(suite: str) -> None:
    known = conventions.of(suite)
    spec = known.action_spec
    assert len(spec.names) == len(spec.units) == len(spec.low) == len(spec.high)
    assert spec.names[-1] == "gripper" and known.instructions
    assert known.suite == suite
