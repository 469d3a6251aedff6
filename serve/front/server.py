"""Puts the servicer, health checking and reflection on one port."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_reflection.v1alpha.reflection import aio

from serve.addresses import AddressError, SecurityError, check_exposure, host_and_port
from serve.api.admin import ModelAdminServicer
from serve.api.event_types import BUILT_IN, EventTypes
from serve.api.health import HealthServicer
from serve.api.inference import InferenceServicer
from serve.api.recommender import RecommenderServicer
from serve.api.service import RecommenderService
from serve.front.auth import Tokens
from serve.front.calls import Calls, Method, methods_of
from serve.front.gate import Gate
from serve.front.lifecycle import RecommenderServer
from serve.front.limits import (
    CONNECTION_AGE_S,
    CONNECTION_GRACE_S,
    MAX_ADMIN_CALLS,
    MAX_CALLS,
    MAX_SLOW_CALLS,
    OPTIONS,
    SLOW_WORKERS,
    WORKERS,
)
from serve.front.loop import shared_loop
from serve.front.pool import Pool
from serve.front.recommends import Recommends
from serve.front.restarts import KeptServer
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
from serve.serving.loaded import Models
from serve.serving.versions import ModelLibrary
from serve.stores.base import EventStore

SERVICE = recommender_pb2.DESCRIPTOR.services_by_name["Recommender"].full_name
INFERENCE_SERVICE = open_inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
ADMIN_SERVICE = model_admin_pb2.DESCRIPTOR.services_by_name["ModelAdmin"].full_name
HEALTH_SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
REFLECTION_SERVICE = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"].full_name
SERVICES = (SERVICE, INFERENCE_SERVICE)
FILES = (recommender_pb2, open_inference_pb2, model_admin_pb2, health_pb2)
METHODS = frozenset(
    f"/{service.full_name}/{method.name}"
    for file in FILES
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
)

RECOMMEND = f"/{SERVICE}/Recommend"
# These run the model for many rows: in a few threads of their own.
SLOW = (f"/{SERVICE}/BatchRecommend", f"/{INFERENCE_SERVICE}/ModelInfer")
GET_OUTCOMES = f"/{ADMIN_SERVICE}/GetOutcomes"
# In the loop and in any state of the server, since they report it: a busy server must not be mistaken for a dead one.
AT_ONCE = (
    f"/{HEALTH_SERVICE}/Check",
    f"/{HEALTH_SERVICE}/List",
    f"/{INFERENCE_SERVICE}/ServerLive",
    f"/{INFERENCE_SERVICE}/ServerReady",
    f"/{INFERENCE_SERVICE}/ModelReady",
)


@dataclass(frozen=True, slots=True)
class Listener:
    """Where a server listens and for whom."""

    address: str
    """HOST:PORT, with port 0 for a free one; or unix:PATH."""
    tls: Tls | None = None
    tokens: Tokens | None = None
    """None: every caller may do everything."""
    allow_insecure: bool = False
    """Whether other machines may reach the address without TLS or authentication."""
    shared_port: bool = False
    """Whether other servers of the same kind may listen there too; the kernel spreads connections over them."""

    def __post_init__(self) -> None:
        """Raises AddressError, and SecurityError for an address that others reach without TLS or authentication."""
        if not self.address.startswith("unix:"):
            host_and_port(self.address)
        authenticated = self.tokens is not None or (self.tls is not None and self.tls.client_ca is not None)
        check_exposure(self.address, self.tls is not None, authenticated, self.allow_insecure)

    def at(self, port: int) -> str:
        """The address with the port that it was bound to."""
        host = self.address.rpartition(":")[0]
        return self.address if self.address.startswith("unix:") else f"{host}:{port}"

    def bind(self, server: grpc.aio.Server) -> int:
        """The port, once the server has it; raises AddressError."""
        if self.tls is None:
            return _bound(self.address, server.add_insecure_port)
        credentials = self.tls.credentials()
        return _bound(self.address, lambda address: server.add_secure_port(address, credentials))


def _bound(address: str, bind: Callable[[str], int]) -> int:
    try:
        return bind(address)
    except RuntimeError as error:
        raise AddressError(f"cannot listen on {address}: {error}") from error


def _check_doors(listener: Listener, also_listen: Sequence[str], fast: str | None) -> None:
    if fast is not None and listener.tokens is None and listener.tls is not None and listener.tls.client_ca is not None:
        raise SecurityError(
            "the fast front: expected tokens beside tls_client_ca, since it has no TLS and asks for no certificate"
        )
    for address in also_listen:
        if not address.startswith("unix:"):
            raise AddressError(f"expected unix:PATH, came {address}")


def create_server(
    models: Models,
    store: EventStore,
    listener: str | Listener,
    *,
    also_listen: Sequence[str] = (),
    workers: int = WORKERS,
    metrics: Metrics | None = None,
    tracer: Tracer | None = None,
    log_calls: bool = False,
    event_types: EventTypes = BUILT_IN,
    slate_log: float = 1.0,
    slate_retention: float = 0.0,
    max_calls: int = MAX_CALLS,
    connection_age_s: float = CONNECTION_AGE_S,
    connection_grace_s: float = CONNECTION_GRACE_S,
    fast: str | None = None,
    on_failure: Callable[[], None] = lambda: None,
) -> RecommenderServer:
    """Binds a port for a server that is not started yet.

    Args:
        models: The loaded models; a `ModelLibrary` comes with the admin service.
        store: The events of all users.
        listener: Where to listen and for whom, or just HOST:PORT.
        also_listen: Unix sockets (`unix:PATH`) for this machine, where the same tokens are asked for.
        workers: Threads for what neither the event loop answers nor runs the model for many rows.
        metrics: Where to count; None: metrics that are not published.
        tracer: Makes a span for each call; None: that of the process, if it has one.
        log_calls: Whether every call gets a line in the log.
        event_types: The types of events that are accepted, with their weights.
        slate_log: The share of the users whose answers are logged, 0 to 1.
        slate_retention: For how many days answers stay in the log; 0: without an end.
        max_calls: So many calls have one of `workers` or wait for it; further ones are RESOURCE_EXHAUSTED at once.
        connection_age_s: After so long a client is asked to connect anew.
        connection_grace_s: After so long more what is still under way on the old connection ends.
        fast: Where the fast front listens, which answers Recommend alone: unix:PATH or HOST:PORT of loopback. None:
            there is none.
        on_failure: Called when the event loop fails: the server answers nothing any more and should end.

    Raises:
        AddressError: The address cannot be used.
        SecurityError: Other machines reach it without TLS or authentication, or the fast front would let in everybody
            on this machine while the address asks for certificates.
    """
    listener = Listener(listener) if isinstance(listener, str) else listener
    _check_doors(listener, also_listen, fast)
    metrics, gate, shared = metrics or Metrics(), Gate(), shared_loop()
    metrics.know_methods(METHODS)
    metrics.count_under_way(lambda: gate.under_way)
    metrics.count_dropped(lambda: store.dropped_count)

    service = RecommenderService(models, store, metrics, slate_log, slate_retention)
    recommender = RecommenderServicer(service, event_types)
    inference = InferenceServicer(models)
    services = [*SERVICES, *([ADMIN_SERVICE] if isinstance(models, ModelLibrary) else [])]
    health = HealthServicer(services, shared.loop)
    reflection = aio.ReflectionServicer((*services, HEALTH_SERVICE, REFLECTION_SERVICE))
    handlers = methods_of(recommender_pb2_grpc.add_RecommenderServicer_to_server, recommender)
    handlers |= methods_of(open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server, inference)
    handlers |= methods_of(health_pb2_grpc.add_HealthServicer_to_server, health)
    handlers |= methods_of(reflection_pb2_grpc.add_ServerReflectionServicer_to_server, reflection)
    pool, slow = Pool(workers, max_calls, "grpc-pool"), Pool(SLOW_WORKERS, MAX_SLOW_CALLS, "grpc-slow")
    recommends = Recommends(recommender, shared.loop, shared.ident)
    pools: dict[str, Pool | None] = dict.fromkeys(handlers, pool)
    pools |= dict.fromkeys(SLOW, slow) | dict.fromkeys(AT_ONCE) | {RECOMMEND: slow}
    if isinstance(models, ModelLibrary):
        admin = methods_of(model_admin_pb2_grpc.add_ModelAdminServicer_to_server, ModelAdminServicer(models, store))
        # One at a time anyway, and loading one may take a minute. Logs are read one at a time, too.
        pools |= dict.fromkeys(admin, Pool(1, MAX_ADMIN_CALLS, "grpc-admin"))
        pools[GET_OUTCOMES] = Pool(1, MAX_ADMIN_CALLS, "grpc-outcomes")
        handlers |= admin
    methods = [Method.of(name, handler, pools[name], at_once=name in AT_ONCE) for name, handler in handlers.items()]
    methods = [
        replace(method, in_loop=recommends, check=recommends.check) if method.name == RECOMMEND else method
        for method in methods
    ]
    calls = Calls(methods, gate, metrics, listener.tokens, tracer or tracer_of_the_process(), log_calls)
    options = [
        *OPTIONS,
        # Unless asked for: a forgotten old server would answer every other call.
        ("grpc.so_reuseport", int(listener.shared_port)),
        ("grpc.max_connection_age_ms", round(1e3 * connection_age_s)),
        ("grpc.max_connection_age_grace_ms", round(1e3 * connection_grace_s)),
    ]

    def open_server(port: int | None) -> tuple[grpc.aio.Server, int]:
        server = grpc.aio.server(options=options)
        server.add_generic_rpc_handlers((calls,))
        port = (listener if port is None else replace(listener, address=listener.at(port))).bind(server)
        for address in also_listen:
            _bound(address, server.add_insecure_port)
        return server, port

    sockets = [one.removeprefix("unix:") for one in (listener.address, *also_listen) if one.startswith("unix:")]

    async def bind() -> KeptServer:
        return KeptServer(open_server, sockets, metrics.restarted, on_failure)

    fast_front = None
    if fast is not None:
        from serve.front.fast import FastFront

        fast_front = FastFront(
            fast,
            RECOMMEND,
            recommender,
            calls,
            gate,
            slow,
            shared_port=listener.shared_port,
            on_failure=on_failure,
        )
    try:
        kept = shared.wait_for(bind())
    except BaseException:
        if fast_front is not None:
            fast_front.close()
        raise
    shared.on_failure(on_failure)
    return RecommenderServer(kept, calls, gate, health, inference, lambda: shared.forget(on_failure), fast_front)
