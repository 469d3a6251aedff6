"""The catalogue of a SQLite store: what its writer does with items in its transaction, and how they are read."""

import sqlite3
from collections.abc import Sequence
from typing import LiteralString

from serve.model.live_catalog import Item
from serve.stores.rows import item_text

# `revision` is never given twice (AUTOINCREMENT). A deleted item stays as a row without a text, for those who read what
# changed; so the latest revision is that of the last change.
SCHEMA = """
CREATE TABLE IF NOT EXISTS items (
    revision INTEGER PRIMARY KEY AUTOINCREMENT,
    item_id TEXT NOT NULL UNIQUE,
    item TEXT
) STRICT;
"""
CHANGED: LiteralString = "SELECT revision, item_id, item FROM items WHERE revision > ? ORDER BY revision LIMIT ?"
LAST_REVISION: LiteralString = "SELECT coalesce(max(revision), 0) FROM items"
ITEM: LiteralString = "SELECT item FROM items WHERE item_id = ? AND item IS NOT NULL"
LISTED: LiteralString = (
    "SELECT item_id, item FROM items WHERE item_id > ? AND item IS NOT NULL ORDER BY item_id LIMIT ?"
)
INSERT_ITEM = "INSERT OR REPLACE INTO items (item_id, item) VALUES (?, ?)"


def upsert_items(connection: sqlite3.Connection, items: Sequence[Item]) -> int:
    """See `EventStore.upsert_items`."""
    there = sum(_has(connection, one.item_id) for one in items)
    connection.executemany(INSERT_ITEM, [(one.item_id, item_text(one)) for one in items])
    return len(items) - there


def delete_items(connection: sqlite3.Connection, item_ids: Sequence[str]) -> int:
    """See `EventStore.delete_items`."""
    there = [(item_id, None) for item_id in item_ids if _has(connection, item_id)]
    connection.executemany(INSERT_ITEM, there)
    return len(there)


def _has(connection: sqlite3.Connection, item_id: str) -> bool:
    return connection.execute(ITEM, [item_id]).fetchone() is not None
