"""The trend of loaded models follows what the servers of a store record, whatever becomes of the store."""

import logging
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest

from bench.model_versions import add_version
from serve.api.service import RecommenderService
from serve.client import Event as ClientEvent
from serve.client import RecommenderClient
from serve.client import UserEvent as ClientUserEvent
from serve.front.server import create_server
from serve.model.directory import Artifact
from serve.model.events import Event
from serve.model.recommender import Query, Recommender
from serve.model.trend import COUNTED_S, HALF_LIVES_S
from serve.observability.metrics import Metrics
from serve.serving.loading import ModelLoader, open_models
from serve.serving.trend import TrendRefresher
from serve.stores import open_store
from serve.stores.base import EventStore, StoreError, UserEvent
from serve.stores.counters import Counter, ItemCounts
from tests.serve.one_model import one_model
from tests.serve.serving.test_models import wait_for

HOUR, DAY = 3_600, 86_400
NOW = 1_700_000_000
COUNTED_UNTIL = NOW - DAY
ITEM, OTHER = 1, 2
REFRESH_S = 0.02


def exported(artifact: Artifact, counts: dict[int, float] | None = None) -> Artifact:
    """With the counts of an export of a day ago: one event of each half-life's weight."""
    array = np.zeros_like(artifact.trend.counts)
    for item, count in (counts or {}).items():
        array[:, item] = count
    return replace(artifact, trend=replace(artifact.trend, counts=array, counted_until=COUNTED_UNTIL))


def event(event_id: str, item_id: str, timestamp: int = NOW) -> UserEvent:
    return UserEvent(event_id, "u", Event(item_id, None, timestamp))


def worth(*times: int, now: int = NOW) -> np.ndarray:
    """What events count by now, for each half-life."""
    return np.array([sum(0.5 ** ((now - time) / half_life) for time in times) for half_life in HALF_LIVES_S])


def array_of(model: Recommender, counts: dict[int, np.ndarray]) -> np.ndarray:
    array = np.zeros_like(model.engine.exported.counts)
    for item, of_item in counts.items():
        array[:, item] = of_item
    return array


def trend_of(model: Recommender, counts: dict[int, np.ndarray]) -> np.ndarray:
    """The trend that a model makes of counts."""
    before = model.engine.trend
    model.engine.use_counts(array_of(model, counts))
    made, model.engine.trend = model.engine.trend, before
    return made.values


def fails(*_: object) -> None:
    raise StoreError("away")


def assert_trend(model: Recommender, counts: dict[int, np.ndarray]) -> None:
    np.testing.assert_allclose(model.engine.trend.values, trend_of(model, counts), rtol=1e-5, atol=1e-6)


@pytest.fixture
def fresh(artifact: Artifact) -> Recommender:
    """Of an export in which ITEM had four events, all a day ago."""
    return Recommender(exported(artifact, {ITEM: 4}), "cpu")


@pytest.fixture
def refresher(store: EventStore) -> Iterator[TrendRefresher]:
    """At NOW; it refreshes when it is called."""
    opened = TrendRefresher(store, 3_600.0, clock=lambda: NOW)
    yield opened
    opened.close()


def test_recorded_events_are_in_the_next_trend(
    fresh: Recommender, store: EventStore, refresher: TrendRefresher
) -> None:
    ids = fresh.catalog.item_ids
    refresher.prepare(fresh)
    assert_trend(fresh, {ITEM: 4 * worth(COUNTED_UNTIL)})
    refresher.keep([fresh])
    store.record([event("1", ids[ITEM]), event("2", ids[OTHER], NOW - HOUR), event("3", "unknown")])
    store.record([event("1", ids[ITEM])])
    refresher.refresh()
    assert_trend(fresh, {ITEM: 4 * worth(COUNTED_UNTIL) + worth(NOW), OTHER: worth(NOW - HOUR)})
    # Late, and on items that were counted before; one of the time that the export has counted.
    store.record([event("4", ids[OTHER], NOW - 2 * HOUR), event("5", ids[ITEM], NOW - HOUR)])
    store.record([event("6", ids[OTHER], COUNTED_UNTIL)])
    refresher.refresh()
    counts = {ITEM: 4 * worth(COUNTED_UNTIL) + worth(NOW, NOW - HOUR), OTHER: worth(NOW - HOUR, NOW - 2 * HOUR)}
    assert_trend(fresh, counts)


@pytest.mark.parametrize("loaded_at", [0, 1, 2])
def test_counts_are_at_least_those_of_the_models_export(loaded_at: int, artifact: Artifact, store: EventStore) -> None:
    """Whenever the model is loaded: of an export with five events of ITEM, of which the store has four and later one
    more, and with seven of OTHER, of which it has three and later one more."""
    fresh = Recommender(exported(artifact, {ITEM: 4, OTHER: 3}), "cpu")
    later = Recommender(exported(artifact, {ITEM: 5, OTHER: 7}), "cpu")
    ids = fresh.catalog.item_ids
    with closing(TrendRefresher(store, 3_600.0, clock=lambda: NOW)) as refresher:
        refresher.prepare(fresh)
        for at, new in enumerate([event("1", ids[ITEM], COUNTED_UNTIL + HOUR), event("2", ids[OTHER])]):
            if at == loaded_at:
                refresher.prepare(later)
            store.record([new])
        refresher.prepare(later) if loaded_at == 2 else refresher.keep([later])
        refresher.refresh()
        of_item = 4 * worth(COUNTED_UNTIL) + worth(COUNTED_UNTIL + HOUR)
        of_other = np.maximum(3 * worth(COUNTED_UNTIL) + worth(NOW), 7 * worth(COUNTED_UNTIL))
        assert (of_other > 7 * worth(COUNTED_UNTIL)).any()
        assert (of_other == 7 * worth(COUNTED_UNTIL)).any()
        assert_trend(later, {ITEM: np.maximum(of_item, 5 * worth(COUNTED_UNTIL)), OTHER: of_other})


def test_items_that_a_model_does_not_know_are_kept_for_the_next(
    artifact: Artifact, fresh: Recommender, store: EventStore, refresher: TrendRefresher
) -> None:
    refresher.prepare(fresh)
    store.record([event("1", "new"), event("2", "other"), event("3", "new")])
    refresher.keep([fresh])
    refresher.refresh()
    assert_trend(fresh, {ITEM: 4 * worth(COUNTED_UNTIL)})
    ids = list(artifact.catalog.item_ids)
    ids[OTHER] = "new"
    catalog = replace(artifact.catalog, item_ids=tuple(ids), index={one: at for at, one in enumerate(ids) if at})
    knowing = Recommender(replace(exported(artifact), catalog=catalog), "cpu")
    refresher.prepare(knowing)
    assert_trend(knowing, {ITEM: 4 * worth(COUNTED_UNTIL), OTHER: worth(NOW, NOW)})


def test_the_trend_decays_while_nothing_happens(fresh: Recommender, store: EventStore) -> None:
    now = NOW
    refresher = TrendRefresher(store, 3_600.0, clock=lambda: now)
    refresher.prepare(fresh)
    store.record([event("1", fresh.catalog.item_ids[OTHER])])
    refresher.keep([fresh])
    for now in (NOW, NOW + DAY, NOW + 400 * DAY):
        refresher.refresh()
        assert_trend(fresh, {ITEM: 4 * worth(COUNTED_UNTIL, now=now), OTHER: worth(NOW, now=now)})
    refresher.close()


def test_a_store_that_fails_is_logged_once_and_the_trend_goes_on(
    fresh: Recommender, store: EventStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = NOW
    refresher = TrendRefresher(store, 3_600.0, clock=lambda: now)
    store.record([event("0", fresh.catalog.item_ids[OTHER], COUNTED_UNTIL + 1)])
    refresher.prepare(fresh)
    refresher.keep([fresh])
    read = store.item_counts

    caplog.set_level(logging.INFO, "serve.serving.refresher")
    monkeypatch.setattr(store, "item_counts", fails)
    now = NOW + DAY
    for _ in range(3):
        refresher.refresh()
    expected = {ITEM: 4 * worth(COUNTED_UNTIL, now=now), OTHER: worth(COUNTED_UNTIL + 1, now=now)}
    assert_trend(fresh, expected)
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    monkeypatch.setattr(store, "item_counts", read)
    store.record([event("1", fresh.catalog.item_ids[OTHER], NOW)])
    refresher.refresh()
    assert_trend(fresh, expected | {OTHER: worth(COUNTED_UNTIL + 1, NOW, now=now)})
    assert [record.levelname for record in caplog.records] == ["ERROR", "INFO"]
    refresher.close()


def test_a_failure_is_logged_once_for_each_cause(
    fresh: Recommender, store: EventStore, tmp_path: Path, refresher: TrendRefresher, caplog: pytest.LogCaptureFixture
) -> None:
    """A counter that cannot be decoded, and then another one."""
    ids = fresh.catalog.item_ids
    refresher.prepare(fresh)
    refresher.keep([fresh])
    store.record([event(one, one) for one in ("a", "b")])
    caplog.set_level(logging.INFO, "serve.serving.refresher")
    with closing(sqlite3.connect(tmp_path / "events.sqlite", isolation_level=None)) as connection:
        whole = connection.execute("SELECT counts FROM trend WHERE item_id = 'a'").fetchone()
        for item_id in ("a", "b"):
            connection.execute("UPDATE trend SET counts = x'00' WHERE item_id = ?", [item_id])
            for _ in range(3):
                refresher.refresh()
            connection.execute("UPDATE trend SET counts = ? WHERE item_id = ?", [*whole, item_id])
    assert_trend(fresh, {ITEM: 4 * worth(COUNTED_UNTIL)})
    assert [one.levelname for one in caplog.records] == ["ERROR", "ERROR"]
    for record, item_id in zip(caplog.records, "ab", strict=True):
        assert record.exc_info is not None
        assert f"item '{item_id}'" in str(record.exc_info[1])
    store.record([event("1", ids[OTHER])])
    refresher.refresh()
    assert_trend(fresh, {ITEM: 4 * worth(COUNTED_UNTIL), OTHER: worth(NOW)})
    assert [one.levelname for one in caplog.records] == ["ERROR", "ERROR", "INFO"]


def test_a_model_that_fails_on_its_counts_is_logged_once_and_keeps_its_trend(
    fresh: Recommender, store: EventStore, refresher: TrendRefresher, caplog: pytest.LogCaptureFixture
) -> None:
    """More events than a float32 holds."""
    refresher.prepare(fresh)
    refresher.keep([fresh])
    before = fresh.engine.trend
    many = ItemCounts.of([(fresh.catalog.item_ids[ITEM], Counter(NOW, [1e39] * len(COUNTED_S)))])
    with pytest.MonkeyPatch.context() as patched, np.errstate(over="ignore"):
        patched.setattr(store, "item_counts", lambda since: many)
        for _ in range(3):
            refresher.refresh()
    assert fresh.engine.trend is before
    assert [one.message for one in caplog.records] == [
        f"the model {fresh.info.model_version} keeps its trend of before"
    ]


def test_the_age_is_that_of_the_last_read(
    fresh: Recommender, store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = 100.0
    with closing(TrendRefresher(store, 3_600.0, lambda: NOW, lambda: seconds)) as refresher:
        seconds = 107.0
        assert refresher.age_s() == 7
        refresher.prepare(fresh)
        assert refresher.age_s() == 0
        seconds = 110.0
        assert refresher.age_s() == 3
        refresher.keep([fresh])
        with monkeypatch.context() as broken:
            broken.setattr(store, "item_counts", fails)
            refresher.refresh()
            assert refresher.age_s() == 3
        refresher.refresh()
        assert refresher.age_s() == 0


def test_a_model_serves_without_a_store_that_fails_and_uses_it_when_it_is_back(
    fresh: Recommender, store: EventStore, refresher: TrendRefresher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the export counts twice then."""
    with monkeypatch.context() as broken:
        broken.setattr(store, "counted_until", fails)
        refresher.prepare(fresh)
        assert_trend(fresh, {ITEM: 4 * worth(COUNTED_UNTIL)})
        assert fresh.engine.trend.counted.arrival is None
        refresher.keep([fresh])
        refresher.refresh()
        assert_trend(fresh, {ITEM: 4 * worth(COUNTED_UNTIL)})
    store.record([event("1", fresh.catalog.item_ids[OTHER])])
    refresher.refresh()
    assert_trend(fresh, {ITEM: 4 * worth(COUNTED_UNTIL), OTHER: worth(NOW)})


def test_servers_of_one_store_see_each_others_events(artifact: Artifact, tmp_path: Path) -> None:
    models = [Recommender(exported(artifact, {ITEM: 4}), "cpu") for _ in range(2)]
    ids = artifact.catalog.item_ids
    with open_store(tmp_path / "s.sqlite") as one, open_store(tmp_path / "s.sqlite") as two:
        refreshers = [TrendRefresher(store, 3_600.0, clock=lambda: NOW) for store in (one, two)]
        for refresher, model in zip(refreshers, models, strict=True):
            refresher.prepare(model)
            refresher.keep([model])
        one.record([event("1", ids[OTHER]), event("2", ids[ITEM])])
        two.record([event("3", ids[OTHER]), event("1", ids[OTHER])])
        for refresher, model in zip(refreshers, models, strict=True):
            refresher.refresh()
            assert_trend(model, {ITEM: 4 * worth(COUNTED_UNTIL) + worth(NOW), OTHER: worth(NOW, NOW)})
            refresher.close()


def test_the_trend_of_a_slate_can_be_made_again_from_the_log(
    artifact: Artifact, fresh: Recommender, store: EventStore
) -> None:
    """Of the export, and of the events until the arrival that was noted, decayed to the second that was noted."""
    now = NOW + 0.75
    ids = fresh.catalog.item_ids
    with closing(TrendRefresher(store, 3_600.0, clock=lambda: now)) as refresher:
        service = RecommenderService(one_model(fresh, store), store, Metrics())
        loaded = service.models.for_user("u")
        store.record([event("1", ids[9])])
        query = Query([Event(ids[5], None, NOW)], k=60, request_time=NOW)
        by_export = service.recommend(loaded, query, None, lambda: False)
        service.log(by_export)
        refresher.prepare(fresh)
        refresher.keep([fresh])
        store.record([event("2", ids[OTHER], NOW - HOUR), event("3", ids[OTHER], NOW - DAY + 1)])
        now += HOUR
        refresher.refresh()
        # After the counters were read.
        store.record([event("4", ids[OTHER]), event("5", ids[7])])
        with_trend = service.recommend(loaded, query, None, lambda: False)
        of_user = service.recommend(loaded, Query([], k=3, user_id="u"), None, lambda: False)
        popular = service.recommend(loaded, Query([], k=3), None, lambda: False)
        for answer in (with_trend, of_user, popular):
            service.log(answer)
    store.flush()
    shown = {one.recommendation_id: one for part in store.all_slates() for one in part}
    noted = shown[with_trend.recommendation_id]
    assert noted.trend_time == NOW + HOUR
    trend = attrgetter("trend_time", "trend_arrival")
    assert trend(shown[of_user.recommendation_id]) == trend(noted)
    for answered in (by_export, popular):
        assert trend(shown[answered.recommendation_id]) == (None, None)
    counts = {ITEM: 4 * worth(COUNTED_UNTIL, now=noted.trend_time)}
    for arrival, (_, _, one, *_) in (row for part in store.all_events() for row in part):
        if arrival <= noted.trend_arrival:
            counts[ids.index(one.item_id)] = counts.get(ids.index(one.item_id), 0) + worth(
                one.timestamp, now=noted.trend_time
            )
    assert counts.keys() == {ITEM, OTHER, 9}
    again = Recommender(exported(artifact), "cpu")
    again.engine.use_counts(array_of(again, counts))
    (expected,) = again.recommend([query])
    np.testing.assert_array_equal(with_trend.answer.items, expected.items)
    np.testing.assert_allclose(with_trend.answer.scores, expected.scores, atol=1e-4)


def test_a_served_model_follows_the_store(model_directory: Path, tmp_path: Path, store: EventStore) -> None:
    """Through the front, and a version that comes later has its trend when it serves."""
    metrics = Metrics()
    versions = tmp_path / "versions"
    add_version(versions, model_directory, "1")
    loader = ModelLoader(store, metrics, "cpu")
    with open_models(versions, loader, watch_s=0.05, trend_refresh_s=REFRESH_S) as models:
        server = create_server(models, store, "127.0.0.1:0", metrics=metrics)
        server.start()
        ids = models.version("").model.catalog.item_ids
        with RecommenderClient(f"127.0.0.1:{server.port}") as client:
            history = [ClientEvent(item_id=ids[5], timestamp=NOW)]
            before = client.recommend(history=history, k=60).recommendations
            last, now = before[-1].item_id, int(time.time())
            events = [
                ClientUserEvent(event_id=f"e{at}", user_id=f"u{at}", item_id=last, timestamp=now) for at in range(1_000)
            ]
            assert client.record_events(events).recorded_count == 1_000

            def score(of: str) -> float:
                found = client.recommend(history=history, k=60).recommendations
                return next(one.score for one in found if one.item_id == of)

            wait_for(lambda: score(last) > before[-1].score + 5)
            assert score(before[0].item_id) == pytest.approx(before[0].score, abs=1e-4)
            why = client.recommend(history=history, k=60, explain=True).recommendations
            assert len(why) == len(before)
        add_version(versions, model_directory, "2")
        wait_for(lambda: models.versions() == ["2"])
        found = models.version("2").model.engine.trend.values
        assert found[models.version("2").model.catalog.index[last]] > found[1:].min() + 5
        age = metrics.registry.get_sample_value("jaxrec_trend_age_seconds")
        assert age is not None
        assert 0 <= age < 30
        server.drain()


def test_without_a_store_the_trend_is_the_exports_and_decays(fresh: Recommender) -> None:
    now = NOW
    with closing(TrendRefresher(None, 3_600.0, clock=lambda: now)) as refresher:
        refresher.prepare(fresh)
        refresher.keep([fresh])
        for now in (NOW, NOW + DAY, NOW + 400 * DAY):
            refresher.refresh()
            assert_trend(fresh, {ITEM: 4 * worth(COUNTED_UNTIL, now=now)})
            assert fresh.engine.trend.counted.arrival is None


def test_without_refreshes_no_store_is_read_and_there_is_no_age(
    model_directory: Path, store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = Metrics()
    monkeypatch.setattr("serve.serving.loading.REFRESH_S", REFRESH_S)
    loader = ModelLoader(store, metrics, "cpu")
    with open_models(model_directory, loader, watch_s=0, trend_refresh_s=0) as models:
        loaded = models.for_user("u")
        before = loaded.model.engine.trend
        store.record([event("1", loaded.model.catalog.item_ids[ITEM], int(time.time()))])
        # Made again, as time passes.
        wait_for(lambda: loaded.model.engine.trend is not before)
        np.testing.assert_allclose(loaded.model.engine.trend.values, before.values, atol=1e-4)
        assert loaded.recommend(Query([Event(loaded.model.catalog.item_ids[5], None, 0)], k=5)).counted.arrival is None
    assert store.counted_until() is None
    assert metrics.registry.get_sample_value("jaxrec_trend_age_seconds") is None
