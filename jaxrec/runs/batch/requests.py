"""For whom a batch of recommendations is asked, and when."""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from jaxrec.data.histories import EventLog
from jaxrec.data.reading.bad_rows import BadRow, BadRows, OnBadRows
from jaxrec.data.reading.check import ReadOptions, load
from jaxrec.data.reading.columns import ColumnNames, choose_columns
from jaxrec.data.reading.dialect import Dialect
from jaxrec.data.reading.read import open_workspace
from jaxrec.data.reading.rules import IdKind
from jaxrec.data.reading.sources import TextOptions, open_text
from jaxrec.data.reading.text_file import records
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
        path: CSV with a header, of any delimiter and encoding, or JSON lines; with columns of the user and the time.
        log: Events by user; those after a request's time are left out of it.
        options: Form of the times, and the names of the columns, if the file has them; else they are recognized.

    Returns:
        The requests in the order of the file.

    Raises:
        DataError: For bad rows, naming file and line.
    """
    lines, users, times, labels = _columns(path, options.columns)
    kind = IdKind.INTEGER if log.users.raw_ids.dtype == np.int64 else IdKind.TEXT
    as_log = ReadOptions(time_unit=options.time_unit, time_format=options.time_format, users=kind)
    # As a log, in which each row is an item of its own.
    frame = pd.DataFrame({USER: users, ITEM: np.arange(len(users)), TIME: times})
    broken: list[BadRow] = []
    try:
        with open_workspace(frame) as work:
            work.relation.name, work.relation.labels = str(path), {**work.relation.labels, **labels}
            bad = BadRows(OnBadRows.QUARANTINE, broken.extend)
            load(work.connection, work.relation, as_log, None, bad)
            read = work.connection.execute("SELECT user, time FROM events ORDER BY item").fetchnumpy()
    except DataError:
        if not broken:
            raise
    _fail_if_any(broken, lines)
    names, moments = np.ma.getdata(read["user"]), np.ma.getdata(read["time"])
    codes, offsets = log.users.encode(names), log.events.offsets
    first, stop = np.zeros(len(codes), np.int64), np.zeros(len(codes), np.int64)
    for at in np.flatnonzero(codes):
        begin, end = offsets[codes[at] - 1], offsets[codes[at]]
        first[at] = begin
        stop[at] = begin + np.searchsorted(log.events.times[begin:end], moments[at], side="right")
    return Requests(names, first, stop, moments)


def _columns(path: Path, names: ColumnNames) -> tuple[list[int], list[str], list[str], dict[str, str]]:
    """Line, user and time of each row, and the file's names of the columns.

    Raises DataError for rows that are not whole, and where there is none.
    """

    def choose(dialect: Dialect) -> tuple[dict[str, int], dict[str, str]]:
        header = dialect.names or ()
        given = ColumnNames(user=_if_in(header, names.user), time=_if_in(header, names.time))
        labels = choose_columns(header, given, f"{path}:1", roles=(USER, TIME))
        return {role: header.index(label) for role, label in labels.items()}, labels

    bad = BadRows(OnBadRows.FAIL)
    with tempfile.TemporaryDirectory(prefix="jaxrec-") as scratch:
        table, _ = open_text(path, str(path), TextOptions(), Path(scratch), choose, True, "userId,timestamp")
        rows = list(records(table, bad.add))
    users, times = ([fields[table.columns[role]].strip() for _, fields in rows] for role in (USER, TIME))
    for (line, fields), user in zip(rows, users, strict=True):
        if not user:
            bad.add(BadRow(str(path), line, table.labels[USER], "", "is empty; expected an id", ",".join(fields)))
    bad.fail_if_any()
    if not rows:
        raise DataError(f"{path}: no rows after the header")
    return [line for line, _ in rows], users, times, dict(table.labels)


def _if_in(header: Sequence[str], name: str | None) -> str | None:
    """The log's name of a column, unless the requests call it something else."""
    return name if name in header else None


def _fail_if_any(broken: Sequence[BadRow], lines: Sequence[int]) -> None:
    """Raises DataError with the lines of the file; those of a frame are the numbers of its rows."""
    bad = BadRows(OnBadRows.FAIL)
    for row in broken:
        bad.add(row._replace(line=lines[row.line - 1]))
    bad.fail_if_any()
