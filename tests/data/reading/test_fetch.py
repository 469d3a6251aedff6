"""Downloads, against a server on the loopback that breaks, forgets, lies and comes back."""

import errno
import hashlib
import io
import json
import re
import socket
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from urllib3.util import Retry

from jaxrec.cli.main import main
from jaxrec.data.reading import download
from jaxrec.data.reading.fetch import FetchError, fetch

BLOCK = download.BLOCK
AT_ONCE = Retry(total=3, backoff_factor=0, status_forcelist=(503,), raise_on_status=False)
TERMS = "These are the terms.\n"


def _archive(seed: int) -> bytes:
    """A zip as GroupLens makes them, with 300,000 bytes that do not shrink."""
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as members:
        members.writestr("ml-1m/README", TERMS)
        members.writestr("ml-1m/ratings.dat", np.random.default_rng(seed).bytes(300_000))
    return memory.getvalue()


class Mirror:
    """A server with one archive; what it does wrong is set by its attributes."""

    def __init__(self) -> None:
        self.content = _archive(0)
        self.md5: str | None = f"{hashlib.md5(self.content).hexdigest()}  ml-1m.zip\n"
        self.etag: str | None = '"v1"'
        self.ranges = True
        self.breaks: list[int] = []  # bytes after which the connection breaks, by request
        self.statuses: list[int] = []  # errors to answer first
        self.requests: list[tuple[str | None, int]] = []  # Range header and status of each request for the archive
        mirror = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                mirror.answer(self)

            def log_message(self, *_: object) -> None:
                """Quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/movielens"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        if request.path.endswith(".md5"):
            self._send(request, 404 if self.md5 is None else 200, (self.md5 or "").encode())
            return
        wanted = request.headers["Range"]
        status, start = 200, 0
        if self.statuses:
            status = self.statuses.pop(0)
        elif wanted and self.ranges and request.headers["If-Range"] == self.etag:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])  # type: ignore[index]
            status = 206 if start < len(self.content) else 416
        self.requests.append((wanted, status))
        if status == 416:
            self._send(request, 416, b"", {"Content-Range": f"bytes */{len(self.content)}"})
        elif status >= 400:
            self._send(request, status, b"")
        else:
            headers = {"ETag": self.etag} if self.etag else {}
            if status == 206:
                headers["Content-Range"] = f"bytes {start}-{len(self.content) - 1}/{len(self.content)}"
            self._send(request, status, self.content[start:], headers, self.breaks.pop(0) if self.breaks else None)

    @staticmethod
    def _send(
        request: BaseHTTPRequestHandler,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        upto: int | None = None,
    ) -> None:
        request.send_response(status)
        request.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body[:upto])


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    mirror = Mirror()
    thread = threading.Thread(target=mirror.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield mirror
    mirror.server.shutdown()
    thread.join()
    mirror.server.server_close()


def _fetch(mirror: Mirror, out: Path) -> Path:
    return fetch("ml-1m", out, mirror.url, AT_ONCE, lambda _: None)


def test_downloads_verifies_and_keeps_the_terms(mirror: Mirror, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["fetch", "ml-1m", "--out", str(tmp_path), "--base-url", mirror.url])
    assert result.exit_code == 0, result.output
    assert "ml-1m comes from GroupLens" in result.output
    assert f"{len(mirror.content):,} bytes, MD5 {hashlib.md5(mirror.content).hexdigest()} as published" in result.output
    assert (tmp_path / "ml-1m.zip").read_bytes() == mirror.content
    terms = (tmp_path / "ml-1m.LICENCE.txt").read_text()
    assert "Harper" in terms
    assert terms.endswith(TERMS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ml-1m.LICENCE.txt", "ml-1m.zip"]


def test_goes_on_where_the_connection_broke(mirror: Mirror, tmp_path: Path) -> None:
    mirror.breaks = [6 * BLOCK, 3 * BLOCK]
    assert _fetch(mirror, tmp_path).read_bytes() == mirror.content
    assert mirror.requests == [(None, 200), (f"bytes={6 * BLOCK}-", 206), (f"bytes={9 * BLOCK}-", 206)]


def test_progress_renews_the_patience_but_its_lack_does_not(mirror: Mirror, tmp_path: Path) -> None:
    mirror.breaks = [2 * BLOCK] * 9
    assert _fetch(mirror, tmp_path).read_bytes() == mirror.content
    mirror.breaks, mirror.etag, mirror.requests = [2 * BLOCK] * 99, '"v2"', []
    (tmp_path / "ml-1m.zip").unlink()
    mirror.ranges = False
    with pytest.raises(FetchError, match=f"broke after {2 * BLOCK:,} bytes"):
        _fetch(mirror, tmp_path)
    assert [status for _, status in mirror.requests] == [200] * 4  # the first and three more
    assert (tmp_path / "ml-1m.zip.part").stat().st_size == 2 * BLOCK


def test_a_later_run_goes_on(mirror: Mirror, tmp_path: Path) -> None:
    mirror.breaks = [6 * BLOCK, 0, 0, 0, 0]
    with pytest.raises(FetchError, match=rf"broke after {6 * BLOCK:,} bytes.*Run the command again to go on"):
        _fetch(mirror, tmp_path)
    assert not (tmp_path / "ml-1m.zip").exists()
    mirror.breaks, mirror.requests = [], []
    assert _fetch(mirror, tmp_path).read_bytes() == mirror.content
    assert mirror.requests == [(f"bytes={6 * BLOCK}-", 206)]


def test_a_whole_part_is_not_received_again(mirror: Mirror, tmp_path: Path) -> None:
    (tmp_path / "ml-1m.zip.part").write_bytes(mirror.content)
    (tmp_path / "ml-1m.zip.part.json").write_text(json.dumps({"url": f"{mirror.url}/ml-1m.zip", "validator": '"v1"'}))
    assert _fetch(mirror, tmp_path).read_bytes() == mirror.content
    assert mirror.requests == [(f"bytes={len(mirror.content)}-", 416)]


def test_a_part_longer_than_the_file_is_started_again(mirror: Mirror, tmp_path: Path) -> None:
    (tmp_path / "ml-1m.zip.part").write_bytes(mirror.content + b"more")
    (tmp_path / "ml-1m.zip.part.json").write_text(json.dumps({"url": f"{mirror.url}/ml-1m.zip", "validator": '"v1"'}))
    assert _fetch(mirror, tmp_path).read_bytes() == mirror.content
    assert [status for _, status in mirror.requests] == [416, 200]


@pytest.mark.parametrize("kept", ["", '{"url": "http://elsewhere/ml-1m.zip", "validator": "v1"}', '{"url": "http:'])
def test_a_part_of_unknown_origin_is_started_again(kept: str, mirror: Mirror, tmp_path: Path) -> None:
    (tmp_path / "ml-1m.zip.part").write_bytes(b"x" * 1000)
    if kept:
        (tmp_path / "ml-1m.zip.part.json").write_text(kept)
    assert _fetch(mirror, tmp_path).read_bytes() == mirror.content
    assert mirror.requests == [(None, 200)]


def test_a_file_that_changed_meanwhile_is_started_again(mirror: Mirror, tmp_path: Path) -> None:
    mirror.breaks = [6 * BLOCK, 0, 0, 0, 0]
    with pytest.raises(FetchError):
        _fetch(mirror, tmp_path)
    mirror.content, mirror.etag, mirror.breaks, mirror.requests = _archive(1), '"v2"', [], []
    mirror.md5 = f"MD5 (ml-1m.zip) = {hashlib.md5(mirror.content).hexdigest()}\n"  # the other notation of GroupLens
    assert _fetch(mirror, tmp_path).read_bytes() == mirror.content
    assert mirror.requests == [(f"bytes={6 * BLOCK}-", 200)]


@pytest.mark.parametrize("etag", [None, 'W/"v1"'])
def test_without_a_strong_validator_it_starts_again(etag: str | None, mirror: Mirror, tmp_path: Path) -> None:
    mirror.etag, mirror.breaks = etag, [6 * BLOCK]
    assert _fetch(mirror, tmp_path).read_bytes() == mirror.content
    assert mirror.requests == [(None, 200), (None, 200)]


def test_a_server_without_ranges_sends_all_again(mirror: Mirror, tmp_path: Path) -> None:
    mirror.ranges, mirror.breaks = False, [6 * BLOCK]
    assert _fetch(mirror, tmp_path).read_bytes() == mirror.content
    assert mirror.requests == [(None, 200), (f"bytes={6 * BLOCK}-", 200)]


def test_a_wrong_checksum_leaves_nothing(mirror: Mirror, tmp_path: Path) -> None:
    mirror.md5 = f"{'0' * 32}  ml-1m.zip\n"
    with pytest.raises(FetchError, match=f"MD5 {hashlib.md5(mirror.content).hexdigest()}, expected {'0' * 32}"):
        _fetch(mirror, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_checksum_file_of_something_else_is_refused(mirror: Mirror, tmp_path: Path) -> None:
    mirror.md5 = "<html>Welcome</html>"
    with pytest.raises(FetchError, match="expected one MD5, found '<html>Welcome"):
        _fetch(mirror, tmp_path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (_archive(0)[:-10], "not a whole zip archive"),
        (_archive(0).replace(_archive(0)[200_000:200_004], b"oops"), "ratings.dat in the archive is damaged"),
        (b"<html>Log in to this network</html>", "not a whole zip archive"),
    ],
)
def test_without_a_published_checksum_the_archive_itself_is_checked(
    content: bytes, problem: str, mirror: Mirror, tmp_path: Path
) -> None:
    mirror.md5 = None
    assert _fetch(mirror, tmp_path / "good").read_bytes() == mirror.content
    mirror.content = content
    with pytest.raises(FetchError, match=problem):
        _fetch(mirror, tmp_path / "bad")
    assert list((tmp_path / "bad").iterdir()) == []


def test_what_is_there_is_verified_and_never_replaced(mirror: Mirror, tmp_path: Path) -> None:
    _fetch(mirror, tmp_path)
    mirror.requests = []
    _fetch(mirror, tmp_path)
    assert mirror.requests == []
    (tmp_path / "ml-1m.zip").write_bytes(b"damaged")
    with pytest.raises(FetchError, match=r"ml-1m\.zip is there already, but the checksum differs.*move it away"):
        _fetch(mirror, tmp_path)
    assert (tmp_path / "ml-1m.zip").read_bytes() == b"damaged"


def test_a_busy_server_is_asked_again_and_a_refusal_is_not(mirror: Mirror, tmp_path: Path) -> None:
    mirror.statuses = [503, 503]
    assert _fetch(mirror, tmp_path).read_bytes() == mirror.content
    assert [status for _, status in mirror.requests] == [503, 503, 200]
    (tmp_path / "ml-1m.zip").unlink()
    mirror.statuses, mirror.requests = [404], []
    with pytest.raises(FetchError, match=r"ml-1m.zip: the server answers 404"):
        _fetch(mirror, tmp_path)
    assert len(mirror.requests) == 1


def test_no_network(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        with pytest.raises(FetchError, match=r"refused.*is there a network\?"):
            fetch("ml-1m", tmp_path, f"http://127.0.0.1:{unused.getsockname()[1]}", AT_ONCE, lambda _: None)


def test_too_little_room_is_said_before_the_download(
    mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1_000}))
    with pytest.raises(FetchError, match=f"{len(mirror.content):,} bytes to come, but only 1,000 are free"):
        _fetch(mirror, tmp_path)


def test_a_disk_that_fills_up_keeps_what_fits(mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FullDisk(io.FileIO):
        def write(self, data: object) -> int:
            super().write(bytes(data)[:1000])  # type: ignore[call-overload]
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(download, "open", FullDisk, raising=False)
        with pytest.raises(FetchError, match="the disk is full; make room and run again to go on"):
            _fetch(mirror, tmp_path)
    mirror.requests = []
    assert _fetch(mirror, tmp_path).read_bytes() == mirror.content
    assert mirror.requests == [("bytes=1000-", 206)]


def test_a_path_that_is_no_folder(mirror: Mirror, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FetchError, match="cannot write ml-1m"):
        _fetch(mirror, tmp_path / "file")


def test_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="ml-2m: unknown data set; expected one of ml-latest-small, "):
        fetch("ml-2m", tmp_path)
    result = CliRunner().invoke(main, ["fetch", "ml-2m", "--out", str(tmp_path)])
    assert result.exit_code == 2
