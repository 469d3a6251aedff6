"""A caller without a token that reaches the port can open calls, and keeps no other from anything."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from serve.client import Connection, RecommenderClient, UserEvent
from serve.front.auth import parse_tokens
from serve.front.server import Listener, create_server
from serve.model.recommender import Recommender
from serve.observability.metrics import Metrics
from serve.pb.recommender_pb2 import RecordEventsRequest
from serve.pb.recommender_pb2_grpc import RecommenderStub
from serve.stores.base import EventStore
from tests.serve.front.proxy import FRONTS, Sockets, running_proxy
from tests.serve.one_model import one_model

PATIENCE_S = 30.0
TOKEN = "a-token-of-the-test"
METHODS = (
    "/jaxrec.v1.Recommender/Recommend",
    "/jaxrec.v1.Recommender/RecordEvents",
    "/grpc.health.v1.Health/Check",
    "/inference.GRPCInferenceService/ModelInfer",
    "/no.such.Service/Method",
)


@contextmanager
def half_open(channel: grpc.Channel, each: int) -> Iterator[None]:
    """Calls whose messages never come, and streams on which nothing happens."""
    never = threading.Event()

    def nothing() -> Iterator[bytes]:
        never.wait()
        yield from ()

    calls = [channel.stream_unary(method).future(nothing()) for method in METHODS for _ in range(each)]
    calls += [channel.stream_stream("/grpc.health.v1.Health/Watch")(nothing()) for _ in range(each)]
    reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
    calls += [reflection.ServerReflectionInfo(nothing()) for _ in range(each)]
    try:
        yield
    finally:
        for call in calls:
            call.cancel()
        never.set()


@pytest.mark.parametrize("with_token", [True, False])
@pytest.mark.parametrize("front", FRONTS)
def test_calls_that_never_continue_keep_no_other_waiting(
    model: Recommender, store: EventStore, with_token: bool, front: str, tmp_path: Path
) -> None:
    tokens, sockets = parse_tokens(f"read,write {TOKEN}", "tokens") if with_token else None, Sockets.of(tmp_path)
    behind = front != "default"
    listener = Listener(sockets.default if behind else "127.0.0.1:0", tokens=tokens, allow_insecure=True)
    server = create_server(one_model(model, store), store, listener, fast=sockets.fast if behind else None)
    server.start()
    address = sockets.proxy if behind else f"127.0.0.1:{server.port}"
    connection = Connection(address, PATIENCE_S, token=TOKEN if with_token else None)
    options = [("grpc.use_local_subchannel_pool", 1)]
    with ExitStack() as stack:
        if behind:
            stack.enter_context(running_proxy(sockets))
        for _ in range(3):
            stranger = stack.enter_context(grpc.insecure_channel(connection.address, options))
            stack.enter_context(half_open(stranger, 12))
        client = stack.enter_context(RecommenderClient(connection))
        assert client.record_events([UserEvent(event_id="e", user_id="u", item_id="1007", timestamp=1)])
        assert len(client.recommend(user_id="u", k=3, explain=True).recommendations) == 3
        assert client.get_user_profile("u").event_count == 1
        channel = stack.enter_context(grpc.insecure_channel(connection.address, options))
        health = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest()
        assert health.Check(request, timeout=PATIENCE_S).status == health_pb2.HealthCheckResponse.SERVING
        watch = health.Watch(request, timeout=PATIENCE_S)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()
        asked = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")]),
            timeout=PATIENCE_S,
            metadata=connection.metadata,
        )
        assert next(asked).list_services_response.service
    server.drain()


def test_calls_turned_away_from_the_pool_are_counted_and_get_a_time_to_retry(
    model: Recommender, store: EventStore
) -> None:
    metrics = Metrics()
    server = create_server(
        one_model(model, store, metrics), store, "127.0.0.1:0", workers=1, max_calls=1, metrics=metrics
    )
    server.start()
    started, goes_on, record = threading.Event(), threading.Event(), store.record

    def slow_record(events):  # type: ignore[no-untyped-def]
        started.set()
        assert goes_on.wait(PATIENCE_S)
        return record(events)

    store.record = slow_record  # type: ignore[method-assign]
    request = RecordEventsRequest(events=[UserEvent(event_id="e", user_id="u", item_id="1007", timestamp=1)])
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = RecommenderStub(channel)
        first = stub.RecordEvents.future(request, timeout=PATIENCE_S)
        assert started.wait(PATIENCE_S)
        with pytest.raises(grpc.RpcError) as refused:
            stub.RecordEvents(request, timeout=PATIENCE_S)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        _, detail = rpc_status.from_call(refused.value).details
        assert detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR)
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        goes_on.set()
        assert first.result().recorded_count == 1
    labels = {"reason": "overload", "method": "/jaxrec.v1.Recommender/RecordEvents"}
    assert metrics.registry.get_sample_value("jaxrec_rejected_calls_total", labels) == 1
    server.drain()
