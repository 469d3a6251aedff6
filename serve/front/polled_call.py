"""One call in the polling thread (`serve.front.polling`): grpc's context of it, and its progress."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import grpc
from grpc import _common
from grpc._cython import cygrpc  # type: ignore[attr-defined]

from serve.front.overdue import Unreceived, Unsent

logger = logging.getLogger(__name__)

Metadata = Sequence[tuple[str, str | bytes]]
_NO_FLAGS = 0


class PolledCall(grpc.ServicerContext):
    """A call with one request message.

    Of the polling thread, which alone counts what is due; a handler in the pool has the context and sends the answer.
    """

    def __init__(self, event: Any, method: str, answer: Callable[["PolledCall", bytes], None], unsent: Unsent) -> None:
        """`answer` is called when the message is there; the call is in `unsent` from when it is answered."""
        self.method = method
        self._unsent = unsent
        self._event = event
        self._call = event.call
        self._has_message = answer
        self._handler: grpc.RpcMethodHandler | None = None
        self._is_cancelled = self._is_answered = self._is_aborted = False
        self._initial: Metadata = ()
        self._trailing: Metadata = ()
        self._code: grpc.StatusCode | None = None
        self._details = ""
        self._callbacks: list[Callable[[], None]] = []
        self._writer: _Writer | None = None
        self._due = 1
        self._leave_pool: Callable[[], None] | None = None
        self._is_due_to_send = False
        self.is_stream = False
        self._unreceived: Unreceived | None = None
        self._peer = ""

    @property
    def is_over(self) -> bool:
        """Whether all that was begun has ended, so that the call can be forgotten."""
        return not self._due and (self._writer is None or not self._writer.is_writing)

    def begin(self, handler: grpc.RpcMethodHandler, unreceived: Unreceived) -> None:
        """Waits for the message, among the `unreceived`; a handler that `refuses` in any case is not made to wait."""
        self._handler = handler
        if getattr(handler.unary_unary, "refuses", False):
            self._call.start_server_batch((cygrpc.ReceiveCloseOnServerOperation(_NO_FLAGS),), self._on_close)
            self.answer(b"")
            return
        self._call.start_server_batch((cygrpc.ReceiveCloseOnServerOperation(_NO_FLAGS),), self._on_close)
        self._unreceived = unreceived
        unreceived.add(self)

    def receive(self) -> None:
        """Asks gRPC for the message."""
        self._due += 1
        self._call.start_server_batch((cygrpc.ReceiveMessageOperation(_NO_FLAGS),), self._on_message)

    def turn_away(self, code: grpc.StatusCode, details: str, metadata: Metadata = ()) -> None:
        """Ends the call unread, all in one operation, instead of `begin`."""
        self._is_answered = True
        self._unsent.add(self, 0)
        status = _common.STATUS_CODE_TO_CYGRPC_STATUS_CODE[code]
        self._call.start_server_batch(
            (
                cygrpc.ReceiveCloseOnServerOperation(_NO_FLAGS),
                cygrpc.SendInitialMetadataOperation((), _NO_FLAGS),
                cygrpc.SendStatusFromServerOperation(metadata, status, details.encode(), _NO_FLAGS),
            ),
            self._on_close,
        )

    def refuse(self, code: grpc.StatusCode, details: str, metadata: Metadata = ()) -> None:
        """Ends the call after `begin`, before it is answered."""
        self._trailing = metadata
        self._send(None, code, details)

    def give_up(self, code: grpc.StatusCode, details: str) -> None:
        """As `refuse`, and gRPC drops at once what it has of the message, whether the client reads this or not."""
        self._is_answered = True
        self._call.cancel(_common.STATUS_CODE_TO_CYGRPC_STATUS_CODE[code], details)

    def hand_over(self, leave_pool: Callable[[], None]) -> None:
        """Before a thread of a pool answers: it sends something in any case, which is due from now on.

        `leave_pool` is called when it has an answer, before the client can have it and call again.
        """
        self._leave_pool = leave_pool
        self._is_due_to_send = True
        self._due += 1

    def answer_in_pool(self, message: bytes) -> None:
        """As `answer`, in another thread: whatever happens, the call ends."""
        try:
            self.answer(message)
        except BaseException:
            logger.critical("a thread of the pool was to end", exc_info=True)
            self._send(None, grpc.StatusCode.INTERNAL, "internal error")

    def answer(self, message: bytes) -> None:
        """Runs the handler and sends what came of it."""
        handler = self._handler
        assert handler is not None
        if self._is_cancelled:
            self._send(None, grpc.StatusCode.CANCELLED, "")
            return
        try:
            request = handler.request_deserializer(message) if handler.request_deserializer else message
        except Exception:
            self._send(None, grpc.StatusCode.INTERNAL, "the request message cannot be read")
            return
        try:
            if handler.unary_unary is None:
                self._stream(handler, request)
                return
            response = handler.unary_unary(request, self)
            if handler.response_serializer:
                response = handler.response_serializer(response)
        except Exception:
            if not self._is_aborted:
                logger.exception("a handler failed")
                self._code, self._details = grpc.StatusCode.UNKNOWN, "internal error"
            self._send(None, self._code or grpc.StatusCode.UNKNOWN, self._details)
        else:
            self._send(response, self._code or grpc.StatusCode.OK, self._details)

    def end(self) -> None:
        """Calls the callbacks: the call is over."""
        for callback in self._callbacks:
            try:
                callback()
            except Exception:
                logger.exception("a callback failed")

    def _stream(self, handler: Any, request: Any) -> None:
        self._writer = _Writer(self._call, handler.response_serializer, self._on_written)
        handler.unary_stream(request, self, self._writer.write)

    def _on_close(self, event: Any) -> None:
        self._due -= 1
        self._received()
        self._is_cancelled = event.batch_operations[0].cancelled()
        if self._writer is not None:
            self._writer.close()

    def _on_message(self, event: Any) -> None:
        self._due -= 1
        self._received()
        message = event.batch_operations[0].message()
        if self._is_answered:
            # It came too late.
            return
        if message is not None:
            self._has_message(self, message)
        elif not self._is_cancelled:
            self._send(None, grpc.StatusCode.UNIMPLEMENTED, "expected one request message, came none")

    def _received(self) -> None:
        if self._unreceived is not None:
            self._unreceived.remove(self)
            self._unreceived = None

    def _on_sent(self, _: Any) -> None:
        self._due -= 1

    def _on_written(self, _: Any) -> None:
        assert self._writer is not None
        self._writer.written()

    def _send(self, message: bytes | None, code: grpc.StatusCode, details: str) -> None:
        if self._leave_pool is not None:
            self._leave_pool()
            self._leave_pool = None
        if self._is_due_to_send:
            # Also of a call that was cancelled meanwhile: gRPC takes it and sends nothing.
            pass
        elif self._is_cancelled:
            return
        else:
            self._due += 1
        self._is_answered = True
        status = _common.STATUS_CODE_TO_CYGRPC_STATUS_CODE[code]
        operations = [
            cygrpc.SendInitialMetadataOperation(self._initial, _NO_FLAGS),
            cygrpc.SendStatusFromServerOperation(self._trailing, status, details.encode(), _NO_FLAGS),
        ]
        if message is not None:
            operations.append(cygrpc.SendMessageOperation(message, _NO_FLAGS))
        self._unsent.add(self, len(message or b""))
        self._call.start_server_batch(operations, self._on_sent)

    # What follows is grpc.ServicerContext, which documents it.

    def is_active(self) -> bool:
        return not (self._is_cancelled or self._is_answered)

    def time_remaining(self) -> float:
        return max(self._event.call_details.deadline - time.time(), 0)

    def cancel(self) -> None:  # type: ignore[override]  # as in grpc itself, whatever its stubs say
        self._call.cancel()

    def add_callback(self, callback: Callable[[], None]) -> bool:
        self._callbacks.append(callback)
        return True

    def invocation_metadata(self) -> Any:
        return self._event.invocation_metadata

    def peer(self) -> str:
        if not self._peer:
            self._peer = str(_common.decode(self._call.peer()))
        return self._peer

    def peer_identities(self) -> Iterable[bytes] | None:
        found: Iterable[bytes] | None = cygrpc.peer_identities(self._call)
        return found

    def peer_identity_key(self) -> str | None:
        key = cygrpc.peer_identity_key(self._call)
        return None if key is None else str(_common.decode(key))

    def auth_context(self) -> Mapping[str, Any]:
        found = cygrpc.auth_context(self._call) or {}
        return {_common.decode(key): value for key, value in found.items()}

    def send_initial_metadata(self, initial_metadata: Metadata) -> None:
        """Here it travels with the answer."""
        self._initial = initial_metadata

    def set_trailing_metadata(self, trailing_metadata: Metadata) -> None:
        self._trailing = trailing_metadata

    def trailing_metadata(self) -> Any:
        return self._trailing

    def abort(self, code: grpc.StatusCode, details: str) -> NoReturn:
        self._code = grpc.StatusCode.UNKNOWN if code is grpc.StatusCode.OK else code
        self._details = details
        self._is_aborted = True
        raise Exception("the call was aborted")

    def abort_with_status(self, status: grpc.Status) -> NoReturn:
        self._trailing = status.trailing_metadata or ()
        self.abort(status.code, status.details)

    def set_code(self, code: grpc.StatusCode) -> None:
        self._code = code

    def set_details(self, details: str) -> None:
        self._details = details

    def code(self) -> grpc.StatusCode | None:
        return self._code

    def details(self) -> bytes:
        return self._details.encode()


class _Writer:
    """Writes messages to a stream from any thread, without waiting for the client to take them.

    While one is on its way, of those that follow only the last is kept: for streams that say how something stands.
    """

    def __init__(self, call: Any, serializer: Callable[[Any], bytes] | None, on_written: Callable[[Any], None]) -> None:
        self._call = call
        self._serializer = serializer
        self._on_written = on_written
        self._lock = threading.Lock()
        self._next: Any = None
        self._is_closed = False
        self._is_first = True
        self.is_writing = False

    def write(self, response: Any) -> None:
        """None, for the end of the stream, is left to the client."""
        with self._lock:
            if self._is_closed or response is None:
                return
            if self.is_writing:
                self._next = response
            else:
                self._start(response)

    def close(self) -> None:
        with self._lock:
            self._is_closed = True

    def written(self) -> None:
        """What was on its way has left; it is the turn of what came meanwhile."""
        with self._lock:
            self.is_writing = False
            response, self._next = self._next, None
            if response is not None and not self._is_closed:
                self._start(response)

    def _start(self, response: Any) -> None:
        operations = [cygrpc.SendInitialMetadataOperation((), _NO_FLAGS)] if self._is_first else []
        message = self._serializer(response) if self._serializer else response
        operations.append(cygrpc.SendMessageOperation(message, _NO_FLAGS))
        self._is_first = False
        self.is_writing = True
        self._call.start_server_batch(operations, self._on_written)
