"""Locating a checkpoint: a local directory, or a name on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from rove.errors import RoveError

_FILES = ["*.json", "*.safetensors", "tokenizer.model", "*_checkpoint.pt"]
"""Patterns of the files that are downloaded; a repository's Python files are never fetched."""


def locate(name: Path | str, *, download: bool = True) -> Path:
    """Return the directory of checkpoint `name`, a local one or "owner/name", which is downloaded once.

    Raises RoveError where it is neither, or where it is not here yet and `download` is False.
    """
    directory = Path(name)
    if directory.is_dir():
        return directory
    if not is_hub_name(name):
        raise RoveError(f"{directory} is not a checkpoint directory: there is nothing.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(str(name), allow_patterns=_FILES, local_files_only=not download))
    except (HfHubHTTPError, OSError) as error:
        raise RoveError(
            f"{name!r} is no directory here, and could not be had from the Hugging Face hub "
            f"({type(error).__name__}). Check the name and the connection, or download it elsewhere with "
            f"`hf download {name}` and give its directory."
        ) from error


def is_hub_name(name: Path | str) -> bool:
    """Return whether `name` reads "owner/name"; a path is better written with a leading ./ or /."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name)) is not None
