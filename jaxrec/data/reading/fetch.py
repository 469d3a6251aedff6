"""Downloads MovieLens from GroupLens: resumed after a break, verified, and whole or absent under its name.

The MD5 comes from the `.md5` file that GroupLens keeps beside most archives: it guards against accidents, and against
nobody who controls the server or mirror.
"""

import errno
import hashlib
import re
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from jaxrec.data.reading.download import TIMEOUT, discard, download
from jaxrec.errors import FetchError
from jaxrec.files import sync, write_text

DATASETS = ("ml-latest-small", "ml-latest", "ml-100k", "ml-1m", "ml-10m", "ml-20m", "ml-25m", "ml-32m")
BASE_URL = "https://files.grouplens.org/datasets/movielens/"
RETRY = Retry(
    total=5, backoff_factor=1, status_forcelist=(429, 500, 502, 503, 504), raise_on_status=False, backoff_jitter=0.5
)
NOTICE = """\
{name} comes from GroupLens, University of Minnesota: https://grouplens.org/datasets/movielens/
Its terms are in the README of the archive, copied below. In short (the README decides): research use; do not imply
endorsement by the University of Minnesota or GroupLens; redistribution and commercial use need what the README says;
there is no warranty; publications cite
  F. Maxwell Harper and Joseph A. Konstan. 2015. The MovieLens Datasets: History and Context.
  ACM Transactions on Interactive Intelligent Systems 5, 4, Article 19. https://doi.org/10.1145/2827872
"""


def fetch(
    name: str, out: Path, base_url: str = BASE_URL, retry: Retry = RETRY, say: Callable[[str], None] = print
) -> Path:
    """Downloads the data set `name` to OUT/NAME.zip with its terms in OUT/NAME.LICENCE.txt, and returns the former.

    A file that is there already is verified and kept; one that differs is an error, since it may be somebody's. Raises
    FetchError where network, server, disk or checksum fail;
    what was received stays for the next attempt unless it is wrong.
    """
    if name not in DATASETS:
        raise FetchError(f"{name}: unknown data set; expected one of {', '.join(DATASETS)}")
    url = f"{base_url.rstrip('/')}/{name}.zip"
    archive, part = out / f"{name}.zip", out / f"{name}.zip.part"
    say(NOTICE.format(name=name))
    with requests.Session() as session:
        for scheme in ("http://", "https://"):
            session.mount(scheme, HTTPAdapter(max_retries=retry))
        session.headers["Accept-Encoding"] = "identity"  # sizes and ranges are those of the file
        try:
            out.mkdir(parents=True, exist_ok=True)
            md5 = _published_md5(session, f"{url}.md5")
            if archive.exists():
                problem = _problem(archive, md5)
                if problem is not None:
                    raise FetchError(f"{archive} is there already, but {problem}; move it away to download it anew")
                say(f"{archive}: already there, and whole")
            else:
                download(session, url, part, retry)
                problem = _problem(part, md5)
                if problem is not None:
                    discard(part)
                    raise FetchError(f"{url}: {problem}; what was received is deleted; try again, or another mirror")
                sync(part)
                part.replace(archive)
                discard(part)
            write_text(out / f"{name}.LICENCE.txt", NOTICE.format(name=name) + "\n" + _readme(archive))
        except requests.HTTPError as error:
            answer = error.response
            raise FetchError(f"{answer.url}: the server answers {answer.status_code} {answer.reason}") from error
        except requests.RequestException as error:
            raise FetchError(f"{url}: {error}; is there a network? Run the command again to go on") from error
        except OSError as error:
            what = "the disk is full; make room and run again to go on" if error.errno == errno.ENOSPC else error
            raise FetchError(f"{out}: cannot write {name}: {what}") from error
    checked = f"MD5 {md5} as published" if md5 else "no MD5 is published; the CRC of each file in it is right"
    say(f"{archive}: {archive.stat().st_size:,} bytes, {checked}")
    return archive


def _published_md5(session: requests.Session, url: str) -> str | None:
    """The MD5 of `<digits>  <name>` or `MD5 (<name>) = <digits>`; None where none is published."""
    answer = session.get(url, timeout=TIMEOUT)
    if answer.status_code == requests.codes.not_found:
        return None
    answer.raise_for_status()
    digits = re.findall(r"\b[0-9a-f]{32}\b", answer.text.lower())
    if len(digits) != 1:
        raise FetchError(f"{url}: expected one MD5, found {answer.text[:80]!r}")
    return str(digits[0])


def _problem(archive: Path, md5: str | None) -> str | None:
    """What is wrong with the archive, if anything."""
    if md5 is not None:
        with open(archive, "rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
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
