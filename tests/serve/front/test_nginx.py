"""The fast front behind nginx, with the configuration of deploy/nginx."""

import signal
import struct
import subprocess
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serve.api.recommender import RecommenderServicer
from serve.front.server import create_server
from serve.model.recommender import Recommender
from serve.observability.metrics import Metrics
from serve.pb.recommender_pb2 import GetModelInfoRequest, RecommendRequest
from serve.pb.recommender_pb2_grpc import RecommenderStub
from serve.serving.errors import QueueFull
from serve.stores.base import EventStore
from tests.serve.front.http2 import DATA, END_STREAM, GOAWAY, HEADERS, MAX_CONCURRENT_STREAMS, RST_STREAM, RawClient
from tests.serve.front.proxy import MISSING, Sockets, configured, running_proxy
from tests.serve.front.test_fast import ASKED, METHOD, PATIENCE_S, Held, failed, needs_both, serving, stub_at
from tests.serve.one_model import one_model
from tests.serve.process import running_server

# `:status: 200` in HPACK's static table (RFC 7541, appendix A).
STATUS_200 = b"\x88"
# `grpc-status` as nginx writes it, in the code of appendix B; what follows is the length of the value and the value.
GRPC_STATUS = bytes.fromhex("00889acac8b21234da8f")


def end_of(client: RawClient, stream: int) -> bytes:
    """The headers that end a stream, as they were sent."""
    for kind, flags, about, content in client.frames():
        assert (kind, about) != (RST_STREAM, stream)
        if about == stream and kind == HEADERS and flags & END_STREAM:
            return content
    raise AssertionError("the connection ended before the stream")


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
    sockets = Sockets.of(tmp_path)
    with (
        serving(model, store, tmp_path),
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
        whole = RecommendRequest(user_id="u", k=3, exclude_item_ids=["x" * 100] * 80_000)
        assert whole.ByteSize() < 8 * 2**20
        assert failed(lambda: stub.Recommend(whole, timeout=PATIENCE_S)).code() is grpc.StatusCode.INVALID_ARGUMENT
        whole.exclude_item_ids.extend(["x" * 100] * 10_000)
        error = failed(lambda: stub.Recommend(whole, timeout=PATIENCE_S))
        assert (error.code(), "8 MiB" in error.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)


@needs_both
@pytest.mark.parametrize(
    "path",
    [
        b"/\xff/../jaxrec.v1.Recommender/GetModelInfo",
        b"/jaxrec.v1.Recommender/GetModelInfo?\xff",
        b"/grpc.health.v1.Health/Watch?\xff",
        b"/jaxrec.v1.Recommender/Recommend?\xff",
        b"/jaxrec.v1.Recommender/%FF",
        b"/jaxrec.v1.Recommender/",
        b"/",
    ],
)
def test_a_path_that_is_no_method_does_not_reach_the_server(
    path: bytes, model: Recommender, store: EventStore, tmp_path: Path
) -> None:
    sockets, metrics = Sockets.of(tmp_path), Metrics()
    with (
        serving(model, store, tmp_path, metrics=metrics),
        running_proxy(sockets),
        RawClient(sockets.proxy) as client,
        stub_at(sockets.proxy) as stub,
    ):
        end = end_of(client, client.call(path, b"", (("grpc-encoding", b"gzip"),)))
        # Clients take no other status of HTTP for one of gRPC. UNIMPLEMENTED.
        assert end.startswith(STATUS_200)
        assert GRPC_STATUS + b"\x0212" in end
        assert stub.GetModelInfo(GetModelInfoRequest(), timeout=PATIENCE_S).model_version
        assert metrics.registry.get_sample_value("jaxrec_front_restarts_total") == 0
    for code in ("UNIMPLEMENTED", "CANCELLED"):
        labels = {"method": "unknown", "code": code}
        assert metrics.registry.get_sample_value("jaxrec_rpc_seconds_count", labels) is None


@needs_both
@pytest.mark.parametrize("length", [17_000, 30_000])
def test_too_much_metadata_is_refused_alike_for_all_methods(
    length: int, model: Recommender, store: EventStore, tmp_path: Path
) -> None:
    sockets, long = Sockets.of(tmp_path), [("x-long", "a" * length)]
    with serving(model, store, tmp_path), running_proxy(sockets), stub_at(sockets.proxy, enable_retries=0) as stub:
        # gRPC's limit holds once its settings were read: for the second call of nginx's connection.
        assert stub.GetModelInfo(GetModelInfoRequest(), timeout=PATIENCE_S).model_version
        for call, request in ((stub.Recommend, ASKED), (stub.GetModelInfo, GetModelInfoRequest())):
            error = failed(lambda call=call, request=request: call(request, timeout=PATIENCE_S, metadata=long))
            assert (error.code(), "metadata" in error.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)


@needs_both
def test_metadata_within_the_limit_is_never_refused(model: Recommender, store: EventStore, tmp_path: Path) -> None:
    sockets, long = Sockets.of(tmp_path), [("x-long", "a" * 15_000)]
    with serving(model, store, tmp_path), running_proxy(sockets), stub_at(sockets.proxy) as stub:
        for _ in range(10):
            assert stub.Recommend(ASKED, timeout=PATIENCE_S, metadata=long) is not None
            assert stub.GetModelInfo(GetModelInfoRequest(), timeout=PATIENCE_S, metadata=long) is not None


@needs_both
def test_a_call_that_takes_longer_than_nginx_waits_is_deadline_exceeded(
    model: Recommender, store: EventStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, sockets = Held(monkeypatch), Sockets.of(tmp_path)
    with (
        serving(model, store, tmp_path),
        running_proxy(sockets, settings={"grpc_read_timeout": "1s"}),
        stub_at(sockets.proxy, enable_retries=0) as stub,
    ):
        error = failed(lambda: stub.Recommend(ASKED, timeout=PATIENCE_S))
        assert (error.code(), error.details()) == (grpc.StatusCode.DEADLINE_EXCEEDED, "the call took too long")
        held.goes_on.set()


@needs_both
@pytest.mark.parametrize("method", [METHOD, "/jaxrec.v1.Recommender/RecordEvents", "/grpc.health.v1.Health/Check"])
def test_a_call_whose_message_stops_coming_is_ended(
    method: str, model: Recommender, store: EventStore, tmp_path: Path
) -> None:
    sockets = Sockets.of(tmp_path)
    with (
        serving(model, store, tmp_path) as server,
        running_proxy(sockets, settings={"client_body_timeout": "1s"}),
        RawClient(sockets.proxy) as stranger,
        stub_at(sockets.proxy) as stub,
    ):
        stream = stranger.call(method, b"x", announced=1_000)
        assert any((kind, about) == (RST_STREAM, stream) for kind, _, about, _ in stranger.frames())
        assert stub.Recommend(ASKED, timeout=PATIENCE_S) is not None
        assert server.finish_calls(PATIENCE_S)


@needs_both
@pytest.mark.parametrize("method", [METHOD, "/jaxrec.v1.Recommender/GetModelInfo"])
def test_a_client_that_does_not_read_is_ended_and_keeps_nothing_of_the_server(
    method: str, model: Recommender, store: EventStore, tmp_path: Path
) -> None:
    sockets = Sockets.of(tmp_path)
    with (
        serving(model, store, tmp_path) as server,
        running_proxy(sockets, settings={"send_timeout": "1s"}),
        RawClient(sockets.proxy, window=0) as stranger,
        stub_at(sockets.proxy) as stub,
    ):
        request = ASKED.SerializeToString() if method == METHOD else b""
        streams = {stranger.call(method, request) for _ in range(20)}
        # nginx has the answers, and drops the calls and then the connection.
        for kind, _, about, _ in stranger.frames():
            assert kind != DATA
            if kind == RST_STREAM:
                streams.discard(about)
            if not streams:
                break
        assert stub.Recommend(ASKED, timeout=PATIENCE_S) is not None
        assert server.finish_calls(PATIENCE_S)


@needs_both
def test_a_connection_has_a_bounded_number_of_calls_and_a_bounded_age(
    model: Recommender, store: EventStore, tmp_path: Path
) -> None:
    sockets = Sockets.of(tmp_path)
    with (
        serving(model, store, tmp_path),
        running_proxy(sockets, settings={"keepalive_requests": "2"}),
        RawClient(sockets.proxy) as client,
    ):
        calls = [client.call("/jaxrec.v1.Recommender/GetModelInfo", b"") for _ in range(2)]
        ended, last = set(), None
        for kind, flags, about, content in client.frames():
            if kind == HEADERS and flags & END_STREAM:
                ended.add(about)
            if kind == GOAWAY:
                # The last call that is answered, and no error.
                last = struct.unpack(">II", content[:8])
        assert ended == set(calls)
        assert last == (calls[-1], 0)
        assert client.settings[0][MAX_CONCURRENT_STREAMS] == 100


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
        # Health checks have places of their own.
        with grpc.insecure_channel(sockets.proxy) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            assert health.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S).status == 1
            live = channel.unary_unary("/inference.GRPCInferenceService/ServerReady")
            assert live(b"", timeout=PATIENCE_S)
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
