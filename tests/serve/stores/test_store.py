"""The event store: order, ids that count once, and no half of a write."""

import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from serve.model.events import Event
from serve.stores import open_store
from serve.stores.base import EventStore, StoreError, UserEvent


def user_event(event_id: str, item_id: str = "i", timestamp: int = 0, user_id: str = "u") -> UserEvent:
    return UserEvent(event_id, user_id, Event(item_id, None, timestamp))


def test_history_is_ordered_by_time_then_arrival(store: EventStore) -> None:
    store.record([user_event("1", "c", 20), user_event("2", "a", 10)])
    store.record([user_event("3", "b", 10), user_event("4", "other", 5, user_id="v")])
    assert store.history("u") == [Event("a", None, 10), Event("b", None, 10), Event("c", None, 20)]
    assert store.history("u", until=19) == [Event("a", None, 10), Event("b", None, 10)]
    assert store.history("u", until=9) == []
    assert store.history("nobody") == []


def test_what_is_stored_comes_back(tmp_path: Path) -> None:
    events = [Event("i", 3.5, 0), Event("ü\0\n", None, 2**63 - 1)]
    with open_store(tmp_path / "s") as store:
        store.record([UserEvent(str(at), "u", event) for at, event in enumerate(events)])
        assert store.history("u") == events
    with open_store(tmp_path / "s") as reopened:
        assert reopened.history("u") == events


def test_an_event_id_counts_once(store: EventStore) -> None:
    first = user_event("1", "first")
    assert store.record([first, user_event("1", "same request")]) == [first]
    assert store.record([user_event("1", "later", user_id="v")]) == []
    assert store.record([]) == []
    assert store.history("u") == [first.event]
    assert store.history("v") == []


def test_all_or_none(store: EventStore) -> None:
    # STRICT tables refuse the text.
    bad = UserEvent("2", "u", Event("i", "five", 0))  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="cannot be written"):
        store.record([user_event("1"), bad])
    assert store.history("u") == []
    assert len(store.record([user_event("1")])) == 1


def test_many_threads_write_and_read(store: EventStore) -> None:
    """Each event is sent by two threads and counts for one; a thread reads what it wrote."""
    start = threading.Barrier(8)

    def write(thread: int) -> int:
        start.wait()
        recorded = 0
        for at in range(50):
            event = user_event(f"{thread // 2}-{at}", user_id=str(thread // 2), timestamp=at)
            recorded += len(store.record([event]))
            assert event.event in store.history(event.user_id)
        return recorded

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(write, range(8))) == 4 * 50
    for user in range(4):
        assert [event.timestamp for event in store.history(str(user))] == list(range(50))


def test_two_stores_share_a_file(tmp_path: Path) -> None:
    with open_store(tmp_path / "s") as one, open_store(tmp_path / "s") as two:
        one.record([user_event("1", "a")])
        assert two.record([user_event("1", "a"), user_event("2", "b")]) == [user_event("2", "b")]
        assert one.history("u") == two.history("u") == [Event("a", None, 0), Event("b", None, 0)]


def test_commits_reach_the_disk(store: EventStore) -> None:
    """WAL keeps an acknowledged commit over a power loss only with synchronous=FULL (2)."""
    assert store._writer.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert store._writer.execute("PRAGMA synchronous").fetchone() == (2,)


def test_not_a_database(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("userId,movieId\n" * 100)
    with pytest.raises(StoreError, match="s: cannot be opened: file is not a database"):
        open_store(tmp_path / "s")


def test_another_programs_database(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "s")
    connection.execute("CREATE TABLE events (id)")
    connection.close()
    with pytest.raises(StoreError, match="is a database of application 0 in version 0, expected an event store"):
        open_store(tmp_path / "s")


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="s: cannot be opened"):
        open_store(tmp_path / "nowhere" / "s")


def test_an_event_loop_learns_revisions_without_waiting_or_failing(tmp_path: Path) -> None:
    path = tmp_path / "events.sqlite"
    with open_store(path) as store:
        store.record([user_event("1"), user_event("2", user_id="v")])
        users = ["u", "v", "nobody"]
        assert store.revisions_at_once(users) == store.revisions(users)
        with sqlite3.connect(path) as other:
            other.execute("ALTER TABLE users RENAME TO lost")
        assert store.revisions_at_once(users) is None
        with sqlite3.connect(path) as other:
            other.execute("ALTER TABLE lost RENAME TO users")
