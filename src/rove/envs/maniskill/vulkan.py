"""The Vulkan devices of this machine, asked of the loader itself: SAPIEN renders with one of them.

Run as a script it prints them, one a line; `devices` runs it so, because a broken driver can crash a process.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import re
import subprocess
import sys
from typing import NamedTuple

from rove.findings import Finding

LAVAPIPE = (24, 3)
"""Mesa's software renderer from here on has what SAPIEN's shaders need."""
FIX = (
    "a GPU: install its driver's Vulkan part. No GPU: Mesa's lavapipe, 24.3 or newer; on Debian 12 add "
    "bookworm-backports to apt's sources, then, as root: "
    "apt-get update && apt-get install -t bookworm-backports mesa-vulkan-drivers"
)


class Device(NamedTuple):
    """A physical device as Vulkan describes it."""

    name: str
    software: bool
    driver: str
    """The driver's own name and version, e.g. "Mesa 25.0.7-2"."""

    @property
    def too_old(self) -> bool:
        version = re.search(r"(\d+)\.(\d+)", self.driver)
        return self.software and version is not None and tuple(map(int, version.groups())) < LAVAPIPE


def devices() -> list[Device]:
    """List every device. Raises OSError where there is no Vulkan loader, or a driver broke down."""
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, check=False, timeout=120
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise OSError(lines[-1] if lines else f"the Vulkan loader ended with code {done.returncode}")
    found = []
    for line in done.stdout.splitlines():
        name, software, driver = line.split("\t")
        found.append(Device(name, software == "1", driver))
    return found


def finding() -> Finding:
    """Tell `rove doctor` what SAPIEN would render with."""
    try:
        there = devices()
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("Vulkan", "missing", f"no device for the ManiSkill suites: {error}", FIX)
    if not there:
        return Finding("Vulkan", "missing", "no device for the ManiSkill suites", FIX)
    described = ", ".join(f"{device.name}, {device.driver}" for device in there)
    if all(device.too_old for device in there):
        return Finding("Vulkan", "warn", f"{described}: too old to render the ManiSkill suites", FIX)
    return Finding("Vulkan", "ok", f"{described}; renders the ManiSkill suites")


# --- the loader -----------------------------------------------------------------------------------


class _Application(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_int),
        ("next", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("version", ctypes.c_uint32),
        ("engine", ctypes.c_char_p),
        ("engine_version", ctypes.c_uint32),
        ("api", ctypes.c_uint32),
    ]


class _InstanceInfo(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_int),
        ("next", ctypes.c_void_p),
        ("flags", ctypes.c_uint32),
        ("application", ctypes.POINTER(_Application)),
        ("layer_count", ctypes.c_uint32),
        ("layers", ctypes.c_void_p),
        ("extension_count", ctypes.c_uint32),
        ("extensions", ctypes.c_void_p),
    ]


class _Core(ctypes.Structure):
    _fields_ = [
        ("api", ctypes.c_uint32),
        ("driver", ctypes.c_uint32),
        ("vendor", ctypes.c_uint32),
        ("device", ctypes.c_uint32),
        ("kind", ctypes.c_int),
        ("name", ctypes.c_char * 256),
        ("rest", ctypes.c_uint8 * 4096),  # limits and more, which nothing here reads
    ]


class _Driver(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_int),
        ("next", ctypes.c_void_p),
        ("id", ctypes.c_int),
        ("name", ctypes.c_char * 256),
        ("info", ctypes.c_char * 256),
        ("conformance", ctypes.c_uint8 * 4),
    ]


class _Properties(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_int), ("next", ctypes.c_void_p), ("core", _Core)]


_SOFTWARE = 4
"""Vulkan's number for a device that is a CPU (VK_PHYSICAL_DEVICE_TYPE_CPU)."""


def _enumerate() -> list[Device]:
    library = ctypes.util.find_library("vulkan") or "libvulkan.so.1"
    loader = ctypes.CDLL(library)
    application = _Application(kind=0, api=1 << 22 | 1 << 12)
    info = _InstanceInfo(kind=1, application=ctypes.pointer(application))
    instance = ctypes.c_void_p()
    if code := loader.vkCreateInstance(ctypes.byref(info), None, ctypes.byref(instance)):
        raise OSError(f"vkCreateInstance answered {code}: no driver is installed")
    count = ctypes.c_uint32()
    loader.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), None)
    handles = (ctypes.c_void_p * count.value)()
    loader.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), handles)
    found = []
    for handle in handles:
        driver = _Driver(kind=1000196000)
        about = _Properties(kind=1000059001, next=ctypes.addressof(driver))
        loader.vkGetPhysicalDeviceProperties2(ctypes.c_void_p(handle), ctypes.byref(about))
        core = about.core
        found.append(Device(core.name.decode(), core.kind == _SOFTWARE, driver.info.decode()))
    return found


if __name__ == "__main__":
    for each in _enumerate():
        print(each.name, int(each.software), each.driver, sep="\t")
