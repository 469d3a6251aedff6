"""The fast front alone and behind nginx: what it answers, whom it turns away, and how it ends."""

import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from serve.addresses import AddressError, SecurityError
from serve.api.recommender import RecommenderServicer
from serve.client import Event, UserEvent, recommend_request
from serve.front import fast
from serve.front.auth import Tokens
from serve.front.fast import check_fast_address
from serve.front.lifecycle import RecommenderServer
from serve.front.server import Listener, create_server
from serve.model.recommender import Recommender
from serve.observability.metrics import Metrics
from serve.observability.tracing import Tracer
from serve.pb.recommender_pb2 import GetModelInfoRequest, History, ItemFilter, RecommendRequest, RecordEventsRequest
from serve.pb.recommender_pb2_grpc import RecommenderStub
from serve.serving.batching import QUEUE_CAPACITY
from serve.serving.errors import QueueFull
from serve.stores.base import EventStore
from tests.serve.front.proxy import MISSING, Sockets, configured, running_proxy
from tests.serve.one_model import one_model
from tests.serve.process import running_server
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
    held, metrics = Held(monkeypatch), Metrics()
    with serving(model, store, tmp_path, metrics=metrics) as server, stub_at(Sockets.of(tmp_path).fast) as stub:
        first = stub.Recommend.future(ASKED, timeout=PATIENCE_S)
        assert held.is_held.wait(PATIENCE_S)
        late = stub.Recommend.future(ASKED, timeout=0.01)
        gone = stub.Recommend.future(ASKED, timeout=PATIENCE_S)
        # Both are there, since a later call was looked at.
        failed(lambda: stub.GetModelInfo(GetModelInfoRequest(), timeout=PATIENCE_S))
        gone.cancel()
        assert late.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        # So is the end of the second one.
        failed(lambda: stub.GetModelInfo(GetModelInfoRequest(), timeout=PATIENCE_S))
        held.goes_on.set()
        assert first.code() is grpc.StatusCode.OK
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


@needs_both
def test_nginx_gives_recommend_to_the_fast_front_and_all_else_to_the_default_one(
    model: Recommender, store: EventStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    start = RecommenderServicer.start_recommend

    def started(servicer: RecommenderServicer, *arguments: Any) -> Any:
        threads.append(threading.current_thread().name)
        return start(servicer, *arguments)

    monkeypatch.setattr(RecommenderServicer, "start_recommend", started)
    sockets, metrics = Sockets.of(tmp_path), Metrics()
    with (
        serving(model, store, tmp_path, metrics=metrics),
        running_proxy(sockets),
        stub_at(sockets.proxy) as stub,
        grpc.insecure_channel(sockets.proxy) as channel,
    ):
        stub.Recommend(ASKED, timeout=PATIENCE_S)
        # Compressed messages are inflated within a limit there.
        stub.Recommend(ASKED, timeout=PATIENCE_S, compression=grpc.Compression.Gzip)
        assert threads == ["fast-front", "grpc-loop"]
        assert stub.GetModelInfo(GetModelInfoRequest(), timeout=PATIENCE_S).model_version
        health = health_pb2_grpc.HealthStub(channel)
        assert next(health.Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)).status == 1
        # A path that would end gRPC's asyncio server does not reach it.
        odd = channel.unary_unary("/jaxrec.v1.Recommender/%FF%FE")
        assert failed(lambda: odd(b"", timeout=PATIENCE_S)).code() is grpc.StatusCode.UNIMPLEMENTED
        assert metrics.registry.get_sample_value("jaxrec_front_restarts_total") == 0
        whole = RecommendRequest(user_id="u", k=3, exclude_item_ids=["x" * 100] * 80_000)
        assert whole.ByteSize() < 8 * 2**20
        assert failed(lambda: stub.Recommend(whole, timeout=PATIENCE_S)).code() is grpc.StatusCode.INVALID_ARGUMENT
        whole.exclude_item_ids.extend(["x" * 100] * 10_000)
        error = failed(lambda: stub.Recommend(whole, timeout=PATIENCE_S))
        assert (error.code(), "8 MiB" in error.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)


@needs_both
def test_nginx_goes_to_the_default_front_where_the_fast_one_is_missing(
    model: Recommender, store: EventStore, tmp_path: Path
) -> None:
    sockets = Sockets.of(tmp_path)
    server = create_server(one_model(model, store), store, sockets.default)
    server.start()
    with running_proxy(sockets), stub_at(sockets.proxy, enable_retries=0) as stub:
        assert len(stub.Recommend(ASKED, timeout=PATIENCE_S).recommendations) == 3
        server.drain()
        error = failed(lambda: stub.Recommend(ASKED, timeout=PATIENCE_S))
        assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, "the server is not reached, try again")


@needs_both
def test_nginx_bounds_the_calls_of_a_client(
    model: Recommender, store: EventStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, sockets, most, extra = Held(monkeypatch), Sockets.of(tmp_path), 256, 30
    with serving(model, store, tmp_path), running_proxy(sockets), ExitStack() as stack:
        stubs = [stack.enter_context(stub_at(sockets.proxy, enable_retries=0)) for _ in range(3)]
        calls = [stubs[at % 3].Recommend.future(ASKED, timeout=PATIENCE_S) for at in range(most + extra)]
        assert held.is_held.wait(PATIENCE_S)
        refused = threading.Semaphore(0)
        for call in calls:
            call.add_done_callback(lambda _: refused.release())
        for _ in range(extra):
            assert refused.acquire(timeout=PATIENCE_S)
        ended = [call for call in calls if call.done()]
        assert {call.code() for call in ended} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert dict(ended[0].trailing_metadata())["grpc-retry-pushback-ms"] == "100"
        held.goes_on.set()
        assert [call.code() for call in calls].count(grpc.StatusCode.OK) == most


@needs_both
def test_nginx_says_when_to_come_again(
    model: Recommender, store: EventStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise QueueFull(1, 0.2)

    monkeypatch.setattr(RecommenderServicer, "start_recommend", full)
    sockets = Sockets.of(tmp_path)
    with (
        serving(model, store, tmp_path),
        running_proxy(sockets),
        stub_at(sockets.proxy, enable_retries=0) as stub,
        stub_at(sockets.default, enable_retries=0) as other,
    ):
        for one in (other, stub):
            error = failed(lambda one=one: one.Recommend(ASKED, timeout=PATIENCE_S))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert 100 <= int(dict(error.trailing_metadata())["grpc-retry-pushback-ms"]) <= 300
            assert "x-grpc-retry-pushback-ms" not in dict(error.trailing_metadata())


@needs_both
def test_nginx_speaks_tls(model: Recommender, store: EventStore, tmp_path: Path) -> None:
    authority, sockets = trustme.CA(), Sockets.of(tmp_path)
    issued = authority.issue_cert("recommender.example")
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(key)
    credentials = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
    name = [("grpc.ssl_target_name_override", "recommender.example")]
    with (
        serving(model, store, tmp_path),
        running_proxy(sockets, (certificate, key)),
        grpc.secure_channel(sockets.proxy, credentials, name) as channel,
    ):
        assert len(RecommenderStub(channel).Recommend(ASKED, timeout=PATIENCE_S).recommendations) == 3


@needs_both
def test_no_call_fails_while_nginx_and_the_server_are_replaced(model_directory: Path, tmp_path: Path) -> None:
    """For clients that repeat what is UNAVAILABLE."""
    sockets, stop, done = Sockets.of(tmp_path), threading.Event(), [0] * 4

    def call(caller: int) -> None:
        with stub_at(sockets.proxy) as stub:
            while not stop.is_set():
                try:
                    stub.Recommend(RecommendRequest(user_id=str(caller)), timeout=PATIENCE_S)
                    done[caller] += 1
                except grpc.RpcError as error:
                    if error.code() is not grpc.StatusCode.UNAVAILABLE:
                        raise

    def wait_for_more(callers: Sequence[Any]) -> None:
        goals, until = [so_far + 10 for so_far in done], threading.Event()
        for _ in range(int(PATIENCE_S * 100)):
            if all(so_far >= goal for so_far, goal in zip(done, goals, strict=True)):
                return
            assert not any(caller.done() for caller in callers), [caller.exception() for caller in callers]
            until.wait(0.01)
        raise AssertionError("the calls don't get on")

    def server() -> Any:
        options = ["--fast", sockets.fast]
        return running_server(model_directory, tmp_path / "s", address=sockets.default, provider="cpu", options=options)

    with running_proxy(sockets) as proxy, ThreadPoolExecutor(4) as threads:
        try:
            with server() as first:
                assert first.line.split(" (")[0].endswith(f"{sockets.default} and fast {sockets.fast}")
                callers = [threads.submit(call, caller) for caller in range(4)]
                wait_for_more(callers)
                proxy.signal(signal.SIGHUP)
                wait_for_more(callers)
                first.process.send_signal(signal.SIGTERM)
                assert first.process.wait(PATIENCE_S) == 0
            with server():
                wait_for_more(callers)
                stop.set()
                for caller in callers:
                    caller.result(PATIENCE_S)
        finally:
            stop.set()


def test_debians_nginx_takes_the_configuration_as_it_is(tmp_path: Path) -> None:
    """But for the certificates, which it reads."""
    if "nginx" in MISSING:
        pytest.skip("not installed: nginx")
    certificate = trustme.CA().issue_cert("recommender.example")
    paths = tmp_path / "certificate.pem", tmp_path / "key.pem"
    certificate.cert_chain_pems[0].write_to_path(paths[0])
    certificate.private_key_pem.write_to_path(paths[1])
    (tmp_path / "nginx.conf").write_text(configured(Sockets.of(tmp_path), paths))
    command = ["nginx", "-t", "-c", tmp_path / "nginx.conf", "-p", tmp_path, "-e", tmp_path / "error.log"]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    assert "[warn]" not in checked.stderr
