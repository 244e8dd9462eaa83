"""Where the ManiSkill suites can be tested: the package, the assets and a Vulkan device that they need."""

from __future__ import annotations

import importlib.util
import os
import tarfile
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUNDLES = ROOT / os.environ.get("ROVE_ASSET_BUNDLES", "../shared/assets")


@cache
def lacking() -> str:
    """Why these tests cannot run here; empty where they can. Unpacks the assets once, into `build`."""
    if importlib.util.find_spec("mani_skill") is None:
        return 'mani_skill is not installed: pip install ".[maniskill]"'
    from rove.envs.maniskill import assets, vulkan

    if (finding := vulkan.finding()).status != "ok":
        return f"{finding.detail}; {finding.fix}"
    if not assets.absent():
        return ""
    bundle, folder = BUNDLES / "maniskill_bridge.tar.gz", ROOT / "build" / "assets" / "maniskill"
    if not bundle.is_file():
        return f"no assets: {bundle} does not exist; ROVE_ASSET_BUNDLES says where it is"
    if not (folder / "data").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(bundle) as archive:
            archive.extractall(folder, filter="data")
    os.environ["MS_ASSET_DIR"] = str(folder)
    return ""


def require() -> None:
    """Skip the test, with the reason, where ManiSkill cannot be tested."""
    if reason := lacking():
        pytest.skip(reason)
