"""Locating a checkpoint: a local directory, or a name on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from rove.errors import RoveError

_FILES = ["*.json", "*.safetensors", "tokenizer.model", "*_checkpoint.pt"]
"""Patterns of the files that are downloaded; a repository's Python files are never fetched."""
_DESCRIBED_BY = ("config.json", "adapter_config.json")
_WITHIN = (
    "sft",
    "best",
    "checkpoints/iteration_*/policy",
    "iteration_*/policy",
    "policy",
    "lora_adapter",
    "*",
)
"""Patterns of places where a checkpoint may lie within a directory that is none itself."""


def locate(name: Path | str, *, download: bool = True) -> Path:
    """Return the directory of checkpoint `name`, a local one or "owner/name", which is downloaded once.

    Raises RoveError where it is neither, or where it is not here yet and `download` is False.
    """
    directory = Path(name)
    if directory.is_dir():
        _refuse_other_directory(directory)
        return directory
    if directory.is_file():
        raise RoveError(f"{name} is not a checkpoint directory but a file: give the folder that holds it.")
    if not is_hub_name(name):
        raise RoveError(
            f"{name} is not a checkpoint directory: there is no such folder, and it is no name on the "
            "Hugging Face hub (owner/name) either. Check the path."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=_FILES, local_files_only=not download))
    except Exception as error:  # of whichever library the hub's client makes its requests with
        raise RoveError(
            f"'{name}' is no directory here, and could not be had from the Hugging Face hub "
            f"({type(error).__name__}). Check the name and the connection, or download it elsewhere with "
            f"`hf download {name}` and give its directory."
        ) from error


def is_hub_name(name: Path | str) -> bool:
    """Return whether `name` reads "owner/name", by the hub's own rules; a path is better written with a
    leading ./ or /."""
    text = str(name)
    parts = re.fullmatch(r"[\w.-]+/[\w.-]+", text, re.ASCII)
    ends = [end for part in text.split("/") for end in (part[:1], part[-1:])]
    return (
        parts is not None
        and len(text) <= 96
        and "--" not in text
        and ".." not in text
        and not text.endswith(".git")
        and not set(ends) & {".", "-"}
    )


def _refuse_other_directory(directory: Path) -> None:
    """Raise RoveError where a directory is no checkpoint itself, naming those that lie within it."""
    if any((directory / name).is_file() for name in _DESCRIBED_BY):
        return
    places = (place for pattern in _WITHIN for place in sorted(directory.glob(pattern)))
    found = [place for place in places if any((place / name).is_file() for name in _DESCRIBED_BY)]
    what = "a run's directory" if (directory / "run.json").is_file() else "a directory without config.json"
    if found:
        listed = ", ".join(map(str, dict.fromkeys(found)))
        raise RoveError(
            f"{directory} is not a checkpoint directory but {what}: give a policy in it, {listed}."
        )
    raise RoveError(
        f"{directory} is not a checkpoint directory: it has no config.json"
        + (", and the run in it has saved no policy yet." if "run" in what else ".")
    )
