"""The counters of items in a SQLite store: what its writer does with them in its transaction, and how they are read."""

import sqlite3
import struct
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import LiteralString

from serve.stores.base import UserEvent
from serve.stores.counters import (
    EXPECTED,
    ONE_EVENT,
    Counter,
    ItemCounts,
    add_events,
    added,
    are_counts,
    counted,
    with_hour,
)
from serve.stores.sql import LARGEST

SCHEMA = """
CREATE TABLE IF NOT EXISTS trend (
    item_id TEXT PRIMARY KEY,
    reference INTEGER NOT NULL,
    counts BLOB NOT NULL,
    changed INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS trend_changed ON trend (changed);
CREATE TABLE IF NOT EXISTS trend_start (
    number INTEGER PRIMARY KEY CHECK (number = 1),
    counted_until INTEGER
) STRICT;
INSERT OR IGNORE INTO trend_start VALUES (1, NULL);
"""
# `changed` is the arrival of the item's last event. Writers take turns, so what is read later has arrived later.
CHANGED_COUNTS = "SELECT item_id, reference, counts, changed FROM trend WHERE changed > ? ORDER BY changed"
# Also where the last event was deleted since.
LAST_ARRIVAL = "SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'events'"
COUNTED_UNTIL: LiteralString = "SELECT counted_until FROM trend_start"
# Item and timestamp of positive events between two arrivals and after a time.
TIMES: LiteralString = (
    "SELECT item_id, timestamp FROM events WHERE arrival > ? AND arrival <= ? AND timestamp > ? AND weight > 0"
)
INSERT_COUNTER = "INSERT OR REPLACE INTO trend VALUES (?, ?, ?, ?)"
# An older SQLite takes no more than 999 parameters.
ASKED_AT_ONCE = 900
COUNTS = struct.Struct(f"<{len(ONE_EVENT)}d")
COUNTS_OF_ONE = 8
"""Bytes of a count."""


def counts_of_rows(rows: Sequence[tuple[str, int, bytes, int]], since: int) -> ItemCounts:
    """The answer to CHANGED_COUNTS.

    Args:
        rows: Item id, reference, counts, and arrival of the last event, by arrival.
        since: The arrival that was asked for.

    Raises:
        sqlite3.DataError: The counts of a row cannot be decoded.
    """
    change = rows[-1][3] if rows else since
    return ItemCounts.of([(row[0], _counter(*row[:3])) for row in rows], change, max(0, change))


def count_events(connection: sqlite3.Connection, recorded: Sequence[UserEvent]) -> list[str]:
    """Adds events to the counters of their items, in the connection's transaction, if the store is seeded.

    Args:
        connection: Of the writer.
        recorded: Events that are stored in this transaction.

    Returns:
        As `add_counters`.
    """
    if not recorded:
        return []
    ((until,),) = connection.execute(COUNTED_UNTIL).fetchall()
    if until is None:
        return []
    events = ((new.event.item_id, new.event.timestamp) for new in recorded if new.event.weight > 0)
    return add_counters(connection, counted(events, time.time(), until))


def seed(connection: sqlite3.Connection, last: int, counters: dict[str, Counter], until: int) -> list[str]:
    """Seeds the store in the connection's transaction, unless it is seeded.

    Args:
        connection: Of the writer.
        last: As in `SqlStore._seed_after`, and so are the others.
        counters: By item id; changed.
        until: Seconds.

    Returns:
        As `add_counters`.
    """
    query = "UPDATE trend_start SET counted_until = ? WHERE counted_until IS NULL"
    if not connection.execute(query, [until]).rowcount:
        return []
    add_events(counters, connection.execute(TIMES, [last, LARGEST, until]), time.time())
    return add_counters(connection, counters)


def add_counters(connection: sqlite3.Connection, new: Mapping[str, Counter]) -> list[str]:
    """Adds to the counters in the connection's transaction.

    Args:
        connection: Of the writer.
        new: By item id.

    Returns:
        The items to which nothing was added, since the counter that is there cannot be decoded.
    """
    counters, items, damaged = dict(new), list(new), []
    ((arrival,),) = connection.execute(LAST_ARRIVAL).fetchall()
    for start in range(0, len(items), ASKED_AT_ONCE):
        part = items[start : start + ASKED_AT_ONCE]
        query = f"SELECT item_id, reference, counts FROM trend WHERE item_id IN ({', '.join('?' * len(part))})"
        for item_id, reference, counts in connection.execute(query, part).fetchall():
            try:
                counters[item_id] = added(_counter(item_id, reference, counts), counters[item_id])
            except sqlite3.DataError:
                del counters[item_id]
                damaged.append(item_id)
    connection.executemany(INSERT_COUNTER, counter_rows(counters.items(), arrival))
    return damaged


def counter_rows(counters: Iterable[tuple[str, Counter]], changed: int) -> Iterable[tuple[str, int, bytes, int]]:
    """The rows of INSERT_COUNTER.

    Args:
        counters: Item ids and their counters.
        changed: The arrival of the last event, in the column `changed` of all rows.

    Returns:
        One row for each counter.
    """
    return [(item_id, one.reference, COUNTS.pack(*one.counts), changed) for item_id, one in counters]


def _counter(item_id: str, reference: int, counts: bytes) -> Counter:
    whole = COUNTS.size, COUNTS.size - COUNTS_OF_ONE
    numbers = with_hour(struct.unpack(f"<{len(counts) // COUNTS_OF_ONE}d", counts)) if len(counts) in whole else ()
    if not are_counts(numbers):
        raise sqlite3.DataError(
            f"table trend, counter of the item {item_id!r}: expected {EXPECTED}, of 8 bytes each, came"
            f" {numbers or f'{len(counts)} bytes'}"
        )
    return Counter(reference, numbers)
