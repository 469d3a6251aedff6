"""Slates and the items of them that were shown: found, pruned, and deleted with their user, in every store."""

import random
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import psycopg
import pytest

from serve.stores import open_store
from serve.stores.base import Deleted, EventStore, ShownItem, Slate, StoreError, TooManySlates
from serve.stores.copy import copy_log
from serve.stores.deferred import DeferredWrites
from serve.stores.postgres.schema import QUERIES as of_postgres
from serve.stores.redis.store import RedisStore
from serve.stores.redis.values import slate_of
from serve.stores.sqlite.schema import QUERIES as of_sqlite
from tests.serve.stores.slates import log_now, slates_of
from tests.serve.stores.test_stores import (  # noqa: F401
    SLATE,
    emptied,
    location,
    numbered,
    servers,
    store,
    user_event,
)


def test_shown_items_are_found_newest_first_also_those_that_wait(
    store: EventStore,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def shown(name: str, timestamp: int, *items: str, user_id: str = "u") -> Slate:
        return SLATE._replace(recommendation_id=name, timestamp=timestamp, item_ids=items, user_id=user_id)

    log_now(store, shown("1", 10, "a", "b"))
    log_now(store, shown("2", 20, "c", "a"))
    log_now(store, shown("v", 20, "v", user_id="v"))
    store.log_slate(shown("3", 20, "d"))
    store.log_slate(shown("4", 5, "e"))
    assert store.shown_items("u", 0, 99, but="3") == ["e", "c", "a", "b"]
    store.log_slate(shown("w", 30, "w", user_id="w"))
    assert store.shown_items("u", 10, 99) == ["d", "c", "a", "b"]
    store.flush()
    assert store.shown_items("u", 10, 99) == ["d", "c", "a", "b"]
    assert store.shown_items("u", 11, 99) == ["d", "c", "a"]
    assert store.shown_items("u", 0, 99) == ["d", "c", "a", "b", "e"]
    assert store.shown_items("u", 0, 2) == ["d", "c"]
    assert store.shown_items("u", 0, 99, but="2") == ["d", "a", "b", "e"]
    assert store.shown_items("u", 21, 99) == store.shown_items("unknown", 0, 99) == []
    for module in ("deferred", "sql", "redis.store"):
        monkeypatch.setattr(f"serve.stores.{module}.MOST_SLATES", 2)
    # Redis looks at those that were logged last: 3 and 4, and not 3 and 2.
    expected = ["d", "e"] if isinstance(store, RedisStore) else ["d", "c", "a"]
    assert store.shown_items("u", 0, 99) == expected


SHOWN = [
    ShownItem("r1", "a", 1, 10, 20),
    ShownItem("r1", "ü", 2, 11, 21),
    ShownItem("r2", "a", 0, 12, 22),
    ShownItem("r3", "a", 1, 13, 23),
]


def all_shown(opened: EventStore) -> set[ShownItem]:
    return {one for part in opened.all_shown() for one in part}


def test_an_item_of_a_recommendation_is_shown_once(store: EventStore, tmp_path: Path) -> None:  # noqa: F811
    assert store.record_shown([]) == 0
    assert store.record_shown([*SHOWN[:2], SHOWN[0]._replace(position=9)]) == 2
    assert store.record_shown([SHOWN[1]._replace(timestamp=99), *SHOWN[2:]]) == 2
    assert all_shown(store) == set(SHOWN)
    copy_log(store, tmp_path / "copy.sqlite")
    with open_store(tmp_path / "copy.sqlite") as copy:
        assert all_shown(copy) == set(SHOWN)


def test_what_was_shown_goes_with_the_user_of_its_slate(store: EventStore) -> None:  # noqa: F811
    """Whether the slate is logged before or after; r2 has no user, and r3 of another user."""
    store.record_shown(SHOWN[:1])
    for name, user_id in (("r1", "u"), ("r2", None), ("r3", "v")):
        log_now(store, SLATE._replace(recommendation_id=name, user_id=user_id))
    store.record_shown(SHOWN[1:])
    store.merge_users("u", "target")
    store.delete_user("u")
    assert all_shown(store) == set(SHOWN)
    store.delete_user("target")
    assert all_shown(store) == set(SHOWN[2:])


def test_many_shown_items_come_in_parts(store: EventStore, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    for module in ("sql", "redis.store"):
        monkeypatch.setattr(f"serve.stores.{module}.COPIED_AT_ONCE", 3)
    items = [ShownItem(f"r{at // 4}", f"i{at}", at, at, at) for at in range(20)]
    assert store.record_shown(items) == 20
    assert sorted(one for part in store.all_shown() for one in part) == sorted(items)


def test_old_slates_and_what_was_shown_of_them_are_pruned_in_steps(store: EventStore) -> None:  # noqa: F811
    """Of users and of none; their ids can be used again."""
    for number, user_id in enumerate(["u", "v", None, "u", "v", None, "u"]):
        one = SLATE._replace(recommendation_id=f"r{number}", user_id=user_id, timestamp=number)
        log_now(store, one)
        # By a client whose clock is far behind: it does not matter.
        store.record_shown([ShownItem(f"r{number}", "a", 1, 1, number)])
    # Without a slate, by when they were recorded.
    store.record_shown([ShownItem("none", "old", 1, 9, 4), ShownItem("none", "new", 1, 1, 5)])
    store.record([user_event("1")._replace(recommendation_id="r0")])
    steps = 1
    while store.prune_slates(5, 2):
        steps += 1
        assert steps < 100
    assert {one.recommendation_id for part in store.all_slates() for one in part} == {"r5", "r6"}
    assert {one.recommendation_id for one in all_shown(store)} == {"r5", "r6", "none"}
    assert {one.item_id for one in all_shown(store)} == {"a", "new"}
    assert not store.prune_slates(5, 10)
    assert len(store.history("u")) == 1
    log_now(store, SLATE._replace(recommendation_id="r0"))
    assert [one.recommendation_id for one in slates_of(store, "u")] == ["r6", "r0"]


def test_a_slate_ahead_of_the_clock_does_not_stop_pruning(store: EventStore) -> None:  # noqa: F811
    """It was logged first, and thousands of old ones after it; clients' clocks don't matter for what was shown."""
    for number in range(3_000):
        one = SLATE._replace(recommendation_id=f"r{number}", timestamp=1 if number else 10**9)
        store.log_slate(one)
    store.flush()
    store.record_shown([ShownItem("r0", "a", 1, 1, 1), ShownItem("r1", "a", 1, 10**9, 1)])
    for _ in range(30):
        if not store.prune_slates(1_000, 1_000):
            break
    assert [one.recommendation_id for one in slates_of(store, "u")] == ["r0"]
    assert {one.recommendation_id for one in all_shown(store)} == {"r0"}


@pytest.mark.parametrize("some", [3, 500])
def test_slates_since_a_time(store: EventStore, some: int, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Of long lists and short ones, of nobody too; also where servers wrote them a second out of order."""
    monkeypatch.setattr("serve.stores.redis.store.SLATES_AT_ONCE", some)
    monkeypatch.setattr("serve.stores.sql.SOME_SLATES", some)
    users = [*["long"] * 40, *[None] * 20, *(f"u{number}" for number in range(60))]
    slates = [
        SLATE._replace(recommendation_id=f"r{number}", user_id=user, timestamp=100 + (number ^ 1))
        for number, user in enumerate(users)
    ]
    for one in slates:
        store.log_slate(one)
    store.flush()
    for since in (1, 100, 117, 150, 179, 219, 220):
        expected = sorted(one.recommendation_id for one in slates if one.timestamp >= since)
        found = sorted(one.recommendation_id for part in store.all_slates(since, len(expected)) for one in part)
        assert found == expected
        if expected:
            with pytest.raises(TooManySlates):
                list(store.all_slates(since, len(expected) - 1))


def test_slates_since_a_time_are_found_by_their_index(servers, tmp_path) -> None:  # type: ignore[no-untyped-def]  # noqa: F811
    """And not from the first one on: a log is long, and its newest day short."""
    path = tmp_path / "s.sqlite"
    open_store(path).close()
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute(f"EXPLAIN QUERY PLAN {of_sqlite.first_slate}", (5, 10)).fetchall()
    plan = " ".join(row[3] for row in rows)
    assert "SEARCH shown USING COVERING INDEX shown_at (timestamp>?)" in plan
    assert "TEMP B-TREE" not in plan
    database = emptied("postgres", servers, tmp_path)
    with open_store(database) as opened:
        for number in range(5_000):
            opened.log_slate(SLATE._replace(recommendation_id=f"r{number}", timestamp=number))
        opened.flush()
    with psycopg.connect(database) as connection:
        connection.execute("ANALYZE jaxrec.shown")
        connection.execute("SET LOCAL plan_cache_mode = force_generic_plan")
        connection.execute(f"PREPARE first_slate (bigint, bigint) AS {numbered(of_postgres.first_slate)}")
        for since in (1, 4_900):
            rows = connection.execute(f"EXPLAIN EXECUTE first_slate ({since}, 50001)").fetchall()
            assert any("Index Scan using shown_at" in line for (line,) in rows), rows


def test_redis_reads_the_ends_of_lists_alone(servers, tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]  # noqa: F811
    """It has no index of times, but lists in about their order."""
    with open_store(emptied("redis", servers, tmp_path)) as opened:
        for number in range(3_000):
            opened.log_slate(SLATE._replace(recommendation_id=f"r{number}", timestamp=number))
            opened.record([user_event(f"e{number}")]) if number % 10 == 0 else None
        opened.flush()
        read = []
        monkeypatch.setattr(
            "serve.stores.redis.store.slate_of", lambda value, user_id: read.append(1) or slate_of(value, user_id)
        )
        assert sum(len(part) for part in opened.all_slates(2_950)) == 50
        # All of the newest part are of the time, and none of the next one.
        assert len(read) == 50 + 200
        after = opened.last_arrival() - 7
        assert [arrival for part in opened.all_events(after) for arrival, _ in part] == [*range(after + 1, after + 8)]


def test_redis_prunes_long_lists_and_many_keys_in_small_steps(servers, tmp_path) -> None:  # type: ignore[no-untyped-def]  # noqa: F811
    """Each call deletes at most twice what it should look at, wherever the last one ended."""
    with open_store(emptied("redis", servers, tmp_path)) as opened:
        for number in range(300):
            user_id = "long" if number < 200 else f"u{number}"
            opened.log_slate(SLATE._replace(recommendation_id=f"r{number}", user_id=user_id, timestamp=1))
        opened.flush()
        opened.record_shown([ShownItem(f"none{number}", "a", 1, 1, 1) for number in range(100)])

        def left() -> int:
            slates = sum(len(part) for part in opened.all_slates())
            return slates + sum(len(part) for part in opened.all_shown())

        before, more, steps = left(), True, 0
        assert before == 400
        while more and steps < 200:
            more, steps = opened.prune_slates(2, 10), steps + 1
            assert before - 20 <= left()
            before = left()
        assert before == 0
        assert not more


def test_of_two_looks_at_the_last_deletion_the_later_one_counts() -> None:
    """The first one asks the store, is overtaken by the second, and only then notes what it was told."""
    told = iter([0, 1, 2])
    deletions: list[int] = []

    def last_deletion() -> int:
        number = next(told, 2)
        if number == 1:
            waiting.look()
        return number

    waiting = DeferredWrites(lambda slates, states: deletions.extend(one.deletion for one in slates), last_deletion)
    waiting.look()
    waiting.add([SLATE])
    waiting.close()
    assert deletions == [2]


def test_what_waits_for_a_broken_store_is_limited_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three slates of some 82,000 bytes; the oldest are dropped, and what is deleted makes room."""

    def broken(slates: object, states: object) -> None:
        raise StoreError("away")

    monkeypatch.setattr("serve.stores.deferred.LIMIT_BYTES", 3 * 82_000)
    waiting = DeferredWrites(broken, lambda: 0)
    for number in range(5):
        slate = SLATE._replace(recommendation_id=f"r{number}", item_ids=("i",) * 10_000)
        waiting.add([slate._replace(user_id=f"u{number}", log_propensities=(), excluded_item_ids=())])
    assert waiting.dropped_count == 2
    waiting.discard("u4")
    waiting.add([slate._replace(user_id="u5", log_propensities=(), excluded_item_ids=())])
    assert waiting.dropped_count == 2
    assert [len(waiting.slates(f"u{number}", 0)) for number in range(6)] == [0, 0, 1, 1, 0, 1]
    waiting.close()
    assert waiting.dropped_count == 5


def test_slates_in_any_order_of_calls_are_those_of_a_plain_model(store: EventStore) -> None:  # noqa: F811
    """Logging, deleting, merging and pruning, beside a dictionary; what was shown goes with its slate."""
    chance, slates = random.Random(5), dict[str, Slate]()
    for step in range(150):
        user, other = chance.sample(("u", "v", "w"), 2)
        action = chance.choice(["log"] * 4 + ["delete", "merge", "prune"])
        own = [name for name, one in slates.items() if one.user_id == user]
        if action == "log":
            slates[f"r{step}"] = SLATE._replace(recommendation_id=f"r{step}", user_id=user, timestamp=step)
            log_now(store, slates[f"r{step}"], started=time.monotonic() + 1)
            assert store.record_shown([ShownItem(f"r{step}", "a", 1, 1, step)] * 2) == 1
        elif action == "delete":
            assert store.delete_user(user) == Deleted(0, len(own))
            slates = {name: one for name, one in slates.items() if name not in own}
        elif action == "merge":
            assert store.merge_users(user, other) == Deleted(0, len(own))
            slates |= {name: slates[name]._replace(user_id=other) for name in own}
        else:
            slates = {name: one for name, one in slates.items() if one.timestamp >= step - 20}
            while store.prune_slates(step - 20, 2):
                pass
        assert sorted(one for part in store.all_slates() for one in part) == sorted(slates.values()), (step, action)
        assert {one.recommendation_id for one in all_shown(store)} == slates.keys()
