"""Events, slates, spilled states and items in PostgreSQL, for several servers with one store.

The database commits groups of transactions by itself. A user's row in `users` is locked before events of the user are
inserted, so that a user's arrivals become visible in their order and the latest is a revision. Counters of items are
locked after the users and events of a call, in the order of ids.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, LiteralString

import psycopg

from serve.model.live_catalog import Item
from serve.stores.base import (
    Deleted,
    ShownItem,
    Slate,
    SpilledState,
    StoreError,
    UserEvent,
)
from serve.stores.counters import NONE_READ, Counter, Damaged, ItemCounts
from serve.stores.deferred import DeferredWrites
from serve.stores.postgres import items as postgres_items
from serve.stores.postgres import users
from serve.stores.postgres.counters import CHANGED_COUNTS, count_events, counts_of_rows, last_arrival, seed
from serve.stores.postgres.schema import DELETION_LOCK, QUERIES, prepare
from serve.stores.rows import (
    DAMAGED_ITEM,
    EVENT_COLUMNS,
    SHOWN_ITEM_COLUMNS,
    SLATE_COLUMNS,
    Started,
    digests,
    event_row,
    slate_row,
    still_wanted,
)
from serve.stores.sql import SqlStore

CONNECT_TIMEOUT_S = 5
# Kept open between calls: one for each thread that may call (at most 64 `--store-threads`, and those that run models).
IDLE_CONNECTIONS = 80
# A statement that waits longer, say for a lock, fails; the client may try again.
STATEMENT_TIMEOUT_MS: LiteralString = "5000"
# For each transaction, in one message: PgBouncer refuses connections with options, and lends them to others.
BEGIN: LiteralString = f"BEGIN; SET LOCAL statement_timeout = {STATEMENT_TIMEOUT_MS}; SET LOCAL synchronous_commit = on"


class PostgresStore(SqlStore):
    """A store in the schema `jaxrec` of a database that exists."""

    _queries = QUERIES

    def __init__(self, location: str) -> None:
        """Connects, and creates the tables that are missing or brings those of an earlier version up to date.

        Args:
            location: `postgresql://...`, as libpq reads it.

        Raises:
            StoreError: The database cannot be reached or written, holds a store of a later version, or runs without
                fsync.
        """
        self._location = location
        self._where = "PostgreSQL"
        # Not psycopg_pool: while the database is away, its callers wait for the whole timeout, one after the other,
        # and it comes back with a delay that grows. Here a call fails and works again as soon as a connection does.
        self._idle: deque[psycopg.Connection] = deque()
        with self._connection("cannot be opened") as connection:
            prepare(connection)
            self._where = f"PostgreSQL {connection.info.host}:{connection.info.port}/{connection.info.dbname}"
        self._damaged = Damaged(self._where)
        self._damaged_items = Damaged(self._where, DAMAGED_ITEM)
        self._deferred = DeferredWrites(self._write_deferred, self._last_deletion)

    def close(self) -> None:
        self._deferred.close()
        self._close_idle()

    def record(self, events: Sequence[UserEvent]) -> list[UserEvent]:
        if not events:
            return []
        user_ids = [new.user_id for new in events]
        columns = [list(column) for column in zip(*map(event_row, events), strict=True)]
        with self._connection("cannot be written") as connection:
            users.lock_users(connection, user_ids)
            # They arrive in the order of the call, but are inserted in that of their ids: two calls with the same new
            # ids don't wait for each other in a circle.
            rows = connection.execute(
                f"WITH given AS (SELECT {EVENT_COLUMNS} FROM unnest(%s::text[], %s::text[], %s::text[], %s::float8[],"
                " %s::bigint[], %s::float8[], %s::text[], %s::text[], %s::float8[])"
                f" WITH ORDINALITY AS columns ({EVENT_COLUMNS}, at) ORDER BY at),"
                " arrived AS MATERIALIZED (SELECT"
                f" nextval(pg_get_serial_sequence('jaxrec.events', 'arrival')) AS arrival, {EVENT_COLUMNS} FROM given)"
                f" INSERT INTO jaxrec.events (arrival, {EVENT_COLUMNS}) OVERRIDING SYSTEM VALUE"
                f" SELECT arrival, {EVENT_COLUMNS} FROM arrived ORDER BY event_id, arrival"
                " ON CONFLICT (event_id) DO NOTHING RETURNING event_id",
                columns,
            ).fetchall()
            connection.execute(
                "UPDATE jaxrec.users SET last_arrival = latest,"
                " first_arrival = CASE WHEN first_arrival = 0 THEN earliest ELSE first_arrival END"
                " FROM (SELECT user_id AS named, min(arrival) AS earliest, max(arrival) AS latest FROM jaxrec.events"
                " WHERE event_id = ANY(%s) GROUP BY user_id) AS new WHERE user_id = named",
                [[event_id for (event_id,) in rows]],
            )
            # Users whose events were all duplicates of other users' events.
            connection.execute("DELETE FROM jaxrec.users WHERE user_id = ANY(%s) AND last_arrival = 0", [user_ids])
            new_ids = {event_id for (event_id,) in rows}
            # Of equal ids in one request the first counts.
            first = {new.event_id: new for new in reversed(events)}
            recorded = [new for new in reversed(first.values()) if new.event_id in new_ids]
            damaged = count_events(connection, recorded)
        self._damaged.log(damaged)
        return recorded

    def revisions(self, user_ids: Sequence[str]) -> dict[str, int]:
        query = "SELECT user_id, last_arrival FROM jaxrec.users WHERE user_id = ANY(%s)"
        return {**dict.fromkeys(user_ids, 0), **dict(self._read(query, list(user_ids)))}

    def record_shown(self, items: Sequence[ShownItem]) -> int:
        if not items:
            return 0
        # In one order: two servers that insert the same don't wait for each other in a circle.
        columns = [list(column) for column in zip(*sorted(items, key=lambda one: one[:2]), strict=True)]
        with self._connection("cannot be written") as connection:
            return connection.execute(
                f"INSERT INTO jaxrec.shown_items ({SHOWN_ITEM_COLUMNS}) SELECT * FROM"
                " unnest(%s::text[], %s::text[], %s::bigint[], %s::bigint[], %s::bigint[]) ON CONFLICT DO NOTHING",
                columns,
            ).rowcount

    def prune_slates(self, before: int, most: int) -> bool:
        with self._connection("cannot be written") as connection:
            return users.prune_slates(connection, before, most)

    def delete_user(self, user_id: str) -> Deleted:
        self._deferred.discard(user_id)
        with self._connection("cannot be written") as connection:
            deleted = users.delete_user(connection, user_id)
        self._deferred.look()
        return deleted

    def delete_events(self, user_id: str, event_ids: Sequence[str]) -> int:
        with self._connection("cannot be written") as connection:
            return users.delete_events(connection, user_id, event_ids)

    def merge_users(self, source: str, target: str) -> Deleted:
        with self._deferred.merging(source, target), self._connection("cannot be written") as connection:
            return users.merge_users(connection, source, target)

    def upsert_items(self, items: Sequence[Item]) -> int:
        if not items:
            return 0
        with self._connection("cannot be written") as connection:
            return postgres_items.upsert_items(connection, items)

    def delete_items(self, item_ids: Sequence[str]) -> int:
        if not item_ids:
            return 0
        with self._connection("cannot be written") as connection:
            return postgres_items.delete_items(connection, item_ids)

    def item_counts(self, since: int = NONE_READ) -> ItemCounts:
        rows = self._read(CHANGED_COUNTS, since)
        if rows[0][0] < since:
            # The database is another one, or an older copy.
            rows = self._read(CHANGED_COUNTS, NONE_READ)
        try:
            return counts_of_rows(rows)
        except ValueError as error:
            raise StoreError(f"{self._where}: cannot be read: {error}") from error

    def last_arrival(self) -> int:
        with self._connection("cannot be read") as connection:
            return last_arrival(connection)

    def _seed_after(self, last: int, counters: dict[str, Counter], until: int) -> None:
        with self._connection("cannot be written") as connection:
            damaged = seed(connection, last, counters, until)
        self._damaged.log(damaged)

    def _read(self, query: LiteralString, *parameters: Any) -> list[Any]:
        """In one message and its answer, while a transaction of its own would wait for the database three times."""
        with self._borrowed("cannot be read") as connection:
            with connection.pipeline():
                connection.execute("BEGIN READ ONLY", prepare=False)
                connection.execute(f"SET LOCAL statement_timeout = {STATEMENT_TIMEOUT_MS}", prepare=False)
                rows = connection.execute(query, parameters)
                connection.execute("COMMIT", prepare=False)
            return rows.fetchall()

    def _delete_states(self, keys: Sequence[tuple[str, str]]) -> int:
        with self._connection("cannot be written") as connection:
            return connection.execute(
                "DELETE FROM jaxrec.states WHERE (user_id, model_version) IN (SELECT user_id, model_version"
                " FROM jaxrec.states JOIN unnest(%s::text[], %s::text[]) AS swept (user_id, model_version)"
                " USING (user_id, model_version) FOR UPDATE OF states SKIP LOCKED)",
                [list(column) for column in zip(*keys, strict=True)],
            ).rowcount

    def _write_deferred(self, slates: Sequence[Started], states: Sequence[SpilledState]) -> None:
        with self._connection("cannot be written") as connection:
            _insert_slates(connection, slates)
            # Not the states of users that were deleted meanwhile.
            connection.cursor().executemany(
                "INSERT INTO jaxrec.states SELECT user_id, %(model_version)s, %(revision)s, %(state)s FROM jaxrec.users"
                " WHERE user_id = %(user_id)s AND first_arrival <= %(revision)s ON CONFLICT (user_id, model_version)"
                " DO UPDATE SET revision = excluded.revision, state = excluded.state",
                [one._asdict() for one in states],
            )

    @contextmanager
    def _connection(self, what: str) -> Iterator[psycopg.Connection]:
        """A connection for one transaction, which is committed at the end."""
        with self._borrowed(what) as connection:
            connection.execute(BEGIN, prepare=False)
            yield connection
            connection.execute("COMMIT")

    @contextmanager
    def _borrowed(self, what: str) -> Iterator[psycopg.Connection]:
        """A connection, which is not in a transaction before and after."""
        try:
            try:
                connection = self._idle.pop()
            except IndexError:
                connection = psycopg.connect(self._location, autocommit=True, connect_timeout=CONNECT_TIMEOUT_S)
            try:
                yield connection
            except BaseException:
                connection.close()
                raise
        except psycopg.Error as error:
            if isinstance(error, psycopg.OperationalError):
                # After a restart of the database the others are dead too.
                self._close_idle()
            raise StoreError(f"{self._where}: {what}: {error}") from error
        if len(self._idle) < IDLE_CONNECTIONS:
            self._idle.append(connection)
        else:
            connection.close()

    def _close_idle(self) -> None:
        with suppress(IndexError):
            while True:
                self._idle.pop().close()


def _insert_slates(connection: psycopg.Connection, slates: Sequence[Started]) -> None:
    """Leaves out what was recommended to users before they were deleted."""
    connection.execute("SELECT pg_advisory_xact_lock_shared(%s)", [DELETION_LOCK])
    rows = connection.execute(
        "SELECT digest, number FROM jaxrec.deletions WHERE digest = ANY(%s)", [digests(slates)]
    ).fetchall()
    connection.cursor().executemany(
        f"INSERT INTO jaxrec.shown ({SLATE_COLUMNS}) VALUES ({', '.join(['%s'] * len(Slate._fields))})"
        " ON CONFLICT (recommendation_id) DO NOTHING",
        [slate_row(one) for one in still_wanted(slates, dict(rows))],
    )
