"""Every rule of the contract: a request that breaks one is INVALID_ARGUMENT, and the message names the field."""

import math
import time
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from serve.api import rules
from serve.api.errors import InvalidRequest
from serve.api.pages import page_token
from serve.api.rules import MAX_ID_LENGTH
from serve.client import Event, Impression, Item, RecommenderClient, UserEvent
from serve.pb.recommender_pb2 import (
    BatchRecommendRequest,
    DeleteEventsRequest,
    DeleteItemsRequest,
    DeleteUserRequest,
    GetItemRequest,
    GetUserProfileRequest,
    History,
    ItemFilter,
    ListEventsRequest,
    ListItemsRequest,
    MergeUsersRequest,
    RecommendRequest,
    RecordEventsRequest,
    RecordImpressionsRequest,
    SimilarItemsRequest,
    UpsertItemsRequest,
    View,
)
from serve.pb.recommender_pb2_grpc import RecommenderStub

LONG = "x" * (MAX_ID_LENGTH + 1)


def with_event(**fields: Any) -> RecommendRequest:
    """Its third event has these fields; the events before it are good."""
    good = {"item_id": "1007", "rating": 4.0, "timestamp": 5}
    return RecommendRequest(history=History(events=[Event(**good), Event(**good), Event(**{**good, **fields})]))


def recording(**fields: Any) -> RecordEventsRequest:
    """Its second event has these fields; the event before it is good."""
    good = {"event_id": "a", "user_id": "u", "item_id": "1007", "rating": 4.0, "timestamp": 5}
    return RecordEventsRequest(events=[UserEvent(**good), UserEvent(**{**good, "event_id": "b", **fields})])


NO_TIME = "expected the event's time in seconds since 1970-01-01T00:00Z, came none"
FAR = 2**63 - 1
NO_TAG = "expected one of the 6 tags of the model directory, or one of a stored item, came"
FILTERS = [
    (ItemFilter(allow_item_ids=["1"] * 10_001), "filter.allow_item_ids: expected at most 10000 entries, came 10001"),
    (ItemFilter(allow_item_ids=["1007", ""]), "filter.allow_item_ids[1]: expected an id of 1 to 512 characters"),
    (ItemFilter(allow_item_ids=[LONG]), "filter.allow_item_ids[0]: expected an id of 1 to 512 characters, came 513"),
    (ItemFilter(allow_item_ids=["a\0"]), "filter.allow_item_ids[0]: expected an id without the character U+0000"),
    (ItemFilter(allow_item_ids=["1007 "]), "filter.allow_item_ids[0]: expected an id without spaces around it"),
    (ItemFilter(any_tags=["Drama"] * 101), "filter.any_tags: expected at most 100 entries, came 101"),
    (ItemFilter(all_tags=["Drama"] * 101), "filter.all_tags: expected at most 100 entries, came 101"),
    (ItemFilter(none_tags=["Drama"] * 101), "filter.none_tags: expected at most 100 entries, came 101"),
    (ItemFilter(any_tags=["Drama", "drama"]), f"filter.any_tags[1]: {NO_TAG} 'drama'"),
    (ItemFilter(all_tags=[""]), f"filter.all_tags[0]: {NO_TAG} ''"),
    (ItemFilter(none_tags=["a\0"]), f"filter.none_tags[0]: {NO_TAG} 'a\\x00'"),
    (ItemFilter(none_tags=["x" * 10**6]), f"filter.none_tags[0]: {NO_TAG} '{'x' * 200}'..."),
    (
        ItemFilter(all_tags=["Action", "Drama"], none_tags=["Comedy", "Drama"]),
        "filter.all_tags: expected no tag of filter.none_tags, came 'Drama'",
    ),
    (
        ItemFilter(any_tags=["Action", "Drama"], none_tags=["Drama", "Comedy", "Action"]),
        "filter.any_tags: expected a tag that is not in filter.none_tags, came none",
    ),
    (ItemFilter(minimum_score=math.nan), "filter.minimum_score: expected a finite number, came nan"),
    (ItemFilter(minimum_score=-math.inf), "filter.minimum_score: expected a finite number, came -inf"),
]
KNOWN_TYPES = "expected one of click, dislike, interaction, like, play, purchase, skip, view, came"
RECOMMEND = [
    (RecommendRequest(), "user_id: expected a user, or a history, came neither"),
    (RecommendRequest(user_id=""), "user_id: expected a user, or a history, came neither"),
    (RecommendRequest(user_id=LONG, history=History()), "user_id: expected an id of 1 to 512 characters, came 513"),
    (with_event(event_id=LONG), "history.events[2].event_id: expected an id"),
    (
        RecommendRequest(user_id="u", history=History(events=[Event(item_id="1", timestamp=9)]), request_time=8),
        "request_time: expected not before the last event at 9, came 8",
    ),
    (RecommendRequest(user_id="u", view=4), "view: expected one of VIEW_UNSPECIFIED, VIEW_IDS, VIEW_BASIC, VIEW_FULL"),
    (RecommendRequest(user_id="u", bucket_key="b"), "bucket_key: expected none with user_id"),
    (RecommendRequest(history=History(), bucket_key=LONG), "bucket_key: expected an id"),
    (RecommendRequest(user_id="u", request_id=LONG), "request_id: expected an id"),
    (RecommendRequest(user_id="u", request_id="a\0"), "request_id: expected an id without the character U+0000"),
    (RecommendRequest(user_id=LONG), "user_id: expected an id of 1 to 512 characters, came 513 characters"),
    (RecommendRequest(user_id="u", k=-1), "k: expected 1 to 1000, or 0 for 10, came -1"),
    (RecommendRequest(user_id="u", k=1001), "k: expected 1 to 1000, or 0 for 10, came 1001"),
    (RecommendRequest(user_id="u", k=2**31 - 1), "k: expected"),
    (RecommendRequest(user_id="u", request_time=-1), "request_time: expected seconds since 1970"),
    (RecommendRequest(user_id="u", exclude_item_ids=["1007", ""]), "exclude_item_ids[1]: expected an id"),
    (RecommendRequest(user_id="u", exclude_item_ids=["1"] * 10_001), "exclude_item_ids: expected at most 10000"),
    (RecommendRequest(history=History(events=[Event(item_id="1")] * 10_001)), "history.events: expected at most 10000"),
    (with_event(item_id=""), "history.events[2].item_id: expected an id"),
    (with_event(item_id=LONG), "history.events[2].item_id: expected an id"),
    (with_event(timestamp=-1), "history.events[2].timestamp: expected seconds since 1970"),
    (with_event(timestamp=None), f"history.events[2].timestamp: {NO_TIME}"),
    (with_event(timestamp=0), f"history.events[2].timestamp: {NO_TIME}"),
    (with_event(timestamp=FAR), "history.events[2].timestamp: expected seconds since 1970-01-01T00:00Z in 0.."),
    (RecommendRequest(user_id="u", request_time=FAR), "request_time: expected seconds since 1970-01-01T00:00Z in 0.."),
    (with_event(rating=0), "history.events[2].rating: expected a rating in 0.5..5, came 0"),
    (with_event(rating=5.01), "history.events[2].rating: expected a rating in 0.5..5, came 5.01"),
    (with_event(rating=math.nan), "history.events[2].rating: expected a rating in 0.5..5, came nan"),
    (with_event(rating=math.inf), "history.events[2].rating: expected a rating in 0.5..5, came inf"),
    (with_event(rating=-math.inf), "history.events[2].rating: expected a rating in 0.5..5, came -inf"),
    (with_event(type="buy"), f"history.events[2].type: {KNOWN_TYPES} 'buy'"),
    (with_event(type="View"), f"history.events[2].type: {KNOWN_TYPES} 'View'"),
    (with_event(type="a\0"), f"history.events[2].type: {KNOWN_TYPES} 'a\\x00'"),
    (
        RecommendRequest(history=History(events=[Event(item_id="1", timestamp=9)]), request_time=8),
        "request_time: expected not before the last event at 9, came 8",
    ),
    (RecommendRequest(user_id="u", seen=7), "seen: expected one of SEEN_UNSPECIFIED, SEEN_EXCLUDE, SEEN_ALLOW, came 7"),
    (RecommendRequest(user_id="u", seen=-1), "seen: expected one of SEEN_UNSPECIFIED, SEEN_EXCLUDE, SEEN_ALLOW"),
    (RecommendRequest(user_id="u", k=3, new_item_slots=4), "new_item_slots: expected 0 to k, which is 3, came 4"),
    (RecommendRequest(user_id="u", new_item_slots=11), "new_item_slots: expected 0 to k, which is 10, came 11"),
    (RecommendRequest(user_id="u", new_item_slots=-1), "new_item_slots: expected 0 to k, which is 10, came -1"),
    (RecommendRequest(user_id="u", not_shown_within=-1), "not_shown_within: expected 0 to 2678400 seconds, came -1"),
    (RecommendRequest(user_id="u", not_shown_within=2_678_401), "not_shown_within: expected 0 to 2678400 seconds"),
    (
        RecommendRequest(history=History(), not_shown_within=1),
        "not_shown_within: expected user_id with it, came a history",
    ),
    *((RecommendRequest(user_id="u", filter=asked), message) for asked, message in FILTERS),
    (
        RecommendRequest(user_id="u", filter=ItemFilter(allow_item_ids=["1", "2"]), exclude_item_ids=["2", "3", "1"]),
        "filter.allow_item_ids: expected an item that is not in exclude_item_ids, came none",
    ),
]
RECORD = [
    (recording(event_id=""), "events[1].event_id: expected an id"),
    (recording(event_id=LONG), "events[1].event_id: expected an id"),
    (recording(user_id=""), "events[1].user_id: expected an id"),
    (recording(item_id=""), "events[1].item_id: expected an id"),
    (recording(rating=7.5), "events[1].rating: expected a rating in 0.5..5, came 7.5"),
    (recording(rating=math.nan), "events[1].rating: expected a rating in 0.5..5, came nan"),
    (recording(timestamp=-5), "events[1].timestamp: expected seconds since 1970"),
    (recording(timestamp=None), f"events[1].timestamp: {NO_TIME}"),
    (recording(timestamp=FAR), "events[1].timestamp: expected seconds since 1970-01-01T00:00Z in 0.."),
    (recording(recommendation_id=LONG), "events[1].recommendation_id: expected an id"),
    (recording(type="bought"), f"events[1].type: {KNOWN_TYPES} 'bought'"),
    (recording(type="x" * 10**6), f"events[1].type: {KNOWN_TYPES} '{'x' * 200}'..."),
    (recording(value=-0.01), "events[1].value: expected a finite number from 0 on, came -0.01"),
    (recording(value=math.nan), "events[1].value: expected a finite number from 0 on, came nan"),
    (recording(value=math.inf), "events[1].value: expected a finite number from 0 on, came inf"),
    (RecordEventsRequest(events=[UserEvent()] * 1001), "events: expected at most 1000 entries, came 1001"),
]
PROFILE = [
    (GetUserProfileRequest(), "user_id: expected an id"),
    (GetUserProfileRequest(user_id="u", page_size=-1), "page_size: expected 1 to 1000, or 0 for 100, came -1"),
    (GetUserProfileRequest(user_id="u", page_size=1001), "page_size: expected 1 to 1000, or 0 for 100, came 1001"),
    (GetUserProfileRequest(user_id="u", page_token="\0"), "page_token: expected next_page_token of an answer for this"),
]
SIMILAR = [
    (SimilarItemsRequest(), "item_id: expected an id"),
    (SimilarItemsRequest(item_id="1007", k=-1), "k: expected 1 to 1000"),
    (SimilarItemsRequest(item_id="1007", k=1001), "k: expected 1 to 1000"),
    (SimilarItemsRequest(item_id="1007", bucket_key=LONG), "bucket_key: expected an id"),
    (SimilarItemsRequest(item_id="1007", exclude_item_ids=["1007", ""]), "exclude_item_ids[1]: expected an id"),
    (SimilarItemsRequest(item_id="1007", exclude_item_ids=["1"] * 10_001), "exclude_item_ids: expected at most 10000"),
    *((SimilarItemsRequest(item_id="1007", filter=asked), message) for asked, message in FILTERS),
]


BATCH = [
    (BatchRecommendRequest(requests=[RecommendRequest(user_id="u")] * 257), "requests: expected at most 256 entries"),
    (
        BatchRecommendRequest(requests=[RecommendRequest(user_id="u", k=1000)] * 11),
        "requests: expected at most 10000 items (k) in all, came 11000",
    ),
    (
        BatchRecommendRequest(requests=[RecommendRequest(history=History(events=[Event(item_id="1")] * 10_000))] * 11),
        "requests: expected at most 100000 events in all, came 110000",
    ),
    (
        BatchRecommendRequest(requests=[RecommendRequest(user_id="u", k=1000, view=View.VIEW_FULL)] * 2),
        "requests: expected at most 1000 items (k) with VIEW_FULL in all, came 2000",
    ),
]
DELETE = [
    (DeleteUserRequest(), "user_id: expected an id"),
    (DeleteUserRequest(user_id=LONG), "user_id: expected an id"),
]


EVENTS = [
    (ListEventsRequest(), "user_id: expected an id"),
    (ListEventsRequest(user_id="u", page_size=-1), "page_size: expected 1 to 1000, or 0 for 100, came -1"),
    (ListEventsRequest(user_id="u", page_size=1001), "page_size: expected 1 to 1000, or 0 for 100, came 1001"),
    (
        ListEventsRequest(user_id="u", page_token="\0"),
        "page_token: expected next_page_token of an answer for this user",
    ),
]
DELETE_EVENTS = [
    (DeleteEventsRequest(event_ids=["1"]), "user_id: expected an id"),
    (DeleteEventsRequest(user_id="u"), "event_ids: expected at least one id, came none"),
    (DeleteEventsRequest(user_id="u", event_ids=["1", ""]), "event_ids[1]: expected an id"),
    (DeleteEventsRequest(user_id="u", event_ids=["a\0"]), "event_ids[0]: expected an id without the character U+0000"),
    (DeleteEventsRequest(user_id="u", event_ids=["1"] * 1001), "event_ids: expected at most 1000 entries, came 1001"),
]
MERGE = [
    (MergeUsersRequest(target_user_id="u"), "source_user_id: expected an id"),
    (MergeUsersRequest(source_user_id="u"), "target_user_id: expected an id"),
    (MergeUsersRequest(source_user_id="u", target_user_id=LONG), "target_user_id: expected an id"),
    (
        MergeUsersRequest(source_user_id="u", target_user_id="u"),
        "target_user_id: expected another user than source_user_id, came the same",
    ),
]


def showing(**fields: Any) -> RecordImpressionsRequest:
    """Its second impression has these fields; the impression before it is good."""
    good = {"recommendation_id": "r", "item_id": "1007", "position": 1, "timestamp": 5}
    return RecordImpressionsRequest(impressions=[Impression(**good), Impression(**{**good, **fields})])


IMPRESSIONS = [
    (showing(recommendation_id=""), "impressions[1].recommendation_id: expected an id of 1 to 64 characters, came 0"),
    (
        showing(recommendation_id="x" * 65),
        "impressions[1].recommendation_id: expected an id of 1 to 64 characters, came 65",
    ),
    (showing(item_id=LONG), "impressions[1].item_id: expected an id"),
    (showing(position=-1), "impressions[1].position: expected 1 to 100000, or 0 for not known, came -1"),
    (showing(position=100_001), "impressions[1].position: expected 1 to 100000, or 0 for not known, came 100001"),
    (showing(timestamp=0), f"impressions[1].timestamp: {NO_TIME}"),
    (showing(timestamp=FAR), "impressions[1].timestamp: expected seconds since 1970"),
    (
        RecordImpressionsRequest(impressions=[Impression()] * 1001),
        "impressions: expected at most 1000 entries, came 1001",
    ),
]


def storing(**fields: Any) -> UpsertItemsRequest:
    """Its second item has these fields; the item before it is good."""
    good = {"item_id": "a", "title": "A", "tags": ["Drama"], "metadata": {"k": "v"}}
    return UpsertItemsRequest(items=[Item(**good), Item(**{**good, "item_id": "b", **fields})])


IN_TIME = "expected seconds since 1970-01-01T00:00Z in 0..253402300799 (the end of the year 9999), came"
ITEMS = [
    (storing(item_id=""), "items[1].item_id: expected an id of 1 to 512 characters, came 0 characters"),
    (storing(item_id=LONG), "items[1].item_id: expected an id"),
    (storing(item_id="a\0"), "items[1].item_id: expected an id without the character U+0000"),
    (storing(item_id="a"), "items[1].item_id: expected each id once, came that of items[0]"),
    (storing(title="x" * 1001), "items[1].title: expected a text of 0 to 1000 characters, came 1001 characters"),
    (storing(title="\0"), "items[1].title: expected a text without the character U+0000"),
    (storing(tags=["t"] * 101), "items[1].tags: expected at most 100 entries, came 101"),
    (storing(tags=["t", ""]), "items[1].tags[1]: expected a text of 1 to 100 characters, came 0 characters"),
    (storing(tags=["x" * 101]), "items[1].tags[0]: expected a text of 1 to 100 characters, came 101 characters"),
    (storing(tags=["a\0"]), "items[1].tags[0]: expected a text without the character U+0000"),
    (storing(tags=["a "]), "items[1].tags[0]: expected a tag without spaces around it, came one with spaces"),
    (storing(available_from=-1), f"items[1].available_from: {IN_TIME} -1"),
    (storing(available_until=1_700_000_000_000), f"items[1].available_until: {IN_TIME} 1700000000000"),
    (
        storing(available_from=5, available_until=5),
        "items[1].available_until: expected a time after available_from, which is 5, came 5",
    ),
    (storing(available_until=10**15), f"items[1].available_until: {IN_TIME} 1000000000000000, which looks like micro"),
    (storing(available_from=5, available_until=0), "items[1].available_until: expected a time after available_from"),
    (storing(metadata={"": "v"}), "items[1].metadata: expected no empty key, came one"),
    (storing(metadata={"k": "\0"}), "items[1].metadata: expected texts without the character U+0000"),
    (
        storing(metadata={"k": "ü" * 1024}),
        "items[1].metadata: expected at most 2048 bytes of keys and values, came 2049",
    ),
    (UpsertItemsRequest(items=[Item(item_id="a")] * 1001), "items: expected at most 1000 entries, came 1001"),
]
DELETE_ITEMS = [
    (DeleteItemsRequest(), "item_ids: expected at least one id, came none"),
    (DeleteItemsRequest(item_ids=["a", ""]), "item_ids[1]: expected an id"),
    (DeleteItemsRequest(item_ids=["a"] * 1001), "item_ids: expected at most 1000 entries, came 1001"),
]
GET_ITEM = [(GetItemRequest(), "item_id: expected an id"), (GetItemRequest(item_id=LONG), "item_id: expected an id")]
LIST_ITEMS = [
    (ListItemsRequest(page_size=-1), "page_size: expected 1 to 1000, or 0 for 100, came -1"),
    (ListItemsRequest(page_size=1001), "page_size: expected 1 to 1000, or 0 for 100, came 1001"),
    *(
        (ListItemsRequest(page_token=token), "page_token: expected next_page_token of an answer, came another text")
        for token in ("\0", "abc", "YWJjZGVmZ2hpamts", "ü", page_token("u", 1, 2))
    ),
]


def violations(error: grpc.RpcError) -> list[str]:
    """Those that the details name, as `field: description`; the reason is that of such errors."""
    status = rpc_status.from_call(error)
    assert status is not None
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    first, second = status.details
    assert first.Unpack(info)
    assert second.Unpack(bad)
    assert (info.domain, info.reason) == ("jaxrec", "INVALID_REQUEST")
    return [f"{one.field}: {one.description}" for one in bad.field_violations]


@pytest.mark.parametrize(
    ("rpc", "request_", "message"),
    [
        *(("Recommend", *case) for case in RECOMMEND),
        *(("RecordEvents", *case) for case in RECORD),
        *(("GetUserProfile", *case) for case in PROFILE),
        *(("SimilarItems", *case) for case in SIMILAR),
        *(("BatchRecommend", *case) for case in BATCH),
        *(("DeleteUser", *case) for case in DELETE),
        *(("ListEvents", *case) for case in EVENTS),
        *(("DeleteEvents", *case) for case in DELETE_EVENTS),
        *(("MergeUsers", *case) for case in MERGE),
        *(("RecordImpressions", *case) for case in IMPRESSIONS),
        *(("UpsertItems", *case) for case in ITEMS),
        *(("DeleteItems", *case) for case in DELETE_ITEMS),
        *(("GetItem", *case) for case in GET_ITEM),
        *(("ListItems", *case) for case in LIST_ITEMS),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_request_names_the_field(stub: RecommenderStub, rpc: str, request_: Any, message: str) -> None:
    with pytest.raises(grpc.RpcError) as failure:
        getattr(stub, rpc)(request_, timeout=10)
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert failure.value.details().startswith(message)
    (violation,) = violations(failure.value)
    assert violation == failure.value.details()


def test_nothing_of_a_bad_request_is_recorded(stub: RecommenderStub, client: RecommenderClient) -> None:
    with pytest.raises(grpc.RpcError):
        stub.RecordEvents(recording(rating=9), timeout=10)
    with pytest.raises(grpc.RpcError) as failure:
        client.get_user_profile("u")
    assert failure.value.code() is grpc.StatusCode.NOT_FOUND


def test_of_a_bad_item_none_is_stored(stub: RecommenderStub, client: RecommenderClient) -> None:
    with pytest.raises(grpc.RpcError):
        stub.UpsertItems(storing(title="\0"), timeout=10)
    assert not client.list_items(stored_only=True).items


@pytest.mark.parametrize("rating", [0.5, 5.0, None])
def test_both_ends_of_the_scale_and_no_rating_are_valid(client: RecommenderClient, rating: float | None) -> None:
    event = UserEvent(event_id="a", user_id="u", item_id="1007", rating=rating, timestamp=1)
    assert client.record_events([event]).recorded_count == 1


def test_limits_are_valid(client: RecommenderClient) -> None:
    longest = "\U00010348" * 512  # four bytes of UTF-8 each
    in_a_day = int(time.time()) + 86_400
    events = [UserEvent(event_id=f"{at}", user_id=longest, item_id=longest, timestamp=in_a_day) for at in range(1000)]
    assert client.record_events(events).unknown_item_count == 1000
    events_inline = [Event(item_id="1007", timestamp=1)] * 10_000
    answer = client.recommend(history=events_inline, k=1000, exclude_item_ids=["1014"] * 10_000, request_time=1)
    assert answer.policy == "reinforce"
    most = ItemFilter(allow_item_ids=["1021"] * 10_000, any_tags=["Drama"] * 100, none_tags=["Horror"] * 100)
    answer = client.recommend(history=events_inline, k=1000, new_item_slots=1000, filter=most)
    assert len(answer.recommendations) <= 1


@pytest.mark.parametrize(
    ("value", "came"),
    [
        (1_700_000_000 + 86_400, None),
        (0, None),
        (1_700_000_000 + 86_401, "1700086401"),
        (1_600_000_000_123, "1600000000123, which looks like milliseconds"),
        (1_600_000_000_123_456, "1600000000123456, which looks like microseconds"),
        (1_600_000_000_123_456_789, "1600000000123456789, which looks like nanoseconds"),
        (-1, "-1"),
    ],
)
def test_a_time_is_at_most_a_day_from_now(monkeypatch: pytest.MonkeyPatch, value: int, came: str | None) -> None:
    monkeypatch.setattr(rules.time, "time", lambda: 1_700_000_000.5)
    if came is None:
        rules.check_time("request_time", value, rules.latest_time())
        return
    with pytest.raises(InvalidRequest) as failure:
        rules.check_time("request_time", value, rules.latest_time())
    expected = "expected seconds since 1970-01-01T00:00Z in 0..1700086400 (a day from now)"
    assert str(failure.value) == f"request_time: {expected}, came {came}"


def test_a_message_of_random_bytes_is_an_error_and_the_server_lives(address: str, client: RecommenderClient) -> None:
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary("/jaxrec.v1.Recommender/Recommend", None, None)
        with pytest.raises(grpc.RpcError) as failure:
            call(b"\xff\x00garbage" * 100, timeout=10)
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert failure.value.details() == "message: expected a message of this RPC, came 900 bytes that are none"
    assert client.is_serving()
