"""For whom a batch of recommendations is asked, and when."""

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from jaxrec.config import PrepareConfig
from jaxrec.data.histories import EventLog
from jaxrec.data.reading.bad_rows import BadRow, BadRows, OnBadRows
from jaxrec.data.reading.check import ReadOptions
from jaxrec.data.reading.formats import SAMPLE_ROWS
from jaxrec.data.reading.read import open_workspace, read_log
from jaxrec.data.reading.rules import IdKind, TimeUnit, recognize_time_unit
from jaxrec.data.reading.sources import DEFAULT_COLUMNS, ColumnNames
from jaxrec.data.reading.text_rows import DELIMITERS, TextTable, rows
from jaxrec.data.schema import ITEM, TIME, USER
from jaxrec.errors import DataError


@dataclasses.dataclass(frozen=True)
class Requests:
    """For whom to recommend, and which events count.

    `users` [n] raw ids; `first`, `stop` [n] int64: the rows of each one's events in the log; `times` [n] int64 seconds,
    None: not known.
    """

    users: np.ndarray
    first: np.ndarray
    stop: np.ndarray
    times: np.ndarray | None


def all_users(log: EventLog) -> Requests:
    """Every user of a log, by id, at no known time."""
    return Requests(log.users.raw_ids, log.events.offsets[:-1], log.events.offsets[1:], None)


def read_requests(path: Path, log: EventLog, options: ReadOptions = ReadOptions()) -> Requests:
    """Reads for whom to recommend, and when. Ids and times keep the rules of a log's.

    Args:
        path: CSV with a header, separated by commas, semicolons or tabs, with the columns of the user and of the time.
        log: Events by user; those after a request's time are left out of it.
        options: Names of the columns and form of the times, where they are not to be recognized.

    Returns:
        The requests in the order of the file.

    Raises:
        DataError: For bad rows, naming file and line.
    """
    table = _open(path, options.columns)
    lines, users, times = _columns(table)
    unit = recognize_time_unit(times[:SAMPLE_ROWS]) if options.time_unit is TimeUnit.AUTO else options.time_unit
    as_log = ReadOptions(time_unit=unit, users=IdKind.INTEGER if log.users.raw_ids.dtype == np.int64 else IdKind.TEXT)
    # A log in which each row is an item of its own, so that the same request twice is no repeat.
    frame = pd.DataFrame({USER: users, ITEM: np.arange(len(users)), TIME: times})
    broken: list[tuple[object, ...]] = []
    try:
        with open_workspace(frame) as work:
            bad = BadRows(OnBadRows.QUARANTINE, broken.append)
            read_log(work, as_log, PrepareConfig(), bad, work.scratch / "log")
            read = work.connection.execute("SELECT user, time FROM events ORDER BY item").fetchnumpy()
    except DataError:
        if not broken:
            raise
    _fail_if_any([BadRow(*row) for row in broken], path, table.labels, lines)  # type: ignore[arg-type]
    names, moments = np.ma.getdata(read["user"]), np.ma.getdata(read["time"])
    codes, offsets = log.users.encode(names), log.events.offsets
    first, stop = np.zeros(len(codes), np.int64), np.zeros(len(codes), np.int64)
    for at in np.flatnonzero(codes):
        begin, end = offsets[codes[at] - 1], offsets[codes[at]]
        first[at] = begin
        stop[at] = begin + np.searchsorted(log.events.times[begin:end], moments[at], side="right")
    return Requests(names, first, stop, moments)


def _open(path: Path, names: ColumnNames) -> TextTable:
    """The file with the columns USER and TIME: those of the given names, or of names that logs have."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        first = file.readline()
    delimiter = max(DELIMITERS, key=first.count)
    header = [name.strip() for name in next(csv.reader([first], delimiter=delimiter), [])]
    labels = {}
    for role in (USER, TIME):
        known = (names.named(role), *DEFAULT_COLUMNS[role])
        found = next((name for name in known if name in header), None)
        if found is None:
            raise DataError(f"{path}:1: expected the columns userId,timestamp, came {first.strip() or 'an empty file'}")
        labels[role] = found
    return TextTable(path, str(path), delimiter, tuple(header), {r: header.index(n) for r, n in labels.items()}, labels)


def _columns(table: TextTable) -> tuple[list[int], list[str], list[str]]:
    """Line, user and time of each row. Raises DataError for rows that are not whole, and where there is none."""
    bad = BadRows(OnBadRows.FAIL)
    lines, users, times = [], [], []
    for line, fields, text in rows(table, bad):
        user, moment = (fields[table.columns[role]].strip() for role in (USER, TIME))
        if not user:
            bad.add(BadRow(table.name, line, table.labels[USER], "", "is empty; expected an id", text))
        lines.append(line)
        users.append(user)
        times.append(moment)
    bad.fail_if_any()
    if not lines:
        raise DataError(f"{table.name}: no rows after the header")
    return lines, users, times


def _fail_if_any(broken: Sequence[BadRow], path: Path, labels: Mapping[str, str], lines: Sequence[int]) -> None:
    """The rows of the frame with the names that the file gives them."""
    bad = BadRows(OnBadRows.FAIL)
    for row in broken:
        field = labels.get(row.field, row.field)
        bad.add(dataclasses.replace(row, file=str(path), line=lines[row.line - 1], field=field))
    bad.fail_if_any()
