"""Health checking: what is watched, and that no client fills the server's memory with it."""

from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serve.api.health import HealthServicer

PATIENCE_S = 30.0
STATUS = health_pb2.HealthCheckResponse


def test_watches_of_unknown_services_stay_open_and_leave_nothing() -> None:
    servicer = HealthServicer(["a.Service"])
    server = grpc.server(ThreadPoolExecutor(2))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        known = stub.Watch(health_pb2.HealthCheckRequest(service="a.Service"), timeout=PATIENCE_S)
        assert next(known).status == STATUS.NOT_SERVING
        watches = []
        for number in range(5):
            watch = stub.Watch(health_pb2.HealthCheckRequest(service=f"another.{number}"), timeout=PATIENCE_S)
            assert next(watch).status == STATUS.SERVICE_UNKNOWN
            watches.append(watch)
        servicer.set("a.Service", STATUS.SERVING)
        assert next(known).status == STATUS.SERVING
        assert all(watch.is_active() for watch in watches)
        # grpc's own list of who watches what.
        assert set(servicer._send_response_callbacks) == {"a.Service"}
    assert server.stop(PATIENCE_S).wait(PATIENCE_S)
