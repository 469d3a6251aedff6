"""A gRPC server that answers its hot methods in the thread that polls for them.

`grpc.server` hands a call from its polling thread to a worker, back, and to the worker again: most of the CPU that an
empty call costs. Here the polling thread answers the methods named as `inline` itself. A handler that waits for a
`Batcher` is set aside (each runs in a greenlet) while the thread takes in the calls that are there already; when there
are no more the model runs once, and then the thread polls again. With `capacity` calls set aside, further
ones are turned away unread, for a fraction of what an answer costs: what cannot be answered in time must not wait in
gRPC, where it is not counted, nor take the time of the others.

Calls of other unary methods go to the thread pool, once their message is there: grpc lets a thread wait for it, so that
a few callers who send none, and need no token for that, keep all threads from the others. Here a call without a message
costs memory, for so many calls and so long and no more (`serve.front.overdue`). A stream that is only written to, by a
handler that does not block (watching health), holds no thread either. Other streams are grpc's own and have a few
threads for themselves, since each holds one for as long as it is open. Interceptors and servicers are the usual ones,
and so are `stop` and its grace.

A call that is answered holds no place in a pool, whether its client takes the answer or not; what is not taken is
dropped in the end (`serve.front.overdue`).

gRPC's own limit on the calls of a connection (`grpc.max_concurrent_streams`) holds, but not its "overload protection":
that counts calls which the client has its answer to, until this thread has seen them off, and refuses good ones of a
client that stays below the limit. What is in the server is counted here instead.

This reaches into `grpc._server`, which promises nothing: `is_supported` says whether the installed grpcio has what is
used here, and `grpc.server` does the same job, only slower. A handler of an inline method holds up all others while it
computes or blocks, so it must do neither for long: a store on another machine wants the thread pool.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
from greenlet import getcurrent, greenlet
from grpc import _common, _server
from grpc._cython import cygrpc  # type: ignore[attr-defined]

from serve.front import overdue
from serve.front.overdue import Unreceived, Unsent
from serve.front.polled_call import Metadata, PolledCall
from serve.serving import batching

logger = logging.getLogger(__name__)

# So many events (a call has three or four) are taken in before the model runs, even if more are there.
MOST_AT_ONCE = 256
# For each run of the model: what gRPC does for a call costs more than half of an answer, also for one that is turned
# away. With as many turned away as answered, 62 % of the peak were answered; further ones wait.
MOST_TURNED_AWAY = batching.LARGEST_BATCH // 4
# For streams that are read from: reflection, which is asked by hand.
STREAM_WORKERS = 4
MOST_STREAMS = 16
# So many calls may wait in gRPC to be looked at. It then resets some, which a client sees as CANCELLED and does not
# repeat; by default from 1,000 on, which ten full connections are.
MOST_AT_THE_DOOR = 10_000
# How often to look for calls that wait too long for their client.
LOOK_S = 0.25
_USED = (
    *("_Server", "_ServerStage", "_HandlerCallDetails", "_GenericMethod", "_REQUEST_CALL_TAG"),
    *("_process_event_and_continue", "_request_registered_call", "_request_call"),
    *("_stop_serving", "_begin_shutdown_once"),
)

TurnedAway = tuple[grpc.StatusCode, str, Metadata]
"""How a call ends that is not looked at: status, message and trailing metadata."""


@dataclass(frozen=True, slots=True)
class Front:
    """Which calls the polling thread answers itself, and how many others may wait; methods by their full names,
    `/package.Service/Method`."""

    inline: Collection[str] = ()
    """Unary methods that the polling thread answers, unless a call `takes_long`."""
    at_once: Collection[str] = ()
    """Methods that it answers however many calls wait, with messages of a few bytes; a caller that may call nothing
    else takes no place from other calls by not sending them."""
    takes_long: Callable[[str, bytes], bool] = lambda method, message: False
    """Whether a call, by its method and message, is for the pool of slow ones, which must keep no others waiting."""
    most_parked: int = batching.QUEUE_CAPACITY
    """So many inline calls may wait for the model."""
    most_in_pool: int = 256
    """So many calls may run in the pool, or wait for one of its threads."""
    most_slow: int = 64
    """The same for the pool of slow ones."""
    turn_away: Callable[[str], TurnedAway] = lambda method: (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "too many calls wait",
        (),
    )
    """How further calls of a method end, without reaching an interceptor."""
    on_no_message: Callable[[str], None] = lambda method: None
    """Gets the method of each call that is ended because its message did not come."""
    on_failure: Callable[[], None] = lambda: None
    """Called when the polling thread ends without having been asked to: no call is answered any more."""


def is_supported() -> bool:
    """Whether the installed grpcio has the parts that this is built from."""
    return all(hasattr(_server, name) for name in _USED) and hasattr(_server._Server, "add_registered_method_handlers")


def polling_server(
    pool: ThreadPoolExecutor,
    slow_pool: ThreadPoolExecutor,
    front: Front,
    *,
    interceptors: Sequence[grpc.ServerInterceptor] = (),
    options: Sequence[tuple[str, Any]] = (),
) -> "PollingServer":
    """As `grpc.server`; inline methods must be registered by their generated `add_...Servicer_to_server`."""
    streams = ThreadPoolExecutor(STREAM_WORKERS, "grpc-streams")
    options = (
        *options,
        ("grpc.http.overload_protection", 0),
        # By it gRPC would let every call of a fast connection send up to 16 MiB before it is asked for, and not
        # 64 KiB. All of a message may come in any case once it is asked for.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.server.max_pending_requests", MOST_AT_THE_DOOR),
        ("grpc.server.max_pending_requests_hard_limit", 2 * MOST_AT_THE_DOOR),
    )
    pools = _Pool(pool, front.most_in_pool), _Pool(slow_pool, front.most_slow)
    return PollingServer(pools, front, streams, (), tuple(interceptors), options, MOST_STREAMS, None, False)


class _Pool:
    """Threads, and how many calls they have or are to have."""

    def __init__(self, threads: ThreadPoolExecutor, most: int) -> None:
        self.threads = threads
        self._most = most
        self._count = 0
        self._lock = threading.Lock()

    @property
    def is_full(self) -> bool:
        return self._count >= self._most

    def answer(self, call: PolledCall, message: bytes) -> None:
        """One more, until it is answered; whether the client takes the answer is no matter of the threads."""
        with self._lock:
            self._count += 1
        call.hand_over(self._leave)
        self.threads.submit(call.answer_in_pool, message)

    def _leave(self) -> None:
        with self._lock:
            self._count -= 1


class PollingServer(_server._Server):
    """A `grpc.Server`; made by `polling_server`."""

    def __init__(self, pools: tuple[_Pool, _Pool], front: Front, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._pools = pools
        self._front = front

    def start(self) -> None:
        """Starts to answer, in a thread of its own."""
        state = self._state
        with state.lock:
            if state.stage is not _server._ServerStage.STOPPED:
                raise ValueError("the server was started before")
            missing = {*self._front.inline, *self._front.at_once} - state.registered_method_handlers.keys()
            if missing:
                raise ValueError(f"expected registered methods to answer inline, came {sorted(missing)}")
            state.server.start()
            state.stage = _server._ServerStage.STARTED
            for method in state.registered_method_handlers:
                _server._request_registered_call(state, method)
            _server._request_call(state)
        threading.Thread(target=_Loop(state, self._pools, self._front).run, name="grpc-polling", daemon=True).start()


class _Loop:
    """The polling thread's work."""

    def __init__(self, state: Any, pools: tuple[_Pool, _Pool], front: Front) -> None:
        self._state = state
        self._pool, self._slow_pool = pools
        self._front = front
        self._inline = frozenset(front.inline)
        self._at_once = frozenset(front.at_once)
        self._parked: deque[tuple[greenlet, batching.Batcher, batching.Pending]] = deque()
        self._unreceived, self._short_unreceived = (
            Unreceived(most, yield_s, seconds, overdue.MOST_IN_LINE, front.on_no_message)
            for most, yield_s, seconds in (
                (overdue.MOST_RECEIVING, overdue.YIELD_S, overdue.MESSAGE_S),
                (overdue.MOST_SHORT_RECEIVING, overdue.SHORT_YIELD_S, overdue.SHORT_MESSAGE_S),
            )
        )
        self._unsent = Unsent()
        self._next_look = 0.0
        self._greenlet: greenlet
        self._turned_away = 0

    def run(self) -> None:
        """Until the server has stopped."""
        try:
            self._poll()
        except BaseException:
            logger.critical("the thread that polls for calls failed, no call is answered any more", exc_info=True)
            self._front.on_failure()
        finally:
            for pool in (self._pool, self._slow_pool):
                pool.threads.shutdown(wait=False)

    def answer(self, call: PolledCall, message: bytes) -> None:
        """Answers a call whose message is there: in this thread, or in one of a pool."""
        method = call.method
        if method in self._at_once or call.is_stream:
            greenlet(call.answer).switch(message)
            return
        takes_long = self._front.takes_long(method, message)
        if method in self._inline and not takes_long:
            if len(self._parked) >= self._front.most_parked:
                self._turned_away += 1
                call.refuse(*self._front.turn_away(method))
            else:
                greenlet(call.answer).switch(message)
            return
        pool = self._slow_pool if takes_long else self._pool
        if pool.is_full:
            call.refuse(*self._front.turn_away(method))
        else:
            pool.answer(call, message)

    def park(self, batcher: batching.Batcher, pending: batching.Pending) -> None:
        """Sets the calling handler aside until its request is answered."""
        self._parked.append((getcurrent(), batcher, pending))
        self._greenlet.switch()

    def _poll(self) -> None:
        self._greenlet = getcurrent()
        batching.use_loop(self)
        poll = self._state.completion_queue.poll
        taken = 0
        while True:
            # With calls set aside: only what is there already.
            event = poll(0 if self._parked else time.time() + LOOK_S)
            if event.completion_type == cygrpc.CompletionType.queue_timeout:
                if self._parked:
                    self._answer_parked()
                self._end_overdue()
                taken = 0
            elif not self._process(event):
                return
            else:
                taken += 1
                if taken >= MOST_AT_ONCE or self._turned_away >= MOST_TURNED_AWAY:
                    if self._parked:
                        self._answer_parked()
                    self._end_overdue()
                    taken = 0
            if self._state.server_deallocated:
                _server._begin_shutdown_once(self._state)
            # A call that an event refers to must end before the next poll.
            del event

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
        call = getattr(tag, "__self__", None)
        if not isinstance(call, PolledCall):
            if event.success and (tag is _server._REQUEST_CALL_TAG or tag in self._state.registered_method_handlers):
                return self._begin(event)
            return bool(_server._process_event_and_continue(self._state, event))
        tag(event)
        if not call.is_over:
            return True
        self._unsent.remove(call)
        call.end()
        with self._state.lock:
            self._state.rpc_states.remove(call)
            return not _server._stop_serving(self._state)

    def _begin(self, event: Any) -> bool:
        """Takes in a call; its message comes with another event."""
        state, tag = self._state, event.tag
        method = _common.decode(event.call_details.method) if tag is _server._REQUEST_CALL_TAG else tag
        call = PolledCall(event, method, self.answer, self._unsent)
        is_full = self._is_full(method)
        handler: Any = None
        if not is_full:
            handler = self._handler(event, method)
            call.is_stream = handler is not None and handler.unary_unary is None
            if call.is_stream and not getattr(handler.unary_stream, "experimental_non_blocking", False):
                return bool(_server._process_event_and_continue(state, event))
        with state.lock:
            state.due.remove(tag)
            state.rpc_states.add(call)
            if state.stage is _server._ServerStage.STARTED:
                if tag is _server._REQUEST_CALL_TAG:
                    _server._request_call(state)
                else:
                    _server._request_registered_call(state, tag)
        if is_full:
            self._turned_away += method in self._inline
            call.turn_away(*self._front.turn_away(method))
        elif handler is None:
            call.turn_away(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        else:
            call.begin(handler, self._short_unreceived if method in self._at_once else self._unreceived)
        return True

    def _is_full(self, method: str) -> bool:
        """Whether a call need not be looked at, because it could not be answered."""
        if method in self._inline:
            return len(self._parked) >= self._front.most_parked
        return self._pool.is_full and self._slow_pool.is_full and method not in self._at_once

    def _handler(self, event: Any, method: str) -> Any:
        """What answers a call, by way of the interceptors; None: nothing does."""
        state = self._state
        details = _server._HandlerCallDetails(method, event.invocation_metadata)
        handler = state.registered_method_handlers.get(method)

        def find(details: Any) -> Any:
            return handler or _server._GenericMethod(state.generic_handlers).handler(details)

        try:
            return (
                find(details)
                if state.interceptor_pipeline is None
                else state.interceptor_pipeline.execute(find, details)
            )
        except Exception:
            logger.exception("an interceptor failed")
            return FAILED

    def _end_overdue(self) -> None:
        """Looks now and then for calls that have waited too long for their client."""
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + LOOK_S
            self._unreceived.end_overdue()
            self._short_unreceived.end_overdue()
            self._unsent.end_overdue()


def _fail(_: Any, context: grpc.ServicerContext) -> Any:
    context.abort(grpc.StatusCode.INTERNAL, "internal error")


FAILED: "grpc.RpcMethodHandler[Any, Any]" = grpc.unary_unary_rpc_method_handler(_fail)
"""For calls whose interceptors raised something."""
