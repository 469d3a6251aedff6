"""What the items of a store change in answers: who is withheld, titles, tags, metadata, propensities and the log.

The answer is the whole ranking without the withheld items, for every way to ask; as if the request excluded them."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from jaxrec.data.prepared import PreparedData
from jaxrec.models.hybrid import Hybrid
from jaxrec.rl.served.event_store import OPTIONS, read_served_log
from serve.api import codec
from serve.client import Boost, Event, Item, ItemFilter, Pin, RecommenderClient, Rules, UserEvent, recommend_request
from serve.front.server import create_server
from serve.model import live_catalog
from serve.model.directory import Artifact, read_artifact
from serve.model.events import Event as Seen
from serve.model.exploration import Exploration
from serve.model.filters import ItemFilter as Allowed
from serve.model.live_catalog import Item as StoredItem
from serve.model.recommender import Query, Recommender
from serve.pb import open_inference_pb2 as inference
from serve.pb.open_inference_pb2_grpc import GRPCInferenceServiceStub
from serve.serving.catalogue import CatalogueRefresher
from serve.serving.trend import TrendRefresher
from serve.stores.base import EventStore
from tests.rl.served.test_event_store import EXACT, distances
from tests.serve.answers import answered
from tests.serve.one_model import one_model
from tests.serve.stores.slates import slates_of

ITEMS, DAY, START = 60, 86_400, 1_000_000_000
TEMPERATURE = 0.5


class Served:
    """A server whose catalogue is brought up to date after each change."""

    def __init__(self, model: Recommender, store: EventStore, exploration: Exploration | None) -> None:
        self.model = model
        self.ids = model.catalog.item_ids
        self._refresher = CatalogueRefresher(store, 3_600.0)
        self._refresher.prepare(model)
        models = one_model(model, store, exploration=exploration)
        self.states = models.for_user(None).states
        self._store = store
        self._server = create_server(models, store, "127.0.0.1:0")
        self._server.start()
        self.address = f"127.0.0.1:{self._server.port}"
        self.client = RecommenderClient(self.address, timeout_s=30)

    def store(self, *items: Item) -> None:
        self.client.upsert_items(items)
        self._refresher.refresh()

    def hide(self, *item_ids: str) -> None:
        self.store(*(Item(item_id=item_id, hidden=True) for item_id in item_ids))

    def delete(self, *item_ids: str) -> None:
        self.client.delete_items(item_ids)
        self._refresher.refresh()

    def spill(self) -> None:
        """Users' states go to the store, and none stays in memory."""
        self.states.spill()
        self._store.flush()
        for user in ("u", "only x"):
            self.states.forget(user)

    def history(self, *items: int) -> list[Event]:
        return [Event(item_id=self.ids[item], rating=4.0, timestamp=START + at * DAY) for at, item in enumerate(items)]

    def close(self) -> None:
        self.client.close()
        self._server.drain()


@pytest.fixture
def serve_with(artifact: Artifact, store: EventStore) -> Iterator[Callable[..., Served]]:
    opened: list[Served] = []

    def started(exploration: Exploration | None = None, model: Recommender | None = None) -> Served:
        opened.append(Served(model or Recommender(artifact, "cpu"), store, exploration))
        return opened[-1]

    yield started
    for one in opened:
        one.close()


@pytest.fixture
def served(serve_with: Callable[..., Served]) -> Served:
    return serve_with()


def ids_of(answer: Any) -> list[str]:
    return [one.item_id for one in answer.recommendations]


def every_way(served: Served, **asked: Any) -> list[list[str]]:
    """The items that a stored user with events, one without, the same histories sent along, and batches get."""
    history = served.history(3, 8, 9)
    served.client.record_events(
        UserEvent(event_id=f"{at}", user_id="u", item_id=one.item_id, rating=one.rating, timestamp=one.timestamp)
        for at, one in enumerate(history)
    )
    subjects: list[dict[str, Any]] = [{"user_id": "u"}, {"history": history}, {"user_id": "v"}, {"history": []}]
    single = [ids_of(served.client.recommend(**subject, **asked)) for subject in subjects]
    batched = answered(served.client.batch_recommend([recommend_request(**subject, **asked) for subject in subjects]))
    assert [ids_of(answer) for answer in batched] == single
    return single


@pytest.mark.parametrize("index", [False, True])
def test_withheld_items_are_left_out_before_the_best_are_chosen(
    index: bool, small_data: PreparedData, small_hybrid: Hybrid, tmp_path: Path, serve_with: Callable[..., Served]
) -> None:
    """Of all ways to ask, with the whole product and with an index."""
    from jaxrec.onnx.model_directory import export_model

    export_model(small_hybrid, small_data, tmp_path / "m", training={}, metrics={}, licence="Synthetic.", index=index)
    model = Recommender(read_artifact(tmp_path / "m"), "cpu")
    assert model.engine.search_by == ("index" if index else "exact")
    served = serve_with(model=model)
    whole = every_way(served, k=ITEMS)
    withheld = {whole[0][0], whole[0][2], whole[2][0], *served.ids[40:50]}
    served.hide(*withheld)
    for k in (1, 5, ITEMS):
        found = every_way(served, k=k)
        assert found == [[one for one in of_way if one not in withheld][:k] for of_way in whole]
    # Not even if they are asked for.
    asked = [*sorted(withheld), whole[0][1]]
    only = every_way(served, k=ITEMS, filter=ItemFilter(allow_item_ids=asked))
    assert only == [[one for one in of_way if one == whole[0][1]] for of_way in whole]
    # And beside what the request excludes.
    excluded = every_way(served, k=3, exclude_item_ids=[whole[0][1]])
    assert excluded == [[one for one in of_way if one not in {*withheld, whole[0][1]}][:3] for of_way in whole]
    served.delete(*withheld)
    assert every_way(served, k=ITEMS) == whole


def test_similar_items_are_not_withheld_ones_but_may_be_those_of_one(served: Served) -> None:
    item = served.ids[7]
    everything = [one.item_id for one in served.client.similar_items(item, ITEMS).items]
    served.hide(item, *everything[:2])
    found = served.client.similar_items(item, 3).items
    assert [one.item_id for one in found] == everything[2:5]
    allowed = served.client.similar_items(item, 3, filter=ItemFilter(allow_item_ids=everything[:3])).items
    assert [one.item_id for one in allowed] == everything[2:3]


def test_availability_is_by_the_time_of_the_request(served: Served) -> None:
    history, now = served.history(3), int(time.time())
    best = ids_of(served.client.recommend(history=history, k=2))[0]
    until, since = START + 10 * DAY, START + 20 * DAY
    served.store(Item(item_id=best, available_until=until))
    asked = [until - 1, until, now]
    found = [best in ids_of(served.client.recommend(history=history, k=ITEMS, request_time=at)) for at in asked]
    assert found == [True, False, False]
    assert best not in ids_of(served.client.recommend(history=history, k=ITEMS))
    served.store(Item(item_id=best, available_from=since))
    asked = [since - 1, since, now]
    found = [best in ids_of(served.client.recommend(history=history, k=ITEMS, request_time=at)) for at in asked]
    assert found == [False, True, True]
    assert best in ids_of(served.client.recommend(history=history, k=ITEMS))
    # An hour ahead, within the day that a request may be ahead.
    served.store(Item(item_id=best, available_from=now + 3_600))
    assert best not in ids_of(served.client.recommend(history=history, k=ITEMS))
    assert best in ids_of(served.client.recommend(history=history, k=ITEMS, request_time=now + 3_600))


def test_titles_and_tags_are_the_stores_in_answers_filters_profiles_and_explanations(served: Served) -> None:
    client, history = served.client, served.history(3, 8)
    best = ids_of(client.recommend(history=history, k=1))[0]
    # The message of the item is in memory by now.
    served.store(
        Item(item_id=best, title="New", tags=["z", "Jazz"]), Item(item_id=served.ids[8], title="Eight", tags=["Jazz"])
    )
    (one,) = client.recommend(history=history, k=1, explain=True).recommendations
    assert (one.item_id, one.title, one.genres) == (best, "New", ["Jazz", "z"])
    for event in one.explanation.events:
        if event.item_id == served.ids[8]:
            assert (event.title, event.shared_genres) == ("Eight", ["Jazz"])
    assert ids_of(client.recommend(history=history, k=9, filter=ItemFilter(all_tags=["Jazz", "z"]))) == [best]
    neighbours = client.similar_items(served.ids[3], ITEMS, filter=ItemFilter(any_tags=["Jazz"])).items
    assert {(item.item_id, item.title) for item in neighbours} == {(best, "New"), (served.ids[8], "Eight")}
    assert {"Jazz", "z", "Drama"} <= set(client.get_model_info().genres)
    client.record_events([UserEvent(event_id="1", user_id="u", item_id=best, timestamp=1)])
    profile = client.get_user_profile("u")
    assert (profile.watch_list[0].title, [one.genre for one in profile.genre_preferences]) == ("New", ["Jazz", "z"])
    served.delete(best, served.ids[8])
    with pytest.raises(grpc.RpcError) as failure:
        client.recommend(history=history, filter=ItemFilter(any_tags=["Jazz"]))
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    (one,) = client.recommend(history=history, k=1).recommendations
    assert one.title == served.model.own_catalog.titles[served.model.catalog.index[best]]


def test_a_change_of_the_catalogue_fails_no_filter(served: Served) -> None:
    """A tag that the last item lost, and one that only an item has that the model does not know."""
    client, own = served.client, served.model.own_catalog
    tag = next(tag for tags in own.genres for tag in tags)
    having = [one for one, tags in zip(own.item_ids, own.genres, strict=True) if tag in tags]
    served.store(*(Item(item_id=item_id) for item_id in having), Item(item_id="new", tags=["Jazz"]))
    assert tag not in client.get_model_info().genres
    for asked, having_it in ((tag, []), ("Jazz", ["new"])):
        assert ids_of(client.recommend(history=[], filter=ItemFilter(any_tags=[asked]))) == having_it
        others = ids_of(client.recommend(history=[], k=ITEMS + 1, filter=ItemFilter(none_tags=[asked])))
        assert len(others) == ITEMS + 1 - len(having_it)


def test_an_item_that_lost_its_tag_since_it_was_answered_is_explained_as_it_was_then(served: Served) -> None:
    model, ids = served.model, served.ids
    tag = next(tag for tags in model.own_catalog.genres for tag in tags)
    events = [Seen(ids[item], None, START + item) for item in (8, 9, 10)]
    query = Query(events, 5, filter=Allowed(any_tags=(tag,)), live=model.live)
    (answer,) = model.recommend([query])
    before = model.explain(query, answer)
    assert any(explanation.events for explanation in before)
    served.store(*(Item(item_id=ids[item]) for item in answer.items.tolist()))
    assert model.explain(query, answer) == before


def test_metadata_comes_back_if_it_is_asked_for(served: Served) -> None:
    client, history = served.client, served.history(3, 8)
    first, second = ids_of(client.recommend(history=history, k=2))
    metadata = {"poster": "https://example.org/ä.png", "price": "3.50"}
    served.store(Item(item_id=second, metadata=metadata))
    for answer in (
        client.recommend(history=history, k=2, view="full"),
        *answered(client.batch_recommend([recommend_request(history=history, k=2, view="full")])),
    ):
        assert [dict(one.metadata) for one in answer.recommendations] == [{}, metadata]
        assert ids_of(answer) == [first, second]
    assert not any(one.metadata for one in client.recommend(history=history, k=2).recommendations)
    for asked, expected in ((True, metadata), (False, {})):
        found = client.similar_items(first, ITEMS, view="full" if asked else "basic").items
        assert [dict(one.metadata) for one in found if one.item_id == second] == [expected]


@pytest.mark.parametrize("detailed", [True, False])
def test_an_answer_that_clients_do_not_take_is_refused_with_its_field(
    served: Served, detailed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the number of items with metadata, before it is made; or by its length."""
    long = {"title": "x" * 1_000, "tags": [f"{at:010}" for at in range(80)], "metadata": {"k": "v" * 2_000}}
    served.store(*(Item(item_id=item_id, **long) for item_id in served.ids[1:]))
    asked = [recommend_request(history=[], k=50, view="full" if detailed else "basic") for _ in range(60)]
    with pytest.raises(grpc.RpcError) as failure:
        served.client.batch_recommend(asked)
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    counted = "requests: expected at most 1000 items (k) with VIEW_FULL in all, came 3000"
    measured = "requests: expected few enough items for an answer of 4194304 bytes, came "
    assert (failure.value.details() or "").startswith(counted if detailed else measured)
    assert len(answered(served.client.batch_recommend(asked[:20]))) == 20
    monkeypatch.setattr(codec, "MAX_ANSWER_BYTES", 10_000)
    with pytest.raises(grpc.RpcError) as failure:
        served.client.recommend(history=served.history(3, 8), k=50, explain=True)
    assert (failure.value.details() or "").startswith("k: expected few enough items for an answer of 10000 bytes")


def test_what_is_drawn_of_the_available_items_has_exact_propensities(serve_with: Callable[..., Served]) -> None:
    exploring, plain = serve_with(Exploration(TEMPERATURE)), serve_with()
    history = plain.history(3, 8, 9)
    whole = ids_of(plain.client.recommend(history=history, k=ITEMS))
    withheld = [*whole[:3], *whole[20:30]]
    plain.hide(*withheld)
    exploring.hide(*withheld)
    of_item = {one.item_id: one.score for one in plain.client.recommend(history=history, k=ITEMS).recommendations}
    assert len(of_item) == len(whole) - len(withheld)
    answer = exploring.client.recommend(history=history, k=5)
    left = sum(math.exp(score / TEMPERATURE) for score in of_item.values())
    for one in answer.recommendations:
        weight = math.exp(of_item[one.item_id] / TEMPERATURE)
        assert one.log_propensity == pytest.approx(math.log(weight / left), abs=1e-3)
        left -= weight
    assert answer.log_propensity == pytest.approx(sum(one.log_propensity for one in answer.recommendations))


def test_the_log_names_withheld_items_and_slates_can_be_learned_from(
    serve_with: Callable[..., Served],
    store: EventStore,
    small_data: PreparedData,
    small_hybrid: Hybrid,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is learned from is reproduced; with more withheld items than are noted, slates are left out."""
    served, users = serve_with(Exploration(1.0, seed=1)), [f"user {user}" for user in range(4)]
    for number, user in enumerate(users):
        events = [
            UserEvent(event_id=f"{number}-{at}", user_id=user, item_id=item, rating=3.0, timestamp=START + 3_600 * at)
            for at, item in enumerate(served.ids[number + 1 :: 9])
        ]
        served.client.record_events(events)
    withheld = served.ids[2:40:3]
    served.hide(*withheld, "unknown")
    for user in users:
        served.client.recommend(user_id=user, k=3)
    store.flush()
    for one in slates_of(store, users[0]):
        assert (set(one.excluded_item_ids), one.request_options) == (set(withheld), ())
    log = read_served_log(tmp_path / "events.sqlite", small_data.catalog)
    assert (len(log.recommendations), log.skipped) == (len(users), {})
    assert distances(log.recommendations, small_data, small_hybrid).max() <= EXACT / 10
    monkeypatch.setattr(live_catalog, "MOST_NOTED", 2)
    served.hide(*served.ids[41:43])
    for user in users:
        served.client.recommend(user_id=user, k=3, exclude_item_ids=[served.ids[50]])
    store.flush()
    (*_, last) = slates_of(store, users[0])
    assert (last.excluded_item_ids, last.request_options) == ((served.ids[50],), ("catalogue",))
    log = read_served_log(tmp_path / "events.sqlite", small_data.catalog)
    assert (len(log.recommendations), log.skipped) == (len(users), {OPTIONS: len(users)})


def test_all_items_withheld_is_an_empty_answer(served: Served) -> None:
    served.hide(*served.ids[1:])
    assert every_way(served, k=5, explain=True) == [[], [], [], []]
    assert not served.client.similar_items(served.ids[3]).items


def test_the_open_inference_protocol_does_not_answer_withheld_items(served: Served) -> None:
    def inferred(k: int) -> list[int]:
        tensors: Sequence[tuple[str, str, np.ndarray]] = [
            ("item", "INT32", np.array([[3, 8]], np.int32)),
            ("rating", "FP32", np.array([[-1, -1]], np.float32)),
            ("gap", "FP32", np.array([[5, -1]], np.float32)),
            ("length", "INT32", np.array([2], np.int32)),
            ("request_gap", "FP32", np.array([-1], np.float32)),
            ("exclude", "INT32", np.array([[0]], np.int32)),
            ("k", "INT64", np.array([k], np.int64)),
        ]
        request = inference.ModelInferRequest(model_name="jaxrec", outputs=[{"name": "items"}])  # type: ignore[list-item]
        for name, datatype, array in tensors:
            request.inputs.add(name=name, datatype=datatype, shape=array.shape)
            request.raw_input_contents.append(array.tobytes())
        with grpc.insecure_channel(served.address) as channel:
            answer = GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=30)
        return np.frombuffer(answer.raw_output_contents[0], "<i4").tolist()  # type: ignore[no-any-return]

    whole = inferred(10)
    served.hide(*(served.ids[item] for item in whole[:4]))
    assert inferred(6) == whole[4:]


def test_an_item_that_the_model_does_not_know_is_recommended_at_once(served: Served) -> None:
    client, metadata = served.client, {"k": "v"}
    before = every_way(served, k=ITEMS)
    served.store(Item(item_id="new film", title="New (1990)", tags=["Drama", "Jazz"], metadata=metadata))
    after = every_way(served, k=ITEMS + 1)
    for was, now in zip(before, after, strict=True):
        assert now.index("new film") >= 10
        assert [one for one in now if one != "new film"] == was
    only = ItemFilter(any_tags=["Jazz"])
    assert every_way(served, k=5, filter=only) == [["new film"]] * 4
    assert every_way(served, k=5, filter=ItemFilter(allow_item_ids=["new film"])) == [["new film"]] * 4
    assert "Jazz" in client.get_model_info().genres
    (answer,) = client.recommend(history=served.history(3, 8), filter=only, view="full").recommendations
    assert (answer.title, list(answer.genres), dict(answer.metadata)) == ("New (1990)", ["Drama", "Jazz"], metadata)
    assert client.get_item("new film").item.known is False
    similar = client.similar_items("new film", ITEMS).items
    assert len(similar) == ITEMS
    assert "new film" in [one.item_id for one in client.similar_items(similar[0].item_id, ITEMS).items]
    assert not any("new film" in of_way for of_way in every_way(served, k=ITEMS, exclude_item_ids=["new film"]))


def test_an_added_item_is_answered_while_it_is_available(served: Served) -> None:
    now = int(time.time())
    of_item = {"item_id": "x", "title": "X", "tags": ["Jazz"]}
    for window, is_answered in (
        ({"available_from": now + 1000}, False),
        ({"available_until": now + 1000}, True),
        ({"hidden": True}, False),
        ({}, True),
    ):
        served.store(Item(**of_item, **window))
        assert every_way(served, k=5, filter=ItemFilter(any_tags=["Jazz"])) == [["x"] if is_answered else []] * 4
    served.delete("x")
    assert not any("x" in of_way for of_way in every_way(served, k=ITEMS + 1))
    assert served.client.get_model_info().added_item_count == 0
    with pytest.raises(grpc.RpcError) as failure:
        served.client.similar_items("x")
    assert failure.value.code() is grpc.StatusCode.NOT_FOUND
    served.store(Item(item_id="x", tags=["Jazz"]))
    assert every_way(served, k=5, filter=ItemFilter(any_tags=["Jazz"])) == [["x"]] * 4


@pytest.mark.parametrize("weight", [1.0, -1.0])
def test_an_added_item_of_the_history_is_as_one_that_the_model_knows(
    serve_with: Callable[..., Served], store: EventStore, weight: float
) -> None:
    """It is not recommended again, whether the user came with it or has it in the store, also from a state that comes
    back; if the request allows items of the history, it is, unless the user does not want it."""
    served = serve_with()
    client, only = served.client, ItemFilter(any_tags=["Jazz"])
    served.store(Item(item_id="x", tags=["Jazz"]), Item(item_id="y", tags=["Jazz"]))
    history = served.history(3, 8)
    liked = {"type": "dislike"} if weight < 0 else {}
    client.record_events(
        [
            *(UserEvent(event_id=one.item_id, user_id="u", item_id=one.item_id, timestamp=START) for one in history),
            *(
                UserEvent(event_id=f"x{user}", user_id=user, item_id="x", timestamp=START + 9 * DAY, **liked)
                for user in ("u", "only x")
            ),
        ]
    )
    subjects: list[dict[str, Any]] = [
        {"user_id": "u"},
        {"user_id": "only x"},
        {"history": [*history, Event(item_id="x", timestamp=START + 9 * DAY, **liked)]},
    ]

    def found(**asked: Any) -> list[set[str]]:
        return [set(ids_of(client.recommend(**subject, filter=only, **asked))) for subject in subjects]

    assert found() == [{"y"}] * 3
    assert found(allow_seen=True) == [{"x", "y"} if weight > 0 else {"y"}] * 3
    served.spill()
    assert found() == [{"y"}] * 3


def test_a_draw_holds_the_models_own_items_only(serve_with: Callable[..., Served], store: EventStore) -> None:
    """So that slates can be learned from: the run knows all that could have been drawn."""
    served = serve_with(Exploration(TEMPERATURE, seed=0))
    served.store(*(Item(item_id=f"x{at}", tags=["Jazz"]) for at in range(5)))
    for subject in ({"history": served.history(3, 8)}, {"history": []}):  # a slate with a filter is not learned from
        only = ItemFilter(any_tags=["Jazz"])
        assert len(ids_of(served.client.recommend(**subject, filter=only))) == 5
    drawn = served.client.recommend(history=served.history(3, 8), k=ITEMS + 5)
    assert not any(one.startswith("x") for one in ids_of(drawn))
    assert len(ids_of(drawn)) == ITEMS - 2
    reserved = served.client.recommend(history=served.history(3, 8), k=10, new_item_slots=3)
    assert sum(one.startswith("x") for one in ids_of(reserved)) == 3
    assert reserved.log_propensity == 0


def test_events_of_an_added_item_are_in_the_trend(served: Served, store: EventStore) -> None:
    """And it is no new item any more: its score is not held below the tenth's."""
    client, ask = served.client, {"history": served.history(3, 8)}

    def scores(**asked: Any) -> dict[str, float]:
        return {one.item_id: one.score for one in client.recommend(**ask, **asked).recommendations}

    def alone() -> float:
        return scores(filter=ItemFilter(allow_item_ids=["x"]))["x"]

    # The best of eight of different genres: above the tenth, and held below it.
    genres = sorted(served.model.own_tags)
    served.store(*(Item(item_id=f"{at}", tags=[genre]) for at, genre in enumerate(genres)))
    best = max(range(len(genres)), key=lambda at: scores(filter=ItemFilter(allow_item_ids=[f"{at}"]))[f"{at}"])
    served.delete(*(f"{at}" for at in range(len(genres))))
    served.store(Item(item_id="x", tags=[genres[best]]))
    found = scores(k=ITEMS)
    tenth = sorted(found.values(), reverse=True)[9]
    assert found["x"] < tenth
    now = int(time.time())
    client.record_events(
        UserEvent(event_id=f"{at}", user_id=f"{at}", item_id="x", timestamp=now - at) for at in range(200)
    )
    refresher = TrendRefresher(store, 3_600.0)
    refresher.prepare(served.model)
    refresher.close()
    assert list(served.model.engine.trend.added) == ["x"]
    assert scores(k=ITEMS)["x"] == pytest.approx(alone(), abs=1e-6)


def test_a_catalogue_is_given_to_a_model_twice(served: Served, store: EventStore) -> None:
    served.store(Item(item_id="x", tags=["Jazz"]))
    again = CatalogueRefresher(store, 3_600.0)
    again.prepare(served.model)
    store.upsert_items([StoredItem("y", "", ("Jazz",))])
    again.refresh()
    again.close()
    found = served.client.recommend(history=served.history(3, 8), filter=ItemFilter(any_tags=["Jazz"]))
    assert set(ids_of(found)) == {"x", "y"}


def test_rules_know_added_items(served: Served) -> None:
    served.store(Item(item_id="x", tags=["Jazz"]), Item(item_id="y", tags=["Jazz"]))
    asked = {"history": served.history(3, 8), "k": 5}
    plain = ids_of(served.client.recommend(**asked))
    pins = [Pin(item_id="x", position=2), Pin(tag="Jazz", position=4)]
    pinned = served.client.recommend(**asked, rules=Rules(pins=pins))
    assert ids_of(pinned) == [plain[0], "x", plain[1], "y", plain[2]]
    boosted = served.client.recommend(**asked, rules=Rules(boosts=[Boost(tag="Jazz", factor=100)], max_per_tag=1))
    assert len({"x", "y"} & set(ids_of(boosted))) <= 1
    diverse = served.client.recommend(history=asked["history"], k=ITEMS + 2, rules=Rules(diversity=0.5))
    assert {"x", "y"} <= set(ids_of(diverse))
    served.hide("x")
    with pytest.raises(grpc.RpcError) as failure:
        served.client.recommend(**asked, rules=Rules(pins=[Pin(item_id="x", position=1)]))
    assert "hidden" in failure.value.details()


def test_trending_has_added_items(served: Served, store: EventStore) -> None:
    served.store(Item(item_id="x", title="X", tags=["Jazz"], metadata={"k": "v"}))
    now = int(time.time())
    for start in range(0, 3_000, 1_000):
        served.client.record_events(
            UserEvent(event_id=f"{at}", user_id=f"{at}", item_id="x", timestamp=now)
            for at in range(start, start + 1_000)
        )
    refresher = TrendRefresher(store, 3_600.0)
    refresher.prepare(served.model)
    refresher.close()
    best = served.client.trending(k=1, view="full").items[0]
    assert (best.item_id, best.title, best.known, dict(best.metadata)) == ("x", "X", False, {"k": "v"})
    # And users without a history get it, by its events.
    popular = served.client.recommend(history=[], k=1)
    assert (ids_of(popular), popular.policy) == (["x"], "recent_popularity")
    assert popular.recommendations[0].score == pytest.approx(3_000, rel=0.01)
