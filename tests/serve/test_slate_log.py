"""Which recommendations are logged, and for how long."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import grpc
import pytest

from serve.api.service import is_logged
from serve.client import RecommenderClient, Status, recommend_request
from serve.front.server import create_server
from serve.model.recommender import Recommender
from serve.pb.recommender_pb2 import RecommendResponse
from serve.serving.sweeper import SlatePruner
from serve.settings import Settings, SettingsError
from serve.stores.base import EventStore, ShownItem
from tests.serve.one_model import one_model
from tests.serve.stores.databases import wait_until
from tests.serve.stores.slates import log_now, slates_of
from tests.serve.stores.test_stores import SLATE

DAY = 86_400


@contextmanager
def logging(model: Recommender, store: EventStore, share: float, retention: float = 0.0) -> Iterator[RecommenderClient]:
    """A client of a server that logs the slates of such a share of the users, for so many days."""
    models = one_model(model, store)
    server = create_server(models, store, "127.0.0.1:0", slate_log=share, slate_retention=retention)
    server.start()
    with RecommenderClient(f"127.0.0.1:{server.port}") as client:
        yield client
    server.drain()


def test_the_users_of_a_share_are_the_same_of_each_larger_share() -> None:
    names = [f"user {number}" for number in range(2_000)]
    logged = [{name for name in names if is_logged(name, share / 10)} for share in range(11)]
    assert (logged[0], logged[10]) == (set(), set(names))
    for share in range(10):
        assert logged[share] < logged[share + 1]
        # Four standard deviations of the binomial distribution are 90.
        assert abs(len(logged[share]) - 200 * share) < 90


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_all_slates_of_a_user_are_logged_or_none(model: Recommender, store: EventStore, share: float) -> None:
    users = [f"user {number}" for number in range(20)]
    with logging(model, store, share) as client:
        for user_id in users * 2:
            assert client.recommend(user_id=user_id, k=1).recommendation_id
        for _ in range(20):
            client.recommend(history=[], k=1)
    store.flush()
    for user_id in users:
        assert len(slates_of(store, user_id)) == (2 if is_logged(user_id, share) else 0)
    along = len(slates_of(store, None))
    assert along == 20 * share if share in (0, 1) else 0 < along < 20


def test_what_was_shown_cannot_be_left_out_if_it_is_not_logged(model: Recommender, store: EventStore) -> None:
    with logging(model, store, 0.9) as client, pytest.raises(grpc.RpcError) as failure:
        client.recommend(user_id="u", not_shown_within=60)
    assert failure.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert failure.value.details() == "not_shown_within: expected a server with --slate-log 1, came 0.9"


def test_what_was_shown_cannot_be_left_out_for_longer_than_it_is_kept(model: Recommender, store: EventStore) -> None:
    """Half a day; of a batch only that request fails."""
    asked = [recommend_request(user_id="u", k=1, not_shown_within=seconds) for seconds in (43_200, 43_201)]
    with logging(model, store, 1.0, 0.5) as client:
        answer, error = client.batch_recommend(asked)
    assert isinstance(answer, RecommendResponse)
    assert len(answer.recommendations) == 1
    assert isinstance(error, Status)
    assert error.code == grpc.StatusCode.FAILED_PRECONDITION.value[0]
    assert error.message == (
        "not_shown_within: expected at most 43200 seconds, for which recommendations are kept"
        " (--slate-retention), came 43201"
    )


def test_a_share_above_all_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"slate_log: expected 0 to 1, came 1\.5"):
        Settings(Path("m"), slate_log=1.5)


def test_what_is_too_old_is_deleted_in_the_background(store: EventStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """In steps of two; the youngest is as old as the limit."""
    monkeypatch.setattr("serve.serving.sweeper.DROPPED_AT_ONCE", 2)
    monkeypatch.setattr("serve.serving.sweeper.PAUSE_S", 0.0)
    now = 100 * DAY
    for day in range(1, 11):
        log_now(store, SLATE._replace(recommendation_id=f"r{day}", timestamp=day * DAY))
        store.record_shown([ShownItem(f"r{day}", "a", 1, day * DAY, day * DAY)])
    with closing(SlatePruner(store, 93, clock=lambda: now + 0.5)):

        def assert_pruned() -> None:
            left = {f"r{day}" for day in range(7, 11)}
            assert {one.recommendation_id for one in slates_of(store, "u")} == left
            assert {one.recommendation_id for part in store.all_shown() for one in part} == left

        wait_until(assert_pruned)
    assert len(slates_of(store, "u")) == 4
