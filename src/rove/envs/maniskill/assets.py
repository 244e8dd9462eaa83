"""The folder of the ManiSkill suites' data, and a check that they are all there.

ManiSkill keeps what it downloads below `$MS_ASSET_DIR/data` (default `~/.maniskill`) and reads that variable
when it is imported. `ROVE_ASSETS` names a folder for every suite; ours is `maniskill` below it, or the folder
itself where it holds `data`.
"""

from __future__ import annotations

import os
from pathlib import Path

from rove import host
from rove.errors import RoveError
from rove.findings import Finding

FIX = "rove assets maniskill downloads them; ROVE_ASSETS or MS_ASSET_DIR names the folder of a copy"


def root() -> Path:
    """The folder that holds `data`, whether or not it exists."""
    if given := os.environ.get("MS_ASSET_DIR"):
        return Path(given)
    if given := os.environ.get("ROVE_ASSETS"):
        folder = Path(given)
        return folder if (folder / "data").is_dir() else folder / "maniskill"
    return host.home("ROVE_ASSETS") / ".maniskill"


GROUPS: dict[str, tuple[str, ...]] = {
    "robot": ("robots/widowx/wx250s.urdf",),
    "scene": ("tasks/bridge_v2_real2sim_dataset/stages/bridge_table_1_v1.glb",),
    "objects": ("tasks/carrot/more_carrot/model_db.json",),
    "receptacles": ("tasks/carrot/more_plate/model_db.json",),
    "tables": ("tasks/carrot/more_table/model_db.json",),
}
"""Parts of the put-on-plate suite's data: name -> a file below `data` that it cannot do without."""


def absent() -> list[str]:
    """List the parts of the put-on-plate suite that are not there: names of GROUPS."""
    data = root() / "data"
    return [name for name, files in GROUPS.items() if not all((data / file).is_file() for file in files)]


def finding() -> Finding:
    """Tell the doctor whether the put-on-plate suite's data are all there."""
    lacking, where = absent(), f"of the put-on-plate suite, at {root()}"
    if lacking:
        return Finding("Assets", "missing", f"no {', '.join(lacking)} {where}", FIX)
    return Finding("Assets", "ok", where)


def data() -> Path:
    """The folder `data` of the put-on-plate suite. Raises RoveError, with the fix, where a part is absent."""
    if lacking := absent():
        raise RoveError(f"No {', '.join(lacking)} of the put-on-plate suite below {root()}: {FIX}.")
    return root() / "data"
