"""A request that a client repeats with its id is one entry of the log, in every store and whoever answers."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from serve.client import Event, RecommenderClient, recommend_request
from serve.front.server import create_server
from serve.model.exploration import Exploration
from serve.model.recommender import Recommender
from serve.stores import open_store
from serve.stores.base import EventStore
from tests.serve.answers import answered
from tests.serve.one_model import one_model
from tests.serve.stores.slates import slates_of
from tests.serve.stores.test_stores import location, servers  # noqa: F401

DAY = 86_400


@contextmanager
def serving(model: Recommender, store: EventStore) -> Iterator[RecommenderClient]:
    """A client of a server that explores."""
    server = create_server(one_model(model, store, exploration=Exploration(1.0)), store, "127.0.0.1:0")
    server.start()
    with RecommenderClient(f"127.0.0.1:{server.port}") as client:
        yield client
    server.drain()


def test_a_repeated_request_is_one_entry_of_the_log(
    model: Recommender,
    location: str,  # noqa: F811
) -> None:
    """On two servers, of which none has written its log yet; what is drawn is the same too."""
    history = [Event(item_id="1007", timestamp=1)]
    with ExitStack() as stack:
        stores = [stack.enter_context(open_store(location)) for _ in range(2)]
        clients = [stack.enter_context(serving(model, store)) for store in stores]
        for subject in ({"user_id": "u", "history": history}, {"history": history}):
            answers = [client.recommend(request_id="a", k=5, **subject) for client in (*clients, clients[0])]
            answers += answered(clients[1].batch_recommend([recommend_request(request_id="a", k=5, **subject)]))
            assert [one.recommendation_id for one in answers] == [answers[0].recommendation_id] * 4
            for answer in answers[1:]:
                assert [one.item_id for one in answer.recommendations] == [
                    one.item_id for one in answers[0].recommendations
                ]
                assert answer.log_propensity == pytest.approx(answers[0].log_propensity, abs=1e-3)
            assert answers[0].log_propensity < 0
        for store in stores:
            store.flush()
        # Also after it was written.
        clients[1].recommend(user_id="u", request_id="a")
        others = [clients[0].recommend(user_id=name, request_id=own) for name, own in (("u", "b"), ("v", "a"))]
        for store in stores:
            store.flush()
        kept = {name: [one.recommendation_id for one in slates_of(stores[0], name)] for name in ("u", "v", None)}
        assert [len(of_one) for of_one in kept.values()] == [2, 1, 1]
        assert len({one for of_one in kept.values() for one in of_one}) == 4
        assert [kept["u"][1], kept["v"][0]] == [one.recommendation_id for one in others]
        assert all(len(one) == 32 and int(one, 16) for of_one in kept.values() for one in of_one)


def test_a_repeated_request_does_not_leave_out_what_it_answered_itself(
    model: Recommender,
    location: str,  # noqa: F811
) -> None:
    with open_store(location) as store, serving(model, store) as client:

        def asked(request_id: str) -> set[str]:
            answer = client.recommend(user_id="u", k=5, not_shown_within=DAY, request_id=request_id)
            return {one.item_id for one in answer.recommendations}

        first = asked("a")
        assert asked("a") == first
        store.flush()
        assert asked("a") == first
        assert not asked("b") & first


def test_the_first_answer_stays_in_the_log_until_its_user_is_deleted(
    client: RecommenderClient, store: EventStore
) -> None:
    names = [client.recommend(user_id="u", k=k, request_id="a").recommendation_id for k in (3, 4)]
    store.flush()
    assert [len(one.item_ids) for one in slates_of(store, "u")] == [3]
    client.delete_user("u")
    names.append(client.recommend(user_id="u", k=5, request_id="a").recommendation_id)
    store.flush()
    assert [len(one.item_ids) for one in slates_of(store, "u")] == [5]
    assert len(set(names)) == 1


def test_without_an_id_each_call_is_a_request(client: RecommenderClient, store: EventStore) -> None:
    for _ in range(2):
        client.recommend(user_id="u", k=1)
    store.flush()
    assert len({one.recommendation_id for one in slates_of(store, "u")}) == 2
