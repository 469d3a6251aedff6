"""The fast front alone and behind nginx: what it answers, whom it turns away, and how it ends."""

import logging
import resource
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from serve.addresses import AddressError, SecurityError
from serve.api.recommender import RecommenderServicer
from serve.client import Event, UserEvent, recommend_request
from serve.front import fast
from serve.front.auth import Tokens
from serve.front.fast import FastCall, check_fast_address
from serve.front.lifecycle import RecommenderServer
from serve.front.server import Listener, create_server
from serve.front.tls import Tls
from serve.model.recommender import Recommender
from serve.observability.logs import REQUEST_ID
from serve.observability.metrics import Metrics
from serve.observability.tracing import Tracer
from serve.pb.recommender_pb2 import GetModelInfoRequest, History, ItemFilter, RecommendRequest, RecordEventsRequest
from serve.pb.recommender_pb2_grpc import RecommenderStub
from serve.serving.batching import QUEUE_CAPACITY
from serve.stores.base import EventStore
from tests.serve.front.proxy import MISSING, Sockets
from tests.serve.one_model import one_model
from tests.serve.stores.slates import slates_of

PATIENCE_S = 30.0
METHOD = "/jaxrec.v1.Recommender/Recommend"
ASKED = RecommendRequest(user_id="u", k=3)
needs_native = pytest.mark.skipif("pygrpc-native" in str(MISSING), reason=f"not installed: {', '.join(MISSING)}")
needs_both = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


@contextmanager
def serving(model: Recommender, store: EventStore, folder: Path, **options: Any) -> Iterator[RecommenderServer]:
    sockets = Sockets.of(folder)
    metrics = options.get("metrics")
    tokens = options.pop("tokens", None)
    listener = Listener(sockets.default, tokens=tokens)
    server = create_server(one_model(model, store, metrics), store, listener, fast=sockets.fast, **options)
    server.start()
    try:
        yield server
    finally:
        server.drain(1.0)


@contextmanager
def stub_at(address: str, **options: int | str) -> Iterator[RecommenderStub]:
    given = [("grpc.use_local_subchannel_pool", 1), *((f"grpc.{name}", value) for name, value in options.items())]
    with grpc.insecure_channel(address, options=given) as channel:
        yield RecommenderStub(channel)


class Held:
    """Keeps the thread of the fast front at its first call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_held, self.goes_on, self.count = threading.Event(), threading.Event(), 0
        start = RecommenderServicer.start_recommend

        def started(servicer: RecommenderServicer, *arguments: Any) -> Any:
            self.count += 1
            self.is_held.set()
            assert self.goes_on.wait(PATIENCE_S)
            return start(servicer, *arguments)

        monkeypatch.setattr(RecommenderServicer, "start_recommend", started)


def failed(call: Callable[[], object]) -> Any:
    with pytest.raises(grpc.RpcError) as failure:
        call()
    return failure.value


@pytest.mark.parametrize("address", ["0.0.0.0:0", "192.168.1.1:50051", "[::]:0", "recommender.example:50051"])
def test_other_machines_do_not_reach_it(address: str) -> None:
    with pytest.raises(SecurityError, match="loopback"):
        check_fast_address(address, shared_port=False)


@pytest.mark.parametrize("address", ["localhost", "127.0.0.1:99999", "localhost:"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises((AddressError, SecurityError)):
        check_fast_address(address, shared_port=False)


def test_servers_do_not_share_a_socket() -> None:
    with pytest.raises(AddressError, match="cannot share"):
        check_fast_address("unix:/nowhere", shared_port=True)


def test_a_machine_that_one_announced_message_would_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = tmp_path / "overcommit_memory"
    strict.write_text("2\n")
    with monkeypatch.context() as patched:
        patched.setattr(fast, "OVERCOMMIT", strict)
        with pytest.raises(SecurityError, match="overcommit"):
            check_fast_address("127.0.0.1:0", shared_port=False)
    monkeypatch.setattr(fast, "LONGEST_ANNOUNCED", 2**60)
    with pytest.raises(SecurityError, match="reserve"):
        check_fast_address("127.0.0.1:0", shared_port=False)


@pytest.mark.parametrize("limit", [resource.RLIMIT_AS, resource.RLIMIT_DATA], ids=["address space", "data"])
def test_a_process_that_some_announced_messages_would_end_is_refused(limit: int) -> None:
    before, enough_for_one = resource.getrlimit(limit), 2**50
    resource.setrlimit(limit, (enough_for_one, before[1]))
    try:
        with pytest.raises(SecurityError, match="ulimit"):
            check_fast_address("127.0.0.1:0", shared_port=False)
    finally:
        resource.setrlimit(limit, before)


@needs_native
def test_a_server_that_knows_its_callers_by_certificates_alone_is_refused(
    model: Recommender, store: EventStore, tmp_path: Path
) -> None:
    authority = trustme.CA()
    issued, pem = authority.issue_cert("localhost"), tmp_path / "ca.pem"
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    authority.cert_pem.write_to_path(pem)
    issued.cert_chain_pems[0].write_to_path(certificate)
    issued.private_key_pem.write_to_path(key)
    listener = Listener("127.0.0.1:0", tls=Tls(certificate, key, pem))
    with pytest.raises(SecurityError, match="expected tokens beside tls_client_ca"):
        create_server(one_model(model, store), store, listener, fast=Sockets.of(tmp_path).fast)
    with_tokens = replace(listener, tokens=Tokens({"reader-token-0123": ["read"]}))
    create_server(one_model(model, store), store, with_tokens, fast=Sockets.of(tmp_path).fast).drain()


@needs_native
def test_an_address_in_use_is_refused(model: Recommender, store: EventStore, tmp_path: Path) -> None:
    with serving(model, store, tmp_path):
        with pytest.raises(AddressError, match="another server"):
            create_server(one_model(model, store), store, "127.0.0.1:0", fast=Sockets.of(tmp_path).fast)
        with stub_at(Sockets.of(tmp_path).fast) as stub:
            assert len(stub.Recommend(ASKED, timeout=PATIENCE_S).recommendations) == 3


@needs_native
def test_it_answers_as_the_default_front(model: Recommender, store: EventStore, tmp_path: Path) -> None:
    ids, sockets = model.catalog.item_ids, Sockets.of(tmp_path)
    events = [
        UserEvent(event_id=f"{user}-{at}", user_id=user, item_id=ids[user_at + at], timestamp=at + 1)
        for user_at, user in enumerate("uv", 1)
        for at in range(5)
    ]
    along = [Event(item_id=ids[at % 50 + 1], timestamp=at + 1) for at in range(60)]
    requests = [
        *(RecommendRequest(user_id=user, k=k) for user in ("u", "v", "nobody") for k in (1, 20)),
        # Long to decode, of several users, with reasons: not all in one thread.
        RecommendRequest(history=History(events=along), k=5),
        RecommendRequest(history=History(events=along * 15), k=5),
        recommend_request(user_id="u", k=5, explain=True),
        recommend_request(user_id="u", k=5, request_time=3),
        RecommendRequest(user_id="u", k=5, filter=ItemFilter(any_tags=sorted(model.own_tags)[:1])),
    ]
    with serving(model, store, tmp_path), stub_at(sockets.fast) as stub, stub_at(sockets.default) as other:
        other.RecordEvents(RecordEventsRequest(events=events), timeout=PATIENCE_S)
        for _ in range(3):
            for request in requests:
                expected, found = (one.Recommend(request, timeout=PATIENCE_S) for one in (other, stub))
                for one in (expected, found):
                    one.recommendation_id = ""
                assert found == expected
        # What was recorded since counts.
        other.RecordEvents(
            RecordEventsRequest(events=[UserEvent(event_id="new", user_id="u", item_id=ids[30], timestamp=9)]),
            timeout=PATIENCE_S,
        )
        found = stub.Recommend(RecommendRequest(user_id="u", k=50), timeout=PATIENCE_S)
        assert ids[30] not in [one.item_id for one in found.recommendations]
        assert failed(lambda: stub.GetModelInfo(GetModelInfoRequest())).code() is grpc.StatusCode.UNIMPLEMENTED


@needs_native
def test_many_calls_at_once_get_their_own_answers(model: Recommender, store: EventStore, tmp_path: Path) -> None:
    ids, sockets, metrics = model.catalog.item_ids, Sockets.of(tmp_path), Metrics()
    requests = [
        RecommendRequest(history=History(events=[Event(item_id=ids[1 + at % 50], timestamp=1)]), k=1 + at % 7)
        for at in range(200)
    ]
    with serving(model, store, tmp_path, metrics=metrics), stub_at(sockets.fast) as stub:
        alone = [stub.Recommend(request, timeout=PATIENCE_S) for request in requests]
        together = [call.result() for call in [stub.Recommend.future(one, timeout=PATIENCE_S) for one in requests]]
    for one, other in zip(alone, together, strict=True):
        assert [item.item_id for item in one.recommendations] == [item.item_id for item in other.recommendations]
    assert metrics.registry.get_sample_value("jaxrec_rpcs_under_way") == 0
    assert metrics.registry.get_sample_value("jaxrec_rpc_seconds_count", {"method": METHOD, "code": "OK"}) == 400


@needs_native
def test_an_answer_is_logged_and_counted_and_traced(model: Recommender, store: EventStore, tmp_path: Path) -> None:
    metrics, exporter, provider = Metrics(), InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = Tracer(provider)
    parent = ("traceparent", f"00-{'ab' * 16}-{'cd' * 8}-01")
    with (
        serving(model, store, tmp_path, metrics=metrics, tracer=tracer),
        stub_at(Sockets.of(tmp_path).fast) as stub,
    ):
        given = [("x-request-id", "mine"), parent]
        answer, call = stub.Recommend.with_call(ASKED, timeout=PATIENCE_S, metadata=given)
        assert dict(call.trailing_metadata())["x-request-id"] == "mine"
        assert failed(lambda: stub.Recommend(RecommendRequest(), timeout=PATIENCE_S)).code().name == "INVALID_ARGUMENT"
    store.flush()
    (slate,) = slates_of(store, "u")
    assert slate.recommendation_id == answer.recommendation_id
    counted = {
        code: metrics.registry.get_sample_value("jaxrec_rpc_seconds_count", {"method": METHOD, "code": code})
        for code in ("OK", "INVALID_ARGUMENT")
    }
    assert counted == {"OK": 1, "INVALID_ARGUMENT": 1}
    good, bad = exporter.get_finished_spans()
    assert good.context is not None
    assert f"{good.context.trace_id:x}" == "ab" * 16
    assert bad.attributes is not None
    assert bad.attributes["rpc.grpc.status_code"] == grpc.StatusCode.INVALID_ARGUMENT.value[0]


@needs_native
def test_tokens_and_rights_are_those_of_the_default_front(
    model: Recommender, store: EventStore, tmp_path: Path
) -> None:
    reader, writer = "reader-token-0123", "writer-token-0123"
    tokens, metrics = Tokens({reader: ["read"], writer: ["write"]}), Metrics()

    def code(stub: RecommenderStub, token: str | None) -> str:
        metadata = [] if token is None else [("authorization", f"Bearer {token}")]
        try:
            stub.Recommend(ASKED, timeout=PATIENCE_S, metadata=metadata)
        except grpc.RpcError as error:
            return str(error.code().name)
        return "OK"

    with (
        serving(model, store, tmp_path, tokens=tokens, metrics=metrics),
        stub_at(Sockets.of(tmp_path).fast) as stub,
    ):
        found = [code(stub, token) for token in (None, "unknown-token-012", writer, reader)]
    assert found == ["UNAUTHENTICATED", "UNAUTHENTICATED", "PERMISSION_DENIED", "OK"]
    rejected = {
        reason: metrics.registry.get_sample_value("jaxrec_rejected_calls_total", {"method": METHOD, "reason": reason})
        for reason in ("unauthenticated", "permission")
    }
    assert rejected == {"unauthenticated": 2, "permission": 1}


@needs_native
def test_more_calls_than_may_wait_are_turned_away_with_a_hint(
    model: Recommender, store: EventStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, metrics, extra = Held(monkeypatch), Metrics(), 40
    with serving(model, store, tmp_path, metrics=metrics), ExitStack() as stack:
        stubs = [stack.enter_context(stub_at(Sockets.of(tmp_path).fast, enable_retries=0)) for _ in range(5)]
        calls = [stubs[0].Recommend.future(ASKED, timeout=PATIENCE_S)]
        assert held.is_held.wait(PATIENCE_S)
        calls += [stubs[at % 5].Recommend.future(ASKED, timeout=PATIENCE_S) for at in range(QUEUE_CAPACITY + extra)]
        # They are there once a later call of each connection was looked at: an unknown method, which needs no thread.
        for stub in stubs:
            failed(lambda stub=stub: stub.GetModelInfo(GetModelInfoRequest(), timeout=PATIENCE_S))
        held.goes_on.set()
        codes = [call.code() for call in calls]
        refused = [call for call in calls if call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED]
    assert codes.count(grpc.StatusCode.OK) == len(calls) - len(refused)
    assert 0 < len(refused) <= extra
    status = rpc_status.from_call(refused[0])
    assert status is not None
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.reason == "OVERLOADED"
    wait = error_details_pb2.RetryInfo()
    assert status.details[1].Unpack(wait)
    assert wait.retry_delay.ToMilliseconds() > 0
    labels = {"method": METHOD, "reason": "overload"}
    assert metrics.registry.get_sample_value("jaxrec_rejected_calls_total", labels) == len(refused)


@needs_native
def test_calls_that_expired_or_were_cancelled_while_they_waited_cost_no_run(
    model: Recommender, store: EventStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, metrics, time_remaining = Held(monkeypatch), Metrics(), FastCall.time_remaining

    def remaining(call: FastCall) -> float | None:
        return 0.0 if "x-late" in dict(call.metadata) else time_remaining(call)

    monkeypatch.setattr(FastCall, "time_remaining", remaining)
    with serving(model, store, tmp_path, metrics=metrics) as server, stub_at(Sockets.of(tmp_path).fast) as stub:
        first = stub.Recommend.future(ASKED, timeout=PATIENCE_S)
        assert held.is_held.wait(PATIENCE_S)
        late = stub.Recommend.future(ASKED, timeout=PATIENCE_S, metadata=[("x-late", "")])
        gone = stub.Recommend.future(ASKED, timeout=PATIENCE_S)
        # Both are there, since a later call was looked at.
        failed(lambda: stub.GetModelInfo(GetModelInfoRequest(), timeout=PATIENCE_S))
        gone.cancel()
        # So is the end of the second one.
        failed(lambda: stub.GetModelInfo(GetModelInfoRequest(), timeout=PATIENCE_S))
        held.goes_on.set()
        assert first.code() is grpc.StatusCode.OK
        assert late.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert len(stub.Recommend(ASKED, timeout=PATIENCE_S).recommendations) == 3
        assert held.count == 2
        assert server.finish_calls(PATIENCE_S)
    for code in ("DEADLINE_EXCEEDED", "CANCELLED"):
        assert metrics.registry.get_sample_value("jaxrec_rpc_seconds_count", {"method": METHOD, "code": code}) == 1


@needs_native
def test_a_call_that_would_end_the_thread_is_internal_and_the_front_lives_on(
    model: Recommender, store: EventStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(*_: object) -> None:
        raise SystemExit

    with serving(model, store, tmp_path), stub_at(Sockets.of(tmp_path).fast) as stub:
        for name, request in (("start_recommend", ASKED), ("Recommend", recommend_request(user_id="u", explain=True))):
            with monkeypatch.context() as patched:
                patched.setattr(RecommenderServicer, name, leave)
                error = failed(lambda request=request: stub.Recommend(request, timeout=PATIENCE_S))
            assert error.code() is grpc.StatusCode.INTERNAL
            assert stub.Recommend(request, timeout=PATIENCE_S) is not None


@needs_native
def test_a_call_that_cannot_be_traced_fails_alone(model: Recommender, store: EventStore, tmp_path: Path) -> None:
    class Broken(SpanProcessor):
        """Raises where the next call says."""

        at = ""

        def on_start(self, span: object, parent_context: object = None) -> None:
            if self.at == "start":
                raise RuntimeError("no spans today")

        def on_end(self, span: object) -> None:
            if self.at == "end":
                raise RuntimeError("no spans today")

    broken, provider, metrics = Broken(), TracerProvider(), Metrics()
    provider.add_span_processor(broken)
    with (
        serving(model, store, tmp_path, metrics=metrics, tracer=Tracer(provider)),
        stub_at(Sockets.of(tmp_path).fast) as stub,
    ):
        broken.at = "start"
        assert failed(lambda: stub.Recommend(ASKED, timeout=PATIENCE_S)).code() is grpc.StatusCode.INTERNAL
        broken.at = "end"
        assert len(stub.Recommend(ASKED, timeout=PATIENCE_S).recommendations) == 3
        broken.at = ""
        assert len(stub.Recommend(ASKED, timeout=PATIENCE_S).recommendations) == 3
    assert metrics.registry.get_sample_value("jaxrec_rpcs_under_way") == 0


@needs_native
@pytest.mark.parametrize("here_s", [PATIENCE_S, -1.0], ids=["in its thread", "in another thread"])
def test_lines_of_the_log_have_the_request_ids_of_their_calls(
    here_s: float,
    model: Recommender,
    store: EventStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Lines(logging.Handler):
        """The request id of each line about a call."""

        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith(METHOD):
                found.append((REQUEST_ID.get(), record.getMessage().removeprefix(f"{METHOD} ")))

    found: list[tuple[str, str]] = []
    handler, logger = Lines(), logging.getLogger("serve.front.calls")
    # Not by setting the attribute: loggers remember what they are enabled for, and setLevel makes them forget it.
    caplog.set_level(logging.INFO, logger.name)
    monkeypatch.setattr(fast, "LONGEST_OWN_RUN_S", here_s)
    held, sockets = Held(monkeypatch), Sockets.of(tmp_path)
    logger.addHandler(handler)
    try:
        with serving(model, store, tmp_path, log_calls=True) as server, stub_at(sockets.fast) as stub:
            # Bad ones end while others of their batch are under way.
            requests = {"first": ASKED, "bad": RecommendRequest()} | dict.fromkeys(("a", "b", "c"), ASKED)
            calls = []
            for name, request in requests.items():
                metadata = [("x-request-id", name)]
                calls.append(stub.Recommend.future(request, timeout=PATIENCE_S, metadata=metadata))
                assert held.is_held.wait(PATIENCE_S)
            # They are there, since a later call was looked at.
            failed(lambda: stub.GetModelInfo(GetModelInfoRequest(), timeout=PATIENCE_S))
            held.goes_on.set()
            codes = [call.code().name for call in calls]
            assert server.finish_calls(PATIENCE_S)
    finally:
        logger.removeHandler(handler)
    assert sorted(found) == sorted(zip(requests, codes, strict=True))
    assert codes == ["OK", "INVALID_ARGUMENT", "OK", "OK", "OK"]


@needs_native
def test_calls_under_way_finish_and_new_ones_are_turned_away(
    model: Recommender, store: EventStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    with (
        serving(model, store, tmp_path) as server,
        stub_at(Sockets.of(tmp_path).fast) as stub,
        ThreadPoolExecutor(1) as end,
    ):
        under_way = stub.Recommend.future(ASKED, timeout=PATIENCE_S)
        assert held.is_held.wait(PATIENCE_S)
        finished = end.submit(server.finish_calls, PATIENCE_S)
        with grpc.insecure_channel(Sockets.of(tmp_path).default) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
            while next(watch).status != health_pb2.HealthCheckResponse.NOT_SERVING:
                pass
        assert not finished.done()
        held.goes_on.set()
        assert under_way.code() is grpc.StatusCode.OK
        assert finished.result(PATIENCE_S)
        assert failed(lambda: stub.Recommend(ASKED, timeout=PATIENCE_S)).code() is grpc.StatusCode.UNAVAILABLE
