"""Memory that processes share: nameless, and of any size."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

from rove.runtime.channel import Segment

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="the system has no anonymous files")


def test_a_segment_is_no_file_of_dev_shm():
    segment = Segment(1 << 20)
    assert os.readlink(f"/proc/self/fd/{segment.fd}").startswith("/memfd:")
    view = segment.tensor(0, (1 << 18,), torch.float32)
    segment.release()
    assert view.fill_(2.0).sum() == 1 << 19


def test_a_segment_may_be_larger_than_dev_shm_is():
    """In a container that is 64 MB unless it is told otherwise; what a file lacks there ends the process."""
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "/dev/shm"]
    if not shutil.which("unshare") or subprocess.run([*alone, *mount], capture_output=True).returncode:
        pytest.skip("this user may not mount a small /dev/shm")
    code = (
        "import torch; from rove.runtime.channel import Segment; "
        "print(int(Segment(1 << 20).tensor(0, (1 << 20,), torch.uint8).fill_(1).sum()))"
    )
    script = f"{' '.join(mount)} && exec {sys.executable} -c '{code}'"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([*alone, "sh", "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"signal {-done.returncode} {done.stderr}"
    assert int(done.stdout) == 1 << 20
