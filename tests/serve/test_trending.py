"""Trending, and what users without a history get: decayed counts of what all servers of a store recorded, with items
that no model knows, and without those that are hidden or not available."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest

from serve.api.trending import WINDOWS
from serve.client import Event, Item, ItemFilter, RecommenderClient, TrendWindow, UserEvent
from serve.front.server import create_server
from serve.model.directory import Artifact
from serve.model.exploration import Exploration
from serve.model.popular import PRIOR_EVENTS
from serve.model.recommender import Recommender
from serve.model.trend import COUNTED_S
from serve.pb.recommender_pb2 import RecommendRequest, TrendingItem, TrendingRequest
from serve.pb.recommender_pb2_grpc import RecommenderStub
from serve.serving.catalogue import CatalogueRefresher
from serve.serving.trend import TrendRefresher
from serve.stores import open_store
from tests.serve.one_model import one_model
from tests.serve.stores.databases import DatabaseServer
from tests.serve.stores.test_stores import KINDS, emptied, servers  # noqa: F401

ITEMS, HOUR, DAY = 60, 3_600, 86_400
TAGS = ["Action", "Comedy", "Drama", "Horror", "Romance", "Sci-Fi"]


@pytest.fixture(params=KINDS)
def location(
    request: pytest.FixtureRequest,
    servers: dict[str, DatabaseServer],  # noqa: F811
    tmp_path: Path,
) -> str:
    return emptied(request.param, servers, tmp_path)


def exported(artifact: Artifact, counts: Mapping[int, float], until: int) -> Artifact:
    """Of an export with so many events of items, all at one time."""
    array = np.zeros_like(artifact.trend.counts)
    for item, count in counts.items():
        array[:, item] = count
    return replace(artifact, trend=replace(artifact.trend, counts=array, counted_until=until))


class Served:
    """A server whose trend and catalogue are brought up to date by `refresh`."""

    def __init__(self, model: Recommender, client: RecommenderClient, now: int, *refreshers: object) -> None:
        self.model, self.client, self.now = model, client, now
        self.ids = model.catalog.item_ids
        self._refreshers = refreshers
        self._number = 0

    def refresh(self) -> None:
        for one in self._refreshers:
            one.refresh()  # type: ignore[attr-defined]

    def record(self, events: Sequence[tuple[str, int]], *, type: str = "") -> None:
        """Items and how many seconds ago."""
        sent = []
        for item_id, ago in events:
            self._number += 1
            sent.append(
                UserEvent(
                    event_id=f"{self.client.address} {self._number}",
                    user_id="someone",
                    item_id=item_id,
                    timestamp=self.now - ago,
                    type=type,
                )
            )
        self.client.record_events(sent)

    def trending(self, window: str = "DAY", k: int = 1_000, **asked: object) -> Mapping[str, TrendingItem]:
        """The answer by id, in its order."""
        value = TrendWindow.Value(f"TREND_WINDOW_{window}")
        return {one.item_id: one for one in self.client.trending(k, value, **asked).items}  # type: ignore[arg-type]


@contextmanager
def serving(artifact: Artifact, location: str, exploration: Exploration | None = None) -> Iterator[Served]:
    model, now = Recommender(artifact, "cpu"), int(time.time())
    with open_store(location) as store:
        catalogue, trend = CatalogueRefresher(store, 3_600.0), TrendRefresher(store, 3_600.0, clock=lambda: now)
        catalogue.prepare(model)
        trend.prepare(model)
        catalogue.keep([model])
        trend.keep([model])
        server = create_server(one_model(model, store, exploration=exploration), store, "127.0.0.1:0")
        server.start()
        try:
            with RecommenderClient(f"127.0.0.1:{server.port}", timeout_s=30) as client:
                yield Served(model, client, now, catalogue, trend)
        finally:
            server.drain()
            catalogue.close()
            trend.close()


def worth(window: str, *agos: int) -> float:
    half_life = COUNTED_S[WINDOWS[TrendWindow.Value(f"TREND_WINDOW_{window}")]]
    return sum(0.5 ** (ago / half_life) for ago in agos)


def test_counts_are_those_of_all_servers_of_the_store(artifact: Artifact, location: str) -> None:
    """By each window, with items that the model does not know, from two servers and after a restart."""
    ago = int(time.time()) - 30 * DAY
    own = exported(artifact, {3: 8.0}, ago)
    with serving(own, location) as one, serving(own, location) as other:
        first, second, of_export = one.ids[1], one.ids[2], one.ids[3]
        one.client.upsert_items(
            [
                Item(item_id="new", title="New", tags=["Fresh"], metadata={"poster": "p"}),
                Item(item_id="hidden", hidden=True),
                Item(item_id="later", available_from=one.now + DAY),
            ]
        )
        one.record([(first, 0), (first, HOUR), ("new", HOUR), ("hidden", 0), ("later", 0), ("nowhere", 0)])
        other.record([(second, DAY), (first, 7 * DAY), ("new", DAY)])
        other.record([(second, 0)] * 9, type="skip")
        for served in (one, other):
            served.refresh()
        for served in (one, other):
            for window in ("HOUR", "SIX_HOURS", "DAY", "WEEK", "MONTH"):
                expected = {
                    first: worth(window, 0, HOUR, 7 * DAY),
                    "new": worth(window, HOUR, DAY),
                    second: worth(window, DAY),
                    of_export: 0 if window == "HOUR" else 8 * worth(window, 30 * DAY),
                }
                found = served.trending(window)
                assert len(found) == ITEMS + 1
                assert list(found)[:4] == sorted(expected, key=expected.__getitem__, reverse=True)
                lag = abs(other.now - one.now)  # each dates its events by its own
                for item_id, count in expected.items():
                    assert found[item_id].count == pytest.approx(count, rel=1e-4 + lag / HOUR, abs=1e-30)
                assert not any(one.count for one in list(found.values())[4:])
        of_day = one.trending(view="full")
        new = of_day["new"]
        assert (new.title, list(new.genres), dict(new.metadata), new.known) == (
            "New",
            ["Fresh"],
            {"poster": "p"},
            False,
        )
        assert of_day[first].known
        assert of_day[first].title == one.model.catalog.titles[1]
        assert not one.trending()["new"].metadata
        assert one.client.trending().counted_time == one.now
        assert [one.item_id for one in one.client.trending().items] == list(of_day)[:10]
    with serving(own, location) as again:
        assert list(again.trending()) == list(of_day)
        # The item is deleted from the catalogue: its counts are not.
        again.client.delete_items(["new"])
        again.client.upsert_items([Item(item_id=first, hidden=True)])
        again.refresh()
        left = again.trending()
        assert {"new", first}.isdisjoint(left)
        assert len(left) == ITEMS - 1


def test_each_answer_is_that_of_one_item_after_the_other(artifact: Artifact, tmp_path: Path) -> None:
    """For random events, items and filters."""
    for seed in range(15):
        rng = np.random.default_rng(seed)
        with serving(exported(artifact, {}, 0), str(tmp_path / f"{seed}.sqlite")) as served:
            ids = [*served.ids[1:], *(f"new {at}" for at in range(20))]
            stored = {
                item_id: Item(
                    item_id=item_id,
                    tags=sorted(rng.choice(TAGS, rng.integers(0, 3), replace=False)),
                    hidden=rng.random() < 0.2,
                )
                for item_id in rng.permutation(ids)[:40]
            }
            served.client.upsert_items(stored.values())
            events = [(ids[at], int(ago)) for at, ago in rng.integers((0, 0), (80, 3 * DAY), (60, 2))]
            served.record(events)
            served.refresh()
            own = served.model.own_catalog
            tags = {item_id: set(own.genres[at]) for item_id, at in own.index.items()}
            tags |= {item_id: set(item.tags) for item_id, item in stored.items()}
            counts = {item_id: worth("DAY", *(ago for of, ago in events if of == item_id)) for item_id in tags}
            for _ in range(10):
                any_tags, none_tags = ([] if rng.random() < 0.5 else [str(rng.choice(TAGS))] for _ in range(2))
                if any_tags == none_tags:
                    none_tags = []
                allow = [] if rng.random() < 0.5 else rng.permutation(ids)[:30].tolist()
                exclude = rng.permutation(ids)[:10].tolist()
                least, k = (0.4 if rng.random() < 0.3 else None), int(rng.integers(1, 100))
                asked = ItemFilter(allow_item_ids=allow, any_tags=any_tags, none_tags=none_tags, minimum_score=least)
                possible = {
                    item_id
                    for item_id, of_item in tags.items()
                    if not (item_id in stored and stored[item_id].hidden)
                    and (item_id in own.index or counts[item_id])
                    and (not any_tags or of_item & set(any_tags))
                    and not of_item & set(none_tags)
                    and (not allow or item_id in allow)
                    and item_id not in exclude
                    and (least is None or counts[item_id] >= least)
                }
                found = served.trending(k=k, filter=asked, exclude_item_ids=exclude)
                assert len(found) == min(k, len(possible))
                assert found.keys() <= possible
                answered = [one.count for one in found.values()]
                assert answered == sorted(answered, reverse=True)
                best = sorted((counts[item_id] for item_id in possible), reverse=True)[:k]
                np.testing.assert_allclose(answered, best, rtol=1e-4, atol=1e-6)
                # Those without an event follow in the order of the training data.
                popularity = [own.popularity[own.index[item_id]] for item_id, one in found.items() if not one.count]
                assert popularity == sorted(popularity, reverse=True)


def test_ids_that_the_store_has_no_item_of_cost_nothing(artifact: Artifact, tmp_path: Path) -> None:
    """Anyone who may record events makes such ids; only those that are items are kept for the answers."""
    with serving(exported(artifact, {}, 0), str(tmp_path / "ids.sqlite")) as served:
        served.client.upsert_items([Item(item_id="new"), Item(item_id="unseen")])
        served.record([("new", 0), (served.ids[1], 0), *((f"nowhere {at}", 0) for at in range(500))])
        served.refresh()
        popular = served.model.popular_in(served.model.live)
        assert list(popular.now.others.item_ids) == ["new"]
        assert popular.of_added.shape == (len(COUNTED_S), 2)
        assert list(served.trending(k=2)) == [served.ids[1], "new"]
        # An item that becomes one later has its events of before.
        served.client.upsert_items([Item(item_id="nowhere 7")])
        served.refresh()
        assert served.trending()["nowhere 7"].count == pytest.approx(1)


def test_equal_counts_are_by_the_longest_half_life_then_by_the_training_data(
    artifact: Artifact, tmp_path: Path
) -> None:
    """Also of more items than are asked for, some with a count, and none with one in the last hour."""
    with serving(exported(artifact, {}, 0), str(tmp_path / "ties.sqlite")) as served:
        catalog = served.model.own_catalog
        rare = catalog.item_ids[catalog.by_popularity[-1]]
        served.record([(rare, 40 * 3_600)])
        served.refresh()
        by_popularity = [catalog.item_ids[at] for at in catalog.by_popularity[:-1]]
        for k in (1, 5, ITEMS - 1, ITEMS):
            assert list(served.trending("MONTH", k)) == [rare, *by_popularity][:k]
            # 0.5 ** 40 is a count still.
            assert list(served.trending("HOUR", k)) == [rare, *by_popularity][:k]


def test_without_events_the_order_is_that_of_the_export(artifact: Artifact, tmp_path: Path) -> None:
    """Of its counts, however old they are, then of the training data: with an empty store, and without a store."""
    model = Recommender(exported(artifact, {7: 2.0, 9: 3.0}, int(time.time()) - 20 * DAY), "cpu")
    by_popularity = [model.catalog.item_ids[at] for at in model.catalog.by_popularity]
    expected = [model.catalog.item_ids[at] for at in (9, 7)]
    popularity = dict(zip(model.catalog.item_ids, model.catalog.popularity.tolist(), strict=True))
    with open_store(tmp_path / "empty.sqlite") as store:
        for of_store in (store, None):
            refresher = TrendRefresher(of_store, 3_600.0)
            refresher.prepare(model)
            server = create_server(one_model(model, store), store, "127.0.0.1:0")
            server.start()
            with RecommenderClient(f"127.0.0.1:{server.port}") as client:
                found = [one.item_id for one in client.trending(ITEMS).items]
            server.drain()
            refresher.close()
            assert found[:2] == expected
            rest = [popularity[item_id] for item_id in found[2:]]
            assert rest == sorted(rest, reverse=True)
            assert sorted(found) == sorted(by_popularity)


def test_users_without_a_history_get_what_is_popular_now(artifact: Artifact, location: str) -> None:
    with serving(exported(artifact, {}, 0), location, Exploration(0.5)) as served:
        catalog = served.model.catalog
        before = served.client.recommend(user_id="unknown", k=ITEMS)
        assert before.policy == "popularity"
        by_popularity = [catalog.item_ids[at] for at in catalog.by_popularity]
        assert [one.item_id for one in before.recommendations] == by_popularity
        assert before.recommendations[0].score == catalog.popularity[catalog.by_popularity[0]]
        last, first = by_popularity[-1], by_popularity[0]
        served.record([(last, 0)] * 3)
        served.refresh()
        now = served.client.recommend(user_id="unknown", k=ITEMS, explain=True)
        assert (now.policy, now.log_propensity) == ("recent_popularity", 0)
        prior = PRIOR_EVENTS * catalog.popularity / catalog.popularity.sum()
        scores = {one.item_id: one.score for one in now.recommendations}
        # A few events of a user do not change what all are shown.
        assert now.recommendations[0].item_id == first
        assert scores[last] == pytest.approx(3 + prior[catalog.index[last]], rel=1e-4)
        assert scores[first] == pytest.approx(prior[catalog.index[first]], rel=1e-4)
        text = next(one.explanation.text for one in now.recommendations if one.item_id == last)
        assert (
            text == f"Popular: 3.0 recent events, {catalog.popularity[catalog.index[last]]} events in the training data"
        )
        served.record([(last, 0)] * 60)
        served.refresh()
        found = served.client.recommend(user_id="unknown", k=1).recommendations[0]
        assert (found.item_id, found.score) == (last, pytest.approx(63 + prior[catalog.index[last]], rel=1e-4))
        # Filters, exclusions and the catalogue hold.
        tag = catalog.genres[catalog.index[last]][0]
        served.client.upsert_items([Item(item_id=last, hidden=True)])
        served.refresh()
        with_tag = served.client.recommend(
            user_id="unknown", k=ITEMS, filter=ItemFilter(any_tags=[tag]), exclude_item_ids=[first]
        )
        answered = [one.item_id for one in with_tag.recommendations]
        assert set(answered) == {
            item_id
            for item_id, at in catalog.index.items()
            if tag in catalog.genres[at] and item_id not in (first, last)
        }
        history = [Event(item_id="nowhere", timestamp=1)]
        assert served.client.recommend(history=history).policy == "recent_popularity"


BAD = [
    (TrendingRequest(k=-1), "k: expected 1 to 1000"),
    (TrendingRequest(k=1001), "k: expected 1 to 1000"),
    (TrendingRequest(window=9), "window: expected one of TREND_WINDOW_UNSPECIFIED, "),  # type: ignore[arg-type]
    (TrendingRequest(exclude_item_ids=[""]), "exclude_item_ids[0]: expected an id"),
    (TrendingRequest(filter=ItemFilter(any_tags=["none such"])), "filter.any_tags[0]: expected one of the"),
    (
        TrendingRequest(filter=ItemFilter(allow_item_ids=["a"]), exclude_item_ids=["a"]),
        "filter.allow_item_ids: expected",
    ),
]


@pytest.mark.parametrize(("request_", "message"), BAD)
def test_bad_requests_are_refused(stub: RecommenderStub, request_: RecommendRequest, message: str) -> None:
    with pytest.raises(grpc.RpcError) as failure:
        stub.Trending(request_)
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert failure.value.details().startswith(message)
