"""Downloads MovieLens from GroupLens: verified, and whole or absent under its name.

The MD5 comes from the `.md5` file that GroupLens keeps beside most archives. It detects accidents; it does not protect
against a server or mirror that is under another's control.
"""

import errno
import re
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxrec.errors import FetchError
from jaxrec.files import sync, write_text

DATASETS = ("ml-latest-small", "ml-latest", "ml-100k", "ml-1m", "ml-10m", "ml-20m", "ml-25m", "ml-32m")
BASE_URL = "https://files.grouplens.org/datasets/movielens/"
RETRIES = 5
BUSY = (429, 500, 502, 503, 504)  # answers after which it is worth asking again
TIMEOUT = (10, 60)  # seconds to connect, and between two pieces of an answer
HEADERS = {"Accept-Encoding": "identity"}  # the bytes that arrive are those of the file
NOTICE = """\
{name} comes from GroupLens, University of Minnesota: https://grouplens.org/datasets/movielens/
Its terms are in the README of the archive, copied below. In short (the README decides): research use; do not imply
endorsement by the University of Minnesota or GroupLens; redistribution and commercial use need what the README says;
there is no warranty; publications cite
  F. Maxwell Harper and Joseph A. Konstan. 2015. The MovieLens Datasets: History and Context.
  ACM Transactions on Interactive Intelligent Systems 5, 4, Article 19. https://doi.org/10.1145/2827872
"""


class _Refused(Exception):
    """An HTTP error that stays the same when asked again."""


def fetch(
    name: str,
    out: Path,
    base_url: str = BASE_URL,
    retries: int = RETRIES,
    say: Callable[[str], None] = print,
) -> Path:
    """Downloads a data set to OUT/NAME.zip, with its terms in OUT/NAME.LICENCE.txt.

    A file that is there already is verified and kept; one that differs is an error, since it may be needed.

    Args:
        name: One of DATASETS.
        out: The folder.
        base_url: GroupLens, or a mirror of it.
        retries: How often to ask again after a broken connection, a busy server or a damaged download.
        say: Receives the lines that tell the user the terms and the result.

    Returns:
        The path of the archive.

    Raises:
        FetchError: Where network, server, disk or checksum fail; nothing is left of the download then.
    """
    import pooch  # brings requests, and is needed by this function alone
    import requests

    if name not in DATASETS:
        raise FetchError(f"{name}: unknown data set; expected one of {', '.join(DATASETS)}")
    url, archive = f"{base_url.rstrip('/')}/{name}.zip", out / f"{name}.zip"
    receive = pooch.HTTPDownloader(progressbar=True, timeout=TIMEOUT, headers=HEADERS)

    def download(url: str, part: str, _: object) -> None:
        try:
            receive(url, part, None)
        except requests.HTTPError as error:
            if error.response is not None and error.response.status_code in BUSY:
                raise
            raise _Refused(_answer(error)) from error
        problem = _problem(Path(part), md5)
        if problem is not None:
            raise ValueError(f"{problem}; what was received is deleted; try again, or another mirror")
        sync(Path(part))

    say(NOTICE.format(name=name))
    try:
        out.mkdir(parents=True, exist_ok=True)
        md5 = _published_md5(f"{url}.md5")
        if archive.exists():
            problem = _problem(archive, md5)
            if problem is not None:
                raise FetchError(f"{archive} is there already, but {problem}; move it away to download it anew")
            say(f"{archive}: already there, and whole")
        else:
            files = pooch.create(
                out, f"{base_url.rstrip('/')}/", registry={archive.name: None}, retry_if_failed=retries
            )
            files.fetch(archive.name, downloader=download)
            archive.chmod(0o644)  # pooch's temporary file is for its owner alone
        write_text(out / f"{name}.LICENCE.txt", NOTICE.format(name=name) + "\n" + _readme(archive))
    except requests.HTTPError as error:
        raise FetchError(_answer(error)) from error
    except _Refused as error:
        raise FetchError(str(error)) from error
    except requests.RequestException as error:
        raise FetchError(f"{url}: {error}; is there a network? Run the command again") from error
    except OSError as error:
        what = "the disk is full; make room and run again" if error.errno == errno.ENOSPC else error
        raise FetchError(f"{out}: cannot write {name}: {what}") from error
    except FetchError:
        raise
    except ValueError as error:
        raise FetchError(f"{url}: {error}") from error
    checked = f"MD5 {md5} as published" if md5 else "no MD5 is published; the CRC of each file in it is right"
    say(f"{archive}: {archive.stat().st_size:,} bytes, {checked}")
    return archive


def _published_md5(url: str) -> str | None:
    """The MD5 of `<digits>  <name>` or `MD5 (<name>) = <digits>`; None where none is published."""
    import requests

    answer = requests.get(url, timeout=TIMEOUT, headers=HEADERS)
    if answer.status_code == requests.codes.not_found:
        return None
    answer.raise_for_status()
    digits = re.findall(r"\b[0-9a-f]{32}\b", answer.text.lower())
    if len(digits) != 1:
        raise FetchError(f"{url}: expected one MD5, found {answer.text[:80]!r}")
    return str(digits[0])


def _answer(error: Any) -> str:
    answer = error.response
    return f"{answer.url}: the server answers {answer.status_code} {answer.reason}"


def _problem(archive: Path, md5: str | None) -> str | None:
    """What is wrong with the archive, if anything."""
    import pooch

    if md5 is not None:
        found = pooch.file_hash(str(archive), alg="md5")
        if found != md5:
            return f"the checksum differs: MD5 {found}, expected {md5}"
    try:
        with zipfile.ZipFile(archive) as members:
            damaged = members.testzip() if md5 is None else None
            if damaged is not None:
                return f"{damaged} in the archive is damaged"
            return None if _readme_name(members) else "the archive has no README, so it does not come from GroupLens"
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        return f"not a whole zip archive ({error})"


def _readme(archive: Path) -> str:
    """The text of the README in the archive, which holds the terms."""
    with zipfile.ZipFile(archive) as members:
        return members.read(_readme_name(members) or "README").decode("utf-8", errors="replace")


def _readme_name(members: zipfile.ZipFile) -> str | None:
    """README, README.txt or README.html, in whichever folder."""
    return next((name for name in members.namelist() if Path(name).stem.upper() == "README"), None)
