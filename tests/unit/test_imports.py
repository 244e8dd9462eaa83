"""Who may import whom. Read from the source, so that nothing has to be installed to check it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src"

# What a room may import, by prefix, besides itself and BASE.
BASE = ("types", "errors", "findings", "config", "timing", "transfer", "interrupt", "runtime")
CONTRACTS = (
    "envs.answers",
    "envs.base",
    "envs.registry",
    "envs.sampler",
    "policies.actions",
    "policies.base",
    "policies.registry",
)
ROOMS: dict[str, tuple[str, ...]] = {
    "types": (),
    "errors": (),
    "findings": (),
    "timing": (),
    "interrupt": (),
    "transfer": (),
    "host": ("errors",),
    "runtime": ("errors", "host"),
    "config": ("errors",),
    "algorithms": ("types", "config.load"),
    "envs": (*BASE, "host"),
    "testing": (*BASE, "envs.base"),
    "policies": BASE,
    "checkpoint": (*BASE, "policies.base"),
    "rundir": (*BASE, "checkpoint", "host"),
    "rollout": (*BASE, *CONTRACTS),
    "placement": (*BASE, *CONTRACTS, "host"),
    "workers": (
        *BASE,
        *CONTRACTS,
        "host",
        "algorithms",
        "placement",
        "rollout",
        "training",
        "evaluation",
    ),
    "cluster": (
        *BASE,
        *CONTRACTS,
        "host",
        "checkpoint",
        "algorithms",
        "placement",
        "rollout",
        "training",
        "workers",
    ),
    "serving": (*BASE, *CONTRACTS),
    "data": (
        *BASE,
        *CONTRACTS,
        "envs.conventions",
        "preflight",
        "reporting",
        "training.demonstrations",
    ),
    "robots": (*BASE, *CONTRACTS, "data", "envs", "evaluation.statistics", "serving"),
    "evaluation": (
        *BASE,
        *CONTRACTS,
        "checkpoint",
        "policies.uniform",
        "preflight",
        "rollout",
        "rundir",
        "host",
        "serving",
    ),
    "reporting": (
        *BASE,
        "envs.base",
        "evaluation.comparison",
        "evaluation.report",
        "evaluation.statistics",
        "studies",
    ),
    "training": (*BASE, *CONTRACTS, "algorithms", "checkpoint", "reporting", "rundir"),
    "recipes": (*BASE, "envs"),
    "studies": (*BASE, "recipes"),
    "study": (
        *BASE,
        "checkpoint",
        "evaluation.comparison",
        "host",
        "recipes",
        "reporting.study",
        "rundir",
        "studies",
    ),
    "doctor": ("",),
    "preflight": (
        *BASE,
        *CONTRACTS,
        "envs.conventions",
        "host",
        "training.brought",
        "training.demonstrations",
    ),
    "__init__": ("",),  # the public API
    "api": ("",),
    "train": ("",),
    "cli": ("",),
}
TOP = {"__init__", "api", "train", "cli", "doctor"}
"""Rooms at the top: they may import everything, and nothing below them imports them."""

# Heavy or optional packages, and the only places that may import them, at whatever depth.
OWNERS: dict[str, tuple[str, ...]] = {
    "ray": ("runtime/ray.py",),
    "mani_skill": ("envs/maniskill",),
    "sapien": ("envs/maniskill",),
    "libero": ("envs/libero",),
    "robosuite": ("envs/libero",),
    "mujoco": ("envs/__init__.py", "envs/tabletop", "envs/libero", "robots/simulated.py", "doctor.py"),
    "mujoco_warp": ("envs/tabletop", "doctor.py"),
    "warp": ("envs/libero", "envs/quiet_warp.py", "envs/tabletop", "doctor.py"),
    "av": ("data",),
    "h5py": ("data",),
    "pyarrow": ("data",),
    "msgpack": ("serving",),
    "websockets": ("serving",),
    "prometheus_client": ("serving",),
    "transformers": ("policies", "doctor.py"),
    "tokenizers": ("policies", "doctor.py"),
    "rich": ("reporting", "doctor.py"),
    "jinja2": ("reporting",),
    "scipy": ("evaluation/comparison.py",),
    "wandb": ("reporting",),
    "tensorboard": ("reporting",),
}
OPTIONAL = {"ray", "mani_skill", "sapien", "libero", "robosuite", "scipy", "wandb"}
"""Imported inside the function that uses them, so that their absence is felt there only."""

DERIVED = ("envs/maniskill/put_on_plate/task.py",)
"""Classes derived from an optional package's need it at their top. They are themselves imported inside the
function that uses them."""

NAMES = {"tabletop", "libero", "maniskill", "openvla", "openvla-oft", "openvla_oft"}
"""Simulators and models: compared with only in a registry, or inside their own folder."""

FLOW = {"smolvla", "pi0", "pi05"}
"""Flow policies: one folder holds all of them."""

FILES = sorted((SOURCE / "rove").rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(SOURCE / "rove").as_posix()


def room(path: Path) -> str:
    return relative(path).split("/")[0].removesuffix(".py")


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports(node: ast.AST, nested: bool = False) -> Iterator[tuple[str, bool]]:
    """Every imported module below `node`, and whether a function's body holds the import."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            continue
        if isinstance(child, ast.Import):
            yield from ((alias.name, nested) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            module = child.module or ""
            assert child.level == 0, f"relative import of {module!r}: write the full name"
            yield from ((submodule(module, alias.name), nested) for alias in child.names)
        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from imports(child, nested or inside)


def submodule(module: str, name: str) -> str:
    """`from module import name`: the module that `name` is, or else the one that holds it."""
    path = SOURCE.joinpath(*module.split("."), name)
    return f"{module}.{name}" if path.is_dir() or path.with_suffix(".py").exists() else module


def below(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(not prefix or name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def violations(path: Path, tree: ast.AST) -> Iterator[str]:
    own = room(path)
    for module, nested in imports(tree):
        top, _, rest = module.partition(".")
        if top == "rove":
            upward = rest.split(".")[0] in TOP and own not in TOP
            derived = f"{rest.replace('.', '/')}.py" in DERIVED and not nested
            if derived:
                yield f"{relative(path)} imports {module} at its top: import it where it is used"
            if upward or not (rest == "" or below(rest, (own, *ROOMS[own]))):
                yield f"{relative(path)} imports {module}: room {own!r} may not"
        elif top in OWNERS and not any(relative(path).startswith(owner) for owner in OWNERS[top]):
            yield f"{relative(path)} imports {module}: only {', '.join(OWNERS[top])} may"
        elif top in OPTIONAL and not nested and relative(path) not in DERIVED:
            yield f"{relative(path)} imports {module} at its top: import it where it is used"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_point_one_way(path: Path) -> None:
    assert room(path) in ROOMS, f"{room(path)!r} is a new room: say here what it may import"
    assert list(violations(path, ast.parse(path.read_text()))) == []


@pytest.mark.parametrize(
    ("where", "code"),
    [
        ("algorithms/ppo.py", "from rove.config.schema import PPO"),
        ("algorithms/ppo.py", "def f():\n    from rove import envs"),
        ("rollout/collect.py", "import rove.training.learner"),
        ("training/learner.py", "from rove.rollout import collect"),
        ("training/learner.py", "from rove.envs.tabletop import env"),
        ("config/schema.py", "from rove.types import Split"),
        ("rollout/collect.py", "from rove.train import train"),
        ("cluster/ray.py", "def f():\n    import ray"),
        ("runtime/ray.py", "import ray"),
        ("placement/plan.py", "from rove.workers.policy import PolicyWorker"),
        ("workers/policy.py", "from rove.cluster import executor"),
        ("envs/libero/env.py", "import mani_skill"),
    ],
)
def test_a_breach_is_noticed(where: str, code: str) -> None:
    assert list(violations(SOURCE / "rove" / where, ast.parse(code)))


def test_type_checking_blocks_do_not_count() -> None:
    code = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from rove.config.schema import PPO"
    assert not list(violations(SOURCE / "rove/algorithms/ppo.py", ast.parse(code)))


def name_comparisons(tree: ast.AST, names: set[str] = NAMES) -> Iterator[str]:
    for node in ast.walk(tree):
        parts = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
        parts += [case.pattern for case in node.cases] if isinstance(node, ast.Match) else []
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("startswith", "endswith")):
            parts += node.args
        for part in parts:
            for leaf in ast.walk(part):
                if isinstance(leaf, ast.Constant) and leaf.value in names:
                    yield f"line {leaf.lineno}: comparison with {leaf.value!r}"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_only_registries_compare_names(path: Path) -> None:
    if path.stem == "registry":
        return
    # A simulator's folder may name them all, a model's itself.
    inside = NAMES & set(path.relative_to(SOURCE).parts)
    others = set() if relative(path).startswith("envs/") and inside else NAMES - inside
    others |= set() if relative(path).startswith("policies/flow/") else FLOW
    assert list(name_comparisons(ast.parse(path.read_text()), others)) == []


def test_a_comparison_with_a_name_is_noticed() -> None:
    assert list(name_comparisons(ast.parse('x = kind == "libero"')))
    assert list(name_comparisons(ast.parse('x = kind in ("libero", "other")')))
    assert list(name_comparisons(ast.parse('x = kind.startswith("libero")')))
    assert not list(name_comparisons(ast.parse('x = kind == "ppo"')))


def test_config_and_recipes_load_without_torch() -> None:
    code = "import sys, rove.config.validate, rove.recipes.tabletop; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def circles(sources: dict[Path, str]) -> list[str]:
    """Modules that import each other in a circle, or one that does; imports for type checking count."""
    modules = {
        path.relative_to(SOURCE).with_suffix("").as_posix().replace("/", "."): path for path in sources
    }
    edges: dict[str, set[str]] = {}
    for name, path in modules.items():
        found = [node for node in ast.walk(ast.parse(sources[path])) if isinstance(node, ast.ImportFrom)]
        edges[name] = {submodule(n.module or "", a.name) for n in found for a in n.names} & modules.keys()
    while leaves := {name for name, targets in edges.items() if not targets & edges.keys()}:
        edges = {name: targets for name, targets in edges.items() if name not in leaves}
    return sorted(edges)


@pytest.mark.parametrize("folder", ["policies/openvla", "policies/flow", "envs/tabletop"])
def test_no_modules_import_each_other(folder: str) -> None:
    files = sorted((SOURCE / "rove" / folder).glob("*.py"))
    assert files
    assert circles({path: path.read_text() for path in files}) == []


def test_a_circle_is_noticed_also_for_type_checking() -> None:
    folder = SOURCE / "rove" / "policies" / "openvla"
    sources = {
        folder / "model.py": "from rove.policies.openvla import loading",
        folder / "loading.py": "if TYPE_CHECKING:\n    from rove.policies.openvla.model import OpenVLA",
        folder / "bins.py": "from rove.policies.openvla.loading import read",
    }
    found = circles(sources)
    assert {"rove.policies.openvla.model", "rove.policies.openvla.loading"} <= set(found)
