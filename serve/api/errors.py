"""How failures reach a client: one table from exceptions to statuses, with details that a program can read."""

import logging
import random
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, TypeVar, TypeVarTuple

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from serve.event_log.slates import TooLong, TooSlow
from serve.model.manifest import ArtifactError
from serve.model.recommender import NoNewItems, UnknownItem
from serve.serving.errors import Cancelled, Expired, QueueFull, RefusedModel, UnknownModel
from serve.stores.base import StoreError, TooManyToMerge

logger = logging.getLogger(__name__)

DETAILS_KEY = "grpc-status-details-bin"
"""The metadata in which gRPC libraries look for a `google.rpc.Status`."""
PUSHBACK_KEY = "grpc-retry-pushback-ms"
"""The metadata that says to a gRPC library, if it repeats the call at all, when: in milliseconds."""
DOMAIN = "jaxrec"
MOST_VIOLATIONS = 16
RETRY_SHARES = 0.5, 1.5
"""An overloaded server names a random time between so many of its own: else all that it turned away at once would come
again at once."""
# gRPC's libraries take 8 KiB of metadata. In it, a byte of the message can take three, and three of the details four.
LONGEST_MESSAGE = 500
LONGEST_REASON = 400
MOST_DETAILS = 3_000

Arguments = TypeVarTuple("Arguments")
T = TypeVar("T")


class Violation(NamedTuple):
    """What is wrong with a field of a request."""

    field: str
    reason: str

    def __str__(self) -> str:
        return f"{self.field}: {self.reason}"


class InvalidRequest(ValueError):
    """Fields of a request break rules."""

    def __init__(self, field: str, expected: str, came: object) -> None:
        """One field does; for several see `Violations`."""
        self.violations: tuple[Violation, ...] = (Violation(field, f"expected {expected}, came {came}"),)
        super().__init__(str(self.violations[0]))

    @classmethod
    def of(cls, violations: Iterable[Violation]) -> "InvalidRequest":
        """At least one."""
        error = cls.__new__(cls)
        error.violations = tuple(violations)
        error.args = ("; ".join(map(str, error.violations)),)
        return error

    def within(self, message: str) -> "InvalidRequest":
        """The same failure of fields that lie within a message, such as `history.events[3]`."""
        return self.of(Violation(f"{message}.{field}", reason) for field, reason in self.violations)


class Violations:
    """Gathers what is wrong with a request, the first `MOST_VIOLATIONS`, so that its client learns of all at once."""

    def __init__(self) -> None:
        self._found: list[Violation] = []

    def __len__(self) -> int:
        return len(self._found)

    @property
    def is_full(self) -> bool:
        """Whether more would not be named."""
        return len(self._found) >= MOST_VIOLATIONS

    def check(self, check: Callable[[*Arguments], T], *arguments: *Arguments) -> T | None:
        """What a check returns; None if it raised InvalidRequest, which is kept."""
        try:
            return check(*arguments)
        except InvalidRequest as error:
            self._keep(error)
            return None

    def passes(self, check: Callable[[*Arguments], object], *arguments: *Arguments) -> bool:
        """Whether a check raises nothing; as `check`, for what depends on the checked value."""
        try:
            check(*arguments)
        except InvalidRequest as error:
            self._keep(error)
            return False
        return True

    def add(self, field: str, expected: str, came: object) -> None:
        """Keeps one."""
        if not self.is_full:
            self._keep(InvalidRequest(field, expected, came))

    def _keep(self, error: InvalidRequest) -> None:
        self._found += error.violations[: MOST_VIOLATIONS - len(self._found)]

    def put_within(self, message: str, first: int) -> None:
        """Says of those from the `first` on that their fields lie within a message, such as `history.events[3]`."""
        for at in range(first, len(self._found)):
            field, reason = self._found[at]
            self._found[at] = Violation(f"{message}.{field}", reason)

    def raise_any(self) -> None:
        """Raises InvalidRequest if there is something."""
        if self._found:
            raise InvalidRequest.of(self._found)


class UnknownUser(LookupError):
    """No event of a user is stored."""


class SlatesNotLogged(Exception):
    """A request needs what was recommended before, and the server does not log that for all users, or for so long."""


class NoToken(Exception):
    """A call comes without a token that the server knows."""

    def __init__(self) -> None:
        super().__init__("expected the metadata authorization: Bearer TOKEN")


class NoRight(Exception):
    """A call comes with a token that may not make it."""

    def __init__(self, right: str) -> None:
        super().__init__(f"the token has not the right {right!r}")


class NotServing(Exception):
    """The server is starting or ending."""


class Refused(Exception):
    """A call ends with a status of the protocol, whatever it asks, as gRPC itself would end it: without details."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class Status(NamedTuple):
    """How a call ends for the client."""

    code: grpc.StatusCode
    message: str
    metadata: tuple[tuple[str, str | bytes], ...] = ()
    """The trailing metadata: the same with details, as gRPC libraries expect them, and when to try again."""

    @property
    def details(self) -> bytes:
        """The same as a `google.rpc.Status`."""
        return next((value for _, value in self.metadata if isinstance(value, bytes)), b"")


class Meaning(NamedTuple):
    """What an exception is for a client."""

    code: grpc.StatusCode
    reason: str
    """Of `google.rpc.ErrorInfo`; it stays the same while messages change. docs/serving.md has all."""
    message: str | None = None
    """None: the exception's own message, which is written for clients. Other messages can hold paths and values of
    others, so they are logged and the client gets this text."""


STATUS: Mapping[type[Exception], Meaning] = {
    InvalidRequest: Meaning(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
    UnknownItem: Meaning(grpc.StatusCode.NOT_FOUND, "ITEM_NOT_FOUND"),
    UnknownUser: Meaning(grpc.StatusCode.NOT_FOUND, "USER_NOT_FOUND"),
    UnknownModel: Meaning(grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"),
    NoNewItems: Meaning(grpc.StatusCode.FAILED_PRECONDITION, "NO_NEW_ITEM_VECTORS"),
    SlatesNotLogged: Meaning(grpc.StatusCode.FAILED_PRECONDITION, "RECOMMENDATIONS_NOT_LOGGED"),
    TooManyToMerge: Meaning(grpc.StatusCode.FAILED_PRECONDITION, "TOO_MUCH_TO_MERGE"),
    TooLong: Meaning(grpc.StatusCode.FAILED_PRECONDITION, "LOG_TOO_LONG"),
    TooSlow: Meaning(grpc.StatusCode.DEADLINE_EXCEEDED, "LOG_TOO_SLOW"),
    RefusedModel: Meaning(grpc.StatusCode.FAILED_PRECONDITION, "MODEL_REFUSED"),
    QueueFull: Meaning(grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED"),
    Expired: Meaning(grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
    Cancelled: Meaning(grpc.StatusCode.CANCELLED, "CANCELLED"),
    NoToken: Meaning(grpc.StatusCode.UNAUTHENTICATED, "TOKEN_REQUIRED"),
    NoRight: Meaning(grpc.StatusCode.PERMISSION_DENIED, "RIGHT_REQUIRED"),
    NotServing: Meaning(grpc.StatusCode.UNAVAILABLE, "NOT_SERVING"),
    ArtifactError: Meaning(grpc.StatusCode.UNAVAILABLE, "MODELS_UNAVAILABLE", "the model directory cannot be read"),
    StoreError: Meaning(grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE", "the event store is not available"),
}
UNEXPECTED = Meaning(grpc.StatusCode.INTERNAL, "INTERNAL", "internal error")
OF_THE_SERVER = (QueueFull, Expired, Cancelled, StoreError)
"""What fails a whole batch, not one of its requests: it can be repeated as it is."""


def status_of(error: Exception) -> Status:
    """The status for an exception. What the client must not see is logged, under an id that it gets."""
    if isinstance(error, Refused):
        return Status(error.code, str(error))
    code, reason, message = next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), UNEXPECTED)
    info = error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN)
    if message is not None:
        info.metadata["log_id"] = log_id = uuid.uuid4().hex
        logger.error("%s [%s]", message, log_id, exc_info=error)
        return _status(code, f"{message}, logged as {log_id}", info)
    if isinstance(error, QueueFull):
        after_s, delay = error.retry_after_s * random.uniform(*RETRY_SHARES), Duration()
        delay.FromNanoseconds(int(after_s * 1e9))
        # At least 1: 0 would be at once.
        pushback = (PUSHBACK_KEY, str(max(1, round(after_s * 1e3))))
        return _status(code, str(error), info, error_details_pb2.RetryInfo(retry_delay=delay), pushback=pushback)
    if isinstance(error, InvalidRequest):
        return _status(code, str(error), info, _bad_request(error.violations))
    return _status(code, str(error), info)


def _status(code: grpc.StatusCode, message: str, *details: Message, pushback: tuple[str, str] | None = None) -> Status:
    """A status with messages of `google.rpc` (error_details.proto)."""
    text = _cut(message, LONGEST_MESSAGE)
    status = status_pb2.Status(code=code.value[0], message=text)
    for one in details:
        status.details.add().Pack(one)
    encoded = (DETAILS_KEY, status.SerializeToString())
    return Status(code, text, (encoded,) if pushback is None else (encoded, pushback))


def _bad_request(violations: Iterable[Violation]) -> error_details_pb2.BadRequest:
    """As many of the violations as fit, at least the first."""
    found = error_details_pb2.BadRequest()
    for field, reason in violations:
        found.field_violations.add(field=field, description=_cut(reason, LONGEST_REASON))
        if found.ByteSize() > MOST_DETAILS:
            found.field_violations.pop()
            break
    return found


def _cut(text: str, most: int) -> str:
    """At most so many bytes of UTF-8, with dots where something is missing."""
    encoded = text.encode("utf-8", "backslashreplace")
    return encoded.decode() if len(encoded) <= most else f"{encoded[: most - 3].decode(errors='ignore')}..."
