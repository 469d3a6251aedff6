"""Directories and files are whole or absent, whatever happens while they are written."""

from pathlib import Path

import pytest

from jaxrec.errors import DataError
from jaxrec.files import new_directory, new_file, read_json_lines, write_json_lines

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


def test_json_lines_come_back_and_damage_is_named(tmp_path: Path) -> None:
    path, records = tmp_path / "log.jsonl", [{"step": 0}, {"step": 1, "loss": 0.5}]
    write_json_lines(path, records)
    assert read_json_lines(path, "train first") == records
    path.write_text('{"step": 0}\n{"st')
    with pytest.raises(DataError, match=r"log\.jsonl: not JSON lines .*; train first"):
        read_json_lines(path, "train first")
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read .*; train first"):
        read_json_lines(tmp_path / "none.jsonl", "train first")
