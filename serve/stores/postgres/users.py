"""What a PostgreSQL store does with all that is stored of a user, each within a transaction."""

from collections.abc import Sequence
from typing import LiteralString

import psycopg

from serve.stores.base import MOST_DELETIONS, MOST_MERGED, Deleted, TooManyToMerge, digest
from serve.stores.postgres.schema import DELETION_LOCK

# On a slow disk the largest merge takes longer than a call of another kind may.
MERGE_TIMEOUT_MS: LiteralString = "30000"
TABLES: tuple[LiteralString, LiteralString] = ("events", "shown")


def delete_user(connection: psycopg.Connection, user_id: str) -> Deleted:
    """See `EventStore.delete_user`."""
    _lock_deletions(connection)
    # The lock of `record`: no event can come in between.
    connection.execute("SELECT 1 FROM jaxrec.users WHERE user_id = %s FOR UPDATE", [user_id])
    connection.execute(
        "DELETE FROM jaxrec.shown_items WHERE recommendation_id IN"
        " (SELECT recommendation_id FROM jaxrec.shown WHERE user_id = %s)",
        [user_id],
    )
    counts = [
        connection.execute(f"DELETE FROM jaxrec.{table} WHERE user_id = %s", [user_id]).rowcount for table in TABLES
    ]
    connection.execute("DELETE FROM jaxrec.states WHERE user_id = %s", [user_id])
    connection.execute("DELETE FROM jaxrec.users WHERE user_id = %s", [user_id])
    _note_deletion(connection, user_id)
    return Deleted(*counts)


def delete_events(connection: psycopg.Connection, user_id: str, event_ids: Sequence[str]) -> int:
    """See `EventStore.delete_events`."""
    connection.execute("SELECT 1 FROM jaxrec.users WHERE user_id = %s FOR UPDATE", [user_id])
    query: LiteralString = "DELETE FROM jaxrec.events WHERE user_id = %s AND event_id = ANY(%s)"
    deleted = connection.execute(query, [user_id, list(event_ids)]).rowcount
    if deleted:
        _begin_anew(connection, user_id)
    return deleted


def merge_users(connection: psycopg.Connection, source: str, target: str) -> Deleted:
    """See `EventStore.merge_users`."""
    connection.execute(f"SET LOCAL statement_timeout = {MERGE_TIMEOUT_MS}")
    _lock_deletions(connection)
    lock_users(connection, [source, target])
    count = 0
    for table in TABLES:
        query: LiteralString = f"SELECT count(*) FROM jaxrec.{table} WHERE user_id = %s"
        (found,) = connection.execute(query, [source]).fetchone() or (0,)
        count += found
    if count > MOST_MERGED:
        raise TooManyToMerge(count, MOST_MERGED)
    moved = Deleted(
        *(
            connection.execute(f"UPDATE jaxrec.{table} SET user_id = %s WHERE user_id = %s", [target, source]).rowcount
            for table in TABLES
        )
    )
    if moved.event_count:
        _begin_anew(connection, target)
    connection.execute("DELETE FROM jaxrec.states WHERE user_id = %s", [source])
    connection.execute("DELETE FROM jaxrec.users WHERE user_id = %s", [source])
    # The lock of a target without events.
    connection.execute("DELETE FROM jaxrec.users WHERE user_id = %s AND last_arrival = 0", [target])
    _note_deletion(connection, source)
    return moved


def prune_slates(connection: psycopg.Connection, before: int, most: int) -> bool:
    """See `EventStore.prune_slates`; two servers prune different rows."""
    slates = connection.execute(
        "DELETE FROM jaxrec.shown WHERE number IN (SELECT number FROM jaxrec.shown WHERE timestamp < %s"
        " LIMIT %s FOR UPDATE SKIP LOCKED) RETURNING recommendation_id",
        [before, most],
    ).fetchall()
    connection.execute(
        "DELETE FROM jaxrec.shown_items WHERE recommendation_id = ANY(%s)", [[name for (name,) in slates]]
    )
    if len(slates) >= most:
        return True
    # The others are of recommendations that are not logged, unless a clock is behind.
    items = connection.execute(
        "DELETE FROM jaxrec.shown_items WHERE (recommendation_id, item_id) IN (SELECT recommendation_id, item_id"
        " FROM jaxrec.shown_items AS items WHERE recorded < %s AND NOT EXISTS (SELECT 1 FROM jaxrec.shown"
        " WHERE shown.recommendation_id = items.recommendation_id) LIMIT %s FOR UPDATE SKIP LOCKED)",
        [before, most],
    ).rowcount
    return items >= most


def lock_users(connection: psycopg.Connection, user_ids: Sequence[str]) -> None:
    """Locks users' rows, in one order everywhere: two servers don't wait for each other in a circle. A user without
    events gets a row with zeros, which the caller must fill or remove."""
    connection.execute(
        "INSERT INTO jaxrec.users SELECT user_id, 0, 0 FROM unnest(%s::text[]) AS new (user_id)"
        " ON CONFLICT (user_id) DO UPDATE SET user_id = excluded.user_id",
        [sorted(set(user_ids))],
    )


def _lock_deletions(connection: psycopg.Connection) -> None:
    connection.execute("SELECT pg_advisory_xact_lock(%s)", [DELETION_LOCK])


def _begin_anew(connection: psycopg.Connection, user_id: str) -> None:
    """Gives the history of a user, whose row is locked, a revision above all that were before, as of which it is read
    as a whole."""
    connection.execute("DELETE FROM jaxrec.states WHERE user_id = %s", [user_id])
    connection.execute(
        "UPDATE jaxrec.users SET first_arrival = arrival, last_arrival = arrival"
        " FROM nextval(pg_get_serial_sequence('jaxrec.events', 'arrival')) AS arrival WHERE user_id = %s",
        [user_id],
    )
    connection.execute(
        "DELETE FROM jaxrec.users WHERE user_id = %s AND NOT EXISTS"
        " (SELECT 1 FROM jaxrec.events WHERE events.user_id = users.user_id)",
        [user_id],
    )


def _note_deletion(connection: psycopg.Connection, user_id: str) -> None:
    connection.execute(
        "INSERT INTO jaxrec.deletions"
        " SELECT %s, clock_timestamp(), coalesce(max(number), 0) + 1 FROM jaxrec.deletions"
        " ON CONFLICT (digest) DO UPDATE SET time = excluded.time, number = excluded.number",
        [digest(user_id)],
    )
    # Never the last one, so that numbers grow.
    connection.execute(
        "DELETE FROM jaxrec.deletions WHERE number <= (SELECT max(number) FROM jaxrec.deletions) - %s",
        [MOST_DELETIONS],
    )
