"""The counters of items in a PostgreSQL store: statements for the transactions that record, seed and read."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, LiteralString

import psycopg

from serve.model.trend import HALF_LIVES_S
from serve.stores.base import UserEvent
from serve.stores.counters import Counter, ItemCounts, counted

# `begun` and `counted_until`: see `EventStore.seed_counts`.
COUNTERS_SCHEMA: tuple[LiteralString, ...] = (
    """CREATE TABLE IF NOT EXISTS jaxrec.trend (
        item_id text PRIMARY KEY,
        reference bigint NOT NULL,
        counts double precision[] NOT NULL,
        changed bigint NOT NULL
    )""",
    "CREATE INDEX IF NOT EXISTS trend_changed ON jaxrec.trend (changed)",
    """CREATE TABLE IF NOT EXISTS jaxrec.trend_start (
        number integer PRIMARY KEY CHECK (number = 1),
        begun bigint NOT NULL,
        counted_until bigint
    )""",
    # Waits for events that are being recorded, so that none of them comes to be at an arrival before `begun`.
    "LOCK TABLE jaxrec.events IN SHARE MODE",
    """INSERT INTO jaxrec.trend_start SELECT 1, coalesce(max(arrival), 0), NULL FROM jaxrec.events
        ON CONFLICT DO NOTHING""",
)
# `changed` is the transaction. What this finds is read again as long as a transaction before it is under way. Events of
# such a transaction may have arrivals below `arrival` and not be counted yet. `arrival` is of the events that are
# there: if the last ones were deleted, that of an earlier one.
CHANGED_COUNTS: LiteralString = (
    "SELECT oldest, arrival, item_id, reference, counts FROM (SELECT"
    " txid_snapshot_xmin(txid_current_snapshot()) AS oldest,"
    " (SELECT coalesce(max(arrival), 0) FROM jaxrec.events) AS arrival) AS snapshot"
    " LEFT JOIN jaxrec.trend ON changed >= %s"
)
COUNTED_UNTIL: LiteralString = "SELECT counted_until FROM jaxrec.trend_start"
# Both counters as of the later reference. PostgreSQL makes an error of a number that becomes too small, and nothing is
# left after 200 half-lives.
_AGED: LiteralString = (
    "{0}.counts[{2}] * power(0.5::float8, least(greatest({1}.reference::float8 - {0}.reference, 0) / {3}, 200))"
)
_PLACES = range(1, len(HALF_LIVES_S) + 1)
_ADDED = ", ".join(
    f"{_AGED.format('old', 'excluded', at, half_life)} + {_AGED.format('excluded', 'old', at, half_life)}"
    for at, half_life in zip(_PLACES, HALF_LIVES_S, strict=True)
)
_NAMES = ", ".join(f"of_{at}" for at in _PLACES)
ADD = (
    f"INSERT INTO jaxrec.trend AS old SELECT item_id, reference, ARRAY[{_NAMES}], txid_current()"
    f" FROM unnest(%s::text[], %s::bigint[]{', %s::float8[]' * len(_PLACES)}) AS new (item_id, reference, {_NAMES})"
    " ORDER BY item_id ON CONFLICT (item_id) DO UPDATE SET"
    f" reference = greatest(old.reference, excluded.reference), counts = ARRAY[{_ADDED}], changed = excluded.changed"
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


def count_events(connection: psycopg.Connection, recorded: Sequence[UserEvent]) -> None:
    """Adds events to the counters of their items. The last statement of a transaction: others that count the same items
    wait until it ends."""
    if not recorded:
        return
    until = _counted_until(connection, COUNTED_UNTIL)
    if until is None:
        # Until this transaction ends, the store is not seeded by another: its events would be counted with the seed.
        until = _counted_until(connection, f"{COUNTED_UNTIL} FOR SHARE")
    events = ((new.event.item_id, new.event.timestamp) for new in recorded)
    _add(connection, counted(events, time.time(), until))


def seed(connection: psycopg.Connection, counters: Mapping[str, Counter], until: int) -> None:
    """Seeds the store in the connection's transaction, unless it is seeded.

    Args:
        connection: In a transaction.
        counters: What is added to the counters, by item id.
        until: Events until then (seconds) are in them, and are not counted from now on.
    """
    # Waits for another server that seeds, and for events that are being counted; later ones wait for this.
    query: LiteralString = "UPDATE jaxrec.trend_start SET counted_until = %s WHERE counted_until IS NULL"
    if not connection.execute(query, [until]).rowcount:
        return
    items = sorted(counters)
    for start in range(0, len(items), SEEDED_AT_ONCE):
        _add(connection, {item_id: counters[item_id] for item_id in items[start : start + SEEDED_AT_ONCE]})


def _counted_until(connection: psycopg.Connection, query: LiteralString) -> int | None:
    (until,) = connection.execute(query).fetchone() or (None,)
    return until


def _add(connection: psycopg.Connection, counters: Mapping[str, Counter]) -> None:
    if counters:
        counts = zip(*(counter.counts for counter in counters.values()), strict=True)
        columns: list[list[Any]] = [list(counters), [one.reference for one in counters.values()], *map(list, counts)]
        connection.execute(ADD, columns)
