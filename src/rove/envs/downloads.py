"""Downloading what a suite needs: resumable, checked, each file in place only when it is whole.

What there is to download, a suite's entry point says by `downloads()`: a folder and its archives.
"""

from __future__ import annotations

import hashlib
import shutil
import stat
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rove.envs import registry
from rove.errors import RoveError, nearest
from rove.findings import Finding

_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Archive:
    """A zip file, and where its content goes."""

    name: str
    url: str
    folders: tuple[tuple[str, str], ...]
    """(folder in the archive, folder below the root that gets its content)."""
    needs: tuple[str, ...]
    """Files below the root by which it counts as there."""
    sha256: str | None = None
    """Checksum; None where the source publishes none, and the zip's own checksums have to hold."""
    terms: str = ""
    """Licence, as far as the source says."""


def fetch(suite: str, *, only_check: bool, say: Callable[[str], object]) -> list[Finding]:
    """Download what is missing, one finding an archive. Raises RoveError on a suite that needs nothing."""
    offers = {kind: offer for kind in registry.kinds() if (offer := registry.offered(kind, "downloads"))}
    if suite not in offers:
        raise RoveError(f"Nothing to download for {suite!r}. {nearest(suite, offers)}")
    root, archives = offers[suite]()
    return [_fetch(archive, root, only_check, say) for archive in archives]


def missing(archive: Archive, root: Path) -> list[str]:
    """List the files of an archive that are not there."""
    return [file for file in archive.needs if not (root / file).is_file()]


def _fetch(archive: Archive, root: Path, only_check: bool, say: Callable[[str], object]) -> Finding:
    if not (absent := missing(archive, root)):
        return Finding(archive.name, "ok", f"at {root}")
    if only_check:
        return Finding(archive.name, "missing", f"{', '.join(absent)} below {root}", f"from {archive.url}")
    try:
        file = download(archive, root / ".downloads", say)
        unpack(archive, file, root)
    except (OSError, zipfile.BadZipFile, RoveError) as error:
        return Finding(
            archive.name, "error", f"{archive.url}: {error}", "run it again: what has arrived is kept"
        )
    if absent := missing(archive, root):
        return Finding(archive.name, "error", f"{archive.url} has no {', '.join(absent)}", "report this")
    file.unlink()
    return Finding(archive.name, "ok", f"downloaded to {root}. {archive.terms}".strip())


def download(archive: Archive, folder: Path, say: Callable[[str], object]) -> Path:
    """Download an archive as a whole, checked file. Bytes that an earlier try left are kept.

    Raises OSError where the source cannot be reached, RoveError where what arrived is not what it should be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file, part = folder / f"{archive.name}.zip", folder / f"{archive.name}.part"
    if file.is_file():
        return file
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(archive.url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            resumed = answer.status == 206
            say(f"{archive.name}: {archive.url}" + (f", from byte {have}" if resumed else ""))
            with part.open("ab" if resumed else "wb") as out:
                shutil.copyfileobj(answer, out, _BLOCK)
            expected = answer.headers.get("Content-Length")
            arrived = part.stat().st_size - (have if resumed else 0)
            if expected is not None and arrived < int(expected):
                raise OSError(f"the connection ended after {arrived} of {expected} bytes")
    except urllib.error.HTTPError as error:
        if error.code != 416:  # nothing is left to send: the part is the whole
            raise
    if archive.sha256 is not None and (found := _sha256(part)) != archive.sha256:
        part.unlink()
        raise RoveError(f"SHA-256 is {found}, not {archive.sha256}")
    with zipfile.ZipFile(part) as opened:
        if (bad := opened.testzip()) is not None:
            part.unlink()
            raise RoveError(f"{bad} in it is damaged")
    part.rename(file)
    return file


def unpack(archive: Archive, file: Path, root: Path) -> None:
    """Put the archive's folders in their places; a file that is there already stays.

    Nothing is put anywhere before everything is unpacked. Raises RoveError, naming the member, where one is
    a link or would be written outside `root`.
    """
    with zipfile.ZipFile(file) as opened, tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        places: list[tuple[str, Path]] = []
        for name, target in _wanted(archive, opened.namelist()):
            path = (root / target).resolve()
            if root.resolve() not in path.parents:
                raise RoveError(f"{name} would be written outside {root}")
            if stat.S_ISLNK(opened.getinfo(name).external_attr >> 16):
                raise RoveError(f"{name} in it is a link")
            if not path.is_file():
                places.append((name, path))
        drafts: list[tuple[Path, Path]] = []
        for number, (name, path) in enumerate(places):
            draft = Path(scratch) / str(number)
            with opened.open(name) as source, draft.open("wb") as out:
                shutil.copyfileobj(source, out, _BLOCK)
            drafts.append((draft, path))
        # Those by which the archive counts as there come last: a stop in between is then seen.
        needed = {(root / needs).resolve() for needs in archive.needs}
        for draft, path in sorted(drafts, key=lambda each: each[1] in needed):
            path.parent.mkdir(parents=True, exist_ok=True)
            draft.rename(path)


def _wanted(archive: Archive, names: list[str]) -> Iterator[tuple[str, str]]:
    """Yield (name in the archive, path below the root) of each file to unpack."""
    for name in names:
        for folder, target in archive.folders:
            # A leading "*/" stands for any one folder: archives of a commit have its hash for one.
            inside = name.partition("/")[2] if folder.startswith("*/") else name
            if inside.startswith(folder.removeprefix("*/")) and not name.endswith("/"):
                yield name, target + inside.removeprefix(folder.removeprefix("*/"))


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
