"""From the opened port to the end of the process: when calls are let in, and what a stop waits for."""

import logging
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from grpc_health.v1 import health_pb2

from serve.api.health import HealthServicer
from serve.api.inference import InferenceServicer
from serve.front.calls import Calls
from serve.front.gate import Gate
from serve.front.loop import shared_loop
from serve.front.restarts import KeptServer
from serve.observability.tracing import export_spans

if TYPE_CHECKING:
    from serve.front.fast import FastFront

logger = logging.getLogger(__name__)

DRAIN_S = 10.0
LINGER_S = 0.05


class RecommenderServer:
    """A server that was created but not started; `port` is already bound."""

    def __init__(
        self,
        server: KeptServer,
        calls: Calls,
        gate: Gate,
        health: HealthServicer,
        inference: InferenceServicer,
        on_end: Callable[[], None] = lambda: None,
        fast: "FastFront | None" = None,
    ) -> None:
        self.port = server.port
        self._server = server
        self._calls = calls
        self._gate = gate
        self._health = health
        self._inference = inference
        self._fast = fast
        self._on_end: Callable[[], None] | None = on_end
        self._listens = False

    @property
    def fast_address(self) -> str | None:
        """Where the fast front listens; None: there is none."""
        return None if self._fast is None else self._fast.address

    def listen(self) -> None:
        """Opens the port: health checks get NOT_SERVING, calls are UNAVAILABLE until `start`."""
        shared_loop().wait_for(self._begin())
        self._listens = True

    def start(self) -> None:
        """Starts to answer, and says so to health checks."""
        if not self._listens:
            self.listen()
        self._gate.open()
        self._health.set_all(health_pb2.HealthCheckResponse.SERVING)
        self._inference.ready = True

    def finish_calls(self, timeout_s: float = DRAIN_S) -> bool:
        """Sets health checks to NOT_SERVING, turns new calls away with UNAVAILABLE, and waits for those under way.

        Returns whether all were answered, and all answers taken, within `timeout_s` seconds. Streams, such as the watch
        of a health check, are notified and not waited for. gRPC itself is left running: it would end calls that have
        just arrived with CANCELLED, which no client repeats. Let the process end (`leave_process`), or `drain`.
        """
        self._health.set_all(health_pb2.HealthCheckResponse.NOT_SERVING)
        self._inference.ready = False
        self._gate.close()
        until = time.monotonic() + timeout_s
        finished = self._gate.wait_until_idle(timeout_s)
        # Handlers have returned; this is for their answers to leave, and for statuses that have none.
        sent = self._calls.wait_until_sent(until - time.monotonic())
        time.sleep(LINGER_S)
        return finished and sent

    def drain(self, timeout_s: float = DRAIN_S) -> None:
        """As `finish_calls`, and then stops the server within this process; what is still under way is cancelled."""
        self.finish_calls(timeout_s)
        if self._fast is not None:
            self._fast.close()
        shared_loop().wait_for(self._end())

    async def _begin(self) -> None:
        self._calls.begin()
        await self._server.start()
        if self._fast is not None:
            self._fast.start()

    async def _end(self) -> None:
        await self._server.stop()
        self._calls.close()
        if self._on_end is not None:
            self._on_end()
            self._on_end = None


def leave_process(status: int = 0) -> NoReturn:
    """Ends the process after `finish_calls`: calls that came too late see a closed connection, which is UNAVAILABLE."""
    # Python would wait for threads that are cut off, and crash on gRPC's; so what is to be written at the end is here.
    try:
        try:
            export_spans()
        except Exception:
            logger.exception("the last spans could not be exported")
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)
