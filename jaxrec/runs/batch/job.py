"""What of a job is finished: a folder beside its result, which survives a kill and is gone when the result is there.

.OUT.job/job.json     which command began it, and when: the same command continues, another one begins anew
.OUT.job/input-TOKEN/ the log, sorted; of whoever is asked for, the users and times
.OUT.job/input.json   what was read, and the token; written when the input is whole
.OUT.job/parts-TOKEN/ one file for each part that is finished, each whole or absent
.OUT.job/joined       all parts, before they become the result

A worker on another machine can outlive the command that it worked for. Each reading of a log has a token of its own, so
that what such a worker still writes is no part of another reading.
"""

import contextlib
import dataclasses
import json
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrec.files import lock_file, locked, read_json, sync, write_text

JOB_FILE, INPUT_FILE = "job.json", "input.json"
COMMAND = "recommend"
JOB_VERSION = 2  # to be raised when what a job keeps, or where its parts begin, becomes another


@dataclasses.dataclass
class Job:
    """One job that is under way.

    Attributes:
        folder: Where it lies.
        moment: When it began, in seconds since 1970. An interrupted job keeps it.
        token: Of the reading of its log.
    """

    folder: Path
    moment: int
    token: str

    @property
    def input(self) -> Path:
        """What all parts read."""
        return self.folder / f"input-{self.token}"

    @property
    def parts(self) -> Path:
        """The folder of the finished parts."""
        return self.folder / f"parts-{self.token}"

    @property
    def joined(self) -> Path:
        """The file in which the parts are joined."""
        return self.folder / "joined"

    def counts(self) -> dict[str, Any] | None:
        """What was read; None: the input is not whole."""
        return _input_json(self.folder).get("counts")

    def new_input(self) -> Path:
        """The folder of the input, empty."""
        for old in self.folder.glob("input-*"):
            shutil.rmtree(old, ignore_errors=True)  # a worker may still write there
        self.token = _new_token()
        self.input.mkdir()
        return self.input

    def finish_input(self, counts: Mapping[str, Any]) -> None:
        """Notes that the input is whole, with what was read as JSON values."""
        for file in (*self.input.rglob("*"), self.input):
            sync(file)
        self.parts.mkdir(exist_ok=True)
        write_text(self.folder / INPUT_FILE, json.dumps({"token": self.token, "counts": counts}))

    def remove(self) -> None:
        """Deletes all of it. A job that was deleted in part begins anew."""
        _clear(self.folder)
        lock_file(self.folder, COMMAND).unlink()
        with contextlib.suppress(OSError):  # another process is in it already, or a worker still writes
            self.folder.rmdir()


@contextlib.contextmanager
def open_job(out: Path, settings: Mapping[str, Any]) -> Iterator[Job]:
    """The job whose result `out` will be. It stays until `Job.remove`, however the process ends.

    Args:
        out: A file or a folder.
        settings: All that the result depends on, as JSON values. A job that was begun with others is deleted.

    Raises:
        DataError: Another process is at work on it.
    """
    folder = out.with_name(f".{out.name}.job")
    asked = json.loads(json.dumps({"version": JOB_VERSION, **settings}))
    with locked(folder, COMMAND, 0o700):  # it holds everybody's history
        file = folder / JOB_FILE
        begun = read_json(file, "delete the folder") if file.is_file() else {}
        if begun.get("settings") != asked:
            _clear(folder)
            begun = {"settings": asked, "moment": int(time.time())}
            write_text(file, json.dumps(begun))
        yield Job(folder, begun["moment"], _input_json(folder).get("token", _new_token()))


def _clear(folder: Path) -> None:
    """Deletes all but the lock: what says whose job it is first, for the rest is of no use when some of it is gone."""
    (folder / JOB_FILE).unlink(missing_ok=True)
    sync(folder)
    for old in folder.iterdir():
        if old.is_dir():
            shutil.rmtree(old, ignore_errors=True)  # a worker may still write there
        elif old != lock_file(folder, COMMAND):
            old.unlink(missing_ok=True)


def _input_json(folder: Path) -> dict[str, Any]:
    """`token` and `counts` of the input that is whole; else nothing."""
    file = folder / INPUT_FILE
    return read_json(file, "the same command makes it") if file.is_file() else {}


def _new_token() -> str:
    return uuid.uuid4().hex[:16]


def states(paths: Sequence[Path]) -> list[tuple[str, int, int]]:
    """Path, size and time of change (ns) of files, and of those in folders: by these a job knows its input again."""
    files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    found = [(file.resolve(), file.stat()) for file in files if file.is_file()]
    return [(str(file), stat.st_size, stat.st_mtime_ns) for file, stat in found]
