"""Health checking whose memory no client can fill: it needs no token."""

from collections.abc import Callable, Collection
from typing import Any

from grpc_health.v1 import health, health_pb2


class HealthServicer(health.HealthServicer):
    """grpc's, for services that are known from the start.

    grpc keeps every name that was ever watched. Here a watch of another service gets SERVICE_UNKNOWN, stays
    open as the protocol wants it, and leaves nothing behind: such a service will never come.
    """

    def __init__(self, services: Collection[str]) -> None:
        """All services are NOT_SERVING, and so is the whole, which is called ""."""
        super().__init__()
        self._services = frozenset(services) | {health.OVERALL_HEALTH}
        for name in self._services:
            self.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)

    def Watch(
        self,
        request: health_pb2.HealthCheckRequest,
        context: Any,
        send_response_callback: Callable[[health_pb2.HealthCheckResponse | None], None] | None = None,
    ) -> Any:
        if request.service in self._services or send_response_callback is None:
            return super().Watch(request, context, send_response_callback)
        send_response_callback(health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVICE_UNKNOWN))
        return None
