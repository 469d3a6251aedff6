"""What happens around every call: request ids, statuses with details, metrics, logs and traces."""

import asyncio
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from serve.api.errors import status_of
from serve.client import Event, RecommenderClient, UserEvent
from serve.front.calls import REQUEST_ID_KEY, Calls
from serve.front.gate import Gate
from serve.front.server import create_server
from serve.model.recommender import Recommender
from serve.observability.logs import JsonFormatter
from serve.observability.metrics import COVERAGE_WINDOW_S, Coverage, Metrics
from serve.observability.tracing import Tracer, tracer_of_the_process
from serve.pb.recommender_pb2 import DeleteUserRequest, GetModelInfoRequest, RecommendRequest
from serve.pb.recommender_pb2_grpc import RecommenderStub
from serve.serving.errors import Cancelled, Expired, QueueFull
from serve.stores.base import EventStore, SpilledState, StoreError
from tests.serve.front.http2 import HEADERS, RawClient
from tests.serve.one_model import one_model

TIMEOUT_S = 30
METHOD = "/jaxrec.v1.Recommender/"


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def address(model: Recommender, store: EventStore, metrics: Metrics) -> Iterator[str]:
    server = create_server(one_model(model, store, metrics), store, "127.0.0.1:0", metrics=metrics, log_calls=True)
    server.start()
    yield f"127.0.0.1:{server.port}"
    server.drain()


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What a server writes to its log, as it writes it."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("serve")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield stream
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


def lines(log: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.getvalue().splitlines()]


def request_id(call: Any) -> str:
    return str(dict(call.trailing_metadata())["x-request-id"])


def test_a_request_id_comes_back_and_is_in_the_log(stub: RecommenderStub, log: io.StringIO) -> None:
    _, call = stub.GetModelInfo.with_call(
        GetModelInfoRequest(), timeout=TIMEOUT_S, metadata=[("x-request-id", "mine"), ("x-request-id", "second")]
    )
    assert request_id(call) == "mine"
    with pytest.raises(grpc.RpcError) as failure:
        stub.Recommend(RecommendRequest(), timeout=TIMEOUT_S, metadata=[("x-request-id", "bad one")])
    assert request_id(failure.value) == "bad one"
    first, second = lines(log)
    assert (first["request_id"], first["method"], first["code"]) == ("mine", f"{METHOD}GetModelInfo", "OK")
    assert (second["request_id"], second["code"]) == ("bad one", "INVALID_ARGUMENT")
    assert 0 < first["seconds"] < TIMEOUT_S


@pytest.mark.parametrize("given", [[], [("x-request-id", "")], [("x-request-id", "x" * 129)]])
def test_without_one_each_call_gets_its_own(stub: RecommenderStub, given: list[tuple[str, str]]) -> None:
    ids = set()
    for _ in range(3):
        _, call = stub.GetModelInfo.with_call(GetModelInfoRequest(), timeout=TIMEOUT_S, metadata=given)
        ids.add(request_id(call))
    assert len(ids) == 3
    assert all(0 < len(one) < 40 for one in ids)


@pytest.mark.parametrize("given", [b"\x01", b"a\tb", b"caf\xc3\xa9", b"\xff\xfe"])
def test_a_request_id_that_cannot_go_back_fails_no_call(address: str, given: bytes) -> None:
    with RawClient(address) as client:
        client.call(f"{METHOD}GetModelInfo", b"", ((REQUEST_ID_KEY, given),))
        frames = client.frames()
        trailers = b""
        while not trailers.count(b"grpc-status"):
            kind, _, _, content = next(frames)
            trailers += content if kind == HEADERS else b""
    assert b"grpc-status\x010" in trailers
    assert REQUEST_ID_KEY.encode() in trailers


def test_a_failure_of_the_server_is_logged_with_the_request_and_its_cause(
    stub: RecommenderStub, store: EventStore, log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise StoreError("/secret/events.sqlite: disk I/O error")

    monkeypatch.setattr(store, "delete_user", broken)
    with pytest.raises(grpc.RpcError) as failure:
        stub.DeleteUser(DeleteUserRequest(user_id="u"), timeout=TIMEOUT_S, metadata=[("x-request-id", "7")])
    assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "secret" not in failure.value.details()
    error, call = lines(log)
    assert (error["level"], error["request_id"]) == ("ERROR", "7")
    assert "/secret/events.sqlite: disk I/O error" in error["exception"]
    assert error["message"].split("[")[1].rstrip("]") in failure.value.details()
    assert call["code"] == "UNAVAILABLE"


def test_overload_says_when_to_come_again() -> None:
    status = status_of(QueueFull(256, 0.25))
    assert status.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    details = error_details_pb2.RetryInfo()
    found = rpc_status.status_pb2.Status.FromString(dict(status.metadata)["grpc-status-details-bin"])
    assert found.details[1].Unpack(details)
    assert 125 <= details.retry_delay.ToMilliseconds() <= 375
    assert status_of(Expired("late")).code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert status_of(Cancelled("gone")).code is grpc.StatusCode.CANCELLED


def test_metrics_count_calls_answers_events_and_feedback(
    client: RecommenderClient, model: Recommender, metrics: Metrics
) -> None:
    ids = model.catalog.item_ids
    known, unknown = Event(item_id=ids[3], timestamp=5), Event(item_id="no such film", timestamp=6)
    metrics.serving([(model.info.model_version, model.info.policy, 1_000.0, len(model.catalog))])
    answer = client.recommend(history=[known, unknown, known], k=6)
    client.recommend(history=[], k=6)
    shown = answer.recommendation_id
    client.record_events(
        [
            UserEvent(event_id="1", user_id="u", item_id=ids[3], recommendation_id=shown, timestamp=7),
            UserEvent(event_id="2", user_id="u", item_id="no such film", timestamp=8),
            UserEvent(event_id="1", user_id="u", item_id=ids[3], timestamp=9),
        ]
    )
    with pytest.raises(grpc.RpcError):
        client.recommend(user_id="")

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(f"jaxrec_{name}", labels)

    assert value("rpc_seconds_count", method=f"{METHOD}Recommend", code="OK") == 2
    assert value("rpc_seconds_count", method=f"{METHOD}Recommend", code="INVALID_ARGUMENT") == 1
    assert value("answers_total", policy="reinforce") == 1
    assert value("answers_total", policy="popularity") == 1
    assert value("events_total", known="true") == 2 + 1
    assert value("events_total", known="false") == 1 + 1
    assert value("recorded_events_total", result="recorded") == 2
    assert value("recorded_events_total", result="duplicate") == 1
    assert value("feedback_events_total") == 1
    assert value("batch_size_count") == 2
    assert value("inference_seconds_count") == 2
    assert value("queue_seconds_count") == 2
    popular = set(model.catalog.by_popularity[:6].tolist())
    seen = popular | {model.catalog.index[one.item_id] for one in answer.recommendations}
    assert value("catalogue_coverage_ratio") == pytest.approx(len(seen) / len(model.catalog))
    assert value("model_info", model_version=model.info.model_version, policy="reinforce") == 1
    age = value("model_age_seconds")
    assert age is not None
    assert age > 1_000_000_000


def test_coverage_forgets_what_was_recommended_long_ago() -> None:
    now = [0.0]
    coverage = Coverage(clock=lambda: now[0])
    coverage.reset(10)
    coverage.mark(np.array([1, 2], np.int32))
    coverage.mark(np.array([2, 11, 400], np.int32))
    assert coverage.ratio() == pytest.approx(2 / 10)
    now[0] = COVERAGE_WINDOW_S
    coverage.mark(np.array([3], np.int32))
    assert coverage.ratio() == pytest.approx(3 / 10)
    now[0] = 2 * COVERAGE_WINDOW_S
    assert coverage.ratio() == pytest.approx(1 / 10)
    now[0] = 10 * COVERAGE_WINDOW_S
    assert coverage.ratio() == 0


def test_a_process_that_did_not_set_up_spans_is_not_made_to() -> None:
    program = """
import sys
import opentelemetry.trace
from serve.observability.tracing import export_spans, tracer_of_the_process
print(tracer_of_the_process(), export_spans(), "opentelemetry.sdk.trace" in sys.modules)
"""
    named = {**os.environ, "OTEL_PYTHON_TRACER_PROVIDER": "sdk_tracer_provider"}
    assert subprocess.check_output([sys.executable, "-c", program], env=named, text=True) == "None None False\n"


def test_a_span_for_every_call_continues_the_clients_trace(model: Recommender, store: EventStore) -> None:
    assert tracer_of_the_process() is None, "without a set-up there are no spans"
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    server = create_server(one_model(model, store), store, "127.0.0.1:0", tracer=Tracer(provider))
    server.start()
    parent = ("traceparent", f"00-{'ab' * 16}-{'cd' * 8}-01")
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = RecommenderStub(channel)
        stub.GetModelInfo(GetModelInfoRequest(), timeout=TIMEOUT_S, metadata=[parent])
        with pytest.raises(grpc.RpcError):
            stub.Recommend(RecommendRequest(), timeout=TIMEOUT_S)
    server.drain()
    good, bad = exporter.get_finished_spans()
    assert good.name == "jaxrec.v1.Recommender/GetModelInfo"
    assert good.kind is SpanKind.SERVER
    assert good.context is not None
    assert f"{good.context.trace_id:x}" == "ab" * 16
    assert good.attributes is not None
    assert good.attributes["rpc.method"] == "GetModelInfo"
    assert bad.status.status_code is StatusCode.ERROR
    assert bad.attributes is not None
    assert bad.attributes["rpc.grpc.status_code"] == grpc.StatusCode.INVALID_ARGUMENT.value[0]


def test_what_the_store_gave_up_is_counted(
    address: str, metrics: Metrics, store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert metrics.registry.get_sample_value("jaxrec_dropped_log_entries") == 0
    monkeypatch.setattr("serve.stores.deferred.LIMIT", 1)
    store.save_states([SpilledState("u", "v", 1, b"") for _ in range(4)])
    assert metrics.registry.get_sample_value("jaxrec_dropped_log_entries") == 3


def test_a_client_that_hangs_up_before_its_status_is_sent_is_no_failure_of_the_server(metrics: Metrics) -> None:
    """gRPC raises InternalError then, and would log it as an error of the handler; a cancelled call it does not."""

    class HungUp:
        def invocation_metadata(self) -> tuple[()]:
            return ()

        def time_remaining(self) -> float:
            return 1.0

        async def abort(self, *status: Any) -> None:
            raise grpc.aio.InternalError

    async def refuse(call: Any) -> bytes:
        raise QueueFull(1, 1.0)

    calls = Calls([], Gate(), metrics, None, None, False)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(calls._around("/a/b", HungUp(), refuse))
