"""Events that are sent along with a user, and which model version answers whom."""

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.model_versions import add_version
from serve.client import Event, RecommenderClient, UserEvent, recommend_request
from serve.front.server import create_server
from serve.model.recommender import Recommender
from serve.observability.metrics import Metrics
from serve.pb.recommender_pb2 import RecommendResponse
from serve.serving.errors import shown
from serve.serving.loading import ModelLoader, open_models
from serve.serving.versions import position
from serve.stores.base import EventStore
from tests.serve.answers import answered
from tests.serve.stores.slates import slates_of

ALL = 60
UNKNOWN = "no such item"
number = itertools.count(1)


def assert_same(found: RecommendResponse, expected: RecommendResponse) -> None:
    """But for the rounding of a replay and of steps, which may also exchange items with equal scores."""
    assert (found.policy, found.ignored_event_count) == (expected.policy, expected.ignored_event_count)
    scores = {one.item_id: one.score for one in expected.recommendations}
    assert {one.item_id: one.score for one in found.recommendations} == pytest.approx(scores, abs=1e-3)


times = st.integers(1, 6).map(lambda day: 86_400 * day)
types = st.sampled_from(["", "", "click", "dislike", "skip"])


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_events_that_are_sent_along_count_as_if_they_had_just_been_recorded(
    client: RecommenderClient, store: EventStore, model: Recommender, data: st.DataObject
) -> None:
    """Of ids that are recorded, or that come twice, one event counts; and nothing is kept."""
    user_id = f"user {next(number)}"
    items = st.sampled_from([*model.catalog.item_ids[1:9], UNKNOWN])
    fields = st.tuples(items, times, types, st.integers(0, 9))
    stored, sent = (data.draw(st.lists(fields, max_size=8), name) for name in ("stored", "sent"))
    with_ids = data.draw(st.booleans(), "with ids")
    request_time = data.draw(st.sampled_from([None, 86_400 * 6, 86_400 * 9]), "request time")

    def name(at: int, own: int) -> str:
        return f"{user_id} {own if with_ids else at}"

    client.record_events(
        UserEvent(event_id=name(at, own), user_id=user_id, item_id=item, timestamp=when, type=kind)
        for at, (item, when, kind, own) in enumerate(stored)
    )
    along = [
        Event(item_id=item, timestamp=when, type=kind, event_id=name(at, own) if with_ids else "")
        for at, (item, when, kind, own) in enumerate(sent)
    ]
    before = client.list_events(user_id), store.revision(user_id)
    asked = recommend_request(user_id=user_id, history=along, k=ALL, request_time=request_time)
    found = client.recommend(user_id=user_id, history=along, k=ALL, request_time=request_time)
    (batched,) = answered(client.batch_recommend([asked]))
    assert (client.list_events(user_id), store.revision(user_id)) == before
    client.record_events(
        UserEvent(
            event_id=one.event_id or f"{user_id} sent {at}",
            user_id=user_id,
            item_id=one.item_id,
            timestamp=one.timestamp,
            type=one.type,
        )
        for at, one in enumerate(along)
    )
    expected = client.recommend(user_id=user_id, k=ALL, request_time=request_time)
    assert_same(found, expected)
    assert_same(batched, expected)


def test_the_newest_events_of_both_are_the_history(
    client: RecommenderClient, model: Recommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = model.catalog.item_ids
    monkeypatch.setattr("serve.api.service.MOST_EVENTS", 2)
    client.record_events(
        UserEvent(event_id=str(at), user_id="u", item_id=ids[at], timestamp=10 * at) for at in (1, 2, 3)
    )
    found = client.recommend(user_id="u", history=[Event(item_id=ids[9], timestamp=25)], k=ALL)
    assert_same(
        found,
        client.recommend(history=[Event(item_id=ids[9], timestamp=25), Event(item_id=ids[3], timestamp=30)], k=ALL),
    )


def test_reasons_are_of_both(client: RecommenderClient, model: Recommender) -> None:
    ids = model.catalog.item_ids
    client.record_events([UserEvent(event_id="1", user_id="u", item_id=ids[3], timestamp=10)])
    answer = client.recommend(user_id="u", history=[Event(item_id=ids[9], timestamp=20)], k=5, explain=True)
    named = {event.item_id for one in answer.recommendations for event in one.explanation.events}
    assert named <= {ids[3], ids[9]}
    assert named


def test_an_event_that_is_recorded_meanwhile_counts_once(
    client: RecommenderClient, store: EventStore, model: Recommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = model.catalog.item_ids
    client.record_events([UserEvent(event_id="1", user_id="u", item_id=ids[3], timestamp=10)])
    ask_for_ids, reads = store.recorded_ids, []

    def recorded_ids(event_ids: list[str]) -> set[str]:
        found = ask_for_ids(event_ids)
        reads.append(found)
        client.record_events([UserEvent(event_id="2", user_id="u", item_id=ids[9], timestamp=20)])
        return found

    monkeypatch.setattr(store, "recorded_ids", recorded_ids)
    found = client.recommend(user_id="u", history=[Event(item_id=ids[9], timestamp=20, event_id="2")], k=ALL)
    assert reads == [set(), {"2"}]
    assert_same(found, client.recommend(user_id="u", k=ALL))


def test_the_log_says_that_events_were_sent_along(client: RecommenderClient, store: EventStore) -> None:
    client.recommend(user_id="u", history=[Event(item_id="1007", timestamp=1)], k=1)
    client.recommend(user_id="u", history=[], k=1)
    store.flush()
    assert [one.request_options for one in slates_of(store, "u")] == [("history",), ()]


@pytest.mark.parametrize("batch", [False, True])
def test_events_of_which_none_counts_are_no_history(
    client: RecommenderClient, store: EventStore, model: Recommender, monkeypatch: pytest.MonkeyPatch, batch: bool
) -> None:
    """Those that are recorded, and neutral ones: the stored state answers, and policies learn from the slate."""
    ids = model.catalog.item_ids
    client.record_events([UserEvent(event_id="1", user_id="u", item_id=ids[3], timestamp=10)])
    expected = client.recommend(user_id="u", k=ALL)
    sent = [
        Event(item_id=ids[3], timestamp=10, event_id="1"),
        Event(item_id=ids[9], timestamp=20, type="skip", event_id="2"),
    ]
    monkeypatch.setattr(store, "history", lambda *_: pytest.fail("the history was read"))
    asked = recommend_request(user_id="u", history=sent, k=ALL)
    found = (
        answered(client.batch_recommend([asked]))[0] if batch else client.recommend(user_id="u", history=sent, k=ALL)
    )
    assert found.recommendations == expected.recommendations
    store.flush()
    assert [one.request_options for one in slates_of(store, "u")] == [(), ()]


@pytest.fixture
def divided(tmp_path: Path, model_directory: Path, store: EventStore) -> Iterator[RecommenderClient]:
    """A client of a server that divides users between the versions 0 (most) and 1."""
    for version in ("0", "1"):
        add_version(tmp_path / "versions", model_directory, version)
    with open_models(tmp_path / "versions", ModelLoader(store, Metrics(), "cpu"), watch_s=0) as models:
        models.set_traffic({"0": 0.7, "1": 0.3})
        server = create_server(models, store, "127.0.0.1:0")
        server.start()
        with RecommenderClient(f"127.0.0.1:{server.port}") as client:
            yield client
        server.drain()


def test_a_bucket_key_divides_what_has_no_user(divided: RecommenderClient) -> None:
    keys = [f"visit {at}" for at in range(60)]
    history = [Event(item_id="1007", timestamp=1)]
    answers = [divided.recommend(history=history, k=1, bucket_key=key).model_version for key in keys]
    assert answers == ["0" if position(key) < 0.7 else "1" for key in keys]
    assert answers == [divided.recommend(user_id=key, k=1).model_version for key in keys]
    assert answers == [divided.similar_items("1007", 1, bucket_key=key).model_version for key in keys]
    batch = divided.batch_recommend([recommend_request(history=history, k=1, bucket_key=key) for key in keys])
    assert answers == [one.model_version for one in answered(batch)]
    assert Counter(answers).keys() == {"0", "1"}
    assert divided.recommend(history=history, k=1).model_version == "0"


def test_the_log_says_that_the_version_was_named(divided: RecommenderClient, store: EventStore) -> None:
    divided.recommend(user_id="u", k=1, model_version="1")
    divided.batch_recommend([recommend_request(user_id="u", k=1, model_version="0")])
    divided.recommend(user_id="u", k=1)
    divided.recommend(history=[], k=1, bucket_key="u")
    store.flush()
    assert [one.request_options for one in slates_of(store, "u")] == [("model_version",), ("model_version",), ()]
    assert [one.request_options for one in slates_of(store, None)] == [()]


def test_a_request_can_name_its_version(divided: RecommenderClient) -> None:
    divided.record_events([UserEvent(event_id="1", user_id="u", item_id="1007", timestamp=1)])
    for version in ("0", "1"):
        asked = recommend_request(user_id="u", k=3, model_version=version)
        answers = [divided.recommend(user_id="u", k=3, model_version=version)]
        answers += answered(divided.batch_recommend([asked]))
        assert [one.model_version for one in answers] == [version, version]
        assert divided.similar_items("1007", 3, model_version=version).model_version == version


@pytest.mark.parametrize("version", ["2", "x" * 1_000, "\x01" * 1_000])
def test_a_version_that_is_not_loaded_is_not_found(divided: RecommenderClient, version: str) -> None:
    for call in (
        lambda: divided.recommend(user_id="u", model_version=version),
        lambda: divided.similar_items("1007", model_version=version),
        lambda: divided.get_model_info(version),
    ):
        with pytest.raises(grpc.RpcError) as failure:
            call()
        assert failure.value.code() is grpc.StatusCode.NOT_FOUND
        expected = f"the loaded versions are '0', '1'; {shown(version)} is not loaded"
        assert failure.value.details() == (expected if len(expected) <= 500 else f"{expected[:497]}...")
