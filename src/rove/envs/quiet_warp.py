"""Warp without its greeting, and the device that it works on; importing this starts it."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import warp as wp

from rove import host
from rove.errors import RoveError


def _start() -> None:
    """Start Warp, and keep quiet that a machine has no CUDA driver."""
    wp.config.log_level = wp.LOG_ERROR
    if wp.config.kernel_cache_dir is None and "WARP_CACHE_PATH" not in os.environ:  # which children inherit
        os.environ["WARP_CACHE_PATH"] = str(kernels())
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        wp.init()
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)


def kernels() -> Path:
    """The folder of compiled kernels: in the cache, or where that cannot be written a temporary one, which
    ends with this process."""
    try:
        return host.writable(host.cache() / "warp")
    except RoveError as error:
        warnings.warn(f"{error} Until then Warp compiles its kernels every time.", stacklevel=1)
    folder = Path(tempfile.mkdtemp(prefix="rove-warp-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def devices() -> list[str]:
    """Warp's names for the devices of this machine, the CPU first: "cpu", "cuda:0", …"""
    return [device.alias for device in wp.get_devices()]


def use(device: str) -> None:
    """Make `device` the one that Warp takes where a call names none, as the calls inside MuJoCo Warp do.

    It stays so. The default belongs to the process: a thread that left a `wp.ScopedDevice` would put back
    what it found, and send the launches of threads that are still inside theirs to another device.
    """
    wp.set_device(device)


_start()
