"""From the opened port to the end of the process: when calls are let in, and what a stop waits for."""

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import grpc
from grpc_health.v1 import health, health_pb2

from serve.api.errors import NotServing, status_of
from serve.api.inference import InferenceServicer
from serve.front.calls import UnaryInterceptor

# These are answered in any state of the server, since they report it.
UNGATED = (
    "/grpc.health.v1.Health/",
    "/inference.GRPCInferenceService/ServerLive",
    "/inference.GRPCInferenceService/ServerReady",
)
LOADING = "the model is being loaded, try again"
DRAINING = "the server is shutting down, try another or again"
DRAIN_S = 10.0
LINGER_S = 0.05


class Gate(UnaryInterceptor):
    """Counts the calls under way, and turns calls away while it is closed, which it is at first.

    Health checks and streams pass uncounted.
    """

    def __init__(self) -> None:
        super().__init__()
        self._changed = threading.Condition()
        self._under_way = 0
        self._closed = LOADING

    def wrapped(self, method: str, handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
        if method.startswith(UNGATED):
            return handler
        assert handler.unary_unary is not None
        return grpc.unary_unary_rpc_method_handler(
            self._counted(handler.unary_unary), handler.request_deserializer, handler.response_serializer
        )

    def open(self) -> None:
        """From now on calls are answered."""
        with self._changed:
            self._closed = ""

    def close(self) -> None:
        """From now on every call that is not under way ends with UNAVAILABLE, upon which a client tries again."""
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
                status = status_of(NotServing(closed))
                context.set_trailing_metadata(status.metadata)
                context.abort(status.code, status.message)
            try:
                return answer(request, context)
            finally:
                with self._changed:
                    self._under_way -= 1
                    if self._closed:
                        self._changed.notify_all()

        return handle


DRAIN_S = 10.0
LINGER_S = 0.05


class RecommenderServer:
    """A server that was created but not started; `port` is already bound."""

    def __init__(
        self,
        server: grpc.Server,
        gate: Gate,
        health_servicer: health.HealthServicer,
        port: int,
        inference: InferenceServicer,
        services: Sequence[str],
    ) -> None:
        self._server = server
        self._gate = gate
        self._health = health_servicer
        self._inference = inference
        self._services = services
        self._listens = False
        self.port = port

    def listen(self) -> None:
        """Opens the port: health checks get NOT_SERVING, calls are UNAVAILABLE until `start`."""
        self._server.start()
        self._listens = True

    def start(self) -> None:
        """Starts to answer, and says so to health checks."""
        if not self._listens:
            self.listen()
        self._gate.open()
        for name in ("", *self._services):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        self._inference.ready = True

    def finish_calls(self, timeout_s: float = DRAIN_S) -> bool:
        """Sets health checks to NOT_SERVING, turns new calls away with UNAVAILABLE, and waits for those under way.

        Returns whether all were answered within `timeout_s` seconds. Streams, such as the watch of a health check,
        are notified and not waited for. gRPC itself is left running: it would end calls that have just arrived with
        CANCELLED, which no client repeats. Let the process end (`leave_process`), or `drain`.
        """
        self._health.enter_graceful_shutdown()
        self._inference.ready = False
        self._gate.close()
        finished = self._gate.wait_until_idle(timeout_s)
        # Handlers have returned; this is for their answers to leave.
        time.sleep(LINGER_S)
        return finished

    def drain(self, timeout_s: float = DRAIN_S) -> None:
        """As `finish_calls`, and then stops the server within this process; what is still under way is cancelled."""
        self.finish_calls(timeout_s)
        self._server.stop(None).wait()


def leave_process(status: int = 0) -> NoReturn:
    """Ends the process after `finish_calls`: calls that came too late see a closed connection, which is UNAVAILABLE."""
    # Its handlers flush logs, traces and profiles.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
