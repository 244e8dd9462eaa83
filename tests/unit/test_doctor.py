"""The doctor: what it says of machines that lack something, and of this one."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from rove import doctor
from rove.findings import Finding, table


def test_this_machine_can_simulate():
    assert doctor.python().status == "ok"
    assert doctor.mujoco_versions().status == "ok"


def test_versions_that_do_not_match_are_an_error(monkeypatch):
    monkeypatch.setattr(doctor, "_version", {"mujoco": "3.17.0", "mujoco-warp": "3.16.1"}.get)
    finding = doctor.mujoco_versions()
    assert finding.status == "error"
    assert "3.17.0 and mujoco-warp 3.16.1 do not match" in finding.detail
    assert finding.fix.endswith("mujoco-warp==3.17.0")


def test_a_missing_core_package_is_an_error_everywhere_it_is_needed(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda package: None if package in ("torch", "mujoco") else "1.0")
    missing = [f.name for f in doctor.core_packages() if f.status == "error"]
    assert missing == ["torch", "mujoco"]
    for finding in (doctor.devices(), doctor.mujoco_versions(), *doctor.renderers()):
        assert (finding.status, finding.fix) == ("error", "make setup")


@pytest.mark.parametrize(("colours", "status"), [(1, "error"), (40, "ok")])
def test_a_blank_frame_is_an_error(monkeypatch, colours, status):
    monkeypatch.setattr(doctor, "_drawing_devices", lambda: ["cpu"])
    monkeypatch.setattr(doctor, "_render", lambda device: colours)
    assert [finding.status for finding in doctor.renderers()] == [status]


def test_every_device_is_tried_and_what_draws_there_is_said(monkeypatch):
    def render(device: str) -> int:
        if device == "cuda:1":
            raise RuntimeError("out of memory")
        return 40

    monkeypatch.setattr(doctor, "_drawing_devices", lambda: ["cpu", "cuda:0", "cuda:1"])
    monkeypatch.setattr(doctor, "_render", render)
    cpu, first, second = doctor.renderers()
    assert (cpu.status, first.status, second.status) == ("ok", "ok", "warn")
    assert " on cpu in " in cpu.detail and cpu.detail.endswith("; suites that draw with Warp draw here")
    assert " on cuda:0 in " in first.detail and first.detail.endswith("draw here with --env.render cuda")
    assert "fails on cuda:1: out of memory" in second.detail


def test_this_machine_draws_on_its_cpu():
    cpu, *_ = doctor.renderers()
    assert cpu.status == "ok" and " on cpu in " in cpu.detail


def test_the_table_is_all_that_is_printed():
    command = [sys.executable, "-m", "rove.cli", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stderr == ""
    line = re.compile(r" *(ok|pass|warn|missing|fail|error)  \S|  +→ ")
    assert [text for text in done.stdout.splitlines() if not line.match(text)] == []


def test_old_python_is_an_error(monkeypatch):
    monkeypatch.setattr("platform.python_version", lambda: "3.10.4")
    assert doctor.python().status == "error"


def test_each_missing_optional_package_gets_its_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: object() if module == "ray" else None)
    findings = {f.name: f for f in (*doctor.optional_packages(), *doctor.suites())}
    assert findings["Ray"].status == "ok"
    assert findings["LIBERO"].status == "missing"
    assert findings["LIBERO"].fix.endswith('".[libero]"')


def test_every_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    fixes = [finding.fix for finding in (*doctor.optional_packages(), *doctor.suites())]
    extras = {match[1] for fix in fixes if (match := re.search(r"\.\[(\w+)\]", fix))}
    assert extras == set(project["optional-dependencies"]) - {"dev", "docs"}


def test_table_puts_the_fix_below_its_finding():
    rows = [Finding("A", "ok", "fine"), Finding("Longer", "missing", "gone", "get it")]
    assert table(rows).splitlines() == [
        "     ok  A       fine",
        "missing  Longer  gone",
        "                 → get it",
    ]


def test_importing_it_is_cheap():
    code = "import sys, rove.doctor; sys.exit('torch' in sys.modules or 'mujoco' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
