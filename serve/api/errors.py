"""How failures reach a client: one table from exceptions to statuses, with details that a program can read."""

import logging
import uuid
from typing import NamedTuple

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from serve.model.manifest import ArtifactError
from serve.model.recommender import NoNewItems, UnknownItem
from serve.serving.errors import Cancelled, Expired, QueueFull, RefusedModel, UnknownModel
from serve.stores.base import StoreError, TooManyToMerge

logger = logging.getLogger(__name__)

DETAILS_KEY = "grpc-status-details-bin"
"""The metadata in which gRPC libraries look for a `google.rpc.Status`."""


LONGEST_TEXT = 500
"""Characters of a message. A client that gets more than 8 KiB of status, as gRPC writes it, sees another status."""


class InvalidRequest(ValueError):
    """A field of a request breaks a rule."""

    def __init__(self, field: str, expected: str, came: object) -> None:
        self.reason = f"expected {expected}, came {came}"
        super().__init__(f"{field}: {self.reason}")
        self.field = field
        self._rest = (expected, came)

    def within(self, message: str) -> "InvalidRequest":
        """The same failure of a field that lies within a message, such as `history.events[3]`."""
        return InvalidRequest(f"{message}.{self.field}", *self._rest)


class UnknownUser(LookupError):
    """No event of a user is stored."""


class SlatesNotLogged(Exception):
    """A request needs what was recommended before, and the server does not log that for all users, or for so long."""


class Refused(Exception):
    """A call ends with a status, whatever it asks: for want of a right, of its message, or of room."""

    def __init__(self, code: grpc.StatusCode, message: str, reason: str = "") -> None:
        """`reason`: for the metrics, such as `permission`."""
        super().__init__(message)
        self.code = code
        self.reason = reason


class Status(NamedTuple):
    """How a call ends for the client."""

    code: grpc.StatusCode
    message: str
    metadata: tuple[tuple[str, bytes], ...] = ()
    """The same with details, as gRPC libraries expect them in the trailing metadata."""


# With None the exception's own message is answered, which is written for clients. Other messages can hold
# paths and values of others, so they are logged and the client gets the text given here.
STATUS: dict[type[Exception], tuple[grpc.StatusCode, str | None]] = {
    InvalidRequest: (grpc.StatusCode.INVALID_ARGUMENT, None),
    UnknownItem: (grpc.StatusCode.NOT_FOUND, None),
    UnknownUser: (grpc.StatusCode.NOT_FOUND, None),
    UnknownModel: (grpc.StatusCode.NOT_FOUND, None),
    NoNewItems: (grpc.StatusCode.FAILED_PRECONDITION, None),
    SlatesNotLogged: (grpc.StatusCode.FAILED_PRECONDITION, None),
    TooManyToMerge: (grpc.StatusCode.FAILED_PRECONDITION, None),
    RefusedModel: (grpc.StatusCode.FAILED_PRECONDITION, None),
    QueueFull: (grpc.StatusCode.RESOURCE_EXHAUSTED, None),
    Expired: (grpc.StatusCode.DEADLINE_EXCEEDED, None),
    Cancelled: (grpc.StatusCode.CANCELLED, None),
    StoreError: (grpc.StatusCode.UNAVAILABLE, "the event store is not available"),
    ArtifactError: (grpc.StatusCode.UNAVAILABLE, "the model directory cannot be read"),
}
UNEXPECTED = (grpc.StatusCode.INTERNAL, "internal error")


def status_of(error: Exception) -> Status:
    """The status for an exception. What the client must not see is logged, under an id that it gets."""
    if isinstance(error, Refused):
        return Status(error.code, _shortened(str(error)))
    code, message = next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), UNEXPECTED)
    if message is not None:
        log_id = uuid.uuid4().hex
        logger.error("%s [%s]", message, log_id, exc_info=error)
        return Status(code, f"{message}, logged as {log_id}")
    return with_details(code, _shortened(str(error)), _details(error))


def with_details(code: grpc.StatusCode, message: str, details: Message | None) -> Status:
    """A status with a message of `google.rpc` (error_details.proto), or without."""
    if details is None:
        return Status(code, message)
    status = status_pb2.Status(code=code.value[0], message=message)
    status.details.add().Pack(details)
    return Status(code, message, ((DETAILS_KEY, status.SerializeToString()),))


def _details(error: Exception) -> Message | None:
    if isinstance(error, InvalidRequest):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=_shortened(error.field), description=_shortened(error.reason)
        )
        return error_details_pb2.BadRequest(field_violations=[violation])
    if isinstance(error, QueueFull):
        delay = Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        return error_details_pb2.RetryInfo(retry_delay=delay)
    return None


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}..."
