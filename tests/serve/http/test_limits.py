"""No caller keeps the HTTP door from others, whatever it sends, leaves out, or does not read."""

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import uvicorn
from uvicorn.server import ServerState

from serve.addresses import AddressError
from serve.front.tls import Tls
from serve.http.calls import Calls
from serve.http.connections import BoundedConnection, open_socket
from serve.http.limits import (
    BODY_S,
    FREE_BODY_S,
    HEAD_S,
    MAX_BODIES_BYTES,
    MAX_BODY_BYTES,
    MAX_CALLS,
    MAX_CHECKS,
    MAX_CONNECTIONS,
    MAX_FREE_BYTES,
    MAX_HEAD_BYTES,
    MAX_JSON_BYTES,
    MAX_JSON_OBJECTS,
    UNREAD_S,
)
from serve.stores.base import EventStore
from tests.serve.front.test_security import Authority
from tests.serve.http.asking import TIMEOUT_S, Doors, Opening, ask

RECOMMEND = "/jaxrec.v1.Recommender/Recommend"
CHECK = "/grpc.health.v1.Health/Check"
INFO = "/jaxrec.v1.Recommender/GetModelInfo"
RECORD = "/jaxrec.v1.Recommender/RecordEvents"
EVENT = {"events": [{"eventId": "e", "userId": "u", "itemId": "1007", "timestamp": "1"}]}
HEAD = f"POST {RECOMMEND} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()


def connected(doors: Doors) -> socket.socket:
    return socket.create_connection(("localhost", doors.port), TIMEOUT_S)


def read_to_end(opened: socket.socket) -> bytes:
    """What came until the server ended the connection."""
    content = b""
    try:
        while more := opened.recv(2**16):
            content += more
    except ConnectionResetError:
        pass
    return content


def send_for_ever(opened: socket.socket, content: bytes) -> None:
    while True:
        opened.sendall(content)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < end


@pytest.fixture
def slow_record(store: EventStore) -> Iterator[tuple[threading.Event, threading.Event]]:
    """RecordEvents that says when it has begun, and waits until it may go on."""
    begun, goes_on = threading.Event(), threading.Event()
    record = store.record

    def wait(events: Any) -> Any:
        begun.set()
        assert goes_on.wait(TIMEOUT_S)
        return record(events)

    store.record = wait  # type: ignore[method-assign]
    yield begun, goes_on
    goes_on.set()


@pytest.mark.parametrize(
    ("path", "kind", "most"),
    [
        (RECOMMEND, "application/json", MAX_JSON_BYTES),
        (RECOMMEND, "application/proto", MAX_BODY_BYTES),
        ("/v2/models/jaxrec/infer", "application/json", MAX_JSON_BYTES),
        (CHECK, "application/json", MAX_FREE_BYTES),
        (CHECK, "application/proto", MAX_FREE_BYTES),
    ],
)
def test_a_body_that_is_too_long_is_refused_before_it_comes(doors: Doors, path: str, kind: str, most: int) -> None:
    with connected(doors) as opened:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
        opened.sendall(f"{head}Content-Length: {most + 1}\r\n\r\n".encode())
        answer = http.client.HTTPResponse(opened)
        answer.begin()
        assert answer.status == 413
        said = json.loads(answer.read())
    text = f"expected a body of at most {most} bytes, came a longer one"
    assert text in (said.get("error"), said.get("message"))


def test_a_body_of_unknown_length_is_refused_where_it_gets_too_long(
    doors: Doors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.http.connect.MAX_JSON_BYTES", 1000)
    with connected(doors) as opened:
        opened.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"3e8\r\n" + b" " * 1000 + b"\r\n1\r\n \r\n")
        answer = http.client.HTTPResponse(opened)
        answer.begin()
        assert answer.status == 413


def test_the_longest_body_is_read(doors: Doors) -> None:
    assert ask(doors.port, RECOMMEND, b'{"k": 1, "userId": "u"}'.ljust(MAX_JSON_BYTES)).status == 200
    # An empty message, and many fields that it does not know.
    encoded = {"content-type": "application/proto"}
    assert ask(doors.port, INFO, b"\xf8\x3f\x01" * (MAX_BODY_BYTES // 3), encoded).status == 200


def test_a_history_of_ten_thousand_events_is_answered(doors: Doors) -> None:
    events = [{"itemId": "1007", "timestamp": at + 1} for at in range(10_000)]
    assert ask(doors.port, RECOMMEND, {"history": {"events": events}, "k": 1}).status == 200


@pytest.mark.parametrize(("path", "limit"), [(RECOMMEND, "BODY_S"), (CHECK, "FREE_BODY_S")])
def test_a_body_that_does_not_come(doors: Doors, path: str, limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"serve.http.connect.{limit}", 0.1)
    with connected(doors) as opened:
        opened.sendall(HEAD.replace(RECOMMEND.encode(), path.encode()) + b"Content-Length: 10\r\n\r\n{")
        answer = http.client.HTTPResponse(opened)
        answer.begin()
        assert (answer.status, json.loads(answer.read())["code"]) == (408, "deadline_exceeded")


def test_all_bodies_together_are_limited(doors: Doors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.http.bodies.MAX_BODIES_BYTES", 1000)
    said = ask(doors.port, RECOMMEND, b" " * 1001)
    assert (said.status, said.headers["retry-after"], said.json["code"]) == (429, "1", "resource_exhausted")
    assert said.json["message"] == "the requests that are being read have 1000 bytes, try again"
    assert "google.rpc.RetryInfo" in [detail["type"] for detail in said.json["details"]]
    # What was refused is not held.
    assert ask(doors.port, RECOMMEND, {"userId": "u"}).status == 200


@pytest.mark.parametrize("sent", [b"", b"GET / HT", HEAD[:60]])
def test_a_head_that_does_not_come(doors: Doors, sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.http.connections.HEAD_S", 0.1)
    with connected(doors) as opened:
        opened.sendall(sent)
        assert read_to_end(opened) == b""


def test_a_second_head_that_does_not_come(doors: Doors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.http.connections.HEAD_S", 0.1)
    with connected(doors) as opened:
        opened.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert opened.recv(2**16).startswith(b"HTTP/1.1 200")
        opened.sendall(b"GET /heal")
        assert b"HTTP" not in read_to_end(opened)


def test_a_body_that_goes_on_after_its_refusal_ends_the_connection(
    doors: Doors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.http.connections.HEAD_S", 0.1)
    with connected(doors) as opened:
        opened.sendall(HEAD + f"Content-Length: {MAX_BODY_BYTES + 10**9}\r\n\r\n".encode())
        with pytest.raises(ConnectionError):
            send_for_ever(opened, b" " * 2**16)


def test_an_answer_that_nobody_reads_is_dropped(doors: Doors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.http.connections.UNREAD_S", 0.1)
    with connected(doors) as opened:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**12)
        with pytest.raises(ConnectionError):
            send_for_ever(opened, b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 10)


@pytest.mark.parametrize("sent", [b"", b"GET / HT", HEAD + b"Content-Length: 9\r\n\r\n{"])
def test_connections_that_send_no_whole_request_keep_nobody_out(
    doors: Doors, sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.http.connections.MAX_CONNECTIONS", 3)
    waiting = [connected(doors) for _ in range(3)]
    try:
        for opened in waiting:
            opened.sendall(sent)
        for _ in range(2):
            assert ask(doors.port, "/healthz").status == 200
        assert read_to_end(waiting[0]) == b""
    finally:
        for opened in waiting:
            opened.close()


def test_connections_that_read_no_answer_keep_nobody_out(doors: Doors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.http.connections.MAX_CONNECTIONS", 3)
    paused = threading.Semaphore(0)
    pause = BoundedConnection.pause_writing

    def counted(self: BoundedConnection) -> None:
        pause(self)
        paused.release()

    monkeypatch.setattr(BoundedConnection, "pause_writing", counted)
    waiting = []
    try:
        for _ in range(3):
            opened = connected(doors)
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**12)
            opened.settimeout(0)
            waiting.append(opened)
            while not paused.acquire(blocking=False):
                with contextlib.suppress(BlockingIOError):
                    opened.send(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert ask(doors.port, "/healthz").status == 200
    finally:
        for opened in waiting:
            opened.close()


def test_a_burst_of_connections_stays_within_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them come in one turn of the loop."""
    monkeypatch.setattr("serve.http.connections.MAX_CONNECTIONS", 3)
    state = ServerState()

    class Ended(asyncio.Transport):
        ended = False

        def abort(self) -> None:
            self.ended = True

    async def burst() -> list[bool]:
        config = uvicorn.Config(lambda: None, ws="none", lifespan="off")
        config.load()
        opened = [Ended() for _ in range(10)]
        for transport in opened:
            BoundedConnection(config, state, {}).connection_made(transport)
        return [transport.ended for transport in opened]

    assert sorted(asyncio.run(burst())) == [False] * 3 + [True] * 7
    assert len(state.connections) == 3


def test_a_tls_handshake_that_does_not_come(opening: Opening, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.http.connections.HEAD_S", 0.1)
    certificate, key = Authority(tmp_path / "authority").issue("localhost")
    with opening(tls=Tls(certificate, key)) as doors, connected(doors) as opened:
        assert read_to_end(opened) == b""


def test_idle_connections_keep_nobody_out(doors: Doors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.http.connections.MAX_CONNECTIONS", 3)
    idle = [connected(doors) for _ in range(3)]
    try:
        # In the order in which they came, so that the first is the one that waits for the longest time.
        assert ask(doors.port, "/healthz").status == 200
        assert read_to_end(idle[0]) == b""
        idle[2].sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert idle[2].recv(2**16).startswith(b"HTTP/1.1 200")
    finally:
        for opened in idle:
            opened.close()


def test_too_many_calls_are_told_to_come_again_and_health_is_answered(
    doors: Doors, slow_record: tuple[threading.Event, threading.Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.http.calls.MAX_CALLS", 1)
    begun, goes_on = slow_record
    said: list[int] = []
    waiting = threading.Thread(target=lambda: said.append(ask(doors.port, RECORD, EVENT).status))
    waiting.start()
    assert begun.wait(TIMEOUT_S)
    refused = ask(doors.port, RECOMMEND, {"userId": "u"})
    assert (refused.status, refused.json["code"], refused.headers["retry-after"]) == (429, "resource_exhausted", "1")
    assert ask(doors.port, "/healthz").status == ask(doors.port, "/v2/health/ready").status == 200
    goes_on.set()
    waiting.join(TIMEOUT_S)
    assert said == [200]
    assert ask(doors.port, RECOMMEND, {"userId": "u"}).status == 200


def test_checks_take_no_room_from_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server whose checks do not end answers a call."""
    monkeypatch.setattr("serve.http.calls.MAX_CALLS", 1)
    begun, goes_on = threading.Event(), threading.Event()

    class Handlers(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
            def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
                begun.set()
                return str(details.method != CHECK or goes_on.wait(TIMEOUT_S)).encode()

            return grpc.unary_unary_rpc_method_handler(answer)

    async def ask_both(address: str) -> list[bytes]:
        calls = Calls(address)
        checks = [asyncio.ensure_future(calls.call(CHECK, b"", is_check=True)) for _ in range(2 * MAX_CHECKS)]
        assert await asyncio.to_thread(begun.wait, TIMEOUT_S)
        answer, _ = await calls.call(RECOMMEND, b"")
        assert not any(check.done() for check in checks)
        goes_on.set()
        found = [answer, *(content for content, _ in await asyncio.gather(*checks))]
        calls.close()
        return found

    server = grpc.server(ThreadPoolExecutor(2 * MAX_CHECKS), handlers=[Handlers()])
    port = server.add_insecure_port("localhost:0")
    server.start()
    try:
        assert asyncio.run(ask_both(f"localhost:{port}")) == [b"True"] * (2 * MAX_CHECKS + 1)
    finally:
        goes_on.set()
        server.stop(None).wait()


def test_the_call_of_a_client_that_is_gone_is_cancelled(
    doors: Doors, slow_record: tuple[threading.Event, threading.Event]
) -> None:
    begun, _ = slow_record
    with connected(doors) as opened:
        body = json.dumps(EVENT).encode()
        opened.sendall(
            HEAD.replace(b"/Recommend ", b"/RecordEvents ") + f"Content-Length: {len(body)}\r\n\r\n".encode()
        )
        opened.sendall(body)
        assert begun.wait(TIMEOUT_S)
        assert doors.http.calls.under_way == 1
    # It still runs in the server, and nobody waits for it.
    wait_for(lambda: doors.http.calls.under_way == 0)


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 2**17 + b"\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"GET \xff HTTP/1.1\r\nHost: a\r\n\r\n",
        b"\x00" * 100 + b"\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nnonsense\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 30 + b"\r\n\r\n",
    ],
)
def test_what_is_not_http_ends_the_connection_and_nothing_else(
    doors: Doors, sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with connected(doors) as opened:
        try:
            opened.sendall(sent)
            opened.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the server ended it first
        said = read_to_end(opened)
    assert said == b"" or said.startswith(b"HTTP/1.1 4")
    assert ask(doors.port, "/healthz").status == 200
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_an_upgrade_is_not_taken(doors: Doors) -> None:
    said = ask(doors.port, "/healthz", headers={"connection": "Upgrade", "upgrade": "websocket"})
    assert said.status == 200


def test_connections_send_at_once() -> None:
    with open_socket("localhost:0") as opened, socket.create_connection(opened.getsockname()[:2]):
        accepted, _ = opened.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_the_limits_are_those_of_the_docs() -> None:
    text = " ".join((Path(__file__).parents[3] / "docs" / "http.md").read_text("utf-8").split())
    for limit in (
        f"{MAX_JSON_BYTES // 2**20} MiB of JSON or {MAX_BODY_BYTES // 2**20} MiB of an encoded message",
        f"at most {MAX_JSON_OBJECTS} objects",
        f"{MAX_BODIES_BYTES // 2**20} MiB for the bodies of all requests",
        f"{MAX_HEAD_BYTES // 2**10} KiB for request line and headers, {MAX_CONNECTIONS} connections, {MAX_CALLS} calls",
        f"within {HEAD_S:g} seconds, its body within {BODY_S:g}, and an answer has to be read within {UNREAD_S:g}",
        f"{MAX_FREE_BYTES // 2**10} KiB within {FREE_BODY_S:g} seconds",
    ):
        assert limit in text


def test_other_doors_cannot_be_opened_at_the_same_port(doors: Doors) -> None:
    with pytest.raises(AddressError, match="cannot listen on localhost"):
        open_socket(f"localhost:{doors.port}")
