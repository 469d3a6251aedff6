"""The fast front: Recommend alone, for a proxy on the same machine, over pygrpc-native.

HTTP/2 is spoken in native threads; one thread of Python takes all calls that wait, has the model run for up to 16 at a
time, and answers; only then it logs and counts. What a call means, who may make it, and how it is counted, is the same
as on the default front: `serve.front.calls`, `serve.front.gate`, `serve.api.recommender`.

The native part has neither TLS nor limits on memory. So strangers must not reach it, and `deploy/nginx` is what stands
before it: docs/security.md.
"""

import logging
import mmap
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from serve.addresses import AddressError, SecurityError, host_and_port, is_loopback
from serve.api.errors import PUSHBACK_KEY, Refused, status_of
from serve.api.recommender import Answered, Begun, RecommenderServicer
from serve.api.rules import MAX_MESSAGE_BYTES
from serve.front.calls import REQUEST_ID_KEY, Calls, decoded
from serve.front.gate import Gate
from serve.front.limits import LONG_MESSAGE_BYTES, MAX_CALLS_OF_A_CONNECTION, METADATA_BYTES
from serve.front.pool import Pool, interrupted
from serve.observability.logs import REQUEST_ID
from serve.pb import recommender_pb2 as pb
from serve.serving.batching import LARGEST_BATCH, QUEUE_CAPACITY, RETRY_AFTER_S, OnDone
from serve.serving.errors import Cancelled, Expired, QueueFull
from serve.serving.loaded import LoadedModel

logger = logging.getLogger(__name__)

# More than can wait: those for which there is no room are refused, and the native part has no bound.
MOST_TAKEN = 10_000
PUSHBACK_HEADER = f"x-{PUSHBACK_KEY}"
"""By which nginx learns after how many milliseconds a client is to come again."""
# For what arrives while the model does not run; a run is made by the thread that takes the calls.
IO_THREADS = 1
# A run that is expected to take longer is made in another thread: all other calls would wait for it.
LONGEST_OWN_RUN_S = 0.02
# The native part reserves the announced length of a message before it comes, which the process must survive.
LONGEST_ANNOUNCED = 2**32
OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")


class FastCall:
    """One call under way: what `serve.api.context` and `serve.front.calls` want to know of it."""

    __slots__ = (
        "arrived",
        "begun",
        "cancelled",
        "deadline",
        "end_span",
        "is_let_in",
        "metadata",
        "method",
        "number",
        "request_id",
    )

    def __init__(self, method: str, number: int, metadata: Any, remaining_s: float | None) -> None:
        self.method = method
        self.number = number
        self.metadata = metadata
        self.arrived = time.perf_counter()
        self.deadline = None if remaining_s is None else time.monotonic() + remaining_s
        self.cancelled = False
        self.request_id = ""
        self.is_let_in = False
        self.begun: Begun | None = None
        self.end_span: Callable[[grpc.StatusCode], None] | None = None

    def time_remaining(self) -> float | None:
        return None if self.deadline is None else max(self.deadline - time.monotonic(), 0.0)

    def is_active(self) -> bool:
        return not self.cancelled


class FastFront:
    """Takes the calls of one address; other methods than Recommend are UNIMPLEMENTED there."""

    def __init__(
        self,
        address: str,
        method: str,
        servicer: RecommenderServicer,
        calls: Calls,
        gate: Gate,
        slow: Pool,
        *,
        shared_port: bool = False,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        """Binds an address of this machine.

        Args:
            address: HOST:PORT on loopback, with port 0 for a free one; or unix:PATH.
            method: The full name of Recommend.
            servicer: What answers.
            calls: Checks tokens, gives calls their request ids, counts and logs.
            gate: Lets calls in.
            slow: Threads for calls that take long.
            shared_port: Whether other servers that have this setting may listen there too.
            on_failure: Called when no call is answered any more.

        Raises:
            AddressError: The address cannot be used, or pygrpc-native is not installed.
            SecurityError: Other machines reach the address, or a stranger could end the process on this machine.
        """
        try:
            from pygrpc_native import EVENT_CALL, EVENT_CANCEL, NativeGrpcFront
        except ImportError as error:
            raise AddressError("expected pygrpc-native for the fast front: install the extra fast") from error
        self._call, self._cancel = EVENT_CALL, EVENT_CANCEL
        check_fast_address(address, shared_port=shared_port)
        try:
            self._native = NativeGrpcFront(
                address,
                [(method, False)],
                io_threads=IO_THREADS,
                call_details=True,
                max_concurrent_streams=MAX_CALLS_OF_A_CONNECTION,
                max_metadata_size=METADATA_BYTES,
                reuse_port=shared_port,
            )
        except (OSError, RuntimeError, ValueError) as error:
            raise AddressError(f"cannot listen on {address}: {error}") from error
        host = address.rpartition(":")[0]
        self.address = address if address.startswith("unix:") else f"{host}:{self._native.bound_port}"
        """Where it listens."""
        self._method = method
        self._servicer = servicer
        self._calls = calls
        self._gate = gate
        self._slow = slow
        self._on_failure = on_failure
        self._waiting: deque[tuple[FastCall, bytes]] = deque()
        self._under_way: dict[int, FastCall] = {}
        # Held while calls are begun: a run of the model can end before the call knows what answers it.
        self._beginning = threading.Lock()
        self._thread = threading.Thread(target=self._serve, name="fast-front", daemon=True)

    def start(self) -> None:
        """Begins to take calls."""
        self._native.start()
        self._thread.start()

    def close(self) -> None:
        """Ends it, with the calls that are under way: they are UNAVAILABLE."""
        self._native.close()
        if self._thread.is_alive():
            self._thread.join()

    def _serve(self) -> None:
        try:
            # One thread receives: of two that wait, the end would wake one.
            while (events := self._native.recv_batch_details(MOST_TAKEN, 0 if self._waiting else None)) is not None:
                for kind, number, _, message, _, details in events:
                    if kind == self._call and message is not None and details is not None:
                        self._take(number, message, *details)
                    elif kind == self._cancel and (call := self._under_way.get(number)) is not None:
                        call.cancelled = True
                self._answer_waiting()
        except BaseException:
            logger.critical("the fast front failed, it answers no call any more", exc_info=True)
            self._on_failure()

    def _take(self, number: int, message: bytes, metadata: Any, _: str, remaining_s: float | None) -> None:
        """A call that arrived, which waits if there is room."""
        call = FastCall(self._method, number, metadata, remaining_s)
        self._under_way[number] = call
        try:
            call.request_id = self._calls.request_id(metadata)
            REQUEST_ID.set(call.request_id)
            call.end_span = self._calls.begin_span(call)
            if len(self._waiting) >= QUEUE_CAPACITY:
                raise QueueFull(QUEUE_CAPACITY, RETRY_AFTER_S)
        except BaseException as error:
            self._fail(call, error if isinstance(error, Exception) else interrupted(error))
        else:
            self._waiting.append((call, message))

    def _answer_waiting(self) -> None:
        """Has the model run for those that wait longest, and answers those that need no other thread."""
        loaded: dict[LoadedModel, None] = {}
        with self._beginning:
            for _ in range(min(len(self._waiting), LARGEST_BATCH)):
                call, message = self._waiting.popleft()
                try:
                    self._begin(call, message)
                except BaseException as error:
                    self._fail(call, error if isinstance(error, Exception) else interrupted(error))
                if call.begun is not None:
                    loaded[call.begun.loaded] = None
        # A run is for several calls.
        REQUEST_ID.set("")
        for one in loaded:
            one.run(LONGEST_OWN_RUN_S)

    def _begin(self, call: FastCall, message: bytes) -> None:
        """Raises what the call fails with."""
        REQUEST_ID.set(call.request_id)
        # Before the other: a call whose deadline passed is cancelled too.
        if call.time_remaining() == 0:
            raise Expired("the deadline passed before the call was looked at")
        if call.cancelled:
            raise Cancelled("cancelled by the client")
        self._calls.check_token(call)
        if len(message) > MAX_MESSAGE_BYTES:
            text = f"expected a message of at most {MAX_MESSAGE_BYTES} bytes, came {len(message)}"
            raise Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        self._gate.enter()
        call.is_let_in = True
        if len(message) <= LONG_MESSAGE_BYTES:
            request = decoded(pb.RecommendRequest.FromString, message)
            if not self._servicer.is_slow(request):
                call.begun = self._servicer.start_recommend(request, call, partial(self._ranked, call))
                return
        self._slow.check()
        self._slow.start(partial(self._answer_slowly, call, message), partial(self._slowly_answered, call))

    def _ranked(self, call: FastCall) -> OnDone | None:
        """The run of the model for a call is over; in any thread. Returns what sends its answer: those of a run leave
        together, since each by itself wakes the native part."""
        with self._beginning:
            pass
        REQUEST_ID.set(call.request_id)
        assert call.begun is not None
        try:
            return partial(self._send, call, call.begun.answer())
        except Exception as error:
            self._fail(call, error)
            return None

    def _send(self, call: FastCall, answered: Answered) -> OnDone | None:
        try:
            self._respond(call, answered.response)
        except Exception as error:
            self._fail(call, error)
            return None
        return partial(self._close, call, answered)

    def _answer_slowly(self, call: FastCall, message: bytes) -> bytes:
        if call.time_remaining() == 0:
            raise Expired("the deadline passed before a thread was free")
        if not call.is_active():
            raise Cancelled("cancelled by the client")
        request = decoded(pb.RecommendRequest.FromString, message)
        return self._servicer.Recommend(request, call).SerializeToString()

    def _slowly_answered(self, call: FastCall, response: bytes | None, error: Exception | None) -> None:
        try:
            if error is not None:
                raise error
            assert response is not None
            self._respond(call, response)
        except Exception as failure:
            self._fail(call, failure)
        else:
            self._end(call, grpc.StatusCode.OK)

    def _respond(self, call: FastCall, response: bytes) -> None:
        # False: the client has gone, or does not wait any longer.
        if not self._native.respond(call.number, response, None, ((REQUEST_ID_KEY, call.request_id),)):
            raise Expired("the deadline passed") if call.time_remaining() == 0 else Cancelled("cancelled by the client")

    def _close(self, call: FastCall, answered: Answered) -> None:
        """Counts and logs a call that was answered."""
        REQUEST_ID.set(call.request_id)
        try:
            answered.log()
        except Exception as error:
            logger.error("an answer was not logged", exc_info=error)
        self._end(call, grpc.StatusCode.OK)

    def _fail(self, call: FastCall, error: Exception) -> None:
        """Ends a call with the status of what it failed with."""
        REQUEST_ID.set(call.request_id)
        if isinstance(error, QueueFull):
            self._calls.turned_away(call)
        status = status_of(error)
        # The native part takes no keys of gRPC, so the proxy gives this one its name.
        renamed = [(PUSHBACK_HEADER if key == PUSHBACK_KEY else key, value) for key, value in status.metadata]
        metadata = ((REQUEST_ID_KEY, call.request_id), *renamed)
        try:
            self._native.fail(call.number, status.code.value[0], status.message, metadata)
        except ValueError as bad:
            # The call would stay open.
            logger.error("a status could not be sent", exc_info=bad)
            self._native.fail(call.number, grpc.StatusCode.INTERNAL.value[0], "internal error", None)
        self._end(call, status.code)

    def _end(self, call: FastCall, code: grpc.StatusCode) -> None:
        self._under_way.pop(call.number, None)
        if call.is_let_in:
            self._gate.leave()
        REQUEST_ID.set(call.request_id)
        try:
            self._calls.note(call, code.name)
            if call.end_span is not None:
                call.end_span(code)
        except Exception as error:
            logger.error("a call was not counted, logged or traced", exc_info=error)
        REQUEST_ID.set("")


def check_fast_address(address: str, *, shared_port: bool) -> None:
    """Whether the fast front may listen on an address of this machine.

    Args:
        address: HOST:PORT or unix:PATH.
        shared_port: Whether other servers listen there, too.

    Raises:
        AddressError: The address cannot be used.
        SecurityError: Others reach it, or a stranger could end the process.
    """
    if not is_loopback(address):
        raise SecurityError(f"the fast front: expected unix:PATH or an address of loopback, came {address}")
    if address.startswith("unix:"):
        if shared_port:
            raise AddressError(f"{address}: servers cannot share a Unix socket, and this one has shared_port")
        # The native part replaces the file.
        with socket.socket(socket.AF_UNIX) as other, suppress(OSError):
            other.connect(address.removeprefix("unix:"))
            raise AddressError(f"cannot listen on {address}: another server does")
    else:
        host_and_port(address)
    if not _survives_announced_messages():
        raise SecurityError(
            f"the fast front: expected a machine that lets a process reserve {LONGEST_ANNOUNCED / 2**30:g} GiB that it"
            " does not use, or one call would end the server: vm.overcommit_memory 0 or 1, more memory with swap than"
            " that, no limit of address space (ulimit -v, LimitAS), and none of data (ulimit -d, LimitDATA)"
        )


def _survives_announced_messages() -> bool:
    """Whether the length that a message announces can be reserved, for any number of messages."""
    # It is missing on Windows, where pygrpc-native is not there either.
    import resource

    for limit in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        if resource.getrlimit(limit)[0] != resource.RLIM_INFINITY:
            return False
    with suppress(OSError):
        if OVERCOMMIT.read_text().strip() == "2":
            return False
    try:
        mmap.mmap(-1, LONGEST_ANNOUNCED + os.sysconf("SC_PAGE_SIZE"), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except (OSError, ValueError):
        return False
    return True
