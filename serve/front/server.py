"""Puts the servicer, health checking and reflection on one port."""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from serve.addresses import AddressError, check_exposure, host_and_port
from serve.api.admin import ModelAdminServicer
from serve.api.errors import status_of
from serve.api.event_types import BUILT_IN, EventTypes
from serve.api.health import HealthServicer
from serve.api.inference import InferenceServicer
from serve.api.recommender import RecommenderServicer
from serve.api.reflection import ReflectionServicer
from serve.api.rules import MAX_MESSAGE_BYTES
from serve.api.service import RecommenderService
from serve.front.auth import TokenInterceptor, Tokens
from serve.front.calls import Calls
from serve.front.lifecycle import Gate, RecommenderServer
from serve.front.limits import (
    LONG_MESSAGE_BYTES,
    MAX_CALLS,
    MAX_CALLS_OF_A_CONNECTION,
    SLOW_WORKERS,
    WORKERS,
)
from serve.front.polling import Front, TurnedAway, is_supported, polling_server
from serve.front.tls import Tls
from serve.observability.metrics import Metrics
from serve.observability.tracing import Tracer, tracer_of_the_process
from serve.pb import (
    model_admin_pb2,
    model_admin_pb2_grpc,
    open_inference_pb2,
    open_inference_pb2_grpc,
    recommender_pb2,
    recommender_pb2_grpc,
)
from serve.serving.batching import QUEUE_CAPACITY, RETRY_AFTER_S
from serve.serving.errors import QueueFull
from serve.serving.loaded import Models
from serve.serving.versions import ModelLibrary
from serve.stores.base import EventStore
from serve.stores.sqlite.store import SQLiteStore

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

# These read a little of the store's file at most, and wait for the model: the polling thread answers them itself.
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
# So that a busy server is not mistaken for a dead one.
AT_ONCE = (
    f"/{health.SERVICE_NAME}/Check",
    f"/{health.SERVICE_NAME}/Watch",
    f"/{INFERENCE_SERVICE}/ServerLive",
    f"/{INFERENCE_SERVICE}/ServerReady",
)


def takes_long(models: Models, method: str, message: bytes) -> bool:
    """Whether a call would hold up all others: long histories, sent along or to be read again as of an earlier time,
    stored ones with events that are sent along, what was recommended lately, up to 17 rows to explain an answer, the
    candidates of rules, whole batches."""
    if method != RECOMMEND:
        return method in SLOW
    if len(message) > LONG_MESSAGE_BYTES:
        return True
    try:
        request = recommender_pb2.RecommendRequest.FromString(message)
    except DecodeError:
        return False
    both = request.user_id != "" and request.HasField("history")
    asks_for_more = request.explain or request.HasField("rules") or request.not_shown_within > 0
    return asks_for_more or both or _asks_for_the_past(models, request)


def _asks_for_the_past(models: Models, request: recommender_pb2.RecommendRequest) -> bool:
    if not (request.user_id and request.HasField("request_time")):
        return False
    try:
        return models.for_user(request.user_id).asks_for_the_past(request.user_id, request.request_time)
    except LookupError:
        # None is loaded yet, which the gate will say.
        return False


@dataclass(frozen=True, slots=True)
class Listener:
    """Where a server listens and for whom."""

    address: str
    """HOST:PORT, with port 0 for a free one."""
    tls: Tls | None = None
    tokens: Tokens | None = None
    """None: every caller may do everything."""
    allow_insecure: bool = False
    """Whether other machines may reach the address without TLS or authentication."""
    shared_port: bool = False
    """Whether other servers of the same kind may listen there too; the kernel spreads connections over them."""

    def __post_init__(self) -> None:
        """Raises AddressError, and SecurityError for an address that others reach without TLS or authentication."""
        host_and_port(self.address)
        authenticated = self.tokens is not None or (self.tls is not None and self.tls.client_ca is not None)
        check_exposure(self.address, self.tls is not None, authenticated, self.allow_insecure)

    def bind(self, server: grpc.Server) -> int:
        """The port, once the server has it; raises AddressError."""
        try:
            if self.tls is None:
                return server.add_insecure_port(self.address)
            return server.add_secure_port(self.address, self.tls.credentials())
        except RuntimeError as error:
            raise AddressError(f"cannot listen on {self.address}: {error}") from error


def create_server(
    models: Models,
    store: EventStore,
    listener: str | Listener,
    *,
    workers: int = WORKERS,
    metrics: Metrics | None = None,
    tracer: Tracer | None = None,
    log_calls: bool = False,
    event_types: EventTypes = BUILT_IN,
    slate_log: float = 1.0,
    slate_retention: float = 0.0,
    polling: bool | None = None,
    also_listen: Sequence[str] = (),
    max_calls: int = MAX_CALLS,
    on_failure: Callable[[], None] = lambda: None,
) -> RecommenderServer:
    """Binds a port for a server that is not started yet.

    Args:
        models: The loaded models; a `ModelLibrary` comes with the admin service.
        store: The events of all users.
        listener: Where to listen and for whom, or just HOST:PORT.
        workers: Threads of the pool, which answers what the polling thread does not.
        metrics: Where to count; None: metrics that are not published.
        tracer: Makes a span for each call; None: that of the process, if it has one.
        log_calls: Whether every call gets a line in the log.
        event_types: The types of events that are accepted, with their weights.
        slate_log: The share of the users whose answers are logged, 0 to 1.
        slate_retention: For how many days answers stay in the log; 0: without an end.
        polling: Whether the polling thread answers Recommend itself; None: when the store is a local file.
        also_listen: Further addresses for this process alone, such as `unix:PATH` in a folder that nobody else can
            enter: without TLS; tokens are asked for there, too.
        max_calls: So many calls run in the pool or wait for it; further ones are RESOURCE_EXHAUSTED at once, except
            health checks.
        on_failure: Called when the polling thread fails: the server answers nothing any more and should end.

    Raises:
        AddressError: The address cannot be used.
        SecurityError: Other machines reach it without TLS or authentication.
    """
    listener = Listener(listener) if isinstance(listener, str) else listener
    metrics = metrics or Metrics()
    gate = Gate()
    metrics.know_methods(METHODS)
    metrics.count_under_way(lambda: gate.under_way)
    metrics.count_dropped(lambda: store.dropped_count)
    calls = Calls(metrics, tracer or tracer_of_the_process(), log_calls)
    interceptors: list[grpc.ServerInterceptor] = (
        [gate, calls] if listener.tokens is None else [TokenInterceptor(listener.tokens, metrics), gate, calls]
    )
    # Unless asked for: a forgotten old server would answer every other call.
    options = [
        ("grpc.so_reuseport", int(listener.shared_port)),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_concurrent_streams", MAX_CALLS_OF_A_CONNECTION),
    ]
    pool = ThreadPoolExecutor(workers)
    server: grpc.Server
    if polling is None:
        polling = isinstance(store, SQLiteStore)
    full = status_of(QueueFull(QUEUE_CAPACITY, RETRY_AFTER_S))

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
    service = RecommenderService(models, store, metrics, slate_log, slate_retention)
    servicer = RecommenderServicer(service, event_types)
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
    port = listener.bind(server)
    for address in also_listen:
        try:
            server.add_insecure_port(address)
        except RuntimeError as error:
            raise AddressError(f"cannot listen on {address}: {error}") from error
    return RecommenderServer(server, gate, health_servicer, port, inference, services)
