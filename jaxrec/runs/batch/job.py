"""What of a job is finished: a folder beside its result, which survives a kill and is gone when the result is there.

.OUT.job/job.json   which command began it, and when: the same command continues, another one begins anew
.OUT.job/input/     the log, sorted; of whoever is asked for, the users and times
.OUT.job/input.json what was read; written when `input` is whole
.OUT.job/parts/     one file for each part that is finished, each whole or absent
"""

import contextlib
import dataclasses
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrec.files import locked, read_json, sync, write_text

JOB_FILE, INPUT_FILE = "job.json", "input.json"
JOB_VERSION = 1  # to be raised when what a job keeps, or where its parts begin, becomes another


@dataclasses.dataclass(frozen=True)
class Job:
    """One job that is under way.

    Attributes:
        folder: Where it lies.
        moment: When it began, in seconds since 1970. An interrupted job keeps it.
    """

    folder: Path
    moment: int

    @property
    def input(self) -> Path:
        """What all parts read."""
        return self.folder / "input"

    @property
    def parts(self) -> Path:
        """The folder of the finished parts."""
        return self.folder / "parts"

    def counts(self) -> dict[str, Any] | None:
        """What was read; None: `input` is not whole."""
        file = self.folder / INPUT_FILE
        return read_json(file, "the same command makes it") if file.is_file() else None

    def new_input(self) -> Path:
        """The folder `input`, empty."""
        shutil.rmtree(self.input, ignore_errors=True)
        self.input.mkdir()
        return self.input

    def finish_input(self, counts: Mapping[str, Any]) -> None:
        """Notes that `input` is whole, with what was read as JSON values."""
        for file in (*self.input.rglob("*"), self.input):
            sync(file)
        self.parts.mkdir(exist_ok=True)
        write_text(self.folder / INPUT_FILE, json.dumps(counts))

    def remove(self) -> None:
        """Deletes all of it."""
        shutil.rmtree(self.folder)


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
    with locked(folder, "recommend"):
        file = folder / JOB_FILE
        begun = read_json(file, "delete the folder") if file.is_file() else {}
        if begun.get("settings") != asked:
            for old in folder.iterdir():
                if old.is_dir():
                    shutil.rmtree(old)
                elif not old.name.endswith(".lock"):
                    old.unlink()
            begun = {"settings": asked, "moment": int(time.time())}
            write_text(file, json.dumps(begun))
        yield Job(folder, begun["moment"])


def states(paths: Sequence[Path]) -> list[tuple[str, int, int]]:
    """Path, size and time of change (ns) of files, and of those in folders: by these a job knows its input again."""
    files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    found = [(file.resolve(), file.stat()) for file in files if file.is_file()]
    return [(str(file), stat.st_size, stat.st_mtime_ns) for file, stat in found]
