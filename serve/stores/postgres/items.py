"""The catalogue of a PostgreSQL store: statements for the transactions that change items, and how they are read."""

from collections.abc import Sequence
from typing import LiteralString

import psycopg

from serve.model.live_catalog import Item
from serve.stores.base import MOST_ITEM_MARKS
from serve.stores.rows import item_text, new_mark

# A deleted item stays as a row without a text, for those who read what changed, as long as an earlier change's mark
# is kept. Ids are in the order of their bytes.
ITEMS_SCHEMA: tuple[LiteralString, ...] = (
    """CREATE TABLE IF NOT EXISTS jaxrec.items (
        revision bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        item_id text COLLATE "C" NOT NULL UNIQUE,
        item text
    )""",
    "CREATE INDEX IF NOT EXISTS deleted_items ON jaxrec.items (revision) WHERE item IS NULL",
    """CREATE TABLE IF NOT EXISTS jaxrec.item_marks (
        number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        mark text NOT NULL UNIQUE,
        revision bigint NOT NULL
    )""",
)
CHANGED: LiteralString = (
    "SELECT revision, item_id, item FROM jaxrec.items WHERE revision > %s ORDER BY revision LIMIT %s"
)
MARKS: LiteralString = (
    "SELECT (SELECT count(*) FROM jaxrec.item_marks WHERE mark IN (%s, %s)),"
    " coalesce((SELECT mark FROM jaxrec.item_marks ORDER BY number DESC LIMIT 1), '')"
)
ITEM: LiteralString = "SELECT item FROM jaxrec.items WHERE item_id = %s AND item IS NOT NULL"
LISTED: LiteralString = (
    "SELECT item_id, item FROM jaxrec.items WHERE item_id > %s AND item IS NOT NULL ORDER BY item_id LIMIT %s"
)
# Writers take turns, so revisions become visible in their order. Readers do not wait. One more than DELETION_LOCK.
LOCK: LiteralString = "SELECT pg_advisory_xact_lock(1786278501)"


def upsert_items(connection: psycopg.Connection, items: Sequence[Item]) -> int:
    """See `EventStore.upsert_items`; in a transaction."""
    connection.execute(LOCK)
    item_ids = [one.item_id for one in items]
    there = len(_stored(connection, item_ids))
    _replace(connection, item_ids, [item_text(one) for one in items])
    return len(items) - there


def delete_items(connection: psycopg.Connection, item_ids: Sequence[str]) -> int:
    """See `EventStore.delete_items`; in a transaction."""
    connection.execute(LOCK)
    there = _stored(connection, item_ids)
    if there:
        _replace(connection, there, [None] * len(there))
    return len(there)


def _stored(connection: psycopg.Connection, item_ids: Sequence[str]) -> list[str]:
    query: LiteralString = "SELECT item_id FROM jaxrec.items WHERE item_id = ANY(%s) AND item IS NOT NULL"
    return [item_id for (item_id,) in connection.execute(query, [list(item_ids)]).fetchall()]


def _replace(connection: psycopg.Connection, item_ids: Sequence[str], texts: Sequence[str | None]) -> None:
    connection.execute("DELETE FROM jaxrec.items WHERE item_id = ANY(%s)", [list(item_ids)])
    connection.execute(
        "INSERT INTO jaxrec.items (item_id, item) SELECT * FROM unnest(%s::text[], %s::text[])",
        [list(item_ids), list(texts)],
    )
    # The mark of the change. Old marks are forgotten, and what was deleted before the first of the others.
    connection.execute(
        "INSERT INTO jaxrec.item_marks (mark, revision) SELECT %s, max(revision) FROM jaxrec.items", [new_mark()]
    )
    connection.execute(
        "DELETE FROM jaxrec.item_marks WHERE number <= (SELECT max(number) FROM jaxrec.item_marks) - %s",
        [MOST_ITEM_MARKS],
    )
    connection.execute(
        "DELETE FROM jaxrec.items WHERE item IS NULL"
        " AND revision <= (SELECT revision FROM jaxrec.item_marks ORDER BY number LIMIT 1)"
    )
