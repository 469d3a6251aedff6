"""Events, impressions and spilled states in one SQLite file, for one server.

One thread writes; calls that wait for it share a transaction and its fsync (group commit), each with a savepoint of
its own, so that a call that fails takes no other with it. WAL with synchronous=FULL: what was acknowledged survives
the end of the process and, as far as fsync keeps its word, of the power. Reads don't wait for writes.
"""

import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, LiteralString, NamedTuple, TypeVar

from serve.stores import sqlite_counters
from serve.stores.base import DELETION_S, Deleted, Impression, SpilledState, StoreError, UserEvent, digest
from serve.stores.counters import NONE_READ, Counter, Damaged, ItemCounts
from serve.stores.deferred import DeferredWrites
from serve.stores.rows import (
    EVENT_COLUMNS,
    IMPRESSION_COLUMNS,
    Started,
    digests,
    event_row,
    impression_row,
    still_wanted,
)
from serve.stores.sql import Queries, SqlStore

# "jxrc": marks the file, so that another program's database is not used as a store.
APPLICATION_ID = 0x6A787263
SCHEMA_VERSION = 6
# `arrival` is never given twice (AUTOINCREMENT), so a user's latest is a revision that never comes back.
SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
    arrival INTEGER PRIMARY KEY AUTOINCREMENT,
    event_id TEXT NOT NULL UNIQUE,
    user_id TEXT NOT NULL,
    item_id TEXT NOT NULL,
    rating REAL,
    timestamp INTEGER NOT NULL,
    recommendation_id TEXT
) STRICT;
CREATE INDEX IF NOT EXISTS history ON events (user_id, timestamp, arrival, item_id, rating);
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
CREATE INDEX IF NOT EXISTS shown_to ON shown (user_id);
DELETE FROM shown WHERE number NOT IN (SELECT min(number) FROM shown GROUP BY recommendation_id);
CREATE UNIQUE INDEX IF NOT EXISTS shown_once ON shown (recommendation_id);
CREATE TABLE IF NOT EXISTS deletions (
    user TEXT PRIMARY KEY,
    time REAL NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS states (
    user_id TEXT NOT NULL,
    model_version TEXT NOT NULL,
    revision INTEGER NOT NULL,
    state BLOB NOT NULL,
    PRIMARY KEY (user_id, model_version)
) STRICT, WITHOUT ROWID;
"""
# No schema version of its own: servers that do not know it can use the store. It holds `arrival` too, as all indexes
# hold the row's key.
ARRIVALS = "CREATE INDEX IF NOT EXISTS arrivals ON events (user_id)"
FROM_VERSION_1 = """
ALTER TABLE events ADD COLUMN recommendation_id TEXT;
"""
FROM_VERSION_2 = """
ALTER TABLE shown ADD COLUMN temperature REAL;
ALTER TABLE shown ADD COLUMN request_time INTEGER;
ALTER TABLE shown ADD COLUMN excluded_item_ids TEXT NOT NULL DEFAULT '[]';
"""
FROM_VERSION_5 = "ALTER TABLE shown ADD COLUMN request_options TEXT NOT NULL DEFAULT '[]';"
FROM_VERSION_4 = f"""
ALTER TABLE shown ADD COLUMN trend_time INTEGER;
ALTER TABLE shown ADD COLUMN trend_arrival INTEGER;
{FROM_VERSION_5}"""
# By the version of an older store, what comes before SCHEMA: version 1 has no `shown`, that of 2 and 3 is the same.
FROM_VERSION_3 = FROM_VERSION_2 + FROM_VERSION_4
UPDATES = {1: FROM_VERSION_1, 2: FROM_VERSION_3, 3: FROM_VERSION_3, 4: FROM_VERSION_4, 5: FROM_VERSION_5}
FILL_USERS = "INSERT OR IGNORE INTO users SELECT user_id, min(arrival), max(arrival) FROM events GROUP BY user_id"
# In a copy of a log that no store was opened on, see `serve.stores.copy`: it may be replaced by a newer one.
COPY_MARK = "untouched_copy"
LOCK_TIMEOUT_S = 5.0
LARGEST_GROUP = 256
INSERTED_AT_ONCE = 100

QUERIES = Queries(
    life="SELECT first_arrival, last_arrival FROM users WHERE user_id = ?",
    # These walk as many of a user's events as they find: without a hint, the first would walk all of `history`.
    changes=(
        "SELECT item_id, rating, timestamp FROM events INDEXED BY arrivals"
        " WHERE user_id = ? AND arrival > ? AND arrival <= ? ORDER BY arrival LIMIT ?"
    ),
    newest=(
        "SELECT item_id, rating, timestamp FROM events INDEXED BY history"
        " WHERE user_id = ? AND arrival <= ? AND timestamp <= ? ORDER BY timestamp DESC, arrival DESC LIMIT ?"
    ),
    state="SELECT * FROM states WHERE user_id = ? AND model_version = ?",
    events=(f"SELECT arrival, {EVENT_COLUMNS} FROM events WHERE arrival > ? ORDER BY arrival LIMIT ?"),
    impressions=f"SELECT number, {IMPRESSION_COLUMNS} FROM shown WHERE number > ? ORDER BY number LIMIT ?",
    times=sqlite_counters.TIMES,
    counted_until=sqlite_counters.COUNTED_UNTIL,
)
INSERT_IMPRESSION = f"INSERT INTO shown ({IMPRESSION_COLUMNS}) VALUES"
IMPRESSION_VALUES = f"({', '.join('?' * len(Impression._fields))})"

T = TypeVar("T")


class _Write(NamedTuple):
    """What to do within the writer's transaction, and the future of its result."""

    work: Callable[[sqlite3.Connection], Any]
    done: Future[Any]
    records: bool = False
    """Whether the result is the events that were recorded."""


class SQLiteStore(SqlStore):
    """The store of one server process; a second process may read and write the same file."""

    _queries = QUERIES

    def __init__(self, path: Path) -> None:
        """Opens the file, or creates it; raises StoreError."""
        self._path = path
        self._damaged = Damaged(str(path))
        self._readers = threading.local()
        self._connections: list[sqlite3.Connection] = []
        self._connections_lock = threading.Lock()
        self._writes: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        try:
            self._writer = self._connect()
            with self._failures("cannot be opened"):
                self._prepare(self._writer)
        except BaseException:
            self._close_connections()
            raise
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
        self._thread.start()
        self._deferred = DeferredWrites(self._write_deferred)

    def close(self) -> None:
        self._deferred.close()
        self._writes.put(None)
        self._thread.join()
        self._close_connections()

    def record(self, events: Sequence[UserEvent]) -> list[UserEvent]:
        if not events:
            return []
        return self._write(lambda connection: _insert_events(connection, events), records=True)

    def drop_states(self, keep_versions: Collection[str], most: int) -> int:
        kept = ", ".join("?" * len(keep_versions))
        query = (
            "DELETE FROM states WHERE (user_id, model_version) IN"
            f" (SELECT user_id, model_version FROM states WHERE model_version NOT IN ({kept}) LIMIT ?)"
        )
        return self._write(lambda connection: connection.execute(query, (*keep_versions, most)).rowcount)

    def delete_user(self, user_id: str) -> Deleted:
        self._deferred.discard(user_id)
        return self._write(lambda connection: _delete_user(connection, user_id))

    def item_counts(self, since: int = NONE_READ) -> ItemCounts:
        with self._failures("cannot be read"):
            return sqlite_counters.counts_of_rows(self._read(sqlite_counters.CHANGED_COUNTS, since), since)

    def last_arrival(self) -> int:
        ((last,),) = self._read(sqlite_counters.LAST_ARRIVAL)
        return int(last)

    def _seed_after(self, last: int, counters: dict[str, Counter], until: int) -> None:
        self._damaged.log(self._write(lambda connection: sqlite_counters.seed(connection, last, counters, until)))

    def _read(self, query: LiteralString, *parameters: Any) -> list[Any]:
        with self._failures("cannot be read"):
            return self._reader().execute(query, parameters).fetchall()

    def _write_deferred(self, impressions: Sequence[Started], states: Sequence[SpilledState]) -> None:
        def work(connection: sqlite3.Connection) -> None:
            _insert_impressions(connection, impressions)
            _insert_states(connection, states)

        self._write(work)

    def _write(self, work: Callable[[sqlite3.Connection], T], *, records: bool = False) -> T:
        """Has the writer do some work within a transaction, and returns its result when that is on disk."""
        done: Future[T] = Future()
        self._writes.put(_Write(work, done, records))
        with self._failures("cannot be written"):
            return done.result()

    def _run(self) -> None:
        while True:
            first = self._writes.get()
            if first is None:
                return
            group = [first]
            with suppress(queue.Empty):
                while len(group) < LARGEST_GROUP:
                    write = self._writes.get_nowait()
                    if write is None:
                        self._writes.put(None)
                        break
                    group.append(write)
            self._commit(group)

    def _commit(self, group: Sequence[_Write]) -> None:
        """Does what it can of a group in one transaction; never raises."""
        results: list[tuple[Future[Any], Any]] = []
        # Counted together: items with many events are in many calls.
        uncounted: list[UserEvent] = []
        try:
            self._writer.execute("BEGIN IMMEDIATE")
            for write in group:
                if not write.records:
                    # Before a seed, which counts them itself.
                    self._damaged.log(sqlite_counters.count_events(self._writer, uncounted))
                    uncounted = []
                self._writer.execute("SAVEPOINT one")
                try:
                    result = write.work(self._writer)
                    results.append((write.done, result))
                    uncounted += result if write.records else ()
                except Exception as error:
                    # A full disk may have ended the transaction, and with it the group.
                    if not self._writer.in_transaction:
                        raise
                    self._writer.execute("ROLLBACK TO one")
                    write.done.set_exception(error)
                self._writer.execute("RELEASE one")
            self._damaged.log(sqlite_counters.count_events(self._writer, uncounted))
            self._writer.execute("COMMIT")
        except Exception as error:
            if self._writer.in_transaction:
                with suppress(sqlite3.Error):
                    self._writer.execute("ROLLBACK")
            for write in group:
                if not write.done.done():
                    write.done.set_exception(error)
            return
        for done, result in results:
            done.set_result(result)

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
            # What is deleted is overwritten, not only unlinked.
            connection.execute("PRAGMA secure_delete = ON")
        return connection

    def _close_connections(self) -> None:
        with self._connections_lock:
            while self._connections:
                self._connections.pop().close()

    def _prepare(self, connection: sqlite3.Connection) -> None:
        self._version(connection)
        # Also of a file that is up to date: a copy of a log comes without, as one file.
        (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise StoreError(f"{self._path}: cannot be opened: expected journal mode wal, came {mode}")
        if (
            self._version(connection) == SCHEMA_VERSION
            and has(connection, "arrivals")
            and not has(connection, COPY_MARK)
        ):
            return
        connection.execute("BEGIN IMMEDIATE")
        try:
            connection.execute(f"DROP TABLE IF EXISTS {COPY_MARK}")
            # Another process may have been faster.
            version = self._version(connection)
            if version != SCHEMA_VERSION:
                steps = [*UPDATES.get(version, "").split(";"), *(SCHEMA + sqlite_counters.SCHEMA).split(";")]
                steps += [FILL_USERS, f"PRAGMA application_id = {APPLICATION_ID}"]
                for step in [*steps, f"PRAGMA user_version = {SCHEMA_VERSION}"]:
                    connection.execute(step)
            connection.execute(ARRIVALS)
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def _version(self, connection: sqlite3.Connection) -> int:
        """The version of the schema, 0 for an empty file; raises StoreError when it is no store's."""
        (application_id,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        if application_id == APPLICATION_ID and 1 <= version <= SCHEMA_VERSION:
            return int(version)
        if tables or application_id or version:
            raise StoreError(
                f"{self._path}: is a database of application {application_id} in version {version}, expected"
                f" an event store ({APPLICATION_ID}) in version 1..{SCHEMA_VERSION}"
            )
        return 0

    @contextmanager
    def _failures(self, what: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StoreError(f"{self._path}: {what}: {error}") from error


def has(connection: sqlite3.Connection, name: str) -> bool:
    """Whether there is a table or index of this name."""
    return connection.execute("SELECT count(*) FROM sqlite_schema WHERE name = ?", [name]).fetchone() == (1,)


def _insert_events(connection: sqlite3.Connection, events: Sequence[UserEvent]) -> list[UserEvent]:
    recorded = []
    for new in events:
        cursor = connection.execute(
            f"INSERT INTO events ({EVENT_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (event_id) DO NOTHING",
            event_row(new),
        )
        if cursor.rowcount:
            recorded.append(new)
            connection.execute(
                "INSERT INTO users VALUES (?1, ?2, ?2) ON CONFLICT (user_id) DO UPDATE SET last_arrival = ?2",
                (new.user_id, cursor.lastrowid),
            )
    return recorded


def _insert_impressions(connection: sqlite3.Connection, impressions: Sequence[Started]) -> None:
    """Leaves out what was recommended to users before they were deleted."""
    users = digests(impressions)
    query = f"SELECT user, time FROM deletions WHERE user IN ({', '.join('?' * len(users))})"
    deleted = dict(connection.execute(query, users).fetchall())
    rows = [impression_row(one) for one in still_wanted(impressions, deleted, time.time())]
    # Many in one statement: after each statement Python takes its lock again, which the threads that answer want too.
    for start in range(0, len(rows), INSERTED_AT_ONCE):
        part = rows[start : start + INSERTED_AT_ONCE]
        values = ", ".join([IMPRESSION_VALUES] * len(part))
        connection.execute(
            f"{INSERT_IMPRESSION} {values} ON CONFLICT (recommendation_id) DO NOTHING",
            [value for row in part for value in row],
        )


def _insert_states(connection: sqlite3.Connection, states: Sequence[SpilledState]) -> None:
    """Leaves out the states of users that were deleted meanwhile."""
    connection.executemany(
        "INSERT INTO states SELECT ?1, ?2, ?3, ?4"
        " WHERE EXISTS (SELECT 1 FROM users WHERE user_id = ?1 AND first_arrival <= ?3)"
        " ON CONFLICT (user_id, model_version) DO UPDATE SET revision = excluded.revision, state = excluded.state",
        states,
    )


def _delete_user(connection: sqlite3.Connection, user_id: str) -> Deleted:
    counts = {
        table: connection.execute(f"DELETE FROM {table} WHERE user_id = ?", (user_id,)).rowcount
        for table in ("events", "shown", "users", "states")
    }
    now = time.time()
    connection.execute("DELETE FROM deletions WHERE time < ?", (now - DELETION_S,))
    connection.execute("INSERT OR REPLACE INTO deletions VALUES (?, ?)", (digest(user_id), now))
    return Deleted(counts["events"], counts["shown"])
