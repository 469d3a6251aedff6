"""Items in every store: what is kept of them, their order, and how other servers learn what changed."""

import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.model.events import Event
from serve.model.live_catalog import Item
from serve.stores import open_store
from serve.stores.base import Deleted, EventStore, ItemCursor, StoreError, UserEvent
from serve.stores.copy import copy_log
from serve.stores.postgres import items as postgres_items
from serve.stores.redis import items as redis_items
from serve.stores.sqlite import items as sqlite_items
from tests.serve.stores.databases import DatabaseServer, wait_until
from tests.serve.stores.test_stores import KINDS, emptied, location, servers, store  # noqa: F401

FULL = Item(
    *("ß/1", 'A "title" \U0001f600', ("Drama", "für alle"), 0, 253_402_300_799),
    hidden=True,
    metadata={"": "a key is checked elsewhere", "poster": "https://example.org/ä.png"},
)
# In the order of their bytes as UTF-8, which is neither that of UTF-16 nor a dictionary's.
IN_ORDER = ["1", "10", "2", "Z", "a", "a b", "ab", "ä", "\uffff", "\U0001f600"]


def all_items(store: EventStore, at_once: int = 1_000) -> list[Item]:  # noqa: F811
    found: list[Item] = []
    while part := store.list_items(found[-1].item_id if found else "", at_once):
        found += part
    return found


class Reader:
    """What a server knows of a store's items."""

    def __init__(self) -> None:
        self.items: dict[str, Item] = {}
        self.cursor = ItemCursor()

    def read(self, store: EventStore, at_once: int = 1_000) -> int:  # noqa: F811
        """How many changes it read."""
        count, more = 0, True
        while more:
            found = store.items_since(self.cursor, at_once)
            if found.anew:
                self.items = {}
            for item_id, item in found.items:
                if item is None:
                    self.items.pop(item_id, None)
                else:
                    self.items[item_id] = item
            self.cursor, more = found.cursor, len(found.items) == at_once
            count += len(found.items)
        return count


def test_all_of_an_item_comes_back_also_from_a_copy(store: EventStore, tmp_path: Path) -> None:  # noqa: F811
    plain = Item("p")
    assert store.upsert_items([FULL, plain]) == 2
    assert (store.item(FULL.item_id), store.item("p"), store.item("nobody knows it")) == (FULL, plain, None)
    assert all_items(store) == [plain, FULL]
    store.delete_items(["p"])
    copy_log(store, tmp_path / "copy.sqlite")
    with open_store(tmp_path / "copy.sqlite") as copy:
        assert all_items(copy) == [FULL]


def test_an_item_is_replaced_as_a_whole(store: EventStore) -> None:  # noqa: F811
    store.upsert_items([FULL])
    other = Item(FULL.item_id, "Another title")
    assert store.upsert_items([other, Item("new")]) == 1
    assert store.item(FULL.item_id) == other


def test_deleted_items_are_gone_and_can_come_back(store: EventStore) -> None:  # noqa: F811
    store.upsert_items([Item("a"), Item("b")])
    assert store.delete_items(["a", "nobody knows it"]) == 1
    assert store.delete_items(["a"]) == 0
    assert (store.item("a"), all_items(store)) == (None, [Item("b")])
    assert store.upsert_items([Item("a", "again")]) == 1
    assert all_items(store) == [Item("a", "again"), Item("b")]
    assert (store.upsert_items([]), store.delete_items([])) == (0, 0)


@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_items_come_in_pages_in_the_order_of_their_ids(store: EventStore, at_once: int) -> None:  # noqa: F811
    store.upsert_items([Item(item_id) for item_id in IN_ORDER[::-1]])
    assert [one.item_id for one in all_items(store, at_once)] == IN_ORDER == sorted(IN_ORDER)
    # From where an item was that is there no more.
    store.delete_items(["Z"])
    assert [one.item_id for one in store.list_items("Z", 2)] == ["a", "a b"]


def test_who_read_before_is_told_what_changed_alone(location: str) -> None:  # noqa: F811
    with open_store(location) as one, open_store(location) as other:
        reader = Reader()
        assert reader.read(other) == 0
        one.upsert_items([Item(f"{at}") for at in range(10)])
        assert (reader.read(other, 4), len(reader.items)) == (10, 10)
        one.upsert_items([Item("3", "three")])
        one.delete_items(["4", "5"])
        one.upsert_items([Item("5", "five"), Item("new")])
        assert reader.read(other) == 4
        assert reader.items == {item.item_id: item for item in all_items(one)}
        assert reader.read(other) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at_once", [1, 1_000])
@pytest.mark.parametrize("written", [0, 1, 2, 5])
def test_a_restored_store_is_read_anew_whatever_was_written_since(
    kind: str,
    at_once: int,
    written: int,
    servers: dict[str, DatabaseServer],  # noqa: F811
    tmp_path: Path,
) -> None:
    """Before new changes come to the revision that was read, when they do, and after that; also of the same item."""
    location, reader = emptied(kind, servers, tmp_path), Reader()  # noqa: F811
    with open_store(location) as store:  # noqa: F811
        store.upsert_items([Item("a", "kept"), Item("b")])
        reader.read(store, at_once)
        restored = backup(kind, location)
        store.delete_items(["b"])
        store.upsert_items([Item("a", "lost")])
        if at_once > 1:
            reader.read(store, at_once)
        else:
            # In the middle of a read.
            reader.cursor = store.items_since(reader.cursor, 1).cursor
            reader.items.pop("b")
    restored()
    with open_store(location) as store:
        for at in range(written):
            store.upsert_items([Item("a", f"{at}")])
        reader.read(store, at_once)
        assert reader.items == {"a": Item("a", f"{written - 1}" if written else "kept"), "b": Item("b")}
        assert reader.read(store, at_once) == 0


def backup(kind: str, location: str) -> Callable[[], None]:  # noqa: F811
    """How the items become what they are now, while no store is open."""
    if kind == "redis":
        with redis.Redis.from_url(location) as client:
            kept = {key: client.dump(key) for key in client.keys("jaxrec:*item*")}

        def restore() -> None:
            with redis.Redis.from_url(location) as client:
                client.delete(*client.keys("jaxrec:*item*"))
                for key, value in kept.items():
                    client.restore(key, 0, value)

        return restore
    if kind == "postgres":
        with psycopg.connect(location) as connection:
            for table in ("items", "item_marks"):
                connection.execute(f"DROP TABLE IF EXISTS public.{table}")  # type: ignore[call-overload]
                connection.execute(f"CREATE TABLE public.{table} AS TABLE jaxrec.{table}")  # type: ignore[call-overload]

        def restore_tables() -> None:
            with psycopg.connect(location) as connection:
                for table, key in (("items", "revision"), ("item_marks", "number")):
                    connection.execute(f"DELETE FROM jaxrec.{table}")  # type: ignore[call-overload]
                    connection.execute(  # type: ignore[call-overload]
                        f"INSERT INTO jaxrec.{table} OVERRIDING SYSTEM VALUE SELECT * FROM public.{table}"
                    )
                    last = f"(SELECT max({key}) FROM jaxrec.{table})"
                    connection.execute(f"SELECT setval(pg_get_serial_sequence('jaxrec.{table}', '{key}'), {last})")  # type: ignore[call-overload]

        return restore_tables
    copy = Path(f"{location}.backup")
    with closing(sqlite3.connect(location)) as connection, closing(sqlite3.connect(copy)) as target:
        connection.backup(target)

    def restore_file() -> None:
        for suffix in ("", "-wal", "-shm"):
            Path(location + suffix).unlink(missing_ok=True)
        copy.rename(location)

    return restore_file


@pytest.mark.parametrize("change", ["deletes", "stores"])
def test_deleted_items_are_forgotten_and_a_reader_of_before_begins_anew(
    location: str,  # noqa: F811
    change: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (sqlite_items, postgres_items, redis_items):
        monkeypatch.setattr(module, "MOST_ITEM_MARKS", 3)
    early, late = Reader(), Reader()
    with open_store(location) as store:  # noqa: F811
        store.upsert_items([Item(f"{at}") for at in range(9)])
        # One has read one item, the other all.
        found = store.items_since(early.cursor, 1)
        early.cursor, early.items = found.cursor, {"0": Item("0")}
        assert late.read(store) == 9
        assert store.delete_items(["0", "1", "2"]) == 3
        for at in range(3, 6):
            if change == "deletes":
                store.delete_items([f"{at}"])
            else:
                store.upsert_items([Item(f"{at}", "again")])
            assert late.read(store) == (4 if at == 3 else 1)
        left = 5 if change == "deletes" else 6
        # Of the deleted ones those of the last two changes are known.
        assert len(store.items_since(ItemCursor(), 100).items) == left
        early.read(store, 2)
        assert early.items == late.items == {item.item_id: item for item in all_items(store)}


def test_of_a_bad_item_in_a_call_none_is_stored(store: EventStore) -> None:  # noqa: F811
    """The store has no rules of its own, but the databases have."""
    bad = Item("b", metadata={"unencodable": "\ud800"})
    with pytest.raises((StoreError, UnicodeEncodeError)):
        store.upsert_items([Item("a"), bad])
    assert all_items(store) == []


def test_a_deleted_user_changes_no_item(store: EventStore) -> None:  # noqa: F811
    store.upsert_items([Item("u"), Item("i")])
    store.record([UserEvent("1", "u", Event("i", None, 1))])
    assert store.delete_user("u") == Deleted(1, 0)
    assert len(all_items(store)) == 2


DAMAGED = (
    *(b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"color": "red"}', b'{"item_id": "x"}', b'{"title": 5}'),
    *(b'{"title": "\\ud800"}', b'{"tags": 5}', b'{"tags": "Drama"}', b'{"tags": [5]}', b'{"tags": {"a": 1}}'),
    *(b'{"available_from": "1"}', b'{"available_from": 1.5}', b'{"available_until": -1}'),
    *(b'{"available_until": 9000000000000000000000}', b'{"available_from": true}', b'{"hidden": "no"}'),
    *(b'{"metadata": null}', b'{"metadata": []}', b'{"metadata": {"a": 1}}'),
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_item_is_hidden_and_logged_once_and_all_others_are_read(
    kind: str,
    servers: dict[str, DatabaseServer],  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # PostgreSQL has no text that is not UTF-8.
    texts = [text for text in DAMAGED if kind != "postgres" or text != b"\xff"]
    expected = [*(Item(f"{at:02}", hidden=True) for at in range(len(texts))), FULL]
    location = emptied(kind, servers, tmp_path)  # noqa: F811
    with open_store(location) as store:  # noqa: F811
        store.upsert_items([Item(item.item_id, "T") for item in expected[:-1]])
        store.upsert_items([FULL])
        damage(kind, location, {item.item_id: text for item, text in zip(expected, texts, strict=False)})
        assert all_items(store) == expected
        assert store.items_since(ItemCursor(), 100).items == [(item.item_id, item) for item in expected]
        assert [store.item(item.item_id) for item in expected] == expected
        copy_log(store, tmp_path / "copy.sqlite")
        assert [record.levelname for record in caplog.records] == ["ERROR"] * len(texts)
        assert "the item '00' cannot be decoded" in caplog.records[0].getMessage()
        assert store.upsert_items([Item("00", "repaired")]) == 0
        assert store.item("00") == Item("00", "repaired")
    with open_store(tmp_path / "copy.sqlite") as copy:
        assert all_items(copy) == expected


def damage(kind: str, location: str, texts: dict[str, bytes]) -> None:  # noqa: F811
    """Replaces what the store has of items."""
    if kind == "redis":
        with redis.Redis.from_url(location) as client:
            client.hset("jaxrec:items", mapping=texts)
    elif kind == "postgres":
        with psycopg.connect(location) as connection:
            for item_id, text in texts.items():
                connection.execute("UPDATE jaxrec.items SET item = %s WHERE item_id = %s", [text.decode(), item_id])
    else:
        with closing(sqlite3.connect(location)) as connection, connection:
            query = "UPDATE items SET item = CAST(? AS TEXT) WHERE item_id = ?"
            connection.executemany(query, [(text, item_id) for item_id, text in texts.items()])


def test_what_writers_change_at_once_is_missed_by_no_reader(
    servers: dict[str, DatabaseServer],  # noqa: F811
    tmp_path: Path,
) -> None:
    """In PostgreSQL, where revisions are given before a transaction ends."""
    location, reader = emptied("postgres", servers, tmp_path), Reader()  # noqa: F811
    with open_store(location) as store, open_store(location) as other, ThreadPoolExecutor(1) as pool:  # noqa: F811
        with psycopg.connect(location) as slow:
            assert postgres_items.upsert_items(slow, [Item("slow"), Item("both", "first")]) == 2
            quick = pool.submit(other.upsert_items, [Item("quick"), Item("both", "second")])

            def waits_or_is_done() -> None:
                with psycopg.connect(location) as looking:
                    query = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
                    assert quick.done() or looking.execute(query).fetchone() == (1,)

            wait_until(waits_or_is_done)
            reader.read(store)
        # The slow transaction ends here.
        assert quick.result() == 1
        reader.read(store)
        assert reader.items == {item.item_id: item for item in (Item("slow"), Item("quick"), Item("both", "second"))}


@pytest.mark.parametrize("kind", KINDS)
def test_a_store_without_items_is_brought_up_to_date(
    kind: str,
    servers: dict[str, DatabaseServer],  # noqa: F811
    tmp_path: Path,
) -> None:
    location = emptied(kind, servers, tmp_path)  # noqa: F811
    with open_store(location) as store:  # noqa: F811
        store.record([UserEvent("1", "u", Event("i", None, 1))])
    if kind == "postgres":
        with psycopg.connect(location) as connection:
            connection.execute("DROP TABLE jaxrec.items, jaxrec.item_marks")
            connection.execute("UPDATE jaxrec.store SET version = 6")
    elif kind == "redis":
        with redis.Redis.from_url(location) as client:
            client.set("jaxrec:version", "6")
    else:
        with closing(sqlite3.connect(location)) as connection:
            connection.executescript("DROP TABLE items; DROP TABLE item_marks; PRAGMA user_version = 7")
    for created in (1, 0):
        with open_store(location) as store:
            assert store.upsert_items([FULL]) == created
            assert store.history("u") == [Event("i", None, 1)]


IDS = st.sampled_from(["a", "b", "ä", "\U0001f600", "c", "d"])
ITEMS = st.builds(
    Item,
    IDS,
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=5),
    st.lists(st.sampled_from("xyz"), unique=True).map(lambda tags: tuple(sorted(tags))),
    *(st.none() | st.integers(0, 253_402_300_799) for _ in range(2)),
    hidden=st.booleans(),
    metadata=st.dictionaries(st.sampled_from("kl"), st.sampled_from(["", "v"])),
)
STEPS = st.one_of(
    st.tuples(st.just("upsert"), st.lists(ITEMS, unique_by=lambda item: item.item_id, max_size=4)),
    st.tuples(st.just("delete"), st.lists(IDS, unique=True, max_size=4)),
    st.tuples(st.just("record"), IDS),
    st.tuples(st.just("forget"), st.just("u")),
    st.tuples(st.just("read"), st.integers(1, 3)),
    st.tuples(st.just("restart"), st.none()),
)


@pytest.mark.parametrize("kind", KINDS)
def test_any_interleaving_equals_a_dict(
    kind: str,
    servers: dict[str, DatabaseServer],  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Of upserts, deletions, events, deleted users, reads of what changed and restarts."""

    @settings(max_examples=60 if kind == "sqlite" else 20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(steps=st.lists(STEPS, max_size=14))
    def check(steps: list[tuple[str, object]]) -> None:
        location = emptied(kind, servers, tmp_path_factory.mktemp("store"))  # noqa: F811
        expected: dict[str, Item] = {}
        events: list[Event] = []
        reader, opened = Reader(), open_store(location)
        try:
            for at, (what, given_) in enumerate(steps):
                if what == "restart":
                    opened.close()
                    opened = open_store(location)
                else:
                    _step(opened, reader, expected, events, at)[what](given_)
                assert {item.item_id: item for item in all_items(opened, 2)} == expected
                assert opened.history("u") == events
            assert all(opened.item(item_id) == expected.get(item_id) for item_id in ("a", "b", "ä", "\U0001f600"))
            reader.read(opened, 2)
            assert reader.items == expected
        finally:
            opened.close()

    check()


def _step(
    store: EventStore,  # noqa: F811
    reader: Reader,
    expected: dict[str, Item],
    events: list[Event],
    at: int,
) -> dict[str, Callable[..., None]]:
    """What a step does to the store and to the plain model of it."""

    def upsert(items: list[Item]) -> None:
        assert store.upsert_items(items) == sum(item.item_id not in expected for item in items)
        expected.update({item.item_id: item for item in items})

    def delete(item_ids: list[str]) -> None:
        assert store.delete_items(item_ids) == sum(item_id in expected for item_id in item_ids)
        for item_id in item_ids:
            expected.pop(item_id, None)

    def record(item_id: str) -> None:
        store.record([UserEvent(f"{at}", "u", Event(item_id, None, at))])
        events.append(Event(item_id, None, at))

    def forget(user_id: str) -> None:
        store.delete_user(user_id)
        events.clear()

    def read(at_once: int) -> None:
        reader.read(store, at_once)
        assert reader.items == expected

    return {"upsert": upsert, "delete": delete, "record": record, "forget": forget, "read": read}
