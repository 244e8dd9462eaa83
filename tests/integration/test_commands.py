"""Every command that README and the docs show is run as it is written there.

Settings that only make it smaller are appended: the last one given counts. Placeholders stand for a tiny run
and its checkpoint. A command that no rule here knows fails the test.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rove import cli, recipes
from rove.config.schema import LlamaConfig, PolicyConfig, TowerConfig
from rove.envs import conventions
from rove.policies.openvla import OpenVLA
from rove.runtime import setup

ROOT = Path(__file__).parents[2]
SMALL = (
    "--rollout.num_envs 4 --rollout.chunks 2 --training.iterations 1 --training.batch 8 "
    "--training.micro_batch 8 --training.optim.warmup 0 --sft.episodes 2 --sft.steps 2 --sft.batch 8 "
    "--sft.micro_batch 8 --sft.optim.warmup 0 --sft.grounding 4 --sft.grounding_steps 1 "
    "--evaluation.episodes 2 --evaluation.variant_episodes 0 --evaluation.num_envs 2 "
    "--logging.tensorboard false"
)
REACH = (
    "--rollout.num_envs 4 --rollout.chunks 2 --training.iterations 1 --sft.episodes 2 --sft.steps 2 "
    "--sft.batch 8 --sft.micro_batch 8 --sft.optim.warmup 0 --training.optim.warmup 0 "
    "--evaluation.episodes 2 --logging.tensorboard false"
)
EXAMPLE = "--rollout.num_envs 16 --rollout.chunks 4 --training.batch 16 --training.micro_batch 16"
LIBERO = "--env.renderer none --env.wait 1 --env.horizon 4"
TASK = "spatial/pick_up_the_black_bowl_on_the_stove_and_place_it_on_the_plate"
SOUP = "pick_up_the_alphabet_soup_and_place_it_in_the_basket"
COLLECT = "--sft.episodes 1 --rollout.num_envs 1 --env.renderer none"
SIMULATOR = "needs Vulkan or ManiSkill's assets: tests/integration/test_maniskill.py does what it does"
LARGE = (
    "needs a checkpoint of a published size: tests/integration/test_openvla_rl.py does it with a small one"
)
PREFLIGHT = "needs a checkpoint of the suite: tests/unit/test_flow_preflight.py asks small ones"

RULES: tuple[tuple[str, str], ...] = (
    # Left to other tests, with the reason.
    (r"maniskill_tiny|maniskill:|CHECKPOINT --suite maniskill|put_on_plate_tiny|rove assets", SIMULATOR),
    (r"train openvla_oft_", LARGE),
    (r"(train|sft) libero_", "takes a minute or two, however small: its episodes are whole"),
    (r"train tabletop_smolvla_", "tests/integration/test_float_samples.py does it with a smaller policy"),
    (r"eval runs/(tabletop_smolvla|libero_object)_", "needs a warm-up: test_eval.py asks a small one"),
    (r"plan RECIPE --profile", "needs a profile that was measured on a GPU"),
    (r"--ray-address", "needs a cluster: tests/integration/test_ray.py starts one"),
    (r"rove (serve|eval ws:)", "tests/integration/test_serve.py serves and asks"),
    (r"rove (data|collect tabletop) |--sft\.data", "tests/integration/test_data.py brings data and takes it"),
    (r"rove (simulate|robot)", "tests/libero/test_simulated_arm.py and test_robot_faults.py run arms"),
    (r"demo robot", "takes minutes: warms up, and runs twenty episodes in real time"),
    (r"plan tabletop_ppo --check$", "runs ten placements, which takes a minute and a half"),
    (r"rove study \S", "takes half an hour and more: tests/integration/test_study.py carries small ones out"),
    # Run here. Of a pattern, the recipe is tabletop_ppo.
    (r"rove (plan|show) RECIPE", SMALL),
    (r"rove train (RECIPE|… --profile)$", SMALL),
    (r"rove (recipes|study|doctor|show .*|report runs/(mine|demo))$", ""),
    (r"rove doctor --policy openvla/", ""),
    (r"rove doctor --policy CHECKPOINT", PREFLIGHT),
    (r"rove collect libero:spatial", f"{COLLECT} --env.tasks {TASK}"),
    (r"rove collect libero:", f"{COLLECT} --env.tasks object/{SOUP}"),
    (r"rove train FILE.py:NAME --resume RUN", ""),
    (r"rove eval \S+ --suite reach --import", "--episodes 2 --num-envs 2"),
    (r"rove plan .*--card", ""),
    (r"rove train --resume runs/(mine|demo)$", ""),
    (r"rove plan tabletop_ppo$", SMALL),
    (r"rove (train tabletop_ppo|train path/to/yours.py|demo)", SMALL),
    (r"rove train examples/environment.py:", REACH),
    (r"rove train examples/algorithm.py:", f"{SMALL} {EXAMPLE}"),
    (r"rove train examples/policy.py:", f"{REACH} --evaluation.variant_episodes 0 {EXAMPLE}"),
    (r"rove eval \S+ --suite tabletop", "--episodes 2 --num-envs 4 --env.horizon 8"),
    (r"rove eval \S+ --suite libero", f"--episodes 1 --num-envs 1 {LIBERO} --tasks {TASK}"),
)  # fmt: skip
"""Pattern of a command -> what is appended; a text without a leading "--" says why it is not run here."""


def documented() -> Iterator[str]:
    """Every `rove` command of the pages, in order, without comments."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
    for page in pages:
        text = page.read_text().replace("\\\n", " ")
        yield from re.findall(r"^(rove [^\n#]*)", text, re.MULTILINE)
        yield from re.findall(r"`(rove [a-z][^`\n]*)`", text)


COMMANDS = list(dict.fromkeys(" ".join(command.split()) for command in documented()))


def rule(command: str) -> str | None:
    return next((added for pattern, added in RULES if re.search(pattern, command)), None)


def published(directory: Path) -> None:
    """A small checkpoint in the layout of `openvla/openvla-7b`; a folder of that name goes before the hub."""
    config = PolicyConfig(
        towers=(
            TowerConfig(kind="dinov2", width=16, depth=3, heads=2, patch=14, mlp=64),
            TowerConfig(kind="siglip", width=16, depth=3, heads=2, patch=14, mlp=40),
        ),
        llama=LlamaConfig(width=32, depth=2, heads=2, mlp=48),
        decoding="autoregressive",
    )
    statistics = {"bridge_orig": {"action": {"q01": [-0.5] * 6 + [0.0], "q99": [0.5] * 6 + [1.0]}}}
    spec = conventions.of("maniskill_put_on_plate")
    words = {word for text in spec.instructions for word in text.split()}
    prompt = {"in", ":", "what", "action", "should", "the", "robot", "take", "to", "?", "out"}
    policy = OpenVLA.build(
        config,
        chunk=1,
        action_spec=spec.action_spec,
        image_size=56,
        vocabulary=tuple(sorted(words | prompt)),
        statistics=statistics,
        seed=0,
    )
    policy.save_pretrained(directory)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where a reader of the pages would be: beside the examples, with a run called mine."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "examples").symlink_to(ROOT / "examples")
    extending = (ROOT / "docs" / "extending.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", extending, re.DOTALL)
    yours = folder / "path" / "to" / "yours.py"
    yours.parent.mkdir(parents=True)
    yours.write_text(next(block for block in blocks if "def patient" in block))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(f"train tabletop_ppo --name mine {SMALL}".split()) == 0
        assert cli.main(f"train examples/environment.py:reach --name reached {REACH}".split()) == 0
    published(folder / "openvla" / "openvla-7b")
    yield folder
    # What yours.py registered; other tests register the documented recipe from elsewhere.
    recipes._recipes.pop("patient", None)
    sys.modules.pop("yours", None)
    setup._calls.pop((recipes.import_file, (yours.resolve(),)), None)


def test_each_command_has_a_rule() -> None:
    assert len(COMMANDS) > 20
    assert [command for command in COMMANDS if rule(command) is None and command.count(" ") > 1] == []


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.count(" ") > 1 or rule(c) is not None])
def test_the_command_works_as_it_is_written(
    command: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    added = rule(command)
    assert added is not None
    if added and not added.startswith("--"):
        pytest.skip(added)
    monkeypatch.chdir(place)
    text = command.replace("yours.py:name", "yours.py:patient").replace("FILE.py", "examples/environment.py")
    text = text.replace(":NAME", ":reach").replace("RUN", "runs/reached")
    # A run as short as this one keeps no best policy.
    text = text.replace("runs/demo/best", "runs/mine/sft").replace("runs/demo", "runs/mine")
    text = text.replace("CHECKPOINT", "runs/reached/sft" if "reach" in text else "random")
    text = text.replace("RECIPE", "tabletop_ppo").replace("train …", "train tabletop_ppo")
    words = [*shlex.split(text)[1:], *added.split()]
    if words[0] in ("train", "demo") and "--resume" not in words:  # a run is not made twice
        words += ["--name", f"run_{COMMANDS.index(command)}"]
    if "random" in words and "--decoding" not in words:
        words += ["--decoding", "sample"]
    if "--resume" in words:
        (Path(words[words.index("--resume") + 1]) / "report.html").unlink()
    code = cli.main(words)
    said = capsys.readouterr()
    assert said.out.strip()
    if "--policy" in words:  # weights that were never trained pass no check of what they learned
        assert code == 1
        assert "statistics" in said.out
        return
    assert code == 0
    if words[0] == "collect":
        out = words[words.index("--out") + 1] if "--out" in words else said.out.split()[-1]
        assert Path(out).stat().st_size > 1_000
    if words[0] in ("train", "demo", "report"):
        assert "report.html" in said.out
        named = words[-1] if words[-2] == "--name" else "mine"
        run = Path(words[words.index("--resume") + 1]) if "--resume" in words else place / "runs" / named
        assert (run / "report.html").stat().st_size > 10_000
    if words[0] == "eval":
        assert "success, 95 % interval" in said.out
