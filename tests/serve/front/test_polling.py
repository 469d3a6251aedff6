"""The polling server keeps grpc's promises, for methods that it answers inline and for all others."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from serve.api.health import HealthServicer
from serve.front.polling import Front, is_supported, polling_server
from serve.model.events import Event
from serve.model.recommender import Query, Recommender
from serve.serving.batching import Batcher, Run
from serve.serving.errors import Cancelled

PATIENCE_S = 30.0
SERVICE = "test.Echo"
THREADS = 4
Handler = Callable[[bytes, grpc.ServicerContext], bytes]


@contextmanager
def serving(
    inline: Handler,
    pooled: Handler | None = None,
    interceptor: grpc.ServerInterceptor | None = None,
    most_pooled: int = 100,
) -> Iterator[grpc.Channel]:
    """A channel to a server with the methods Inline (in the pool when asked for `b"long"`) and Pooled, and health."""
    server = polling_server(
        ThreadPoolExecutor(THREADS),
        ThreadPoolExecutor(1),
        Front(
            [f"/{SERVICE}/Inline"],
            ["/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"],
            lambda method, message: message == b"long",
            most_in_pool=most_pooled,
            most_slow=most_pooled,
        ),
        interceptors=[interceptor] if interceptor else [],
    )
    handlers = {"Inline": grpc.unary_unary_rpc_method_handler(inline)}
    if pooled is not None:
        handlers["Pooled"] = grpc.unary_unary_rpc_method_handler(pooled)
    server.add_registered_method_handlers(SERVICE, handlers)
    health_servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    health_servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    assert server.stop(PATIENCE_S).wait(PATIENCE_S)


def method(channel: grpc.Channel, name: str) -> grpc.UnaryUnaryMultiCallable:
    return channel.unary_unary(f"/{SERVICE}/{name}")


def test_grpcio_has_what_this_needs() -> None:
    assert is_supported()


def test_inline_methods_run_in_the_polling_thread_and_others_do_not() -> None:
    def thread_name(_: bytes, context: grpc.ServicerContext) -> bytes:
        return threading.current_thread().name.encode()

    with serving(thread_name, thread_name) as channel:
        assert method(channel, "Inline")(b"", timeout=PATIENCE_S) == b"grpc-polling"
        assert method(channel, "Pooled")(b"", timeout=PATIENCE_S) != b"grpc-polling"
        assert method(channel, "Inline")(b"long", timeout=PATIENCE_S) != b"grpc-polling"
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()


def test_context_is_that_of_the_call() -> None:
    seen = {}

    def handle(request: bytes, context: grpc.ServicerContext) -> bytes:
        seen.update(context.invocation_metadata())
        seen["peer"] = context.peer()
        seen["remaining"] = context.time_remaining()
        seen["active"] = context.is_active()
        context.add_callback(lambda: seen.setdefault("ended", True))
        context.send_initial_metadata((("first", "1"),))
        context.set_trailing_metadata((("last", "2"),))
        return request[::-1]

    with serving(handle) as channel:
        answer, call = method(channel, "Inline").with_call(b"abc", timeout=PATIENCE_S, metadata=(("who", "me"),))
        assert answer == b"cba"
        assert dict(call.initial_metadata())["first"] == "1"
        assert dict(call.trailing_metadata())["last"] == "2"
    assert seen["who"] == "me"
    assert seen["peer"].startswith("ipv4:127.0.0.1:")
    # gRPC rounds a deadline up.
    assert 0 < seen["remaining"] <= PATIENCE_S + 1
    assert seen["active"]
    assert seen["ended"]


def test_failures_have_their_status() -> None:
    def handle(request: bytes, context: grpc.ServicerContext) -> bytes:
        if request == b"abort":
            context.set_trailing_metadata((("retry-after", "3"),))
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "come again")
        if request == b"code":
            context.set_code(grpc.StatusCode.NOT_FOUND)
            context.set_details("not here")
        if request == b"bug":
            raise ValueError("the secret of the server")
        return b""

    with serving(handle) as channel:
        for request, code, details in (
            (b"abort", grpc.StatusCode.RESOURCE_EXHAUSTED, "come again"),
            (b"code", grpc.StatusCode.NOT_FOUND, "not here"),
            (b"bug", grpc.StatusCode.UNKNOWN, "internal error"),
        ):
            with pytest.raises(grpc.RpcError) as failed:
                method(channel, "Inline")(request, timeout=PATIENCE_S)
            assert (failed.value.code(), failed.value.details()) == (code, details)
            if request == b"abort":
                assert dict(failed.value.trailing_metadata())["retry-after"] == "3"
        assert method(channel, "Inline")(b"fine", timeout=PATIENCE_S) == b""


@pytest.mark.parametrize("name", ["Inline", "Pooled"])
def test_calls_that_send_no_message_keep_no_thread(name: str) -> None:
    """Anybody can open them, without a token."""
    never = threading.Event()

    def nothing() -> Iterator[bytes]:
        never.wait(PATIENCE_S)
        yield from ()

    with serving(lambda request, _: request, lambda request, _: request) as channel:
        half_open = [channel.stream_unary(f"/{SERVICE}/{name}").future(nothing()) for _ in range(THREADS)]
        half_open += [channel.stream_unary("/grpc.health.v1.Health/Check").future(nothing()) for _ in range(THREADS)]
        try:
            # On the same connection and after them.
            assert method(channel, name)(b"x", timeout=PATIENCE_S) == b"x"
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
            assert not any(call.done() for call in half_open)
        finally:
            for call in half_open:
                call.cancel()
            never.set()


def test_a_full_pool_turns_calls_away_and_answers_health_checks() -> None:
    started, gate = threading.Event(), threading.Event()

    def wait(request: bytes, _: grpc.ServicerContext) -> bytes:
        started.set()
        assert gate.wait(PATIENCE_S)
        return request

    with serving(lambda request, _: request, wait, most_pooled=1) as channel:
        first = method(channel, "Pooled").future(b"1", timeout=PATIENCE_S)
        assert started.wait(PATIENCE_S)
        with pytest.raises(grpc.RpcError) as refused:
            method(channel, "Pooled")(b"2", timeout=PATIENCE_S)
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        # Slow calls have threads of their own.
        assert method(channel, "Inline")(b"long", timeout=PATIENCE_S) == b"long"
        gate.set()
        assert first.result() == b"1"
        # There is room again.
        assert method(channel, "Pooled")(b"3", timeout=PATIENCE_S) == b"3"


def test_a_cancelled_call_in_the_pool_ends_and_makes_room() -> None:
    started, gate = threading.Event(), threading.Event()

    def wait(request: bytes, context: grpc.ServicerContext) -> bytes:
        if request == b"1":
            started.set()
            assert gate.wait(PATIENCE_S)
            end = time.monotonic() + PATIENCE_S
            while context.is_active():
                assert time.monotonic() < end
        return request

    with serving(wait, wait, most_pooled=1) as channel:
        call = method(channel, "Pooled").future(b"1", timeout=PATIENCE_S)
        assert started.wait(PATIENCE_S)
        call.cancel()
        gate.set()
        end = time.monotonic() + PATIENCE_S
        while True:
            second = method(channel, "Pooled").future(b"2", timeout=PATIENCE_S)
            if second.exception() is None:
                break
            assert second.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert time.monotonic() < end


def test_a_client_that_keeps_to_the_limit_of_its_connection_is_never_refused() -> None:
    """What is over for the client may not be over for the server yet, and must not count."""
    limit, rounds = 4, 400
    server = polling_server(
        ThreadPoolExecutor(THREADS), ThreadPoolExecutor(1), Front(), options=[("grpc.max_concurrent_streams", limit)]
    )
    handler = grpc.unary_unary_rpc_method_handler(lambda request, _: request)
    server.add_registered_method_handlers(SERVICE, {"Pooled": handler})
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    # Without retries, which hide a refusal.
    options = [("grpc.enable_retries", 0)]
    with grpc.insecure_channel(f"127.0.0.1:{port}", options) as channel, ThreadPoolExecutor(limit) as callers:

        def ask(_: int) -> int:
            return sum(method(channel, "Pooled")(b"x", timeout=PATIENCE_S) == b"x" for _ in range(rounds))

        assert list(callers.map(ask, range(limit))) == [rounds] * limit
    assert server.stop(PATIENCE_S).wait(PATIENCE_S)


def test_watching_holds_no_thread_and_a_client_that_does_not_read_holds_up_no_other() -> None:
    states = health_pb2.HealthCheckResponse
    servicer = HealthServicer(["a.Service"])
    server = polling_server(ThreadPoolExecutor(1), ThreadPoolExecutor(1), Front())
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="a.Service")
        watches = [stub.Watch(request, timeout=PATIENCE_S) for _ in range(20)]
        assert [next(watch).status for watch in watches] == [states.NOT_SERVING] * 20
        # Nobody reads these; the last is what counts.
        for at in range(1001):
            servicer.set("a.Service", states.SERVING if at % 2 else states.UNKNOWN)
        servicer.set("a.Service", states.SERVING)
        for watch in watches:
            while next(watch).status != states.SERVING:
                pass
            watch.cancel()
        assert stub.Check(request, timeout=PATIENCE_S).status == states.SERVING
    assert server.stop(PATIENCE_S).wait(PATIENCE_S)
    assert servicer._send_response_callbacks["a.Service"] == set()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failure_of_the_polling_thread_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    failed = threading.Event()

    def leave(_: bytes, __: grpc.ServicerContext) -> bytes:
        raise SystemExit

    front = Front([f"/{SERVICE}/Inline"], on_failure=failed.set)
    server = polling_server(ThreadPoolExecutor(1), ThreadPoolExecutor(1), front)
    server.add_registered_method_handlers(SERVICE, {"Inline": grpc.unary_unary_rpc_method_handler(leave)})
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = method(channel, "Inline").future(b"", timeout=PATIENCE_S)
        assert failed.wait(PATIENCE_S)
        call.cancel()
    assert [record.levelname for record in caplog.records] == ["CRITICAL"]


def test_a_thread_of_the_pool_survives_what_would_end_it(caplog: pytest.LogCaptureFixture) -> None:
    def leave(request: bytes, _: grpc.ServicerContext) -> bytes:
        if request == b"leave":
            raise SystemExit
        return request

    with serving(leave, leave, most_pooled=1) as channel:
        with pytest.raises(grpc.RpcError) as failed:
            method(channel, "Pooled")(b"leave", timeout=PATIENCE_S)
        assert failed.value.code() is grpc.StatusCode.INTERNAL
        assert method(channel, "Pooled")(b"x", timeout=PATIENCE_S) == b"x"


class RefuseAll(grpc.ServerInterceptor):  # type: ignore[misc]
    def intercept_service(self, continuation, details):  # type: ignore[no-untyped-def]
        if dict(details.invocation_metadata).get("token") == "right":
            return continuation(details)
        return grpc.unary_unary_rpc_method_handler(
            lambda _, context: context.abort(grpc.StatusCode.UNAUTHENTICATED, f"not for {details.method}")
        )


def test_interceptors_see_inline_calls() -> None:
    with serving(lambda request, _: request, interceptor=RefuseAll()) as channel:
        call = method(channel, "Inline")
        with pytest.raises(grpc.RpcError) as refused:
            call(b"x", timeout=PATIENCE_S)
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
        assert refused.value.details() == f"not for /{SERVICE}/Inline"
        assert call(b"x", timeout=PATIENCE_S, metadata=(("token", "right"),)) == b"x"


def query_of(model: Recommender, request: bytes) -> Query:
    """A history that is different for each number."""
    number = int(request)
    ids = model.catalog.item_ids
    return Query([Event(ids[1 + (number * step) % 60], 4.0, step) for step in range(1, 2 + number % 40)], k=7)


def test_calls_that_are_there_go_together_and_get_their_own_answers(model: Recommender) -> None:
    runs: list[Run] = []
    batcher = Batcher(model.recommend, on_run=runs.append)

    def handle(request: bytes, context: grpc.ServicerContext) -> bytes:
        answer = batcher.recommend(query_of(model, request), is_cancelled=lambda: not context.is_active())
        return answer.items.tobytes()

    with serving(handle) as channel:
        calls = [method(channel, "Inline").future(b"%d" % n, timeout=PATIENCE_S) for n in range(200)]
        for number, call in enumerate(calls):
            (expected,) = model.recommend([query_of(model, b"%d" % number)])
            np.testing.assert_array_equal(np.frombuffer(call.result(), np.int32), expected.items)
    assert sum(run.size for run in runs) == 200
    assert max(run.size for run in runs) > 1


def test_a_cancelled_call_is_not_run(model: Recommender) -> None:
    started, gate = threading.Event(), threading.Event()
    ran: list[int] = []
    outcomes: list[type[Exception] | None] = []

    def answer(queries):  # type: ignore[no-untyped-def]
        started.set()
        assert gate.wait(PATIENCE_S)
        ran.extend(query.k for query in queries)
        return model.recommend(queries)

    batcher = Batcher(answer)

    def handle(request: bytes, context: grpc.ServicerContext) -> bytes:
        query = query_of(model, b"1")._replace(k=int(request))
        try:
            batcher.recommend(query, is_cancelled=lambda: not context.is_active())
        except Cancelled:
            outcomes.append(Cancelled)
            raise
        outcomes.append(None)
        return request

    with serving(handle) as channel:
        call = method(channel, "Inline")
        first = call.future(b"1", timeout=PATIENCE_S)
        assert started.wait(PATIENCE_S)
        # The polling thread is in the model; these two wait, and one gives up.
        second, third = (call.future(b"%d" % k, timeout=PATIENCE_S) for k in (2, 3))
        second.cancel()
        gate.set()
        assert (first.result(), third.result()) == (b"1", b"3")
    assert 2 not in ran
    assert outcomes.count(None) == 2


def test_stop_lets_calls_finish() -> None:
    started, gate = threading.Event(), threading.Event()

    def handle(request: bytes, _: grpc.ServicerContext) -> bytes:
        started.set()
        assert gate.wait(PATIENCE_S)
        return request

    server = polling_server(ThreadPoolExecutor(1), ThreadPoolExecutor(1), Front([f"/{SERVICE}/Inline"]))
    server.add_registered_method_handlers(SERVICE, {"Inline": grpc.unary_unary_rpc_method_handler(handle)})
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = method(channel, "Inline").future(b"x", timeout=PATIENCE_S)
        assert started.wait(PATIENCE_S)
        stopped = server.stop(PATIENCE_S)
        assert not stopped.is_set()
        gate.set()
        assert call.result() == b"x"
        assert stopped.wait(PATIENCE_S)


def test_an_inline_method_must_exist() -> None:
    server = polling_server(ThreadPoolExecutor(1), ThreadPoolExecutor(1), Front(["/test.Echo/Absent"]))
    with pytest.raises(ValueError, match=r"\['/test\.Echo/Absent'\]"):
        server.start()
