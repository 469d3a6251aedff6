"""Puts the servicer, health checking and reflection on one port."""

import atexit
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NoReturn

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from serve.api.admin import ModelAdminServicer
from serve.api.errors import status_of
from serve.api.health import HealthServicer
from serve.api.inference import InferenceServicer
from serve.api.recommender import RecommenderServicer
from serve.api.reflection import ReflectionServicer
from serve.front.addresses import AddressError, check_exposure, host_and_port
from serve.front.auth import Tls, TokenInterceptor, Tokens
from serve.front.calls import Calls
from serve.front.gate import Gate
from serve.front.polling import Front, TurnedAway, is_supported, polling_server
from serve.observability.metrics import Metrics
from serve.observability.tracing import tracer_of_the_process
from serve.pb import (
    model_admin_pb2,
    model_admin_pb2_grpc,
    open_inference_pb2,
    open_inference_pb2_grpc,
    recommender_pb2,
    recommender_pb2_grpc,
)
from serve.serving.batching import DEFAULT_CAPACITY, RETRY_AFTER_S, QueueFull
from serve.serving.loaded import Models
from serve.serving.versions import ModelLibrary
from serve.stores.base import EventStore
from serve.stores.sqlite import SQLiteStore

logger = logging.getLogger(__name__)

SERVICE = recommender_pb2.DESCRIPTOR.services_by_name["Recommender"].full_name
INFERENCE_SERVICE = open_inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
ADMIN_SERVICE = model_admin_pb2.DESCRIPTOR.services_by_name["ModelAdmin"].full_name
SERVICES = (SERVICE, INFERENCE_SERVICE)
FILES = (recommender_pb2, open_inference_pb2, model_admin_pb2, health_pb2)
METHODS = frozenset(
    f"/{service.full_name}/{method.name}"
    for file in FILES
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
)

# Threads for what the polling thread does not answer itself (`serve/polling.py`): RecordEvents, which waits for the
# disk, and all else but Recommend; Recommend too with a store on another machine. When all calls went to the pool, 8
# threads got through 1,220 Recommends/s, 32 threads 910 and 1 thread 1,010 (10,000 items, 50 events, 2 shared cores).
WORKERS = 8
# These read the store's file at most, and wait for the model: the polling thread answers them itself.
RECOMMEND = f"/{SERVICE}/Recommend"
INLINE = (RECOMMEND,)
# These run the model for many rows, or load one: in a few threads of their own, for which no event waits.
SLOW = (
    f"/{SERVICE}/BatchRecommend",
    f"/{INFERENCE_SERVICE}/ModelInfer",
    *(
        f"/{ADMIN_SERVICE}/{method.name}"
        for method in model_admin_pb2.DESCRIPTOR.services_by_name["ModelAdmin"].methods
    ),
)
SLOW_WORKERS = 3
# A server that is only busy must not be taken for a dead one.
AT_ONCE = (
    f"/{health.SERVICE_NAME}/Check",
    f"/{health.SERVICE_NAME}/Watch",
    f"/{INFERENCE_SERVICE}/ServerLive",
    f"/{INFERENCE_SERVICE}/ServerReady",
)
# A history of 300 events. To decode and check the longest that is allowed takes as long as a run of the model.
LONG_MESSAGE_BYTES = 16 * 2**10
DRAIN_S = 10.0
LINGER_S = 0.05
# A history of 10,000 events with ids of 36 characters takes 0.5 MB. gRPC refuses more with RESOURCE_EXHAUSTED.
MAX_MESSAGE_BYTES = 8 * 2**20
# Further calls wait at the client, where they cost the server nothing. HTTP/2 recommends no less.
MAX_CALLS_OF_A_CONNECTION = 100
MAX_CALLS = 256


def takes_long(models: Models, method: str, message: bytes) -> bool:
    """Whether a call would hold up all others: long histories, sent along or to be read again as of an earlier time, up
    to 17 rows to explain an answer, whole batches."""
    if method != RECOMMEND:
        return method in SLOW
    if len(message) > LONG_MESSAGE_BYTES:
        return True
    try:
        request = recommender_pb2.RecommendRequest.FromString(message)
    except DecodeError:
        return False
    if request.explain or not (request.user_id and request.HasField("request_time")):
        return request.explain
    try:
        return models.for_user(request.user_id).asks_for_the_past(request.user_id, request.request_time)
    except LookupError:
        # None is loaded yet, which the gate will say.
        return False


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
        """Opens the port: health checks are told NOT_SERVING, calls are UNAVAILABLE until `start`."""
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


def leave_process(status: int = 0) -> NoReturn:
    """Ends the process after `finish_calls`: calls that came too late see a closed connection, which is UNAVAILABLE."""
    # Its handlers flush logs, traces and profiles.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


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
    on_failure: Callable[[], None] = lambda: None,
) -> RecommenderServer:
    """Binds `address` (HOST:PORT, with port 0 for a free one) for a server that is not started yet.

    `polling`: whether Recommend is answered in the thread that polls; None: when the store is a local file.
    `on_failure` is called when that thread ends by a failure: the server is deaf, and the process should end.
    `shared_port`: other servers of the same kind may listen there too, and the kernel spreads connections over them.
    Of calls for the pool of threads `max_calls` run or wait; further ones are RESOURCE_EXHAUSTED at once, but never
    a health check.
    A `ModelLibrary` as the models comes with the admin service.

    Raises AddressError, and SecurityError for an address that others reach without TLS or authentication.
    """
    host_and_port(address)
    authenticated = tokens is not None or (tls is not None and tls.client_ca is not None)
    check_exposure(address, tls is not None, authenticated, allow_insecure)
    metrics = metrics or Metrics()
    gate = Gate()
    metrics.know_methods(METHODS)
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
    full = status_of(QueueFull(DEFAULT_CAPACITY, RETRY_AFTER_S))

    def turn_away(method: str) -> TurnedAway:
        metrics.rejected("overload", method)
        return full

    if is_supported():
        front = Front(
            INLINE if polling else (),
            AT_ONCE,
            partial(takes_long, models),
            most_in_pool=max_calls,
            turn_away=turn_away,
            on_no_message=lambda method: metrics.rejected("no_message", method),
            on_failure=on_failure,
        )
        slow_pool = ThreadPoolExecutor(SLOW_WORKERS, "grpc-slow")
        server = polling_server(pool, slow_pool, front, interceptors=interceptors, options=options)
    else:
        logger.warning(
            "this grpcio has no front that polls (serve.front.polling): calls without a message hold threads"
        )
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
    reflected = ReflectionServicer((*services, health.SERVICE_NAME, reflection.SERVICE_NAME))
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(reflected, server)
    try:
        port = server.add_insecure_port(address) if tls is None else server.add_secure_port(address, tls.credentials())
    except RuntimeError as error:
        raise AddressError(f"cannot listen on {address}: {error}") from error
    return RecommenderServer(server, gate, health_servicer, port, inference, services)
