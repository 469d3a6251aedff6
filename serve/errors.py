"""How failures reach a client: one table from exceptions to gRPC status codes."""

import logging
import uuid
from collections.abc import Callable
from functools import wraps
from typing import TypeVar

import grpc

from serve.recommender import UnknownItem
from serve.store import StoreError
from serve.validate import InvalidRequest

logger = logging.getLogger(__name__)

Servicer = TypeVar("Servicer")
Request = TypeVar("Request")
Response = TypeVar("Response")


class UnknownUser(LookupError):
    """No event of a user is stored."""


# With None the exception's own message is answered, which is written for clients. Other messages can hold
# paths and values of others, so they are logged and the client gets the text given here.
STATUS: dict[type[Exception], tuple[grpc.StatusCode, str | None]] = {
    InvalidRequest: (grpc.StatusCode.INVALID_ARGUMENT, None),
    UnknownItem: (grpc.StatusCode.NOT_FOUND, None),
    UnknownUser: (grpc.StatusCode.NOT_FOUND, None),
    StoreError: (grpc.StatusCode.UNAVAILABLE, "the event store is not available"),
}
UNEXPECTED = (grpc.StatusCode.INTERNAL, "internal error")


def status_of(error: Exception) -> tuple[grpc.StatusCode, str]:
    """The status code and message for a client; logs what the client is not told, under an id that it is."""
    code, message = STATUS.get(type(error), UNEXPECTED)
    if message is None:
        return code, str(error)
    log_id = uuid.uuid4().hex
    logger.error("%s [%s]", message, log_id, exc_info=error)
    return code, f"{message}, logged as {log_id}"


def answers_errors(
    rpc: Callable[[Servicer, Request, grpc.ServicerContext], Response],
) -> Callable[[Servicer, Request, grpc.ServicerContext], Response]:
    """Decorates a servicer's method: what it raises ends the call with the status of the table."""

    @wraps(rpc)
    def handle(self: Servicer, request: Request, context: grpc.ServicerContext) -> Response:
        try:
            return rpc(self, request, context)
        except Exception as error:
            code, message = status_of(error)
            context.abort(code, message)
            raise

    return handle
