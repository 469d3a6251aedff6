"""Who sends no message or takes no answer keeps neither threads nor much memory."""

import os
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from serve.front import overdue
from serve.front.overdue import Unreceived
from serve.front.polling import Front, polling_server
from tests.serve.front.http2 import (
    DATA,
    END_STREAM,
    HEADERS,
    INITIAL_WINDOW,
    INITIAL_WINDOW_SIZE,
    RST_STREAM,
    RawClient,
)

PATIENCE_S = 30.0
AT_ONCE, INLINE, POOLED = "/test.Echo/AtOnce", "/test.Echo/Inline", "/test.Echo/Pooled"
MOST_POOLED = 3


@contextmanager
def echo(front: Front, answered: threading.Semaphore) -> Iterator[str]:
    """The address of a server whose handlers return what they are sent, and count that."""
    server = polling_server(ThreadPoolExecutor(2), ThreadPoolExecutor(1), front)

    def handle(request: bytes, _: grpc.ServicerContext) -> bytes:
        answered.release()
        return request

    handler = grpc.unary_unary_rpc_method_handler(handle)
    server.add_registered_method_handlers("test.Echo", {"AtOnce": handler, "Inline": handler, "Pooled": handler})
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    assert server.stop(None).wait(PATIENCE_S)


def wait_for(answered: threading.Semaphore, count: int) -> None:
    for _ in range(count):
        assert answered.acquire(timeout=PATIENCE_S)


def test_answers_that_are_not_taken_keep_no_place_in_the_pool() -> None:
    answered = threading.Semaphore(0)
    with echo(Front(most_in_pool=MOST_POOLED), answered) as address, RawClient(address, window=0) as stranger:
        for _ in range(MOST_POOLED):
            stranger.call(POOLED, b"x")
        wait_for(answered, MOST_POOLED)
        with grpc.insecure_channel(address) as channel:
            call: grpc.UnaryUnaryMultiCallable = channel.unary_unary(POOLED)  # type: ignore[call-arg]
            for _ in range(MOST_POOLED):
                assert call(b"y", timeout=PATIENCE_S) == b"y"


@pytest.mark.parametrize("method", [INLINE, POOLED])
@pytest.mark.parametrize("limit", ["ANSWER_S", "MOST_UNSENT", "MOST_UNSENT_BYTES"])
def test_calls_whose_answer_is_not_taken_are_ended(method: str, limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overdue, limit, 0)
    answered = threading.Semaphore(0)
    with echo(Front([INLINE]), answered) as address, RawClient(address, window=0) as stranger:
        stream = stranger.call(method, b"x")
        kinds = []
        for kind, _, about, _ in stranger.frames():
            kinds += [kind] if about == stream else []
            if kind == RST_STREAM:
                break
        assert RST_STREAM in kinds
        assert DATA not in kinds


def ended(stream: int, client: RawClient) -> bytes:
    """The headers and data that came on a stream until it ended."""
    found = b""
    for kind, flags, about, content in client.frames():
        if about == stream:
            found += content
            if kind == RST_STREAM or (kind == HEADERS and flags & END_STREAM):
                return found
    raise AssertionError("the connection ended before the stream")


@pytest.mark.parametrize("method", [AT_ONCE, INLINE, POOLED])
@pytest.mark.parametrize("limit", ["MESSAGE_S", "YIELD_S", "MOST_IN_LINE"])
def test_a_call_whose_message_does_not_come_is_ended(method: str, limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    short = "SHORT_" if method == AT_ONCE else ""
    monkeypatch.setattr(overdue, "MOST_SHORT_RECEIVING" if short else "MOST_RECEIVING", 1)
    monkeypatch.setattr(overdue, f"{short}YIELD_S", PATIENCE_S)
    monkeypatch.setattr(overdue, limit if limit == "MOST_IN_LINE" else short + limit, 0)
    reported: queue.SimpleQueue[str] = queue.SimpleQueue()
    front = Front([INLINE], [AT_ONCE], on_no_message=reported.put)
    with echo(front, threading.Semaphore(0)) as address, RawClient(address) as stranger:
        streams = [stranger.call(method), stranger.call(method)]
        # The first is waited for, the second is in line.
        stream = streams[limit == "MOST_IN_LINE"]
        assert b"grpc-status\x01" + (b"4" if limit == "MESSAGE_S" else b"8") in ended(stream, stranger)
        assert reported.get(timeout=PATIENCE_S) == method


class OnlyCall:
    """A call that notes what is called."""

    method = POOLED

    def __init__(self, connection: str) -> None:
        self._connection = connection
        self.last = ""

    def peer(self) -> str:
        return self._connection

    def receive(self) -> None:
        self.last = "receive"

    def cancel(self) -> None:
        self.last = "cancel"

    def give_up(self, code: grpc.StatusCode, details: str) -> None:
        self.last = code.name


def test_connections_take_turns_in_line() -> None:
    unreceived = Unreceived(1, PATIENCE_S, PATIENCE_S, 3, lambda _: None)
    calls = [OnlyCall(connection) for connection in "xaaab"]
    for call in calls:
        unreceived.add(call)
    # One too many: of those of `a`, which has most.
    assert [call.last for call in calls] == ["receive", "RESOURCE_EXHAUSTED", "", "", ""]
    for done, following in ((0, 2), (2, 4), (4, 3)):
        assert calls[following].last == ""
        unreceived.remove(calls[done])
        assert calls[following].last == "receive"


def test_of_late_calls_those_of_the_greediest_make_way_and_short_ones_only_for_short_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(overdue, "YIELD_S", 0)
    monkeypatch.setattr(overdue, "MOST_RECEIVING", 3)
    monkeypatch.setattr(overdue, "MOST_SHORT_RECEIVING", 1)
    monkeypatch.setattr(overdue, "SHORT_YIELD_S", 0)
    answered = threading.Semaphore(0)
    with (
        echo(Front([INLINE], [AT_ONCE]), answered) as address,
        RawClient(address) as slow,
        RawClient(address) as greedy,
    ):
        oldest = slow.call(POOLED, b"a", announced=2)
        # Once this is answered, that one is there.
        slow.call(AT_ONCE, b"")
        wait_for(answered, 1)
        first, *_ = [greedy.call(POOLED) for _ in range(3)]
        assert b"grpc-status\x018" in ended(first, greedy)
        first, *_ = [greedy.call(AT_ONCE) for _ in range(2)]
        assert b"grpc-status\x018" in ended(first, greedy)
        slow.finish(oldest, b"b")
        wait_for(answered, 1)
        assert (
            next(content for kind, _, about, content in slow.frames() if (kind, about) == (DATA, oldest))[5:] == b"ab"
        )


def test_no_call_is_lost_in_a_long_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overdue, "MOST_RECEIVING", 2)
    count = 200
    messages = [b"%d" % number * 20_000 for number in range(count)]
    with (
        echo(Front([INLINE], most_in_pool=count), threading.Semaphore(0)) as address,
        grpc.insecure_channel(address) as channel,
    ):
        call: grpc.UnaryUnaryMultiCallable = channel.unary_unary(POOLED)  # type: ignore[call-arg]
        futures = [call.future(message, timeout=PATIENCE_S) for message in messages]
        futures[7].cancel()
        for at, (future, message) in enumerate(zip(futures, messages, strict=True)):
            assert at == 7 or future.result() == message


def test_messages_that_do_not_end_take_a_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overdue, "MOST_RECEIVING", 2)
    monkeypatch.setattr(overdue, "YIELD_S", 0)
    size, count = 3 * 2**20, 20
    ended_calls = threading.Semaphore(0)
    front = Front(on_no_message=lambda _: ended_calls.release())
    with echo(front, threading.Semaphore(0)) as address, RawClient(address) as stranger:
        before = resident_bytes()
        for _ in range(count):
            stranger.upload(POOLED, size)
        wait_for(ended_calls, count - 2)
        assert resident_bytes() - before < count * size / 3
        # What was not asked for has no more room than HTTP/2 gives at first.
        assert max(settings.get(INITIAL_WINDOW_SIZE, 0) for settings in stranger.settings) <= INITIAL_WINDOW


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
