"""What every store promises: order, ids that count once, revisions, deletion, and recovery from a lost server."""

import itertools
import json
import random
import re
import select
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TypeVar

import psycopg
import pytest
import redis

from jaxrec.data.prepared import PreparedData
from jaxrec.rl.served.event_store import UNNOTED, read_served_log
from serve.api.rules import MAX_ID_LENGTH
from serve.model.events import Event
from serve.stores import open_store
from serve.stores.base import Changes, Deleted, EventStore, Slate, SpilledState, StoreError, UserEvent, digest
from serve.stores.copy import copy_log
from serve.stores.postgres.schema import QUERIES, SCHEMA_LOCK
from serve.stores.redis import server as checked_server
from serve.stores.redis.scripts import LOG_SLATE, UPDATE_SLATES
from serve.stores.redis.user_scripts import DELETE_USER
from serve.stores.sqlite.schema import SCHEMA_VERSION
from serve.stores.sqlite.store import SQLiteStore
from tests.serve.stores.databases import (
    DEADLINE_S,
    DatabaseServer,
    NotInstalled,
    postgres_server,
    redis_server,
    wait_until,
)
from tests.serve.stores.slates import log_now, slates_of

T = TypeVar("T")
KINDS = ("sqlite", "postgres", "redis")
SERVERS = {"postgres": postgres_server, "redis": redis_server}
SLATE = Slate(
    *("r1", "u", ("a", "ü"), (-1.25, -0.5), "reinforce", "v1", 1_700_000_000),
    temperature=0.1,
    request_time=2**63 - 1,
    excluded_item_ids=("ß", "b"),
    trend_time=1_700_000_003,
    trend_arrival=2**63 - 1,
    request_options=("filter", "seen"),
)
# What servers noted before they noted the request's options, which trend ranked it, and how it was drawn.
NOTED_WITHOUT_OPTIONS = SLATE._replace(request_options=())
NOTED_WITHOUT_TREND = NOTED_WITHOUT_OPTIONS._replace(trend_time=None, trend_arrival=None)
NOTED_BEFORE = NOTED_WITHOUT_TREND._replace(temperature=None, request_time=None, excluded_item_ids=())
NEW_COLUMNS = ("temperature", "request_time", "excluded_item_ids", "trend_time", "trend_arrival", "request_options")
# As `serve` wrote it, without the parts that did not change.
SQLITE_3 = """
CREATE TABLE events (
    arrival INTEGER PRIMARY KEY AUTOINCREMENT,
    event_id TEXT NOT NULL UNIQUE,
    user_id TEXT NOT NULL,
    item_id TEXT NOT NULL,
    rating REAL,
    timestamp INTEGER NOT NULL,
    recommendation_id TEXT
) STRICT;
CREATE TABLE shown (
    number INTEGER PRIMARY KEY,
    recommendation_id TEXT NOT NULL,
    user_id TEXT,
    item_ids TEXT NOT NULL,
    log_propensities TEXT NOT NULL,
    policy TEXT NOT NULL,
    model_version TEXT NOT NULL,
    timestamp INTEGER NOT NULL
) STRICT;
CREATE INDEX shown_to ON shown (user_id);
CREATE UNIQUE INDEX shown_once ON shown (recommendation_id);
INSERT INTO events VALUES (7, '1', 'u', 'i', NULL, 0, NULL);
INSERT INTO shown VALUES (4, 'r1', 'u', '["a", "ü"]', '[-1.25, -0.5]', 'reinforce', 'v1', 1700000000);
PRAGMA application_id = 1786278499;
PRAGMA user_version = 3;
"""


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, DatabaseServer]]:
    """Those that a test asked for; each is started once."""
    with ExitStack() as stack:
        started = _Started(stack)
        yield started


class _Started(dict[str, DatabaseServer]):
    def __init__(self, stack: ExitStack) -> None:
        super().__init__()
        self._stack = stack

    def __missing__(self, kind: str) -> DatabaseServer:
        try:
            self[kind] = self._stack.enter_context(SERVERS[kind]())
        except NotInstalled as error:
            pytest.skip(str(error))
        return self[kind]


def emptied(kind: str, servers: dict[str, DatabaseServer], folder: Path) -> str:
    """The location of a store with nothing in it."""
    if kind == "sqlite":
        return str(folder / "events.sqlite")
    location = servers[kind].location
    if kind == "postgres":
        with psycopg.connect(location) as connection:
            connection.execute("DROP SCHEMA IF EXISTS jaxrec CASCADE")
    else:
        with redis.Redis.from_url(location) as client:
            client.flushall()
    return location


@pytest.fixture(params=KINDS)
def location(request: pytest.FixtureRequest, servers: dict[str, DatabaseServer], tmp_path: Path) -> str:
    return emptied(request.param, servers, tmp_path)


@pytest.fixture
def store(location: str) -> Iterator[EventStore]:
    with open_store(location) as opened:
        yield opened


def user_event(event_id: str, item_id: str = "i", timestamp: int = 0, user_id: str = "u") -> UserEvent:
    return UserEvent(event_id, user_id, Event(item_id, None, timestamp))


def test_history_is_ordered_by_time_then_arrival(store: EventStore) -> None:
    store.record([user_event("1", "c", 20), user_event("2", "a", 10)])
    store.record([user_event("3", "b", 10), user_event("4", "other", 5, user_id="v")])
    assert store.history("u") == [Event("a", None, 10), Event("b", None, 10), Event("c", None, 20)]
    assert store.history("u", until=19) == [Event("a", None, 10), Event("b", None, 10)]
    assert store.history("u", until=9) == []
    assert store.history("nobody") == []


def test_what_is_stored_comes_back_after_reopening(location: str) -> None:
    events = [Event("i", 3.5, 0), Event('ü"\n[:%s', None, 2**63 - 1)]
    with open_store(location) as store:
        store.record([UserEvent(f"e {at}", "u:%", event, "r1") for at, event in enumerate(events)])
        store.log_slate(SLATE)
        assert store.history("u:%") == events
    with open_store(location) as store:
        assert store.history("u:%") == events
        assert slates_of(store, "u") == [SLATE]


@pytest.mark.parametrize("kind", KINDS)
def test_several_open_a_new_store_at_once(kind: str, servers: dict[str, DatabaseServer], tmp_path: Path) -> None:
    """As the processes of a server do; where this was wrong, one in twenty did not open."""
    together = threading.Barrier(3)

    def open_it(location: str) -> bool:
        together.wait(DEADLINE_S)
        with open_store(location) as store:
            return store.history("u") == []

    with ThreadPoolExecutor(together.parties) as threads:
        for number in range(60 if kind == "sqlite" else 5):
            folder = tmp_path / str(number)
            folder.mkdir()
            location = emptied(kind, servers, folder)
            assert all(threads.map(open_it, [location] * together.parties))


def test_the_longest_ids_fit_every_index(store: EventStore) -> None:
    """Four bytes of UTF-8 a character, drawn so that an index cannot compress them."""
    chance = random.Random(0)
    event_id, user_id, item_id, version = (
        "".join(chr(chance.randrange(0x10000, 0x110000)) for _ in range(MAX_ID_LENGTH)) for _ in range(4)
    )
    store.record([user_event(event_id, item_id, 5, user_id)])
    store.log_slate(SLATE._replace(recommendation_id=event_id, user_id=user_id))
    state = SpilledState(user_id, version[:128], store.revision(user_id), b"x")
    store.save_states([state])
    store.flush()
    assert store.history(user_id) == [Event(item_id, None, 5)]
    assert store.load_state(user_id, state.model_version) == state
    assert store.delete_user(user_id) == Deleted(1, 1)


def test_recorded_ids_are_those_of_stored_events_of_any_user(store: EventStore) -> None:
    store.record([user_event("1"), user_event('ü"\n', user_id="v"), user_event("3")])
    store.delete_events("u", ["3"])
    asked = ["1", "2", "3", 'ü"\n', *(f"none {at}" for at in range(10_000))]
    assert store.recorded_ids(asked) == {"1", 'ü"\n'}
    assert store.recorded_ids([]) == set()


def test_an_event_id_counts_once(store: EventStore) -> None:
    first = user_event("1", "first")
    assert store.record([first, user_event("1", "same request")]) == [first]
    assert store.record([user_event("1", "later", user_id="v")]) == []
    assert store.record([user_event("0"), user_event("1"), user_event("2")]) == [user_event("0"), user_event("2")]
    assert store.record([]) == []
    assert [event.item_id for event in store.history("u")] == ["first", "i", "i"]
    assert store.history("v") == []
    assert store.revision("v") == 0


def test_revision_changes_with_every_new_event_of_the_user_and_with_nothing_else(store: EventStore) -> None:
    assert store.revision("u") == 0
    seen = [0]
    for at in range(3):
        store.record([user_event(str(at))])
        seen.append(store.revision("u"))
    assert seen == sorted(set(seen))
    store.record([user_event("2"), user_event("v", user_id="v")])
    log_now(store, SLATE)
    assert store.revision("u") == seen[-1]
    store.delete_user("u")
    assert store.revision("u") == 0
    store.record([user_event("0")])
    assert store.revision("u") > seen[-1]


def test_revisions_of_several_users_are_those_of_each(store: EventStore) -> None:
    store.record([user_event("1"), user_event("2", user_id="v"), user_event("3", user_id="v")])
    users = ["v", "nobody", "u"]
    assert store.revisions(users) == {user: store.revision(user) for user in users}
    assert store.revisions([]) == {}
    assert store.revisions_at_once(users) in (store.revisions(users), None)


def test_revisions_at_once_are_never_old(location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever store writes, and however many users were asked for before."""
    monkeypatch.setattr("serve.stores.sqlite.store.MOST_REVISIONS", 2)
    users = [f"u{number}" for number in range(4)]
    with open_store(location) as store, open_store(location) as other:

        def check(of: Sequence[str]) -> None:
            assert store.revisions_at_once(of) in ({user: store.revision(user) for user in of}, None)

        for number, writer in enumerate([store, other, store, other]):
            for user in users:
                writer.record([user_event(f"{number} {user}", user_id=user)])
                check([user])
            check(users)
            writer.delete_user(users[number])
            check(users)
            check([users[number]])
        assert isinstance(store, SQLiteStore) == (store.revisions_at_once(users) is not None)


def test_changes_since_a_revision(store: EventStore) -> None:
    assert store.changes("u") == Changes(0, [], complete=True)
    assert store.changes("u", 7) == Changes(0, [], complete=True)
    store.record([user_event("1", "a", 10), user_event("2", "b", 30)])
    first = store.revision("u")
    assert store.changes("u") == Changes(first, [Event("a", None, 10), Event("b", None, 30)], complete=True)
    assert store.changes("u", first) == Changes(first, [], complete=False)
    store.record([user_event("3", "d", 40), user_event("4", "late", 20)])
    second = store.revision("u")
    assert store.changes("u", first) == Changes(second, [Event("late", None, 20), Event("d", None, 40)], complete=False)
    store.delete_user("u")
    assert store.changes("u", second) == Changes(0, [], complete=True)
    store.record([user_event("5", "new life", 5)])
    for since in (0, first, second):
        assert store.changes("u", since) == Changes(store.revision("u"), [Event("new life", None, 5)], complete=True)


def test_slates_are_kept_by_user_in_order(store: EventStore) -> None:
    anonymous = Slate("r3", None, (), (), "popularity", "v1", 5)
    for one in (SLATE, SLATE._replace(recommendation_id="r2", user_id="v"), anonymous):
        store.log_slate(one)
    store.flush()
    assert slates_of(store, "u") == [SLATE]
    assert [one.recommendation_id for one in slates_of(store, "v")] == ["r2"]
    assert slates_of(store, None) == [anonymous]
    log_now(store, SLATE._replace(recommendation_id="r4"))
    assert [one.recommendation_id for one in slates_of(store, "u")] == ["r1", "r4"]
    assert store.dropped_count == 0


def dropped(store: EventStore, keep_versions: Sequence[str], most: int) -> list[int]:
    """How many states each step of a whole sweep drops."""
    counts, place = [], None
    while not counts or place is not None:
        count, place = store.drop_states(keep_versions, most, place)
        counts.append(count)
    return counts


def test_states_are_kept_by_user_and_model_version(store: EventStore) -> None:
    store.record([user_event("1"), user_event("2", user_id="v")])
    revision = store.revision("u")
    states = [SpilledState("u", version, revision, b"\0\xff" + version.encode()) for version in ("v1", "v2")]
    store.save_states([*states, SpilledState("v", "v1", store.revision("v"), b"")])
    store.flush()
    assert [store.load_state("u", version) for version in ("v1", "v2", "v3")] == [*states, None]
    later = states[0]._replace(state=b"later")
    store.save_states([later])
    store.flush()
    assert store.load_state("u", "v1") == later
    assert sum(dropped(store, ["v2"], 1)) == 2
    assert sum(dropped(store, ["v2"], 10)) == 0
    assert [store.load_state("u", version) for version in ("v1", "v2")] == [None, states[1]]
    assert sum(dropped(store, [], 10)) == 1


def test_nothing_of_a_deleted_user_is_left(store: EventStore, location: str) -> None:
    store.record([user_event("1"), user_event("2"), user_event("3", user_id="v")])
    revision = store.revision("u")
    log_now(store, SLATE)
    store.save_states([SpilledState("u", "v1", revision, b"x")])
    store.flush()
    # Still to be written when the deletion comes.
    store.log_slate(SLATE)
    store.save_states([SpilledState("u", "v2", revision, b"x")])
    assert store.delete_user("u") == Deleted(event_count=2, slate_count=1)
    # A state that a cache spills afterwards has no user any more, also when the user comes back.
    store.save_states([SpilledState("u", "v3", revision, b"x")])
    store.flush()
    store.record([user_event("1")])
    store.save_states([SpilledState("u", "v4", revision, b"x")])
    store.flush()
    assert [store.load_state("u", version) for version in ("v1", "v2", "v3", "v4")] == [None] * 4
    assert slates_of(store, "u") == []
    assert store.history("u") == [Event("i", None, 0)]
    assert len(store.history("v")) == 1
    assert store.delete_user("nobody") == Deleted(0, 0)


def test_what_another_server_has_still_to_write_does_not_bring_a_deleted_user_back(location: str) -> None:
    with open_store(location) as one, open_store(location) as other:
        one.record([user_event("1")])
        other.log_slate(SLATE)
        other.log_slate(SLATE._replace(recommendation_id="r2", user_id="v"))
        other.save_states([SpilledState("u", "v1", other.revision("u"), b"x")])
        started = time.monotonic()
        one.delete_user("u")
        # Under way when the user was deleted, however long they take to be answered and logged.
        other.log_slate(SLATE._replace(recommendation_id="r3"), started=started)
        other.log_slate(SLATE._replace(recommendation_id="r4"), started=started - 60)
        log_now(other, SLATE._replace(recommendation_id="r5"), started=started)
        log_now(one, SLATE._replace(recommendation_id="r6"), started=started)
        other.flush()
        assert slates_of(other, "u") == []
        assert [shown.recommendation_id for shown in slates_of(one, "v")] == ["r2"]
        one.record([user_event("1")])
        assert other.load_state("u", "v1") is None
        # Who comes back, say half a second later, is a user like any other.
        later = time.monotonic() + 0.5
        log_now(other, SLATE._replace(recommendation_id="r7"), started=later)
        one.log_slate(SLATE._replace(recommendation_id="r8"), started=later)
        one.flush()
        assert [shown.recommendation_id for shown in slates_of(other, "u")] == ["r7", "r8"]
        assert (one.dropped_count, other.dropped_count) == (0, 0)


@pytest.mark.parametrize("jump_s", [3_600.0, -3_600.0, 10 * 86_400.0])
def test_a_clock_that_is_set_brings_no_deleted_user_back_and_drops_nobody_else(
    jump_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    location, clock = tmp_path / "s", time.time
    with open_store(location) as one, open_store(location) as other:
        one.record([user_event("1")])
        other.log_slate(SLATE)
        one.delete_user("u")
        monkeypatch.setattr(time, "time", lambda: clock() + jump_s)
        one.delete_user("v")
        other.flush()
        assert slates_of(one, "u") == []
        for store, name in ((one, "r2"), (other, "r3")):
            log_now(store, SLATE._replace(recommendation_id=name))
        assert [slate.recommendation_id for slate in slates_of(one, "u")] == ["r2", "r3"]


def test_deletions_that_are_forgotten_leave_the_numbers_of_later_ones_growing(
    store: EventStore, location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("sqlite.users", "postgres.users", "redis.store"):
        monkeypatch.setattr(f"serve.stores.{module}.MOST_DELETIONS", 1)
    with open_store(location) as other:
        for number, user_id in enumerate(("u", "v", "w")):
            slate = SLATE._replace(user_id=user_id)
            other.log_slate(slate._replace(recommendation_id=f"before {number}"))
            store.delete_user(user_id)
            other.flush()
            log_now(other, slate._replace(recommendation_id=f"after {number}"))
            assert [one.recommendation_id for one in slates_of(store, user_id)] == [f"after {number}"]


def test_states_that_stay_keep_no_writer_waiting(tmp_path: Path) -> None:
    """Another process writes meanwhile."""
    with open_store(tmp_path / "s") as store:
        assert isinstance(store, SQLiteStore)
        store.record([user_event("1")])
        store.save_states([SpilledState("u", "v1", store.revision("u"), b"x")])
        store.flush()
        store._writer.execute("PRAGMA busy_timeout = 0")
        with closing(sqlite3.connect(tmp_path / "s", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            assert store.drop_states(["v1"], 10) == (0, None)
            with pytest.raises(StoreError, match="locked"):
                store.drop_states([], 10)


def test_a_store_that_is_closed_refuses_reads_and_writes(tmp_path: Path) -> None:
    """Of calls that were cut off."""
    with open_store(tmp_path / "s") as store:
        pass
    with pytest.raises(StoreError, match="cannot be written: it is closed"):
        store.record([user_event("1")])
    with ThreadPoolExecutor(1) as threads, pytest.raises(StoreError, match="cannot be read: it is closed"):
        threads.submit(store.history, "u").result()


def test_a_thread_that_has_read_before_the_store_is_closed_is_refused_as_well(tmp_path: Path) -> None:
    threads = ThreadPoolExecutor(1)
    with open_store(tmp_path / "s") as store:
        assert threads.submit(store.history, "u").result() == []
    with pytest.raises(StoreError, match="cannot be read: it is closed"):
        threads.submit(store.history, "u").result(timeout=10)
    threads.shutdown()


def test_postgres_calls_with_the_same_new_ids_in_any_order_wait_in_no_circle(
    servers: dict[str, DatabaseServer], tmp_path: Path
) -> None:
    location = emptied("postgres", servers, tmp_path)
    ids = ["a", "m", "z"]
    with ThreadPoolExecutor(2) as threads, open_store(location) as store, psycopg.connect(location) as holder:
        holder.execute(
            "INSERT INTO jaxrec.events (event_id, user_id, item_id, timestamp) VALUES ('m', 'holder', 'i', 0)"
        )
        calls = [
            threads.submit(store.record, [user_event(event_id, user_id=f"{user} {event_id}") for event_id in order])
            for user, order in (("one", ids), ("other", ids[::-1]))
        ]

        def both_wait() -> None:
            with psycopg.connect(location) as look:
                waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
                assert look.execute(waiting).fetchone() == (2,)

        wait_until(both_wait, lambda: not any(call.done() for call in calls))
        holder.rollback()
        assert sorted(one.event_id for call in calls for one in call.result(DEADLINE_S)) == ids
        # In the order of the call, which says which of two events of the same time came first.
        store.record([user_event(event_id, event_id) for event_id in ("y", "x")])
        assert [event.item_id for event in store.history("u")] == ["y", "x"]


def test_postgres_is_connected_to_without_options_which_poolers_refuse(
    servers: dict[str, DatabaseServer], tmp_path: Path
) -> None:
    with open_store(emptied("postgres", servers, tmp_path)) as store:
        with store._connection("cannot be read") as connection:  # type: ignore[attr-defined]
            assert not connection.info.options
            assert connection.execute("SHOW statement_timeout").fetchone() == ("5s",)
        # It is for this transaction alone: a pooler lends the connection to others.
        assert connection.execute("SHOW statement_timeout").fetchone() == ("0",)


class Relay:
    """Between a database and one client, counting how often the client waits for an answer."""

    def __init__(self, port: int) -> None:
        self.waits = 0
        self._upstream = socket.create_connection(("127.0.0.1", port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._listener.settimeout(DEADLINE_S)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        client, _ = self._listener.accept()
        others, answered = {client: self._upstream, self._upstream: client}, True
        with self._listener, client, self._upstream:
            while True:
                for one in select.select(list(others), (), ())[0]:
                    content = one.recv(2**16)
                    if not content:
                        return
                    self.waits += one is client and answered
                    answered = one is not client
                    others[one].sendall(content)

    def join(self) -> None:
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()


def test_a_read_waits_once_for_postgres(servers: dict[str, DatabaseServer], tmp_path: Path) -> None:
    location = emptied("postgres", servers, tmp_path)
    with open_store(location) as store:
        store.record([user_event("e", "a"), user_event("f", "b")._replace(user_id="w")])
    port = int(location.rpartition(":")[2].partition("/")[0])
    relay = Relay(port)
    with open_store(location.replace(f":{port}/", f":{relay.port}/")) as store:
        store.revision("u")
        waits = relay.waits
        assert store.revisions(["u", "w", "x"]) == {"u": 1, "w": 2, "x": 0}
        assert [event.item_id for event in store.history("u")] == ["a"]
        assert relay.waits == waits + 2
    relay.join()


def test_a_read_of_postgres_that_takes_too_long_fails_and_the_next_one_works(
    servers: dict[str, DatabaseServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.stores.postgres.store.STATEMENT_TIMEOUT_MS", "100")
    location = emptied("postgres", servers, tmp_path)
    with open_store(location) as store, psycopg.connect(location) as other:
        store.record([user_event("e", "a")])
        other.execute("LOCK TABLE jaxrec.users")
        with pytest.raises(StoreError, match="statement timeout"):
            store.revision("u")
        other.rollback()
        assert store.revision("u") == 1


def test_a_recommendation_is_logged_once(store: EventStore) -> None:
    """As when the answer to a commit is lost, and what was put off is written again."""
    log_now(store, SLATE)
    store.log_slate(SLATE)
    store.log_slate(SLATE._replace(recommendation_id="r2"))
    store.log_slate(SLATE._replace(recommendation_id="r2"))
    store.flush()
    assert [shown.recommendation_id for shown in slates_of(store, "u")] == ["r1", "r2"]
    assert store.delete_user("u").slate_count == 2


def test_what_cannot_be_written_does_not_hold_up_the_rest(store: EventStore) -> None:
    """Bad for the encoder or for the database; it is dropped and counted, and the thread that writes goes on."""
    store.record([user_event("1")])
    bad: list[Slate | SpilledState] = [
        SLATE._replace(recommendation_id="b1", item_ids=(b"bytes",)),  # type: ignore[arg-type]
        SLATE._replace(recommendation_id="b2", policy=object()),  # type: ignore[arg-type]
        SpilledState("u", "v1", store.revision("u"), object()),  # type: ignore[arg-type]
    ]
    for number, one in enumerate(bad):
        if isinstance(one, Slate):
            store.log_slate(one)
        else:
            store.save_states([one])
        store.log_slate(SLATE._replace(recommendation_id=f"r{number}"))

    def assert_written() -> None:
        assert [shown.recommendation_id for shown in slates_of(store, "u")] == ["r0", "r1", "r2"]
        assert store.dropped_count == 3

    wait_until(assert_written)
    store.log_slate(SLATE._replace(recommendation_id="r3"))
    wait_until(lambda: assert_last(store, "r3"))


def assert_last(store: EventStore, recommendation_id: str) -> None:
    assert slates_of(store, "u")[-1].recommendation_id == recommendation_id


def test_of_a_user_with_very_many_events_the_newest_count(store: EventStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("sql", "redis.store"):
        monkeypatch.setattr(f"serve.stores.{module}.MOST_EVENTS", 5)
    changes = partial(store.changes, most=5)
    store.record([user_event(str(at), f"i{at}", 100 - at) for at in range(4)])
    few = store.revision("u")
    assert len(changes("u").events) == 4
    store.record([user_event(f"later {at}", f"later {at}", 200 + at) for at in range(4)])
    newest = [Event("i0", None, 100), *(Event(f"later {at}", None, 200 + at) for at in range(4))]
    assert store.history("u") == newest
    assert store.history("u", until=200) == [*(Event(f"i{at}", None, 100 - at) for at in (3, 2, 1, 0)), newest[1]]
    assert changes("u") == Changes(store.revision("u"), newest, complete=True)
    assert changes("u", few) == Changes(store.revision("u"), newest[1:], complete=False)
    store.record([user_event(f"last {at}", "last", 300 + at) for at in range(6)])
    # Too many to take in one by one.
    last = [Event("last", None, 300 + at) for at in range(1, 6)]
    assert changes("u", few) == Changes(store.revision("u"), last, complete=True)
    # The log has them all.
    assert sum(len(part) for part in store.all_events()) == 14


def test_changes_of_a_user_with_very_many_events_cost_what_they_are(tmp_path: Path) -> None:
    """Counted in steps of SQLite's virtual machine, also where the store comes from a server without the index."""
    path = tmp_path / "events.sqlite"
    with open_store(path) as store:
        store.record([user_event(str(at), timestamp=at) for at in range(20_000)])
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP INDEX arrivals")
    with SQLiteStore(path) as store:
        known = store.revision("u")
        store.record([user_event("new", "new", 5)])
        hundreds = 0

        def count() -> None:
            nonlocal hundreds
            hundreds += 1

        store._reader().connection.set_progress_handler(count, 100)
        assert store.changes("u", known).events == [Event("new", None, 5)]
        assert hundreds < 5
        assert len(store.changes("u", 0, 10).events) == len(store.changes("u", 1, 10).events) == 10
        assert hundreds < 20


def test_changes_in_postgres_use_the_order_of_arrival(servers: dict[str, DatabaseServer], tmp_path: Path) -> None:
    location = emptied("postgres", servers, tmp_path)
    with open_store(location) as store:
        store.record([user_event(str(at), timestamp=at) for at in range(10_000)])
        store.record([user_event(f"v{at}", user_id=f"v{at}") for at in range(10_000)])
    with psycopg.connect(location) as connection:
        connection.execute("DROP INDEX jaxrec.arrivals")
    open_store(location).close()
    with psycopg.connect(location) as connection:
        connection.execute("ANALYZE jaxrec.events")
        # Whatever the parameters: what a server asks often is planned once.
        connection.execute("SET LOCAL plan_cache_mode = force_generic_plan")
        connection.execute(f"PREPARE changes (text, bigint, bigint, bigint) AS {numbered(QUERIES.changes)}")
        for arrivals in ("9999, 10000", "5, 10000"):
            rows = connection.execute(f"EXPLAIN EXECUTE changes ('u', {arrivals}, 10000)").fetchall()
            plan = "\n".join(line for (line,) in rows)
            assert re.search("Index Scan using arrivals .*\n +Index Cond: .*user_id = .*arrival > ", plan), plan
            assert "Filter" not in plan.replace("Filter: (weight <> ", "")


def numbered(query: str) -> str:
    """With $1, $2, ... for what psycopg writes %s."""
    numbers = itertools.count(1)
    return re.sub("%s", lambda _: f"${next(numbers)}", query)


def test_the_log_is_copied_into_one_file(store: EventStore, location: str, tmp_path: Path) -> None:
    events = [user_event(f"e{at}", f"i{at}", at, user_id=f"u{at % 3}") for at in range(10)]
    events[4] = events[4]._replace(recommendation_id="r1", event=Event("ü", 2.5, 4))
    store.record(events)
    log_now(store, SLATE)
    log_now(store, SLATE._replace(recommendation_id="r2", user_id=None))
    command = [sys.executable, "-m", "serve", "log", location, str(tmp_path / "log.sqlite")]
    for _ in range(2):
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (ended.returncode, ended.stdout) == (
            0,
            f"{tmp_path / 'log.sqlite'}: 10 events, 2 recommendations\n",
        ), ended.stderr
    assert [path.name for path in tmp_path.iterdir() if "log" in path.name] == ["log.sqlite"]
    with open_store(tmp_path / "log.sqlite") as copy:
        assert [event for part in copy.all_events() for event in part] == sorted(
            event for part in store.all_events() for event in part
        )
        assert [copy.history(f"u{user}") for user in range(3)] == [store.history(f"u{user}") for user in range(3)]
        assert copy.revision("u1") == store.revision("u1")
        assert (slates_of(copy, "u"), slates_of(copy, None)) == (
            slates_of(store, "u"),
            slates_of(store, None),
        )


def test_a_slate_during_a_copy_has_its_events_in_it(
    store: EventStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or isn't in it: what comes when the copy has all events, or all that was shown, is shown and answered at once."""

    def show_and_answer(name: str) -> None:
        log_now(store, SLATE._replace(recommendation_id=name))
        store.record([user_event(name)._replace(recommendation_id=name)])

    def meanwhile(rows: Callable[[], Iterator[T]], name: str) -> Iterator[T]:
        yield from rows()
        show_and_answer(name)

    show_and_answer("r1")
    monkeypatch.setattr(store, "all_events", partial(meanwhile, store.all_events, "after events"))
    monkeypatch.setattr(store, "all_slates", partial(meanwhile, store.all_slates, "after shown"))
    copy_log(store, tmp_path / "log.sqlite")
    monkeypatch.undo()
    with open_store(tmp_path / "log.sqlite") as copy:
        shown = {one.recommendation_id for one in slates_of(copy, "u")}
        answered = {new.recommendation_id for part in copy.all_events() for _, new in part}
    assert {"r1"} <= shown <= answered
    assert {one.recommendation_id for one in slates_of(store, "u")} == {"r1", "after events", "after shown"}


def test_many_threads_of_two_servers_write_and_read(location: str) -> None:
    """Each event is sent by two threads and counts for one; a thread reads what it wrote; no revision is missed."""
    start = threading.Barrier(8)

    def write(thread: int) -> int:
        store = stores[thread % 2]
        user = str(thread // 2)
        start.wait()
        recorded = 0
        for at in range(25):
            event = user_event(f"{user}-{at}", user_id=user, timestamp=at)
            shared = user_event(f"shared-{thread}-{at}", user_id="shared", timestamp=at)
            # The users of a request in either order must not lock each other out.
            recorded += len(store.record([shared, event] if thread % 3 else [event, shared]))
            assert event.event in store.history(user)
        return recorded

    with open_store(location) as one, open_store(location) as two, ThreadPoolExecutor(8) as threads:
        stores = (one, two)
        following = threads.submit(follow, one, "shared", 8 * 25)
        counts = [threads.submit(write, thread) for thread in range(7)]
        last = write(7)
        assert sum(count.result() for count in counts) + last == 4 * 25 + 8 * 25
        for user in range(4):
            assert [event.timestamp for event in one.history(str(user))] == list(range(25))
        assert following.result() == one.history("shared")


def follow(store: EventStore, user_id: str, count: int) -> list[Event]:
    """The history of a user who is being written to, put together from changes until it has so many events."""
    known: list[Event] = []
    revision = 0
    end = time.monotonic() + DEADLINE_S
    while len(known) < count:
        assert time.monotonic() < end, f"only {len(known)} events of {count} came"
        changes = store.changes(user_id, revision)
        assert changes.complete == (revision == 0)
        known += changes.events
        revision = changes.revision
    return sorted(known, key=lambda event: event.timestamp)


@pytest.mark.parametrize("kind", SERVERS)
@pytest.mark.parametrize("kill", [False, True], ids=["stopped", "killed"])
def test_a_database_that_comes_back_has_what_was_acknowledged(
    kind: str, kill: bool, servers: dict[str, DatabaseServer], tmp_path: Path
) -> None:
    server = servers[kind]
    with open_store(emptied(kind, servers, tmp_path)) as store, ThreadPoolExecutor(4) as threads:
        acknowledged = [threads.submit(record_until_failure, store, str(user)) for user in range(4)]
        wait_until(lambda: assert_recorded(store, 4))
        server.stop(kill=kill)
        counts = [one.result(DEADLINE_S) for one in acknowledged]
        with pytest.raises(StoreError, match="cannot be written"):
            store.record([user_event("down")])
        with pytest.raises(StoreError, match="cannot be read"):
            store.history("0")
        # Kept until the database is there again.
        store.log_slate(SLATE)
        with pytest.raises(StoreError, match="cannot be written"):
            store.flush()
        server.start()
        wait_until(lambda: store.record([user_event("up", user_id="v")]))
        for user, count in enumerate(counts):
            # The event that was under way may be there; sent again it counts once.
            assert count <= len(store.history(str(user))) <= count + 1
            store.record([user_event(f"{user}-{count}", user_id=str(user))])
            assert len(store.history(str(user))) == count + 1
        store.flush()
        assert slates_of(store, "u") == [SLATE]


def record_until_failure(store: EventStore, user: str) -> int:
    """How many events of a user were acknowledged."""
    end = time.monotonic() + DEADLINE_S
    for count in itertools.count():
        assert time.monotonic() < end, "the store does not fail"
        try:
            store.record([user_event(f"{user}-{count}", user_id=user)])
        except StoreError:
            return count
    raise AssertionError


def assert_recorded(store: EventStore, users: int) -> None:
    for user in range(users):
        assert len(store.history(str(user))) >= 5


@pytest.mark.parametrize(
    ("options", "durable", "message"),
    [
        ((), False, "came appendonly no; set it to yes"),
        (("--appendfsync", "everysec"), True, "set appendfsync to always, or use Redis 7.2"),
        (("--maxmemory-policy", "allkeys-lru"), True, "came maxmemory-policy allkeys-lru; set it to noeviction"),
    ],
)
def test_a_redis_that_forgets_is_refused(options: tuple[str, ...], durable: bool, message: str) -> None:
    try:
        with redis_server(*options, durable=durable) as server:
            if "everysec" in options:
                with redis.Redis.from_url(server.location) as client:
                    version = [int(part) for part in client.info()["redis_version"].split(".")[:2]]
                if version >= [7, 2]:
                    pytest.skip("this Redis can be asked to wait")
            with pytest.raises(StoreError, match=message):
                open_store(server.location)
    except NotInstalled as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("kind", KINDS)
def test_a_store_of_before_is_brought_up_to_date(kind: str, servers: dict[str, DatabaseServer], tmp_path: Path) -> None:
    """It has some recommendations twice, and no means against it."""
    location = emptied(kind, servers, tmp_path)
    with open_store(location) as store:
        store.record([user_event("1")])
        for name in ("r1", "r2"):
            log_now(store, SLATE._replace(recommendation_id=name))
        log_now(store, SLATE._replace(recommendation_id="r3", user_id=None))
    twice = (
        "INSERT INTO {0} (recommendation_id, user_id, item_ids, log_propensities, policy, model_version, timestamp)"
        " SELECT recommendation_id, user_id, item_ids, log_propensities, policy, model_version, timestamp FROM {0}"
    )
    if kind == "sqlite":
        with closing(sqlite3.connect(location, isolation_level=None)) as connection:
            for step in ("DROP INDEX shown_once", "DROP TABLE deletions", twice.format("shown")):
                connection.execute(step)
            for column in NEW_COLUMNS:
                connection.execute(f"ALTER TABLE shown DROP COLUMN {column}")
            connection.execute("PRAGMA user_version = 2")
    elif kind == "postgres":
        with psycopg.connect(location) as connection:
            steps = (
                "DROP INDEX jaxrec.shown_once",
                "DROP TABLE jaxrec.deletions",
                "UPDATE jaxrec.store SET version = 1",
            )
            for step in (*steps, twice.format("jaxrec.shown")):
                connection.execute(step)
            for column in NEW_COLUMNS:
                connection.execute(f"ALTER TABLE jaxrec.shown DROP COLUMN {column}")
    else:
        with redis.Redis.from_url(location) as client:
            client.set("jaxrec:version", "1")
            client.delete("jaxrec:shown_ids")
            client.rpush("jaxrec:shown:u", json.dumps(SLATE[:7]))
    with open_store(location) as store:
        assert store.history("u") == [Event("i", None, 0)]
        log_now(store, SLATE)
        assert [shown.recommendation_id for shown in slates_of(store, "u")] == ["r1", "r2"]
        assert [shown.recommendation_id for shown in slates_of(store, None)] == ["r3"]
        assert store.delete_user("u") == Deleted(1, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_store_that_did_not_note_how_it_drew_is_brought_up_to_date(
    kind: str, servers: dict[str, DatabaseServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has is not taken for drawn, and its servers do not open it any more: they would not understand it."""
    location = emptied(kind, servers, tmp_path)
    if kind == "sqlite":
        with closing(sqlite3.connect(location)) as connection:
            connection.executescript(SQLITE_3)
    else:
        with open_store(location) as store:
            store.record([user_event("1")])
            log_now(store, NOTED_BEFORE)
    if kind == "postgres":
        with psycopg.connect(location) as connection:
            for column in NEW_COLUMNS:
                connection.execute(f"ALTER TABLE jaxrec.shown DROP COLUMN {column}")
            connection.execute("UPDATE jaxrec.store SET version = 2")
    elif kind == "redis":
        with redis.Redis.from_url(location) as client:
            client.set("jaxrec:version", "2")
            client.lset("jaxrec:shown:u", 0, json.dumps(SLATE[:7]))
    new = SLATE._replace(recommendation_id="r2")
    for _ in range(2):
        with open_store(location) as store:
            log_now(store, new)
            log_now(store, SLATE)
            assert slates_of(store, "u") == [NOTED_BEFORE, new]
            assert [one for part in store.all_slates() for one in part] == [NOTED_BEFORE, new]
            assert store.history("u") == [Event("i", None, 0)]
    # Those servers knew of one version less, and refused others as this one does.
    name, before = {
        "sqlite": ("sqlite.store.SCHEMA_VERSION", 9),
        "postgres": ("postgres.schema.SCHEMA_VERSION", 8),
        "redis": ("redis.server.VERSION", "8"),
    }[kind]
    monkeypatch.setattr(f"serve.stores.{name}", before)
    with pytest.raises(StoreError, match=rf"in version {int(before) + 1}, expected .*1\.\.{before}"):
        open_store(location)


def test_every_older_version_is_brought_up_to_date() -> None:
    """Needs no server. The other stores accept a range and have one set of statements for all versions."""
    assert [b"1", *checked_server.UPDATED_AS_THEY_ARE] == [b"%d" % one for one in range(1, int(checked_server.VERSION))]


def test_a_server_waits_for_the_one_that_brings_a_large_store_up_to_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one goes on while this one has waited three times as long as for a write."""
    location, waited = str(tmp_path / "s"), []
    with open_store(location) as store:
        store.record([user_event("1")])
    with closing(sqlite3.connect(location, isolation_level=None)) as other:
        other.execute("PRAGMA user_version = 9")
        other.execute("BEGIN IMMEDIATE")

        def warn(*of: object) -> None:
            waited.append(of)
            if len(waited) == 3:
                other.execute("COMMIT")

        monkeypatch.setattr("serve.stores.sqlite.store.logger.warning", warn)
        monkeypatch.setattr("serve.stores.sqlite.store.LOCK_TIMEOUT_S", 0.05)
        with open_store(location) as store:
            assert len(store.history("u")) == 1
        assert other.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
    assert len(waited) == 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lacks", ["trend", "options"])
def test_a_store_that_noted_less_is_brought_up_to_date(
    kind: str, lacks: str, servers: dict[str, DatabaseServer], tmp_path: Path
) -> None:
    location, noted = emptied(kind, servers, tmp_path), NOTED_WITHOUT_OPTIONS
    columns, tables, fields, version = ["request_options"], [], 12, 4
    if lacks == "trend":
        noted, fields, version = NOTED_WITHOUT_TREND, 10, 3
        columns, tables = ["trend_time", "trend_arrival", *columns], ["trend", "trend_start"]
    with open_store(location) as store:
        log_now(store, noted)
    if kind == "redis":
        with redis.Redis.from_url(location) as client:
            client.set("jaxrec:version", version)
            client.lset("jaxrec:shown:u", 0, json.dumps(SLATE[:fields]))
    else:
        schema = "jaxrec." if kind == "postgres" else ""
        steps = [f"ALTER TABLE {schema}shown DROP COLUMN {column}" for column in columns]
        steps += [f"DROP TABLE {schema}{table}" for table in tables]
        if kind == "postgres":
            with psycopg.connect(location) as connection:
                for step in [*steps, f"UPDATE jaxrec.store SET version = {version}"]:
                    connection.execute(step)
        else:
            with closing(sqlite3.connect(location)) as connection:
                connection.executescript(";".join([*steps, f"PRAGMA user_version = {version + 1}"]))
    new = SLATE._replace(recommendation_id="r2")
    with open_store(location) as store:
        log_now(store, new)
        assert slates_of(store, "u") == [noted, new]


def test_what_a_server_of_before_still_writes_is_read_and_not_learned_from(
    store: EventStore, location: str, small_data: PreparedData, tmp_path: Path
) -> None:
    """It has the store open since before it was brought up to date, and notes what it noted then."""
    store.record([user_event("1")])
    lists = [json.dumps(column, ensure_ascii=False) for column in SLATE[2:4]]
    row = [*SLATE[:2], *lists, *SLATE[4:7]]
    columns = "recommendation_id, user_id, item_ids, log_propensities, policy, model_version, timestamp"
    if location.startswith("redis:"):
        with redis.Redis.from_url(location) as client:
            arguments = ["jaxrec:shown:u", "r1", json.dumps(SLATE[:7]), time.time(), digest("u")]
            client.register_script(LOG_SLATE)(args=arguments)
    elif location.startswith("postgresql:"):
        with psycopg.connect(location) as connection:
            connection.execute(f"INSERT INTO jaxrec.shown ({columns}) VALUES (%s, %s, %s, %s, %s, %s, %s)", row)
    else:
        with closing(sqlite3.connect(location, isolation_level=None)) as connection:
            connection.execute(f"INSERT INTO shown ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", row)
    assert slates_of(store, "u") == [NOTED_BEFORE]
    copy_log(store, tmp_path / "log.sqlite")
    log = read_served_log(tmp_path / "log.sqlite", small_data.catalog)
    assert (list(log.recommendations), log.skipped, log.shown) == ([], {UNNOTED: 1}, 1)


def test_a_long_redis_log_is_brought_up_to_date_in_parts(
    servers: dict[str, DatabaseServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where that was broken off, where an earlier attempt left ids behind, and by two servers at once."""
    monkeypatch.setattr("serve.stores.redis.server.UPDATED_AT_ONCE", 10)
    location = emptied("redis", servers, tmp_path)
    open_store(location).close()
    ids = [f"r{at}" for at in range(95)]
    with redis.Redis.from_url(location) as client:
        client.set("jaxrec:version", "1")
        for user_id in (None, "u"):
            key = "jaxrec:shown" if user_id is None else f"jaxrec:shown:{user_id}"
            # Every tenth a second time, near and far.
            for name in (*ids[:50], *ids[:50:10], *ids[50:], *ids[::10]):
                recommendation_id = name if user_id is None else f"{user_id} {name}"
                client.rpush(key, json.dumps(SLATE._replace(recommendation_id=recommendation_id, user_id=user_id)))
        client.sadd("jaxrec:shown_ids", *ids)
        step = client.register_script(UPDATE_SLATES)
        assert [step(args=["jaxrec:shown", 10]) for _ in range(3)] == [1, 1, 1]
        client.config_resetstat()
        with ThreadPoolExecutor(2) as threads:
            for opened in threads.map(open_store, [location] * 2):
                opened.close()
        # None looks at more than ten: of 110, 30 were done.
        assert client.info("commandstats")["cmdstat_evalsha"]["calls"] >= 8 + 11
        assert not client.exists("jaxrec:update", "jaxrec:update_ids")
        assert client.scard("jaxrec:shown_ids") == 2 * 95
    with open_store(location) as store:
        assert [shown.recommendation_id for shown in slates_of(store, None)] == ids
        assert [shown.recommendation_id for shown in slates_of(store, "u")] == [f"u {name}" for name in ids]
        log_now(store, SLATE._replace(recommendation_id="r94", user_id=None))
        assert len(slates_of(store, None)) == 95


def test_a_long_redis_list_is_deleted_in_parts(
    servers: dict[str, DatabaseServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of sight at once, and to the end also where the server that began did not live to see it."""
    monkeypatch.setattr("serve.stores.redis.store.DELETED_AT_ONCE", 10)
    location = emptied("redis", servers, tmp_path)
    events = [user_event(str(at)) for at in range(95)]
    with open_store(location) as store, redis.Redis.from_url(location) as client:
        store.record([*events, user_event("v", user_id="v")])
        for at in range(25):
            log_now(store, SLATE._replace(recommendation_id=f"r{at}"))
        revision = store.revision("u")
        client.config_resetstat()
        assert store.delete_user("u") == Deleted(95, 25)
        # Each deletes ten.
        assert client.info("commandstats")["cmdstat_evalsha"]["calls"] >= 10 + 1
        assert sorted(client.keys("jaxrec:*")) == sorted(
            f"jaxrec:{name}".encode()
            for name in (
                *("deletion", "deletion_numbers", "deletions"),
                *("event_ids", "events:v", "revision", "user:v", "version"),
            )
        )
        assert client.smembers("jaxrec:event_ids") == {b"v"}
        assert store.record(events) == events
        assert store.revision("u") > revision
        assert client.register_script(DELETE_USER)(args=["u", "digest", 100, 10]) == [95, 0, 0]
        assert (store.history("u"), store.revision("u")) == ([], 0)
        assert client.scard("jaxrec:event_ids") == 1 + 85
    with open_store(location) as store, redis.Redis.from_url(location) as client:
        assert client.smembers("jaxrec:event_ids") == {b"v"}
        assert not client.keys("jaxrec:deleted*")
        assert store.record(events) == events


def test_dropped_states_cost_redis_one_look_at_each_user(servers: dict[str, DatabaseServer], tmp_path: Path) -> None:
    location, users = emptied("redis", servers, tmp_path), 600
    with open_store(location) as store, redis.Redis.from_url(location) as client:
        store.record([user_event(f"e{at}", user_id=f"u{at}") for at in range(users)])
        store.save_states([SpilledState(f"u{at}", "old", users, b"x") for at in range(users)])
        store.save_states([SpilledState(f"u{at}", "new", users, b"x") for at in range(0, users, 2)])
        store.flush()
        client.config_resetstat()
        counts = dropped(store, ["new"], 20)
        assert sum(counts) == users
        assert len(counts) > 10
        assert client.info("commandstats")["cmdstat_hkeys"]["calls"] <= 1.5 * users
        assert client.scard("jaxrec:states") == users / 2
        assert store.load_state("u0", "new") is not None
        store.save_states([SpilledState("u1", "old", users, b"x")])
        store.flush()
        assert sum(dropped(store, ["new"], 20)) == 1


def test_a_server_waits_for_another_that_brings_postgres_up_to_date(
    servers: dict[str, DatabaseServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer than a statement may take."""
    monkeypatch.setattr("serve.stores.postgres.store.BEGIN", "BEGIN; SET LOCAL statement_timeout = 100")
    location = emptied("postgres", servers, tmp_path)
    with ThreadPoolExecutor(1) as threads, psycopg.connect(location) as first:
        first.execute("SELECT pg_advisory_xact_lock(%s)", [SCHEMA_LOCK])
        opening = threads.submit(open_store, location)
        waiting = (
            "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'advisory' AND clock_timestamp() - query_start > %s"
        )

        def has_waited() -> None:
            with psycopg.connect(location) as look:
                assert look.execute(waiting, [timedelta(seconds=0.3)]).fetchone() is not None

        wait_until(has_waited, lambda: not opening.done())
        first.rollback()
        opening.result(DEADLINE_S).close()


def test_a_copy_that_is_opened_becomes_a_store(tmp_path: Path) -> None:
    """With what keeps its acknowledged events, and not to be replaced any more."""
    copy = tmp_path / "copy.sqlite"
    with open_store(tmp_path / "events.sqlite") as store:
        store.record([user_event("1")])
        for _ in range(2):
            copy_log(store, copy)
        with open_store(copy) as opened:
            opened.record([user_event("2")])
            with closing(sqlite3.connect(copy)) as connection:
                assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
            with pytest.raises(StoreError, match="came a store that is in use"):
                copy_log(store, copy)
        with pytest.raises(StoreError, match="a copy that was opened as a store since"):
            copy_log(store, copy)
    with open_store(copy) as opened:
        assert len(opened.history("u")) == 2


def test_what_cannot_be_copied_is_said(tmp_path: Path) -> None:
    other = tmp_path / "notes.txt"
    other.write_text("not to be lost")
    with open_store(tmp_path / "events.sqlite") as store:
        store.record([user_event("1")])
        with pytest.raises(StoreError, match="expected a new file or an older copy of a log, came a store that is in"):
            copy_log(store, tmp_path / "events.sqlite")
        with pytest.raises(StoreError, match=r"notes.txt: expected .*, came another file, or"):
            copy_log(store, other)
        with pytest.raises(StoreError, match="cannot be"):
            copy_log(store, tmp_path / "nowhere" / "log.sqlite")
    assert other.read_text() == "not to be lost"
    # Nobody has it open, but it is the only one.
    with (
        open_store(tmp_path / "empty.sqlite") as store,
        pytest.raises(StoreError, match=r"events.sqlite: expected .*, came another file, or"),
    ):
        copy_log(store, tmp_path / "events.sqlite")
    command = [sys.executable, "-m", "serve", "log", str(tmp_path / "none"), str(tmp_path / "log.sqlite")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (1, f"Error: {tmp_path}/none: expected a store, there is no such file\n")


@pytest.mark.parametrize("kind", SERVERS)
def test_another_version_is_refused(kind: str, servers: dict[str, DatabaseServer], tmp_path: Path) -> None:
    location = emptied(kind, servers, tmp_path)
    open_store(location).close()
    if kind == "postgres":
        with psycopg.connect(location) as connection:
            connection.execute("UPDATE jaxrec.store SET version = 10")
    else:
        with redis.Redis.from_url(location) as client:
            client.set("jaxrec:version", "10")
    with pytest.raises(StoreError, match="is a store in version 10, expected 1"):
        open_store(location)


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("postgresql://jaxrec@127.0.0.1:1/nothing", "PostgreSQL: cannot be opened: .*Connection refused"),
        ("redis://127.0.0.1:1/0", "Redis: cannot be opened: .*Connection refused"),
        ("redis://127.0.0.1:1/x?nonsense=", "Redis: "),
        ("mysql://127.0.0.1/x", "expected a path, postgresql:// or redis://, came mysql://"),
    ],
)
def test_no_such_store(location: str, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        open_store(location)
