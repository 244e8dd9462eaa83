"""The machine: folders where there is no home, and systems that offer less than Linux."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rove import doctor, host
from rove.envs import quiet_warp
from rove.envs.libero import scenes
from rove.envs.maniskill import assets
from rove.errors import RoveError
from rove.placement.inventory import Inventory

PLACES = ("HOME", "XDG_CACHE_HOME", "ROVE_CACHE", "ROVE_ASSETS", "MS_ASSET_DIR")


@pytest.fixture
def nobody(monkeypatch):
    """A user without a home, as `docker run --user 12345` makes one."""
    for name in PLACES:
        monkeypatch.delenv(name, raising=False)

    def unknown(uid: int):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    return monkeypatch


@pytest.mark.parametrize(("own", "spins"), [(None, False), ("active", True)])
def test_threads_that_wait_leave_their_core_to_others(own, spins):
    """Unless their user has said otherwise; as OpenMP itself tells it."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_DISPLAY_ENV": "verbose"} | ({} if own is None else {"OMP_WAIT_POLICY": own})
    words = [sys.executable, "-c", "from rove import host; host.prepare(2)"]
    ran = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    counts = re.findall(r"GOMP_SPINCOUNT ?= ?'(\d+)'", ran.stderr)
    if not counts:
        pytest.skip("this PyTorch's threads are not GNU's, which tell how long they spin")
    assert {int(count) > 0 for count in counts} == {spins}, ran.stderr


def test_one_folder_holds_every_cache(nobody, tmp_path):
    nobody.setenv("HOME", str(tmp_path))
    assert host.cache() == tmp_path / ".cache" / "rove"
    nobody.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert host.cache() == tmp_path / "xdg" / "rove"
    nobody.setenv("ROVE_CACHE", str(tmp_path / "own"))
    assert host.cache() == tmp_path / "own"
    assert scenes.cache_folder().is_relative_to(tmp_path / "own" / "libero")
    assert quiet_warp.kernels() == tmp_path / "own" / "warp"


def test_without_a_home_the_variable_to_set_is_named(nobody, tmp_path):
    nobody.chdir(tmp_path)
    for ask in (host.cache, scenes.cache_folder):
        with pytest.raises(RoveError, match="set ROVE_CACHE to a folder"):
            ask()
    with pytest.raises(RoveError, match="set ROVE_ASSETS to a folder"):
        assets.root()
    assert (doctor.cache().status, list(tmp_path.iterdir())) == ("warn", [])
    assert [finding.status for finding in doctor.examined(assets.root)] == ["warn"]


def test_a_cache_that_cannot_be_written_is_named(monkeypatch):
    monkeypatch.setenv("ROVE_CACHE", "/proc/none")
    with pytest.raises(RoveError, match=r"Nothing can be written to the cache /proc/none/.*Set ROVE_CACHE"):
        scenes.prepare(["object/pick_up_the_milk_and_place_it_in_the_basket"])
    with pytest.warns(UserWarning, match="Warp compiles its kernels every time"):
        kernels = quiet_warp.kernels()
    assert kernels.is_dir() and not kernels.is_relative_to("/proc")


def test_a_system_that_binds_no_process_to_cores(monkeypatch):
    for name in ("sched_getaffinity", "sched_setaffinity"):
        monkeypatch.delattr(os, name)
    assert host.cores() == () and host.core_count() == os.cpu_count()
    assert len(Inventory.here().nodes[0].cores) == os.cpu_count()
    with host.bound((0,), 1):
        pass


@pytest.mark.parametrize(
    ("name", "posix", "status"),
    [("Linux", True, "ok"), ("Darwin", True, "warn"), ("Windows", False, "error")],
)
def test_the_doctor_says_which_systems_are_supported(monkeypatch, name, posix, status):
    monkeypatch.setattr("platform.system", lambda: name)
    monkeypatch.setattr(doctor, "POSIX", posix)
    assert doctor.system().status == status


def test_opengl_that_is_not_there_stops_nothing_that_draws_without(tmp_path):
    (tmp_path / "mine.py").write_text("import mujoco\nmodel = mujoco.MjModel.from_xml_string('<mujoco/>')\n")
    code = (
        "import os, pathlib; from rove import doctor, recipes;"
        "recipes.import_file(pathlib.Path('mine.py'));"
        "[finding] = doctor.opengl();"
        "print(os.environ['MUJOCO_GL'], finding.status, finding.detail)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "MUJOCO_GL": "opengl"},  # which MuJoCo knows on no system
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.stderr == ""
    assert done.stdout.startswith("opengl warn MUJOCO_GL = opengl, which is not there")


def test_opengl_that_is_there_stays(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setattr("mujoco.GLContext", object, raising=False)
    assert [finding.status for finding in doctor.opengl()] == ["ok"]
    monkeypatch.delenv("MUJOCO_GL")
    assert doctor.opengl() == []


LESS = """
import os, pathlib, signal, socket
for name in "sched_getaffinity sched_setaffinity memfd_create posix_fallocate eventfd pidfd_open".split():
    if hasattr(os, name):
        delattr(os, name)
for name in [name for name in dir(signal) if name.startswith(("pthread_", "SIGRT"))]:
    delattr(signal, name)
for name in [name for name in dir(socket) if name.startswith(("AF_PACKET", "AF_NETLINK", "SOCK_CLOEXEC"))]:
    delattr(socket, name)
read = pathlib.Path.read_text
def without_proc(self, *args, **options):
    if str(self).startswith(("/proc", "/sys")):
        raise FileNotFoundError(2, "No such file or directory", str(self))
    return read(self, *args, **options)
pathlib.Path.read_text = without_proc
"""


def test_a_system_without_what_linux_has_runs_the_small_parts(tmp_path):
    """In this process and in a child of it, both without the calls, files and signals that only Linux has."""
    (tmp_path / "sitecustomize.py").write_text(LESS)
    (tmp_path / "told.py").write_text(
        "import os, torch\n"
        "from rove import host\n"
        "class Told:\n"
        "    def core_count(self, t):\n"
        "        assert not hasattr(os, 'sched_setaffinity') and host.cores() == ()\n"
        "        return int(t.sum()), host.core_count()\n"
        "    def close(self): pass\n"
    )
    code = (
        "import importlib, os, pkgutil, torch, rove\n"
        "from told import Told\n"
        "from rove import host, interrupt, rundir, train\n"
        "from rove.config.schema import PPO, Run\n"
        "from rove.placement.inventory import Inventory\n"
        "from rove.placement.plan import make_plan\n"
        "from rove.runtime import memory\n"
        "from rove.runtime.channel import Segment\n"
        "from rove.runtime.local import InChild\n"
        "import rove.cli, rove.doctor, rove.cluster.local, rove.cluster.ray, rove.envs.libero.scenes\n"
        "assert not hasattr(os, 'sched_getaffinity') and host.cores() == ()\n"
        "assert memory.available() is None\n"
        "host.prepare(1)\n"
        "with host.bound((0,), 1): pass\n"
        "make_plan(Run('t', PPO()), Inventory.here())\n"
        "rundir.about(Run('t', PPO()))\n"
        "with interrupt.Interrupt(): pass\n"
        "assert Segment(1 << 20).tensor(0, (1 << 20,), torch.uint8).fill_(1).sum() == 1 << 20\n"
        "actor = InChild('told', Told, cores=(0,))\n"
        "print(actor.call(Told.core_count, torch.ones(1 << 17)).result() == (1 << 17, os.cpu_count()))\n"
        "actor.close()\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert done.stdout.strip() == "True", done.stderr[-2000:]


def test_what_only_linux_has_is_asked_for_in_few_places():
    """A call that another system lacks fails there when it is reached, which no test on Linux notices."""
    allowed = {
        "host.py": {"os.sched_getaffinity", "os.sched_setaffinity", "prctl"},
        "runtime/fork.py": {"os.fork", "signal.pthread_sigmask"},
        "runtime/memory.py": {"os.memfd_create", "os.posix_fallocate", "/proc/meminfo", "/sys/fs"},
        "rundir.py": {"/proc/cpuinfo"},
    }
    pattern = re.compile(
        r"os\.(?:sched_\w+|memfd_create|posix_fallocate|fork\w*|eventfd|pidfd_open|setns|unshare|getrandom)"
        r"|signal\.(?:pthread_\w+|SIGRT\w+|sigwait\w*|setitimer)|\bprctl\b|^import resource|/proc/\w+|/sys/fs"
        r"|set_start_method|get_context|\bepoll\b|AF_NETLINK",
        re.MULTILINE,
    )
    source = Path(host.__file__).parent
    found = {
        path.relative_to(source).as_posix(): names
        for path in source.rglob("*.py")
        if (names := set(pattern.findall(path.read_text())))
    }
    assert found == allowed
