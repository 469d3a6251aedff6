"""Sorts the events that were read by user and time into columns, and finds the events that repeat an earlier row."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from jaxrec.config import Repeats, Ties
from jaxrec.data.histories import EventLog, event_writers, open_log
from jaxrec.data.ids import IdMap, write_ids

SORT_ROWS = 8_000_000  # rows that are sorted in memory at a time


@dataclasses.dataclass(frozen=True)
class SortedLog:
    """`tied`: events with the timestamp of the same user's event before. `repeats`: those with its item, too, of which
    `left_out` are not in the log."""

    log: EventLog
    tied: int
    repeats: int
    left_out: int = 0


Report = Callable[[np.ndarray], object]


def sort_log(
    connection: duckdb.DuckDBPyConnection,
    folder: Path,
    ties: Ties,
    seed: int,
    repeats: Repeats,
    report: Report | None = None,
) -> SortedLog:
    """Writes the view `events` as columns sorted by user and time into `folder`.

    Args:
        connection: DuckDB with `events`, as of `jaxrec.data.reading.check`.
        folder: An existing folder.
        ties: Equal timestamps of one user keep the row order (FILE), or get one that follows from the seed and the ids
            alone (RANDOM).
        seed: That of RANDOM.
        repeats: KEEP them, or leave all but the first row of each event out (FIRST, FAIL).
        report: Is called with the rows that are left out, in their order: [repeats, 2] int64, the number of each and
            of the row that it repeats; None: not called.

    Returns:
        The log, as memory maps, and how many events are tied and repeated.
    """
    users = connection.execute("SELECT user, count(*) AS n FROM events GROUP BY user ORDER BY user").fetchnumpy()
    items = connection.execute("SELECT DISTINCT item FROM events ORDER BY item").fetchnumpy()["item"]
    connection.execute(
        "CREATE OR REPLACE TABLE item_codes AS SELECT item, row_number() OVER (ORDER BY item)::INTEGER AS code "
        "FROM (SELECT DISTINCT item FROM events)"
    )
    drop = repeats is not Repeats.KEEP
    # Rows are needed where the order of the events is not that of the rows, and for `report`.
    fine = connection.execute("SELECT count(*) FROM (SELECT 1 FROM events WHERE within <> 0 LIMIT 1)").fetchall()[0][0]
    with_rows = drop and (report is not None or bool(fine))
    user_ids, counts = _plain(users["user"]), _plain(users["n"]).astype(np.int64)
    tied = found = 0
    left_out: list[np.ndarray] = []
    with event_writers(folder) as writers:
        ends = np.cumsum(counts)
        first = 0
        while first < len(counts):
            begin = int(ends[first] - counts[first])
            stop = max(first + 1, int(np.searchsorted(ends, begin + SORT_ROWS, side="right")))
            part = _sorted_part(connection, user_ids[first], user_ids[stop - 1], ties, seed, with_rows)
            part_users = np.repeat(np.arange(first, stop), counts[first:stop])
            repeated, part_tied = repeated_events(part_users, part["times"], part["items"], part.get("rows"))
            tied += part_tied
            found += len(repeated)
            if len(repeated) and drop:
                if report is not None:
                    left_out.append(part["rows"][repeated])
                keep = np.ones(len(part_users), bool)
                keep[repeated[:, 0]] = False
                counts[first:stop] = np.bincount(part_users[keep] - first, minlength=stop - first)
                part = {name: column[keep] for name, column in part.items()}
            for name, writer in writers.items():
                writer.write(part[name])
            first = stop
    if report is not None and left_out:
        rows = np.concatenate(left_out)
        report(rows[np.argsort(rows[:, 0])])
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))
    write_ids(IdMap(user_ids), folder / "user_ids.npy")
    write_ids(IdMap(_plain(items)), folder / "item_ids.npy")
    return SortedLog(open_log(folder), tied, found)


def tie_draw(seed: int, user: str, item: str, time: str) -> str:
    """SQL of the number that orders equal timestamps at random: it follows from the seed and these columns alone."""
    return f"md5_number_lower(concat_ws(' ', {int(seed)}, {user}, {item}, {time}))"


def repeated_events(
    users: np.ndarray, times: np.ndarray, items: np.ndarray, rows: np.ndarray | None = None
) -> tuple[np.ndarray, int]:
    """Events that are there already, among events sorted by user and time; only tied ones are compared.

    Args:
        users, times, items: [events] of numbers.
        rows: [events] the row of each event in the input; None: their order here.

    Returns:
        [repeats, 2] int64 positions, of each repeated event and of that of the first row, which it repeats; and how
        many events have the user and the time of the one before.

    Examples:
        >>> repeated_events(np.array([1, 1, 1, 2]), np.array([7, 7, 7, 7]), np.array([3, 4, 3, 3]))[0].tolist()
        [[2, 0]]
    """
    same = (np.diff(users) == 0) & (np.diff(times) == 0)
    positions = np.flatnonzero(np.append(same, False) | np.append(False, same))
    run = np.cumsum(np.append(True, ~same))[positions]
    keys = run * (int(items.max(initial=0)) + 1) + items[positions]
    ordered = np.sort(keys)
    if not (ordered[1:] == ordered[:-1]).any():
        return np.empty((0, 2), np.int64), int(same.sum())
    order = np.lexsort((positions if rows is None else rows[positions], keys))
    again = np.append(False, np.diff(keys[order]) == 0)
    firsts = np.maximum.accumulate(np.where(again, 0, np.arange(len(order))))
    return np.stack([positions[order][again], positions[order][firsts[again]]], axis=1), int(same.sum())


def _sorted_part(
    connection: duckdb.DuckDBPyConnection, first: object, last: object, ties: Ties, seed: int, rows: bool
) -> dict[str, np.ndarray]:
    tie_break = "number"
    if ties is Ties.RANDOM:
        tie_break = f"{tie_draw(seed, 'user', 'item', 'time')}, number"
    query = (
        f"SELECT code AS items, coalesce(rating, 'nan'::FLOAT) AS ratings, time AS times"
        f"{', number AS rows' if rows else ''} FROM events JOIN item_codes USING (item) "
        f"WHERE user BETWEEN ? AND ? ORDER BY user, time, within, {tie_break}"
    )
    bounds = [bound.item() if isinstance(bound, np.generic) else bound for bound in (first, last)]
    return {name: _plain(column) for name, column in connection.execute(query, bounds).fetchnumpy().items()}


def _plain(column: Any) -> np.ndarray:
    return np.ma.getdata(column)
