"""Counters of items as tests expect and read them."""

import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing

import numpy as np
import psycopg
import redis

from serve.model.events import Event
from serve.model.trend import COUNTED_S, halved
from serve.stores import open_store
from serve.stores.base import UserEvent
from serve.stores.counters import Counter, ItemCounts
from tests.serve.stores.test_stores import KINDS, emptied, servers  # noqa: F401

HOUR, DAY = 3_600, 86_400
NOW = 1_700_000_000


def event(event_id: str, item_id: str = "i", timestamp: int = NOW, user_id: str = "u") -> UserEvent:
    return UserEvent(event_id, user_id, Event(item_id, None, timestamp))


def at(counts: ItemCounts, now: int) -> dict[str, list[float]]:
    """Counts of each item, decayed to `now`."""
    decayed = counts.counts * halved(now - counts.references.astype(np.float64), COUNTED_S)
    return dict(zip(counts.item_ids, decayed.tolist(), strict=True))


def sums(events: Mapping[str, Sequence[int]], now: int) -> dict[str, list[float]]:
    """The definition: for each item and half-life the sum over its events, from their times."""
    return {
        item: [sum(0.5 ** ((now - time) / half_life) for time in times) for half_life in COUNTED_S]
        for item, times in events.items()
    }


def assert_counts(found: Mapping[str, Sequence[float]], expected: Mapping[str, Sequence[float]]) -> None:
    assert found.keys() == expected.keys()
    for item, counts in expected.items():
        np.testing.assert_allclose(found[item], counts, rtol=1e-9, err_msg=item)


def before_counters(location: str, events: Sequence[UserEvent]) -> None:
    """Makes the empty store one of a version without counters, with some events."""
    with open_store(location) as store:
        store.record(events)
    if location.startswith("postgresql:"):
        with psycopg.connect(location) as connection:
            connection.execute("DROP TABLE jaxrec.trend, jaxrec.trend_start")
            connection.execute(
                "ALTER TABLE jaxrec.shown DROP COLUMN trend_time, DROP COLUMN trend_arrival,"
                " DROP COLUMN request_options"
            )
            connection.execute("UPDATE jaxrec.store SET version = 3")
    elif location.startswith("redis:"):
        with redis.Redis.from_url(location) as client:
            client.delete("jaxrec:trend", "jaxrec:trend_changed")
            client.set("jaxrec:version", "3")
    else:
        with closing(sqlite3.connect(location)) as connection:
            connection.executescript(
                "ALTER TABLE shown DROP COLUMN trend_time; ALTER TABLE shown DROP COLUMN trend_arrival;"
                "ALTER TABLE shown DROP COLUMN request_options;"
                "DROP TABLE trend; DROP TABLE trend_start; PRAGMA user_version = 4"
            )


def seeded(location: str) -> str:
    """Seeds the store with nothing, so that it counts all events after 1970."""
    with open_store(location) as store:
        store.seed_counts(seed_of({}, 0), 0)
    return location


def seed_of(counts: Mapping[str, float], until: int) -> ItemCounts:
    """So many events of each item at `until`, for all half-lives."""
    return ItemCounts.of((item, Counter(until, [count] * len(COUNTED_S))) for item, count in counts.items())
