"""The path of every call: token, gate, message, decoding, answer, status; with its request id, metrics, log and trace.

Every method is registered with gRPC as one that takes a stream of requests, which on the wire is the same. So it is up
to this server how many messages it waits for and how long (`serve.front.waiting`), and a call without one costs a
coroutine and not a thread. What answers a call does not know gRPC (`serve.api.context`).
"""

import asyncio
import itertools
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, Self

import grpc
from google.protobuf.message import DecodeError

from serve.api.errors import InvalidRequest, NoRight, NoToken, Refused, Status, status_of
from serve.front.auth import Tokens, needed_right
from serve.front.gate import Gate
from serve.front.limits import LONG_MESSAGE_BYTES, MAX_REFLECTIONS, MAX_WATCHES
from serve.front.pool import Pool, interrupted
from serve.front.waiting import (
    LOOK_S,
    MESSAGE_S,
    MOST_IN_LINE,
    MOST_RECEIVING,
    MOST_SHORT_BYTES,
    MOST_SHORT_RECEIVING,
    SHORT_MESSAGE_S,
    SHORT_YIELD_S,
    YIELD_S,
    Open,
    Unreceived,
    Unsent,
)
from serve.observability.logs import REQUEST_ID
from serve.observability.metrics import UNKNOWN, Metrics
from serve.observability.tracing import Tracer
from serve.serving.batching import RETRY_AFTER_S
from serve.serving.errors import Cancelled, Expired, QueueFull

logger = logging.getLogger(__name__)

REQUEST_ID_KEY = "x-request-id"
LONGEST_REQUEST_ID = 128
SENT_LOOK_S = 0.01


@dataclass(frozen=True, slots=True)
class Method:
    """How the calls of one method are answered."""

    name: str
    """`/package.Service/Method`"""
    decode: Callable[[bytes], Any]
    answer: Callable[[Any, Any], Any]
    """Of a request and a `serve.api.context.Context`; for a stream an asynchronous iterator of responses."""
    encode: Callable[[Any], bytes]
    pool: Pool | None = None
    """Where it is answered; None: in the loop, which must not wait."""
    in_loop: "Callable[[Any, Call], Awaitable[bytes] | None] | None" = None
    """Of a method with a pool: what answers a call in the loop after all, with the response encoded; it returns None
    for one that needs the pool."""
    check: Callable[[], None] = lambda: None
    """Raises QueueFull if no more calls are answered in the loop."""
    at_once: bool = False
    """Whether it is answered in any state of the server, in the loop, with messages of a few bytes. A caller who may
    call nothing else takes no place from other calls by not sending them."""
    streams: Open | None = None
    """Of a method with a stream of responses: those that are open."""
    reads_stream: bool = False
    """Whether its requests are a stream too."""

    @classmethod
    def of(cls, name: str, handler: Any, pool: Pool | None, *, at_once: bool) -> Self:
        """The method of a generated handler; one that only answers with a stream is answered at once."""
        answer = handler.unary_unary or handler.unary_stream or handler.stream_stream
        streams = Open(MAX_REFLECTIONS if handler.request_streaming else MAX_WATCHES)
        return cls(
            name,
            handler.request_deserializer,
            answer,
            handler.response_serializer,
            pool,
            at_once=at_once or handler.unary_stream is not None,
            streams=streams if handler.response_streaming else None,
            reads_stream=handler.request_streaming,
        )


def methods_of(add: Callable[[Any, Any], None], servicer: Any) -> dict[str, grpc.RpcMethodHandler]:
    """The handlers that a generated `add_...Servicer_to_server` gives to a server, by the methods' full names."""
    found: dict[str, grpc.RpcMethodHandler] = {}

    class Server:
        def add_generic_rpc_handlers(self, handlers: object) -> None:
            """The same ones again."""

        def add_registered_method_handlers(self, service: str, handlers: Mapping[str, grpc.RpcMethodHandler]) -> None:
            found.update({f"/{service}/{name}": handler for name, handler in handlers.items()})

    add(servicer, Server())
    return found


class CheckedCall(Protocol):
    """What is checked, counted and logged of a call, whichever front it came through."""

    method: str
    metadata: Any
    arrived: float
    """By `time.perf_counter`."""


class Call:
    """One call under way: what `serve.api.context` and `serve.front.waiting` want to know of it."""

    def __init__(self, method: str, context: Any) -> None:
        self.method = method
        self.request_id = ""
        self.arrived = time.perf_counter()
        self.may_receive = False
        self.turn: asyncio.Future[None] | None = None
        self.writes = False
        self.ended: Refused | None = None
        self.cancelled = False
        self.metadata = context.invocation_metadata()
        remaining = context.time_remaining()
        self._deadline = None if remaining is None else time.monotonic() + remaining
        self._context = context
        self._task = asyncio.current_task()
        self._peer = ""

    def time_remaining(self) -> float | None:
        return None if self._deadline is None else max(self._deadline - time.monotonic(), 0.0)

    def is_active(self) -> bool:
        return not self.cancelled

    def method_name(self) -> str:
        return self.method

    def peer(self) -> str:
        if not self._peer:
            self._peer = self._context.peer()
            if self._peer.startswith("unix:"):
                # gRPC does not say which connection.
                self._peer = f"{self._peer}:{id(self)}"
        return self._peer

    def is_written_to(self) -> bool:
        return self.writes

    def receive(self) -> None:
        self.may_receive = True
        if self.turn is not None and not self.turn.done():
            self.turn.set_result(None)

    def give_up(self, code: grpc.StatusCode, details: str) -> None:
        assert self._task is not None
        self.ended = Refused(code, details)
        if not self.writes:
            self._task.cancel()


class Calls(grpc.GenericRpcHandler):
    """Answers all calls of a server; its methods run in the event loop."""

    def __init__(
        self,
        methods: Sequence[Method],
        gate: Gate,
        metrics: Metrics,
        tokens: Tokens | None = None,
        tracer: Tracer | None = None,
        log_calls: bool = False,
    ) -> None:
        """`tokens`: those that are accepted, None: none is asked for. `log_calls`: a log line for every call, and not
        only for those that fail by the server's fault."""
        self._gate = gate
        self._metrics = metrics
        self._tokens = tokens
        self._tracer = tracer
        self._log_calls = log_calls
        # Ids are unique among servers by their first part, and cost a count.
        self._id_prefix = os.urandom(6).hex()
        self._id_numbers = itertools.count(1)
        self._unreceived, self._short_unreceived = (
            Unreceived(most, yield_s, seconds, MOST_IN_LINE, partial(metrics.rejected, "no_message"))
            for most, yield_s, seconds in (
                (MOST_RECEIVING, YIELD_S, MESSAGE_S),
                (MOST_SHORT_RECEIVING, SHORT_YIELD_S, SHORT_MESSAGE_S),
            )
        )
        self._unsent, self._short_unsent = Unsent(), Unsent()
        self._methods = methods
        self._timer: asyncio.TimerHandle | None = None
        self._closed = threading.Event()
        self._handlers = {method.name: self._handler(method) for method in methods}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        """What answers a call, for gRPC."""
        name = handler_call_details.method
        return self._handlers.get(name) or grpc.stream_unary_rpc_method_handler(partial(self._unimplemented, name))

    def begin(self) -> None:
        """From now on calls that wait too long for their client are ended, and tokens are read again when their file
        changes; in the event loop."""
        if self._tokens is not None:
            self._tokens.watch(self._closed)
        self._look()

    def wait_until_sent(self, timeout_s: float) -> bool:
        """Whether all responses have left, within so many seconds; not in the event loop, which may have failed."""
        until = time.monotonic() + timeout_s
        while self._unsent or self._short_unsent:
            if time.monotonic() >= until:
                return False
            time.sleep(SENT_LOOK_S)
        return True

    def close(self) -> None:
        """Once the server has stopped; in the event loop."""
        self._closed.set()
        if self._timer is not None:
            self._timer.cancel()
        for method in self._methods:
            if method.pool is not None:
                method.pool.close()

    def _look(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(LOOK_S, self._look)
        self._unreceived.end_overdue()
        self._short_unreceived.end_overdue()

    def _handler(self, method: Method) -> grpc.RpcMethodHandler:
        if method.streams is None:
            # A function: of other things gRPC asks at every call, and with more effort, whether they are coroutines.
            async def unary(messages: object, context: Any) -> bytes:
                return await self._unary(method, context)

            return grpc.stream_unary_rpc_method_handler(unary)
        return grpc.stream_stream_rpc_method_handler(partial(self._stream, method))

    async def _unimplemented(self, name: str, _: object, context: Any) -> bytes:
        async def refuse(call: Call) -> bytes:
            self.check_token(call)
            raise Refused(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")

        return await self._around(name, context, refuse)

    async def _unary(self, method: Method, context: Any) -> bytes:
        async def answer(call: Call) -> bytes:
            message = await self._message(method, call, context)
            with nullcontext() if method.at_once else self._gate.call():
                response = await self._answered(method, call, message)
            unsent = self._short_unsent if method.at_once else self._unsent
            unsent.add(call, len(response))
            context.add_done_callback(lambda _: unsent.remove(call))
            return response

        return await self._around(method.name, context, answer)

    async def _stream(self, method: Method, messages: AsyncIterator[bytes], context: Any) -> None:
        async def answer(call: Call) -> bytes:
            assert method.streams is not None
            if method.reads_stream:
                self.check_token(call)
                request: Any = _decoded_all(method.decode, messages)
            else:
                request = decoded(method.decode, await self._message(method, call, context))
            method.streams.add(call)
            opened.append(call)
            async for response in method.answer(request, call):
                # gRPC cannot end a call whose write was broken off.
                call.writes = True
                await context.write(method.encode(response))
                call.writes = False
                if call.ended is not None:
                    raise call.ended
            return b""

        opened: list[Call] = []
        try:
            await self._around(method.name, context, answer, is_stream=True)
        finally:
            # Its status was sent too.
            for call in opened:
                assert method.streams is not None
                method.streams.remove(call)

    async def _around(
        self, method: str, context: Any, answer: Callable[[Call], Awaitable[bytes]], *, is_stream: bool = False
    ) -> bytes:
        """The answer to a call, or its end with a status."""
        call = Call(method, context)
        call.request_id = self.request_id(call.metadata)
        REQUEST_ID.set(call.request_id)
        status = Status(grpc.StatusCode.OK, "")
        with (
            nullcontext() if self._tracer is None else self._tracer.span(self._span_name(method), call.metadata) as span
        ):
            try:
                response = await answer(call)
                context.set_trailing_metadata(((REQUEST_ID_KEY, call.request_id),))
                return response
            except asyncio.CancelledError:
                call.cancelled = True
                if call.ended is None:
                    late = call.time_remaining() == 0
                    status = Status(grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED, "")
                    raise
                status = status_of(call.ended)
            except QueueFull as error:
                self.turned_away(call)
                status = status_of(error)
            except Exception as error:
                status = status_of(error)
            except GeneratorExit:
                # The loop is gone, and nothing can be awaited.
                status = Status(grpc.StatusCode.CANCELLED, "")
                raise
            except BaseException as error:
                status = status_of(interrupted(error))
            finally:
                self.note(call, status.code.name, is_stream=is_stream)
                if span is not None:
                    span(status.code)
        try:
            await context.abort(status.code, status.message, ((REQUEST_ID_KEY, call.request_id), *status.metadata))
        except grpc.aio.InternalError as error:
            # The client hung up just now. gRPC would log it as a failure of the server.
            raise asyncio.CancelledError from error
        raise AssertionError("gRPC's abort raises")

    def check_token(self, call: CheckedCall) -> None:
        """Raises NoToken or NoRight, which it counts, unless a call may be made."""
        if self._tokens is None:
            return
        try:
            self._tokens.check(needed_right(call.method), call.metadata)
        except (NoToken, NoRight) as error:
            self._metrics.rejected("unauthenticated" if isinstance(error, NoToken) else "permission", call.method)
            raise

    async def _message(self, method: Method, call: Call, context: Any) -> bytes:
        """The request's message, of a call that may be answered."""
        self.check_token(call)
        unreceived, unsent = self._unreceived, self._unsent
        if method.at_once:
            unreceived, unsent = self._short_unreceived, self._short_unsent
        if not unsent.has_room(call):
            raise QueueFull(len(unsent), RETRY_AFTER_S)
        method.check()
        # Of a method with both, only the message says which one answers it.
        if method.pool is not None and method.in_loop is None:
            method.pool.check()
        unreceived.add(call)
        try:
            if not call.may_receive:
                call.turn = asyncio.get_running_loop().create_future()
                await call.turn
            message = await context.read()
        finally:
            unreceived.remove(call)
        if message is grpc.aio.EOF:
            raise Refused(grpc.StatusCode.UNIMPLEMENTED, "expected one request message, came none")
        assert isinstance(message, bytes)
        if method.at_once:
            _check_short(message)
        return message

    async def _answered(self, method: Method, call: Call, message: bytes) -> bytes:
        if method.pool is None:
            return method.encode(method.answer(decoded(method.decode, message), call))
        request = None
        if method.in_loop is not None and len(message) <= LONG_MESSAGE_BYTES:
            request = decoded(method.decode, message)
            response = method.in_loop(request, call)
            if response is not None:
                return await response
        method.pool.check()

        def answer() -> bytes:
            # The client may have gone while the call waited for a thread.
            if not call.is_active():
                raise Cancelled("cancelled by the client")
            if call.time_remaining() == 0:
                raise Expired("the deadline passed before a thread was free")
            asked = decoded(method.decode, message) if request is None else request
            return method.encode(method.answer(asked, call))

        try:
            return await method.pool.run(answer)
        except asyncio.CancelledError:
            # For the thread, before it begins or goes on.
            call.cancelled = True
            raise

    def _span_name(self, method: str) -> str:
        """Names that clients invent are one."""
        return method if method in self._handlers else f"/{UNKNOWN}"

    def turned_away(self, call: CheckedCall) -> None:
        """Counts a call for which there is no room."""
        self._metrics.rejected("overload", call.method)

    def begin_span(self, call: CheckedCall) -> Callable[[grpc.StatusCode], None] | None:
        """Begins the trace of a call that no coroutine answers; what ends it with a status, None without a tracer."""
        return None if self._tracer is None else self._tracer.begin(self._span_name(call.method), call.metadata)

    def note(self, call: CheckedCall, code: str, *, is_stream: bool = False) -> None:
        """Counts and logs a call that ended with a status."""
        seconds = time.perf_counter() - call.arrived
        if not is_stream:
            self._metrics.call(call.method, code, seconds)
        if self._log_calls:
            extra = {"method": call.method, "code": code, "seconds": seconds}
            logger.info("%s %s", call.method, code, extra=extra)

    def request_id(self, metadata: Any) -> str:
        """The id that a call brings, or a new one."""
        for key, value in metadata:
            if key == REQUEST_ID_KEY:
                # gRPC sends nothing else back, and fails the call.
                text = value if isinstance(value, str) else ""
                if 0 < len(text) <= LONGEST_REQUEST_ID and text.isascii() and text.isprintable():
                    return text
                break
        return f"{self._id_prefix}-{next(self._id_numbers):x}"


def decoded(decode: Callable[[bytes], Any], message: bytes) -> Any:
    """The message; raises InvalidRequest."""
    try:
        return decode(message)
    except DecodeError as error:
        raise InvalidRequest("message", "a message of this RPC", f"{len(message)} bytes that are none") from error


def _check_short(message: bytes) -> None:
    """Raises InvalidRequest for a message that is too long to be decoded in the loop."""
    if len(message) > MOST_SHORT_BYTES:
        raise InvalidRequest("message", f"at most {MOST_SHORT_BYTES} bytes", f"{len(message)} bytes")


async def _decoded_all(decode: Callable[[bytes], Any], messages: AsyncIterator[bytes]) -> AsyncIterator[Any]:
    async for message in messages:
        _check_short(message)
        yield decoded(decode, message)
