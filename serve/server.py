"""Puts the servicer, health checking and reflection on one port."""

import atexit
import logging
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from serve.addresses import AddressError, check_exposure, host_and_port
from serve.admin import ModelAdminServicer
from serve.batching import DEFAULT_CAPACITY, RETRY_AFTER_S, QueueFull
from serve.calls import Calls
from serve.errors import status_of
from serve.gate import Gate
from serve.health import HealthServicer
from serve.inference_protocol import InferenceServicer
from serve.loaded import Models
from serve.metrics import Metrics
from serve.models import ModelLibrary
from serve.pb import (
    model_admin_pb2,
    model_admin_pb2_grpc,
    open_inference_pb2,
    open_inference_pb2_grpc,
    recommender_pb2,
    recommender_pb2_grpc,
)
from serve.polling import is_supported, polling_server
from serve.security import Tls, TokenInterceptor, Tokens
from serve.servicer import RecommenderServicer
from serve.store import EventStore
from serve.stores.sqlite import SQLiteStore
from serve.tracing import tracer_of_the_process

logger = logging.getLogger(__name__)

SERVICE = recommender_pb2.DESCRIPTOR.services_by_name["Recommender"].full_name
SERVICES = (SERVICE, open_inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name)
ADMIN_SERVICE = model_admin_pb2.DESCRIPTOR.services_by_name["ModelAdmin"].full_name

# Threads for what the polling thread does not answer itself (`serve/polling.py`): RecordEvents, which waits for the
# disk, and all else but Recommend; Recommend too with a store on another machine. When all calls went to the pool, 8
# threads got through 1,220 Recommends/s, 32 threads 910 and 1 thread 1,010 (10,000 items, 50 events, 2 shared cores).
WORKERS = 8
# These read the store's file at most, and wait for the model: the polling thread answers them itself.
INLINE = (f"/{SERVICE}/Recommend",)
DRAIN_S = 10.0
LINGER_S = 0.05
# A history of 10,000 events with ids of 36 characters takes 0.5 MB. gRPC refuses more with RESOURCE_EXHAUSTED.
MAX_MESSAGE_BYTES = 8 * 2**20
# Further calls wait at the client, where they cost the server nothing. HTTP/2 recommends no less.
MAX_CALLS_OF_A_CONNECTION = 100
MAX_CALLS = 256


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
        self.port = port

    def start(self) -> None:
        """Starts to answer, and says so to health checks."""
        self._server.start()
        for name in ("", *self._services):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        self._inference.ready = True

    def finish_calls(self, timeout_s: float = DRAIN_S) -> bool:
        """Tells health checks, turns new calls away with UNAVAILABLE, and waits for those under way.

        Returns whether all were answered within `timeout_s` seconds. Streams, such as the watch of a health check,
        are told and not waited for. gRPC itself is left running: it would end calls that have just arrived with
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


def leave_process() -> NoReturn:
    """Ends the process after `finish_calls`: calls that came too late see a closed connection, which is UNAVAILABLE."""
    # Its handlers flush logs, traces and profiles.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def create_server(
    models: Models,
    store: EventStore,
    address: str,
    *,
    workers: int = WORKERS,
    metrics: Metrics | None = None,
    tls: Tls | None = None,
    tokens: Tokens | None = None,
    allow_insecure: bool = False,
    log_calls: bool = False,
    polling: bool | None = None,
    max_calls: int = MAX_CALLS,
    shared_port: bool = False,
    calls: Calls | None = None,
) -> RecommenderServer:
    """Binds `address` (HOST:PORT, with port 0 for a free one) for a server that is not started yet.

    `polling`: whether Recommend is answered in the thread that polls; None: when the store is a local file.
    `shared_port`: other servers of the same kind may listen there too, and the kernel spreads connections over them.
    Of calls for the pool of threads `max_calls` run or wait; further ones are RESOURCE_EXHAUSTED at once.
    A `ModelLibrary` as the models comes with the admin service.

    Raises AddressError, and SecurityError for an address that others reach without TLS or authentication.
    """
    host_and_port(address)
    authenticated = tokens is not None or (tls is not None and tls.client_ca is not None)
    check_exposure(address, tls is not None, authenticated, allow_insecure)
    metrics = metrics or Metrics()
    gate = Gate()
    metrics.count_under_way(lambda: gate.under_way)
    metrics.count_dropped(lambda: store.dropped_count)
    calls = calls or Calls(metrics, tracer_of_the_process(), log_calls)
    interceptors: list[grpc.ServerInterceptor] = (
        [gate, calls] if tokens is None else [TokenInterceptor(tokens, metrics), gate, calls]
    )
    # Unless asked for: a forgotten old server would answer every other call.
    options = [
        ("grpc.so_reuseport", int(shared_port)),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_concurrent_streams", MAX_CALLS_OF_A_CONNECTION),
    ]
    pool = ThreadPoolExecutor(workers)
    server: grpc.Server
    if polling is None:
        polling = isinstance(store, SQLiteStore)
    if polling and is_supported():
        full = status_of(QueueFull(DEFAULT_CAPACITY, RETRY_AFTER_S))

        def turn_away() -> tuple[grpc.StatusCode, str, Sequence[tuple[str, str | bytes]]]:
            metrics.rejected("overload")
            return full

        server = polling_server(
            pool,
            INLINE,
            interceptors=interceptors,
            options=options,
            maximum_concurrent_rpcs=max_calls,
            turn_away=turn_away,
        )
    else:
        if polling:
            logger.warning("this grpcio has no front that polls (serve.polling); Recommend runs in the pool of threads")
        server = grpc.server(pool, interceptors=interceptors, options=options, maximum_concurrent_rpcs=max_calls)
    servicer = RecommenderServicer(models, store, metrics)
    recommender_pb2_grpc.add_RecommenderServicer_to_server(servicer, server)
    inference = InferenceServicer(models)
    open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(inference, server)
    services = list(SERVICES)
    if isinstance(models, ModelLibrary):
        model_admin_pb2_grpc.add_ModelAdminServicer_to_server(ModelAdminServicer(models), server)
        services.append(ADMIN_SERVICE)
    health_servicer = HealthServicer(services)
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    reflection.enable_server_reflection((*services, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    try:
        port = server.add_insecure_port(address) if tls is None else server.add_secure_port(address, tls.credentials())
    except RuntimeError as error:
        raise AddressError(f"cannot listen on {address}: {error}") from error
    return RecommenderServer(server, gate, health_servicer, port, inference, services)
