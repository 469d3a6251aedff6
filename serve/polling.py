"""A gRPC server that answers its hot methods in the thread that polls for them.

`grpc.server` hands a call from its polling thread to a worker, back, and to the worker again: most of the CPU that an
empty call costs. Here the polling thread answers the methods named as `inline` itself. A handler that waits for a
`Batcher` is set aside (each runs in a greenlet) while the thread takes in the calls that are there already; when there
are no more the model runs once, and then the thread looks again who has come. With `capacity` calls set aside, further
ones are turned away unread, for a fraction of what an answer costs: what cannot be answered in time must not wait in
gRPC, where nobody counts it, nor take the time of the others.

Everything else is grpc's own: other methods, health, reflection and streams go to the thread pool, interceptors and
servicers are the usual ones, and so are `stop` and its grace.

This reaches into `grpc._server`, which promises nothing: `is_supported` says whether the installed grpcio has what is
used here, and `grpc.server` does the same job, only slower. A handler of an inline method holds up all others while it
computes or blocks, so it must do neither for long: a store on another machine wants the thread pool.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import grpc
from greenlet import getcurrent, greenlet
from grpc import _common, _server
from grpc._cython import cygrpc  # type: ignore[attr-defined]

from serve import batching

logger = logging.getLogger(__name__)

# So many events (a call has three or four) are taken in before the model runs, even if more are there.
MOST_AT_ONCE = 256
# For each run of the model: what gRPC does for a call costs more than half of an answer, also for one that is turned
# away. With as many turned away as answered, 62 % of the peak were answered; whoever comes beyond that waits.
MOST_TURNED_AWAY = batching.LARGEST_BATCH // 4
IDLE_S = 1.0
_NO_FLAGS = 0
_USED = (
    *("_Server", "_ServerStage", "_HandlerCallDetails"),
    *("_process_event_and_continue", "_request_registered_call", "_request_call"),
    *("_stop_serving", "_begin_shutdown_once"),
)

Metadata = Sequence[tuple[str, str | bytes]]
TurnedAway = tuple[grpc.StatusCode, str, Metadata]
"""How a call ends that is not looked at: status, message and trailing metadata."""


def is_supported() -> bool:
    """Whether the installed grpcio has the parts that this is built from."""
    return all(hasattr(_server, name) for name in _USED) and hasattr(_server._Server, "add_registered_method_handlers")


def polling_server(
    pool: ThreadPoolExecutor,
    inline: Collection[str],
    *,
    interceptors: Sequence[grpc.ServerInterceptor] = (),
    options: Sequence[tuple[str, Any]] = (),
    maximum_concurrent_rpcs: int | None = None,
    capacity: int = batching.DEFAULT_CAPACITY,
    turn_away: Callable[[], TurnedAway] = lambda: (grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls wait", ()),
) -> "PollingServer":
    """As `grpc.server`, with the full names of the unary methods (`/package.Service/Method`) to be answered inline.

    While `capacity` of those wait, further ones end with the status of `turn_away`, without reaching an interceptor.
    `maximum_concurrent_rpcs` counts the others only.

    Those must be registered by their generated `add_...Servicer_to_server`.
    """
    arguments = (pool, (), tuple(interceptors), tuple(options), maximum_concurrent_rpcs, None, False)
    return PollingServer(frozenset(inline), capacity, turn_away, *arguments)


class PollingServer(_server._Server):
    """A `grpc.Server`; made by `polling_server`."""

    def __init__(
        self, inline: frozenset[str], capacity: int, turn_away: Callable[[], TurnedAway], *arguments: Any
    ) -> None:
        super().__init__(*arguments)
        self._inline = inline
        self._capacity = capacity
        self._turn_away = turn_away

    def start(self) -> None:
        """Starts to answer, in a thread of its own."""
        state = self._state
        with state.lock:
            if state.stage is not _server._ServerStage.STOPPED:
                raise ValueError("the server was started before")
            missing = self._inline - state.registered_method_handlers.keys()
            if missing:
                raise ValueError(f"expected registered methods to answer inline, came {sorted(missing)}")
            state.server.start()
            state.stage = _server._ServerStage.STARTED
            for method in state.registered_method_handlers:
                _server._request_registered_call(state, method)
            _server._request_call(state)
        threading.Thread(
            target=_Loop(state, self._inline, self._capacity, self._turn_away).run, name="grpc-polling", daemon=True
        ).start()


class _Loop:
    """The polling thread's work."""

    def __init__(self, state: Any, inline: frozenset[str], capacity: int, turn_away: Callable[[], TurnedAway]) -> None:
        self._state = state
        self._inline = inline
        self._capacity = capacity
        self._turn_away = turn_away
        self._parked: deque[tuple[greenlet, batching.Batcher, batching.Pending]] = deque()
        self._greenlet: greenlet
        self._turned_away = 0

    def run(self) -> None:
        """Until the server has stopped."""
        self._greenlet = getcurrent()
        batching.use_loop(self)
        poll = self._state.completion_queue.poll
        taken = 0
        while True:
            # With calls set aside: only what is there already.
            event = poll(0 if self._parked else time.time() + IDLE_S)
            if event.completion_type == cygrpc.CompletionType.queue_timeout:
                if self._parked:
                    self._answer_parked()
                taken = 0
            elif not self._process(event):
                return
            else:
                taken += 1
                if taken >= MOST_AT_ONCE or self._turned_away >= MOST_TURNED_AWAY:
                    if self._parked:
                        self._answer_parked()
                    taken = 0
            if self._state.server_deallocated:
                _server._begin_shutdown_once(self._state)
            # A call that an event refers to must end before the next poll.
            del event

    def park(self, batcher: batching.Batcher, pending: batching.Pending) -> None:
        """Sets the calling handler aside until its request is answered."""
        self._parked.append((getcurrent(), batcher, pending))
        self._greenlet.switch()

    def _answer_parked(self) -> None:
        """One run of the model, for the one that waits longest and those that go with it."""
        self._turned_away = 0
        handler, batcher, pending = self._parked.popleft()
        if not pending.done:
            batcher.drive(pending)
        handler.switch()
        # Those that are done leave in their order, up to the first that needs a run of its own.
        while self._parked and self._parked[0][2].done:
            self._parked.popleft()[0].switch()

    def _process(self, event: Any) -> bool:
        """Handles one event; False when the server has stopped."""
        tag = event.tag
        if isinstance(tag, str) and tag in self._inline and event.success:
            self._begin(event)
            return True
        owner = getattr(tag, "__self__", None)
        if not isinstance(owner, _Call):
            return bool(_server._process_event_and_continue(self._state, event))
        tag(event)
        if owner.due:
            return True
        for callback in owner.callbacks:
            _called(callback)
        with self._state.lock:
            self._state.rpc_states.remove(owner)
            return not _server._stop_serving(self._state)

    def _begin(self, event: Any) -> None:
        """Takes in a call of an inline method; its message comes with another event."""
        state, method = self._state, event.tag
        handler: grpc.RpcMethodHandler | None = state.registered_method_handlers[method]
        call = _Call(event)
        with state.lock:
            state.due.remove(method)
            state.rpc_states.add(call)
            if state.stage is _server._ServerStage.STARTED:
                _server._request_registered_call(state, method)
        if len(self._parked) >= self._capacity:
            self._turned_away += 1
            call.turn_away(*self._turn_away())
            return
        if state.interceptor_pipeline is not None:
            details = _server._HandlerCallDetails(method, event.invocation_metadata)
            try:
                handler = state.interceptor_pipeline.execute(
                    lambda _: state.registered_method_handlers[method], details
                )
            except Exception:
                logger.exception("an interceptor failed")
                handler = None
        call.begin(handler)


class _Call(grpc.ServicerContext):
    """One call of an inline method: grpc's context of it, and its progress.

    Used by the polling thread alone, but for what a handler hands on to other threads: whether it is active.
    """

    def __init__(self, event: Any) -> None:
        self._event = event
        self._call = event.call
        self._handler: grpc.RpcMethodHandler | None = None
        self._is_cancelled = self._is_answered = self._is_aborted = False
        self._initial: Metadata = ()
        self._trailing: Metadata = ()
        self._code: grpc.StatusCode | None = None
        self._details = ""
        self.callbacks: list[Callable[[], None]] = []
        self.due = 2
        """How many events are still to come."""

    def begin(self, handler: grpc.RpcMethodHandler | None) -> None:
        """Waits for the message; without a handler the call fails."""
        self._handler = handler
        self._call.start_server_batch((cygrpc.ReceiveCloseOnServerOperation(_NO_FLAGS),), self._on_close)
        if handler is None:
            self.due -= 1
            self._send(None, grpc.StatusCode.INTERNAL, "internal error")
        else:
            self._call.start_server_batch((cygrpc.ReceiveMessageOperation(_NO_FLAGS),), self._on_message)

    def turn_away(self, code: grpc.StatusCode, details: str, metadata: Metadata) -> None:
        """Ends the call unread, all in one operation."""
        self._is_answered = True
        self.due = 1
        status = _common.STATUS_CODE_TO_CYGRPC_STATUS_CODE[code]
        self._call.start_server_batch(
            (
                cygrpc.ReceiveCloseOnServerOperation(_NO_FLAGS),
                cygrpc.SendInitialMetadataOperation((), _NO_FLAGS),
                cygrpc.SendStatusFromServerOperation(metadata, status, details.encode(), _NO_FLAGS),
            ),
            self._on_close,
        )

    def _on_close(self, event: Any) -> None:
        self.due -= 1
        self._is_cancelled = event.batch_operations[0].cancelled()

    def _on_message(self, event: Any) -> None:
        self.due -= 1
        message = event.batch_operations[0].message()
        if message is not None:
            greenlet(self._answer).switch(message)
        elif not self._is_cancelled:
            self._send(None, grpc.StatusCode.UNIMPLEMENTED, "expected one request message, came none")

    def _on_sent(self, _: Any) -> None:
        self.due -= 1

    def _answer(self, message: bytes) -> None:
        handler = self._handler
        assert handler is not None
        assert handler.unary_unary is not None
        try:
            request = handler.request_deserializer(message) if handler.request_deserializer else message
        except Exception:
            self._send(None, grpc.StatusCode.INTERNAL, "the request message cannot be read")
            return
        try:
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

    def _send(self, message: bytes | None, code: grpc.StatusCode, details: str) -> None:
        if self._is_cancelled:
            return
        self._is_answered = True
        status = _common.STATUS_CODE_TO_CYGRPC_STATUS_CODE[code]
        operations = [
            cygrpc.SendInitialMetadataOperation(self._initial, _NO_FLAGS),
            cygrpc.SendStatusFromServerOperation(self._trailing, status, details.encode(), _NO_FLAGS),
        ]
        if message is not None:
            operations.append(cygrpc.SendMessageOperation(message, _NO_FLAGS))
        self.due += 1
        self._call.start_server_batch(operations, self._on_sent)

    # What follows is grpc.ServicerContext, which documents it.

    def is_active(self) -> bool:
        return not (self._is_cancelled or self._is_answered)

    def time_remaining(self) -> float:
        return max(self._event.call_details.deadline - time.time(), 0)

    def cancel(self) -> None:
        self._call.cancel()

    def add_callback(self, callback: Callable[[], None]) -> bool:
        self.callbacks.append(callback)
        return True

    def invocation_metadata(self) -> Any:
        return self._event.invocation_metadata

    def peer(self) -> str:
        return str(_common.decode(self._call.peer()))

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


def _called(callback: Callable[[], None]) -> None:
    try:
        callback()
    except Exception:
        logger.exception("a callback failed")
