"""`grpc.health.v1.Health`, for services that are known from the start; names that clients invent leave nothing here."""

import asyncio
from collections.abc import AsyncIterator, Collection

import grpc
from grpc_health.v1 import health_pb2 as pb

from serve.api.context import Context
from serve.api.errors import Refused

OVERALL = ""
"""The name of the whole server."""


class HealthServicer:
    """Says how services stand; all are NOT_SERVING at first, and so is the whole.

    Watches run in one event loop; the rest is for any thread.
    """

    def __init__(self, services: Collection[str], loop: asyncio.AbstractEventLoop) -> None:
        self._services = frozenset(services) | {OVERALL}
        self._status = pb.HealthCheckResponse.NOT_SERVING
        self._loop = loop
        self._changed: asyncio.Future[None] = loop.create_future()

    def set_all(self, status: pb.HealthCheckResponse.ServingStatus.ValueType) -> None:
        """From now on all services have this status."""
        self._status = status
        self._loop.call_soon_threadsafe(self._tell)

    def Check(self, request: pb.HealthCheckRequest, context: Context) -> pb.HealthCheckResponse:
        if request.service not in self._services:
            raise Refused(grpc.StatusCode.NOT_FOUND, "there is no such service")
        return pb.HealthCheckResponse(status=self._status)

    def List(self, request: pb.HealthListRequest, context: Context) -> pb.HealthListResponse:
        status = pb.HealthCheckResponse(status=self._status)
        return pb.HealthListResponse(statuses=dict.fromkeys(sorted(self._services), status))

    async def Watch(self, request: pb.HealthCheckRequest, context: Context) -> AsyncIterator[pb.HealthCheckResponse]:
        """How the service stands, at once and whenever that changes. A client that reads slowly misses what is past."""
        if request.service not in self._services:
            # It stays open, as the protocol wants it; such a service will never come.
            yield pb.HealthCheckResponse(status=pb.HealthCheckResponse.SERVICE_UNKNOWN)
            await self._loop.create_future()
        while True:
            told = self._status
            yield pb.HealthCheckResponse(status=told)
            while self._status == told:
                await asyncio.shield(self._changed)

    def _tell(self) -> None:
        changed, self._changed = self._changed, self._loop.create_future()
        changed.set_result(None)
