"""Events, impressions and spilled states in PostgreSQL, for several servers with one store.

The database commits groups of transactions by itself. A user's row in `users` is locked before events of the user are
inserted, so that a user's arrivals become visible in their order and the latest is a revision. Counters of items are
locked after the users and events of a call, in the order of ids.
"""

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, LiteralString

import psycopg

from serve.stores.base import (
    DELETION_S,
    Deleted,
    Impression,
    SpilledState,
    StoreError,
    UserEvent,
    digest,
)
from serve.stores.counters import NONE_READ, Counter, Damaged, ItemCounts
from serve.stores.deferred import DeferredWrites
from serve.stores.postgres_counters import (
    CHANGED_COUNTS,
    COUNTED_UNTIL,
    COUNTERS_SCHEMA,
    TIMES,
    count_events,
    counts_of_rows,
    last_arrival,
    seed,
)
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

SCHEMA_VERSION = 5
VERSION_TABLE: tuple[LiteralString, ...] = (
    "CREATE SCHEMA IF NOT EXISTS jaxrec",
    "CREATE TABLE IF NOT EXISTS jaxrec.store (version integer NOT NULL)",
)
SCHEMA: tuple[LiteralString, ...] = (
    """CREATE TABLE IF NOT EXISTS jaxrec.events (
        arrival bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        event_id text NOT NULL UNIQUE,
        user_id text NOT NULL,
        item_id text NOT NULL,
        rating double precision,
        timestamp bigint NOT NULL,
        recommendation_id text
    )""",
    "CREATE INDEX IF NOT EXISTS history ON jaxrec.events (user_id, timestamp, arrival)",
    """CREATE TABLE IF NOT EXISTS jaxrec.users (
        user_id text PRIMARY KEY,
        first_arrival bigint NOT NULL,
        last_arrival bigint NOT NULL
    )""",
    """CREATE TABLE IF NOT EXISTS jaxrec.shown (
        number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        recommendation_id text NOT NULL,
        user_id text,
        item_ids text NOT NULL,
        log_propensities text NOT NULL,
        policy text NOT NULL,
        model_version text NOT NULL,
        timestamp bigint NOT NULL,
        temperature double precision,
        request_time bigint,
        excluded_item_ids text NOT NULL DEFAULT '[]',
        trend_time bigint,
        trend_arrival bigint,
        request_options text NOT NULL DEFAULT '[]'
    )""",
    """ALTER TABLE jaxrec.shown ADD COLUMN IF NOT EXISTS temperature double precision,
        ADD COLUMN IF NOT EXISTS request_time bigint,
        ADD COLUMN IF NOT EXISTS excluded_item_ids text NOT NULL DEFAULT '[]',
        ADD COLUMN IF NOT EXISTS trend_time bigint,
        ADD COLUMN IF NOT EXISTS trend_arrival bigint,
        ADD COLUMN IF NOT EXISTS request_options text NOT NULL DEFAULT '[]'""",
    "CREATE INDEX IF NOT EXISTS shown_to ON jaxrec.shown (user_id)",
    """DELETE FROM jaxrec.shown AS later USING jaxrec.shown AS earlier
        WHERE later.recommendation_id = earlier.recommendation_id AND later.number > earlier.number""",
    "CREATE UNIQUE INDEX IF NOT EXISTS shown_once ON jaxrec.shown (recommendation_id)",
    """CREATE TABLE IF NOT EXISTS jaxrec.deletions (
        digest text PRIMARY KEY,
        time timestamptz NOT NULL
    )""",
    """CREATE TABLE IF NOT EXISTS jaxrec.states (
        user_id text NOT NULL,
        model_version text NOT NULL,
        revision bigint NOT NULL,
        state bytea NOT NULL,
        PRIMARY KEY (user_id, model_version)
    )""",
    *COUNTERS_SCHEMA,
)
# No schema version of its own: servers that do not know it can use the store.
ARRIVALS: LiteralString = "CREATE INDEX IF NOT EXISTS arrivals ON jaxrec.events (user_id, arrival)"
QUERIES = Queries(
    life="SELECT first_arrival, last_arrival FROM jaxrec.users WHERE user_id = %s",
    # These walk as many of a user's events as they find; by time, the first would walk all that the user has.
    changes=(
        "SELECT item_id, rating, timestamp FROM jaxrec.events"
        " WHERE user_id = %s AND arrival > %s AND arrival <= %s ORDER BY arrival LIMIT %s"
    ),
    newest=(
        "SELECT item_id, rating, timestamp FROM jaxrec.events"
        " WHERE user_id = %s AND arrival <= %s AND timestamp <= %s ORDER BY timestamp DESC, arrival DESC LIMIT %s"
    ),
    state="SELECT * FROM jaxrec.states WHERE user_id = %s AND model_version = %s",
    events=(f"SELECT arrival, {EVENT_COLUMNS} FROM jaxrec.events WHERE arrival > %s ORDER BY arrival LIMIT %s"),
    impressions=f"SELECT number, {IMPRESSION_COLUMNS} FROM jaxrec.shown WHERE number > %s ORDER BY number LIMIT %s",
    times=TIMES,
    counted_until=COUNTED_UNTIL,
)
# Taken while the schema is looked at, so that servers that start together don't create it twice. "jxrc".
SCHEMA_LOCK = 0x6A787263
# Taken whole by a deletion, and shared by those that write what was put off: neither sees half of the other's work.
DELETION_LOCK = SCHEMA_LOCK + 1
CONNECT_TIMEOUT_S = 5
# Kept open between calls; there are never more than threads that call at once.
IDLE_CONNECTIONS = 16
# A statement that waits longer, say for a lock, fails; the client may try again.
STATEMENT_TIMEOUT_MS = 5_000
SETTINGS = f"-c statement_timeout={STATEMENT_TIMEOUT_MS} -c synchronous_commit=on"


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
            _prepare(connection)
            self._where = f"PostgreSQL {connection.info.host}:{connection.info.port}/{connection.info.dbname}"
        self._damaged = Damaged(self._where)
        self._deferred = DeferredWrites(self._write_deferred)

    def close(self) -> None:
        self._deferred.close()
        self._close_idle()

    def record(self, events: Sequence[UserEvent]) -> list[UserEvent]:
        if not events:
            return []
        # In one order everywhere: two servers that lock the same users don't wait for each other in a circle.
        users = sorted({new.user_id for new in events})
        columns = [list(column) for column in zip(*map(event_row, events), strict=True)]
        with self._connection("cannot be written") as connection:
            connection.execute(
                "INSERT INTO jaxrec.users SELECT user_id, 0, 0 FROM unnest(%s::text[]) AS new (user_id)"
                " ON CONFLICT (user_id) DO UPDATE SET user_id = excluded.user_id",
                [users],
            )
            rows = connection.execute(
                f"INSERT INTO jaxrec.events ({EVENT_COLUMNS}) SELECT {EVENT_COLUMNS} FROM unnest(%s::text[],"
                " %s::text[], %s::text[], %s::float8[], %s::bigint[], %s::text[]) WITH ORDINALITY AS"
                f" new ({EVENT_COLUMNS}, at) ORDER BY at"
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
            connection.execute("DELETE FROM jaxrec.users WHERE user_id = ANY(%s) AND last_arrival = 0", [users])
            new_ids = {event_id for (event_id,) in rows}
            # Of equal ids in one request the first counts.
            first = {new.event_id: new for new in reversed(events)}
            recorded = [new for new in reversed(first.values()) if new.event_id in new_ids]
            damaged = count_events(connection, recorded)
        self._damaged.log(damaged)
        return recorded

    def drop_states(self, keep_versions: Collection[str], most: int) -> int:
        with self._connection("cannot be written") as connection:
            return connection.execute(
                "DELETE FROM jaxrec.states WHERE (user_id, model_version) IN (SELECT user_id, model_version"
                " FROM jaxrec.states WHERE NOT model_version = ANY(%s) LIMIT %s FOR UPDATE SKIP LOCKED)",
                [list(keep_versions), most],
            ).rowcount

    def delete_user(self, user_id: str) -> Deleted:
        self._deferred.discard(user_id)
        with self._connection("cannot be written") as connection:
            connection.execute("SELECT pg_advisory_xact_lock(%s)", [DELETION_LOCK])
            # The lock of `record`: no event can come in between.
            connection.execute("SELECT 1 FROM jaxrec.users WHERE user_id = %s FOR UPDATE", [user_id])
            events = connection.execute("DELETE FROM jaxrec.events WHERE user_id = %s", [user_id]).rowcount
            impressions = connection.execute("DELETE FROM jaxrec.shown WHERE user_id = %s", [user_id]).rowcount
            connection.execute("DELETE FROM jaxrec.states WHERE user_id = %s", [user_id])
            connection.execute("DELETE FROM jaxrec.users WHERE user_id = %s", [user_id])
            connection.execute(
                "DELETE FROM jaxrec.deletions WHERE time < clock_timestamp() - make_interval(secs => %s)", [DELETION_S]
            )
            connection.execute(
                "INSERT INTO jaxrec.deletions VALUES (%s, clock_timestamp())"
                " ON CONFLICT (digest) DO UPDATE SET time = excluded.time",
                [digest(user_id)],
            )
        return Deleted(events, impressions)

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
        with self._connection("cannot be read") as connection:
            return connection.execute(query, parameters).fetchall()

    def _write_deferred(self, impressions: Sequence[Started], states: Sequence[SpilledState]) -> None:
        with self._connection("cannot be written") as connection:
            _insert_impressions(connection, impressions)
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
        try:
            try:
                connection = self._idle.pop()
            except IndexError:
                connection = psycopg.connect(
                    self._location, autocommit=True, connect_timeout=CONNECT_TIMEOUT_S, options=SETTINGS
                )
            try:
                with connection.transaction():
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


def _insert_impressions(connection: psycopg.Connection, impressions: Sequence[Started]) -> None:
    """Leaves out what was recommended to users before they were deleted."""
    connection.execute("SELECT pg_advisory_xact_lock_shared(%s)", [DELETION_LOCK])
    rows = connection.execute(
        "SELECT digest, extract(epoch FROM time)::float8 FROM jaxrec.deletions WHERE digest = ANY(%s)",
        [digests(impressions)],
    ).fetchall()
    (now,) = connection.execute("SELECT extract(epoch FROM clock_timestamp())::float8").fetchone() or (0.0,)
    connection.cursor().executemany(
        f"INSERT INTO jaxrec.shown ({IMPRESSION_COLUMNS}) VALUES ({', '.join(['%s'] * len(Impression._fields))})"
        " ON CONFLICT (recommendation_id) DO NOTHING",
        [impression_row(one) for one in still_wanted(impressions, dict(rows), now)],
    )


def _prepare(connection: psycopg.Connection) -> None:
    """Creates the schema, or checks its version, in the connection's transaction."""
    (fsync,) = connection.execute("SHOW fsync").fetchone() or ("",)
    if fsync != "on":
        raise StoreError("PostgreSQL: runs with fsync = off, so that acknowledged events can be lost; expected on")
    # To bring a large log up to date takes longer than a call may, and so does waiting for another server that does.
    connection.execute("SET LOCAL statement_timeout = 0")
    connection.execute("SELECT pg_advisory_xact_lock(%s)", [SCHEMA_LOCK])
    connection.execute(VERSION_TABLE[0])
    connection.execute(VERSION_TABLE[1])
    row = connection.execute("SELECT version FROM jaxrec.store").fetchone()
    if row is not None and row[0] == SCHEMA_VERSION:
        if connection.execute("SELECT to_regclass('jaxrec.arrivals')").fetchone() == (None,):
            connection.execute(ARRIVALS)
        return
    if row is not None and not 1 <= row[0] < SCHEMA_VERSION:
        raise StoreError(f"PostgreSQL: is a store in version {row[0]}, expected 1..{SCHEMA_VERSION}")
    for step in (*SCHEMA, ARRIVALS):
        connection.execute(step)
    connection.execute("DELETE FROM jaxrec.store")
    connection.execute("INSERT INTO jaxrec.store VALUES (%s)", [SCHEMA_VERSION])
