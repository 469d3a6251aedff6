"""Explanations: which events speak for an item, on vectors whose cosines a reader sees."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy.typing import NDArray

from serve.client import Event, RecommenderClient, recommend_request
from serve.model.catalog import Catalog, parse_catalog
from serve.model.events import Event as HistoryEvent
from serve.model.events import KnownEvent
from serve.model.explain import Explanation, explain
from serve.model.parts import Part
from serve.model.recommender import Answer, Query, Recommender
from serve.observability.metrics import Metrics
from serve.serving.errors import Cancelled
from serve.serving.loaded import LoadedModel
from serve.stores.base import EventStore
from tests.serve.answers import answered

TARGET, SAME, CLOSE, ACROSS, OPPOSITE = 1, 2, 3, 4, 5
NO_PARTS: list[dict[Part, float]] = [{}]
VECTORS = np.array([[0, 0], [1, 0], [1, 0], [0.8, 0.6], [0, 1], [-1, 0]], np.float32)


def similarities(events: list[KnownEvent]) -> NDArray[np.float32]:
    return VECTORS[[TARGET]] @ VECTORS[[event.item for event in events]].T


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return parse_catalog(
        "item_id,title,genres,popularity,recent_popularity,new\n"
        "t,Target,Drama|War,1,1,0\n"
        "s,Same,Drama|Comedy,1,1,0\n"
        "c,,War,1,1,0\n"
        "a,Across,Drama,1,1,0\n"
        "o,Opposite,War,1,1,0\n"
    )


def test_what_the_model_would_miss_most_comes_first(catalog: Catalog) -> None:
    events = [KnownEvent(SAME, 2.0, 0), KnownEvent(CLOSE, None, 1), KnownEvent(ACROSS, 5.0, 2)]
    # Without the last the score would be higher: it speaks against the item.
    influences = np.array([[0.1, 0.4, -0.2]], np.float32)
    (explanation,) = explain(np.array([TARGET], np.int32), events, influences, similarities(events), catalog, NO_PARTS)
    assert [reason.event for reason in explanation.events] == [events[1], events[0]]
    assert [reason.influence for reason in explanation.events] == pytest.approx([0.4, 0.1])
    assert [reason.similarity for reason in explanation.events] == pytest.approx([0.8, 1.0])
    assert [reason.shared_genres for reason in explanation.events] == [("War",), ("Drama",)]
    assert explanation.shared_genres == ("Drama", "War")
    assert explanation.text == "Because of c, Same (rated 2); shared genres: Drama, War"


def test_of_several_events_on_one_item_the_strongest_counts_and_at_most_three_do(catalog: Catalog) -> None:
    events = [KnownEvent(item, 5.0, at) for at, item in enumerate([SAME, SAME, CLOSE, ACROSS, OPPOSITE])]
    influences = np.array([[0.5, 0.6, 0.3, 0.4, 0.2]], np.float32)
    (explanation,) = explain(np.array([TARGET], np.int32), events, influences, similarities(events), catalog, NO_PARTS)
    assert [reason.event for reason in explanation.events] == [events[1], events[3], events[2]]


def test_without_influences_the_vectors_speak(catalog: Catalog) -> None:
    same, opposite = KnownEvent(SAME, 5.0, 0), KnownEvent(OPPOSITE, 5.0, 0)
    (explanation,) = explain(np.array([TARGET], np.int32), [same], None, similarities([same]), catalog, NO_PARTS)
    assert [(reason.event, reason.influence) for reason in explanation.events] == [(same, None)]
    (explanation,) = explain(
        np.array([TARGET], np.int32), [opposite], None, similarities([opposite]), catalog, NO_PARTS
    )
    assert explanation.events == explanation.shared_genres == ()
    assert explanation.text == "Fits the order of your history; no single event speaks for it"


def test_influence_is_the_difference_that_leaving_an_event_out_makes(
    client: RecommenderClient, model: Recommender
) -> None:
    """The same figures as from asking the server again without each event, its item excluded as before."""
    ids = model.catalog.item_ids
    events = [Event(item_id=ids[at], rating=at / 2, timestamp=10**6 * at) for at in (3, 9, 4, 7)]
    now = 10**7
    whole = client.recommend(history=events, k=5, request_time=now, explain=True)
    without = []
    for left_out in events:
        rest = [event for event in events if event is not left_out]
        answer = client.recommend(history=rest, k=1000, request_time=now, exclude_item_ids=[left_out.item_id])
        without.append({one.item_id: one.score for one in answer.recommendations})
    checked = 0
    for item in whole.recommendations:
        influence = {
            event.item_id: item.score - scores[item.item_id] for event, scores in zip(events, without, strict=True)
        }
        strongest = sorted((i for i in influence if influence[i] > 0), key=lambda i: -influence[i])[:3]
        assert [reason.item_id for reason in item.explanation.events] == strongest
        for reason in item.explanation.events:
            assert reason.influence == pytest.approx(influence[reason.item_id], abs=1e-4)
            checked += 1
    assert checked > 5


def test_influence_is_never_overstated(
    client: RecommenderClient, model: Recommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither for items below those that the model is asked for when it explains."""
    monkeypatch.setattr("serve.model.recommender.ASKED_ITEMS", 2)
    ids = model.catalog.item_ids
    events = [Event(item_id=ids[at], rating=4.0, timestamp=10**6 * at) for at in (3, 9, 4, 7)]
    whole = client.recommend(history=events, k=30, request_time=10**7, explain=True)
    checked = 0
    for left_out in events:
        rest = [event for event in events if event is not left_out]
        answer = client.recommend(history=rest, k=1000, request_time=10**7, exclude_item_ids=[left_out.item_id])
        without = {one.item_id: one.score for one in answer.recommendations}
        for item in whole.recommendations:
            for reason in item.explanation.events:
                if reason.item_id == left_out.item_id:
                    assert reason.influence <= item.score - without[item.item_id] + 1e-4
                    checked += 1
    assert checked > 20


def test_a_long_history_costs_a_bounded_number_of_rows(client: RecommenderClient, model: Recommender) -> None:
    ids = model.catalog.item_ids[1:50]
    events = [Event(item_id=item, rating=4.5, timestamp=at) for at, item in enumerate(ids, 1)]
    answer = client.recommend(history=events, k=5, explain=True)
    given = {reason.item_id for one in answer.recommendations for reason in one.explanation.events}
    assert given
    assert given <= set(ids[-16:])


def test_explanations_of_the_server(client: RecommenderClient, model: Recommender) -> None:
    ids = model.catalog.item_ids
    events = [Event(item_id=ids[at], rating=4.5, timestamp=at) for at in range(1, 6)]
    explained = client.recommend(history=events, k=30, explain=True)
    plain = client.recommend(history=events, k=30)
    assert [one.item_id for one in explained.recommendations] == [one.item_id for one in plain.recommendations]
    assert any(one.explanation.events for one in explained.recommendations)
    for one in explained.recommendations:
        assert one.explanation.text
        for reason in one.explanation.events:
            assert -1 <= reason.similarity <= 1
            assert reason.influence > 0
            assert reason.item_id in ids[1:6]
            assert reason.title == model.catalog.titles[model.catalog.index[reason.item_id]]
            assert reason.rating == 4.5
        for genre in one.explanation.shared_genres:
            assert genre in one.genres


def test_explaining_a_batch_holds_up_no_other_call(
    client: RecommenderClient, model: Recommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is free for others meanwhile."""
    started, goes_on = threading.Event(), threading.Event()
    explained = model.explain

    def slow(query: Query, answer: Answer) -> tuple[Explanation, ...]:
        started.set()
        assert goes_on.wait(30)
        return explained(query, answer)

    monkeypatch.setattr(model, "explain", slow)
    events = [Event(item_id=model.catalog.item_ids[at], timestamp=at) for at in (3, 9)]
    with ThreadPoolExecutor(1) as threads:
        batch = threads.submit(client.batch_recommend, [recommend_request(history=events, k=3, explain=True)])
        assert started.wait(30)
        plain = client.recommend(history=events, k=3)
        goes_on.set()
    (answer,) = answered(batch.result())
    assert all(one.explanation.text for one in answer.recommendations)
    assert [one.item_id for one in answer.recommendations] == [one.item_id for one in plain.recommendations]


def test_a_cancelled_answer_is_not_explained(
    model: Recommender, store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics, explained = Metrics(), []
    monkeypatch.setattr(model, "explain", lambda query, answer: explained.append(query))
    loaded = LoadedModel(model, store, metrics)
    query = Query([HistoryEvent("1007", None, 0)], k=3, explain=True)

    def has_run() -> bool:
        return bool(metrics.registry.get_sample_value("jaxrec_batch_size_count"))

    with pytest.raises(Cancelled):
        loaded.recommend(query, is_cancelled=has_run)
    assert has_run()
    with pytest.raises(Cancelled):
        LoadedModel(model, store, metrics := Metrics()).recommend_all([query, query], is_cancelled=has_run)
    assert explained == []
