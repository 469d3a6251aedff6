"""Connections of the HTTP door: how many there may be, and how long each may take over what it sends and reads."""

import asyncio
import logging
import socket
import ssl
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from serve.addresses import AddressError, host_and_port
from serve.http.limits import CLOSE_S, HEAD_S, IDLE_S, MAX_CONNECTIONS, MAX_HEAD_BYTES, UNREAD_S

logger = logging.getLogger(__name__)

BACKLOG = 128
# Threads that convert long messages. All of them run in turn in any case.
CONVERTERS = 2


class BoundedConnection(H11Protocol):
    """uvicorn's, with limits that it leaves to a proxy.

    A connection is ended that takes too long over the head of a request, or leaves an answer unread. One connection too
    many ends the one that has waited for its client for the longest time, so that those who send or read nothing keep
    nobody out.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None
        self.waits_since = 0.0

    @property
    def is_idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def waits(self) -> bool:
        """Whether it is the client's turn: to send a request or the rest of one, or to read the answer."""
        return self.is_idle or self.cycle.more_body or self.flow.write_paused

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.waits_since = self.loop.time()
        self._watch_head()
        if len(self.connections) > MAX_CONNECTIONS:
            waiting = [one for one in self.connections if isinstance(one, BoundedConnection) and one.waits]
            # This one waits, too.
            oldest = min(waiting, key=lambda one: one.waits_since)
            # It ends in the next turn of the loop, and more may come in this one.
            self.connections.discard(oldest)
            oldest.transport.abort()

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self.waits_since = self.loop.time()
        self._watch_head()

    def on_response_complete(self) -> None:
        self.waits_since = self.loop.time()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_timer, self._unread_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        self._unread_timer = self.loop.call_later(UNREAD_S, self.transport.abort)
        super().pause_writing()

    def resume_writing(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        # Within a request it is too late to say so.
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.abort()

    def _watch_head(self) -> None:
        if not self.is_idle:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_S, self.transport.abort)


class Loop(asyncio.SelectorEventLoop):
    """asyncio's, with a limit for the TLS handshake that uvicorn leaves at a minute."""

    async def create_server(self, *args: Any, **kwargs: Any) -> asyncio.Server:
        if kwargs.get("ssl") is not None:
            kwargs["ssl_handshake_timeout"] = HEAD_S
        return await super().create_server(*args, **kwargs)


class Door:
    """An ASGI app on a socket that is already open, in a thread with an event loop of its own."""

    def __init__(
        self, app: Any, opened: socket.socket, tls: ssl.SSLContext | None, on_failure: Callable[[], None]
    ) -> None:
        self.port: int = opened.getsockname()[1]
        self._socket = opened
        self._on_failure = on_failure
        config = uvicorn.Config(
            app,
            http=BoundedConnection,
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_config=None,
            # What strangers send is not worth a line; the app logs its own failures.
            log_level=logging.CRITICAL,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            timeout_keep_alive=IDLE_S,
            timeout_graceful_shutdown=CLOSE_S,
            backlog=BACKLOG,
            ssl_context_factory=None if tls is None else lambda config, default: tls,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)

    def start(self) -> None:
        """Begins to answer."""
        self._thread.start()

    def close(self) -> None:
        """Takes no new connections, sends what is being answered, and ends."""
        self._server.should_exit = True
        if self._thread.ident is None:
            self._socket.close()
        else:
            self._thread.join()

    def _run(self) -> None:
        async def serve() -> None:
            asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(CONVERTERS, "http-json"))
            await self._server.serve([self._socket])

        try:
            with asyncio.Runner(loop_factory=Loop) as runner:
                runner.run(serve())
        except BaseException:
            logger.exception("the HTTP door failed")
        if not self._server.should_exit:
            self._on_failure()


def open_socket(address: str, shared_port: bool = False) -> socket.socket:
    """A socket that is bound to HOST:PORT, with port 0 to a free one; raises AddressError."""
    host, port = host_and_port(address)
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        both = host == "::" and socket.has_dualstack_ipv6()
        opened = socket.create_server(
            (host, port), family=family, reuse_port=shared_port, dualstack_ipv6=both, backlog=BACKLOG
        )
        # Connections inherit it. asyncio sets it only if the socket names its protocol. Without it the body of an
        # answer waits some 40 ms for the client to acknowledge the head.
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return opened
    except OSError as error:
        raise AddressError(f"cannot listen on {address}: {error.strerror}") from error
