"""A store is seeded once: with a model's counts, and with what it held before it kept counts."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest

from serve.stores import open_store
from serve.stores.base import EventStore, StoreError
from serve.stores.copy import copy_log
from serve.stores.counters import NONE_READ, Counter
from serve.stores.postgres import counters as postgres_counters
from serve.stores.sqlite import counters as sqlite_counters
from tests.serve.serving.test_models import wait_for
from tests.serve.stores.counting import DAY, HOUR, NOW, assert_counts, at, before_counters, event, seed_of, sums
from tests.serve.stores.databases import DatabaseServer
from tests.serve.stores.test_stores import KINDS, emptied, servers  # noqa: F401


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
                new, exported = (
                    event(f"{thread} {number} {ago}", "i", NOW - ago, f"u{thread}") for ago in (HOUR, 2 * DAY)
                )
                assert store.record([new, exported]) == [new, exported]
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
        seed_second = two._seed

        def others_seed(counters: dict[str, Counter], until: int) -> None:
            one.seed_counts(seed_of({"a": 3, "b": 1}, NOW - DAY), NOW - DAY)
            one.record([event("1", "a")])
            seed_second(counters, until)

        monkeypatch.setattr(two, "_seed", others_seed)
        two.seed_counts(seed_of({"a": 2, "c": 5}, NOW), NOW)
        assert two.counted_until() == NOW - DAY
        times = {"a": [NOW - DAY] * 3 + [NOW], "b": [NOW - DAY]}
        assert_counts(at(two.item_counts(), NOW), sums(times, NOW))


@pytest.mark.parametrize("step", ["last_arrival", "_seed_after"])
def test_a_seed_waits_for_events_that_are_being_recorded_in_postgres(
    step: str,
    servers: dict[str, DatabaseServer],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In both of its steps: else an event whose arrival is not the last would be lost when it comes to be seen."""
    location = emptied("postgres", servers, tmp_path)
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE 'LOCK TABLE%'"
    insert = "INSERT INTO jaxrec.events (event_id, user_id, item_id, timestamp) VALUES ('slow', 'v', 'a', %s)"
    with (
        open_store(location) as store,
        psycopg.connect(location) as slow,
        psycopg.connect(location, autocommit=True) as looking,
        ThreadPoolExecutor(1) as thread,
    ):
        do_step = getattr(store, step)

        def recorded_meanwhile(*given: Any) -> Any:
            slow.execute(insert, [NOW])
            with open_store(location) as other:
                other.record([event("1", "a")])
            done = thread.submit(do_step, *given)
            wait_for(lambda: looking.execute(waiting).fetchone() == (1,))
            slow.commit()
            return done.result()

        monkeypatch.setattr(store, step, recorded_meanwhile)
        store.seed_counts(seed_of({"a": 3}, NOW - DAY), NOW - DAY)
        assert_counts(at(store.item_counts(), NOW), sums({"a": [NOW - DAY] * 3 + [NOW] * 2}, NOW))


def test_events_that_are_recorded_before_the_seed_count_once(
    store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that the export counted too, and those that it did not; none counts before the seed."""
    monkeypatch.setattr("serve.stores.sql.LOOKED_AT_AT_ONCE", 2)
    until = NOW - DAY
    store.record([event("1", "a", until - HOUR), event("2", "a", until), event("3", "a", until + 1)])
    store.record([event("4", "b", NOW, "v"), event("5", "b", until - 1, "v"), event("6", "b", NOW - HOUR)])
    assert list(store.item_counts().item_ids) == []
    store.seed_counts(seed_of({"a": 2, "b": 1}, until), until)
    times = {"a": [until, until, until + 1], "b": [until, NOW, NOW - HOUR]}
    assert_counts(at(store.item_counts(), NOW), sums(times, NOW))


def test_events_that_are_recorded_during_the_seed_count_once(location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its two steps, of which the first reads most events, or in Redis begins to count new ones."""
    step = "_counted" if location.startswith("redis:") else "_seed_after"
    until = NOW - DAY
    with open_store(location) as store, open_store(location) as other:
        do_step = getattr(store, step)

        def recorded_meanwhile(*given: Any) -> Any:
            other.record([event("3", "a", NOW), event("4", "a", until), event("5", "b", NOW)])
            return do_step(*given)

        monkeypatch.setattr(store, step, recorded_meanwhile)
        store.record([event("1", "a", NOW - HOUR), event("2", "a", until)])
        store.seed_counts(seed_of({"a": 2}, until), until)
        store.record([event("6", "b", NOW - HOUR), event("7", "b", until)])
        times = {"a": [until, until, NOW - HOUR, NOW], "b": [NOW, NOW - HOUR]}
        assert_counts(at(other.item_counts(), NOW), sums(times, NOW))


@pytest.mark.parametrize("breaks", [True, False])
def test_any_server_completes_a_seed_in_redis(
    breaks: bool,
    servers: dict[str, DatabaseServer],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After the first step, with the first server's export and time, also if that server goes on afterwards."""
    location = emptied("redis", servers, tmp_path)
    until = NOW - DAY
    with open_store(location) as store, open_store(location) as other:
        count = store._counted  # type: ignore[attr-defined]

        def completed_by_another(*given: Any) -> dict[str, Counter]:
            counters = count(*given)
            assert store.counted_until() is None
            other.record([event("3", "a", NOW), event("4", "a", until)])
            other.seed_counts(seed_of({"a": 9, "other": 9}, NOW), NOW)
            assert other.counted_until() == until
            return fail() if breaks else counters

        monkeypatch.setattr(store, "_counted", completed_by_another)
        store.record([event("1", "a", NOW - HOUR), event("2", "a", until)])
        if breaks:
            with pytest.raises(StoreError, match="broken off"):
                store.seed_counts(seed_of({"a": 2}, until), until)
        else:
            store.seed_counts(seed_of({"a": 2}, until), until)
        assert_counts(at(other.item_counts(), NOW), sums({"a": [until, until, NOW - HOUR, NOW]}, NOW))


def test_of_what_a_store_held_before_the_seed_has_what_the_export_has_not(location: str) -> None:
    """Two events of `a` are in the export: that of its last second too."""
    until = NOW - DAY
    held = [event("1", "a", until - HOUR), event("2", "a", until), event("3", "a", NOW - HOUR)]
    before_counters(location, [*held, event("4", "b", NOW - 2 * HOUR)])
    with open_store(location) as store:
        assert store.counted_until() is None
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
    assert set(store.item_counts().item_ids) == {"a", "b"}


def test_a_seed_of_many_items_is_added_whole(store: EventStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts, and a second attempt adds nothing."""
    monkeypatch.setattr("serve.stores.redis.counters.COUNTERS_AT_ONCE", 7)
    monkeypatch.setattr("serve.stores.postgres.counters.SEEDED_AT_ONCE", 7)
    monkeypatch.setattr("serve.stores.sqlite.counters.ASKED_AT_ONCE", 7)
    items = {f'{number} "ü\n': number + 1 for number in range(50)}
    until = NOW - DAY
    store.record([event(str(number), item) for number, item in enumerate(items)])
    for _ in range(2):
        store.seed_counts(seed_of(items, until), until)
        times = {item: [until] * count + [NOW] for item, count in items.items()}
        assert_counts(at(store.item_counts(), NOW), sums(times, NOW))


def test_a_seeding_that_breaks_off_is_repeated(location: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another server, of another model; in Redis the first one's seed is completed."""
    monkeypatch.setattr("serve.stores.redis.counters.COUNTERS_AT_ONCE", 2)
    monkeypatch.setattr("serve.stores.postgres.counters.SEEDED_AT_ONCE", 2)
    until = NOW - DAY
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
            store.seed_counts(seed_of(dict.fromkeys(items, 3), until), until)
        assert store.counted_until() is None
    with open_store(location) as store:
        store.seed_counts(seed_of(dict.fromkeys(items, 3), until), until)
        assert store.counted_until() == until
        times = {item: [until] * 3 + [NOW] * (item == "i3") for item in items}
        assert_counts(at(store.item_counts(), NOW), sums(times, NOW))


def fail() -> Any:
    raise StoreError("broken off")


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


def test_a_copy_of_a_store_without_a_seed_counts_as_the_store_itself(store: EventStore, tmp_path: Path) -> None:
    """Once both are seeded with the same export."""
    store.record([event("1", "b", NOW - HOUR), event("2", "c", NOW - 2 * DAY)])
    copy_log(store, tmp_path / "copy.sqlite")
    with open_store(tmp_path / "copy.sqlite") as copy:
        for one in (store, copy):
            one.record([event("3", "b", NOW)])
            one.seed_counts(seed_of({"a": 3}, NOW - DAY), NOW - DAY)
            times = {"a": [NOW - DAY] * 3, "b": [NOW - HOUR, NOW]}
            assert_counts(at(one.item_counts(), NOW), sums(times, NOW))
