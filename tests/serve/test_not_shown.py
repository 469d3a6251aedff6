"""`not_shown_within`: what was recommended to a user lately is not recommended again."""

import time

import pytest

from serve.api.service import RecommenderService
from serve.client import RecommenderClient, UserEvent, recommend_request
from serve.model.recommender import Query, Recommender
from serve.observability.metrics import Metrics
from serve.pb.recommender_pb2 import RecommendResponse
from serve.serving.errors import Expired
from serve.stores.base import EventStore
from tests.serve.answers import answered
from tests.serve.one_model import one_model
from tests.serve.stores.slates import log_now, slates_of
from tests.serve.stores.test_stores import SLATE

DAY = 86_400


def items(answer: RecommendResponse) -> list[str]:
    return [one.item_id for one in answer.recommendations]


def test_answers_go_on_where_the_last_one_ended(client: RecommenderClient, model: Recommender) -> None:
    """Also those that are not written yet, of a batch, and with popular items."""
    client.record_events([UserEvent(event_id="1", user_id="u", item_id="1007", timestamp=1)])
    for user_id in ("u", "new"):
        expected = items(client.recommend(user_id=user_id, k=20))
        # That answer itself was shown to the user, so another one asks.
        client.merge_users(user_id, f"{user_id} 2")
        client.record_events([UserEvent(event_id=f"{user_id} 2", user_id=user_id, item_id="1007", timestamp=1)])
        client.delete_user(f"{user_id} 2")
        if user_id == "new":
            client.delete_events("new", ["new 2"])
        pages = [items(client.recommend(user_id=user_id, k=5, not_shown_within=DAY)) for _ in range(3)]
        (last,) = answered(client.batch_recommend([recommend_request(user_id=user_id, k=5, not_shown_within=DAY)]))
        assert [*pages[0], *pages[1], *pages[2], *items(last)] == expected
    assert set(items(client.recommend(user_id="other", k=5))) == set(expected[:5])
    # Without the option nothing is left out.
    assert items(client.recommend(user_id="new", k=5)) == expected[:5]


def test_what_was_shown_longer_ago_may_come_again(
    client: RecommenderClient, store: EventStore, model: Recommender
) -> None:
    first, second, *_ = items(client.recommend(user_id="u", k=3))
    client.delete_user("u")
    now, later = int(time.time()), time.monotonic() + 1
    shown = {"a": (first, now - 100), "b": (second, now - 1_000)}
    for name, (item, timestamp) in shown.items():
        slate = SLATE._replace(recommendation_id=name, item_ids=(item,), timestamp=timestamp)
        log_now(store, slate, started=later)
    assert not {first, second} & set(items(client.recommend(user_id="u", k=3, not_shown_within=2_000)))
    client.delete_user("u")
    log_now(store, SLATE._replace(recommendation_id="c", item_ids=(second,), timestamp=now - 1_000), started=later)
    assert items(client.recommend(user_id="u", k=3, not_shown_within=500))[:2] == [first, second]


def test_the_log_notes_what_was_left_out(client: RecommenderClient, store: EventStore, model: Recommender) -> None:
    shown = items(client.recommend(user_id="u", k=2))
    client.recommend(user_id="u", k=2, not_shown_within=DAY, exclude_item_ids=["1007"])
    store.flush()
    before, after = slates_of(store, "u")
    assert (before.request_options, before.excluded_item_ids) == ((), ())
    assert (after.request_options, after.excluded_item_ids) == (("not_shown_within",), ("1007", *shown))


@pytest.mark.parametrize("most", [1, 2])
def test_of_very_many_items_the_newest_count(
    client: RecommenderClient, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr("serve.api.service.MAX_NOT_SHOWN_ITEMS", most)
    expected = items(client.recommend(user_id="u", k=4))
    found = items(client.recommend(user_id="u", k=4, not_shown_within=DAY))
    assert set(expected[most:]) <= set(found)
    assert not set(expected[:most]) & set(found)


def test_a_batch_reads_each_user_once(
    client: RecommenderClient, store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    read = store.shown_items

    def reading(user_id: str, since: int, most: int, but: str) -> list[str]:
        asked.append(user_id)
        return read(user_id, since, most, but)

    monkeypatch.setattr(store, "shown_items", reading)
    assert answered(
        client.batch_recommend([recommend_request(user_id=name, k=1, not_shown_within=DAY) for name in "uvuuv"])
    )
    assert asked == ["u", "v"]


def test_reading_what_was_shown_stops_at_the_deadline(
    model: Recommender, store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three users one is read within it."""
    left, asked = iter([1.0, 0.0]), list[str]()

    def reading(user_id: str, since: int, most: int, but: str) -> list[str]:
        asked.append(user_id)
        return []

    monkeypatch.setattr(store, "shown_items", reading)
    models = one_model(model, store)
    service = RecommenderService(models, store, Metrics())
    queries = [Query((), 1, user_id=name, not_shown_within=DAY) for name in "uvw"]
    with pytest.raises(Expired):
        service.recommend_all([(models.for_user("u"), one) for one in queries], lambda: next(left), lambda: False)
    assert asked == ["u"]


def test_slates_are_read_until_there_are_enough_items(store: EventStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts of two: five items are in the newest three of six slates."""
    monkeypatch.setattr("serve.stores.sql.SLATES_AT_ONCE", 2)
    for at in range(6):
        items = tuple(f"{at} {place}" for place in range(2))
        log_now(store, SLATE._replace(recommendation_id=f"r{at}", timestamp=at, item_ids=items))
    parts, read = list[object](), store._read  # type: ignore[attr-defined]
    monkeypatch.setattr(store, "_read", lambda *query: parts.append(query) or read(*query))
    assert store.shown_items("u", 0, 5) == ["5 0", "5 1", "4 0", "4 1", "3 0"]
    assert len(parts) == 2
