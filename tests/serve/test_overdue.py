"""Who sends no message or takes no answer keeps neither threads nor much memory."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import pytest

from serve import overdue
from serve.polling import Front, polling_server
from tests.serve.http2 import DATA, RST_STREAM, RawClient

PATIENCE_S = 30.0
INLINE, POOLED = "/test.Echo/Inline", "/test.Echo/Pooled"
MOST_POOLED = 3


@contextmanager
def echo(front: Front, answered: threading.Semaphore) -> Iterator[str]:
    """The address of a server whose handlers return what they are sent, and count that."""
    server = polling_server(ThreadPoolExecutor(2), ThreadPoolExecutor(1), front)

    def handle(request: bytes, _: grpc.ServicerContext) -> bytes:
        answered.release()
        return request

    handler = grpc.unary_unary_rpc_method_handler(handle)
    server.add_registered_method_handlers("test.Echo", {"Inline": handler, "Pooled": handler})
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
            for _ in range(MOST_POOLED):
                assert channel.unary_unary(POOLED)(b"y", timeout=PATIENCE_S) == b"y"


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
