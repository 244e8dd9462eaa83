"""Examines this machine: Python, cores, devices, a renderer that really renders, optional packages.

Each check is a function that returns findings; none raises on a machine that lacks something.
"""

# MuJoCo and Warp make their names at import, where a type checker cannot see them.
# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import importlib
import os
import platform
import time
from collections.abc import Callable
from importlib import metadata

from rove import host
from rove.errors import RoveError
from rove.findings import Finding, optional_package

CORE = ("torch", "transformers", "tokenizers", "safetensors", "mujoco", "mujoco-warp", "tensorboard")

POSIX = os.name == "posix"
_SCENE = """
<mujoco><worldbody>
  <light pos="0 0 3"/><camera pos="0 -1 1" xyaxes="1 0 0 0 1 1"/>
  <geom type="plane" size="1 1 .1"/><geom type="box" size=".1 .1 .1" pos="0 0 .1" rgba="1 0 0 1"/>
</worldbody></mujoco>
"""


def examine() -> list[Finding]:
    """Every check, cheap ones first; rendering one frame may take some seconds the first time."""
    return [
        python(),
        system(),
        machine(),
        *core_packages(),
        devices(),
        mujoco_versions(),
        cache(),
        *opengl(),
        *renderers(),
        *optional_packages(),
        *suites(),
    ]


def python() -> Finding:
    version = platform.python_version()
    good = version.startswith(("3.11.", "3.12."))
    fix = "" if good else "install Python 3.11 or 3.12, then: make clean setup"
    return Finding("Python", "ok" if good else "error", version, fix)


def system() -> Finding:
    """Compare with the systems that Rove runs on: `docs/install.md` says what each lacks."""
    name = f"{platform.system()} {platform.machine()}"
    if platform.system() == "Linux":
        return Finding("System", "ok", name)
    if POSIX:
        return Finding("System", "warn", f"{name}: not tested, and processes are bound to no cores")
    return Finding("System", "error", f"{name} is not supported", "use Linux, on Windows that of WSL 2")


def machine() -> Finding:
    try:
        memory = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB memory"
    except (AttributeError, ValueError, OSError):
        memory = "memory unknown"
    return Finding("Machine", "ok", f"{host.core_count()} cores, {memory}")


def cache() -> Finding:
    """Tell where compiled kernels and scenes are kept."""
    try:
        return Finding("Cache", "ok", str(host.writable(host.cache())))
    except RoveError as error:
        return Finding("Cache", "warn", str(error))


def opengl() -> list[Finding]:
    """Tell whether the OpenGL that MUJOCO_GL names is there; nothing where it names none."""
    asked = os.environ.get("MUJOCO_GL", "")
    if not asked or _version("mujoco") is None:
        return []
    import rove.envs  # noqa: F401  (imports MuJoCo, with OpenGL or without)

    if hasattr(importlib.import_module("mujoco"), "GLContext"):
        return [Finding("OpenGL", "ok", f"MUJOCO_GL = {asked}, which --env.renderer gl draws with")]
    detail = f"MUJOCO_GL = {asked}, which is not there; only --env.renderer gl draws with OpenGL"
    return [Finding("OpenGL", "warn", detail, "unset MUJOCO_GL, or apt install libegl1 libgl1 libosmesa6")]


def core_packages() -> list[Finding]:
    versions = {name: _version(name) for name in CORE}
    absent = [name for name, version in versions.items() if version is None]
    findings = [Finding(name, "error", "not installed", "make setup") for name in absent]
    present = ", ".join(f"{n} {v}" for n, v in versions.items() if v and not n.startswith("mujoco"))
    return [*findings, Finding("Packages", "ok", present)] if present else findings


def devices() -> Finding:
    if _version("torch") is None:
        return Finding("Devices", "error", "unknown without torch", "make setup")
    import torch

    if not torch.cuda.is_available():
        return Finding(
            "Devices", "ok", f"CPU only, {torch.get_num_threads()} threads; the demo needs no more"
        )
    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return Finding("Devices", "ok", ", ".join(f"{p.name} ({p.total_memory / 2**30:.0f} GiB)" for p in names))


def mujoco_versions() -> Finding:
    """Compare versions: MuJoCo Warp mirrors MuJoCo's structures field by field, so the two must match."""
    plain, warp = _version("mujoco"), _version("mujoco-warp")
    if plain is None or warp is None:
        return Finding("Simulation", "error", f"mujoco {plain}, mujoco-warp {warp}", "make setup")
    if plain.split(".")[:2] != warp.split(".")[:2]:
        fix = f".venv/bin/pip install mujoco-warp=={plain}"
        return Finding("Simulation", "error", f"mujoco {plain} and mujoco-warp {warp} do not match", fix)
    return Finding("Simulation", "ok", f"mujoco {plain} and mujoco-warp {warp} match")


def renderers() -> list[Finding]:
    """Ray-trace one 64×64 frame on the CPU, where suites draw, and on each GPU, where they can be told to."""
    if _version("mujoco") is None or _version("mujoco-warp") is None:
        return [Finding("Renderer", "error", "needs mujoco and mujoco-warp", "make setup")]
    return [_renderer(device) for device in _drawing_devices()]


def _renderer(device: str) -> Finding:
    """Look at a frame: one colour means that nothing was drawn. A GPU that cannot draw is no error."""
    use = "suites that draw with Warp draw here"
    if device != "cpu":
        use += " with --env.render cuda"
    began = time.perf_counter()
    try:
        colours = _render(device)
    except RuntimeError as error:
        return Finding(
            "Renderer", "error" if device == "cpu" else "warn", f"mujoco-warp fails on {device}: {error}"
        )
    seconds = time.perf_counter() - began
    if colours < 2:
        detail = f"mujoco-warp drew a blank frame on {device}"
        return Finding("Renderer", "error", detail, "report this, with the table")
    detail = f"mujoco-warp drew a 64×64 frame on {device} in {seconds:.1f} s, compiling included; {use}"
    return Finding("Renderer", "ok", detail)


def _drawing_devices() -> list[str]:
    """Return Warp's names for the devices of this machine, the CPU first."""
    from rove.envs import quiet_warp  # before anything else starts Warp, which would print a banner

    return quiet_warp.devices()


def _render(device: str) -> int:
    """Count the colours in the frame that `device` draws."""
    import mujoco
    import mujoco_warp
    import numpy as np
    import warp

    model = mujoco.MjModel.from_xml_string(_SCENE)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    with warp.ScopedDevice(device):
        m, d = mujoco_warp.put_model(model), mujoco_warp.put_data(model, data)
        context = mujoco_warp.create_render_context(model, nworld=1, cam_res=(64, 64), render_rgb=True)
        mujoco_warp.refit_bvh(m, d, context)
        mujoco_warp.render(m, d, context)
        return len(np.unique(context.rgb_data.numpy()))


def optional_packages() -> list[Finding]:
    """Look for packages that no environment needs."""
    return [
        optional_package("Ray", "ray", "ray", "many machines"),
        optional_package("W&B", "wandb", "wandb", "--logging.wandb true"),
        optional_package("Data", "pyarrow", "data", "rove data, rove robot --record"),
        optional_package("Studies", "scipy", "study", "rove study"),
        optional_package("Serving", "prometheus_client", "serve", "rove serve, rove eval ws://…"),
    ]


def suites() -> list[Finding]:
    """Ask each suite what it needs of this machine; nothing of one can be imported without torch."""
    if _version("torch") is None:
        return []
    from rove.envs import registry

    checks = (registry.offered(kind, "examine") for kind in registry.kinds())
    return [finding for check in dict.fromkeys(filter(None, checks)) for finding in examined(check)]


def examined(check: Callable[[], list[Finding]]) -> list[Finding]:
    """What a suite finds, also where it cannot look."""
    try:
        return check()
    except RoveError as error:
        return [Finding(check.__module__.rpartition(".")[2], "warn", str(error))]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
