"""What happens around every call, whatever it asks: decoding, request ids, statuses, metrics, logs and traces."""

import itertools
import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from serve.api.errors import InvalidRequest, status_of
from serve.observability.logs import REQUEST_ID
from serve.observability.metrics import Metrics
from serve.observability.tracing import Tracer

logger = logging.getLogger(__name__)

REQUEST_ID_KEY = "x-request-id"
LONGEST_REQUEST_ID = 128

Handle = Callable[[bytes, Any], Any]


class UnaryInterceptor(grpc.ServerInterceptor, ABC):
    """Wraps every unary RPC of a server, once for each method."""

    def __init__(self) -> None:
        self._handlers: dict[str, grpc.RpcMethodHandler] = {}

    @abstractmethod
    def wrapped(self, method: str, handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
        """What answers `/package.Service/Method` instead of its unary handler."""

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        method = handler_call_details.method
        handler = self._handlers.get(method)
        if handler is None:
            handler = continuation(handler_call_details)
            if handler is None or handler.unary_unary is None:
                return handler
            handler = self._handlers[method] = self.wrapped(method, handler)
        return handler


class Calls(UnaryInterceptor):
    """Request ids, statuses, metrics, log lines and traces of unary calls.

    An exception becomes a status by the table of `serve.api.errors`, a message that cannot be decoded too. The id that
    came as `x-request-id`, or a new one, goes back in the trailing metadata and into the log. Must be the innermost
    interceptor: those outside of it can turn a call away, and are asked for every call.
    """

    def __init__(self, metrics: Metrics, tracer: Tracer | None = None, log_calls: bool = False) -> None:
        """`log_calls`: a log line for every call, and not only for those that fail by the server's fault."""
        super().__init__()
        self._metrics = metrics
        self._tracer = tracer
        self._log_calls = log_calls
        # Ids are unique among servers by their first part, and cost a count.
        self._id_prefix = os.urandom(6).hex()
        self._id_numbers = itertools.count(1)

    def wrapped(self, method: str, handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(self._around(method, handler), None, handler.response_serializer)

    def _around(self, method: str, handler: grpc.RpcMethodHandler) -> Handle:
        decode, answer = handler.request_deserializer, handler.unary_unary
        assert answer is not None
        observe, log_calls = self._metrics.call, self._log_calls

        # `Any`: the types of grpc-stubs don't know `code`.
        def handle(message: bytes, context: Any) -> Any:
            start = time.perf_counter()
            request_id = self._request_id(context.invocation_metadata())
            token = REQUEST_ID.set(request_id)
            status: grpc.StatusCode | None = None
            try:
                response = answer(_decoded(decode, message), context)
                context.set_trailing_metadata(((REQUEST_ID_KEY, request_id),))
                status = context.code()
                return response
            except Exception as error:
                status = context.code()
                if status is not None:
                    # The RPC ended the call itself.
                    raise
                failed = status_of(error)
                status = failed.code
                context.set_trailing_metadata(((REQUEST_ID_KEY, request_id), *failed.metadata))
                context.abort(status, failed.message)
                raise
            finally:
                seconds = time.perf_counter() - start
                code = "OK" if status is None else status.name
                observe(method, code, seconds)
                if log_calls:
                    logger.info("%s %s", method, code, extra={"method": method, "code": code, "seconds": seconds})
                REQUEST_ID.reset(token)

        return handle if self._tracer is None else self._tracer.around(method, handle)

    def _request_id(self, metadata: Any) -> str:
        for key, value in metadata:
            if key == REQUEST_ID_KEY:
                # gRPC sends nothing else back, and fails the call.
                text = value if isinstance(value, str) else ""
                if 0 < len(text) <= LONGEST_REQUEST_ID and text.isascii() and text.isprintable():
                    return text
                break
        return f"{self._id_prefix}-{next(self._id_numbers):x}"


def _decoded(decode: Callable[[bytes], Any] | None, message: bytes) -> Any:
    if decode is None:
        return message
    try:
        return decode(message)
    except DecodeError as error:
        raise InvalidRequest("message", "a message of this RPC", f"{len(message)} bytes that are none") from error
