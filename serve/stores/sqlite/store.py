"""Events, slates, spilled states and items in one SQLite file, for the servers of one machine.

One thread writes; calls that wait for it share a transaction and its fsync (group commit), each with a savepoint of
its own, so that a call that fails takes no other with it. WAL with synchronous=FULL: what was acknowledged survives
the end of the process and, as far as fsync keeps its word, of the power. Reads don't wait for writes.
"""

import logging
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, LiteralString, NamedTuple, TypeVar

from serve.model.live_catalog import Item
from serve.stores.base import Deleted, ShownItem, SpilledState, StoreError, UserEvent
from serve.stores.counters import NONE_READ, Counter, Damaged, ItemCounts
from serve.stores.deferred import DeferredWrites
from serve.stores.rows import DAMAGED_ITEM, Started, digests, event_row, slate_row, still_wanted
from serve.stores.sql import SqlStore
from serve.stores.sqlite import counters as sqlite_counters
from serve.stores.sqlite import items as sqlite_items
from serve.stores.sqlite import users
from serve.stores.sqlite.schema import (
    APPLICATION_ID,
    ARRIVALS,
    COPY_MARK,
    INSERT_EVENT,
    INSERT_SHOWN_ITEM,
    INSERT_SLATE,
    QUERIES,
    SCHEMA_VERSION,
    SLATE_VALUES,
    bring_up_to_date,
    has,
)

logger = logging.getLogger(__name__)

LOCK_TIMEOUT_S = 5.0
RETRY_S = 0.01
LARGEST_GROUP = 256
INSERTED_AT_ONCE = 100
MOST_REVISIONS = 10_000

T = TypeVar("T")


class _Write(NamedTuple):
    """What to do within the writer's transaction, and the future of its result."""

    work: Callable[[sqlite3.Connection], Any]
    done: Future[Any]
    records: bool = False
    """Whether the result is the events that were recorded."""


class _Reader(NamedTuple):
    """The connection of a thread that reads."""

    connection: sqlite3.Connection
    reading: threading.Lock
    """Held while it reads, and while it is closed."""


class _Revisions:
    """Revisions that one thread has read since any other connection last changed the file."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        # A file that another process has locked is not waited for.
        connection.execute("PRAGMA busy_timeout = 0")
        self._connection = connection
        self._kept: dict[str, int] = {}
        self._version: object = None

    def of(self, user_ids: Sequence[str]) -> dict[str, int]:
        """Raises sqlite3.Error."""
        # A quarter of the time of a query.
        version = self._connection.execute("PRAGMA data_version").fetchone()
        if version != self._version or len(self._kept) > MOST_REVISIONS:
            self._version, self._kept = version, {}
        for user_id in user_ids:
            if user_id not in self._kept:
                life = self._connection.execute(QUERIES.life, (user_id,)).fetchone()
                self._kept[user_id] = 0 if life is None else int(life[1])
        return {user_id: self._kept[user_id] for user_id in user_ids}


class SQLiteStore(SqlStore):
    """The store of one machine; several processes may read and write the same file."""

    _queries = QUERIES

    def __init__(self, path: Path) -> None:
        """Opens the file, or creates it; raises StoreError."""
        self._path = path
        self._damaged = Damaged(str(path))
        self._damaged_items = Damaged(str(path), DAMAGED_ITEM)
        self._readers = threading.local()
        self._all_readers: list[_Reader] = []
        self._closing = threading.Lock()
        self._closed = False
        self._writes: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._writer = self._connect()
        try:
            with self._failures("cannot be opened"):
                self._prepare(self._writer)
        except BaseException:
            self._writer.close()
            raise
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
        self._thread.start()
        self._deferred = DeferredWrites(self._write_deferred, self._last_deletion)

    def close(self) -> None:
        self._deferred.close()
        with self._closing:
            self._closed = True
            self._writes.put(None)
            readers = self._all_readers
        self._thread.join()
        self._writer.close()
        for reader in readers:
            # A thread that still reads, since its call was cut off, keeps its connection.
            if reader.reading.acquire(blocking=False):
                try:
                    reader.connection.close()
                finally:
                    reader.reading.release()

    def record(self, events: Sequence[UserEvent]) -> list[UserEvent]:
        if not events:
            return []
        return self._write(lambda connection: _insert_events(connection, events), records=True)

    def record_shown(self, items: Sequence[ShownItem]) -> int:
        if not items:
            return 0
        return self._write(lambda connection: connection.executemany(INSERT_SHOWN_ITEM, items).rowcount)

    def prune_slates(self, before: int, most: int) -> bool:
        return self._write(lambda connection: users.prune_slates(connection, before, most))

    def delete_user(self, user_id: str) -> Deleted:
        self._deferred.discard(user_id)
        deleted = self._write(lambda connection: users.delete_user(connection, user_id))
        self._deferred.look()
        return deleted

    def delete_events(self, user_id: str, event_ids: Sequence[str]) -> int:
        return self._write(lambda connection: users.delete_events(connection, user_id, event_ids))

    def merge_users(self, source: str, target: str) -> Deleted:
        with self._deferred.merging(source, target):
            return self._write(lambda connection: users.merge_users(connection, source, target))

    def upsert_items(self, items: Sequence[Item]) -> int:
        return self._write(lambda connection: sqlite_items.upsert_items(connection, items)) if items else 0

    def delete_items(self, item_ids: Sequence[str]) -> int:
        return self._write(lambda connection: sqlite_items.delete_items(connection, item_ids)) if item_ids else 0

    def item_counts(self, since: int = NONE_READ) -> ItemCounts:
        with self._failures("cannot be read"):
            return sqlite_counters.counts_of_rows(self._read(sqlite_counters.CHANGED_COUNTS, since), since)

    def last_arrival(self) -> int:
        ((last,),) = self._read(sqlite_counters.LAST_ARRIVAL)
        return int(last)

    def _seed_after(self, last: int, counters: dict[str, Counter], until: int) -> None:
        self._damaged.log(self._write(lambda connection: sqlite_counters.seed(connection, last, counters, until)))

    def revisions_at_once(self, user_ids: Sequence[str]) -> dict[str, int] | None:
        try:
            kept: _Revisions | None = getattr(self._readers, "at_once", None)
            if kept is None:
                kept = self._readers.at_once = _Revisions(self._connect())
            return kept.of(user_ids)
        except (sqlite3.Error, StoreError):
            return None

    def _read(self, query: LiteralString, *parameters: Any) -> list[Any]:
        reader = self._reader()
        with reader.reading, self._failures("cannot be read"):
            self._check_open()
            return reader.connection.execute(query, parameters).fetchall()

    def _delete_states(self, keys: Sequence[tuple[str, str]]) -> int:
        query = "DELETE FROM states WHERE user_id = ? AND model_version = ?"
        return self._write(lambda connection: connection.executemany(query, keys).rowcount)

    def _write_deferred(self, slates: Sequence[Started], states: Sequence[SpilledState]) -> None:
        def work(connection: sqlite3.Connection) -> None:
            _insert_slates(connection, slates)
            _insert_states(connection, states)

        self._write(work)

    def _write(self, work: Callable[[sqlite3.Connection], T], *, records: bool = False) -> T:
        """Has the writer do some work within a transaction, and returns its result when that is on disk."""
        done: Future[T] = Future()
        with self._closing:
            if self._closed:
                raise StoreError(f"{self._path}: cannot be written: it is closed")
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

    def _check_open(self) -> None:
        """Raises StoreError."""
        if self._closed:
            raise StoreError(f"{self._path}: cannot be read: it is closed")

    def _reader(self) -> _Reader:
        """This thread's own connection: on a shared one, overlapping reads could keep an old snapshot."""
        reader: _Reader | None = getattr(self._readers, "reader", None)
        if reader is None:
            with self._closing:
                self._check_open()
                reader = self._readers.reader = _Reader(self._connect(), threading.Lock())
                self._all_readers.append(reader)
        return reader

    def _connect(self) -> sqlite3.Connection:
        with self._failures("cannot be opened"):
            connection = sqlite3.connect(
                self._path, timeout=LOCK_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
            connection.execute("PRAGMA synchronous = FULL")
            # What is deleted is overwritten, not only unlinked.
            connection.execute("PRAGMA secure_delete = ON")
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        self._version(connection)
        # Also of a file that is up to date: a copy of a log comes without, as one file.
        mode = _write_ahead(connection)
        if mode != "wal":
            raise StoreError(f"{self._path}: cannot be opened: expected journal mode wal, came {mode}")
        if (
            self._version(connection) == SCHEMA_VERSION
            and has(connection, "arrivals")
            and not has(connection, COPY_MARK)
        ):
            return
        self._begin_preparing(connection)
        try:
            connection.execute(f"DROP TABLE IF EXISTS {COPY_MARK}")
            # Another process may have been faster.
            if self._version(connection) != SCHEMA_VERSION:
                bring_up_to_date(connection)
            connection.execute(ARRIVALS)
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def _begin_preparing(self, connection: sqlite3.Connection) -> None:
        """Begins a transaction that writes. Waits without a limit while another process has one: it may be bringing a
        large log up to date. Raises sqlite3.Error."""
        while True:
            try:
                connection.execute("BEGIN IMMEDIATE")
                return
            except sqlite3.OperationalError as error:
                if not _is_busy(error):
                    raise
            logger.warning("%s: locked by another process, which may be bringing it up to date: waiting", self._path)

    def _version(self, connection: sqlite3.Connection) -> int:
        """The version of the schema, 0 for an empty file; raises StoreError when it is no store's."""
        # In one query, of one moment: another process may be preparing the file.
        application_id, version, tables = connection.execute(
            "SELECT application_id, user_version, (SELECT count(*) FROM sqlite_schema)"
            " FROM pragma_application_id, pragma_user_version"
        ).fetchone()
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


def _write_ahead(connection: sqlite3.Connection) -> str:
    """Turns write-ahead logging on; returns the journal mode. Raises sqlite3.Error.

    Where two processes do so at once, SQLite refuses one of them without waiting for the other.
    """
    until = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
            return str(mode)
        except sqlite3.OperationalError as error:
            if not _is_busy(error) or time.monotonic() >= until:
                raise
        time.sleep(RETRY_S)


def _is_busy(error: sqlite3.OperationalError) -> bool:
    """Whether another connection holds a lock. Extended codes have the code in their last byte."""
    return error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY


def _insert_events(connection: sqlite3.Connection, events: Sequence[UserEvent]) -> list[UserEvent]:
    recorded = []
    for new in events:
        cursor = connection.execute(
            INSERT_EVENT,
            event_row(new),
        )
        if cursor.rowcount:
            recorded.append(new)
            connection.execute(
                "INSERT INTO users VALUES (?1, ?2, ?2) ON CONFLICT (user_id) DO UPDATE SET last_arrival = ?2",
                (new.user_id, cursor.lastrowid),
            )
    return recorded


def _insert_slates(connection: sqlite3.Connection, slates: Sequence[Started]) -> None:
    """Leaves out what was recommended to users before they were deleted."""
    named = digests(slates)
    query = f"SELECT user, number FROM deletions WHERE user IN ({', '.join('?' * len(named))})"
    deleted = dict(connection.execute(query, named).fetchall())
    rows = [slate_row(one) for one in still_wanted(slates, deleted)]
    # Many in one statement: after each statement Python takes its lock again, which the threads that answer want too.
    for start in range(0, len(rows), INSERTED_AT_ONCE):
        part = rows[start : start + INSERTED_AT_ONCE]
        values = ", ".join([SLATE_VALUES] * len(part))
        connection.execute(
            f"{INSERT_SLATE} {values} ON CONFLICT (recommendation_id) DO NOTHING",
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
