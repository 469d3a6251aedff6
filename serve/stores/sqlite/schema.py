"""The tables of a SQLite store, its questions, and how the file of an earlier version is brought up to date."""

import sqlite3
from collections.abc import Mapping

from serve.stores.base import Slate
from serve.stores.rows import EVENT_COLUMNS, SHOWN_ITEM_COLUMNS, SLATE_COLUMNS
from serve.stores.sql import Queries
from serve.stores.sqlite import counters, items

# "jxrc": marks the file, so that another program's database is not used as a store.
APPLICATION_ID = 0x6A787263
SCHEMA_VERSION = 10
# `arrival` is never given twice (AUTOINCREMENT), so a user's latest is a revision that never comes back.
SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
    arrival INTEGER PRIMARY KEY AUTOINCREMENT,
    event_id TEXT NOT NULL UNIQUE,
    user_id TEXT NOT NULL,
    item_id TEXT NOT NULL,
    rating REAL,
    timestamp INTEGER NOT NULL,
    recommendation_id TEXT,
    type TEXT NOT NULL DEFAULT 'interaction',
    value REAL,
    weight REAL NOT NULL DEFAULT 1
) STRICT;
CREATE INDEX history ON events (user_id, timestamp, arrival, item_id, rating, weight) WHERE weight <> 0;
CREATE INDEX neutral ON events (user_id, timestamp, arrival) WHERE weight = 0;
CREATE TABLE IF NOT EXISTS users (
    user_id TEXT PRIMARY KEY,
    first_arrival INTEGER NOT NULL,
    last_arrival INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS shown (
    number INTEGER PRIMARY KEY,
    recommendation_id TEXT NOT NULL,
    user_id TEXT,
    item_ids TEXT NOT NULL,
    log_propensities TEXT NOT NULL,
    policy TEXT NOT NULL,
    model_version TEXT NOT NULL,
    timestamp INTEGER NOT NULL,
    temperature REAL,
    request_time INTEGER,
    excluded_item_ids TEXT NOT NULL DEFAULT '[]',
    trend_time INTEGER,
    trend_arrival INTEGER,
    request_options TEXT NOT NULL DEFAULT '[]'
) STRICT;
CREATE INDEX shown_to ON shown (user_id, timestamp);
CREATE INDEX IF NOT EXISTS shown_at ON shown (timestamp);
DELETE FROM shown WHERE number NOT IN (SELECT min(number) FROM shown GROUP BY recommendation_id);
CREATE UNIQUE INDEX IF NOT EXISTS shown_once ON shown (recommendation_id);
CREATE TABLE IF NOT EXISTS shown_items (
    recommendation_id TEXT NOT NULL,
    item_id TEXT NOT NULL,
    position INTEGER NOT NULL,
    timestamp INTEGER NOT NULL,
    recorded INTEGER NOT NULL,
    PRIMARY KEY (recommendation_id, item_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS shown_items_at ON shown_items (recorded);
CREATE TABLE IF NOT EXISTS deletions (
    user TEXT PRIMARY KEY,
    time REAL NOT NULL,
    number INTEGER NOT NULL DEFAULT 0
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS deletion_numbers ON deletions (number);
CREATE TABLE IF NOT EXISTS states (
    user_id TEXT NOT NULL,
    model_version TEXT NOT NULL,
    revision INTEGER NOT NULL,
    state BLOB NOT NULL,
    PRIMARY KEY (user_id, model_version)
) STRICT, WITHOUT ROWID;
"""
# Columns that earlier versions did not have, by table.
ADDED: Mapping[str, Mapping[str, str]] = {
    "events": {
        "recommendation_id": "TEXT",
        "type": "TEXT NOT NULL DEFAULT 'interaction'",
        "value": "REAL",
        "weight": "REAL NOT NULL DEFAULT 1",
    },
    "shown": {
        "temperature": "REAL",
        "request_time": "INTEGER",
        "excluded_item_ids": "TEXT NOT NULL DEFAULT '[]'",
        "trend_time": "INTEGER",
        "trend_arrival": "INTEGER",
        "request_options": "TEXT NOT NULL DEFAULT '[]'",
    },
    "deletions": {"number": "INTEGER NOT NULL DEFAULT 0"},
}
# Indexes that had other columns then.
CHANGED_INDEXES = ("history", "neutral", "shown_to")
# No schema version of its own: servers that do not know it can use the store. It holds `arrival` too, as all indexes
# hold the row's key.
ARRIVALS = "CREATE INDEX IF NOT EXISTS arrivals ON events (user_id)"
FILL_USERS = "INSERT OR IGNORE INTO users SELECT user_id, min(arrival), max(arrival) FROM events GROUP BY user_id"
# In a copy of a log that no store was opened on, see `serve.stores.copy`: it may be replaced by a newer one.
COPY_MARK = "untouched_copy"

_LISTED = (
    f"SELECT arrival, {EVENT_COLUMNS} FROM events INDEXED BY {{}} WHERE user_id = ? AND weight {{}} 0"
    " AND (timestamp, arrival) < (?, ?) ORDER BY timestamp DESC, arrival DESC LIMIT ?"
)
QUERIES = Queries(
    life="SELECT first_arrival, last_arrival FROM users WHERE user_id = ?",
    # Each reads the rows of its answer; without a hint, the first would read all of `history`.
    changes=(
        "SELECT item_id, rating, timestamp, weight FROM events INDEXED BY arrivals"
        " WHERE user_id = ? AND arrival > ? AND arrival <= ? AND weight <> 0 ORDER BY arrival LIMIT ?"
    ),
    newest=(
        "SELECT item_id, rating, timestamp, weight FROM events INDEXED BY history"
        " WHERE user_id = ? AND arrival <= ? AND timestamp <= ? AND weight <> 0"
        " ORDER BY timestamp DESC, arrival DESC LIMIT ?"
    ),
    listed=(_LISTED.format("history", "<>"), _LISTED.format("neutral", "=")),
    recent_slates=(
        "SELECT recommendation_id, item_ids FROM shown WHERE user_id = ? AND timestamp >= ?"
        " ORDER BY timestamp DESC, number DESC LIMIT ? OFFSET ?"
    ),
    # In one parameter: an older SQLite takes no more than 999.
    recorded="SELECT event_id FROM events WHERE event_id IN (SELECT value FROM json_each(?))",
    state="SELECT * FROM states WHERE user_id = ? AND model_version = ?",
    state_keys=(
        "SELECT user_id, model_version FROM states WHERE (user_id, model_version) > (?, ?)"
        " ORDER BY user_id, model_version LIMIT ?"
    ),
    events=(f"SELECT arrival, {EVENT_COLUMNS} FROM events WHERE arrival > ? ORDER BY arrival LIMIT ?"),
    slates=f"SELECT number, {SLATE_COLUMNS} FROM shown WHERE number > ? ORDER BY number LIMIT ?",
    # By the index of times. The least number alone would be looked for from the oldest row on.
    first_slate=(
        "SELECT count(*), min(number) FROM (SELECT number FROM shown WHERE timestamp >= ? ORDER BY timestamp LIMIT ?)"
    ),
    shown_items=(
        f"SELECT {SHOWN_ITEM_COLUMNS} FROM shown_items WHERE (recommendation_id, item_id) > (?, ?)"
        " ORDER BY recommendation_id, item_id LIMIT ?"
    ),
    last_deletion="SELECT coalesce(max(number), 0) FROM deletions",
    times=counters.TIMES,
    counted_until=counters.COUNTED_UNTIL,
    changed_items=items.CHANGED,
    item_marks=items.MARKS,
    item=items.ITEM,
    listed_items=items.LISTED,
)
EVENT_VALUES = ", ".join("?" * len(EVENT_COLUMNS.split()))
INSERT_EVENT = f"INSERT INTO events ({EVENT_COLUMNS}) VALUES ({EVENT_VALUES}) ON CONFLICT (event_id) DO NOTHING"
INSERT_SLATE = f"INSERT INTO shown ({SLATE_COLUMNS}) VALUES"
INSERT_SHOWN_ITEM = f"INSERT INTO shown_items ({SHOWN_ITEM_COLUMNS}) VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING"
SLATE_VALUES = f"({', '.join('?' * len(Slate._fields))})"


def has(connection: sqlite3.Connection, name: str) -> bool:
    """Whether there is a table or index of this name."""
    return connection.execute("SELECT count(*) FROM sqlite_schema WHERE name = ?", [name]).fetchone() == (1,)


def bring_up_to_date(connection: sqlite3.Connection) -> None:
    """Makes the file of any earlier version, or an empty one, a store of this version, within a transaction."""
    for table, columns in ADDED.items():
        there = {name for _, name, *_ in connection.execute(f"PRAGMA table_info({table})")}
        for name, kind in columns.items():
            if there and name not in there:
                connection.execute(f"ALTER TABLE {table} ADD COLUMN {name} {kind}")
    for index in CHANGED_INDEXES:
        connection.execute(f"DROP INDEX IF EXISTS {index}")
    for step in (SCHEMA + counters.SCHEMA + items.SCHEMA).split(";"):
        connection.execute(step)
    connection.execute(FILL_USERS)
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
