"""Kinds of events in every store: what is kept of them, and what is part of the history."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
import redis

from serve.model.events import Event
from serve.stores import open_store
from serve.stores.base import Changes, EventStore, UserEvent
from serve.stores.copy import copy_log
from tests.serve.stores.counting import assert_counts, at, seed_of, sums
from tests.serve.stores.databases import DatabaseServer
from tests.serve.stores.test_stores import KINDS, emptied, location, servers, store  # noqa: F401

BOUGHT = UserEvent("1", "u", Event("a", 4.0, 10, 2.5), "r1", "purchase", 19.99)
SKIPPED = UserEvent("2", "u", Event("b", None, 20, 0.0), None, "skip", 0.0)
DISLIKED = UserEvent("3", "u", Event("a", None, 30, -1.0), None, "dislike")
PLAIN = UserEvent("4", "u", Event("c", None, 40), "r1")
EVENTS = [BOUGHT, SKIPPED, DISLIKED, PLAIN]
# As version 6 wrote them.
SQLITE_6 = """
CREATE TABLE events (
    arrival INTEGER PRIMARY KEY AUTOINCREMENT,
    event_id TEXT NOT NULL UNIQUE,
    user_id TEXT NOT NULL,
    item_id TEXT NOT NULL,
    rating REAL,
    timestamp INTEGER NOT NULL,
    recommendation_id TEXT
) STRICT;
CREATE INDEX history ON events (user_id, timestamp, arrival, item_id, rating);
INSERT INTO events VALUES (7, '4', 'u', 'c', NULL, 40, 'r1');
PRAGMA application_id = 1786278499;
PRAGMA user_version = 6;
"""


def all_events(store: EventStore) -> list[UserEvent]:  # noqa: F811
    """In the order of arrival, which the parts need not have."""
    return [event for _, event in sorted((one for part in store.all_events() for one in part), key=lambda one: one[0])]


def test_all_of_an_event_comes_back_also_from_a_copy(store: EventStore, tmp_path: Path) -> None:  # noqa: F811
    assert store.record(EVENTS) == EVENTS
    assert all_events(store) == EVENTS
    copy_log(store, tmp_path / "copy.sqlite")
    with open_store(tmp_path / "copy.sqlite") as copy:
        assert all_events(copy) == EVENTS
        assert copy.history("u") == store.history("u")


def test_neutral_events_are_no_part_of_the_history(store: EventStore) -> None:  # noqa: F811
    store.record([SKIPPED])
    first = store.revision("u")
    assert first > 0
    assert store.history("u") == []
    assert store.changes("u") == Changes(first, [], complete=True)
    store.record([PLAIN, DISLIKED, BOUGHT])
    history = [BOUGHT.event, DISLIKED.event, PLAIN.event]
    assert store.history("u") == history
    assert store.history("u", until=30) == history[:2]
    assert store.changes("u", first) == Changes(store.revision("u"), history, complete=False)


def test_neutral_events_displace_none_of_the_history(
    store: EventStore,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in ("sql", "redis.store"):
        monkeypatch.setattr(f"serve.stores.{module}.MOST_EVENTS", 3)
    store.record([UserEvent(f"p{day}", "u", Event("i", None, day)) for day in range(4)])
    store.record([UserEvent(f"n{day}", "u", Event("i", None, 10 + day, 0.0)) for day in range(50)])
    newest = [Event("i", None, day) for day in (1, 2, 3)]
    assert store.history("u") == newest
    assert store.changes("u", 0, 3) == Changes(store.revision("u"), newest, complete=True)


@pytest.mark.parametrize("seeded_first", [True, False])
def test_positive_events_alone_are_counted_each_as_one(store: EventStore, seeded_first: bool) -> None:  # noqa: F811
    if seeded_first:
        store.seed_counts(seed_of({}, 0), 0)
    store.record(EVENTS)
    store.seed_counts(seed_of({}, 0), 0)
    assert_counts(at(store.item_counts(), 100), sums({"a": [10], "c": [40]}, 100))


@pytest.mark.parametrize("kind", KINDS)
def test_events_of_before_are_interactions(
    kind: str,
    servers: dict[str, DatabaseServer],  # noqa: F811
    tmp_path: Path,
) -> None:
    where = emptied(kind, servers, tmp_path)
    if kind == "sqlite":
        with closing(sqlite3.connect(where)) as connection:
            connection.executescript(SQLITE_6)
    else:
        with open_store(where) as before:
            before.record([PLAIN])
    if kind == "postgres":
        with psycopg.connect(where) as connection:
            connection.execute("ALTER TABLE jaxrec.events DROP COLUMN type, DROP COLUMN value, DROP COLUMN weight")
            connection.execute("UPDATE jaxrec.store SET version = 5")
    elif kind == "redis":
        with redis.Redis.from_url(where) as client:
            client.set("jaxrec:version", "5")
            client.lset("jaxrec:events:u", 0, "1 " + json.dumps(["4", "c", None, 40, "r1"]))
    with open_store(where) as opened:
        opened.record(EVENTS[:3])
        assert all_events(opened) == [PLAIN, *EVENTS[:3]]
        assert opened.history("u") == [BOUGHT.event, DISLIKED.event, PLAIN.event]
