"""Files that are whole or absent: written under a temporary name, fsynced, then renamed."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxrec.errors import DataError


@contextlib.contextmanager
def new_directory(path: Path, marker: str) -> Iterator[Path]:
    """Yields an empty directory that becomes `path` when the block ends well, and vanishes when it does not.

    An existing directory is replaced only if it holds a file named `marker`, by which its kind is known, or nothing.
    It stays readable until the new one is complete; for the instant between two renames there is neither, and if the
    second rename fails the old one comes back. Raises DataError where `path` is something else.
    """
    path = Path(path).resolve()
    if path.exists() and not (path.is_dir() and ((path / marker).exists() or not any(path.iterdir()))):
        raise DataError(f"{path} exists and is not a folder with {marker}; it is not replaced, choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    new, old = work / "new", work / "old"
    new.mkdir()
    try:
        yield new
        for file in (*sorted(new.rglob("*")), new):
            sync(file)
        if path.exists():
            path.rename(old)
        new.rename(path)
        sync(path.parent)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(work)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`; what was written there replaces `path` when the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # hosts may share the folder
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path, command: str, mode: int = 0o755) -> Iterator[None]:
    """Holds the lock of the folder, which it makes, for `jaxrec COMMAND`. The system releases the lock when the process
    ends, however it ends.

    Raises:
        DataError: Another process holds it.
    """
    import fcntl  # not on Windows

    folder.mkdir(mode=mode, parents=True, exist_ok=True)
    descriptor = os.open(folder / f".jaxrec-{command}.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"{folder}: another `jaxrec {command}` is at work there; one works at a time") from error
        yield
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replaces `path` by `text` (UTF-8), wholly or not at all."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path, hint: str) -> Any:
    """The content of a JSON file. Raises DataError with `hint` (what would make the file) where it is not there."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {hint}") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); {hint}") from error


def read_json_lines(path: Path, hint: str) -> list[Any]:
    """The records of a file with one JSON value a line. Raises DataError as `read_json` does."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {hint}") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON lines ({error}); {hint}") from error


def write_json_lines(path: Path, records: Iterable[Any]) -> None:
    """Replaces `path` by one JSON value a line, wholly or not at all."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def sync(path: Path) -> None:
    """Forces a file's or a directory's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The file's SHA-256 as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
