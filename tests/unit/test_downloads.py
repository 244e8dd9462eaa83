"""Downloading assets: from a server of this machine, in one go, resumed, damaged, and absent."""

from __future__ import annotations

import hashlib
import io
import stat
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from rove.cli import main
from rove.envs import downloads
from rove.envs.downloads import Archive
from rove.envs.maniskill import assets, sources, vulkan
from rove.errors import RoveError
from rove.findings import Finding


def packed() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("repository-1a2b/inside/model.json", "{}" * 5000)
        archive.writestr("repository-1a2b/elsewhere.txt", "not wanted")
    return out.getvalue()


CONTENT = packed()


class Server(BaseHTTPRequestHandler):
    """Serves CONTENT, from the byte asked for; under /short it hangs up half-way, under /bad it lies."""

    asked: list[str | None] = []

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        Server.asked.append(asked)
        if self.path == "/none":
            self.send_error(404)
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        body = CONTENT if self.path != "/bad" else CONTENT[:-40] + b"x" * 40
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(
            body[start : len(body) // 2] if self.path == "/short" and not start else body[start:]
        )

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


@pytest.fixture
def fetch(monkeypatch, tmp_path, address):
    def run(path: str, **changes: str) -> Finding:
        folders = (("*/inside/", "data/things/"),)
        archive = Archive("things", address + path, folders, ("data/things/model.json",), **changes)  # type: ignore[arg-type]
        monkeypatch.setattr(sources, "archives", lambda: (archive,))
        monkeypatch.setattr(assets, "root", lambda: tmp_path)
        (finding,) = downloads.fetch("maniskill", only_check=False, say=lambda text: None)
        return finding

    return run


def test_what_is_missing_is_downloaded_and_put_in_place(fetch, tmp_path):
    assert fetch("/whole", sha256=hashlib.sha256(CONTENT).hexdigest()).status == "ok"
    assert (tmp_path / "data/things/model.json").read_text() == "{}" * 5000
    assert [p.name for p in tmp_path.rglob("*.txt")] == []
    Server.asked.clear()
    assert fetch("/whole").detail == f"at {tmp_path}"
    assert Server.asked == []


def test_a_broken_download_goes_on_where_it_was(fetch, tmp_path):
    first = fetch("/short")
    assert first.status == "error" and "what has arrived is kept" in first.fix
    Server.asked.clear()
    assert fetch("/short").status == "ok"
    assert Server.asked == [f"bytes={len(CONTENT) // 2}-"]
    assert (tmp_path / "data/things/model.json").is_file()


def test_what_is_not_what_it_should_be_is_not_unpacked(fetch, tmp_path):
    assert "SHA-256 is" in fetch("/whole", sha256="0" * 64).detail
    assert fetch("/bad").status == "error"
    assert "404" in fetch("/none").detail
    assert not (tmp_path / "data").exists()


def test_nothing_is_written_outside_the_root(tmp_path, address):
    archive = Archive("things", address + "/whole", (("*/inside/", "../outside/"),), ())
    file = downloads.download(archive, tmp_path / "downloads", lambda text: None)
    with pytest.raises(RoveError, match="outside"):
        downloads.unpack(archive, file, tmp_path / "root")


@pytest.mark.parametrize("wrong", ["../../escaped", "link"])
def test_an_archive_is_unpacked_whole_or_not_at_all(tmp_path, wrong):
    file, root = tmp_path / "things.zip", tmp_path / "root"
    with zipfile.ZipFile(file, "w") as content:
        content.writestr("inside/first.json", "{}")
        member = zipfile.ZipInfo(f"inside/{wrong}")
        if wrong == "link":
            member.external_attr = (stat.S_IFLNK | 0o777) << 16
        content.writestr(member, "/etc")
    with pytest.raises(RoveError, match=f"inside/{wrong}"):
        downloads.unpack(Archive("things", "", (("inside/", "data/"),), ()), file, root)
    assert list(tmp_path.rglob("*")) == [file]


def test_the_command_says_what_is_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(assets, "root", lambda: tmp_path)
    assert main(["assets", "maniskill", "--check"]) == 1
    out = capsys.readouterr().out
    assert "robots/widowx/wx250s.urdf" in out and "more_carrot/model_db.json" in out
    assert main(["assets", "manskill"]) == 2
    assert "Did you mean 'maniskill'" in capsys.readouterr().err


def test_where_assets_are_looked_for(monkeypatch, tmp_path):
    monkeypatch.delenv("MS_ASSET_DIR", raising=False)
    monkeypatch.delenv("ROVE_ASSETS", raising=False)
    assert assets.root() == Path.home() / ".maniskill"
    monkeypatch.setenv("ROVE_ASSETS", str(tmp_path))
    assert assets.root() == tmp_path / "maniskill"
    (tmp_path / "data").mkdir()
    assert assets.root() == tmp_path
    monkeypatch.setenv("MS_ASSET_DIR", "/elsewhere")
    assert assets.root() == Path("/elsewhere")
    assert assets.absent() == list(assets.GROUPS)


@pytest.mark.parametrize(
    ("found", "status", "words"),
    [
        ([], "missing", "no device"),
        ([vulkan.Device("llvmpipe", True, "Mesa 22.3.6")], "warn", "too old"),
        ([vulkan.Device("llvmpipe", True, "Mesa 24.3.0")], "ok", "renders"),
        (
            [vulkan.Device("NVIDIA H100", False, "570.1"), vulkan.Device("llvmpipe", True, "Mesa 22.3")],
            "ok",
            "H100",
        ),
    ],
)
def test_the_doctor_of_vulkan(monkeypatch, found, status, words):
    monkeypatch.setattr(vulkan, "devices", lambda: found)
    finding = vulkan.finding()
    assert finding.status == status and words in finding.detail
    assert ("mesa-vulkan-drivers" in finding.fix) == (status != "ok")
