"""The Connect protocol's unary calls: POST /package.Service/Method with JSON, or with an encoded message.

https://connectrpc.com/docs/protocol. The methods, their messages and all fields are those of the descriptors.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serve.api.errors import InvalidRequest, NoRight, NoToken, status_of
from serve.front.auth import Tokens, needed_right
from serve.http.bodies import Bodies
from serve.http.calls import Calls, Failed, Metadata, Refused, passed_on
from serve.http.errors import JSON, error_response, headers_of, refused
from serve.http.limits import BODY_S, FREE_BODY_S, LONG_BYTES, MAX_BODY_BYTES, MAX_FREE_BYTES, MAX_JSON_BYTES
from serve.http.messages import from_json, to_json
from serve.observability.metrics import Metrics

PROTO = "application/proto"
TYPES = (JSON, PROTO)
PASSED_ON = frozenset({b"authorization", b"x-request-id", b"traceparent", b"tracestate"})
TIMEOUT = "connect-timeout-ms"
VERSION = "connect-protocol-version"
MOST_TIMEOUT_DIGITS = 10
# There is always room for these.
CHECKS = (
    "/grpc.health.v1.Health/Check",
    "/inference.GRPCInferenceService/ServerLive",
    "/inference.GRPCInferenceService/ServerReady",
)

T = TypeVar("T")
Endpoint = Callable[[Request], Coroutine[Any, Any, Response]]


def connect_routes(services: Iterable[ServiceDescriptor], gateway: "Gateway") -> Iterator[Route]:
    """A route for each unary method of some services."""
    for service in services:
        for method in service.methods:
            if not method.client_streaming and not method.server_streaming:
                yield Route(path_of(method), _endpoint(method, gateway), methods=["POST"])


def path_of(method: MethodDescriptor) -> str:
    """`/package.Service/Method`, in gRPC and in Connect alike."""
    return f"/{method.containing_service.full_name}/{method.name}"


class Gateway:
    """What every request needs on its way to the gRPC server."""

    def __init__(self, calls: Calls, tokens: Tokens | None, metrics: Metrics) -> None:
        self._calls = calls
        self._metrics = metrics
        self._tokens = tokens
        self._bodies = Bodies()

    @asynccontextmanager
    async def body(self, request: Request, path: str, content_type: str) -> AsyncIterator[bytes]:
        """The body of a request for a method; not read if the caller may not call it. Raises Failed."""
        self._check_right(request, path)
        most, within_s = MAX_JSON_BYTES if content_type == JSON else MAX_BODY_BYTES, BODY_S
        if needed_right(path) is None:
            most, within_s = MAX_FREE_BYTES, FREE_BODY_S
        async with self._bodies.read(request, most, within_s) as body:
            yield body

    async def call(
        self, request: Request, path: str, message: bytes, timeout_s: float | None = None
    ) -> tuple[bytes, Metadata]:
        """The answer to the caller of a request; cancelled when the client is gone. Raises Failed."""
        self._check_right(request, path)
        metadata = passed_on(request.headers.raw, PASSED_ON)
        return await _unless_gone(request, self._calls.call(path, message, metadata, timeout_s, path in CHECKS))

    def failed(self, failed: Failed, path: str, response: Callable[[Failed], Response]) -> Response:
        """The response for a call that failed; counted here if the gRPC server does not know of it."""
        if isinstance(failed, Refused):
            self._metrics.rejected("http", path)
        return response(failed)

    def _check_right(self, request: Request, path: str) -> None:
        """Refuses whom the gRPC server would refuse, as it does; raises Failed."""
        right, given = needed_right(path), request.headers.getlist("authorization")
        if self._tokens is None or right is None:
            return
        # Of several headers it would not be clear which one counts. gRPC can send printable ASCII only.
        is_one = len(given) == 1 and given[0].isascii() and given[0].isprintable()
        rights = self._tokens.rights(given[0]) if is_one else None
        if rights is None:
            self._metrics.rejected("unauthenticated", path)
            raise Failed(status_of(NoToken()))
        if right not in rights:
            self._metrics.rejected("permission", path)
            raise Failed(status_of(NoRight(right)))


def _endpoint(method: MethodDescriptor, gateway: Gateway) -> Endpoint:
    path = path_of(method)

    async def endpoint(request: Request) -> Response:
        arrived = time.monotonic()
        try:
            content_type, timeout_s = content_type_of(request, TYPES), _timeout_s(request)
            async with gateway.body(request, path, content_type) as body:
                message = await encoded(body, method) if content_type == JSON else body
                if timeout_s is not None:
                    # What the body took to arrive and to be read is a part of it.
                    timeout_s = max(0.0, timeout_s - (time.monotonic() - arrived))
                answer, trailing = await gateway.call(request, path, message, timeout_s)
            content = await converted(answer, method) if content_type == JSON else answer
        except Failed as failed:
            return gateway.failed(failed, path, error_response)
        return Response(content, 200, headers_of(trailing), content_type)

    return endpoint


def content_type_of(request: Request, types: Sequence[str]) -> str:
    """The type of the body of a request, one of some types; raises Refused."""
    if request.headers.get(VERSION, "1") != "1":
        raise refused(grpc.StatusCode.INVALID_ARGUMENT, f"{VERSION}: expected 1, came another version")
    if request.headers.get("content-encoding", "identity") != "identity":
        raise refused(grpc.StatusCode.UNIMPLEMENTED, "content-encoding: expected identity, came another one", 415)
    name, _, rest = request.headers.get("content-type", "").partition(";")
    name, rest = name.strip().lower(), rest.strip().lower()
    if name not in types or rest not in ("", "charset=utf-8"):
        text = f"content-type: expected {' or '.join(types)}, came another one"
        raise refused(grpc.StatusCode.UNIMPLEMENTED, text, 415)
    return name


def _timeout_s(request: Request) -> float | None:
    text = request.headers.get(TIMEOUT)
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= MOST_TIMEOUT_DIGITS):
        expected = f"{TIMEOUT}: expected a whole number of at most {MOST_TIMEOUT_DIGITS} digits"
        raise refused(grpc.StatusCode.INVALID_ARGUMENT, f"{expected}, came something else")
    return int(text) / 1000


async def encoded(body: bytes, method: MethodDescriptor) -> bytes:
    """The encoded message of a JSON text; raises Failed that names the field."""

    def encode() -> bytes:
        return from_json(body, method.input_type).SerializeToString()

    try:
        return await in_loop_or_thread(len(body), encode)
    except InvalidRequest as error:
        raise Refused(status_of(error)) from error


async def converted(answer: bytes, method: MethodDescriptor) -> bytes:
    """The JSON text of an encoded response."""
    return await in_loop_or_thread(len(answer), lambda: to_json(answer, method.output_type))


async def in_loop_or_thread(size: int, convert: Callable[[], T]) -> T:
    """Converts so many bytes, in a thread if they are many."""
    return convert() if size <= LONG_BYTES else await asyncio.to_thread(convert)


async def _unless_gone(request: Request, call: Coroutine[Any, Any, T]) -> T:
    """Waits for a call as long as the client does; raises Failed when it is gone."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    calling, leaving = asyncio.ensure_future(call), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((calling, leaving), return_when=asyncio.FIRST_COMPLETED)
        if calling.done():
            return calling.result()
        raise refused(grpc.StatusCode.CANCELLED, "cancelled by the client")
    finally:
        for task in (calling, leaving):
            task.cancel()
