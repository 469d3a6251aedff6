"""A user's events listed, deleted, and made another user's, in every store."""

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis

from serve.model.events import Event
from serve.stores import open_store
from serve.stores.base import (
    Changes,
    Deleted,
    EventStore,
    SpilledState,
    TooManyToMerge,
    UserEvent,
)
from tests.serve.stores.counting import assert_counts, at, seed_of, sums
from tests.serve.stores.slates import log_now, slates_of
from tests.serve.stores.test_stores import (  # noqa: F401
    SLATE,
    emptied,
    location,
    servers,
    store,
    user_event,
)


def limit(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """So much can be merged, in each store."""
    for module in ("sqlite.users", "postgres.users", "redis.store"):
        monkeypatch.setattr(f"serve.stores.{module}.MOST_MERGED", most)


def ids(found: list[tuple[int, UserEvent]]) -> list[str]:
    return [event.event_id for _, event in found]


def test_events_are_listed_newest_first_in_pages(store: EventStore) -> None:  # noqa: F811
    """By time, then by arrival; neutral ones among them."""
    times = [5, 9, 5, 1, 9, 7]
    events = [
        UserEvent(f"e{at}", "u", Event("i", 3.0, time, at % 3 - 1.0), "r", "t", 0.5) for at, time in enumerate(times)
    ]
    store.record([*events, user_event("other", user_id="v")])
    order = ["e4", "e1", "e5", "e2", "e0", "e3"]
    found = store.list_events("u", 10)
    assert ids(found) == order
    assert [event for _, event in found] == [events[int(name[1:])] for name in order]
    for size in (1, 2, 4, 6):
        paged: list[str] = []
        before = None
        while page := store.list_events("u", size, before):
            paged += ids(page)
            assert len(page) <= size
            before = (page[-1][1].event.timestamp, page[-1][0])
        assert paged == order
    assert store.list_events("unknown", 10) == []


def test_deleted_events_are_gone_and_their_ids_free(store: EventStore) -> None:  # noqa: F811
    store.seed_counts(seed_of({}, 0), 0)
    store.record([user_event(f"e{day}", f"i{day}", day) for day in range(1, 6)])
    store.record([user_event("other", user_id="v")])
    before = store.revision("u")
    store.save_states([SpilledState("u", "m", before, b"x")])
    store.flush()
    assert store.delete_events("u", ["e2", "e5", "other", "none", "e2"]) == 2
    assert ids(store.list_events("u", 9)) == ["e4", "e3", "e1"]
    assert len(store.history("v")) == 1
    # A reader that knew the history reads all of it again.
    assert store.revision("u") > before
    assert store.changes("u", before) == Changes(store.revision("u"), store.history("u"), complete=True)
    assert store.changes("u", store.revision("u")) == Changes(store.revision("u"), [], complete=False)
    assert store.load_state("u", "m") is None
    store.save_states([SpilledState("u", "m", before, b"late")])
    store.flush()
    assert store.load_state("u", "m") is None
    again = store.revision("u")
    assert store.delete_events("u", ["e2", "e5"]) == 0
    assert store.delete_events("u", []) == 0
    assert store.revision("u") == again
    assert store.record([user_event("e2", "new", 9)]) == [user_event("e2", "new", 9)]
    assert store.changes("u", again).events == [Event("new", None, 9)]
    # As with a deleted user, counters keep what was added.
    assert_counts(at(store.item_counts(), 9), sums({**{f"i{day}": [day] for day in range(1, 6)}, "new": [9]}, 9))


def test_a_user_without_events_left_is_one_without_events(store: EventStore) -> None:  # noqa: F811
    store.record([user_event("1")])
    before = store.revision("u")
    log_now(store, SLATE)
    assert store.delete_events("u", ["1"]) == 1
    assert store.revision("u") == 0
    assert store.changes("u", before) == Changes(0, [], complete=True)
    assert len(slates_of(store, "u")) == 1
    store.record([user_event("1")])
    assert store.revision("u") > before


def test_a_merged_user_has_all_of_both(store: EventStore) -> None:  # noqa: F811
    store.record(
        [user_event("t1", "a", 10, "target"), user_event("s1", "b", 5, "u"), user_event("t2", "c", 20, "target")]
    )
    store.record(
        [
            user_event("s2", "d", 20, "u"),
            user_event("t3", "e", 20, "target"),
            UserEvent("n", "u", Event("f", None, 7, 0.0)),
        ]
    )
    known = store.revision("target")
    log_now(store, SLATE)
    # Still to be written.
    store.log_slate(SLATE._replace(recommendation_id="r2"))
    store.log_slate(SLATE._replace(recommendation_id="r3", user_id="target"))
    for user_id in ("u", "target"):
        store.save_states([SpilledState(user_id, "m", store.revision(user_id), b"x")])
    assert store.merge_users("u", "target") == Deleted(event_count=3, slate_count=2)
    # Of the same second, by arrival.
    merged = [Event(item, None, time) for item, time in (("b", 5), ("a", 10), ("c", 20), ("d", 20), ("e", 20))]
    assert store.history("target") == merged
    assert ids(store.list_events("target", 9)) == ["t3", "s2", "t2", "t1", "n", "s1"]
    assert store.changes("target", known) == Changes(store.revision("target"), merged, complete=True)
    assert store.revision("target") > known
    store.flush()
    assert {one.recommendation_id for one in slates_of(store, "target")} == {"r1", "r2", "r3"}
    assert (store.history("u"), store.revision("u"), store.list_events("u", 9), slates_of(store, "u")) == (
        [],
        0,
        [],
        [],
    )
    store.flush()
    assert [store.load_state(user_id, "m") for user_id in ("u", "target")] == [None, None]
    # Ids count once, of any user; to repeat it changes nothing.
    assert store.record([user_event("s1", user_id="u"), user_event("t1", user_id="u")]) == []
    revision = store.revision("target")
    assert store.merge_users("u", "target") == Deleted(0, 0)
    assert store.revision("target") == revision
    # The name can be used again, and merged again.
    store.record([user_event("s3", "g", 30, "u")])
    assert store.merge_users("u", "target") == Deleted(1, 0)
    assert store.history("target") == [*merged, Event("g", None, 30)]
    assert store.delete_user("target") == Deleted(7, 3)
    assert sum(len(part) for part in store.all_events()) == sum(len(part) for part in store.all_slates()) == 0


def test_a_user_can_become_one_that_has_nothing(store: EventStore) -> None:  # noqa: F811
    assert store.merge_users("u", "target") == Deleted(0, 0)
    assert store.revision("target") == 0
    log_now(store, SLATE, started=time.monotonic() + 1)
    assert store.merge_users("u", "target") == Deleted(0, 1)
    assert store.revision("target") == 0
    store.record([user_event("1")])
    assert store.merge_users("u", "target") == Deleted(1, 0)
    assert store.history("target") == [Event("i", None, 0)]
    assert store.revision("target") > 0
    # Deleted meanwhile: what comes from then on is of a new user.
    store.delete_user("target")
    store.record([user_event("2")])
    assert store.merge_users("u", "target") == Deleted(1, 0)
    assert len(slates_of(store, "target")) == 0


def test_too_much_is_not_merged(store: EventStore, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    limit(monkeypatch, 3)
    store.record([user_event("1"), user_event("2"), user_event("3", user_id="target")])
    log_now(store, SLATE)
    log_now(store, SLATE._replace(recommendation_id="r2"))
    with pytest.raises(TooManyToMerge, match=r"^source_user_id: expected .* at most 3 events .*, came one with 4"):
        store.merge_users("u", "target")
    assert [len(store.history(user_id)) for user_id in ("u", "target")] == [2, 1]
    limit(monkeypatch, 4)
    assert store.merge_users("u", "target") == Deleted(2, 2)


def test_what_another_server_has_still_to_log_of_a_merged_user_is_not_written(location: str) -> None:  # noqa: F811
    with open_store(location) as one, open_store(location) as other:
        one.record([user_event("1")])
        other.log_slate(SLATE)
        one.merge_users("u", "target")
        other.flush()
        assert [shown for part in one.all_slates() for shown in part] == []


def test_long_lists_of_redis_are_merged_as_a_whole(servers, tmp_path) -> None:  # type: ignore[no-untyped-def]  # noqa: F811
    where = emptied("redis", servers, tmp_path)
    with open_store(where) as opened, redis.Redis.from_url(where) as client:
        for start in range(0, 2_500, 500):
            opened.record([user_event(str(start + at), timestamp=start + at) for at in range(500)])
        assert opened.merge_users("u", "target") == Deleted(2_500, 0)
        assert [event.timestamp for event in opened.history("target")] == list(range(2_500))
        assert opened.delete_events("target", [str(at) for at in range(0, 2_500, 3)]) == 834
        assert client.llen("jaxrec:events:target") == client.scard("jaxrec:event_ids") == 2_500 - 834
        assert not client.exists("jaxrec:events:u", "jaxrec:user:u")


def test_recording_deleting_and_merging_at_once_lose_and_double_nothing(location: str) -> None:  # noqa: F811
    """Two servers record a visitor's and a user's events, merge the visitor, and delete every third event."""
    start = threading.Barrier(4)

    def record(store: EventStore, user_id: str) -> None:  # noqa: F811
        start.wait()
        for number in range(40):
            assert len(store.record([user_event(f"{user_id}{number}", user_id=user_id, timestamp=number)])) == 1

    def repeat(call: Callable[[], object], times: int) -> None:
        start.wait()
        for _ in range(times):
            call()

    doomed = [f"{user_id}{number}" for user_id in ("u", "target") for number in range(0, 40, 3)]
    with open_store(location) as one, open_store(location) as two, ThreadPoolExecutor(4) as threads:
        calls = [
            threads.submit(record, one, "u"),
            threads.submit(record, two, "target"),
            threads.submit(repeat, lambda: two.merge_users("u", "target"), 20),
            threads.submit(repeat, lambda: one.delete_events("target", doomed), 20),
        ]
        for call in calls:
            call.result()
        one.merge_users("u", "target")
        two.delete_events("target", doomed)
        expected = {f"{user_id}{number}" for user_id in ("u", "target") for number in range(40)} - set(doomed)
        for opened in (one, two):
            assert sorted(ids(opened.list_events("target", 999))) == sorted(expected)
            assert opened.changes("target", 0).events == opened.history("target")
            assert opened.list_events("u", 1) == []


def test_any_order_of_calls_is_that_of_a_plain_model(location: str) -> None:  # noqa: F811
    """Recording, deleting, merging and reopening, beside dictionaries."""
    chance = random.Random(3)
    users, events = ("u", "v", "w"), dict[str, UserEvent]()
    arrivals = dict[str, int]()
    known: dict[str, tuple[int, list[Event]]] = dict.fromkeys(users, (0, []))
    opened = open_store(location)
    try:
        for step in range(250):
            action = chance.choice(["record"] * 4 + ["delete events", "delete user", "merge", "reopen"])
            user, other = chance.sample(users, 2)
            if action == "record":
                new = UserEvent(
                    f"e{chance.randrange(40)}",
                    user,
                    Event("i", None, chance.randrange(20), chance.choice([1.0, 2.0, 0.0, -1.0])),
                )
                assert opened.record([new]) == ([] if new.event_id in events else [new])
                arrivals.setdefault(new.event_id, step)
                events.setdefault(new.event_id, new)
            elif action == "delete events":
                asked = [f"e{number}" for number in chance.sample(range(40), 8)]
                gone = [name for name in asked if name in events and events[name].user_id == user]
                assert opened.delete_events(user, asked) == len(gone)
                for name in gone:
                    del events[name], arrivals[name]
            elif action == "delete user":
                gone = [name for name, one in events.items() if one.user_id == user]
                assert opened.delete_user(user).event_count == len(gone)
                for name in gone:
                    del events[name], arrivals[name]
            elif action == "merge":
                moved = {name: one._replace(user_id=other) for name, one in events.items() if one.user_id == user}
                assert opened.merge_users(user, other).event_count == len(moved)
                events |= moved
            else:
                opened.close()
                opened = open_store(location)
            for user in users:
                own = [one for one in events.values() if one.user_id == user]
                own.sort(key=lambda one: (one.event.timestamp, arrivals[one.event_id]))
                assert [one for _, one in opened.list_events(user, 99)] == own[::-1], (step, action)
                history = [one.event for one in own if one.event.weight]
                assert opened.history(user) == history
                # A reader that goes on from what it knew.
                revision, before = known[user]
                changes = opened.changes(user, revision)
                before = [*([] if changes.complete else before), *changes.events]
                known[user] = changes.revision, before
                assert sorted(before) == sorted(history), (step, action)
                assert (opened.revision(user) == 0) == (not own)
    finally:
        opened.close()


def test_what_is_logged_while_users_are_merged_is_the_targets(store: EventStore) -> None:  # noqa: F811
    store.record([user_event("1")])
    log = SLATE._replace(recommendation_id="r2")
    with store._deferred.merging("u", "target"):  # type: ignore[attr-defined]
        store.log_slate(log)
        store.save_states([SpilledState("u", "m", store.revision("u"), b"x")])
    store.flush()
    assert slates_of(store, "target") == [log._replace(user_id="target")]
    assert slates_of(store, "u") == []
    assert store.load_state("u", "m") is None


def test_what_is_recommended_to_a_user_after_a_merge_is_logged(store: EventStore) -> None:  # noqa: F811
    store.record([user_event("1")])
    log_now(store, SLATE)
    store.merge_users("u", "target")
    log = SLATE._replace(recommendation_id="r2")
    log_now(store, log)
    assert (slates_of(store, "u"), store.dropped_count) == ([log], 0)


@pytest.mark.parametrize("seed", range(4))
def test_after_a_merge_the_newest_of_both_are_the_history(
    store: EventStore,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    """Of lists that are longer than what is read; the older user may be either one."""
    for module in ("base", "redis.store", "sql"):
        monkeypatch.setattr(f"serve.stores.{module}.MOST_EVENTS", 5)
    for module in ("redis.store", "sql", "deferred"):
        monkeypatch.setattr(f"serve.stores.{module}.MOST_SLATES", 5)
    chance, users = random.Random(seed), ["u"] * 30 + ["target"] * 30
    if seed < 2:
        chance.shuffle(users)
    elif seed == 2:
        users.reverse()
    for number, user_id in enumerate(users):
        weight = chance.choice([1.0, -1.0, 0.0])
        store.record([UserEvent(f"e{number}", user_id, Event(f"i{number}", None, number, weight))])
        one = SLATE._replace(recommendation_id=f"r{number}", user_id=user_id, timestamp=number)
        store.log_slate(one._replace(item_ids=(f"i{number}",)))
    store.flush()
    assert store.merge_users("u", "target") == Deleted(30, 30)
    listed = store.list_events("target", 99)
    assert ids(listed) == [f"e{number}" for number in reversed(range(60))]
    not_neutral = [one.event for _, one in reversed(listed) if one.event.weight]
    assert store.history("target") == not_neutral[-5:]
    assert store.changes("target", 0, 5).events == not_neutral[-5:]
    assert store.shown_items("target", 0, 99) == [f"i{number}" for number in range(59, 54, -1)]
    revision = store.revision("target")
    store.record([UserEvent("new", "target", Event("new", None, 99))])
    assert store.changes("target", revision).events == [Event("new", None, 99)]


def test_neutral_events_do_not_hide_the_others_and_cost_redis_no_read(servers, tmp_path) -> None:  # type: ignore[no-untyped-def]  # noqa: F811
    where = emptied("redis", servers, tmp_path)
    with open_store(where) as opened, redis.Redis.from_url(where) as client:
        opened.record([user_event("first")])
        revision = opened.revision("u")
        for start in range(0, 5_000, 1_000):
            opened.record([UserEvent(f"{start + at}", "u", Event("i", None, 1, 0.0)) for at in range(1_000)])
        opened.record([user_event("last", "j", 2)])
        client.config_resetstat()
        assert opened.changes("u", revision).events == [Event("j", None, 2)]
        assert opened.history("u") == [Event("i", None, 0), Event("j", None, 2)]
        assert client.llen("jaxrec:events:u") == 2
        assert client.info("commandstats")["cmdstat_lrange"]["calls"] == 2
        assert len(opened.list_events("u", 9_999)) == 5_002
        assert opened.delete_events("u", ["17", "last"]) == 2
        assert opened.delete_user("u") == Deleted(5_000, 0)
        assert not client.exists("jaxrec:neutral:u", "jaxrec:events:u", "jaxrec:event_ids")
