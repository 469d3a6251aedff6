"""What holds in the whole contract: one kind of time, one kind of page, and every limit told."""

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from serve.api import rules
from serve.client import Event, Item, RecommenderClient, UserEvent, recommend_request
from serve.pb import model_admin_pb2, recommender_pb2
from serve.pb import recommender_pb2 as pb
from serve.pb.recommender_pb2 import Limits
from serve.pb.recommender_pb2_grpc import RecommenderStub
from tests.serve.api.test_validation import violations

DOCS = Path(__file__).parents[3] / "docs/serving.md"
MESSAGES: list[Descriptor] = [
    message for file in (recommender_pb2, model_admin_pb2) for message in file.DESCRIPTOR.message_types_by_name.values()
]
TIME = re.compile(r"(^|_)(time|timestamp|at|from|until|created|since|before|after|date)$")
RECOMMENDER = recommender_pb2.DESCRIPTOR.services_by_name["Recommender"]


def time_fields(message: Descriptor, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of all times within a message."""
    for field in message.fields:
        if field.message_type is not None and not field.message_type.GetOptions().map_entry:
            yield from time_fields(field.message_type, (*path, field.name))
        elif TIME.search(field.name):
            yield (*path, field.name)


def test_every_time_is_an_int64_in_seconds() -> None:
    found = {(message.name, field.name): field.type for message in MESSAGES for field in message.fields}
    times = {name: kind for name, kind in found.items() if TIME.search(name[1])}
    assert len(times) >= 9
    assert set(times.values()) == {FieldDescriptor.TYPE_INT64}
    # No field is of another kind of time.
    assert not [field.full_name for message in MESSAGES for field in message.fields if _is_well_known_time(field)]


def _is_well_known_time(field: FieldDescriptor) -> bool:
    kind = field.message_type
    return kind is not None and kind.full_name in ("google.protobuf.Timestamp", "google.protobuf.Duration")


WITH_TIMES = [
    (method.name, path)
    for method in RECOMMENDER.methods
    # Whose entries are requests of Recommend, and fail by themselves.
    if method.name != "BatchRecommend"
    for path in time_fields(method.input_type)
]


@pytest.mark.parametrize(("method", "path"), WITH_TIMES, ids=[".".join((name, *path)) for name, path in WITH_TIMES])
@pytest.mark.parametrize("value", [-1, -(2**63), 2**63 - 1, 2 * 10**15], ids=str)
def test_an_absurd_time_is_refused_with_its_field(
    stub: RecommenderStub, method: str, path: tuple[str, ...], value: int
) -> None:
    request: Message = GetMessageClass(RECOMMENDER.methods_by_name[method].input_type)()
    message: Any = request
    for name in path[:-1]:
        message = getattr(message, name)
        message = message.add() if hasattr(message, "add") else message
    setattr(message, path[-1], value)
    with pytest.raises(grpc.RpcError) as failure:
        getattr(stub, method)(request, timeout=10)
    fields = [re.sub(r"\[\d+\]", "", one.split(":")[0]) for one in violations(failure.value)]
    assert ".".join(path) in fields


def reachable(message: Descriptor, found: set[Descriptor]) -> set[Descriptor]:
    """A message and all those within it."""
    if message not in found:
        found.add(message)
        for field in message.fields:
            if field.message_type is not None:
                reachable(field.message_type, found)
    return found


def test_no_number_with_a_fraction_in_a_request_is_a_time() -> None:
    """Spans of time are whole seconds too."""
    services = (RECOMMENDER, model_admin_pb2.DESCRIPTOR.services_by_name["ModelAdmin"])
    asked: set[Descriptor] = set()
    for service in services:
        for method in service.methods:
            reachable(method.input_type, asked)
    floats = {
        field.full_name.removeprefix("jaxrec.v1.")
        for message in asked
        for field in message.fields
        if field.type in (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE)
    }
    assert floats == {
        *("Event.rating", "UserEvent.rating", "UserEvent.value", "ItemFilter.minimum_score"),
        *("Rules.diversity", "Boost.factor", "TrafficShare.share"),
    }


PAGED = {
    (file.package, service.name, method.name): method
    for file in (recommender_pb2.DESCRIPTOR, model_admin_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
    for method in service.methods
    if "next_page_token" in method.output_type.fields_by_name
}


def test_pages_are_asked_for_alike() -> None:
    assert {name for _, _, name in PAGED} == {"ListEvents", "ListItems", "GetUserProfile", "ListModels"}
    for method in PAGED.values():
        kinds = {name: field.type for name, field in method.input_type.fields_by_name.items()}
        assert kinds["page_size"] == FieldDescriptor.TYPE_INT32
        assert kinds["page_token"] == FieldDescriptor.TYPE_STRING
    others = {
        field.full_name
        for message in MESSAGES
        if message.name.endswith("Response") and "next_page_token" not in message.fields_by_name
        for field in message.fields
        if field.is_repeated
    }
    # As long as the request asks for, or bounded (`Limits`, SetTraffic).
    assert {name.removeprefix("jaxrec.v1.") for name in others} == {
        "RecommendResponse.recommendations",
        "BatchRecommendResponse.results",
        "SimilarItemsResponse.items",
        "TrendingResponse.items",
        "GetModelInfoResponse.genres",
        "GetModelInfoResponse.event_types",
        "SetTrafficResponse.shares",
        "GetOutcomesResponse.outcomes",
        "GetOutcomesResponse.differences",
        "GetOutcomesResponse.left_out",
    }


def test_every_limit_is_told_and_documented(client: RecommenderClient) -> None:
    constants = {name.lower(): value for name, value in vars(rules).items() if name.startswith("MAX_")}
    told = client.get_model_info().limits
    assert {field.name: getattr(told, field.name) for field in Limits.DESCRIPTOR.fields} == constants
    documented = re.findall(r"^\| `(max_\w+)` \| ([\d,]+) \|", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    assert {name: int(value.replace(",", "")) for name, value in documented} == constants


def event(**fields: Any) -> UserEvent:
    return UserEvent(**{"event_id": "e", "user_id": "u", "item_id": "1007", "timestamp": 1, **fields})


def item(**fields: Any) -> pb.UpsertItemsRequest:
    return pb.UpsertItemsRequest(items=[Item(**{"item_id": "i", **fields})])


def impression(**fields: Any) -> pb.RecordImpressionsRequest:
    good = {"recommendation_id": "r", "item_id": "1007", "timestamp": 1}
    return pb.RecordImpressionsRequest(impressions=[pb.Impression(**{**good, **fields})])


def batch(count: int, **fields: Any) -> pb.BatchRecommendRequest:
    return pb.BatchRecommendRequest(requests=[pb.RecommendRequest(user_id="u", **fields)] * count)


def with_events(count: int) -> pb.RecommendRequest:
    return pb.RecommendRequest(history=pb.History(events=[Event(item_id="1007", timestamp=1)] * count), k=1)


def ahead(seconds: int) -> pb.RecommendRequest:
    return pb.RecommendRequest(user_id="u", request_time=int(time.time()) + seconds)


def item_of_size(size: int) -> pb.UpsertItemsRequest:
    request = item(title="x" * 1_000, metadata={"k" * 48: "v" * 2_000})
    request.items[0].tags.extend([f"{at:098}" for at in range(10)])
    request.items[0].tags.append("")
    while request.items[0].ByteSize() < size:
        request.items[0].tags[-1] += "x"
    return request


def ruled(**rules: Any) -> pb.RecommendRequest:
    return pb.RecommendRequest(user_id="u", k=100, rules=pb.Rules(**rules))


# By limit: the RPC, and a request with so much.
ASKED: dict[str, tuple[str, Callable[[int], Message]]] = {
    "max_k": ("Recommend", lambda n: pb.RecommendRequest(user_id="u", k=n)),
    "max_page_size": ("ListEvents", lambda n: pb.ListEventsRequest(user_id="u", page_size=n)),
    "max_id_length": ("DeleteUser", lambda n: pb.DeleteUserRequest(user_id="x" * n)),
    "max_recommendation_id_length": ("RecordImpressions", lambda n: impression(recommendation_id="x" * n)),
    # The clock goes on until the server looks at it.
    "max_seconds_ahead": ("Recommend", lambda n: ahead(n if n == rules.MAX_SECONDS_AHEAD else n + 60)),
    "max_availability_time": ("UpsertItems", lambda n: item(available_until=n)),
    "max_history_events": ("Recommend", with_events),
    "max_excluded_items": ("Recommend", lambda n: pb.RecommendRequest(user_id="u", exclude_item_ids=["1"] * n)),
    "max_allowed_items": (
        "Recommend",
        lambda n: pb.RecommendRequest(user_id="u", filter=pb.ItemFilter(allow_item_ids=["1"] * n)),
    ),
    "max_tags": ("Recommend", lambda n: pb.RecommendRequest(user_id="u", filter=pb.ItemFilter(any_tags=["Drama"] * n))),
    "max_not_shown_s": ("Recommend", lambda n: pb.RecommendRequest(user_id="u", not_shown_within=n)),
    "max_batch": ("BatchRecommend", lambda n: batch(n, k=1)),
    "max_batch_items": ("BatchRecommend", lambda n: batch(n // 100, k=100 + n % 100)),
    "max_batch_metadata": ("BatchRecommend", lambda n: batch(n // 100, k=100 + n % 100, view=pb.VIEW_FULL)),
    "max_batch_ruled": (
        "BatchRecommend",
        lambda n: batch(n // 100, k=100 + n % 100, rules=pb.Rules(diversity=0.5)),
    ),
    "max_boosts": ("Recommend", lambda n: ruled(boosts=[pb.Boost(tag="Drama", factor=2)] * n)),
    "max_pins": ("Recommend", lambda n: ruled(pins=[pb.Pin(tag="Drama", position=1 + at) for at in range(n)])),
    "max_batch_events": (
        "BatchRecommend",
        lambda n: pb.BatchRecommendRequest(requests=[with_events(10_000)] * (n // 10_000) + [with_events(n % 10_000)]),
    ),
    "max_recorded_events": ("RecordEvents", lambda n: pb.RecordEventsRequest(events=[event()] * n)),
    "max_impressions": (
        "RecordImpressions",
        lambda n: pb.RecordImpressionsRequest(impressions=[impression().impressions[0]] * n),
    ),
    "max_position": ("RecordImpressions", lambda n: impression(position=n)),
    "max_deleted_events": ("DeleteEvents", lambda n: pb.DeleteEventsRequest(user_id="u", event_ids=["e"] * n)),
    "max_upserted_items": (
        "UpsertItems",
        lambda n: pb.UpsertItemsRequest(items=[Item(item_id=f"{at}") for at in range(n)]),
    ),
    "max_title_length": ("UpsertItems", lambda n: item(title="x" * n)),
    "max_item_tags": ("UpsertItems", lambda n: item(tags=["x"] * n)),
    "max_tag_length": ("UpsertItems", lambda n: item(tags=["x" * n])),
    "max_metadata_bytes": ("UpsertItems", lambda n: item(metadata={"k": "x" * (n - 1)})),
    "max_item_bytes": ("UpsertItems", item_of_size),
}
# How much is answered or kept, and what gRPC refuses; and where the tests of that name the limit or its constant.
ELSEWHERE = {
    "max_not_shown_answers": ("stores/test_slates.py", "MOST_SLATES"),
    "max_not_shown_items": ("test_not_shown.py", "MAX_NOT_SHOWN_ITEMS"),
    "max_stored_events": ("stores/test_users.py", "MOST_EVENTS"),
    "max_merged": ("api/test_users.py", "MOST_MERGED"),
    "max_rule_tags": ("test_rules.py", "MAX_RULE_TAGS"),
    "max_listed_tags": ("api/test_items.py", "MAX_LISTED_TAGS"),
    "max_genre_preferences": ("api/test_contract.py", "MAX_GENRE_PREFERENCES"),
    "max_violations": ("api/test_bounds.py", "MOST_VIOLATIONS"),
    "max_message_bytes": ("api/test_contract.py", "max_message_bytes"),
    "max_answer_bytes": ("test_catalogue.py", "MAX_ANSWER_BYTES"),
    "max_page_bytes": ("api/test_contract.py", "MAX_PAGE_BYTES"),
}


def test_every_limit_has_a_test() -> None:
    assert ASKED.keys() | ELSEWHERE.keys() == rules.LIMITS.keys()
    assert not ASKED.keys() & ELSEWHERE.keys()
    for limit, (file, names) in ELSEWHERE.items():
        text = (Path(__file__).parents[1] / file).read_text(encoding="utf-8")
        # Of this file only what is below this test, which names each.
        text = text.rpartition("def test_every_limit_has_a_test")[2]
        assert re.search(rf"\b{names}\b", text), f"{file} does not name {names}, the constant of {limit}"


@pytest.mark.parametrize("limit", ASKED)
def test_as_much_as_the_limit_is_accepted_and_no_more(stub: RecommenderStub, limit: str) -> None:
    rpc, request = ASKED[limit]
    getattr(stub, rpc)(request(rules.LIMITS[limit]), timeout=30)
    with pytest.raises(grpc.RpcError) as failure:
        getattr(stub, rpc)(request(rules.LIMITS[limit] + 1), timeout=30)
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert len(violations(failure.value)) == 1


def test_pages_of_events_are_bounded_in_bytes(client: RecommenderClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the list and of the profile; and the longest events that are accepted fit into an answer."""
    monkeypatch.setattr("serve.api.pages.MAX_PAGE_BYTES", 2_000)
    events = [event(event_id=f"{at}" + "x" * 400, item_id="y" * 400, timestamp=1 + at) for at in range(9)]
    client.record_events(events)
    for ask, name in ((client.list_events, "events"), (client.get_user_profile, "watch_list")):
        found, token, pages = [], "", 0
        while pages == 0 or token:
            page = ask("u", 1_000, token)
            assert page.ByteSize() < 2_100
            found += [one.timestamp for one in getattr(page, name)]
            token, pages = page.next_page_token, pages + 1
        assert found == list(range(9, 0, -1))
        assert pages >= 3


def test_a_page_of_a_profile_goes_on_where_the_one_before_ended(client: RecommenderClient) -> None:
    """With positive events alone, however many others lie between them."""
    kinds = ["click", "dislike", "skip"] * 7
    client.record_events(event(event_id=f"{at}", type=kind, timestamp=1 + at // 2) for at, kind in enumerate(kinds))
    first = client.get_user_profile("u", 3)
    client.record_events([event(event_id="late", timestamp=1), event(event_id="new", timestamp=99)])
    client.delete_events("u", ["9"])
    rest, token = [], first.next_page_token
    while token:
        page = client.get_user_profile("u", 2, token)
        rest += [one.timestamp for one in page.watch_list]
        token = page.next_page_token
        assert page.event_count == 8
    assert [one.timestamp for one in first.watch_list] == [10, 8, 7]
    # Those of the places 9 (deleted), 6, 3 and 0, and the late one.
    assert rest == [4, 2, 1, 1]


def test_a_profile_has_the_first_genres(client: RecommenderClient, monkeypatch: pytest.MonkeyPatch) -> None:
    client.record_events([event()])
    everything = client.get_user_profile("u").genre_preferences
    assert len(everything) >= 2
    monkeypatch.setattr("serve.api.codec.MAX_GENRE_PREFERENCES", 1)
    assert list(client.get_user_profile("u").genre_preferences) == [everything[0]]


def test_a_request_above_its_bytes_is_refused_by_grpc(stub: RecommenderStub) -> None:
    most = rules.LIMITS["max_message_bytes"]
    for size, code in ((most - 10, grpc.StatusCode.NOT_FOUND), (most + 1, grpc.StatusCode.RESOURCE_EXHAUSTED)):
        with pytest.raises(grpc.RpcError) as failure:
            stub.GetModelInfo(pb.GetModelInfoRequest(model_version="x" * size), timeout=30)
        assert failure.value.code() is code


def test_an_absurd_request_time_is_one_violation(stub: RecommenderStub) -> None:
    history = pb.History(events=[Event(item_id="1007", timestamp=5)])
    with pytest.raises(grpc.RpcError) as failure:
        stub.Recommend(pb.RecommendRequest(history=history, request_time=-1), timeout=10)
    (only,) = violations(failure.value)
    assert only.startswith("request_time: expected seconds since 1970-01-01T00:00Z in 0..")


def test_every_answer_with_items_is_bounded_in_bytes(
    client: RecommenderClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Titles of a model directory can be as long as they like."""
    monkeypatch.setattr("serve.api.codec.MAX_ANSWER_BYTES", 1_000)
    for call in (lambda: client.recommend(user_id="u", k=60), lambda: client.similar_items("1007", 59)):
        with pytest.raises(grpc.RpcError) as failure:
            call()
        assert violations(failure.value)[0].startswith("k: expected few enough items for an answer of 1000 bytes, came")
    (error,) = client.batch_recommend([recommend_request(user_id="u", k=60)])
    assert error.message.startswith("k: expected few enough items")
