"""What gRPC promises, of calls that the event loop answers and of those of the pools."""

import re
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import serve
from serve.api.context import Context
from serve.client import Event, RecommenderClient, UserEvent, recommend_request
from serve.front import recommends
from serve.front.calls import Call
from serve.front.loop import shared_loop
from serve.front.server import create_server
from serve.model.recommender import Recommender
from serve.observability.metrics import Metrics
from serve.pb.recommender_pb2 import GetModelInfoRequest
from serve.pb.recommender_pb2_grpc import RecommenderStub
from serve.stores.base import EventStore
from tests.serve.front.echo import AT_ONCE, PATIENCE_S, POOLED, SLOW, echo_server, method
from tests.serve.front.http2 import RawClient
from tests.serve.one_model import one_model

NAMES = [AT_ONCE, POOLED]
HEALTH = health_pb2.HealthCheckRequest()
STATES = health_pb2.HealthCheckResponse


def test_no_private_name_of_grpc_is_used() -> None:
    """Their next release may change it without a word, and 1.80 did."""
    root = Path(serve.__file__).parent
    found = [
        f"{path.relative_to(root)}:{number}"
        for path in sorted(root.rglob("*.py"))
        # What grpcio-tools generated for this release of grpcio.
        if path.parent.name != "pb"
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if re.search(r"\bgrpc\w*(\.\w+)*\._|from grpc\w*(\.\w+)* import .*\b_|cygrpc|_cython", line)
    ]
    assert found == []


@pytest.mark.parametrize("name", NAMES)
def test_calls_that_send_no_message_keep_no_thread(name: str) -> None:
    """Anybody can open them, without a token."""
    never = threading.Event()

    def nothing() -> Iterator[bytes]:
        never.wait(PATIENCE_S)
        yield from ()

    with echo_server() as address, grpc.insecure_channel(address) as channel:
        half_open = [channel.stream_unary(one).future(nothing()) for one in NAMES for _ in range(6)]
        try:
            # On the same connection and after them.
            assert method(channel, name)(b"x", timeout=PATIENCE_S) == b"x"
            assert not any(call.done() for call in half_open)
        finally:
            for call in half_open:
                call.cancel()
            never.set()


def test_a_call_that_ends_without_a_message_is_unimplemented() -> None:
    with echo_server() as address, grpc.insecure_channel(address) as channel:
        with pytest.raises(grpc.RpcError) as failure:
            channel.stream_unary(POOLED)(iter(()), timeout=PATIENCE_S)
        assert failure.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert failure.value.details() == "expected one request message, came none"


@pytest.mark.parametrize("name", NAMES)
def test_a_message_that_is_too_long_is_refused(name: str) -> None:
    options = [("grpc.max_receive_message_length", 1000)]
    with echo_server(options=options) as address, grpc.insecure_channel(address) as channel:
        with pytest.raises(grpc.RpcError) as failure:
            method(channel, name)(b"x" * 1001, timeout=PATIENCE_S)
        assert failure.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert method(channel, name)(b"x" * 1000, timeout=PATIENCE_S) == b"x" * 1000


def test_an_unknown_method_is_unimplemented() -> None:
    with echo_server() as address, grpc.insecure_channel(address) as channel:
        with pytest.raises(grpc.RpcError) as failure:
            method(channel, "/test.Echo/Absent")(b"", timeout=PATIENCE_S)
        assert failure.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_full_pool_turns_calls_away_with_a_hint_and_answers_all_others() -> None:
    started, goes_on = threading.Event(), threading.Event()

    def wait(request: bytes, _: Context) -> bytes:
        if request == b"1":
            started.set()
            assert goes_on.wait(PATIENCE_S)
        return request

    with echo_server(wait, most_pooled=1) as address, grpc.insecure_channel(address) as channel:
        first = method(channel, POOLED).future(b"1", timeout=PATIENCE_S)
        assert started.wait(PATIENCE_S)
        with pytest.raises(grpc.RpcError) as refused:
            method(channel, POOLED)(b"2", timeout=PATIENCE_S)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "grpc-status-details-bin" in dict(refused.value.trailing_metadata())
        assert method(channel, AT_ONCE)(b"x", timeout=PATIENCE_S) == b"x"
        # Slow calls have threads of their own.
        assert method(channel, SLOW)(b"2", timeout=PATIENCE_S) == b"2"
        goes_on.set()
        assert first.result() == b"1"
        # There is room again.
        assert method(channel, POOLED)(b"3", timeout=PATIENCE_S) == b"3"


def test_a_cancelled_call_in_the_pool_knows_it_and_makes_room() -> None:
    started, ended = threading.Event(), threading.Event()

    def wait(request: bytes, context: Context) -> bytes:
        if request == b"1":
            started.set()
            end = time.monotonic() + PATIENCE_S
            while context.is_active():
                assert time.monotonic() < end
            ended.set()
        return request

    metrics = Metrics()
    with echo_server(wait, most_pooled=1, metrics=metrics) as address, grpc.insecure_channel(address) as channel:
        call = method(channel, POOLED).future(b"1", timeout=PATIENCE_S)
        assert started.wait(PATIENCE_S)
        call.cancel()
        assert ended.wait(PATIENCE_S)
        end = time.monotonic() + PATIENCE_S
        while True:
            second = method(channel, POOLED).future(b"2", timeout=PATIENCE_S)
            if second.exception() is None:
                break
            assert second.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert time.monotonic() < end
    labels = {"method": POOLED, "code": "CANCELLED"}
    assert metrics.registry.get_sample_value("jaxrec_rpc_seconds_count", labels) == 1


def test_a_call_knows_its_deadline_and_ends_when_it_passed() -> None:
    remaining: list[float | None] = []

    def wait(request: bytes, context: Context) -> bytes:
        remaining.append(context.time_remaining())
        if request == b"late":
            end = time.monotonic() + PATIENCE_S
            while context.is_active():
                assert time.monotonic() < end
        return request

    metrics = Metrics()
    with echo_server(wait, metrics=metrics) as address, grpc.insecure_channel(address) as channel:
        assert method(channel, POOLED)(b"x") == b"x"
        assert method(channel, POOLED)(b"x", timeout=PATIENCE_S) == b"x"
        with pytest.raises(grpc.RpcError) as late:
            method(channel, POOLED)(b"late", timeout=0.1)
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert remaining[0] is None
    # gRPC rounds a deadline up.
    assert remaining[1] is not None
    assert 0 < remaining[1] <= PATIENCE_S + 1


def test_a_client_that_keeps_to_the_limit_of_its_connection_is_never_refused() -> None:
    """What is over for the client may not be over for the server yet, and must not count."""
    limit, rounds = 4, 400
    # Without retries, which hide a refusal.
    options = [("grpc.enable_retries", 0)]
    with (
        echo_server(options=[("grpc.max_concurrent_streams", limit)]) as address,
        grpc.insecure_channel(address, options) as channel,
        ThreadPoolExecutor(limit) as callers,
    ):

        def ask(_: int) -> int:
            return sum(method(channel, POOLED)(b"x", timeout=PATIENCE_S) == b"x" for _ in range(rounds))

        assert list(callers.map(ask, range(limit))) == [rounds] * limit


def test_watching_a_client_that_does_not_read_holds_up_no_other(model: Recommender, store: EventStore) -> None:
    server = create_server(one_model(model, store), store, "127.0.0.1:0")
    server.listen()
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watches = [stub.Watch(HEALTH, timeout=PATIENCE_S) for _ in range(20)]
        assert [next(watch).status for watch in watches] == [STATES.NOT_SERVING] * 20
        # Nobody reads these; the last is what counts.
        for at in range(41):
            server.start() if at % 2 == 0 else server.finish_calls(0)
        for watch in watches:
            while next(watch).status != STATES.SERVING:
                pass
            watch.cancel()
        assert stub.Check(HEALTH, timeout=PATIENCE_S).status == STATES.SERVING
        listed = stub.List(health_pb2.HealthListRequest(), timeout=PATIENCE_S).statuses
        assert listed[""].status == STATES.SERVING
    server.drain()


def test_more_watches_than_may_be_open_end_the_oldest(
    model: Recommender, store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.front.calls.MAX_WATCHES", 3)
    server = create_server(one_model(model, store), store, "127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watches = []
        for _ in range(4):
            watches.append(stub.Watch(HEALTH, timeout=PATIENCE_S))
            assert next(watches[-1]).status == STATES.SERVING
        assert watches[0].code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert all(watch.is_active() for watch in watches[1:])
        for watch in watches[1:]:
            watch.cancel()
    server.drain()


def test_calls_that_are_there_go_together_and_get_their_own_answers(model: Recommender, store: EventStore) -> None:
    metrics = Metrics()
    server = create_server(one_model(model, store, metrics), store, "127.0.0.1:0", metrics=metrics)
    server.start()
    ids = model.catalog.item_ids
    histories = [
        [Event(item_id=ids[1 + (number * step) % 60], rating=4.0, timestamp=step) for step in range(1, 2 + number % 40)]
        for number in range(200)
    ]
    requests = [recommend_request(history=history, k=7) for history in histories]
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = RecommenderStub(channel)
        alone = [stub.Recommend(request, timeout=PATIENCE_S) for request in requests]
        before = metrics.registry.get_sample_value("jaxrec_batch_size_count") or 0
        # The loop is busy until they are sent, as many as the connection has room for.
        sent = threading.Event()
        shared_loop().loop.call_soon_threadsafe(sent.wait, PATIENCE_S)
        calls = [stub.Recommend.future(request, timeout=PATIENCE_S) for request in requests]
        sent.set()
        together = [call.result() for call in calls]
    server.drain()
    for one, other in zip(alone, together, strict=True):
        assert [item.item_id for item in one.recommendations] == [item.item_id for item in other.recommendations]
        np.testing.assert_allclose(
            [item.score for item in one.recommendations], [item.score for item in other.recommendations], atol=1e-5
        )
    assert metrics.registry.get_sample_value("jaxrec_batch_size_count") - before < 200  # type: ignore[operator]


def test_a_lone_call_for_a_state_in_memory_is_answered_by_the_loop(
    model: Recommender, store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a busy machine a run may take long.
    monkeypatch.setattr(recommends, "LONGEST_RUN_IN_LOOP_S", PATIENCE_S)
    asked: list[str] = []
    at_once = store.revisions_at_once

    def revisions_at_once(user_ids: Sequence[str]) -> dict[str, int] | None:
        asked.append(threading.current_thread().name)
        return at_once(user_ids)

    monkeypatch.setattr(store, "revisions_at_once", revisions_at_once)
    in_threads: list[str] = []
    of_threads = store.revisions

    def revisions(user_ids: Sequence[str]) -> dict[str, int]:
        in_threads.append(threading.current_thread().name)
        return of_threads(user_ids)

    monkeypatch.setattr(store, "revisions", revisions)
    ids = model.catalog.item_ids
    server = create_server(one_model(model, store), store, "127.0.0.1:0")
    server.start()
    with RecommenderClient(f"127.0.0.1:{server.port}") as client:

        def record(number: int) -> None:
            client.record_events([UserEvent(event_id=str(number), user_id="u", item_id=ids[number], timestamp=number)])

        record(1)
        first = client.recommend(user_id="u", k=3)
        # The first run for a state in memory is made in a thread: it is not known how long one takes.
        assert client.recommend(user_id="u", k=3).recommendations == first.recommendations
        assert asked == []
        in_threads.clear()
        assert client.recommend(user_id="u", k=3).recommendations == first.recommendations
        assert (asked, in_threads) == (["grpc-loop"], [])
        # What is new takes more than a step, and the answer counts it.
        record(2)
        assert ids[2] not in [one.item_id for one in client.recommend(user_id="u", k=50).recommendations]
        assert (len(asked), len(in_threads)) == (2, 1)
        assert not in_threads[0].startswith("grpc-loop")
    server.drain()


def test_a_server_listens_on_a_unix_socket_too(model: Recommender, store: EventStore, tmp_path: Path) -> None:
    socket = f"unix:{tmp_path}/grpc.sock"
    server = create_server(one_model(model, store), store, "127.0.0.1:0", also_listen=[socket])
    server.start()
    for address in (socket, f"127.0.0.1:{server.port}"):
        with grpc.insecure_channel(address) as channel:
            info = RecommenderStub(channel).GetModelInfo(GetModelInfoRequest(), timeout=PATIENCE_S)
            assert info.item_count == len(model.catalog)
    server.drain()


def test_a_second_message_is_not_read() -> None:
    with echo_server() as address, RawClient(address) as client:
        stream = client.call(POOLED, b"x", announced=1)
        client.finish(stream, b"\0\0\0\0\1y")
        frames = client.frames()
        content = b""
        while b"grpc-status\x010" not in content:
            content += next(frames)[3]
        assert b"\0\0\0\0\1x" in content
        assert b"\0\0\0\0\1y" not in content


def test_no_call_fails_when_a_connection_gets_too_old() -> None:
    peers: list[str] = []

    def note(request: bytes, context: Context) -> bytes:
        assert isinstance(context, Call)
        peers.append(context.peer())
        return request

    options = [("grpc.max_connection_age_ms", 100), ("grpc.max_connection_age_grace_ms", 10_000)]
    with (
        echo_server(note, options=options) as address,
        grpc.insecure_channel(address) as channel,
        ThreadPoolExecutor(4) as callers,
    ):
        ends = time.monotonic() + PATIENCE_S

        def ask(_: int) -> None:
            while len(set(peers)) < 4 and time.monotonic() < ends:
                assert method(channel, POOLED)(b"x", timeout=PATIENCE_S) == b"x"

        list(callers.map(ask, range(4)))
    assert len(set(peers)) >= 4
