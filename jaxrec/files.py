"""Files that are whole or absent: written under a temporary name, fsynced, then renamed."""

import contextlib
import functools
import hashlib
import json
import os
import re
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


def require_replaceable(path: Path) -> None:
    """Raises DataError where `new_file` would not replace what is there."""
    if path.exists() and not path.is_file():
        raise DataError(f"{path} is no regular file; it is not replaced, choose another name")


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`; what was written there replaces `path` when the block ends well.

    What a process leaves that is killed is removed by a later process of the same machine, when it first writes into
    the folder. After a restart of the machine it stays.

    Raises DataError where `path` is no regular file, such as a folder or /dev/null, which is not replaced.
    """
    path = Path(path)
    require_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_over(path.parent.absolute())
    owner = f"{_machine()}-{os.getpid()}-{_start(os.getpid())}"  # other machines may share the folder
    temporary = path.with_name(f".{path.name}.jaxrec-{owner}-{uuid.uuid4().hex[:12]}")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@functools.lru_cache(maxsize=256)
def _remove_left_over(folder: Path) -> None:
    """Removes this user's temporary files in the folder whose processes are gone, once in this process."""
    name = re.compile(rf"\..+\.jaxrec-{_machine()}-(\d+)-(\d+)-[0-9a-f]{{12}}")
    for entry in os.scandir(folder):
        found = name.fullmatch(entry.name)
        if found is not None and _start(int(found[1])) != int(found[2]):
            with contextlib.suppress(OSError):  # another process may have removed it
                if entry.stat(follow_symlinks=False).st_uid == os.getuid():  # not all see the processes of others
                    os.unlink(entry.path)


@functools.cache
def _machine() -> str:
    """The running system and its space of process ids, as 12 hexadecimal digits. Another container is another one."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii")
        return hashlib.sha256(f"{boot}{os.readlink('/proc/self/ns/pid')}".encode()).hexdigest()[:12]
    except OSError:  # not Linux: unknown to all other processes, so that nothing of theirs is removed
        return uuid.uuid4().hex[:12]


def _start(process: int) -> int:
    """When a process began, in ticks of the system's clock, since its id is used again later; 0: there is none."""
    try:
        # The second field is the name of the program in brackets, and can hold any character.
        return int(Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()[19])
    except OSError:
        return 0


@contextlib.contextmanager
def locked(folder: Path, command: str, mode: int = 0o755) -> Iterator[None]:
    """Holds the lock of the folder, which it makes, for `jaxrec COMMAND`. The system releases the lock when the process
    ends, however it ends. Its holder may delete the folder, `lock_file` last: another process can enter from then on.

    Raises:
        DataError: Another process holds it.
    """
    descriptor = _lock(folder, command, mode)
    try:
        yield
    finally:
        os.close(descriptor)


def lock_file(folder: Path, command: str) -> Path:
    """What `locked` locks."""
    return folder / f".jaxrec-{command}.lock"


def _lock(folder: Path, command: str, mode: int) -> int:
    """A descriptor of the locked file, which is the one that has the name now."""
    import fcntl  # not on Windows

    while True:
        folder.mkdir(mode=mode, parents=True, exist_ok=True)
        try:
            descriptor = os.open(lock_file(folder, command), os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue  # its holder deleted the folder just now
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_named(descriptor, lock_file(folder, command)):
                return descriptor
            os.close(descriptor)  # its holder deleted the file before the lock was had
        except BlockingIOError as error:
            os.close(descriptor)
            raise DataError(f"{folder}: another `jaxrec {command}` is at work there; one works at a time") from error


def _is_named(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


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
