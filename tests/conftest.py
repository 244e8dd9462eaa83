"""What all tests share: a cache of compiled scenes in the build folder, not in the user's home."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("ROVE_CACHE", str(Path(__file__).resolve().parents[1] / "build" / "cache"))
