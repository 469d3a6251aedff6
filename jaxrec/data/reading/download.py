"""One file over HTTP that is resumed after a break.

While it lasts, the download is PATH.part, and PATH.part.json holds the URL and the validator that the server gave.
Asked again, the server is to go on behind what is there only if its file is still the same (If-Range, RFC 9110
section 13.1.5), else to send all of it.
"""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import requests
from tqdm import tqdm
from urllib3.exceptions import MaxRetryError
from urllib3.util import Retry

from jaxrec.errors import FetchError
from jaxrec.files import write_text

TIMEOUT = (10, 60)  # seconds to connect, and between two pieces of an answer
BLOCK = 1 << 14  # what a break may lose


def download(session: requests.Session, url: str, part: Path, retry: Retry) -> None:
    """Fills `part`, going on after breaks; `retry` counts the breaks in a row that brought nothing new.

    Raises requests.RequestException or OSError, after which a later call goes on, and FetchError for an answer that
    breaks the protocol or would not fit on the disk.
    """
    furthest, left = _size(part), retry
    while True:
        try:
            if _receive(session, url, part):
                return
            problem = requests.ConnectionError(f"the connection broke after {_size(part):,} bytes")
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
            if isinstance(error.args[0] if error.args else None, MaxRetryError):
                raise  # could not even connect, after all retries
            problem = requests.ConnectionError(f"the connection broke after {_size(part):,} bytes: {error}")
        if _size(part) > furthest:
            furthest, left = _size(part), retry
        try:
            left = left.increment("GET", url, error=problem)
        except MaxRetryError as error:
            raise problem from error
        left.sleep()


def _receive(session: requests.Session, url: str, part: Path) -> bool:
    """One request; True when `part` is as long as the server's file."""
    start, headers = 0, {}
    validator = _validator(part, url)
    if validator is not None:
        start = _size(part)
        headers = {"Range": f"bytes={start}-", "If-Range": validator}
    with session.get(url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
        if answer.status_code == requests.codes.requested_range_not_satisfiable:
            if answer.headers.get("Content-Range") == f"bytes */{start}":
                return True
            discard(part)
            return False
        answer.raise_for_status()
        if answer.status_code == requests.codes.partial_content:
            came = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
            if came is None or int(came[1]) != start:
                raise FetchError(f"{url}: asked for bytes from {start}, got {answer.headers.get('Content-Range')!r}")
            total: int | None = int(came[2])
        else:
            start = 0
            total = int(answer.headers["Content-Length"]) if "Content-Length" in answer.headers else None
            _remember_validator(part, url, answer.headers)
        free = shutil.disk_usage(part.parent).free
        if total is not None and total - start > free:
            raise FetchError(f"{part.parent}: {total - start:,} bytes to come, but only {free:,} are free")
        with (
            open(part, "ab" if start else "wb") as file,
            tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=part.stem) as bar,
        ):
            for block in answer.iter_content(BLOCK):
                file.write(block)
                bar.update(len(block))
    return total is None or _size(part) == total


def _validator_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _validator(part: Path, url: str) -> str | None:
    """What If-Range needs to go on with `part`; None if there is nothing to go on with."""
    if _size(part) == 0 or not _validator_file(part).exists():
        return None
    try:
        kept = json.loads(_validator_file(part).read_text(encoding="utf-8"))
    except ValueError:
        return None  # written by half: start again
    return kept["validator"] if kept.get("url") == url else None


def _remember_validator(part: Path, url: str, headers: Mapping[str, str]) -> None:
    """A weak ETag (W/) does not promise the same bytes; the date of the last change is the next best."""
    etag = headers.get("ETag", "W/")
    validator = headers.get("Last-Modified") if etag.startswith("W/") else etag
    write_text(_validator_file(part), json.dumps({"url": url, "validator": validator}) + "\n")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def discard(part: Path) -> None:
    """Forgets a download: the next one starts from the first byte."""
    part.unlink(missing_ok=True)
    _validator_file(part).unlink(missing_ok=True)
