"""What a SQLite store's writer does with all that is stored of a user, each within its transaction."""

import sqlite3
import time
from collections.abc import Sequence

from serve.stores.base import DELETION_S, MOST_MERGED, Deleted, TooManyToMerge, digest
from serve.stores.sqlite.counters import LAST_ARRIVAL

# An older SQLite takes no more than 999 parameters.
NAMED_AT_ONCE = 900


def delete_user(connection: sqlite3.Connection, user_id: str) -> Deleted:
    """See `EventStore.delete_user`."""
    counts = {
        table: connection.execute(f"DELETE FROM {table} WHERE user_id = ?", (user_id,)).rowcount
        for table in ("events", "shown", "shown_items", "users", "states")
    }
    _note_deletion(connection, user_id)
    return Deleted(counts["events"], counts["shown"])


def delete_events(connection: sqlite3.Connection, user_id: str, event_ids: Sequence[str]) -> int:
    """See `EventStore.delete_events`."""
    deleted = 0
    for start in range(0, len(event_ids), NAMED_AT_ONCE):
        part = event_ids[start : start + NAMED_AT_ONCE]
        query = f"DELETE FROM events WHERE user_id = ? AND event_id IN ({', '.join('?' * len(part))})"
        deleted += connection.execute(query, [user_id, *part]).rowcount
    if deleted:
        _begin_anew(connection, user_id)
    return deleted


def merge_users(connection: sqlite3.Connection, source: str, target: str) -> Deleted:
    """See `EventStore.merge_users`."""
    tables = ("events", "shown")
    count = 0
    for table in tables:
        query = f"SELECT count(*) FROM (SELECT 1 FROM {table} WHERE user_id = ? LIMIT ?)"
        ((found,),) = connection.execute(query, [source, MOST_MERGED + 1]).fetchall()
        count += found
    if count > MOST_MERGED:
        raise TooManyToMerge(source)
    moved = Deleted(
        *(
            connection.execute(f"UPDATE {table} SET user_id = ? WHERE user_id = ?", [target, source]).rowcount
            for table in tables
        )
    )
    connection.execute("UPDATE shown_items SET user_id = ? WHERE user_id = ?", [target, source])
    for user_id in (source, target):
        if moved.event_count:
            _begin_anew(connection, user_id)
    _note_deletion(connection, source)
    return moved


def prune_slates(connection: sqlite3.Connection, before: int, most: int) -> bool:
    """See `EventStore.prune_slates`."""
    # Impressions are logged in about the order of their times.
    oldest = "SELECT number, timestamp FROM shown ORDER BY number LIMIT ?"
    query = f"DELETE FROM shown WHERE number IN (SELECT number FROM ({oldest}) WHERE timestamp < ?)"
    slates = connection.execute(query, [most, before]).rowcount
    old = "SELECT recommendation_id, item_id FROM shown_items WHERE timestamp < ? LIMIT ?"
    query = f"DELETE FROM shown_items WHERE (recommendation_id, item_id) IN ({old})"
    items = connection.execute(query, [before, most]).rowcount
    return max(slates, items) >= most


def _begin_anew(connection: sqlite3.Connection, user_id: str) -> None:
    """Gives the history of a user a revision above all that were before, as of which it is read as a whole."""
    connection.execute("DELETE FROM states WHERE user_id = ?", [user_id])
    connection.execute("DELETE FROM users WHERE user_id = ?", [user_id])
    connection.execute("UPDATE sqlite_sequence SET seq = seq + 1 WHERE name = 'events'")
    ((arrival,),) = connection.execute(LAST_ARRIVAL).fetchall()
    connection.execute(
        "INSERT INTO users SELECT ?1, ?2, ?2 WHERE EXISTS (SELECT 1 FROM events WHERE user_id = ?1)",
        [user_id, arrival],
    )


def _note_deletion(connection: sqlite3.Connection, user_id: str) -> None:
    now = time.time()
    connection.execute("DELETE FROM deletions WHERE time < ?", (now - DELETION_S,))
    connection.execute("INSERT OR REPLACE INTO deletions VALUES (?, ?)", (digest(user_id), now))
