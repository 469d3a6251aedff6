"""Who sends no message or takes no answer keeps neither threads nor much memory."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from serve.api.context import Context
from serve.front import calls, waiting
from serve.front.waiting import Open, Unreceived
from serve.observability.metrics import Metrics
from tests.serve.front.echo import AT_ONCE, PATIENCE_S, POOLED, SLOW, echo_server, method, wait_for
from tests.serve.front.http2 import (
    DATA,
    END_STREAM,
    HEADERS,
    INITIAL_WINDOW,
    INITIAL_WINDOW_SIZE,
    RST_STREAM,
    RawClient,
)

MOST_POOLED = 3


def counting(answered: threading.Semaphore) -> Callable[[bytes, Context], bytes]:
    def answer(request: bytes, _: Context) -> bytes:
        answered.release()
        return request

    return answer


def ended(stream: int, client: RawClient) -> bytes:
    """The headers and data that came on a stream until it ended."""
    found = b""
    for kind, flags, about, content in client.frames():
        if about == stream:
            found += content
            if kind == RST_STREAM or (kind == HEADERS and flags & END_STREAM):
                return found
    raise AssertionError("the connection ended before the stream")


def test_answers_that_are_not_taken_keep_no_place_in_the_pool() -> None:
    answered = threading.Semaphore(0)
    with (
        echo_server(counting(answered), most_pooled=MOST_POOLED) as address,
        RawClient(address, window=0) as stranger,
    ):
        for _ in range(MOST_POOLED):
            stranger.call(POOLED, b"x")
        wait_for(answered, MOST_POOLED)
        with grpc.insecure_channel(address) as channel:
            for _ in range(MOST_POOLED):
                assert method(channel, POOLED)(b"y", timeout=PATIENCE_S) == b"y"


@pytest.mark.parametrize("limit", ["MOST_UNSENT", "MOST_UNSENT_BYTES"])
def test_a_connection_that_does_not_read_gets_no_more_answers_and_others_do(
    limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, limit, 1)
    answered = threading.Semaphore(0)
    with echo_server(counting(answered)) as address, RawClient(address, window=0) as stranger:
        stranger.call(SLOW, b"x")
        wait_for(answered, 1)
        # Once this is answered, the first one's answer is counted.
        with grpc.insecure_channel(address) as channel:
            assert method(channel, SLOW)(b"y", timeout=PATIENCE_S) == b"y"
            wait_for(answered, 1)
            # RESOURCE_EXHAUSTED.
            assert b"grpc-status\x018" in ended(stranger.call(POOLED, b"x"), stranger)
            assert method(channel, POOLED)(b"y", timeout=PATIENCE_S) == b"y"


def test_answers_that_are_taken_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "MOST_UNSENT", 1)
    with echo_server() as address, grpc.insecure_channel(address) as channel:
        answered = 0
        while answered < 50:
            call = method(channel, POOLED).future(b"y", timeout=PATIENCE_S)
            # What the client has already is counted until the server has seen the call off.
            answered += call.exception() is None or call.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED
        assert call.result() == b"y"


def test_an_answer_that_is_not_taken_goes_with_its_old_connection() -> None:
    answered = threading.Semaphore(0)
    options = [("grpc.max_connection_age_ms", 500), ("grpc.max_connection_age_grace_ms", 100)]
    with (
        echo_server(counting(answered), options=options) as address,
        RawClient(address, window=0) as stranger,
    ):
        stranger.call(POOLED, b"x")
        wait_for(answered, 1)
        assert DATA not in [kind for kind, _, _, _ in stranger.frames()]
        with grpc.insecure_channel(address) as channel:
            assert method(channel, POOLED)(b"y", timeout=PATIENCE_S) == b"y"


@pytest.mark.parametrize("name", [AT_ONCE, POOLED, SLOW])
@pytest.mark.parametrize("limit", ["MESSAGE_S", "YIELD_S", "MOST_IN_LINE"])
def test_a_call_whose_message_does_not_come_is_ended(name: str, limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    short = "SHORT_" if name == AT_ONCE else ""
    monkeypatch.setattr(calls, "MOST_SHORT_RECEIVING" if short else "MOST_RECEIVING", 1)
    monkeypatch.setattr(calls, f"{short}YIELD_S", PATIENCE_S)
    monkeypatch.setattr(calls, limit if limit == "MOST_IN_LINE" else short + limit, 0)
    metrics = Metrics()
    with echo_server(metrics=metrics) as address, RawClient(address) as stranger:
        streams = [stranger.call(name), stranger.call(name)]
        # The first is waited for, the second is in line.
        stream = streams[limit == "MOST_IN_LINE"]
        assert b"grpc-status\x01" + (b"4" if limit == "MESSAGE_S" else b"8") in ended(stream, stranger)
        labels = {"reason": "no_message", "method": name}
        assert metrics.registry.get_sample_value("jaxrec_rejected_calls_total", labels)


class OnlyCall:
    """A call that notes what is called."""

    def __init__(self, connection: str) -> None:
        self._connection = connection
        self.last = ""

    def peer(self) -> str:
        return self._connection

    def method_name(self) -> str:
        return POOLED

    def receive(self) -> None:
        self.last = "receive"

    def is_written_to(self) -> bool:
        return self.last == "writes"

    def give_up(self, code: grpc.StatusCode, details: str) -> None:
        self.last = code.name


def test_connections_take_turns_in_line() -> None:
    unreceived = Unreceived(1, PATIENCE_S, PATIENCE_S, 3, lambda _: None)
    those = [OnlyCall(connection) for connection in "xaaab"]
    for call in those:
        unreceived.add(call)
    # One too many: of those of `a`, which has most.
    assert [call.last for call in those] == ["receive", "RESOURCE_EXHAUSTED", "", "", ""]
    for done, following in ((0, 2), (2, 4), (4, 3)):
        assert those[following].last == ""
        unreceived.remove(those[done])
        assert those[following].last == "receive"


def test_of_open_streams_the_oldest_of_the_greediest_makes_way() -> None:
    streams = Open(3)
    those = [OnlyCall(connection) for connection in "baaab"]
    for call in those[:4]:
        streams.add(call)
    assert [call.last for call in those] == ["", "RESOURCE_EXHAUSTED", "", "", ""]
    streams.remove(those[2])
    streams.add(those[4])
    assert [call.last for call in those] == ["", "RESOURCE_EXHAUSTED", "", "", ""]


def test_of_late_calls_those_of_the_greediest_make_way_and_short_ones_only_for_short_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calls, "YIELD_S", 0)
    monkeypatch.setattr(calls, "MOST_RECEIVING", 3)
    monkeypatch.setattr(calls, "MOST_SHORT_RECEIVING", 1)
    monkeypatch.setattr(calls, "SHORT_YIELD_S", 0)
    answered = threading.Semaphore(0)
    with echo_server(counting(answered)) as address, RawClient(address) as slow, RawClient(address) as greedy:
        oldest = slow.call(POOLED, b"a", announced=2)
        # Once this is answered, that one is there.
        ended(slow.call(AT_ONCE, b""), slow)
        first, *_ = [greedy.call(POOLED) for _ in range(3)]
        assert b"others wait" in ended(first, greedy)
        first, *_ = [greedy.call(AT_ONCE) for _ in range(2)]
        assert b"others wait" in ended(first, greedy)
        slow.finish(oldest, b"b")
        wait_for(answered, 1)
        assert (
            next(content for kind, _, about, content in slow.frames() if (kind, about) == (DATA, oldest))[5:] == b"ab"
        )


def test_no_call_is_lost_in_a_long_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "MOST_RECEIVING", 2)
    count = 200
    messages = [b"%d" % number * 20_000 for number in range(count)]
    with echo_server(most_pooled=count) as address, grpc.insecure_channel(address) as channel:
        futures = [method(channel, POOLED).future(message, timeout=PATIENCE_S) for message in messages]
        futures[7].cancel()
        for at, (future, message) in enumerate(zip(futures, messages, strict=True)):
            assert at == 7 or future.result() == message


def test_messages_that_do_not_end_take_a_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "MOST_RECEIVING", 2)
    monkeypatch.setattr(calls, "YIELD_S", 0)
    size, count = 3 * 2**20, 20
    metrics = Metrics()
    labels = {"reason": "no_message", "method": POOLED}
    with echo_server(metrics=metrics) as address, RawClient(address) as stranger:
        before = resident_bytes()
        for _ in range(count):
            stranger.upload(POOLED, size)
        end = time.monotonic() + PATIENCE_S
        while (metrics.registry.get_sample_value("jaxrec_rejected_calls_total", labels) or 0) < count - 2:
            assert time.monotonic() < end
            ended(stranger.call(AT_ONCE, b""), stranger)
        assert resident_bytes() - before < count * size / 3
        # What was not asked for has no more room than HTTP/2 gives at first.
        assert max(settings.get(INITIAL_WINDOW_SIZE, 0) for settings in stranger.settings) <= INITIAL_WINDOW


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
