"""The catalogue of loaded models follows the items of the store, whatever becomes of the store and of the models."""

import gc
import logging
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.model_versions import add_version
from serve.client import Item as SentItem
from serve.client import RecommenderClient
from serve.front.server import create_server
from serve.model.directory import Artifact
from serve.model.live_catalog import Item
from serve.model.recommender import Recommender
from serve.observability.metrics import Metrics
from serve.serving import catalogue, loading
from serve.serving.catalogue import CatalogueRefresher
from serve.serving.loading import ModelLoader, open_models
from serve.stores import open_store
from serve.stores.base import EventStore, ItemChanges, ItemCursor, StoreError
from tests.serve.serving.test_models import wait_for

ONE, OTHER = 1, 2


class Clock:
    """One that stands, and is set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def fresh(artifact: Artifact) -> Recommender:
    return Recommender(artifact, "cpu")


@pytest.fixture
def refresher(store: EventStore) -> Iterator[CatalogueRefresher]:
    """It refreshes when it is called."""
    opened = CatalogueRefresher(store, 3_600.0)
    yield opened
    opened.close()


def withheld(model: Recommender) -> tuple[int, ...]:
    found = model.live.withheld(0)
    return () if found is None or found.items is None else found.items


def fails(*_: object) -> None:
    raise StoreError("away")


def test_what_changes_in_the_store_is_in_the_next_catalogue(
    fresh: Recommender, store: EventStore, refresher: CatalogueRefresher
) -> None:
    ids, before = fresh.catalog.item_ids, fresh.live
    refresher.prepare(fresh)
    store.upsert_items([Item(ids[ONE], "One", hidden=True), Item("unknown", "U", hidden=True)])
    refresher.refresh()
    assert (fresh.catalog.titles[ONE], withheld(fresh)) == ("One", (ONE,))
    assert refresher.item_count() == 2
    # Those who have it keep what it was.
    assert before.catalog.titles[ONE] == fresh.own_catalog.titles[ONE] != "One"
    store.upsert_items([Item(ids[OTHER], "Two", ("Jazz",), metadata={"k": "v"})])
    store.delete_items([ids[ONE], "unknown"])
    refresher.refresh()
    assert fresh.catalog.titles[ONE] == fresh.own_catalog.titles[ONE]
    assert (fresh.catalog.titles[OTHER], fresh.live.metadata[OTHER]) == ("Two", {"k": "v"})
    assert (withheld(fresh), refresher.item_count(), "Jazz" in fresh.filters.of_tag) == ((), 1, True)


def test_without_a_change_the_catalogue_is_the_same_object(
    fresh: Recommender, store: EventStore, refresher: CatalogueRefresher
) -> None:
    store.upsert_items([Item(fresh.catalog.item_ids[ONE])])
    refresher.prepare(fresh)
    before = fresh.live
    refresher.refresh()
    assert fresh.live is before


def test_without_a_change_of_its_items_a_model_keeps_its_catalogue(
    fresh: Recommender, store: EventStore, refresher: CatalogueRefresher
) -> None:
    refresher.prepare(fresh)
    before = fresh.live
    store.delete_items(["unknown"])
    refresher.refresh()
    assert fresh.live is before
    store.upsert_items([Item("unknown", "U", ("Jazz",))])
    refresher.refresh()
    assert fresh.live.added_ids == ("unknown",)
    assert ("Jazz" in fresh.stored_tags, refresher.item_count()) == (True, 1)


def test_the_tags_of_the_store_are_those_of_its_items(
    fresh: Recommender, store: EventStore, refresher: CatalogueRefresher
) -> None:
    store.upsert_items([Item("a", "", ("x", "y")), Item("b", "", ("y",))])
    refresher.prepare(fresh)
    tags = fresh.stored_tags

    def known() -> set[str]:
        refresher.refresh()
        return {tag for tag in "xyz" if tag in tags}

    assert known() == {"x", "y"}
    store.upsert_items([Item("a", "", ("y", "z"))])
    assert known() == {"y", "z"}
    store.delete_items(["a"])
    assert known() == {"y"}
    store.delete_items(["b"])
    assert known() == set()


def test_a_model_is_not_served_before_the_items_were_read_once(
    model_directory: Path, store: EventStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would answer what is hidden. The server ends as if the store could not be opened."""
    monkeypatch.setattr(store, "items_since", fails)
    add_version(tmp_path / "versions", model_directory, "1")
    with pytest.raises(StoreError, match="away"):
        open_models(tmp_path / "versions", ModelLoader(store, Metrics(), "cpu"), watch_s=0)


def test_what_pages_brought_before_a_failure_is_not_read_again(
    fresh: Recommender, store: EventStore, refresher: CatalogueRefresher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "AT_ONCE", 3)
    read, left = store.items_since, [2]

    def fails_after_two_pages(cursor: ItemCursor, most: int) -> ItemChanges:
        left[0] -= 1
        if left[0] < 0:
            raise StoreError("away")
        return read(cursor, most)

    monkeypatch.setattr(store, "items_since", fails_after_two_pages)
    store.upsert_items([Item(item_id, hidden=True) for item_id in fresh.catalog.item_ids[1:9]])
    with pytest.raises(StoreError):
        refresher.prepare(fresh)
    assert withheld(fresh) == ()
    left[0] = 1
    refresher.prepare(fresh)
    assert withheld(fresh) == tuple(range(1, 9))


def test_all_pages_are_read_at_once(
    fresh: Recommender, store: EventStore, refresher: CatalogueRefresher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "AT_ONCE", 3)
    store.upsert_items([Item(item_id, hidden=True) for item_id in fresh.catalog.item_ids[1:10]])
    refresher.prepare(fresh)
    assert withheld(fresh) == tuple(range(1, 10))
    store.delete_items(fresh.catalog.item_ids[1:9])
    refresher.refresh()
    assert withheld(fresh) == (9,)


def test_two_servers_of_a_store_answer_with_the_same_catalogue(artifact: Artifact, tmp_path: Path) -> None:
    with open_store(tmp_path / "events.sqlite") as one, open_store(tmp_path / "events.sqlite") as other:
        first, second = Recommender(artifact, "cpu"), Recommender(artifact, "cpu")
        here, there = CatalogueRefresher(one, 3_600.0), CatalogueRefresher(other, 3_600.0)
        here.prepare(first)
        there.prepare(second)
        item_id = first.catalog.item_ids[ONE]
        for item in (Item(item_id, "One", hidden=True), Item(item_id, "Once more")):
            one.upsert_items([item])
            here.refresh()
            there.refresh()
            assert first.catalog.titles[ONE] == second.catalog.titles[ONE] == item.title
            assert withheld(first) == withheld(second) == ((ONE,) if item.hidden else ())


def test_a_model_that_is_loaded_while_the_store_is_away_has_the_items_that_were_read_before(
    artifact: Artifact, fresh: Recommender, store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It withholds what is hidden from its first answer on."""
    counted: list[int] = []
    refresher = CatalogueRefresher(store, 3_600.0, on_failure=lambda: counted.append(1))
    store.upsert_items([Item(fresh.catalog.item_ids[ONE], hidden=True)])
    refresher.prepare(fresh)
    monkeypatch.setattr(store, "items_since", fails)
    later = Recommender(artifact, "cpu")
    refresher.prepare(later)
    assert withheld(later) == (ONE,)
    assert counted == [1]


def test_a_store_that_fails_is_logged_once_and_counted_and_the_catalogue_stays(
    fresh: Recommender, store: EventStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "serve.serving.refresher")
    clock, counted = Clock(), list[int]()
    refresher = CatalogueRefresher(store, 3_600.0, on_failure=lambda: counted.append(1), monotonic=clock)
    store.upsert_items([Item(fresh.catalog.item_ids[ONE], hidden=True)])
    refresher.prepare(fresh)
    with monkeypatch.context() as patched:
        patched.setattr(store, "items_since", fails)
        for clock.now in (1.0, 2.0, 3.0):
            refresher.refresh()
    assert (withheld(fresh), len(counted), refresher.age_s()) == ((ONE,), 3, 3.0)
    assert [record.message for record in caplog.records] == [catalogue.READING]
    store.delete_items([fresh.catalog.item_ids[ONE]])
    refresher.refresh()
    assert (withheld(fresh), refresher.age_s()) == ((), 0.0)
    assert caplog.records[-1].message == f"no longer: {catalogue.READING}"


def test_a_store_that_was_replaced_by_an_older_copy_is_read_anew(
    fresh: Recommender, store: EventStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refresher = CatalogueRefresher(store, 3_600.0)
    ids = fresh.catalog.item_ids
    with open_store(tmp_path / "older.sqlite") as older:
        older.upsert_items([Item(ids[OTHER], hidden=True)])
        store.upsert_items([Item(ids[ONE], hidden=True), Item(ids[3], hidden=True)])
        refresher.prepare(fresh)
        monkeypatch.setattr(store, "items_since", older.items_since)
        refresher.refresh()
        assert (withheld(fresh), refresher.item_count()) == ((OTHER,), 1)


def test_a_model_that_serves_no_more_is_not_kept_in_memory(
    artifact: Artifact, store: EventStore, refresher: CatalogueRefresher
) -> None:
    model = Recommender(artifact, "cpu")
    refresher.prepare(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_server_takes_in_changes_by_itself_and_keeps_them_over_a_reload(
    model_directory: Path, store: EventStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the client's call to the answers, and in the metrics."""
    monkeypatch.setattr(loading, "CATALOGUE_REFRESH_S", 0.02)
    versions, metrics = tmp_path / "versions", Metrics()
    add_version(versions, model_directory, "1")
    with open_models(versions, ModelLoader(store, metrics, "cpu"), watch_s=0) as models:
        server = create_server(models, store, "127.0.0.1:0", metrics=metrics)
        server.start()
        with RecommenderClient(f"127.0.0.1:{server.port}", timeout_s=30) as client:
            best = client.recommend(history=[], k=2).recommendations
            client.upsert_items([SentItem(item_id=best[0].item_id, hidden=True), SentItem(item_id="unknown")])

            def answered() -> tuple[str, str]:
                answer = client.recommend(history=[], k=1)
                return answer.recommendations[0].item_id, answer.model_version

            wait_for(lambda: answered() == (best[1].item_id, "1"))
            add_version(versions, model_directory, "2")
            models.load("2")
            assert answered() == (best[1].item_id, "2")
            client.delete_items([best[0].item_id])
            wait_for(lambda: answered() == (best[0].item_id, "2"))
            client.upsert_items([SentItem(item_id=best[1].item_id, hidden=True)])

            def value(name: str) -> float:
                return metrics.registry.get_sample_value(f"jaxrec_catalogue_{name}") or 0.0

            wait_for(lambda: (value("items"), value("withheld_items")) == (2, 1))
            assert value("refresh_failures_total") == 0
            with monkeypatch.context() as patched:
                patched.setattr(store, "items_since", fails)
                wait_for(lambda: value("refresh_failures_total") > 0)
        server.drain()
