"""Explanations: which events speak for an item, on vectors whose cosines a reader sees."""

import numpy as np
import pytest

from serve.artifact import RatingScale
from serve.catalog import Catalog, parse_catalog
from serve.client import Event, RecommenderClient
from serve.explain import explain
from serve.history import KnownEvent
from serve.recommender import Recommender

SCALE = RatingScale(1, 5)
TARGET, SAME, CLOSE, ACROSS, OPPOSITE = 1, 2, 3, 4, 5
VECTORS = np.array([[0, 0], [1, 0], [1, 0], [0.8, 0.6], [0, 1], [-1, 0]], np.float32)


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return parse_catalog(
        "item_id,title,genres,popularity,recent_popularity\n"
        "t,Target,Drama|War,1,1\n"
        "s,Same,Drama|Comedy,1,1\n"
        "c,,War,1,1\n"
        "a,Across,Drama,1,1\n"
        "o,Opposite,War,1,1\n"
    )


def test_strongest_events_first(catalog: Catalog) -> None:
    # Weights: 1.0 * (2-1)/4 = 0.25 for the same, 0.8 * 0.5 (no rating) = 0.4 for the close; the others have cosines of
    # 0 and below.
    events = [
        KnownEvent(SAME, 2.0, 0),
        KnownEvent(CLOSE, None, 1),
        KnownEvent(ACROSS, 5.0, 2),
        KnownEvent(OPPOSITE, 5.0, 3),
    ]
    (explanation,) = explain(np.array([TARGET], np.int32), events, VECTORS, catalog, SCALE)
    assert [reason.event for reason in explanation.events] == [events[1], events[0]]
    assert [reason.similarity for reason in explanation.events] == pytest.approx([0.8, 1.0])
    assert explanation.shared_genres == ("Drama", "War")
    assert explanation.text == "Because of c, Same (rated 2); shared genres: Drama, War"


def test_a_disliked_film_is_no_reason_and_the_last_rating_counts(catalog: Catalog) -> None:
    events = [KnownEvent(SAME, 5.0, 0), KnownEvent(SAME, 1.0, 1)]
    (explanation,) = explain(np.array([TARGET], np.int32), events, VECTORS, catalog, SCALE)
    assert explanation.events == explanation.shared_genres == ()
    assert explanation.text == "Fits the order of your history; no single event resembles it"


def test_at_most_three_events(catalog: Catalog) -> None:
    vectors = np.tile(np.array([1, 0], np.float32), (6, 1))
    events = [KnownEvent(item, 5.0, item) for item in (SAME, CLOSE, ACROSS, OPPOSITE)]
    (explanation,) = explain(np.array([TARGET], np.int32), events, vectors, catalog, SCALE)
    assert [reason.event.item for reason in explanation.events] == [SAME, CLOSE, ACROSS]


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
            assert 0 < reason.similarity <= 1
            assert reason.item_id in ids[1:6]
            assert reason.title == model.catalog.titles[model.catalog.index[reason.item_id]]
            assert reason.rating == 4.5
        for genre in one.explanation.shared_genres:
            assert genre in one.genres
