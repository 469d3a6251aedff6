"""Recommend: the parity ladder from the raw graph to the gRPC answer, and what the answer leaves out."""

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from serve.client import Event, RecommenderClient, UserEvent
from serve.model.directory import Artifact, read_artifact
from serve.model.events import Event as HistoryEvent
from serve.model.recommender import Query, Recommender
from serve.pb.recommender_pb2 import RecommendResponse

DAY = 86_400
START = 1_000_000_000


def item_ids(response: RecommendResponse) -> list[str]:
    return [recommendation.item_id for recommendation in response.recommendations]


def content(response: RecommendResponse) -> RecommendResponse:
    """All but the name that each answer gets."""
    assert re.fullmatch("[0-9a-f]{32}", response.recommendation_id)
    same = RecommendResponse()
    same.CopyFrom(response)
    same.ClearField("recommendation_id")
    return same


def history(model: Recommender, length: int, seed: int = 0) -> list[Event]:
    """Different items, a day or so apart, two thirds of them with a rating."""
    rng = np.random.default_rng(seed)
    items = rng.choice(len(model.catalog), length, replace=False) + 1
    times = START + np.cumsum(rng.integers(0, 2 * DAY, length))
    return [
        Event(
            item_id=model.catalog.item_ids[item],
            rating=None if at % 3 == 2 else float(rng.integers(1, 11)) / 2,
            timestamp=int(time),
        )
        for at, (item, time) in enumerate(zip(items, times, strict=True))
    ]


def stored(user_id: str, events: Sequence[Event]) -> list[UserEvent]:
    return [
        UserEvent(
            event_id=f"{user_id}-{at}",
            user_id=user_id,
            item_id=event.item_id,
            rating=event.rating if event.HasField("rating") else None,
            timestamp=event.timestamp,
        )
        for at, event in enumerate(events)
    ]


def graph_answer(
    artifact: Artifact, events: Sequence[Event], request_time: int | None, k: int, trend: np.ndarray
) -> tuple[list[str], np.ndarray]:
    """Runs `sequence.onnx` on features written out here as the model directory's contract has them."""
    session = onnxruntime.InferenceSession(artifact.directory / "sequence.onnx", providers=["CPUExecutionProvider"])
    item = np.array([[artifact.catalog.item_ids.index(event.item_id) for event in events]], np.int32)
    rating = [(event.rating - 0.5) / 4.5 if event.HasField("rating") else -1 for event in events]
    times = [event.timestamp for event in events]
    gap = [-1, *(later - earlier for earlier, later in pairwise(times))]
    _, items, scores = session.run(
        ["state", "items", "scores"],
        {
            "item": item,
            "rating": np.array([rating], np.float32),
            "gap": np.array([gap], np.float32),
            "length": np.array([len(events)], np.int32),
            "request_gap": np.array([-1 if request_time is None else request_time - times[-1]], np.float32),
            "exclude": item,
            "k": np.array([k], np.int64),
            "trend": trend,
            "blocked": np.zeros((1, len(trend)), bool),
        },
    )
    return [artifact.catalog.item_ids[item] for item in items[0]], scores[0]


@pytest.mark.parametrize("length", [1, 2, 5, 45])
@pytest.mark.parametrize("gap_to_request", [None, 0, 3 * DAY])
def test_grpc_answer_is_the_graphs(
    client: RecommenderClient, model: Recommender, artifact: Artifact, length: int, gap_to_request: int | None
) -> None:
    events = history(model, length)
    request_time = None if gap_to_request is None else events[-1].timestamp + gap_to_request
    expected_ids, expected_scores = graph_answer(artifact, events, request_time, 8, model.engine.trend.values)

    inline = client.recommend(history=events, k=8, request_time=request_time)
    client.record_events(stored("u", events))
    by_user = client.recommend(user_id="u", k=8, request_time=request_time)

    assert item_ids(inline) == expected_ids
    scores = [recommendation.score for recommendation in inline.recommendations]
    np.testing.assert_allclose(scores, expected_scores, atol=1e-4)
    assert by_user.recommendation_id != inline.recommendation_id
    assert content(by_user) == content(inline)
    assert inline.policy == artifact.info.policy
    assert inline.model_version == artifact.info.model_version
    assert inline.ignored_event_count == 0


def test_titles_and_genres_are_the_catalogues(client: RecommenderClient, model: Recommender) -> None:
    response = client.recommend(history=history(model, 3))
    assert len(response.recommendations) == 10
    for recommendation in response.recommendations:
        index = model.catalog.index[recommendation.item_id]
        assert recommendation.title == model.catalog.titles[index]
        assert tuple(recommendation.genres) == model.catalog.genres[index]
        assert not recommendation.HasField("explanation")


def test_many_queries_at_once_equal_single_ones(model: Recommender) -> None:
    queries = [
        Query([HistoryEvent(e.item_id, e.rating, e.timestamp) for e in history(model, n, seed=n)], k, explain=True)
        for n, k in [(1, 3), (30, 10), (0, 4), (7, 1)]
    ]
    for query, in_batch in zip(queries, model.recommend(queries), strict=True):
        (alone,) = model.recommend([query])
        np.testing.assert_array_equal(in_batch.items, alone.items)
        np.testing.assert_allclose(in_batch.scores, alone.scores, atol=1e-4)
        assert (in_batch.policy, in_batch.explanations) == (alone.policy, alone.explanations)


def test_events_are_sorted_by_time_and_ties_keep_their_order(client: RecommenderClient, model: Recommender) -> None:
    events = history(model, 6)
    events[3].timestamp = events[2].timestamp
    expected = content(client.recommend(history=events))
    # 2 stays before 3, all else is mixed up.
    assert content(client.recommend(history=[events[at] for at in (5, 2, 0, 3, 4, 1)])) == expected


def test_history_and_excluded_items_are_not_recommended(client: RecommenderClient, model: Recommender) -> None:
    events = history(model, 4)
    first = item_ids(client.recommend(history=events, k=2))
    rest = client.recommend(history=events, k=1000, exclude_item_ids=[*first, "unknown", first[0]])
    left_out = {*first, *(event.item_id for event in events)}
    assert sorted(item_ids(rest)) == sorted(set(model.catalog.item_ids[1:]) - left_out)


def test_unknown_items_are_ignored_and_counted(client: RecommenderClient, model: Recommender) -> None:
    events = history(model, 4)
    expected = client.recommend(history=events)
    unknown = [Event(item_id="no such film", timestamp=START), Event(item_id="nor this", timestamp=START + DAY)]
    answer = client.recommend(history=[unknown[0], *events, unknown[1]])
    assert answer.ignored_event_count == 2
    assert answer.recommendations == expected.recommendations


def test_of_a_long_history_the_last_events_count_and_all_are_excluded(
    client: RecommenderClient, model: Recommender
) -> None:
    limit = model.info.max_history
    assert limit == 50
    events = history(model, 54)
    fed_of_many = client.recommend(history=events, k=1000)
    # The first event that is fed keeps the gap to the one before, so only the item of the latter is free to change.
    changed = [Event(item_id=events[0].item_id, timestamp=event.timestamp) for event in events[: 54 - limit]]
    fed_of_changed = client.recommend(history=[*changed, *events[-limit:]], k=1000)

    assert set(item_ids(fed_of_many)) == set(model.catalog.item_ids) - {""} - {event.item_id for event in events}
    scores = {one.item_id: one.score for one in fed_of_changed.recommendations}
    for recommendation in fed_of_many.recommendations:
        assert recommendation.score == pytest.approx(scores[recommendation.item_id], abs=1e-5)
    assert len(scores) == len(fed_of_many.recommendations) + (54 - limit) - 1


def test_stored_user_is_answered_as_of_the_request_time(client: RecommenderClient, model: Recommender) -> None:
    events = history(model, 8)
    client.record_events(stored("u", events))
    as_of = events[4].timestamp
    past = [event for event in events if event.timestamp <= as_of]
    by_user, inline = (client.recommend(**of, request_time=as_of) for of in ({"user_id": "u"}, {"history": past}))
    assert content(by_user) == content(inline)


@pytest.mark.parametrize(
    "subject",
    [
        {"user_id": "nobody"},
        {"history": []},
        {"history": [Event(item_id="no such film", timestamp=START)]},
        {"user_id": "u", "request_time": START - 1},
        {"user_id": "only unknown"},
    ],
)
def test_without_a_known_event_the_most_popular(
    client: RecommenderClient, model: Recommender, subject: dict[str, object]
) -> None:
    client.record_events(stored("u", history(model, 3)))
    client.record_events(stored("only unknown", [Event(item_id="no such film", timestamp=START)]))
    rows = range(1, len(model.catalog) + 1)
    catalog = model.catalog
    expected = sorted(rows, key=lambda item: (-catalog.popularity[item], -catalog.recent_popularity[item], item))
    excluded = [model.catalog.item_ids[expected[1]]]
    del expected[1]

    answer = client.recommend(**subject, k=20, exclude_item_ids=excluded, explain=True)  # type: ignore[arg-type]

    assert answer.policy == "popularity"
    assert item_ids(answer) == [model.catalog.item_ids[item] for item in expected[:20]]
    assert [one.score for one in answer.recommendations] == [model.catalog.popularity[i] for i in expected[:20]]
    count = model.catalog.popularity[expected[0]]
    assert answer.recommendations[0].explanation.text == f"Popular: {count} events in the training data"


def test_k_zero_is_ten_and_more_than_there_are_is_all(client: RecommenderClient, model: Recommender) -> None:
    events = history(model, 3)
    assert len(client.recommend(history=events, k=0).recommendations) == 10
    assert len(client.recommend(history=events, k=1000).recommendations) == len(model.catalog) - 3
    assert len(client.recommend(history=[], k=1000).recommendations) == len(model.catalog)


def test_ratings_change_the_answer_and_a_missing_one_is_not_the_lowest(
    client: RecommenderClient, model: Recommender
) -> None:
    (event,) = history(model, 1)
    scores = set()
    for rating in (None, 0.5, 5.0):
        rated = Event(item_id=event.item_id, rating=rating, timestamp=event.timestamp)
        scores.add(client.recommend(history=[rated], k=1).recommendations[0].score)
    assert len(scores) == 3


def test_provider_auto_gives_the_same_answer(model_directory: Path, model: Recommender) -> None:
    auto = Recommender(read_artifact(model_directory), "auto")
    query = Query([HistoryEvent(e.item_id, None, e.timestamp) for e in history(model, 5)], 10)
    (expected,), (found,) = model.recommend([query]), auto.recommend([query])
    np.testing.assert_array_equal(found.items, expected.items)
