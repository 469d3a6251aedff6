"""Health checking: what is watched, and that no client fills the server's memory with it."""

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serve.front.server import SERVICE, create_server
from serve.model.recommender import Recommender
from serve.stores.base import EventStore
from tests.serve.one_model import one_model

PATIENCE_S = 30.0
STATUS = health_pb2.HealthCheckResponse


def test_watches_of_unknown_services_stay_open(model: Recommender, store: EventStore) -> None:
    server = create_server(one_model(model, store), store, "127.0.0.1:0")
    server.listen()
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        known = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=PATIENCE_S)
        assert next(known).status == STATUS.NOT_SERVING
        watches = []
        for number in range(5):
            watch = stub.Watch(health_pb2.HealthCheckRequest(service=f"another.{number}"), timeout=PATIENCE_S)
            assert next(watch).status == STATUS.SERVICE_UNKNOWN
            watches.append(watch)
        server.start()
        assert next(known).status == STATUS.SERVING
        assert all(watch.is_active() for watch in watches)
        for watch in (known, *watches):
            watch.cancel()
    server.drain()
