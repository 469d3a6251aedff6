"""The counters of items in a PostgreSQL store: statements for the transactions that record, seed and read."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, LiteralString

import psycopg

from serve.model.trend import COUNTED_S
from serve.stores.base import UserEvent
from serve.stores.counters import Counter, ItemCounts, add_events, counted
from serve.stores.sql import LARGEST

COUNTERS_SCHEMA: tuple[LiteralString, ...] = (
    """CREATE TABLE IF NOT EXISTS jaxrec.trend (
        item_id text PRIMARY KEY,
        reference bigint NOT NULL,
        counts double precision[] NOT NULL,
        changed bigint NOT NULL
    )""",
    # Servers of before counted no last hour.
    f"UPDATE jaxrec.trend SET counts = counts || 0::float8 WHERE cardinality(counts) = {len(COUNTED_S) - 1}",
    "CREATE INDEX IF NOT EXISTS trend_changed ON jaxrec.trend (changed)",
    """CREATE TABLE IF NOT EXISTS jaxrec.trend_start (
        number integer PRIMARY KEY CHECK (number = 1),
        counted_until bigint
    )""",
    "INSERT INTO jaxrec.trend_start VALUES (1, NULL) ON CONFLICT DO NOTHING",
)
# `changed` is the transaction. What this finds is read again as long as a transaction before it is under way. Events of
# such a transaction may have arrivals below `arrival` and not be counted yet. `arrival` is that of the last event that
# is stored: if the last events were deleted, it is smaller than before.
CHANGED_COUNTS: LiteralString = (
    "SELECT oldest, arrival, item_id, reference, counts FROM (SELECT"
    " txid_snapshot_xmin(txid_current_snapshot()) AS oldest,"
    " (SELECT coalesce(max(arrival), 0) FROM jaxrec.events) AS arrival) AS snapshot"
    " LEFT JOIN jaxrec.trend ON changed >= %s"
)
COUNTED_UNTIL: LiteralString = "SELECT counted_until FROM jaxrec.trend_start"
# Item and timestamp of events between two arrivals and after a time.
TIMES: LiteralString = (
    "SELECT item_id, timestamp FROM jaxrec.events"
    " WHERE arrival > %s AND arrival <= %s AND timestamp > %s AND weight > 0"
)
# Waits for the transactions that are recording events; those that begin later wait until this one ends. So a call that
# records either finds the store seeded or has its events counted by the seed, and a lock in `record` is not needed.
WAIT_FOR_EVENTS: LiteralString = "LOCK TABLE jaxrec.events IN SHARE MODE"
# Also where the last event was deleted since.
LAST_ARRIVAL: LiteralString = (
    "SELECT coalesce(pg_sequence_last_value(pg_get_serial_sequence('jaxrec.events', 'arrival')::regclass), 0)"
)
# Both counters as of the later reference. PostgreSQL makes an error of a number that becomes too small, and nothing is
# left after 200 half-lives.
_AGED: LiteralString = (
    "{0}.counts[{2}] * power(0.5::float8, least(greatest({1}.reference::float8 - {0}.reference, 0) / {3}, 200))"
)
_PLACES = range(1, len(COUNTED_S) + 1)
_ADDED = ", ".join(
    f"{_AGED.format('old', 'excluded', at, half_life)} + {_AGED.format('excluded', 'old', at, half_life)}"
    for at, half_life in zip(_PLACES, COUNTED_S, strict=True)
)
_NAMES = ", ".join(f"of_{at}" for at in _PLACES)
ADD = (
    f"INSERT INTO jaxrec.trend AS old SELECT item_id, reference, ARRAY[{_NAMES}], txid_current()"
    f" FROM unnest(%s::text[], %s::bigint[]{', %s::float8[]' * len(_PLACES)}) AS new (item_id, reference, {_NAMES})"
    " ORDER BY item_id ON CONFLICT (item_id) DO UPDATE SET"
    f" reference = greatest(old.reference, excluded.reference), counts = ARRAY[{_ADDED}], changed = excluded.changed"
    # A counter that cannot be decoded stays as it is. NaN is greater than infinity.
    f" WHERE cardinality(old.counts) = {len(_PLACES)} AND 0 <= ALL(old.counts) AND 'infinity' > ALL(old.counts)"
    " RETURNING item_id"
)
# Each statement has to be much shorter than the statement timeout.
SEEDED_AT_ONCE = 10_000


def counts_of_rows(rows: Sequence[tuple[int, int, str | None, int, list[float]]]) -> ItemCounts:
    """The answer to CHANGED_COUNTS.

    Args:
        rows: At least one; the first two columns are the same in all, and the item is None where none changed.

    Raises:
        ValueError: The counts of a row are not one finite number for each half-life.
    """
    oldest, arrival, *_ = rows[0]
    found = [(item_id, Counter(reference, counts)) for _, _, item_id, reference, counts in rows if item_id is not None]
    return ItemCounts.of(found, oldest, arrival)


def count_events(connection: psycopg.Connection, recorded: Sequence[UserEvent]) -> list[str]:
    """Adds events to the counters of their items, if the store is seeded. The last statement of a transaction: others
    that count the same items wait until it ends.

    Args:
        connection: In the transaction that stores the events.
        recorded: The events.

    Returns:
        The items to which nothing was added, since the counter that is there cannot be decoded.
    """
    if not recorded:
        return []
    (until,) = connection.execute(COUNTED_UNTIL).fetchone() or (None,)
    if until is None:
        return []
    events = ((new.event.item_id, new.event.timestamp) for new in recorded if new.event.weight > 0)
    return _add(connection, counted(events, time.time(), until))


def last_arrival(connection: psycopg.Connection) -> int:
    """See `EventStore.last_arrival`; arrivals are not given in the order in which transactions end."""
    connection.execute(WAIT_FOR_EVENTS)
    (last,) = connection.execute(LAST_ARRIVAL).fetchone() or (0,)
    return int(last)


def seed(connection: psycopg.Connection, last: int, counters: dict[str, Counter], until: int) -> list[str]:
    """Seeds the store in the connection's transaction, unless it is seeded.

    Args:
        connection: In a transaction.
        last: As in `SqlStore._seed_after`, and so are the others.
        counters: By item id; changed.
        until: Seconds.

    Returns:
        As `count_events`.
    """
    connection.execute(WAIT_FOR_EVENTS)
    # Waits for another server that seeds.
    query: LiteralString = "UPDATE jaxrec.trend_start SET counted_until = %s WHERE counted_until IS NULL"
    if not connection.execute(query, [until]).rowcount:
        return []
    add_events(counters, connection.execute(TIMES, [last, LARGEST, until]), time.time())
    items = list(counters.items())
    parts = (dict(items[start : start + SEEDED_AT_ONCE]) for start in range(0, len(items), SEEDED_AT_ONCE))
    return [item_id for part in parts for item_id in _add(connection, part)]


def _add(connection: psycopg.Connection, counters: Mapping[str, Counter]) -> list[str]:
    if not counters:
        return []
    counts = zip(*(counter.counts for counter in counters.values()), strict=True)
    columns: list[list[Any]] = [list(counters), [one.reference for one in counters.values()], *map(list, counts)]
    changed = {item_id for (item_id,) in connection.execute(ADD, columns).fetchall()}
    return [item_id for item_id in counters if item_id not in changed]
