"""Runs requests together that wait when the model is free; a lone request never waits for company.

There is no batching thread and no waiting time. A request that finds the model free runs it, alone and at once, in
its own thread. Requests that come meanwhile wait in a bounded queue; when the run ends, the first of them runs the
model for all that wait. So batches grow with the load, and at low load there are none.

    batcher = Batcher(states.recommend)        # or the `recommend` of a `Recommender`
    answer = batcher.recommend(query, deadline_s=0.2, is_cancelled=lambda: not context.is_active())

One batcher belongs to one loaded model. It keeps no state beyond its queue and needs no closing: when the last
`recommend` has returned, it is done.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from serve.model.recommender import Answer, Query
from serve.serving.errors import Cancelled, Expired, QueueFull

QUEUE_CAPACITY = 256
# 10,000 items, 50 events, one thread: a row of `sequence.onnx` costs the same in a batch of 8 as of 32, and a run of
# 32 keeps the others waiting for 14 ms.
LARGEST_BATCH = 16
RETRY_AFTER_S = 0.1


class Run(NamedTuple):
    """One run, as the metrics want it; times in seconds."""

    size: int
    waited_s: tuple[float, ...]
    """How long each request waited for it."""
    seconds: float


class Pending:
    """A request in the queue, and in the end its answer or error."""

    __slots__ = ("answer", "deadline", "done", "error", "is_cancelled", "query", "signal", "since")

    def __init__(self, query: Query, deadline: float | None, is_cancelled: Callable[[], bool] | None) -> None:
        self.query = query
        self.deadline = deadline
        self.is_cancelled = is_cancelled
        self.since = time.monotonic()
        self.done = False
        self.answer: Answer | None = None
        self.error: BaseException | None = None
        # Held while its thread sleeps; released when it is done, or when it is its turn to run the model.
        self.signal: threading.Lock | None = None

    def result(self) -> Answer:
        """Raises what the request failed with."""
        if self.error is not None:
            raise self.error
        assert self.answer is not None
        return self.answer

    def finish(self, answer: Answer | None, error: BaseException | None = None) -> None:
        self.answer, self.error, self.done = answer, error, True

    def check(self) -> None:
        """Raises Cancelled or Expired once the answer is of no use any more."""
        if self.is_cancelled is not None and self.is_cancelled():
            raise Cancelled("cancelled by the client")
        if self.deadline is not None and time.monotonic() >= self.deadline:
            raise Expired("the deadline passed before the answer was ready")

    def is_dropped(self) -> bool:
        """Whether the answer is of no use any more; then it is finished with the reason."""
        try:
            self.check()
        except (Cancelled, Expired) as error:
            self.finish(None, error)
        return self.done


class Loop(Protocol):
    """A thread that serves many requests by turns, and must not sleep for one of them."""

    def park(self, batcher: "Batcher", pending: Pending) -> None:
        """Sets the caller aside until the request is done; the loop sees to that with `Batcher.drive`."""


_of_thread = threading.local()


def use_loop(loop: Loop) -> None:
    """From now on requests of this thread are parked in `loop`."""
    _of_thread.loop = loop


class Batcher:
    """Answers single requests in batches, from any number of threads."""

    def __init__(
        self,
        answer: Callable[[Sequence[Query]], list[Answer]],
        capacity: int = QUEUE_CAPACITY,
        *,
        largest_batch: int = LARGEST_BATCH,
        on_run: Callable[[Run], None] | None = None,
    ) -> None:
        """`answer` is called by one thread at a time; `capacity` is the longest queue, besides the run under way."""
        self._answer = answer
        self._capacity = capacity
        self._largest_batch = largest_batch
        self._on_run = on_run
        self._queue: deque[Pending] = deque()
        self._running = False
        self._lock = threading.Lock()
        self._seconds_per_request = RETRY_AFTER_S / capacity

    def recommend(
        self, query: Query, deadline_s: float | None = None, is_cancelled: Callable[[], bool] | None = None
    ) -> Answer:
        """The answer to one query; `deadline_s` is how many seconds it is of use from now on, None: without end.

        Raises QueueFull at once, Expired and Cancelled before the model runs for the request, or when it has run in
        vain, and whatever the model raises for this very query.
        """
        return self.complete(self.enqueue(query, deadline_s, is_cancelled))

    def enqueue(
        self, query: Query, deadline_s: float | None = None, is_cancelled: Callable[[], bool] | None = None
    ) -> Pending:
        """Puts a query into the queue, to be followed by `complete`; raises QueueFull."""
        deadline = None if deadline_s is None else time.monotonic() + deadline_s
        pending = Pending(query, deadline, is_cancelled)
        with self._lock:
            if len(self._queue) >= self._capacity:
                waiting_s = self._seconds_per_request * len(self._queue)
                raise QueueFull(self._capacity, min(max(waiting_s, 0.01), 10.0))
            self._queue.append(pending)
        return pending

    def complete(self, pending: Pending) -> Answer:
        """Waits for the answer, running the model itself if no other thread does; raises as `recommend`."""
        self.wait(pending)
        return pending.result()

    def wait(self, pending: Pending) -> None:
        """As `complete`, and raises nothing."""
        loop: Loop | None = getattr(_of_thread, "loop", None)
        if loop is None:
            self.drive(pending)
        else:
            loop.park(self, pending)

    def drive(self, pending: Pending) -> None:
        """Returns when a request is done, having run the model itself if no other thread did."""
        with self._lock:
            if pending.done:
                return
            leads = not self._running
            self._running = True
            if not leads:
                pending.signal = threading.Lock()
                pending.signal.acquire()
        if pending.signal is not None:
            # Released by the thread that ran the model: with the answer, or for this thread to go on running it.
            pending.signal.acquire()
        try:
            while not pending.done:
                self._run()
                leads = True
        finally:
            if leads:
                self._hand_over()

    def _hand_over(self) -> None:
        """Has the first of the sleeping threads run the model; with none, the next one to come will."""
        with self._lock:
            for pending in self._queue:
                if pending.signal is not None:
                    pending.signal.release()
                    return
            self._running = False

    def _run(self) -> None:
        """One run of the model for those that wait longest and are still wanted."""
        batch: list[Pending] = []
        finished: list[Pending] = []
        with self._lock:
            while self._queue and len(batch) < self._largest_batch:
                pending = self._queue.popleft()
                (finished if pending.is_dropped() else batch).append(pending)
        if batch:
            start = time.monotonic()
            try:
                self._answer_all(batch)
            finally:
                # Should the thread be interrupted, the others must not wait without end.
                for pending in batch:
                    if not pending.done:
                        pending.finish(None, RuntimeError("the run of the model was interrupted"))
            seconds = time.monotonic() - start
            self._seconds_per_request += 0.1 * (seconds / len(batch) - self._seconds_per_request)
            for pending in batch:
                if pending.error is None:
                    pending.is_dropped()
            if self._on_run is not None:
                self._on_run(Run(len(batch), tuple(start - pending.since for pending in batch), seconds))
        with self._lock:
            for pending in (*finished, *batch):
                if pending.signal is not None:
                    pending.signal.release()

    def _answer_all(self, batch: Sequence[Pending]) -> None:
        """Finishes each request. When a run fails each runs alone, so that only the bad one fails."""
        try:
            answers = self._answer([pending.query for pending in batch])
        except Exception as error:
            if len(batch) == 1:
                batch[0].finish(None, error)
                return
            for pending in batch:
                if not pending.is_dropped():
                    self._answer_all([pending])
            return
        for pending, answer in zip(batch, answers, strict=True):
            pending.finish(answer)
