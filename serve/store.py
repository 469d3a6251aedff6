"""Keeps the events of all users in one SQLite file.

Writes are on disk before they are acknowledged (WAL with synchronous=FULL), an event id is stored once, and a
history comes back in the order of (timestamp, arrival).
"""

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from serve.history import Event

# "jxrc": marks the file, so that another program's database is not taken for a store.
APPLICATION_ID = 0x6A787263
SCHEMA_VERSION = 1
SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS events (
    arrival INTEGER PRIMARY KEY AUTOINCREMENT,
    event_id TEXT NOT NULL UNIQUE,
    user_id TEXT NOT NULL,
    item_id TEXT NOT NULL,
    rating REAL,
    timestamp INTEGER NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS history ON events (user_id, timestamp, arrival, item_id, rating);
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
COMMIT;
"""
LOCK_TIMEOUT_S = 5.0


class StoreError(Exception):
    """The store cannot be opened, read or written; nothing of the failed call was kept."""


class UserEvent(NamedTuple):
    """An event with its user and the client's own id for it."""

    event_id: str
    user_id: str
    event: Event


class EventStore:
    """An open store, to be shared between threads. Close it, or use it in a `with` statement."""

    def __init__(self, path: Path) -> None:
        """Opens the file, or creates it; raises StoreError."""
        self._path = path
        self._readers = threading.local()
        self._connections: list[sqlite3.Connection] = []
        self._connections_lock = threading.Lock()
        self._write_lock = threading.Lock()
        try:
            self._writer = self._connect()
            with self._failures("cannot be opened"):
                self._prepare(self._writer)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "EventStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file. No call may be under way or follow."""
        with self._connections_lock:
            while self._connections:
                self._connections.pop().close()

    def record(self, events: Sequence[UserEvent]) -> list[UserEvent]:
        """Stores the events whose id is new, all or none; returns those, once they are on disk."""
        recorded = []
        with self._failures("cannot be written"), self._write_lock, self._transaction():
            for new in events:
                cursor = self._writer.execute(
                    "INSERT INTO events (event_id, user_id, item_id, rating, timestamp)"
                    " VALUES (?, ?, ?, ?, ?) ON CONFLICT (event_id) DO NOTHING",
                    (new.event_id, new.user_id, *new.event),
                )
                if cursor.rowcount:
                    recorded.append(new)
        return recorded

    def history(self, user_id: str, until: int | None = None) -> list[Event]:
        """A user's events by (timestamp, arrival); with `until`, only those up to that second.

        Empty for a user without events.
        """
        query = "SELECT item_id, rating, timestamp FROM events WHERE user_id = ?"
        parameters: tuple[str | int, ...] = (user_id,)
        if until is not None:
            query += " AND timestamp <= ?"
            parameters += (until,)
        with self._failures("cannot be read"):
            rows = self._reader().execute(f"{query} ORDER BY timestamp, arrival", parameters).fetchall()
        return [Event(*row) for row in rows]

    def _reader(self) -> sqlite3.Connection:
        """This thread's own connection: on a shared one, overlapping reads could keep an old snapshot."""
        connection: sqlite3.Connection | None = getattr(self._readers, "connection", None)
        if connection is None:
            connection = self._readers.connection = self._connect()
        return connection

    def _connect(self) -> sqlite3.Connection:
        with self._failures("cannot be opened"):
            connection = sqlite3.connect(
                self._path, timeout=LOCK_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
            with self._connections_lock:
                self._connections.append(connection)
            connection.execute("PRAGMA synchronous = FULL")
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        (application_id,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        if (application_id, version) == (APPLICATION_ID, SCHEMA_VERSION):
            return
        if tables or application_id or version:
            raise StoreError(
                f"{self._path}: is a database of application {application_id} in version {version}, expected"
                f" an event store ({APPLICATION_ID}) in version {SCHEMA_VERSION}"
            )
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(SCHEMA)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._writer.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._writer.execute("COMMIT")
        except BaseException:
            if self._writer.in_transaction:
                self._writer.execute("ROLLBACK")
            raise

    @contextmanager
    def _failures(self, what: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StoreError(f"{self._path}: {what}: {error}") from error
