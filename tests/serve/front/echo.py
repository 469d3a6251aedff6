"""A server whose methods return what they are sent, on the path of all calls."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import grpc

from serve.api.context import Context
from serve.front.calls import Calls, Method
from serve.front.gate import Gate
from serve.front.limits import OPTIONS
from serve.front.loop import shared_loop
from serve.front.pool import Pool
from serve.front.restarts import KeptServer
from serve.front.server import Listener
from serve.observability.metrics import Metrics

PATIENCE_S = 30.0
AT_ONCE, POOLED, SLOW = "/test.Echo/AtOnce", "/test.Echo/Pooled", "/test.Echo/Slow"

Answer = Callable[[bytes, Context], bytes]


def echo(request: bytes, context: Context) -> bytes:
    return request


@contextmanager
def echo_server(
    answer: Answer = echo,
    *,
    most_pooled: int = 256,
    metrics: Metrics | None = None,
    options: Sequence[tuple[str, int]] = (),
) -> Iterator[str]:
    """Its address; `answer` is given the messages of `POOLED`, and those of `SLOW` in a pool of their own."""
    methods = [
        Method(AT_ONCE, bytes, echo, bytes, at_once=True),
        Method(POOLED, bytes, answer, bytes, Pool(2, most_pooled, "pool")),
        Method(SLOW, bytes, answer, bytes, Pool(1, most_pooled, "slow")),
    ]
    metrics = metrics or Metrics()
    metrics.know_methods(method.name for method in methods)
    gate = Gate()
    gate.open()
    calls = Calls(methods, gate, metrics)

    def open_server(port: int | None) -> tuple[grpc.aio.Server, int]:
        server = grpc.aio.server(options=[*options, *OPTIONS])
        server.add_generic_rpc_handlers((calls,))
        return server, Listener(f"127.0.0.1:{port or 0}").bind(server)

    async def begin() -> KeptServer:
        server = KeptServer(open_server)
        calls.begin()
        await server.start()
        return server

    async def end() -> None:
        await server.stop()
        calls.close()

    server = shared_loop().wait_for(begin())
    try:
        yield f"127.0.0.1:{server.port}"
    finally:
        shared_loop().wait_for(end())


def method(channel: grpc.Channel, name: str) -> grpc.UnaryUnaryMultiCallable:
    return channel.unary_unary(name)  # type: ignore[call-arg]


def wait_for(counted: threading.Semaphore, count: int) -> None:
    for _ in range(count):
        assert counted.acquire(timeout=PATIENCE_S)
