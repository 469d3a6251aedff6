"""A user's events over the service: listed, deleted, and made those of another user."""

import time

import grpc
import pytest

from serve.client import Impression, RecommenderClient, UserEvent
from serve.model.recommender import Recommender
from serve.pb.recommender_pb2 import ListEventsRequest
from serve.pb.recommender_pb2_grpc import RecommenderStub
from serve.stores.base import EventStore

ALL = 60


def event(event_id: str, item_id: str = "1007", timestamp: int = 1, user_id: str = "u", **more: object) -> UserEvent:
    return UserEvent(event_id=event_id, user_id=user_id, item_id=item_id, timestamp=timestamp, **more)  # type: ignore[arg-type]


def recommended(client: RecommenderClient, user_id: str) -> set[str]:
    return {one.item_id for one in client.recommend(user_id=user_id, k=ALL).recommendations}


def test_pages_have_every_event_as_it_was_sent(client: RecommenderClient) -> None:
    sent = [
        event("1", "1007", 10, rating=4.5, recommendation_id="r", type="purchase", value=19.99),
        event("2", "no such item", 30, type="skip", value=0),
        event("3", "1014", 20, type="dislike"),
        event("4", "1021", 20, type="interaction"),
    ]
    client.record_events([*sent, event("v", user_id="v")])
    expected = [sent[1], sent[3], sent[2], sent[0]]
    for size in (1, 2, 3, 4, 5):
        found, token = [], ""
        while True:
            page = client.list_events("u", size, token)
            assert 1 <= len(page.events) <= size
            found += page.events
            token = page.next_page_token
            if not token:
                break
        assert found == expected
    assert client.list_events("unknown").events == []


def test_an_event_between_two_pages_moves_none_of_the_second(client: RecommenderClient) -> None:
    client.record_events([event(str(at), timestamp=10 + at) for at in range(4)])
    first = client.list_events("u", 2)
    client.record_events([event("late", timestamp=5), event("new", timestamp=50)])
    client.delete_events("u", ["2"])
    second = client.list_events("u", 2, first.next_page_token)
    assert [one.event_id for one in (*first.events, *second.events)] == ["3", "2", "1", "0"]


def test_a_page_has_a_hundred_events_unless_asked(stub: RecommenderStub, client: RecommenderClient) -> None:
    client.record_events([event(str(at), timestamp=1 + at) for at in range(101)])
    page = stub.ListEvents(ListEventsRequest(user_id="u"), timeout=10)
    assert (len(page.events), page.events[0].event_id) == (100, "100")
    (last,) = client.list_events("u", page_token=page.next_page_token).events
    assert last.event_id == "0"


@pytest.mark.parametrize("what", ["another user's", "cut", "longer", "no base64", "no ASCII", "made up"])
def test_a_token_that_is_not_of_the_list_is_refused(what: str, client: RecommenderClient) -> None:
    client.record_events([event("1"), event("2"), event("3", user_id="v"), event("4", user_id="v")])
    token = client.list_events("u", 1).next_page_token
    bad = {
        "another user's": client.list_events("v", 1).next_page_token,
        "cut": token[:-4],
        "longer": token + "AAAA",
        "no base64": "?" * 32,
        "no ASCII": "ü" + token[1:],
        "made up": "A" * 32,
    }[what]
    with pytest.raises(grpc.RpcError) as failure:
        client.list_events("u", 1, bad)
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (
        failure.value.details() == "page_token: expected next_page_token of an answer for this user, came another text"
    )


def test_a_user_is_answered_as_if_deleted_events_had_never_been(client: RecommenderClient, model: Recommender) -> None:
    ids = model.catalog.item_ids
    kept = [event("1", ids[3], 10), event("2", ids[9], 20)]
    for user_id in ("u", "other"):
        own = [UserEvent(**{**_fields(one), "user_id": user_id, "event_id": user_id + one.event_id}) for one in kept]
        client.record_events(own)
    client.record_events([event("3", ids[20], 15), event("4", ids[21], 30, type="dislike"), event("5", ids[22], 40)])
    # The state in memory has read them.
    assert not {ids[20], ids[21], ids[22]} & recommended(client, "u")
    assert client.delete_events("u", ["3", "4", "5", "other1"]).deleted_event_count == 3
    found, expected = (client.recommend(user_id=user_id, k=ALL).recommendations for user_id in ("u", "other"))
    assert {one.item_id for one in found} == {one.item_id for one in expected}
    assert [one.score for one in found] == pytest.approx([one.score for one in expected], abs=1e-4)
    assert client.delete_events("u", ["3"]).deleted_event_count == 0
    client.delete_events("u", ["u1", "u2"])
    assert client.recommend(user_id="u").policy == "popularity"


def test_a_visitor_who_logs_in_is_answered_with_both_histories(
    client: RecommenderClient, store: EventStore, model: Recommender
) -> None:
    ids = model.catalog.item_ids
    client.record_events([event("1", ids[3], 10, "visitor"), event("2", ids[4], 30, "visitor", type="dislike")])
    client.record_events([event("3", ids[9], 20)])
    assert ids[9] in recommended(client, "visitor")
    assert ids[3] in recommended(client, "u")
    merged = client.merge_users("visitor", "u")
    assert (merged.merged_event_count, merged.merged_recommendation_count) == (2, 1)
    assert recommended(client, "u") == set(ids[1:]) - {ids[3], ids[4], ids[9]}
    assert client.recommend(user_id="visitor").policy == "popularity"
    again = client.merge_users("visitor", "u")
    assert (again.merged_event_count, again.merged_recommendation_count) == (0, 1)
    assert client.delete_user("u").deleted_event_count == 3


def test_too_much_to_merge_is_a_failed_precondition(client: RecommenderClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.stores.sqlite.users.MOST_MERGED", 1)
    client.record_events([event("1"), event("2")])
    with pytest.raises(grpc.RpcError) as failure:
        client.merge_users("u", "v")
    assert failure.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    expected = "source_user_id: expected a user with at most 1 events and recommendations, came one with 2"
    assert failure.value.details() == expected
    assert client.get_user_profile("u").event_count == 2


def _fields(one: UserEvent) -> dict[str, object]:
    return {field.name: value for field, value in one.ListFields()}


def test_impressions_are_kept_once_and_leave_with_the_user(client: RecommenderClient, store: EventStore) -> None:
    answer = client.recommend(user_id="u", k=3)
    name, items = answer.recommendation_id, [one.item_id for one in answer.recommendations]
    seen = [
        Impression(recommendation_id=name, item_id=item, position=1 + at, timestamp=5)
        for at, item in enumerate(items[:2])
    ]
    along = Impression(recommendation_id="b", item_id=items[2], timestamp=6)
    recorded = client.record_impressions([*seen, along, seen[0]])
    assert (recorded.recorded_count, recorded.duplicate_count) == (3, 1)
    assert client.record_impressions(seen).duplicate_count == 2
    expected = [(name, items[0], 1, 5), (name, items[1], 2, 5), ("b", items[2], 0, 6)]
    found = [one for part in store.all_shown() for one in part]
    assert {one[:4] for one in found} == set(expected)
    assert all(abs(one.recorded - time.time()) < 60 for one in found)
    store.flush()
    client.delete_user("u")
    assert [one[:4] for part in store.all_shown() for one in part] == expected[2:]
