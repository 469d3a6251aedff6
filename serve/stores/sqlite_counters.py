"""The counters of items in a SQLite store: what its writer does with them in its transaction, and how they are read."""

import sqlite3
import struct
import time
from collections.abc import Iterable, Mapping, Sequence

from serve.stores.base import UserEvent
from serve.stores.counters import ONE_EVENT, Counter, ItemCounts, added, counted

# `begun` and `counted_until`: see `EventStore.seed_counts`.
COUNTERS_SCHEMA = """
CREATE TABLE IF NOT EXISTS trend (
    item_id TEXT PRIMARY KEY,
    reference INTEGER NOT NULL,
    counts BLOB NOT NULL,
    changed INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS trend_changed ON trend (changed);
CREATE TABLE IF NOT EXISTS trend_start (
    number INTEGER PRIMARY KEY CHECK (number = 1),
    begun INTEGER NOT NULL,
    counted_until INTEGER
) STRICT;
INSERT OR IGNORE INTO trend_start SELECT 1, coalesce(max(arrival), 0), NULL FROM events;
"""
# `changed` is the arrival of the item's last event. Writers take turns, so what is read later has arrived later.
CHANGED_COUNTS = "SELECT item_id, reference, counts, changed FROM trend WHERE changed > ? ORDER BY changed"
# Also where the last event was deleted since.
LAST_ARRIVAL = "SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'events'"
COUNTED_UNTIL = "SELECT counted_until FROM trend_start"
INSERT_COUNTER = "INSERT OR REPLACE INTO trend VALUES (?, ?, ?, ?)"
# An older SQLite takes no more than 999 parameters.
ASKED_AT_ONCE = 900
COUNTS = struct.Struct(f"<{len(ONE_EVENT)}d")


def counts_of_rows(rows: Sequence[tuple[str, int, bytes, int]], since: int) -> ItemCounts:
    """The answer to CHANGED_COUNTS.

    Args:
        rows: Item id, reference, counts, and arrival of the last event, by arrival.
        since: The arrival that was asked for.

    Raises:
        ValueError: A row's counts are not finite numbers from 0 on.
        sqlite3.DataError: The counts of a row cannot be decoded.
    """
    change = rows[-1][3] if rows else since
    return ItemCounts.of([(row[0], _counter(*row[:3])) for row in rows], change, max(0, change))


def count_events(connection: sqlite3.Connection, recorded: Sequence[UserEvent]) -> None:
    """Adds events to the counters of their items, in the connection's transaction; raises as `add_counters`."""
    if not recorded:
        return
    ((until,),) = connection.execute(COUNTED_UNTIL).fetchall()
    events = ((new.event.item_id, new.event.timestamp) for new in recorded)
    add_counters(connection, counted(events, time.time(), until))


def seed(connection: sqlite3.Connection, counters: Mapping[str, Counter], until: int) -> None:
    """Seeds the store in the connection's transaction, unless it is seeded; raises as `add_counters`.

    Args:
        connection: Of the writer.
        counters: What is added to the counters, by item id.
        until: Events until then (seconds) are in them, and are not counted from now on.
    """
    query = "UPDATE trend_start SET counted_until = ? WHERE counted_until IS NULL"
    if connection.execute(query, [until]).rowcount:
        add_counters(connection, counters)


def add_counters(connection: sqlite3.Connection, new: Mapping[str, Counter]) -> None:
    """Adds to the counters in the connection's transaction.

    Args:
        connection: Of the writer.
        new: By item id.

    Raises:
        sqlite3.DataError: A counter that is there cannot be decoded.
    """
    counters, items = dict(new), list(new)
    ((arrival,),) = connection.execute(LAST_ARRIVAL).fetchall()
    for start in range(0, len(items), ASKED_AT_ONCE):
        part = items[start : start + ASKED_AT_ONCE]
        query = f"SELECT item_id, reference, counts FROM trend WHERE item_id IN ({', '.join('?' * len(part))})"
        for item_id, reference, counts in connection.execute(query, part).fetchall():
            counters[item_id] = added(_counter(item_id, reference, counts), counters[item_id])
    connection.executemany(INSERT_COUNTER, counter_rows(counters.items(), arrival))


def counter_rows(counters: Iterable[tuple[str, Counter]], changed: int) -> Iterable[tuple[str, int, bytes, int]]:
    """The rows of INSERT_COUNTER.

    Args:
        counters: Item ids and their counters.
        changed: An arrival, after which what is recorded has changed the counters again.

    Returns:
        One row for each counter.
    """
    return [(item_id, one.reference, COUNTS.pack(*one.counts), changed) for item_id, one in counters]


def _counter(item_id: str, reference: int, counts: bytes) -> Counter:
    if len(counts) != COUNTS.size:
        raise sqlite3.DataError(
            f"table trend, item {item_id!r}: counts have {len(counts)} bytes, expected {COUNTS.size}"
            f" ({len(ONE_EVENT)} numbers of 8 bytes)"
        )
    return Counter(reference, COUNTS.unpack(counts))
