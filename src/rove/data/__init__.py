"""Data of robots: recordings in the layouts of LeRobot and of LIBERO, read, written and looked at.

`recording` is what all of them have in common, `lerobot` and `libero_files` are the layouts, `importing`
makes demonstrations for SFT of a recording, `exporting` the other way, `show` is for looking.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from rove.errors import RoveError


@contextmanager
def installed() -> Iterator[None]:
    """Within the block what data sets need is imported. Raises RoveError, with the fix, where it is
    absent."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise RoveError(
            f"Reading and writing data sets needs the package {error.name!r}, which is not installed. "
            "Install it: pip install 'rove[data]'"
        ) from error
