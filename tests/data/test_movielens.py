"""Downloads, against a server on the loopback that breaks, lies, is busy and comes back."""

import errno
import hashlib
import io
import socket
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from jaxrec.cli.main import main
from jaxrec.data import movielens
from jaxrec.data.movielens import fetch
from jaxrec.errors import FetchError

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
        self.breaks: list[int] = []  # bytes after which the connection breaks, by request
        self.statuses: list[int] = []  # errors to answer first
        self.requests: list[int] = []  # status of each answer about the archive
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
        status = self.statuses.pop(0) if self.statuses else 200
        self.requests.append(status)
        if status == 200:
            self._send(request, 200, self.content, self.breaks.pop(0) if self.breaks else None)
        else:
            self._send(request, status, b"")

    @staticmethod
    def _send(request: BaseHTTPRequestHandler, status: int, body: bytes, upto: int | None = None) -> None:
        request.send_response(status)
        request.send_header("Content-Length", str(len(body)))
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


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between two attempts


def _fetch(mirror: Mirror, out: Path) -> Path:
    return fetch("ml-1m", out, mirror.url, 2, lambda _: None)


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


def test_a_broken_connection_is_tried_again_and_leaves_nothing(mirror: Mirror, tmp_path: Path) -> None:
    mirror.breaks = [100_000, 0]
    assert _fetch(mirror, tmp_path).read_bytes() == mirror.content
    (tmp_path / "ml-1m.zip").unlink()
    mirror.breaks, mirror.requests = [100_000] * 99, []
    with pytest.raises(FetchError, match=r"ml-1m\.zip: .*100000 bytes read.*Run the command again"):
        _fetch(mirror, tmp_path)
    assert mirror.requests == [200] * 3  # the first and two more
    assert [path.name for path in tmp_path.iterdir()] == ["ml-1m.LICENCE.txt"]


def test_the_other_notation_of_checksums(mirror: Mirror, tmp_path: Path) -> None:
    mirror.md5 = f"MD5 (ml-1m.zip) = {hashlib.md5(mirror.content).hexdigest()}\n"
    assert _fetch(mirror, tmp_path).read_bytes() == mirror.content


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
    assert mirror.requests == [503, 503, 200]
    (tmp_path / "ml-1m.zip").unlink()
    mirror.statuses, mirror.requests = [404], []
    with pytest.raises(FetchError, match=r"ml-1m.zip: the server answers 404"):
        _fetch(mirror, tmp_path)
    assert len(mirror.requests) == 1


def test_no_network(tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        with pytest.raises(FetchError, match=r"refused.*is there a network\?"):
            fetch("ml-1m", tmp_path, f"http://127.0.0.1:{unused.getsockname()[1]}", 2, lambda _: None)


def test_a_full_disk_is_one_clear_error(mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(movielens, "sync", full)
    with pytest.raises(FetchError, match="the disk is full; make room and run again"):
        _fetch(mirror, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_is_no_folder(mirror: Mirror, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FetchError, match="cannot write ml-1m"):
        _fetch(mirror, tmp_path / "file")


def test_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="ml-2m: unknown data set; expected one of ml-latest-small, "):
        fetch("ml-2m", tmp_path)
    result = CliRunner().invoke(main, ["fetch", "ml-2m", "--out", str(tmp_path)])
    assert result.exit_code == 2
