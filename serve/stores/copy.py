"""Copies the log of a store, events and slates, into one SQLite file: what the next policy learns from.

Items and their counters are copied with it, for the store that the copy may become.
"""

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple

from serve.stores.base import EventStore, StoreError
from serve.stores.rows import EVENT_COLUMNS, event_row, slate_row
from serve.stores.sqlite.counters import INSERT_COUNTER, LAST_ARRIVAL, counter_rows
from serve.stores.sqlite.items import upsert_items
from serve.stores.sqlite.schema import (
    APPLICATION_ID,
    COPY_MARK,
    EVENT_VALUES,
    FILL_USERS,
    INSERT_SHOWN_ITEM,
    INSERT_SLATE,
    SLATE_VALUES,
    has,
)
from serve.stores.sqlite.store import SQLiteStore

ITEMS_AT_ONCE = 1_000


class Copied(NamedTuple):
    """How much there was."""

    events: int
    slates: int


def copy_log(store: EventStore, path: Path, progress: Callable[[int], None] = lambda rows: None) -> Copied:
    """Writes the file at `path`, a store itself, as a whole or not at all; an older copy is replaced.

    All that was on disk when this began is in it, and what came meanwhile may be. `progress` is called with the
    number of rows of each part. Raises StoreError, also for a file that is no copy, or was opened as a store since.
    """
    _require_replaceable(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        SQLiteStore(partial).close()
        copied = _filled(partial, store, progress)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        # It may have been opened meanwhile.
        _require_replaceable(path)
        partial.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, sqlite3.Error) as error:
        raise StoreError(f"{path}: cannot be written: {error}") from error
    finally:
        for suffix in ("", "-wal", "-shm"):
            partial.with_name(partial.name + suffix).unlink(missing_ok=True)
    return copied


def _require_replaceable(path: Path) -> None:
    """Raises StoreError for a file that is there and is no untouched copy."""
    in_use = path.with_name(f"{path.name}-wal").exists()
    if in_use or (path.exists() and not _is_copy(path)):
        found = "a store that is in use" if in_use else "another file, or a copy that was opened as a store since"
        raise StoreError(f"{path}: expected a new file or an older copy of a log, came {found}")


def _is_copy(path: Path) -> bool:
    """Whether a file is a copy of a log that was not opened as a store since."""
    # Immutable: looking at another's database neither waits for it nor leaves files beside it.
    with suppress(sqlite3.Error), closing(sqlite3.connect(f"{path.resolve().as_uri()}?immutable=1", uri=True)) as file:
        return file.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,) and has(file, COPY_MARK)
    return False


def _filled(path: Path, store: EventStore, progress: Callable[[int], None]) -> Copied:
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        # Until it is renamed no reader misses it; and then it is one file.
        connection.execute("PRAGMA journal_mode = DELETE")
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("BEGIN")
        # Events last: a slate that is logged meanwhile is in the copy with its events or not at all, not as if it
        # had none (except in Redis, for users whose events were copied already). Events that refer to a slate
        # that is not in the copy do no harm.
        for slates in store.all_slates():
            connection.executemany(
                f"{INSERT_SLATE} {SLATE_VALUES} ON CONFLICT DO NOTHING",
                [slate_row(one) for one in slates],
            )
            progress(len(slates))
        for shown in store.all_shown():
            connection.executemany(INSERT_SHOWN_ITEM, shown)
            progress(len(shown))
        for events in store.all_events():
            connection.executemany(
                f"INSERT OR IGNORE INTO events (arrival, {EVENT_COLUMNS}) VALUES (?, {EVENT_VALUES})",
                [(at, *event_row(new)) for at, new in events],
            )
            progress(len(events))
        last = ""
        while items := store.list_items(last, ITEMS_AT_ONCE):
            upsert_items(connection, items)
            last = items[-1].item_id
            progress(len(items))
        # Afterwards, so that no event of the copy is missing in its counters.
        until = store.counted_until()
        if until is not None:
            connection.execute("UPDATE trend_start SET counted_until = ?", [until])
            ((arrival,),) = connection.execute(LAST_ARRIVAL).fetchall()
            connection.executemany(INSERT_COUNTER, counter_rows(store.item_counts().counters().items(), arrival))
        connection.execute(FILL_USERS)
        connection.execute(f"CREATE TABLE {COPY_MARK} (marked INTEGER) STRICT")
        connection.execute("COMMIT")
        counts = [connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in ("events", "shown")]
        return Copied(*counts)
    finally:
        connection.close()
