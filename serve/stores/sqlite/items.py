"""The catalogue of a SQLite store: what its writer does with items in its transaction, and how they are read."""

import sqlite3
from collections.abc import Sequence
from typing import LiteralString

from serve.model.live_catalog import Item
from serve.stores.base import MOST_ITEM_MARKS
from serve.stores.rows import item_text, new_mark

# `revision` is never given twice (AUTOINCREMENT). A deleted item stays as a row without a text, for those who read what
# changed, as long as the mark of an earlier change is kept.
SCHEMA = """
CREATE TABLE IF NOT EXISTS items (
    revision INTEGER PRIMARY KEY AUTOINCREMENT,
    item_id TEXT NOT NULL UNIQUE,
    item TEXT
) STRICT;
CREATE INDEX IF NOT EXISTS deleted_items ON items (revision) WHERE item IS NULL;
CREATE TABLE IF NOT EXISTS item_marks (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    mark TEXT NOT NULL UNIQUE,
    revision INTEGER NOT NULL
) STRICT;
"""
# Bytes: a text that is not UTF-8 would fail the whole query.
_TEXT: LiteralString = "CAST(item AS BLOB)"
CHANGED: LiteralString = f"SELECT revision, item_id, {_TEXT} FROM items WHERE revision > ? ORDER BY revision LIMIT ?"
MARKS: LiteralString = (
    "SELECT (SELECT count(*) FROM item_marks WHERE mark IN (?, ?)),"
    " coalesce((SELECT mark FROM item_marks ORDER BY number DESC LIMIT 1), '')"
)
ITEM: LiteralString = f"SELECT {_TEXT} FROM items WHERE item_id = ? AND item IS NOT NULL"
LISTED: LiteralString = (
    f"SELECT item_id, {_TEXT} FROM items WHERE item_id > ? AND item IS NOT NULL ORDER BY item_id LIMIT ?"
)
INSERT_ITEM = "INSERT OR REPLACE INTO items (item_id, item) VALUES (?, ?)"


def upsert_items(connection: sqlite3.Connection, items: Sequence[Item]) -> int:
    """See `EventStore.upsert_items`."""
    there = sum(_has(connection, one.item_id) for one in items)
    connection.executemany(INSERT_ITEM, [(one.item_id, item_text(one)) for one in items])
    _mark(connection)
    return len(items) - there


def delete_items(connection: sqlite3.Connection, item_ids: Sequence[str]) -> int:
    """See `EventStore.delete_items`."""
    there = [(item_id, None) for item_id in item_ids if _has(connection, item_id)]
    if there:
        connection.executemany(INSERT_ITEM, there)
        _mark(connection)
    return len(there)


def _mark(connection: sqlite3.Connection) -> None:
    """Leaves the mark of a change, and forgets old marks, and what was deleted before the first of the others."""
    connection.execute("INSERT INTO item_marks (mark, revision) SELECT ?, max(revision) FROM items", [new_mark()])
    connection.execute(
        "DELETE FROM item_marks WHERE number <= (SELECT max(number) FROM item_marks) - ?", [MOST_ITEM_MARKS]
    )
    connection.execute(
        "DELETE FROM items INDEXED BY deleted_items WHERE item IS NULL"
        " AND revision <= (SELECT revision FROM item_marks ORDER BY number LIMIT 1)"
    )


def _has(connection: sqlite3.Connection, item_id: str) -> bool:
    return connection.execute(ITEM, [item_id]).fetchone() is not None
