"""Warp without its greeting; importing this starts it."""

from __future__ import annotations

import os

import warp as wp


def _start() -> None:
    """Start Warp, and keep quiet that a machine has no CUDA driver."""
    wp.config.log_level = wp.LOG_ERROR
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        wp.init()
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)


_start()
