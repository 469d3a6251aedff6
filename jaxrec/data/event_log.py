"""The whole log as sorted columns: every event that was read, before any filter. What `append` builds on."""

import dataclasses
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from jaxrec.config import Ties
from jaxrec.data.columns import ColumnWriter, open_column
from jaxrec.data.histories import Histories
from jaxrec.data.ids import IdMap, open_ids, write_ids
from jaxrec.data.reading.bad_rows import BadRow, BadRows

SORT_ROWS = 8_000_000  # rows that are sorted in memory at a time
EVENT_TYPES: dict[str, type[np.generic]] = {"items": np.int32, "ratings": np.float32, "times": np.int64}


@dataclasses.dataclass(frozen=True)
class EventLog:
    """`events.items` are 1-based indices into `items`; users and items are all that occur."""

    users: IdMap
    items: IdMap
    events: Histories


@dataclasses.dataclass(frozen=True)
class SortedLog:
    """`tied`: events with the timestamp of the same user's event before. `duplicates`: rows left out."""

    log: EventLog
    tied: int
    duplicates: int


class DuplicatesError(Exception):
    """There are duplicates and the source was not read exactly, so that their lines are not known."""


def open_log(folder: Path) -> EventLog:
    """Opens what `sort_log` or `write_log` wrote, as memory maps."""
    columns = {name: open_column(folder / f"{name}.npy") for name in ("offsets", *EVENT_TYPES)}
    return EventLog(open_ids(folder / "user_ids.npy"), open_ids(folder / "item_ids.npy"), Histories(**columns))


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
    with (
        ColumnWriter(folder / "items.npy", np.int32) as item_column,
        ColumnWriter(folder / "ratings.npy", np.float32) as rating_column,
        ColumnWriter(folder / "times.npy", np.int64) as time_column,
    ):
        ends = np.cumsum(counts)
        first = 0
        while first < len(counts):
            begin = int(ends[first] - counts[first])
            stop = max(first + 1, int(np.searchsorted(ends, begin + SORT_ROWS, side="right")))
            part = _sorted_part(connection, user_ids[first], user_ids[stop - 1], ties, seed, bad is not None)
            part_users = np.repeat(np.arange(first, stop), counts[first:stop])
            repeated, part_tied = _repeats(part_users, part["item"], part["time"], len(items))
            tied += part_tied
            if len(repeated):
                if bad is None:
                    raise DuplicatesError
                repeated = _first_row_first(part["row"], repeated)
                duplicates += len(repeated)
                _report(connection, part["row"], repeated, bad)
                keep = np.ones(len(part_users), bool)
                keep[repeated[:, 0]] = False
                counts[first:stop] = np.bincount(part_users[keep] - first, minlength=stop - first)
                part = {name: column[keep] for name, column in part.items()}
            item_column.write(part["item"])
            rating_column.write(part["rating"])
            time_column.write(part["time"])
            first = stop
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))
    write_ids(IdMap(user_ids), folder / "user_ids.npy")
    write_ids(IdMap(_plain(items)), folder / "item_ids.npy")
    return SortedLog(open_log(folder), tied, duplicates)


def _sorted_part(
    connection: duckdb.DuckDBPyConnection, first: object, last: object, ties: Ties, seed: int, rows: bool
) -> dict[str, np.ndarray]:
    tie_break = "events.rowid"
    if ties is Ties.RANDOM:
        tie_break = f"md5_number_lower(concat_ws(' ', {int(seed)}, user, item, time)), events.rowid"
    query = (
        f"SELECT code AS item, coalesce(rating, 'nan'::FLOAT) AS rating, time{', events.rowid AS row' if rows else ''} "
        f"FROM events JOIN item_codes USING (item) WHERE user BETWEEN ? AND ? ORDER BY user, time, within, {tie_break}"
    )
    bounds = [bound.item() if isinstance(bound, np.generic) else bound for bound in (first, last)]
    return {name: _plain(column) for name, column in connection.execute(query, bounds).fetchnumpy().items()}


def _repeats(users: np.ndarray, items: np.ndarray, times: np.ndarray, item_count: int) -> tuple[np.ndarray, int]:
    """[duplicates, 2] positions: of each repeated event, and of the first one that it repeats; and the tied events."""
    same = (users[1:] == users[:-1]) & (times[1:] == times[:-1])
    tied = int(same.sum())
    if not tied:
        return np.empty((0, 2), np.int64), 0
    in_run = np.zeros(len(users), bool)
    in_run[1:] |= same
    in_run[:-1] |= same
    positions = np.flatnonzero(in_run)
    run = np.cumsum(np.concatenate([[True], ~same]))[positions]
    keys = run * (item_count + 1) + items[positions]
    ordered = np.sort(keys)
    if not (ordered[1:] == ordered[:-1]).any():
        return np.empty((0, 2), np.int64), tied
    order = np.argsort(keys, kind="stable")
    repeats = np.concatenate([[False], keys[order][1:] == keys[order][:-1]])
    firsts = np.maximum.accumulate(np.where(repeats, 0, np.arange(len(order))))
    return np.stack([positions[order][repeats], positions[order][firsts[repeats]]], axis=1), tied


def _first_row_first(rows: np.ndarray, repeated: np.ndarray) -> np.ndarray:
    """The same groups of repeats with the event that came first in the input as the one that stays.

    `rows` [events]: each event's row in the input. Times are compared in seconds, so the order within one does not say.
    """
    result = repeated.copy()
    for first in np.unique(repeated[:, 1]):
        group = np.append(first, repeated[repeated[:, 1] == first, 0])
        group = group[np.argsort(rows[group], kind="stable")]
        result[repeated[:, 1] == first] = np.stack([group[1:], np.full(len(group) - 1, group[0])], axis=1)
    return result


def _report(connection: duckdb.DuckDBPyConnection, rows: np.ndarray, repeated: np.ndarray, bad: BadRows) -> None:
    for second, first in rows[repeated].tolist():
        found = connection.execute(
            "SELECT file, line, text, user, item, time FROM events WHERE rowid IN (?, ?) ORDER BY rowid",
            [first, second],
        ).fetchall()
        (_, first_line, *_), (file, line, text, user, item, time) = found
        reason = f"user {user}, item {item} at time {time} repeats line {first_line}; expected each event once"
        bad.add(BadRow(file, line, "", "", reason, text))


def _plain(column: Any) -> np.ndarray:
    return np.ma.getdata(column)
