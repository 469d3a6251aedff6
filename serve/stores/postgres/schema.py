"""The tables of a PostgreSQL store, its questions, and how a store of an earlier version is brought up to date."""

from typing import LiteralString

import psycopg

from serve.stores.base import StoreError
from serve.stores.postgres import items
from serve.stores.postgres.counters import COUNTED_UNTIL, COUNTERS_SCHEMA, TIMES
from serve.stores.rows import EVENT_COLUMNS, SHOWN_ITEM_COLUMNS, SLATE_COLUMNS
from serve.stores.sql import Queries

SCHEMA_VERSION = 9
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
        recommendation_id text,
        type text NOT NULL DEFAULT 'interaction',
        value double precision,
        weight double precision NOT NULL DEFAULT 1
    )""",
    """ALTER TABLE jaxrec.events ADD COLUMN IF NOT EXISTS type text NOT NULL DEFAULT 'interaction',
        ADD COLUMN IF NOT EXISTS value double precision,
        ADD COLUMN IF NOT EXISTS weight double precision NOT NULL DEFAULT 1""",
    # Those of earlier versions had other columns.
    "DROP INDEX IF EXISTS jaxrec.history, jaxrec.neutral, jaxrec.shown_to",
    "CREATE INDEX history ON jaxrec.events (user_id, timestamp, arrival) WHERE weight <> 0",
    "CREATE INDEX neutral ON jaxrec.events (user_id, timestamp, arrival) WHERE weight = 0",
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
    "CREATE INDEX shown_to ON jaxrec.shown (user_id, timestamp)",
    "CREATE INDEX IF NOT EXISTS shown_at ON jaxrec.shown (timestamp)",
    """DELETE FROM jaxrec.shown AS later USING jaxrec.shown AS earlier
        WHERE later.recommendation_id = earlier.recommendation_id AND later.number > earlier.number""",
    "CREATE UNIQUE INDEX IF NOT EXISTS shown_once ON jaxrec.shown (recommendation_id)",
    """CREATE TABLE IF NOT EXISTS jaxrec.shown_items (
        recommendation_id text NOT NULL,
        item_id text NOT NULL,
        position bigint NOT NULL,
        timestamp bigint NOT NULL,
        recorded bigint NOT NULL,
        PRIMARY KEY (recommendation_id, item_id)
    )""",
    "CREATE INDEX IF NOT EXISTS shown_items_at ON jaxrec.shown_items (recorded)",
    """CREATE TABLE IF NOT EXISTS jaxrec.deletions (
        digest text PRIMARY KEY,
        time timestamptz NOT NULL,
        number bigint NOT NULL DEFAULT 0
    )""",
    "ALTER TABLE jaxrec.deletions ADD COLUMN IF NOT EXISTS number bigint NOT NULL DEFAULT 0",
    "CREATE INDEX IF NOT EXISTS deletion_numbers ON jaxrec.deletions (number)",
    """CREATE TABLE IF NOT EXISTS jaxrec.states (
        user_id text NOT NULL,
        model_version text NOT NULL,
        revision bigint NOT NULL,
        state bytea NOT NULL,
        PRIMARY KEY (user_id, model_version)
    )""",
    *COUNTERS_SCHEMA,
    *items.ITEMS_SCHEMA,
)
# No schema version of its own: servers that do not know it can use the store.
ARRIVALS: LiteralString = "CREATE INDEX IF NOT EXISTS arrivals ON jaxrec.events (user_id, arrival)"
_LISTED: LiteralString = (
    f"SELECT arrival, {EVENT_COLUMNS} FROM jaxrec.events WHERE user_id = %s AND weight {{}} 0"
    " AND (timestamp, arrival) < (%s, %s) ORDER BY timestamp DESC, arrival DESC LIMIT %s"
)
QUERIES = Queries(
    life="SELECT first_arrival, last_arrival FROM jaxrec.users WHERE user_id = %s",
    # By arrival, the first reads only what arrived since, neutral events too; the second reads the rows of its answer.
    changes=(
        "SELECT item_id, rating, timestamp, weight FROM jaxrec.events"
        " WHERE user_id = %s AND arrival > %s AND arrival <= %s AND weight <> 0 ORDER BY arrival LIMIT %s"
    ),
    newest=(
        "SELECT item_id, rating, timestamp, weight FROM jaxrec.events"
        " WHERE user_id = %s AND arrival <= %s AND timestamp <= %s AND weight <> 0"
        " ORDER BY timestamp DESC, arrival DESC LIMIT %s"
    ),
    listed=(_LISTED.format("<>"), _LISTED.format("=")),
    recent_slates=(
        "SELECT recommendation_id, item_ids FROM jaxrec.shown WHERE user_id = %s AND timestamp >= %s"
        " ORDER BY timestamp DESC, number DESC LIMIT %s OFFSET %s"
    ),
    recorded=(
        "SELECT event_id FROM jaxrec.events WHERE event_id IN (SELECT value FROM json_array_elements_text(%s::json))"
    ),
    state="SELECT * FROM jaxrec.states WHERE user_id = %s AND model_version = %s",
    state_keys=(
        "SELECT user_id, model_version FROM jaxrec.states WHERE (user_id, model_version) > (%s, %s)"
        " ORDER BY user_id, model_version LIMIT %s"
    ),
    events=(f"SELECT arrival, {EVENT_COLUMNS} FROM jaxrec.events WHERE arrival > %s ORDER BY arrival LIMIT %s"),
    slates=f"SELECT number, {SLATE_COLUMNS} FROM jaxrec.shown WHERE number > %s ORDER BY number LIMIT %s",
    # By the index of times. The least number alone would be looked for from the oldest row on.
    first_slate=(
        "SELECT count(*), min(number) FROM (SELECT number FROM jaxrec.shown WHERE timestamp >= %s"
        " ORDER BY timestamp LIMIT %s) AS newest"
    ),
    shown_items=(
        f"SELECT {SHOWN_ITEM_COLUMNS} FROM jaxrec.shown_items WHERE (recommendation_id, item_id) > (%s, %s)"
        " ORDER BY recommendation_id, item_id LIMIT %s"
    ),
    last_deletion="SELECT coalesce(max(number), 0) FROM jaxrec.deletions",
    times=TIMES,
    counted_until=COUNTED_UNTIL,
    changed_items=items.CHANGED,
    item_marks=items.MARKS,
    item=items.ITEM,
    listed_items=items.LISTED,
)
# Taken while the schema is looked at, so that servers that start together don't create it twice. "jxrc".
SCHEMA_LOCK = 0x6A787263
# Taken whole by a deletion, and shared by those that write what was put off: neither sees half of the other's work.
DELETION_LOCK = SCHEMA_LOCK + 1


def prepare(connection: psycopg.Connection) -> None:
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
