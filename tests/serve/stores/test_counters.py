"""Counters of items: what each event is worth, once, in whatever order events come and whichever server records."""

import math
import sqlite3
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.model.trend import COUNTED_S
from serve.stores import open_store
from serve.stores.base import EventStore, StoreError
from serve.stores.counters import Counter, ItemCounts, add_events, counted
from tests.serve.stores.counting import DAY, HOUR, NOW, assert_counts, at, event, seed_of, seeded, sums
from tests.serve.stores.databases import DatabaseServer
from tests.serve.stores.test_stores import KINDS, emptied, servers  # noqa: F401


@pytest.fixture(params=KINDS)
def location(
    request: pytest.FixtureRequest,
    servers: dict[str, DatabaseServer],  # noqa: F811
    tmp_path: Path,
) -> str:
    """Of a store that is seeded with nothing, so that it counts all events after 1970."""
    return seeded(emptied(request.param, servers, tmp_path))


@pytest.fixture
def store(location: str) -> Iterator[EventStore]:
    with open_store(location) as opened:
        yield opened


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(NOW - 4_000 * DAY, NOW)), max_size=12).flatmap(
        lambda events: st.tuples(st.just(events), st.permutations(events), st.integers(1, 4))
    )
)
def test_counters_do_not_depend_on_order_and_on_parts(
    drawn: tuple[list[tuple[str, int]], list[tuple[str, int]], int],
) -> None:
    events, permuted, parts = drawn
    counters: dict[str, Counter] = {}
    for start in range(parts):
        add_events(counters, permuted[start::parts], NOW)
    times = {item: [time for one, time in events if one == item] for item, _ in events}
    later = NOW + 30 * DAY
    assert_counts(at(ItemCounts.of(counters.items()), later), sums(times, later))
    assert_counts(at(ItemCounts.of(counted(events, NOW, 0).items()), later), sums(times, later))


def test_an_event_ahead_of_the_clock_counts_as_of_now() -> None:
    """Else it would hide what comes until then, and be worth more than one."""
    counters = counted([("i", NOW + 365 * DAY), ("i", NOW - DAY)], NOW, 0)
    assert counters["i"].reference == NOW
    np.testing.assert_allclose(counters["i"].counts[:3], [1 + 1 / 16, 1 + 1 / 2, 1 + 0.5 ** (1 / 3)])


def test_columns_of_counters_and_back() -> None:
    counters = {"ü\n": Counter(2**40, [1 / 3] * 7), "": Counter(-5, [1.0] * 7)}
    assert ItemCounts.of(counters.items()).counters() == counters
    assert ItemCounts.of([]).counts.shape == (0, len(COUNTED_S))
    for wrong in ([1.0] * 6, [1.0] * 6 + [math.nan], [math.inf] * 7, [-1.0] * 7, [None] * 7):
        with pytest.raises(ValueError, match=r"counter of the item 'i': expected 7 finite numbers from 0 on, came \["):
            ItemCounts.of([("i", Counter(0, wrong))])  # type: ignore[arg-type]


def test_events_count_by_their_own_times(store: EventStore) -> None:
    """An hour and a day before: with a half-life of 6 hours 0.5 ** (1 / 6) and 0.5 ** 4."""
    store.record([event("1", timestamp=NOW - DAY)])
    store.record([event("2", timestamp=NOW), event("3", timestamp=NOW - HOUR), event("4", "j", NOW - DAY)])
    # Late ones: of the same time as the counter, and from before all others.
    store.record([event("5", timestamp=NOW - 4_000 * DAY), event("6", timestamp=NOW)])
    found = at(store.item_counts(), NOW)
    assert found["i"][0] == pytest.approx(0.5**4 + 0.5 ** (1 / 6) + 2, rel=1e-9)
    assert_counts(found, sums({"i": [NOW - DAY, NOW - HOUR, NOW, NOW - 4_000 * DAY, NOW], "j": [NOW - DAY]}, NOW))


def test_an_event_that_is_sent_twice_counts_once(store: EventStore) -> None:
    store.record([event("1"), event("1"), event("2")])
    store.record([event("1", "other"), event("2")])
    assert_counts(at(store.item_counts(), NOW), sums({"i": [NOW, NOW]}, NOW))


def test_a_deleted_user_has_counted(store: EventStore) -> None:
    store.record([event("1")])
    store.delete_user("u")
    store.record([event("1", user_id="v")])
    assert_counts(at(store.item_counts(), NOW), sums({"i": [NOW, NOW]}, NOW))


def test_only_what_changed_is_read_again(store: EventStore, location: str) -> None:
    store.record([event("1", "a"), event("2", "b")])
    first = store.item_counts()
    assert sorted(first.item_ids) == ["a", "b"]
    assert list(store.item_counts(first.change).item_ids) == []
    with open_store(location) as other:
        other.record([event("3", "b"), event("4", "c")])
    second = store.item_counts(first.change)
    assert_counts(at(second, NOW), sums({"b": [NOW, NOW], "c": [NOW]}, NOW))
    assert list(store.item_counts(second.change).item_ids) == []
    store.record([event("3", "b")])
    assert list(store.item_counts(second.change).item_ids) == []


def test_the_arrival_is_that_of_the_last_counted_event(store: EventStore) -> None:
    """As `all_events` numbers it: adding the events up to it gives the same counts."""
    assert store.item_counts().arrival == 0
    store.record([event("1", "a"), event("2", "b")])
    store.record([event("3", "c", NOW - DAY, "v")])
    first = store.item_counts()
    arrivals = {new.event_id: arrival for part in store.all_events() for arrival, new in part}
    assert first.arrival == arrivals["3"] == max(arrivals.values())
    assert store.item_counts(first.change).arrival == first.arrival
    store.record([event("4", "a"), event("3", "c")])
    assert store.item_counts(first.change).arrival == store.item_counts().arrival > first.arrival


def test_the_longest_and_the_strangest_item_ids_are_counted(store: EventStore) -> None:
    items = ["\U0010ffff" * 512, 'ü"\n[:%s {0}', " "]
    store.record([event(str(number), item) for number, item in enumerate(items)])
    assert sorted(store.item_counts().item_ids) == sorted(items)


def test_a_call_with_many_items_counts_each(store: EventStore) -> None:
    """More than one statement asks for in SQLite, and than one answer holds in Redis."""
    items = {f"i{number}": [NOW - number, NOW - HOUR] for number in range(2_500)}
    for time_of in (0, 1):
        store.record([event(f"{item} {time_of}", item, times[time_of]) for item, times in items.items()])
    assert_counts(at(store.item_counts(), NOW), sums(items, NOW))


def test_a_transaction_that_commits_late_is_not_missed_in_postgres(
    servers: dict[str, DatabaseServer],  # noqa: F811
    tmp_path: Path,
) -> None:
    location = seeded(emptied("postgres", servers, tmp_path))
    with open_store(location) as store, psycopg.connect(location) as slow:
        slow.execute("INSERT INTO jaxrec.trend VALUES ('slow', 0, '{1,1,1,1,1,1,1}', txid_current())")
        store.record([event("1", "fast")])
        first = store.item_counts()
        assert list(first.item_ids) == ["fast"]
        slow.commit()
        assert "slow" in store.item_counts(first.change).item_ids
        # From another database all would look old.
        assert len(store.item_counts(2**40).item_ids) == 2


def test_two_servers_count_all_of_each_others_events(location: str) -> None:
    """In either order of items: they must not lock each other out."""
    start = threading.Barrier(6)

    def write(thread: int) -> None:
        start.wait()
        for number in range(20):
            items = ["a", "b", "c"] if thread % 2 else ["c", "b", "a"]
            stores[thread % 2].record(
                [event(f"{thread} {number} {item}", item, NOW - number, f"u{thread}") for item in items]
            )

    with open_store(location) as one, open_store(location) as two, ThreadPoolExecutor(6) as threads:
        stores = (one, two)
        for done in [threads.submit(write, thread) for thread in range(6)]:
            done.result()
        times = [NOW - number for number in range(20)] * 6
        for store in stores:
            assert_counts(at(store.item_counts(), NOW), sums(dict.fromkeys("abc", times), NOW))


@pytest.mark.parametrize("counts", [[1.0, 2.0], [math.nan] + [1.0] * 6, [-1.0] * 7], ids=["short", "NaN", "negative"])
def test_a_counter_that_cannot_be_decoded_stays_and_its_events_are_recorded(
    store: EventStore, location: str, counts: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    """20 calls at once, of which some share a transaction in SQLite: the damage is logged once, and hurts no call."""
    store.record([event("bad", "bad")])
    store.record([event("good", "good")])
    change = store.item_counts().change
    damage(location, counts)
    calls = [[event(f"{call} {item}", item) for item in ("bad", "good")] for call in range(20)]
    with ThreadPoolExecutor(20) as threads:
        assert list(threads.map(store.record, calls)) == calls
    assert len(store.history("u")) == 2 + 2 * 20
    assert_counts(at(store.item_counts(change), NOW), sums({"good": [NOW] * (1 + 20)}, NOW))
    (logged,) = caplog.records
    assert logged.levelname == "ERROR"
    assert "the counter of the item 'bad' cannot be decoded" in logged.getMessage()
    assert written(location) == written_as(location, counts)
    with pytest.raises(StoreError, match=r"cannot be read: .*counter of the item 'bad': expected"):
        store.item_counts()


def damage(location: str, counts: list[float]) -> None:
    """Writes counts to the counter of `bad`."""
    if location.startswith("redis:"):
        with redis.Redis.from_url(location) as client:
            client.hset("jaxrec:trend", "bad", written_as(location, counts))
    elif location.startswith("postgresql:"):
        with psycopg.connect(location) as connection:
            connection.execute("UPDATE jaxrec.trend SET counts = %s WHERE item_id = 'bad'", [counts])
    else:
        with closing(sqlite3.connect(location, isolation_level=None)) as connection:
            connection.execute("UPDATE trend SET counts = ? WHERE item_id = 'bad'", [written_as(location, counts)])


def written(location: str) -> Any:
    """The counts of `bad` as the store has them."""
    if location.startswith("redis:"):
        with redis.Redis.from_url(location) as client:
            return client.hget("jaxrec:trend", "bad")
    if location.startswith("postgresql:"):
        with psycopg.connect(location) as connection:
            rows = connection.execute("SELECT counts::text FROM jaxrec.trend WHERE item_id = 'bad'").fetchall()
    else:
        with closing(sqlite3.connect(location)) as connection:
            rows = connection.execute("SELECT counts FROM trend WHERE item_id = 'bad'").fetchall()
    return rows[0][0]


def written_as(location: str, counts: list[float]) -> Any:
    if location.startswith("redis:"):
        return f"{NOW} {' '.join(map(str, counts))}".encode()
    if location.startswith("postgresql:"):
        return "{" + ",".join(f"{count:g}".replace("nan", "NaN") for count in counts) + "}"
    return struct.pack(f"<{len(counts)}d", *counts)


def test_reading_costs_what_changed(tmp_path: Path) -> None:
    """Counted in steps of SQLite's virtual machine."""
    with ExitStack() as stack:
        store = stack.enter_context(open_store(tmp_path / "events.sqlite"))
        store.seed_counts(seed_of({}, 0), 0)
        store.record([event(str(number), f"i{number}") for number in range(20_000)])
        change, hundreds = store.item_counts().change, 0

        def count() -> None:
            nonlocal hundreds
            hundreds += 1

        store._reader().connection.set_progress_handler(count, 100)  # type: ignore[attr-defined]
        store.record([event("new", "i7", int(time.time()))])
        assert list(store.item_counts(change).item_ids) == ["i7"]
        assert hundreds < 3


@pytest.mark.parametrize("kind", KINDS)
def test_counters_of_before_have_no_hour_and_are_counted_on(
    kind: str,
    servers: dict[str, DatabaseServer],  # noqa: F811
    tmp_path: Path,
) -> None:
    """Of a store whose servers kept six counts of an item."""
    location = seeded(emptied(kind, servers, tmp_path))
    with open_store(location) as store:
        store.record([event("1", "bad", NOW - HOUR), event("2", "other", NOW)])
    before = [2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    damage(location, before)
    if kind == "sqlite":
        with closing(sqlite3.connect(location)) as connection:
            connection.execute("PRAGMA user_version = 8")
    elif kind == "postgres":
        with psycopg.connect(location) as connection:
            connection.execute("UPDATE jaxrec.store SET version = 7")
    else:
        with redis.Redis.from_url(location) as client:
            client.set("jaxrec:version", "7")
    with open_store(location) as store:
        (reference, counts) = store.item_counts().counters()["bad"]
        assert list(counts) == [*before, 0.0]
        store.record([event("3", "bad", reference)])
        assert list(store.item_counts().counters()["bad"].counts) == [one + 1 for one in [*before, 0.0]]
