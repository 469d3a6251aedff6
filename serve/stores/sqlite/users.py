"""What a SQLite store's writer does with all that is stored of a user, each within its transaction."""

import sqlite3
import time
from collections.abc import Sequence

from serve.stores.base import MOST_DELETIONS, MOST_MERGED, Deleted, TooManyToMerge, digest
from serve.stores.sqlite.counters import LAST_ARRIVAL

# An older SQLite takes no more than 999 parameters.
NAMED_AT_ONCE = 900


def delete_user(connection: sqlite3.Connection, user_id: str) -> Deleted:
    """See `EventStore.delete_user`."""
    connection.execute(
        "DELETE FROM shown_items WHERE recommendation_id IN (SELECT recommendation_id FROM shown WHERE user_id = ?)",
        (user_id,),
    )
    counts = {
        table: connection.execute(f"DELETE FROM {table} WHERE user_id = ?", (user_id,)).rowcount
        for table in ("events", "shown", "users", "states")
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
    query = " + ".join(f"(SELECT count(*) FROM {table} WHERE user_id = ?1)" for table in tables)
    ((count,),) = connection.execute(f"SELECT {query}", [source]).fetchall()
    if count > MOST_MERGED:
        raise TooManyToMerge(count, MOST_MERGED)
    moved = Deleted(
        *(
            connection.execute(f"UPDATE {table} SET user_id = ? WHERE user_id = ?", [target, source]).rowcount
            for table in tables
        )
    )
    for user_id in (source, target):
        if moved.event_count:
            _begin_anew(connection, user_id)
    _note_deletion(connection, source)
    return moved


def prune_slates(connection: sqlite3.Connection, before: int, most: int) -> bool:
    """See `EventStore.prune_slates`."""
    old = "SELECT number, recommendation_id FROM shown WHERE timestamp < ? LIMIT ?"
    slates = connection.execute(old, [before, most]).fetchall()
    connection.executemany("DELETE FROM shown_items WHERE recommendation_id = ?", [(name,) for _, name in slates])
    connection.executemany("DELETE FROM shown WHERE number = ?", [(number,) for number, _ in slates])
    if len(slates) >= most:
        return True
    # The others are of recommendations that are not logged, unless a clock is behind.
    old = (
        "SELECT recommendation_id, item_id FROM shown_items WHERE recorded < ? AND NOT EXISTS"
        " (SELECT 1 FROM shown WHERE shown.recommendation_id = shown_items.recommendation_id) LIMIT ?"
    )
    query = f"DELETE FROM shown_items WHERE (recommendation_id, item_id) IN ({old})"
    return connection.execute(query, [before, most]).rowcount >= most


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
    connection.execute(
        "INSERT OR REPLACE INTO deletions SELECT ?, ?, coalesce(max(number), 0) + 1 FROM deletions",
        (digest(user_id), time.time()),
    )
    # Never the last one, so that numbers grow.
    connection.execute(
        "DELETE FROM deletions WHERE number <= (SELECT max(number) FROM deletions) - ?", [MOST_DELETIONS]
    )
