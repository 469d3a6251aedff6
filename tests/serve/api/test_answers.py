"""What an answer is for: batches, the log of what was shown, feedback that refers to it, exploration, forgetting."""

import math
from collections.abc import Iterator
from itertools import permutations

import numpy as np
import pytest

from serve.api.recommender import RecommenderServicer
from serve.api.service import RecommenderService
from serve.client import Event, RecommenderClient, UserEvent, recommend_request
from serve.front.server import create_server
from serve.model.exploration import Exploration, draw
from serve.model.recommender import Recommender
from serve.observability.metrics import Metrics
from serve.pb.recommender_pb2 import BatchRecommendRequest, RecommendResponse
from serve.stores.base import EventStore
from tests.serve.answers import answered
from tests.serve.one_model import one_model
from tests.serve.stores.slates import slates_of

TEMPERATURE = 0.5


@pytest.fixture
def exploring(model: Recommender, store: EventStore) -> Iterator[RecommenderClient]:
    """A client of a server that explores."""
    models = one_model(model, store, exploration=Exploration(TEMPERATURE))
    server = create_server(models, store, "127.0.0.1:0")
    server.start()
    with RecommenderClient(f"127.0.0.1:{server.port}", timeout_s=30) as client:
        yield client
    server.drain()


def events_of(model: Recommender, items: list[int]) -> list[Event]:
    return [Event(item_id=model.catalog.item_ids[item], rating=4, timestamp=at) for at, item in enumerate(items, 1)]


def record(client: RecommenderClient, user_id: str, events: list[Event]) -> None:
    client.record_events(
        UserEvent(event_id=f"{user_id}-{at}", user_id=user_id, item_id=event.item_id, timestamp=event.timestamp)
        for at, event in enumerate(events)
    )


def content(response: RecommendResponse) -> tuple[str, list[tuple[str, float]], int]:
    items = [(one.item_id, round(one.score, 4)) for one in response.recommendations]
    return response.policy, items, response.ignored_event_count


def test_a_batch_is_its_single_requests(client: RecommenderClient, model: Recommender) -> None:
    record(client, "u", events_of(model, [3, 8, 9]))
    requests = [recommend_request(user_id="u", k=3), recommend_request(user_id="nobody")]
    requests += [
        recommend_request(history=events_of(model, list(range(1, 2 + at))), k=1 + at, explain=at % 7 == 0)
        for at in range(40)
    ]
    answers = answered(client.batch_recommend(requests))
    assert len({answer.recommendation_id for answer in answers}) == len(requests)
    for at, (request, answer) in enumerate(zip(requests, answers, strict=True)):
        assert len(answer.recommendations) == min(request.k or 10, 60 - len(request.history.events))
        (alone,) = answered(client.batch_recommend([request]))
        assert content(answer) == content(alone), at
        assert [one.explanation.text for one in answer.recommendations] == [
            one.explanation.text for one in alone.recommendations
        ]
    assert client.batch_recommend([]) == []


def test_slates_are_kept_with_their_propensities_and_feedback_refers_to_them(
    client: RecommenderClient, store: EventStore, model: Recommender
) -> None:
    record(client, "u", events_of(model, [3, 8, 9]))
    answer = client.recommend(user_id="u", k=3)
    client.recommend(history=events_of(model, [3]), k=2)
    assert answer.log_propensity == 0
    chosen = answer.recommendations[1].item_id
    feedback = UserEvent(
        event_id="f", user_id="u", item_id=chosen, timestamp=9, recommendation_id=answer.recommendation_id
    )
    assert client.record_events([feedback]).recorded_count == 1
    store.flush()
    (shown,) = slates_of(store, "u")
    assert shown.recommendation_id == answer.recommendation_id
    assert shown.item_ids == tuple(one.item_id for one in answer.recommendations)
    assert shown.log_propensities == ()
    assert (shown.policy, shown.model_version) == ("reinforce", model.info.model_version)
    (anonymous,) = slates_of(store, None)
    assert len(anonymous.item_ids) == 2


def test_a_deleted_user_is_forgotten(client: RecommenderClient, store: EventStore, model: Recommender) -> None:
    record(client, "u", events_of(model, [3, 8, 9]))
    record(client, "other", events_of(model, [4]))
    assert client.recommend(user_id="u").policy == "reinforce"
    store.flush()
    deleted = client.delete_user("u")
    assert (deleted.deleted_event_count, deleted.deleted_recommendation_count) == (3, 1)
    assert client.recommend(user_id="u").policy == "popularity"
    assert client.recommend(user_id="other").policy == "reinforce"
    again = client.delete_user("u")
    assert again.deleted_event_count == 0


def test_drawn_slates_have_the_stated_probabilities() -> None:
    """All 4 * 3 ordered pairs of four items: stated probabilities sum to 1, and the draws follow them."""
    scores = np.array([1.0, 0.5, 0.0, -1.0], np.float32)
    random = np.random.default_rng(0)
    stated: dict[tuple[int, ...], float] = {}
    counts: dict[tuple[int, ...], int] = dict.fromkeys(permutations(range(4), 2), 0)
    draws = 20_000
    for _ in range(draws):
        slate = draw(scores, 2, TEMPERATURE, random)
        pair = tuple(slate.places.tolist())
        counts[pair] += 1
        stated[pair] = float(np.exp(slate.log_propensities.sum()))
    weights = np.exp(scores.astype(np.float64) / TEMPERATURE)
    total = weights.sum()
    for (first, second), count in counts.items():
        expected = weights[first] / total * weights[second] / (total - weights[first])
        assert stated[first, second] == pytest.approx(expected)
        # Five standard deviations.
        assert abs(count / draws - expected) < 5 * math.sqrt(expected * (1 - expected) / draws)
    assert sum(stated.values()) == pytest.approx(1)


def test_an_exploring_server_tells_and_logs_exact_propensities(
    exploring: RecommenderClient, client: RecommenderClient, store: EventStore, model: Recommender
) -> None:
    assert exploring.get_model_info().exploration_temperature == TEMPERATURE
    assert client.get_model_info().exploration_temperature == 0
    record(exploring, "u", events_of(model, [3, 8, 9]))
    slates = set()
    for _ in range(5):
        answer = exploring.recommend(user_id="u", k=4, explain=True)
        assert all(one.log_propensity < 0 and one.explanation.text for one in answer.recommendations)
        assert answer.log_propensity == pytest.approx(sum(one.log_propensity for one in answer.recommendations))
        slates.add(tuple(one.item_id for one in answer.recommendations))
    assert len(slates) > 1
    store.flush()
    shown = slates_of(store, "u")
    assert {one.item_ids for one in shown} == slates
    assert all(len(one.log_propensities) == 4 for one in shown)
    assert {(one.temperature, one.request_time, one.excluded_item_ids) for one in shown} == {(TEMPERATURE, None, ())}
    known = model.catalog.item_ids[5]
    exploring.recommend(user_id="u", k=4, request_time=10**9, exclude_item_ids=[known, "nobody knows it", known])
    client.recommend(user_id="u", k=4)
    exploring.recommend(user_id="nobody", k=3, request_time=7)
    store.flush()
    *_, explored, by_the_other = slates_of(store, "u")
    assert (explored.temperature, explored.request_time, explored.excluded_item_ids) == (TEMPERATURE, 10**9, (known,))
    assert (by_the_other.temperature, by_the_other.log_propensities) == (None, ())
    (popular,) = slates_of(store, "nobody")
    assert (popular.temperature, popular.request_time, popular.log_propensities) == (None, 7, ())
    fallback = exploring.recommend(user_id="nobody", k=3)
    assert (fallback.policy, fallback.log_propensity, len(fallback.recommendations)) == ("popularity", 0, 3)


def test_propensities_of_a_history_are_those_of_its_scores(
    exploring: RecommenderClient, client: RecommenderClient, model: Recommender
) -> None:
    history = events_of(model, [3, 8, 9])
    scores = {one.item_id: one.score for one in client.recommend(history=history, k=1000).recommendations}
    answer = exploring.recommend(history=history, k=5)
    left = sum(math.exp(score / TEMPERATURE) for score in scores.values())
    for one in answer.recommendations:
        weight = math.exp(scores[one.item_id] / TEMPERATURE)
        assert one.log_propensity == pytest.approx(math.log(weight / left), abs=1e-3)
        left -= weight
    (batched,) = answered(exploring.batch_recommend([recommend_request(history=history, k=5)]))
    assert batched.log_propensity < 0


@pytest.mark.parametrize("temperature", [0, -1, math.nan, math.inf])
def test_a_temperature_is_positive(temperature: float) -> None:
    with pytest.raises(ValueError, match="expected a temperature above 0"):
        Exploration(temperature)


def test_what_was_under_way_when_its_user_was_deleted_is_not_logged(model: Recommender, store: EventStore) -> None:
    class DeletedMeanwhile:
        """The context of a call during which the user is deleted."""

        def time_remaining(self) -> float:
            store.delete_user("u")
            return 30.0

        def is_active(self) -> bool:
            return True

    servicer = RecommenderServicer(RecommenderService(one_model(model, store), store, Metrics()))
    request = recommend_request(user_id="u", k=3)
    servicer.Recommend(request, DeletedMeanwhile())
    servicer.BatchRecommend(BatchRecommendRequest(requests=[request, request]), DeletedMeanwhile())
    store.flush()
    assert slates_of(store, "u") == []
