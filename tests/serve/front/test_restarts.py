"""A path that is not UTF-8 makes gRPC's asyncio server fail; another takes its place."""

import asyncio
import ssl
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serve.addresses import AddressError
from serve.api.context import Context
from serve.front import restarts
from serve.front.loop import shared_loop
from serve.front.restarts import KeptServer
from serve.front.server import Listener, create_server
from serve.front.tls import Tls
from serve.model.recommender import Recommender
from serve.observability.metrics import Metrics
from serve.stores.base import EventStore
from tests.serve.front.echo import PATIENCE_S, POOLED, echo_server, method, wait_for
from tests.serve.front.http2 import RawClient
from tests.serve.one_model import one_model

PATHS = [b"/\xff", b"/test.Echo/Pooled\xfe", b"\xc3"]
SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("path", PATHS)
def test_a_path_that_is_not_utf8_ends_neither_the_server_nor_the_calls_under_way(path: bytes) -> None:
    begun, goes_on = threading.Semaphore(0), threading.Event()

    def answer(request: bytes, _: Context) -> bytes:
        if request == b"long":
            begun.release()
            assert goes_on.wait(PATIENCE_S)
        return request

    with echo_server(answer) as address, grpc.insecure_channel(address) as before:
        under_way = method(before, POOLED).future(b"long", timeout=PATIENCE_S)
        wait_for(begun, 1)
        with RawClient(address) as stranger:
            stranger.call(path, b"")
            assert list(stranger.frames())
        with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            assert method(channel, POOLED)(b"y", timeout=PATIENCE_S, wait_for_ready=True) == b"y"
            assert not under_way.done()
            goes_on.set()
            assert under_way.result() == b"long"


def test_calls_that_outlast_two_failures_are_unavailable() -> None:
    begun, goes_on = threading.Semaphore(0), threading.Event()

    def answer(request: bytes, _: Context) -> bytes:
        begun.release()
        assert goes_on.wait(PATIENCE_S)
        return request

    with echo_server(answer) as address, grpc.insecure_channel(address) as channel:
        under_way = method(channel, POOLED).future(b"x", timeout=PATIENCE_S)
        wait_for(begun, 1)
        for _ in range(2):
            with connected(address) as stranger:
                stranger.call(PATHS[0], b"")
                assert list(stranger.frames())
        assert under_way.code() is grpc.StatusCode.UNAVAILABLE
        goes_on.set()


@pytest.mark.parametrize("encrypted", [False, True])
def test_a_failed_server_is_replaced_on_all_its_addresses_as_it_was(
    model: Recommender, store: EventStore, tmp_path: Path, encrypted: bool
) -> None:
    authority, metrics, failures = trustme.CA(), Metrics(), threading.Semaphore(0)
    tls = None
    if encrypted:
        issued = authority.issue_cert("localhost")
        tls = Tls(tmp_path / "certificate.pem", tmp_path / "key.pem")
        tls.certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(tls.key)
    socket = f"unix:{tmp_path}/grpc.sock"
    server = create_server(
        one_model(model, store, metrics),
        store,
        Listener("localhost:0", tls=tls),
        also_listen=[socket],
        metrics=metrics,
        on_failure=failures.release,
    )
    server.start()
    address = f"localhost:{server.port}"
    context = ssl.create_default_context()
    authority.configure_trust(context)
    for _ in range(3):
        with connected(address, context if encrypted else None) as stranger:
            stranger.call(PATHS[0], b"")
            assert list(stranger.frames())
        root = authority.cert_pem.bytes()
        options = [("grpc.use_local_subchannel_pool", 1)]
        with (
            grpc.secure_channel(address, grpc.ssl_channel_credentials(root), options)
            if encrypted
            else grpc.insecure_channel(address, options) as channel,
            grpc.insecure_channel(socket, options) as local,
        ):
            for one in (channel, local):
                health = health_pb2_grpc.HealthStub(one)
                request = health_pb2.HealthCheckRequest()
                assert health.Check(request, timeout=PATIENCE_S, wait_for_ready=True).status == SERVING
    assert metrics.registry.get_sample_value("jaxrec_front_restarts_total") == 3
    assert not failures.acquire(blocking=False)
    server.drain()


def test_a_server_that_cannot_be_replaced_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restarts, "LONGEST_REOPENING_S", 0)
    failed = threading.Event()

    def open_server(port: int | None) -> tuple[grpc.aio.Server, int]:
        if port is not None:
            raise AddressError("somebody else has the port")
        server = grpc.aio.server()
        return server, Listener("127.0.0.1:0").bind(server)

    async def begin() -> KeptServer:
        server = KeptServer(open_server, on_failure=failed.set)
        await server.start()
        return server

    server = shared_loop().wait_for(begin())
    with RawClient(f"127.0.0.1:{server.port}") as stranger:
        stranger.call(PATHS[0], b"")
        assert failed.wait(PATIENCE_S)
    shared_loop().wait_for(server.stop())


class FailingServer:
    """Fails at once, and a stop of it waits for `goes_on`."""

    def __init__(self, goes_on: asyncio.Event) -> None:
        self.begun = self.ended = 0
        self.goes_on = goes_on

    async def start(self) -> None: ...

    async def wait_for_termination(self, timeout: float) -> bool:
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")

    async def stop(self, grace: float | None) -> None:
        self.begun += 1
        await self.goes_on.wait()
        self.ended += 1


def test_a_stop_waits_for_the_failed_servers_of_which_one_is_being_ended() -> None:
    """The second failure has the first server ended; the stop comes meanwhile."""
    opened: list[FailingServer] = []

    async def play() -> None:
        goes_on = asyncio.Event()
        goes_on.set()

        def open_server(port: int | None) -> tuple[Any, int]:
            # The first one alone waits.
            opened.append(FailingServer(asyncio.Event() if not opened else goes_on))
            return opened[-1], 1

        server = KeptServer(open_server)
        await server.start()
        while not opened[0].begun:
            await asyncio.sleep(0)
        stop = asyncio.create_task(server.stop())
        for _ in range(20):
            await asyncio.sleep(0)
        assert not stop.done()
        opened[0].goes_on.set()
        await stop

    asyncio.run(play())
    assert [(one.begun, one.ended) for one in opened] == [(1, 1), (1, 1)]


def connected(address: str, tls: ssl.SSLContext | None = None) -> RawClient:
    """A client, once somebody listens."""
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            return RawClient(address, tls=tls)
        except ConnectionError:
            assert time.monotonic() < end
