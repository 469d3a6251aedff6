"""Counters of items: what each event is worth, once, in whatever order events come and whichever server records."""

import math
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import psycopg
import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.model.events import Event
from serve.model.trend import HALF_LIVES_S, halved
from serve.stores import open_store, postgres_counters, sqlite_counters
from serve.stores.base import EventStore, StoreError, UserEvent
from serve.stores.copy import copy_log
from serve.stores.counters import NONE_READ, Counter, ItemCounts, add_events, counted
from tests.serve.serving.test_models import wait_for
from tests.serve.stores.databases import DatabaseServer
from tests.serve.stores.test_stores import KINDS, emptied, servers  # noqa: F401

HOUR, DAY = 3_600, 86_400
NOW = 1_700_000_000


@pytest.fixture(params=KINDS)
def location(
    request: pytest.FixtureRequest,
    servers: dict[str, DatabaseServer],  # noqa: F811
    tmp_path: Path,
) -> str:
    return emptied(request.param, servers, tmp_path)


@pytest.fixture
def store(location: str) -> Iterator[EventStore]:
    with open_store(location) as opened:
        yield opened


def event(event_id: str, item_id: str = "i", timestamp: int = NOW, user_id: str = "u") -> UserEvent:
    return UserEvent(event_id, user_id, Event(item_id, None, timestamp))


def at(counts: ItemCounts, now: int) -> dict[str, list[float]]:
    """Counts of each item, decayed to `now`."""
    decayed = counts.counts * halved(now - counts.references.astype(np.float64))
    return dict(zip(counts.item_ids, decayed.tolist(), strict=True))


def sums(events: Mapping[str, Sequence[int]], now: int) -> dict[str, list[float]]:
    """The definition: for each item and half-life the sum over its events, from their times."""
    return {
        item: [sum(0.5 ** ((now - time) / half_life) for time in times) for half_life in HALF_LIVES_S]
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
            connection.execute("ALTER TABLE jaxrec.shown DROP COLUMN trend_time, DROP COLUMN trend_arrival")
            connection.execute("UPDATE jaxrec.store SET version = 3")
    elif location.startswith("redis:"):
        with redis.Redis.from_url(location) as client:
            client.delete("jaxrec:trend", "jaxrec:trend_changed")
            client.set("jaxrec:version", "3")
    else:
        with closing(sqlite3.connect(location)) as connection:
            connection.executescript(
                "ALTER TABLE shown DROP COLUMN trend_time; ALTER TABLE shown DROP COLUMN trend_arrival;"
                "DROP TABLE trend; DROP TABLE trend_start; PRAGMA user_version = 4"
            )


def seed_of(counts: Mapping[str, float], until: int) -> ItemCounts:
    """So many events of each item at `until`, for all half-lives."""
    return ItemCounts.of((item, Counter(until, [count] * len(HALF_LIVES_S))) for item, count in counts.items())


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
    assert_counts(at(ItemCounts.of(counted(events, NOW).items()), later), sums(times, later))


def test_an_event_ahead_of_the_clock_counts_as_of_now() -> None:
    """Else it would hide what comes until then, and be worth more than one."""
    counters = counted([("i", NOW + 365 * DAY), ("i", NOW - DAY)], NOW)
    assert counters["i"].reference == NOW
    np.testing.assert_allclose(counters["i"].counts[:3], [1 + 1 / 16, 1 + 1 / 2, 1 + 0.5 ** (1 / 3)])


def test_columns_of_counters_and_back() -> None:
    counters = {"ü\n": Counter(2**40, [1 / 3] * 6), "": Counter(-5, [1.0] * 6)}
    assert ItemCounts.of(counters.items()).counters() == counters
    assert ItemCounts.of([]).counts.shape == (0, len(HALF_LIVES_S))
    for wrong in ([1.0] * 5, [1.0] * 5 + [math.nan], [math.inf] * 6, [-1.0] * 6, [None] * 6):
        with pytest.raises(ValueError, match=r"counter of the item 'i': expected 6 finite numbers from 0 on, came \["):
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
    """As `all_events` numbers it: whoever adds the events up to it gets the same counts."""
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
    location = emptied("postgres", servers, tmp_path)
    with open_store(location) as store, psycopg.connect(location) as slow:
        slow.execute("INSERT INTO jaxrec.trend VALUES ('slow', 0, '{1,1,1,1,1,1}', txid_current())")
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


def test_a_store_is_seeded_once(location: str) -> None:
    """By one of four servers at once, while two others record: nothing is lost, and nothing counts twice."""
    start, stopped = threading.Barrier(6), threading.Event()

    def seed(number: int) -> None:
        with open_store(location) as store:
            start.wait()
            store.seed_counts(seed_of({f"of {number}": number + 1, "i": 7}, NOW - DAY), NOW - DAY)
            # The whole seed of one of them.
            assert store.counted_until() == NOW - DAY
            assert at(store.item_counts(), NOW)["i"][5] > 7 * 0.5 ** (1 / 90) - 1e-9

    def write(thread: int) -> int:
        number = 0
        with open_store(location) as store:
            start.wait()
            while not stopped.is_set() or number < 5:
                store.record([event(f"{thread} {number}", timestamp=NOW - HOUR, user_id=f"u{thread}")])
                number += 1
        return number

    before_counters(location, [event("old", timestamp=NOW - 2 * HOUR), event("exported", timestamp=NOW - 2 * DAY)])
    with ThreadPoolExecutor(6) as threads:
        writers = [threads.submit(write, thread) for thread in range(2)]
        for done in [threads.submit(seed, number) for number in range(4)]:
            done.result()
        stopped.set()
        count = sum(writer.result() for writer in writers)
    with open_store(location) as store:
        store.seed_counts(seed_of({"later": 5}, NOW), NOW)
        found = at(store.item_counts(), NOW)
        assert_counts(
            {"i": found.pop("i")}, sums({"i": [NOW - DAY] * 7 + [NOW - 2 * HOUR] + [NOW - HOUR] * count}, NOW)
        )
        (winner,) = found
        assert_counts(found, sums({winner: [NOW - DAY] * (int(winner.removeprefix("of ")) + 1)}, NOW))


def test_a_server_whose_seed_comes_second_adds_nothing(location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one seeds after this one has looked whether the store is seeded."""
    with open_store(location) as one, open_store(location) as two:

        def others_seed(after: int) -> list[list[tuple[str, int]]]:
            one.seed_counts(seed_of({"a": 3, "b": 1}, NOW - DAY), NOW - DAY)
            one.record([event("1", "a")])
            return [[("a", NOW)]]

        monkeypatch.setattr(two, "_uncounted", others_seed)
        two.seed_counts(seed_of({"a": 2, "c": 5}, NOW), NOW)
        assert two.counted_until() == NOW - DAY
        times = {"a": [NOW - DAY] * 3 + [NOW], "b": [NOW - DAY]}
        assert_counts(at(two.item_counts(), NOW), sums(times, NOW))


def test_a_seed_waits_for_events_that_are_being_counted_in_postgres(
    servers: dict[str, DatabaseServer],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else an event that saw the store without a seed would count after it."""
    location = emptied("postgres", servers, tmp_path)
    add, seeds = postgres_counters._add, []
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%counted_until%'"
    with open_store(location) as store, open_store(location) as other, ThreadPoolExecutor(1) as thread:

        def seeded_meanwhile(connection: psycopg.Connection, counters: Mapping[str, Counter]) -> None:
            if not seeds:
                seeds.append(thread.submit(other.seed_counts, seed_of({"a": 3}, NOW), NOW))
                with psycopg.connect(location, autocommit=True) as looking:
                    wait_for(lambda: looking.execute(waiting).fetchone() == (1,))
            add(connection, counters)

        monkeypatch.setattr(postgres_counters, "_add", seeded_meanwhile)
        store.record([event("1", "a")])
        seeds[0].result()
        assert store.counted_until() == NOW
        assert_counts(at(store.item_counts(), NOW), sums({"a": [NOW] * 4}, NOW))


def test_of_what_a_store_held_before_the_seed_has_what_the_export_has_not(location: str) -> None:
    """Two events of `a` are in the export: that of its last second too."""
    until = NOW - DAY
    held = [event("1", "a", until - HOUR), event("2", "a", until), event("3", "a", NOW - HOUR)]
    before_counters(location, [*held, event("4", "b", NOW - 2 * HOUR)])
    with open_store(location) as store:
        assert store.counted_until() is None
        # Later than before, and so counted by the store itself.
        store.record([event("5", "b", NOW - DAY + 1), event("4", "b")])
        store.seed_counts(seed_of({"a": 2, "c": 7}, until), until)
        assert store.counted_until() == until
        times = {"a": [until, until, NOW - HOUR], "b": [NOW - 2 * HOUR, NOW - DAY + 1], "c": [until] * 7}
        assert_counts(at(store.item_counts(), NOW), sums(times, NOW))
        assert store.item_counts().arrival >= max(arrival for part in store.all_events() for arrival, _ in part)
        store.record([event("6", "b", NOW), event("4", "b")])
        assert_counts(at(store.item_counts(), NOW), sums(times | {"b": [*times["b"], NOW]}, NOW))


def test_events_that_the_seed_has_do_not_count_again(store: EventStore) -> None:
    """As where the log that a model was trained on is recorded afterwards."""
    until = NOW - DAY
    store.seed_counts(seed_of({"a": 2, "b": 1}, until), until)
    change = store.item_counts().change
    log = [event("1", "a", until - HOUR), event("2", "a", until), event("3", "b", 0)]
    assert store.record(log) == log
    assert list(store.item_counts(change).item_ids) == []
    store.record([event("4", "a", until + 1), event("5", "new", until)])
    assert_counts(at(store.item_counts(), NOW), sums({"a": [until, until, until + 1], "b": [until]}, NOW))
    assert len(store.history("u")) == 5


def test_a_seed_ahead_of_the_clock_counts_as_of_now(store: EventStore) -> None:
    """Else what is recorded until then would not count."""
    before = int(time.time())
    ahead = before + 10**6
    store.seed_counts(seed_of({"a": 2}, ahead), ahead)
    until = store.counted_until()
    assert until is not None
    assert before <= until <= time.time()
    assert store.item_counts().references.tolist() == [until]
    store.record([event("1", "b", ahead)])
    assert set(store.item_counts().item_ids) <= {"a", "b"}


def test_a_seed_of_many_items_is_added_whole(store: EventStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts, and a second attempt adds nothing."""
    monkeypatch.setattr("serve.stores.redis.COUNTERS_AT_ONCE", 7)
    monkeypatch.setattr("serve.stores.postgres_counters.SEEDED_AT_ONCE", 7)
    monkeypatch.setattr("serve.stores.sqlite_counters.ASKED_AT_ONCE", 7)
    items = {f'{number} "ü\n': number + 1 for number in range(50)}
    store.record([event(str(number), item) for number, item in enumerate(items)])
    for _ in range(2):
        store.seed_counts(seed_of(items, NOW), NOW)
        assert_counts(at(store.item_counts(), NOW), sums({item: [NOW] * (n + 1) for item, n in items.items()}, NOW))


def test_a_seeding_that_breaks_off_is_repeated(location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another server, of another model; in Redis the first one's seed is completed."""
    monkeypatch.setattr("serve.stores.redis.COUNTERS_AT_ONCE", 2)
    monkeypatch.setattr("serve.stores.postgres_counters.SEEDED_AT_ONCE", 2)
    items = [f"i{number}" for number in range(9)]
    with open_store(location) as store, monkeypatch.context() as broken:
        store.record([event("1", "i3")])
        if location.startswith("redis:"):
            add, calls = store._add_seed, iter([True, True, False])  # type: ignore[attr-defined]
            broken.setattr(store, "_add_seed", lambda **options: add(**options) if next(calls) else fail())
        elif location.startswith("postgresql:"):
            add, parts = postgres_counters._add, iter([True, True, False])
            broken.setattr(postgres_counters, "_add", lambda *given: add(*given) if next(parts) else fail())
        else:
            broken.setattr(sqlite_counters, "add_counters", lambda *given: fail())
        with pytest.raises(StoreError, match="broken off"):
            store.seed_counts(seed_of(dict.fromkeys(items, 3), NOW), NOW)
        assert store.counted_until() is None
    with open_store(location) as store:
        store.seed_counts(seed_of(dict.fromkeys(items, 3), NOW), NOW)
        assert store.counted_until() == NOW
        assert_counts(
            at(store.item_counts(), NOW), sums({item: [NOW] * (4 if item == "i3" else 3) for item in items}, NOW)
        )


def fail() -> None:
    raise StoreError("broken off")


def test_a_counter_that_cannot_be_decoded_is_named(store: EventStore, location: str) -> None:
    store.record([event("1", "good"), event("2", "bad")])
    if location.startswith("redis:"):
        with redis.Redis.from_url(location) as client:
            client.hset("jaxrec:trend", "bad", "1 x")
    elif location.startswith("postgresql:"):
        with psycopg.connect(location) as connection:
            connection.execute("UPDATE jaxrec.trend SET counts = '{1, 2}' WHERE item_id = 'bad'")
    else:
        with closing(sqlite3.connect(location, isolation_level=None)) as connection:
            connection.execute("UPDATE trend SET counts = x'00' WHERE item_id = 'bad'")
    with pytest.raises(StoreError, match=r"cannot be read: .*'bad'"):
        store.item_counts()
    if not location.startswith("postgresql:"):
        # Neither is it overwritten.
        with pytest.raises(StoreError, match=r"cannot be written: .*bad"):
            store.record([event("3", "bad")])
        assert len(store.history("u")) == 2
    assert store.record([event("4", "good")]) == [event("4", "good")]


def test_a_copy_that_becomes_a_store_goes_on_counting(store: EventStore, tmp_path: Path) -> None:
    store.seed_counts(seed_of({"a": 3}, NOW - DAY), NOW - DAY)
    store.record([event("1", "b", NOW - HOUR), event("2", "c", NOW - HOUR)])
    copy_log(store, tmp_path / "copy.sqlite")
    with open_store(tmp_path / "copy.sqlite") as copy:
        copy.seed_counts(seed_of({"later": 1}, NOW), NOW)
        assert copy.counted_until() == NOW - DAY
        before = copy.item_counts(NONE_READ)
        times = {"a": [NOW - DAY] * 3, "b": [NOW - HOUR], "c": [NOW - HOUR]}
        assert_counts(at(before, NOW), sums(times, NOW))
        assert before.arrival == max(arrival for part in copy.all_events() for arrival, _ in part)
        copy.record([event("3", "b", NOW)])
        assert_counts(at(copy.item_counts(before.change), NOW), sums({"b": [NOW - HOUR, NOW]}, NOW))


def test_a_copy_of_a_store_without_a_seed_is_seeded_with_its_events(store: EventStore, tmp_path: Path) -> None:
    store.record([event("1", "b", NOW - HOUR), event("2", "c", NOW - 2 * DAY)])
    copy_log(store, tmp_path / "copy.sqlite")
    with open_store(tmp_path / "copy.sqlite") as copy:
        copy.record([event("3", "b", NOW)])
        copy.seed_counts(seed_of({"a": 3}, NOW - DAY), NOW - DAY)
        assert_counts(at(copy.item_counts(), NOW), sums({"a": [NOW - DAY] * 3, "b": [NOW - HOUR, NOW]}, NOW))


def test_reading_costs_what_changed(tmp_path: Path) -> None:
    """Counted in steps of SQLite's virtual machine."""
    with ExitStack() as stack:
        store = stack.enter_context(open_store(tmp_path / "events.sqlite"))
        store.record([event(str(number), f"i{number}") for number in range(20_000)])
        change, hundreds = store.item_counts().change, 0

        def count() -> None:
            nonlocal hundreds
            hundreds += 1

        store._reader().set_progress_handler(count, 100)  # type: ignore[attr-defined]
        store.record([event("new", "i7", int(time.time()))])
        assert list(store.item_counts(change).item_ids) == ["i7"]
        assert hundreds < 3
