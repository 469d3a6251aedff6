"""Directories and files are whole or absent, whatever happens while they are written."""

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxrec.errors import DataError
from jaxrec.files import lock_file, locked, new_directory, new_file, read_json_lines, write_json_lines

MARKER = "kind.json"


def make(path: Path, content: str) -> None:
    with new_directory(path, MARKER) as folder:
        (folder / MARKER).write_text(content)


def test_a_directory_of_the_same_kind_is_replaced(tmp_path: Path) -> None:
    make(tmp_path / "d", "old")
    make(tmp_path / "d", "new")
    assert (tmp_path / "d" / MARKER).read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_anything_else_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/mine.csv").write_text("data")
    (tmp_path / "file").write_text("data")
    for name in ("folder", "file"):
        with pytest.raises(DataError, match="is not replaced"):
            make(tmp_path / name, "new")
    assert (tmp_path / "folder/mine.csv").read_text() == "data"
    assert (tmp_path / "file").read_text() == "data"


class _Stopped(BaseException):
    pass


def make_then(path: Path, error: BaseException) -> None:
    with new_directory(path, MARKER) as folder:
        (folder / MARKER).write_text("new")
        raise error


def write_then(path: Path, error: BaseException) -> None:
    with new_file(path) as temporary:
        temporary.write_text("ne")
        raise error


def test_an_interrupt_while_writing_keeps_the_old(tmp_path: Path) -> None:
    make(tmp_path / "d", "old")
    with pytest.raises(_Stopped):
        make_then(tmp_path / "d", _Stopped())
    assert (tmp_path / "d" / MARKER).read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


@pytest.mark.parametrize("failing", [1, 2])
def test_an_interrupt_between_the_renames_keeps_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    make(tmp_path / "d", "old")
    rename, calls = Path.rename, iter(range(1, 10))

    def interrupted(self: Path, target: Path) -> Path:
        if next(calls) == failing:
            raise _Stopped
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(_Stopped):
        make(tmp_path / "d", "new")
    assert (tmp_path / "d" / MARKER).read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_a_file_is_replaced_only_when_whole(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("old")
    with pytest.raises(_Stopped):
        write_then(tmp_path / "f", _Stopped())
    assert (tmp_path / "f").read_text() == "old"
    with new_file(tmp_path / "f") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "f").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("make_it", [os.mkfifo, os.mkdir])
def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path, make_it: Callable[[Path], None]) -> None:
    make_it(tmp_path / "there")
    with pytest.raises(DataError, match="there is no regular file"), new_file(tmp_path / "there"):
        raise AssertionError("nothing is to be written")
    assert not (tmp_path / "there").is_file()
    assert len(list(tmp_path.iterdir())) == 1


def test_json_lines_come_back_and_damage_is_named(tmp_path: Path) -> None:
    path, records = tmp_path / "log.jsonl", [{"step": 0}, {"step": 1, "loss": 0.5}]
    write_json_lines(path, records)
    assert read_json_lines(path, "train first") == records
    path.write_text('{"step": 0}\n{"st')
    with pytest.raises(DataError, match=r"log\.jsonl: not JSON lines .*; train first"):
        read_json_lines(path, "train first")
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read .*; train first"):
        read_json_lines(tmp_path / "none.jsonl", "train first")


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    program = f"""
import os, signal
from pathlib import Path
from jaxrec.files import new_file
with new_file(Path({str(tmp_path / "x.csv")!r})) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode < 0
    (left,) = tmp_path.iterdir()
    head, process, start, _ = left.name.rsplit("-", 3)
    others = [
        f"{head[:-12]}{'0' * 12}-{process}-{start}-{'0' * 12}",  # of another machine
        f"{head}-{os.getppid()}-{_start_of(os.getppid())}-{'0' * 12}",  # of a process that lives
        ".x.csv.jaxrec-mine",
    ]
    for name in others:
        (tmp_path / name).write_text("kept")
    (tmp_path / f"{head}-{os.getpid()}-{_start_of(os.getpid()) - 1}-{'0' * 12}").write_text("its id is used again")
    with new_file(tmp_path / "y.csv") as temporary:
        temporary.write_text("whole")
        assert not left.exists()
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, temporary.name])


def _start_of(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[19])


def _once_before(function: Callable[..., Any], act: Callable[[], object]) -> Callable[..., Any]:
    """The function, with `act` before its first call."""
    acts = [act]

    def acting(*of: Any) -> Any:
        if acts:
            acts.pop()()
        return function(*of)

    return acting


def test_a_lock_whose_file_was_deleted_meanwhile_is_not_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "job"
    file = lock_file(folder, "recommend")
    monkeypatch.setattr(fcntl, "flock", _once_before(fcntl.flock, file.unlink))
    with locked(folder, "recommend"), pytest.raises(DataError, match="another"), locked(folder, "recommend"):
        pass
    assert file.is_file()


def test_a_folder_that_was_deleted_meanwhile_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "job"
    monkeypatch.setattr(os, "open", _once_before(os.open, folder.rmdir))
    with locked(folder, "recommend"):
        assert lock_file(folder, "recommend").is_file()
