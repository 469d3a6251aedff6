"""Sorts the engine's `events` by user and time into columns, and finds the events that repeat an earlier row."""

import dataclasses
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd

from jaxrec.config import Ties
from jaxrec.data.histories import EventLog, event_writers, open_log
from jaxrec.data.ids import IdMap, write_ids
from jaxrec.data.reading.bad_rows import BadRow, BadRows

SORT_ROWS = 8_000_000  # rows that are sorted in memory at a time


@dataclasses.dataclass(frozen=True)
class SortedLog:
    """`tied`: events with the timestamp of the same user's event before. `duplicates`: rows left out."""

    log: EventLog
    tied: int
    duplicates: int


class DuplicatesError(Exception):
    """There are duplicates and the source was not read exactly, so that their lines are not known."""


def sort_log(
    connection: duckdb.DuckDBPyConnection, folder: Path, ties: Ties, seed: int, bad: BadRows | None
) -> SortedLog:
    """Writes the engine's `events` as columns sorted by user and time into `folder`.

    Equal timestamps of one user keep the row order (Ties.FILE), or get one that follows from the seed and the ids
    alone (Ties.RANDOM). Of events with equal user, item and time the first row stays and the others go to `bad`; None
    raises DuplicatesError instead.
    """
    users = connection.execute("SELECT user, count(*) AS n FROM events GROUP BY user ORDER BY user").fetchnumpy()
    items = connection.execute("SELECT DISTINCT item FROM events ORDER BY item").fetchnumpy()["item"]
    connection.execute(
        "CREATE OR REPLACE TABLE item_codes AS SELECT item, row_number() OVER (ORDER BY item)::INTEGER AS code "
        "FROM (SELECT DISTINCT item FROM events)"
    )
    user_ids, counts = _plain(users["user"]), _plain(users["n"]).astype(np.int64)
    tied = duplicates = 0
    with event_writers(folder) as writers:
        ends = np.cumsum(counts)
        first = 0
        while first < len(counts):
            begin = int(ends[first] - counts[first])
            stop = max(first + 1, int(np.searchsorted(ends, begin + SORT_ROWS, side="right")))
            part = _sorted_part(connection, user_ids[first], user_ids[stop - 1], ties, seed, bad is not None)
            part_users = np.repeat(np.arange(first, stop), counts[first:stop])
            repeated, part_tied = repeated_events(part_users, part["times"], part["items"], part.get("rows"))
            tied += part_tied
            if len(repeated):
                if bad is None:
                    raise DuplicatesError
                duplicates += len(repeated)
                _report(connection, part["rows"][repeated], bad)
                keep = np.ones(len(part_users), bool)
                keep[repeated[:, 0]] = False
                counts[first:stop] = np.bincount(part_users[keep] - first, minlength=stop - first)
                part = {name: column[keep] for name, column in part.items()}
            for name, writer in writers.items():
                writer.write(part[name])
            first = stop
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))
    write_ids(IdMap(user_ids), folder / "user_ids.npy")
    write_ids(IdMap(_plain(items)), folder / "item_ids.npy")
    return SortedLog(open_log(folder), tied, duplicates)


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
    tie_break = "events.rowid"
    if ties is Ties.RANDOM:
        tie_break = f"{tie_draw(seed, 'user', 'item', 'time')}, events.rowid"
    query = (
        f"SELECT code AS items, coalesce(rating, 'nan'::FLOAT) AS ratings, time AS times"
        f"{', events.rowid AS rows' if rows else ''} FROM events JOIN item_codes USING (item) "
        f"WHERE user BETWEEN ? AND ? ORDER BY user, time, within, {tie_break}"
    )
    bounds = [bound.item() if isinstance(bound, np.generic) else bound for bound in (first, last)]
    return {name: _plain(column) for name, column in connection.execute(query, bounds).fetchnumpy().items()}


def _report(connection: duckdb.DuckDBPyConnection, repeated: np.ndarray, bad: BadRows) -> None:
    """`repeated` [repeats, 2]: the row of each repeated event, and that of the event that it repeats."""
    connection.register("repeats", pd.DataFrame(repeated, columns=["later", "first"]))
    result = connection.execute(
        "SELECT events.file, events.line, events.text, user, item, time, earlier.line FROM repeats "
        "JOIN events ON events.rowid = later JOIN (SELECT rowid AS first, line FROM events) AS earlier USING (first) "
        f"ORDER BY events.file, events.line {'' if bad.limit is None else f'LIMIT {bad.limit}'}"
    )
    listed = 0
    while found := result.fetchmany(10_000):
        for file, line, text, user, item, time, first_line in found:
            reason = f"user {user}, item {item} at time {time} repeats line {first_line}; expected each event once"
            bad.add(BadRow(file, line, "", "", reason, text))
        listed += len(found)
    bad.add_unlisted(len(repeated) - listed)
    connection.unregister("repeats")


def _plain(column: Any) -> np.ndarray:
    return np.ma.getdata(column)
