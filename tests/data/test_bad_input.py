"""Bad input through the command line: a clear error or a counted quarantine, never a traceback or half an output."""

import csv
import dataclasses
import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.cli.main import main
from jaxrec.config import PrepareConfig, RatingScale, Repeats
from jaxrec.data.prepare import prepare
from jaxrec.data.reading.bad_rows import OnBadRows
from jaxrec.data.reading.read import read_ratings
from jaxrec.data.store import read_prepared
from jaxrec.errors import DataError
from tests.logs import by_user

HEADER = "userId,movieId,rating,timestamp\n"
GOOD = "".join(f"{user},{item},3.5,{1000 + 10 * user + item}\n" for user in (1, 2) for item in (1, 2, 3))
EVERYTHING = PrepareConfig(1, 1)


def prepare_command(*arguments: object) -> Result:
    fixed = ("--min-user-ratings", 1, "--min-movie-ratings", 1)
    return CliRunner().invoke(main, ["prepare", *(str(a) for a in (*arguments, *fixed))])


# case: (rows after the header and the good rows, [(line, field, value, part of the reason)])
BAD_ROWS = {
    "every kind at once": (
        "3,1,7.5,2000\n3,1,,2000\n3,,4,2000\nbob,1,4,2000\n3,2,4,-5\n3,2,nan,5\n1,1,3.5,1011\n3,2\n,,,\n",
        [
            (8, "rating", "7.5", "is outside 0.5..5"),
            (10, "movieId", "", "is empty; expected an id"),
            (11, "userId", "bob", "is not a whole number"),
            (12, "timestamp", "-5", "is not a time"),
            (13, "rating", "nan", "is not a number"),
            (14, "", "", "repeats line 2: the same user, item and time"),
            (15, "", "", "2 fields, expected 4"),
            (16, "userId", "", "is empty; expected an id"),
        ],
    ),
    "a stray quote loses its own line only": (
        '3,"1,4,2000\n3,2,4,2001\n',
        [(8, "", "", "not CSV")],
    ),
    "not UTF-8": ("3,1\udcff,4,2000\n3,2,4,2001\n", [(8, "", "", "not UTF-8 text")]),
    "windows line ends": ("3,2,9,2000\r\n3,2,4,2001\r\n", [(8, "rating", "9", "is outside")]),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_quarantine_holds_each_bad_row_with_its_reason(tmp_path: Path, case: str) -> None:
    rows, expected = BAD_ROWS[case]
    source = tmp_path / "ratings.csv"
    source.write_bytes((HEADER + GOOD + rows).encode("utf-8", "surrogateescape"))
    result = prepare_command(source, "--out", tmp_path / "data", "--on-bad-rows", "quarantine")
    assert result.exit_code == 0, result.output
    assert f"bad_rows: {len(expected)}\n" in result.output
    assert "quarantine.csv" in result.output
    with open(tmp_path / "data/quarantine.csv", newline="") as file:
        found = sorted(csv.DictReader(file), key=lambda row: int(row["line"]))
    assert [(int(row["line"]), row["field"], row["value"]) for row in found] == [row[:3] for row in expected]
    lines = (HEADER + GOOD + rows).encode("utf-8", "surrogateescape").splitlines()
    for row, (line, _, _, reason) in zip(found, expected, strict=True):
        assert reason in row["reason"]
        assert row["file"] == str(source)
        assert row["text"] == lines[line - 1].decode("utf-8", "backslashreplace")
    data = read_prepared(tmp_path / "data")
    good = len((HEADER + GOOD + rows).splitlines()) - 1 - len(expected)
    assert data.input["rows"] == good + len(expected)
    assert data.histories.event_count == good


@pytest.mark.parametrize("case", BAD_ROWS)
def test_without_quarantine_the_first_bad_row_is_one_line_and_nothing_is_left(tmp_path: Path, case: str) -> None:
    rows, _ = BAD_ROWS[case]
    source = tmp_path / "ratings.csv"
    source.write_bytes((HEADER + GOOD + rows).encode("utf-8", "surrogateescape"))
    result = prepare_command(source, "--out", tmp_path / "data")
    assert result.exit_code == 1
    assert result.output.count("\n") == 1
    assert result.output.startswith(f"Error: {source}:8:")
    assert [path.name for path in tmp_path.iterdir()] == ["ratings.csv"]


def test_bad_rows_of_parquet_are_named_by_file_and_row(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    folder.mkdir()
    frame = pd.DataFrame({"userId": [1, 1, 2], "movieId": [1, 2, 1], "rating": [3.0, 4.5, 9.0], "timestamp": [1, 2, 3]})
    frame.to_parquet(folder / "a.parquet")
    frame.assign(rating=3.0, timestamp=[1, 5, None]).to_parquet(folder / "b.parquet")
    data = prepare(folder, None, EVERYTHING, out=tmp_path / "data", on_bad_rows=OnBadRows.QUARANTINE)
    with open(tmp_path / "data/quarantine.csv", newline="") as file:
        found = sorted((Path(row["file"]).name, int(row["line"]), row["field"]) for row in csv.DictReader(file))
    assert found == [("a.parquet", 3, "rating"), ("b.parquet", 1, ""), ("b.parquet", 3, "timestamp")]
    assert data.input["repeats"] == 1
    assert data.histories.event_count == 3


WHOLE_FILES = {
    "empty": ("", "the file is empty; expected the header userId,movieId,rating,timestamp"),
    "header only": (HEADER, "no rows after the header"),
    "missing column": (
        "userId,rating,timestamp\n1,2,3\n",
        ":1: column movieId or item_id (or another, given as --item-col) is missing",
    ),
    "a column twice": ("userId,movieId,movieId,timestamp\n1,2,3,4\n", ":1: column movieId occurs twice"),
    "one movie only": (HEADER + "1,5,3,1\n2,5,3,1\n", "only one item is left (5)"),
    "nothing but bad rows": (HEADER + "1,5,x,1\n", "every row is bad: "),
}


@pytest.mark.parametrize("case", WHOLE_FILES)
def test_files_without_a_usable_log_are_one_clear_error_even_in_quarantine(tmp_path: Path, case: str) -> None:
    text, expected = WHOLE_FILES[case]
    source = tmp_path / "ratings.csv"
    source.write_text(text)
    result = prepare_command(source, "--out", tmp_path / "data", "--on-bad-rows", "quarantine")
    assert result.exit_code == 1
    assert result.output.count("\n") == 1
    assert expected in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["ratings.csv"]


def test_a_user_with_one_event_is_kept_for_training(tmp_path: Path) -> None:
    source = tmp_path / "ratings.csv"
    source.write_text(HEADER + GOOD + "9,1,3.5,5\n")
    result = prepare_command(source, "--out", tmp_path / "data")
    assert result.exit_code == 0
    assert "users: 3\n" in result.output
    assert "test_cases: 2\n" in result.output


# The file size limit of the process stands for a disk that is full; SIGXFSZ ignored, a write then fails as it would.
FULL_DISK = """
import resource, signal, sys
from jaxrec.cli.main import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
main(sys.argv[2:])
"""


@pytest.mark.parametrize("limit", [1_000, 300_000])
def test_a_full_disk_is_one_clear_error_and_leaves_the_old_data(tmp_path: Path, limit: int) -> None:
    source = tmp_path / "ratings.csv"
    rows = "".join(f"{user},{item},3.5,{1000 + item}\n" for user in range(1, 400) for item in range(1, 200))
    source.write_text(HEADER + rows)
    small = tmp_path / "small.csv"
    small.write_text(HEADER + GOOD)
    assert prepare_command(small, "--out", tmp_path / "data").exit_code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir() if path.is_file()}
    command = [sys.executable, "-c", FULL_DISK, str(limit), "prepare", str(source), "--out", str(tmp_path / "data")]
    # Coverage could not write its data either, and would say so.
    unmeasured = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=unmeasured)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert "File too large" in done.stderr or "cannot be written" in done.stderr or "engine stopped" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "ratings.csv", "small.csv"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir() if path.is_file()} == before


def test_an_output_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    source = tmp_path / "ratings.csv"
    source.write_text(HEADER + GOOD)
    (tmp_path / "file").write_text("")
    result = prepare_command(source, "--out", tmp_path / "file/data")
    assert result.exit_code == 1
    assert "cannot be written" in result.output
    assert result.output.count("\n") == 1


def test_a_read_only_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "ratings.csv"
    source.write_text(HEADER + GOOD)

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "mkdtemp", read_only)
    result = prepare_command(source, "--out", tmp_path / "data")
    assert result.exit_code == 1
    assert result.output == f"Error: {tmp_path}/data: cannot be written: Read-only file system\n"


fields = st.one_of(
    st.integers(-2, 40).map(str),
    st.sampled_from(["", "x", "3.5", "nan", "inf", "1e3", "007", " 4", '"', '"a,b"', "é", "-0", "9" * 25, "\t"]),
)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.lists(fields, min_size=3, max_size=5), min_size=1, max_size=8), st.sampled_from(["\n", "\r\n"]))
def test_any_text_is_read_or_refused_and_every_row_is_accounted_for(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]], end: str
) -> None:
    folder = tmp_path_factory.mktemp("any")
    source = folder / "ratings.csv"
    text = HEADER.replace("\n", end) + end.join(",".join(row) for row in rows) + end
    source.write_bytes(text.encode())
    try:
        data = prepare(source, None, PrepareConfig(0, 0), out=folder / "data", on_bad_rows=OnBadRows.QUARANTINE)
    except DataError:
        assert not (folder / "data").exists()
        return
    assert data.log is not None
    kept = data.log.events.event_count
    assert data.input["rows"] == kept + data.input["bad_rows"]
    if data.input["bad_rows"]:
        with pytest.raises(DataError, match=r"ratings\.csv:\d+"):
            read_ratings(source)
    else:
        assert len(read_ratings(source, data.config.rating_scale)[0]) == kept


def test_reading_fast_and_exactly_gives_the_same(tmp_path: Path) -> None:
    """A bad row at the end sends the file through the exact reader; the good rows must come out as before."""
    source = tmp_path / "ratings.csv"
    config = PrepareConfig(1, 1, rating_scale=RatingScale(0.5, 5.0))
    quoted = "".join(f'{u},"{i}",3.5,{1000 + i}\n' for u in (3, 4) for i in (5, 1, 3))
    source.write_text(HEADER + GOOD + quoted)
    fast = by_user(prepare(source, None, config, out=tmp_path / "fast"))
    source.write_text(HEADER + GOOD + quoted + "5,5,x,5\n")
    exact = prepare(source, None, config, out=tmp_path / "exact", on_bad_rows=OnBadRows.QUARANTINE)
    assert by_user(exact) == fast


def test_of_repeated_events_the_first_row_stays_and_the_others_are_in_quarantine(tmp_path: Path) -> None:
    source = tmp_path / "ratings.csv"
    rows = "".join(f"2,{item},4,120000000000{item}\n" for item in range(1, 5))
    # The later row is 400 ms earlier: in whole seconds the two are the same event.
    source.write_text(HEADER + rows + "1,5,3,1200000000500\n1,5,5,1200000000100\n")
    result = prepare_command(source, "--on-bad-rows", "quarantine", "--out", tmp_path / "data")
    assert result.exit_code == 0, result.output
    data = read_prepared(tmp_path / "data")
    user = data.users.encode([1])[0] - 1
    assert data.histories.ratings[data.histories.offsets[user] : data.histories.offsets[user + 1]].tolist() == [3.0]
    with open(tmp_path / "data/quarantine.csv", newline="") as file:
        assert [(row["line"], row["text"]) for row in csv.DictReader(file)] == [("7", "1,5,5,1200000000100")]


@pytest.mark.parametrize("on_bad_rows", list(OnBadRows))
def test_many_repeated_events_are_reported_in_reasonable_time(tmp_path: Path, on_bad_rows: OnBadRows) -> None:
    users, items = (column.ravel() for column in np.meshgrid(np.arange(500), np.arange(100), indexing="ij"))
    once = pd.DataFrame({"userId": users, "movieId": items, "timestamp": 1000 + items // 3})
    source = tmp_path / "clicks.csv"
    config = dataclasses.replace(EVERYTHING, repeats=Repeats.FAIL)
    pd.concat([once, once]).to_csv(source, index=False)  # the file concatenated with itself: 50,000 repeats
    if on_bad_rows is OnBadRows.FAIL:
        with pytest.raises(DataError) as error:
            prepare(source, None, config, out=tmp_path / "data")
        assert str(error.value).startswith(f"{source}:50002: repeats line 2: the same user, item and time; expected")
        assert str(error.value).endswith("(and 49997 more bad rows)")
        return
    data = prepare(source, None, config, out=tmp_path / "data", on_bad_rows=on_bad_rows)
    assert (data.input["rows"], data.input["bad_rows"], data.input["repeats"]) == (100_000, 50_000, 50_000)
    assert by_user(data) == by_user(prepare(once, None, EVERYTHING))
    quarantine = pd.read_csv(tmp_path / "data/quarantine.csv")
    assert quarantine["line"].tolist() == list(range(50_002, 100_002))
    first_lines = quarantine["reason"].str.extract(r"repeats line (\d+):", expand=False).astype(int)
    assert first_lines.tolist() == list(range(2, 50_002))


def test_a_row_that_is_set_aside_does_not_decide_the_scale(tmp_path: Path) -> None:
    source = tmp_path / "ratings.csv"
    source.write_text(HEADER + "1,1,4,1\n1,2,5,2\n2,1,1,3\n2,2,-1,4\n")
    assert prepare_command(source, "--on-bad-rows", "quarantine", "--out", tmp_path / "data").exit_code == 0
    assert read_prepared(tmp_path / "data").config.rating_scale == RatingScale(1.0, 5.0)


def test_seconds_among_milliseconds_are_no_day_in_1970(tmp_path: Path) -> None:
    source = tmp_path / "ratings.csv"
    source.write_text(HEADER + "1,1,4,1500000000000\n1,2,5,1500000001000\n2,1,1,1500000000\n")
    result = prepare_command(source, "--out", tmp_path / "data")
    assert result.exit_code == 1
    assert "ratings.csv:4: timestamp 1500000000 is not a time; expected whole milliseconds" in result.output


@pytest.mark.parametrize("option", [("--memory", "inf"), ("--memory", "nan"), ("--rating-scale", "0", "inf")])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, option: tuple[str, ...]) -> None:
    source = tmp_path / "ratings.csv"
    source.write_text(HEADER + GOOD)
    result = prepare_command(source, *option, "--out", tmp_path / "data")
    assert result.exit_code in (1, 2)
    assert "Error: " in result.output
    assert isinstance(result.exception, SystemExit)


@pytest.mark.parametrize("content", ["[]", '{"schema_version": 2}', "{"])
def test_a_damaged_summary_is_one_clear_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/prepared.json").write_text(content)
    with pytest.raises(DataError, match=r"prepared\.json"):
        read_prepared(tmp_path / "data")


def test_files_of_others_in_the_output_are_never_lost(tmp_path: Path) -> None:
    source = tmp_path / "ratings.csv"
    source.write_text(HEADER + GOOD)
    assert prepare_command(source, "--out", tmp_path / "data").exit_code == 0
    assert prepare_command(source, "--out", tmp_path / "data").exit_code == 0  # nothing foreign: replaced
    (tmp_path / "data/notes.txt").write_text("mine")
    result = prepare_command(source, "--out", tmp_path / "data")
    assert result.exit_code == 1
    assert "notes.txt is no part of the prepared data" in result.output
    assert (tmp_path / "data/notes.txt").read_text() == "mine"
