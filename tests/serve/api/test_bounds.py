"""What one call may cost: batches, lists of bad ids, profiles, and answers that are not sent."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import pytest

from serve.api import rules
from serve.api.errors import MOST_VIOLATIONS, InvalidRequest, Violation, Violations
from serve.api.recommender import RecommenderServicer
from serve.api.service import RecommenderService
from serve.client import Event, ItemFilter, RecommenderClient, Rules, Status, UserEvent, recommend_request
from serve.model.events import Event as StoredItem
from serve.model.recommender import Query, Recommender
from serve.observability.metrics import Metrics
from serve.pb import recommender_pb2 as pb
from serve.pb.recommender_pb2 import BatchRecommendRequest, RecommendRequest, RecommendResponse
from serve.pb.recommender_pb2_grpc import RecommenderStub
from serve.serving.errors import Cancelled, Expired
from serve.serving.loaded import AT_ONCE, LoadedModel
from serve.stores.base import EventStore
from serve.stores.base import UserEvent as StoredEvent
from tests.serve.api.test_validation import violations
from tests.serve.one_model import one_model
from tests.serve.stores.slates import slates_of

SMALLEST = -(2**31)


@pytest.mark.parametrize("fields", [{}, {"view": pb.VIEW_FULL}, {"rules": Rules(diversity=0.5)}], ids=str)
def test_a_bad_k_does_not_make_room_in_a_batch(stub: RecommenderStub, fields: dict[str, Any]) -> None:
    requests = [RecommendRequest(user_id="u", k=1_000, **fields)] * 255
    bad = RecommendRequest(user_id="u", k=SMALLEST, **fields)
    with pytest.raises(grpc.RpcError) as failure:
        stub.BatchRecommend(BatchRecommendRequest(requests=[*requests, bad]), timeout=10)
    came = "came 255000"
    found = violations(failure.value)
    assert len(found) == 1 + bool(fields)
    assert all(one.startswith("requests: expected at most") and one.endswith(came) for one in found)


def test_what_is_too_large_by_itself_fails_alone_in_a_batch(client: RecommenderClient) -> None:
    long = recommend_request(history=[Event(item_id="1007", timestamp=1)] * (rules.MAX_BATCH_EVENTS + 1))
    found = client.batch_recommend(
        [
            recommend_request(user_id="u", k=2),
            recommend_request(user_id="u", k=20_000, view="full", rules=Rules(diversity=0.5)),
            long,
        ]
    )
    assert isinstance(found[0], RecommendResponse)
    errors = [one.message for one in found[1:] if isinstance(one, Status)]
    assert errors == [
        "k: expected 1 to 1000, or 0 for 10, came 20000",
        "history.events: expected at most 10000 entries, came 100001",
    ]


BAD_LISTS: dict[str, Callable[[list[str]], tuple[str, Any]]] = {
    "exclude_item_ids": lambda ids: ("Recommend", RecommendRequest(user_id="u", exclude_item_ids=ids)),
    "filter.allow_item_ids": lambda ids: (
        "Recommend",
        RecommendRequest(user_id="u", filter=ItemFilter(allow_item_ids=ids)),
    ),
    "event_ids": lambda ids: ("DeleteEvents", pb.DeleteEventsRequest(user_id="u", event_ids=ids[:1_000])),
    "item_ids": lambda ids: ("DeleteItems", pb.DeleteItemsRequest(item_ids=ids[:1_000])),
}


@pytest.mark.parametrize("field", BAD_LISTS)
def test_of_a_list_of_bad_ids_few_are_checked(
    stub: RecommenderStub, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    checked, check_id = list[str](), rules.check_id

    def counted(name: str, value: str, most: int = rules.MAX_ID_LENGTH) -> None:
        checked.append(name)
        check_id(name, value, most)

    monkeypatch.setattr(rules, "check_id", counted)
    rpc, request = BAD_LISTS[field](["a\0"] * 10_000)
    with pytest.raises(grpc.RpcError) as failure:
        getattr(stub, rpc)(request, timeout=10)
    assert [one.split(":")[0] for one in violations(failure.value)] == [f"{field}[{at}]" for at in range(16)]
    assert len(checked) == 16


@pytest.mark.parametrize("bad", ["", "x" * 513, "a\0", " a", "a "])
def test_one_bad_id_among_many_is_found(bad: str) -> None:
    good = [f"{at}" for at in range(1_000)]
    rules.check_ids("ids", good)
    rules.check_ids("ids", [])
    with pytest.raises(InvalidRequest) as failure:
        rules.check_ids("ids", [*good, bad, *good])
    assert [one.field for one in failure.value.violations] == ["ids[1000]"]


def test_violations_keep_the_first_sixteen() -> None:
    found = Violations()

    def fail(count: int) -> None:
        raise InvalidRequest.of(Violation(f"{at}", "no") for at in range(count))

    assert not found.passes(fail, 10)
    assert found.check(fail, 10) is None
    found.add("k", "1", 2)
    assert (len(found), found.is_full) == (MOST_VIOLATIONS, True)
    with pytest.raises(InvalidRequest) as failure:
        found.raise_any()
    assert [one.field for one in failure.value.violations] == [f"{at}" for at in (*range(10), *range(6))]


def test_lists_that_are_too_long_are_not_compared(stub: RecommenderStub) -> None:
    ids, tags = ["1"] * 10_001, ["Drama"] * 101
    asked = ItemFilter(allow_item_ids=ids, any_tags=tags, all_tags=tags, none_tags=tags)
    with pytest.raises(grpc.RpcError) as failure:
        stub.Recommend(RecommendRequest(user_id="u", exclude_item_ids=ids, filter=asked), timeout=10)
    assert [one.split(",")[0] for one in violations(failure.value)] == [
        "exclude_item_ids: expected at most 10000 entries",
        "filter.allow_item_ids: expected at most 10000 entries",
        *(f"filter.{name}: expected at most 100 entries" for name in ("any_tags", "all_tags", "none_tags")),
    ]


class Leaving:
    """A call whose client waits for so many looks at it; what a servicer asks of the context of a real one."""

    def __init__(self, looks: int, expires: bool) -> None:
        self.looks, self._left, self._expires = 0, looks, expires

    def is_active(self) -> bool:
        self.looks += 1
        return self._expires or self.looks <= self._left

    def time_remaining(self) -> float:
        return 0.0 if self.looks > self._left else 10.0


@pytest.mark.parametrize("expires", [False, True])
def test_a_batch_is_not_read_on_for_a_client_that_has_left(
    model: Recommender, store: EventStore, expires: bool
) -> None:
    servicer = RecommenderServicer(RecommenderService(one_model(model, store), store, Metrics()))
    context = Leaving(3, expires)
    request = BatchRecommendRequest(requests=[RecommendRequest(user_id="u", exclude_item_ids=["a\0"])] * 256)
    with pytest.raises(Expired if expires else Cancelled):
        servicer.BatchRecommend(request, context)
    assert context.looks == 4


def test_stored_histories_of_a_batch_are_read_in_portions_and_once_for_a_user(
    model: Recommender, store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, reads, portions = one_model(model, store), list[object](), list[Sequence[Query]]()
    history, answer = store.history, LoadedModel.recommend_all

    def reading(user_id: str, until: int | None = None) -> Any:
        reads.append((user_id, until))
        return history(user_id, until)

    def answering(self: LoadedModel, queries: Sequence[Query], *rest: Any) -> Any:
        portions.append(queries)
        return answer(self, queries, *rest)

    monkeypatch.setattr(store, "history", reading)
    monkeypatch.setattr(LoadedModel, "recommend_all", answering)
    ids = model.catalog.item_ids
    users = [f"{at}" for at in range(40)]
    client_events = [Event(item_id=ids[9], timestamp=50)]
    store.record([StoredEvent(user, user, StoredItem(ids[3], None, 10)) for user in users])
    servicer = RecommenderServicer(RecommenderService(models, store, Metrics()))
    requests = [recommend_request(user_id=user, history=client_events, k=3) for user in [*users, *["0"] * 8]]
    response = servicer.BatchRecommend(BatchRecommendRequest(requests=requests), Leaving(10_000, False))
    assert [len(one) for one in portions] == [AT_ONCE, AT_ONCE, 16]
    # Of user 0 once at the beginning, and once more when others have taken its place.
    assert reads == [(user, None) for user in [*users, "0"]]
    alone = servicer.Recommend(requests[1], Leaving(10_000, False))
    assert response.results[1].response.recommendations == alone.recommendations


def test_an_event_that_is_recorded_during_a_batch_counts_once(
    client: RecommenderClient, store: EventStore, model: Recommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the entries of a batch for the same user, whose history is read once as long as it is the same."""
    ids, recorded_ids, calls = model.catalog.item_ids, store.recorded_ids, itertools.count()
    client.record_events([UserEvent(event_id="1", user_id="u", item_id=ids[3], timestamp=10)])

    def recording(event_ids: Sequence[str]) -> set[str]:
        if next(calls) == 1:
            client.record_events([UserEvent(event_id="2", user_id="u", item_id=ids[9], timestamp=20)])
        return recorded_ids(event_ids)

    monkeypatch.setattr(store, "recorded_ids", recording)
    sent = [Event(item_id=ids[9], timestamp=20, event_id="2"), Event(item_id=ids[12], timestamp=30)]
    first, second = client.batch_recommend([recommend_request(user_id="u", history=sent, k=60)] * 2)
    assert isinstance(first, RecommendResponse)
    assert isinstance(second, RecommendResponse)
    scores = [{one.item_id: one.score for one in answer.recommendations} for answer in (first, second)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)


def test_a_profile_reads_the_history_alone_and_once(
    client: RecommenderClient, store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever else is recorded of the user: the list and `event_count` are of the newest events."""
    monkeypatch.setattr("serve.stores.sql.MOST_EVENTS", 5)
    kinds = ["click", *["skip"] * 30, *["click", "dislike"] * 6]
    client.record_events(
        UserEvent(event_id=f"{at}", user_id="u", item_id="1007", timestamp=1 + at, type=kind)
        for at, kind in enumerate(kinds)
    )
    positive = sum(one.weight > 0 for one in store.history("u"))
    assert positive == 2

    def not_used(*_: object) -> Any:
        raise AssertionError("the list of all events was read")

    monkeypatch.setattr(store, "list_events", not_used)
    found, token, genres = list[int](), "", list[int]()
    while not genres or token:
        page = client.get_user_profile("u", 1, token)
        found += [one.timestamp for one in page.watch_list]
        genres.append(len(page.genre_preferences))
        token = page.next_page_token
        assert page.event_count == positive
    assert found == [1 + at for at in range(len(kinds) - 1, -1, -1) if kinds[at] == "click"][:positive]
    assert genres[0] >= 1
    assert set(genres[1:]) == {0}


def test_an_answer_that_is_too_long_is_not_logged(
    client: RecommenderClient, store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.api.codec.MAX_ANSWER_BYTES", 3_000)
    with pytest.raises(grpc.RpcError):
        client.recommend(user_id="u", k=60)
    failed, sent = client.batch_recommend([recommend_request(user_id="u", k=k) for k in (60, 2)])
    assert isinstance(failed, Status)
    assert isinstance(sent, RecommendResponse)
    # Each fits, and both together do not.
    with pytest.raises(grpc.RpcError) as failure:
        client.batch_recommend([recommend_request(user_id="u", k=40)] * 2)
    assert violations(failure.value)[0].startswith("requests: ")
    store.flush()
    assert [one.recommendation_id for one in slates_of(store, "u")] == [sent.recommendation_id]
