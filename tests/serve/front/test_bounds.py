"""What a stranger costs: health checks, invented names, streams, answers that are still under way."""

import threading

import grpc
import pytest
from prometheus_client import generate_latest

from serve.api.context import Context
from serve.front.calls import Calls, Method
from serve.front.gate import Gate
from serve.front.loop import shared_loop
from serve.front.pool import Pool
from serve.front.restarts import KeptServer
from serve.front.server import Listener
from serve.front.waiting import MOST_SHORT_BYTES, MOST_SHORT_RECEIVING, Open
from serve.observability.metrics import Metrics
from tests.serve.front.echo import AT_ONCE, PATIENCE_S, POOLED, echo_server, method, wait_for
from tests.serve.front.http2 import DATA, RawClient
from tests.serve.front.test_waiting import OnlyCall, ended


def test_a_long_health_check_is_refused_before_it_is_decoded() -> None:
    with echo_server() as address, grpc.insecure_channel(address) as channel:
        ask = method(channel, AT_ONCE)
        assert ask(bytes(MOST_SHORT_BYTES), timeout=PATIENCE_S) == bytes(MOST_SHORT_BYTES)
        with pytest.raises(grpc.RpcError) as failure:
            ask(bytes(MOST_SHORT_BYTES + 1), timeout=PATIENCE_S)
        assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_unread_health_checks_refuse_only_health_checks_of_their_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.front.waiting.MOST_UNSENT", 1)
    with (
        echo_server() as address,
        RawClient(address, window=0) as stranger,
        grpc.insecure_channel(address) as channel,
    ):
        # More than are waited for at a time; an answer counts once it is there.
        for _ in range(3 * MOST_SHORT_RECEIVING):
            stranger.call(AT_ONCE, b"x")
        # RESOURCE_EXHAUSTED.
        assert any(b"grpc-status\x018" in content for _, _, _, content in stranger.frames())
        assert method(channel, POOLED)(b"y", timeout=PATIENCE_S) == b"y"
        assert method(channel, AT_ONCE)(b"y", timeout=PATIENCE_S) == b"y"


def test_invented_names_are_one_time_series() -> None:
    metrics = Metrics()
    with echo_server(metrics=metrics) as address, grpc.insecure_channel(address) as channel:
        for number in range(5):
            with pytest.raises(grpc.RpcError):
                method(channel, f"/no.Such/Invented{number}")(b"", timeout=PATIENCE_S)
    text = generate_latest(metrics.registry)
    assert b"Invented" not in text
    labels = {"method": "unknown", "code": "UNIMPLEMENTED"}
    assert metrics.registry.get_sample_value("jaxrec_rpc_seconds_count", labels) == 5


def test_a_call_that_expired_in_line_for_a_thread_is_not_answered() -> None:
    begun, goes_on = threading.Semaphore(0), threading.Event()
    answered: list[bytes] = []

    def answer(request: bytes, _: Context) -> bytes:
        answered.append(request)
        if request == b"long":
            begun.release()
            assert goes_on.wait(PATIENCE_S)
        return request

    with echo_server(answer) as address, grpc.insecure_channel(address) as channel:
        long = [method(channel, POOLED).future(b"long", timeout=PATIENCE_S) for _ in range(2)]
        wait_for(begun, 2)
        late = method(channel, POOLED).future(b"late", timeout=0.05)
        assert late.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        goes_on.set()
        assert [one.result() for one in long] == [b"long"] * 2
        # The threads take calls in order.
        assert [method(channel, POOLED)(b"last", timeout=PATIENCE_S) for _ in range(2)] == [b"last"] * 2
    assert b"late" not in answered


def test_a_full_pool_refuses_nothing_that_is_answered_in_the_loop() -> None:
    begun, goes_on = threading.Semaphore(0), threading.Event()

    def slow(request: bytes, _: Context) -> bytes:
        begun.release()
        assert goes_on.wait(PATIENCE_S)
        return request

    async def at_once(request: bytes) -> bytes:
        return request

    pool, gate, metrics = Pool(1, 1, "slow"), Gate(), Metrics()
    metrics.know_methods(["/t/Batch"])
    methods = [
        Method("/t/Batch", bytes, slow, bytes, pool),
        Method("/t/One", bytes, slow, bytes, pool, in_loop=lambda request, _: at_once(request)),
    ]
    calls = Calls(methods, gate, metrics)
    gate.open()
    kept = begun_server(calls)
    with grpc.insecure_channel(f"127.0.0.1:{kept.port}") as channel:
        first = method(channel, "/t/Batch").future(b"x", timeout=PATIENCE_S)
        wait_for(begun, 1)
        assert method(channel, "/t/One")(b"y", timeout=PATIENCE_S) == b"y"
        with pytest.raises(grpc.RpcError) as refused:
            method(channel, "/t/Batch")(b"x", timeout=PATIENCE_S)
        assert "1 requests wait already" in refused.value.details()
        labels = {"reason": "overload", "method": "/t/Batch"}
        assert metrics.registry.get_sample_value("jaxrec_rejected_calls_total", labels) == 1
        goes_on.set()
        assert first.result() == b"x"
    shared_loop().wait_for(kept.stop())


def test_a_stream_that_is_being_written_to_keeps_its_place_and_the_next_is_refused() -> None:
    streams, those = Open(2), [OnlyCall(connection) for connection in "aab"]
    for call in those[:2]:
        streams.add(call)
        call.last = "writes"
    with pytest.raises(Exception, match="too many streams"):
        streams.add(those[2])
    assert len(streams) == 2


def test_a_stream_that_makes_way_is_counted_until_its_handler_returns() -> None:
    streams, those = Open(1), [OnlyCall(connection) for connection in "abc"]
    streams.add(those[0])
    streams.add(those[1])
    assert (those[0].last, len(streams)) == ("RESOURCE_EXHAUSTED", 2)
    with pytest.raises(Exception, match="too many streams"):
        streams.add(those[2])
    streams.remove(those[0])
    streams.add(those[2])
    assert those[1].last == "RESOURCE_EXHAUSTED"


def test_answers_that_are_being_sent_are_waited_for() -> None:
    size, gate = 200_000, Gate()

    def answer(request: bytes, _: Context) -> bytes:
        return bytes(size)

    gate.open()
    calls = Calls([Method("/t/Long", bytes, answer, bytes, Pool(1, 1, "long"))], gate, Metrics())
    kept = begun_server(calls)
    with RawClient(f"127.0.0.1:{kept.port}", window=2 * size) as client:
        stream = client.call("/t/Long", b"x")
        # The connection has room for 64 KiB.
        assert any(kind == DATA for kind, _, _, _ in client.frames())
        assert gate.wait_until_idle(PATIENCE_S)
        assert not calls.wait_until_sent(0)
        client.give_room(2 * size)
        ended(stream, client)
        assert calls.wait_until_sent(PATIENCE_S)
    shared_loop().wait_for(kept.stop())


def begun_server(calls: Calls) -> KeptServer:
    def open_server(port: int | None) -> tuple[grpc.aio.Server, int]:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((calls,))
        return server, Listener(f"127.0.0.1:{port or 0}").bind(server)

    async def begin() -> KeptServer:
        kept = KeptServer(open_server)
        await kept.start()
        return kept

    return shared_loop().wait_for(begin())
