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
LIBERO = "--env.renderer none --env.wait 1 --env.horizon 4"
ONE_TASK = "--tasks spatial/pick_up_the_black_bowl_on_the_stove_and_place_it_on_the_plate"
SIMULATOR = "needs Vulkan or ManiSkill's assets: tests/integration/test_maniskill.py does what it does"
LARGE = (
    "needs a checkpoint of a published size: tests/integration/test_openvla_rl.py does it with a small one"
)

RULES: tuple[tuple[str, str | None], ...] = (
    # Left to other tests, with the reason.
    (r"maniskill_tiny|maniskill:|CHECKPOINT --suite maniskill|put_on_plate_tiny|rove assets", SIMULATOR),
    (r"(train|sft) (openvla_oft_|libero_)", LARGE),
    (r"--policy openvla/", "needs a published checkpoint: tests/unit/test_preflight.py has a small one"),
    (r"--ray-address", "needs a cluster: tests/integration/test_ray.py starts one"),
    (r"collect libero", "takes a scripted expert minutes: tests/libero/test_expert.py"),
    (r"--resume RUN|--import FILE", "says how words are spelled, run by tests/integration/test_resume.py"),
    (r"…|RECIPE|--check$", "is a pattern, not a command"),
    # Run here.
    (r"rove (recipes|doctor|show .*|report runs/mine)$", ""),
    (r"rove plan .*--card", ""),
    (r"rove train --resume runs/mine$", ""),
    (r"rove plan tabletop_ppo$", SMALL),
    (r"rove (train tabletop_ppo|train path/to/yours.py|demo)", SMALL),
    (r"rove train examples/environment.py:", REACH),
    (r"rove eval \S+ --suite tabletop", "--episodes 2 --num-envs 4 --env.horizon 8"),
    (r"rove eval \S+ --suite libero", f"--episodes 1 --num-envs 1 {LIBERO} {ONE_TASK}"),
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
    text = command.replace("CHECKPOINT", "random").replace("yours.py:name", "yours.py:patient")
    words = [*shlex.split(text)[1:], *added.split()]
    if words[0] in ("train", "demo") and "--resume" not in words:  # a run is not made twice
        words += ["--name", f"run_{COMMANDS.index(command)}"]
    if "random" in words and "--decoding" not in words:
        words += ["--decoding", "sample"]
    if "--resume" in words:
        (place / "runs" / "mine" / "report.html").unlink()
    assert cli.main(words) == 0
    said = capsys.readouterr()
    assert said.out.strip()
    if words[0] in ("train", "demo", "report"):
        assert "report.html" in said.out
        run = place / "runs" / (words[-1] if words[-2] == "--name" else "mine")
        assert (run / "report.html").stat().st_size > 10_000
    if words[0] == "eval":
        assert "success, 95 % interval" in said.out
