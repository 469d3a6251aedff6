"""What a program learns of a failure: all violations at once, stable reasons, and when to try again."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

import serve.api.errors
from serve.api.errors import DETAILS_KEY, STATUS, UNEXPECTED, InvalidRequest, NoRight, NoToken, status_of
from serve.api.rules import MAX_MESSAGE_BYTES
from serve.client import (
    Boost,
    Connection,
    Event,
    Item,
    ItemFilter,
    Pin,
    RecommenderClient,
    Rules,
    Status,
    UserEvent,
    recommend_request,
)
from serve.client.connection import SERVICE_CONFIG
from serve.front.auth import Tokens
from serve.front.server import Listener, create_server
from serve.model.manifest import ArtifactError
from serve.model.recommender import Recommender
from serve.observability.metrics import Metrics
from serve.pb import recommender_pb2_grpc
from serve.pb.recommender_pb2 import (
    BatchRecommendRequest,
    History,
    RecommendRequest,
    RecommendResponse,
    SimilarItemsRequest,
    View,
)
from serve.pb.recommender_pb2_grpc import RecommenderStub
from serve.serving.errors import QueueFull
from serve.stores.base import EventStore, StoreError, TooManyToMerge
from tests.serve.api.test_validation import LONG, violations
from tests.serve.one_model import one_model

REASONS = re.compile(r"^\| `([A-Z_]+)` \| `([A-Z_]+)` \|", re.MULTILINE)


def error_of(kind: type[Exception]) -> Exception:
    """One of each kind of the table."""
    made = {
        InvalidRequest: lambda: InvalidRequest("k", "1", 2),
        QueueFull: lambda: QueueFull(256, 0.2),
        TooManyToMerge: lambda: TooManyToMerge(2, 1),
        NoRight: lambda: NoRight("admin"),
        NoToken: NoToken,
    }
    return made.get(kind, lambda: kind("it is so"))()


def details(status: serve.api.errors.Status) -> tuple[status_pb2.Status, error_details_pb2.ErrorInfo]:
    found, info = status_pb2.Status.FromString(dict(status.metadata)[DETAILS_KEY]), error_details_pb2.ErrorInfo()
    assert found.details[0].Unpack(info)
    return found, info


@pytest.mark.parametrize("kind", [*STATUS, RuntimeError], ids=lambda kind: kind.__name__)
def test_every_error_has_a_reason(kind: type[Exception]) -> None:
    status = status_of(error_of(kind))
    found, info = details(status)
    meaning = STATUS.get(kind, UNEXPECTED)
    assert (found.code, found.message) == (status.code.value[0], status.message)
    assert (status.code, info.reason, info.domain) == (meaning.code, meaning.reason, "jaxrec")
    assert ("log_id" in info.metadata) == (kind in {ArtifactError, StoreError, RuntimeError})
    assert info.metadata.get("log_id", "") in status.message


def test_reasons_are_different_and_in_the_docs() -> None:
    meanings = [*STATUS.values(), UNEXPECTED]
    assert len({one.reason for one in meanings}) == len(meanings)
    documented = REASONS.findall((Path(__file__).parents[3] / "docs/serving.md").read_text(encoding="utf-8"))
    assert sorted(documented) == sorted((one.code.name, one.reason) for one in meanings)


EVENTS = [
    Event(item_id="", rating=9, timestamp=0, type="x"),
    Event(item_id="1", timestamp=1),
    Event(item_id="1", timestamp=-1),
]
EVENT_FIELDS = [
    *(f"history.events[0].{name}" for name in ("item_id", "rating", "timestamp", "type")),
    "history.events[2].timestamp",
]
BAD_FILTER = ItemFilter(allow_item_ids=["", "1"], any_tags=["?"], all_tags=["!", "?"], minimum_score=float("nan"))
FILTER_FIELDS = [
    *("filter.allow_item_ids[0]", "filter.any_tags[0]", "filter.all_tags[0]", "filter.all_tags[1]"),
    "filter.minimum_score",
]


def test_all_violations_of_a_request_come_at_once(stub: RecommenderStub) -> None:
    request = RecommendRequest(
        k=-1,
        seen=9,
        view=9,
        new_item_slots=-1,
        request_time=-1,
        not_shown_within=-1,
        request_id=LONG,
        bucket_key=LONG,
        exclude_item_ids=[""],
        filter=BAD_FILTER,
        history=History(events=EVENTS),
    )
    with pytest.raises(grpc.RpcError) as failure:
        stub.Recommend(request, timeout=10)
    found = [one.split(":")[0] for one in violations(failure.value)]
    expected = ["k", "exclude_item_ids[0]", *FILTER_FIELDS, "seen", "new_item_slots", "request_time", *EVENT_FIELDS]
    # Sixteen at most: `bucket_key`, `view` and others are not reached.
    assert found == [*expected, "bucket_key"][:16]
    assert failure.value.details().startswith("k: expected 1 to 1000, or 0 for 10, came -1; exclude_item_ids[0]: ")
    few = RecommendRequest(user_id="u", k=-1, view=9, not_shown_within=-1, request_id=LONG, bucket_key="b")
    with pytest.raises(grpc.RpcError) as failure:
        stub.Recommend(few, timeout=10)
    found = [one.split(":")[0] for one in violations(failure.value)]
    assert found == ["k", "bucket_key", "view", "request_id", "not_shown_within"]


def fields_of(stub: RecommenderStub, request: RecommendRequest) -> list[str]:
    with pytest.raises(grpc.RpcError) as failure:
        stub.Recommend(request, timeout=10)
    return [one.split(", came")[0] for one in violations(failure.value)]


def test_no_violation_is_a_consequence_of_another(stub: RecommenderStub) -> None:
    k = "k: expected 1 to 1000, or 0 for 10"
    assert fields_of(stub, RecommendRequest(user_id="u", k=2_000, new_item_slots=15)) == [k]
    assert fields_of(stub, RecommendRequest(user_id="u", k=2_000, new_item_slots=1_001)) == [
        k,
        "new_item_slots: expected 0 to k",
    ]
    assert fields_of(stub, RecommendRequest(not_shown_within=5)) == ["user_id: expected a user, or a history"]
    pin = Rules(pins=[Pin(item_id="1007", position=30)])
    assert fields_of(stub, RecommendRequest(user_id="u", k=2_000, rules=pin)) == [k]


def test_all_violations_of_rules_come_at_once(stub: RecommenderStub) -> None:
    bad = Rules(
        boosts=[Boost(item_id="", factor=-1), Boost(tag="?", factor=2), Boost(factor=2)],
        diversity=2,
        max_per_tag=-1,
        pins=[
            Pin(item_id="no such item", position=0),
            Pin(item_id="1007", position=3),
            Pin(item_id="1007", position=3),
        ],
    )
    request = RecommendRequest(user_id="u", k=5, rules=bad, new_item_slots=1)
    assert [one.split(":")[0].removeprefix("rules.") for one in fields_of(stub, request)] == [
        *("boosts[0].item_id", "boosts[0].factor", "boosts[1].tag", "boosts[2].subject", "diversity", "max_per_tag"),
        *("pins[0].item_id", "pins[0].position", "pins[2].position", "pins[2].item_id", "new_item_slots"),
    ]
    versions = RecommendRequest(user_id="u", bucket_key=LONG, model_version="")
    assert [one.split(":")[0] for one in fields_of(stub, versions)] == ["bucket_key", "bucket_key"]


def test_all_violations_of_other_requests_come_at_once(client: RecommenderClient, stub: RecommenderStub) -> None:
    bad = UserEvent(event_id="", user_id="", item_id="", rating=0, timestamp=-1, type="?", value=-1)
    fields = ["event_id", "user_id", "item_id", "rating", "timestamp", "type", "value"]
    with pytest.raises(grpc.RpcError) as failure:
        client.record_events([bad, UserEvent(event_id="1", user_id="u", item_id="1", timestamp=1), bad])
    assert [one.split(":")[0] for one in violations(failure.value)] == [
        f"events[{at}].{name}" for at in (0, 2) for name in fields
    ]
    item = Item(item_id="a ", title="\0", tags=["", "b "], available_from=-1, available_until=2**62, metadata={"": ""})
    with pytest.raises(grpc.RpcError) as failure:
        client.upsert_items([item])
    assert [one.split(":")[0] for one in violations(failure.value)] == [
        f"items[0].{name}"
        for name in ("item_id", "title", "tags[0]", "tags[1]", "available_from", "available_until", "metadata")
    ]
    with pytest.raises(grpc.RpcError) as failure:
        stub.SimilarItems(SimilarItemsRequest(k=-1, view=7, bucket_key=LONG, filter=BAD_FILTER), timeout=10)
    found = [one.split(":")[0] for one in violations(failure.value)]
    assert found == ["item_id", "k", *FILTER_FIELDS, "bucket_key", "view"]
    for call in (client.list_events, client.get_user_profile):
        with pytest.raises(grpc.RpcError) as failure:
            call("", -1, "?")
        assert [one.split(":")[0] for one in violations(failure.value)] == ["user_id", "page_size", "page_token"]


@pytest.mark.parametrize("text", ["\U0001f600" * 100, "\x01" * 100, "ü" * 100], ids=["4 bytes", "controls", "2 bytes"])
def test_the_details_of_many_violations_fit_into_the_metadata(client: RecommenderClient, text: str) -> None:
    """Clients take 8 KiB of it, in which a byte of the message can take three and three of the details four."""
    with pytest.raises(grpc.RpcError) as failure:
        client.recommend(user_id="u", filter=ItemFilter(any_tags=[f"{text}{at}" for at in range(100)]))
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert len(failure.value.details().encode()) <= 500
    assert failure.value.details().endswith("...")
    found = violations(failure.value)
    assert 2 <= len(found) <= 16
    assert all(one.startswith(f"filter.any_tags[{at}]: expected one of ") for at, one in enumerate(found))


def test_one_bad_request_of_a_batch_does_not_fail_the_others(
    client: RecommenderClient, stub: RecommenderStub, store: EventStore
) -> None:
    """Each fails as it does alone, with the same details, and only what was answered is logged."""
    good = [recommend_request(user_id="u", k=3), recommend_request(history=[], k=2)]
    bad = [
        RecommendRequest(user_id="u", k=-1, seen=9),
        RecommendRequest(),
        RecommendRequest(user_id="u", model_version="x" * 1_000),
        RecommendRequest(history=History(events=EVENTS)),
    ]
    found = client.batch_recommend([good[0], *bad, good[1]])
    store.flush()
    logged = {one.recommendation_id for part in store.all_slates() for one in part}
    first, last = found[0], found[-1]
    for answer, length in ((first, 3), (last, 2)):
        assert isinstance(answer, RecommendResponse)
        assert len(answer.recommendations) == length
    assert logged == {first.recommendation_id, last.recommendation_id}
    for request, error in zip(bad, found[1:-1], strict=True):
        assert isinstance(error, Status)
        with pytest.raises(grpc.RpcError) as failure:
            stub.Recommend(request, timeout=10)
        alone = rpc_status.from_call(failure.value)
        assert alone == status_pb2.Status.FromString(error.SerializeToString())
        assert alone.code == failure.value.code().value[0]


def test_a_request_id_comes_once_for_a_user_in_a_batch(client: RecommenderClient) -> None:
    asked = [recommend_request(user_id=user, k=1, request_id="a") for user in "uvu"]
    first, second, third = client.batch_recommend(asked)
    assert isinstance(first, RecommendResponse)
    assert isinstance(second, RecommendResponse)
    assert isinstance(third, Status)
    assert third.message == "request_id: expected each once for a user, came that of requests[0]"


def test_a_defect_of_one_answer_does_not_fail_the_others(
    model: Recommender, store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = one_model(model, store)
    explain = Recommender.explain
    monkeypatch.setattr(
        Recommender, "explain", lambda self, query, items: 1 / 0 if query.k == 2 else explain(self, query, items)
    )
    metrics = Metrics()
    server = create_server(models, store, "127.0.0.1:0", metrics=metrics)
    server.start()
    with RecommenderClient(f"127.0.0.1:{server.port}") as client:
        history = [Event(item_id="1007", timestamp=1)]
        asked = [recommend_request(history=history, k=k, explain=True) for k in (1, 2, 3)]
        first, second, third = client.batch_recommend(asked)
    server.drain()
    assert [len(one.recommendations) for one in (first, third)] == [1, 3]
    assert isinstance(second, Status)
    assert re.fullmatch("internal error, logged as [0-9a-f]{32}", second.message)
    assert metrics.registry.get_sample_value("jaxrec_batch_failures_total", {"code": "INTERNAL"}) == 1


def test_what_concerns_the_server_fails_the_whole_batch(
    client: RecommenderClient, store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> Any:
        raise StoreError("no disk")

    monkeypatch.setattr(store, "history", broken)
    asked = [
        recommend_request(history=[], k=1),
        recommend_request(user_id="u", history=[Event(item_id="1007", timestamp=1)]),
    ]
    with pytest.raises(grpc.RpcError) as failure:
        client.batch_recommend(asked)
    assert failure.value.code() is grpc.StatusCode.UNAVAILABLE


class Overloaded(recommender_pb2_grpc.RecommenderServicer):
    """Says so to the first calls, as the server does, and when to come again."""

    def __init__(self, times: int, retry_after_s: float) -> None:
        self.left, self.tries, self._after_s = times, 0, retry_after_s

    def Recommend(self, request: RecommendRequest, context: grpc.ServicerContext) -> RecommendResponse:
        self.tries += 1
        self.left -= 1
        if self.left >= 0:
            status = status_of(QueueFull(256, self._after_s))
            context.set_trailing_metadata(status.metadata)
            context.abort(status.code, status.message)
        return RecommendResponse(policy="answered")


@pytest.fixture
def overloaded(request: pytest.FixtureRequest) -> Iterator[tuple[Overloaded, str]]:
    servicer = Overloaded(*request.param)
    server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)])
    recommender_pb2_grpc.add_RecommenderServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"127.0.0.1:{port}"
    server.stop(0).wait()


@pytest.mark.parametrize("overloaded", [(3, 0.02)], indirect=True)
def test_clients_come_again_when_an_overloaded_server_says(overloaded: tuple[Overloaded, str]) -> None:
    servicer, address = overloaded
    with RecommenderClient(address) as client:
        assert client.recommend(user_id="u").policy == "answered"
    assert servicer.tries == 4


@pytest.mark.parametrize("overloaded", [(2, 0.02)], indirect=True)
def test_clients_repeat_the_largest_requests_too(overloaded: tuple[Overloaded, str]) -> None:
    """gRPC keeps 256 KiB for that by default."""
    servicer, address = overloaded
    request = RecommendRequest(user_id="u", exclude_item_ids=["x" * 500] * 10_000)
    request.request_id = "x" * (MAX_MESSAGE_BYTES - request.ByteSize() - 6)
    assert MAX_MESSAGE_BYTES - 2 <= request.ByteSize() <= MAX_MESSAGE_BYTES
    with Connection(address, timeout_s=30.0).channel() as channel:
        answer = RecommenderStub(channel).Recommend(request, timeout=30, metadata=[("authorization", "x" * 4_000)])
    assert (answer.policy, servicer.tries) == ("answered", 3)


@pytest.mark.parametrize("overloaded", [(1, 60.0)], indirect=True)
def test_clients_do_not_come_before_that(overloaded: tuple[Overloaded, str]) -> None:
    """By itself gRPC would try again within a second."""
    servicer, address = overloaded
    with RecommenderClient(Connection(address, timeout_s=2.0)) as client, pytest.raises(grpc.RpcError) as failure:
        client.recommend(user_id="u")
    assert failure.value.code() in {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert servicer.tries == 1


def test_the_hint_is_in_the_details_and_in_the_metadata() -> None:
    """The same in both, and another time for each call: else all would come again at once."""
    hints = []
    for _ in range(200):
        status = status_of(QueueFull(256, 0.25))
        found, _ = details(status)
        retry = error_details_pb2.RetryInfo()
        assert found.details[1].Unpack(retry)
        delay_ms = retry.retry_delay.ToTimedelta().total_seconds() * 1e3
        hints.append(int(dict(status.metadata)["grpc-retry-pushback-ms"]))
        assert hints[-1] == pytest.approx(delay_ms, abs=0.51)
    assert 125 <= min(hints) < 200
    assert 300 < max(hints) <= 375
    assert dict(status_of(QueueFull(256, 0.0001)).metadata)["grpc-retry-pushback-ms"] == "1"


def test_the_service_config_of_the_docs_is_that_of_the_clients() -> None:
    text = (Path(__file__).parents[3] / "docs/serving.md").read_text(encoding="utf-8")
    (documented,) = re.findall(r"```json\n(.*?methodConfig.*?)```", text, re.DOTALL)
    assert json.loads(documented) == json.loads(SERVICE_CONFIG)


def test_who_is_turned_away_gets_a_reason(model: Recommender, store: EventStore) -> None:
    listener = Listener("127.0.0.1:0", tokens=Tokens({"a-token-of-20-letters": ["read"]}))
    server = create_server(one_model(model, store), store, listener)
    reasons = []

    def call(token: str | None, ask: str) -> None:
        with (
            RecommenderClient(Connection(f"127.0.0.1:{server.port}", token=token)) as client,
            pytest.raises(grpc.RpcError) as failure,
        ):
            getattr(client, ask)("u")
        status, info = rpc_status.from_call(failure.value), error_details_pb2.ErrorInfo()
        assert status is not None
        assert status.details[0].Unpack(info)
        reasons.append((failure.value.code().name, info.reason))

    server.start()
    call(None, "list_events")
    call("another-token-of-letters", "list_events")
    call("a-token-of-20-letters", "delete_user")
    server.drain()
    expected = [*[("UNAUTHENTICATED", "TOKEN_REQUIRED")] * 2, ("PERMISSION_DENIED", "RIGHT_REQUIRED")]
    assert reasons == expected


@pytest.mark.parametrize("view", [View.VIEW_IDS, View.VIEW_UNSPECIFIED, View.VIEW_BASIC, View.VIEW_FULL])
def test_a_view_says_how_much_of_an_item_comes(
    client: RecommenderClient, stub: RecommenderStub, model: Recommender, view: View.ValueType
) -> None:
    request = RecommendRequest(history=History(events=[Event(item_id="1007", timestamp=1)]), k=60, view=view)
    (entry,) = stub.BatchRecommend(BatchRecommendRequest(requests=[request]), timeout=10).results
    similar = stub.SimilarItems(SimilarItemsRequest(item_id="1007", k=60, view=view), timeout=10)
    alone = stub.Recommend(request, timeout=10)
    for items in (alone.recommendations, entry.response.recommendations, similar.items):
        assert len(items) == 59
        for one in items:
            index = model.catalog.index[one.item_id]
            texts: tuple[str, list[str]] = ("", [])
            if view != View.VIEW_IDS:
                texts = (model.catalog.titles[index], list(model.catalog.genres[index]))
            assert (one.title, list(one.genres)) == texts
    scores = {one.item_id: one.score for one in client.recommend(history=request.history.events, k=60).recommendations}
    assert {one.item_id: one.score for one in alone.recommendations} == pytest.approx(scores, abs=1e-4)


def test_ids_alone_are_a_smaller_answer(client: RecommenderClient) -> None:
    sizes: list[int] = []
    for view in ("ids", "basic"):
        answer: Message = client.recommend(user_id="u", k=60, view=view)  # type: ignore[arg-type]
        sizes.append(answer.ByteSize())
    assert sizes[0] < 0.6 * sizes[1]
