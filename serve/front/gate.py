"""Counts the calls under way, and turns new ones away until the server is ready, and once it is to end."""

import threading
from collections.abc import Callable
from typing import Any

import grpc

# These go on, to say how the server stands.
UNGATED = (
    "/grpc.health.v1.Health/",
    "/inference.GRPCInferenceService/ServerLive",
    "/inference.GRPCInferenceService/ServerReady",
)
LOADING = "the model is being loaded, try again"
DRAINING = "the server is shutting down, try another or again"


class Gate(grpc.ServerInterceptor):
    """Wraps every unary RPC of a server, once for each; health checks and streams pass uncounted. Closed at first."""

    def __init__(self) -> None:
        self._handlers: dict[str, grpc.RpcMethodHandler] = {}
        self._changed = threading.Condition()
        self._under_way = 0
        self._closed = LOADING

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        handler = self._handlers.get(handler_call_details.method)
        if handler is None:
            handler = continuation(handler_call_details)
            if handler is None or handler.unary_unary is None or handler_call_details.method.startswith(UNGATED):
                return handler
            handler = self._handlers[handler_call_details.method] = grpc.unary_unary_rpc_method_handler(
                self._counted(handler.unary_unary), handler.request_deserializer, handler.response_serializer
            )
        return handler

    def open(self) -> None:
        """From now on calls are answered."""
        with self._changed:
            self._closed = ""

    def close(self) -> None:
        """From now on every call that is not under way ends with UNAVAILABLE, which tells a client to try again."""
        with self._changed:
            self._closed = DRAINING

    @property
    def under_way(self) -> int:
        """How many calls are being answered."""
        return self._under_way

    def wait_until_idle(self, timeout_s: float) -> bool:
        """Whether no call is under way any more, within so many seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._under_way, timeout_s)

    def _counted(self, answer: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def handle(request: Any, context: Any) -> Any:
            with self._changed:
                closed = self._closed
                if not closed:
                    self._under_way += 1
            if closed:
                context.abort(grpc.StatusCode.UNAVAILABLE, closed)
            try:
                return answer(request, context)
            finally:
                with self._changed:
                    self._under_way -= 1
                    if self._closed:
                        self._changed.notify_all()

        return handle
