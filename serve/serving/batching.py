"""Runs requests together that wait when the model is free; a lone request never waits for company.

There is no waiting time. A request that finds the model free starts a run at once. Requests that come meanwhile wait in
a bounded queue; when the run ends, the next one is for all that wait. So batches grow with the load, and at low load
there are none. A thread that waits for its answer runs the model itself if nobody does. An event loop
does if nobody else waits for it and the last run of its size was short; else a thread of `RUNNERS` does.

    batcher = Batcher(states.recommend)        # or the `recommend` of a `Recommender`
    answer = batcher.recommend(query, deadline_s=0.2, is_cancelled=lambda: not context.is_active())

A batcher belongs to one loaded model. It keeps no state beyond its queue and needs no closing: when the last
`recommend` has returned, it is done.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

from serve.model.recommender import Answer, Query
from serve.serving.errors import Cancelled, Expired, QueueFull

QUEUE_CAPACITY = 256
# 10,000 items, 50 events, one thread: a row of `sequence.onnx` costs the same in a batch of 8 as of 32, and a run of
# 32 keeps the others waiting for 14 ms.
LARGEST_BATCH = 16
RETRY_AFTER_S = 0.1
RUNNERS = ThreadPoolExecutor(4, "model-run")
"""Each runs the model for one batcher at a time."""

IsCancelled = Callable[[], bool]
OnDone = Callable[[], "OnDone | None"]
"""Called when a request is done, in any thread. What it returns is called once all requests of the run were told, and
so on: what need not be done before the others are as far."""


class Run(NamedTuple):
    """One run, as the metrics want it; times in seconds."""

    size: int
    waited_s: tuple[float, ...]
    """How long each request waited for it."""
    seconds: float


class Pending:
    """A request in the queue, and in the end its answer or error."""

    __slots__ = ("answer", "deadline", "done", "error", "is_cancelled", "on_done", "query", "since")

    def __init__(self, query: Query, deadline: float | None, is_cancelled: IsCancelled | None, on_done: OnDone) -> None:
        self.query = query
        self.deadline = deadline
        self.is_cancelled = is_cancelled
        self.since = time.monotonic()
        self.done = False
        self.answer: Answer | None = None
        self.error: BaseException | None = None
        self.on_done = on_done

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


class Batcher:
    """Answers single requests in batches, from any number of threads."""

    def __init__(
        self,
        answer: Callable[[Sequence[Query]], list[Answer]],
        capacity: int = QUEUE_CAPACITY,
        *,
        largest_batch: int = LARGEST_BATCH,
        on_run: Callable[[Run], None] | None = None,
        at_once: Callable[[Sequence[Query]], list[Answer] | None] = lambda _: None,
    ) -> None:
        """Has an empty queue.

        Args:
            answer: Answers queries; called by one thread at a time.
            capacity: The longest queue, besides the run under way.
            largest_batch: So many queries go together at most.
            on_run: Is told of every run.
            at_once: As `answer`, for an event loop: it waits for nothing but the model, or returns None.
        """
        self._answer = answer
        self._at_once = at_once
        self._capacity = capacity
        self._largest_batch = largest_batch
        self._on_run = on_run
        self._queue: deque[Pending] = deque()
        self._running = False
        self._lock = threading.Lock()
        self._seconds_per_request = RETRY_AFTER_S / capacity
        # How long the last run of each size took.
        self._seconds: dict[int, float] = {}

    def recommend(
        self, query: Query, deadline_s: float | None = None, is_cancelled: IsCancelled | None = None
    ) -> Answer:
        """The answer to one query; `deadline_s` is how many seconds it is of use from now on, None: without end.

        Raises QueueFull at once, Expired and Cancelled before the model runs for the request, or when it has run in
        vain, and whatever the model raises for this very query.
        """
        return self.complete([query], deadline_s, is_cancelled)[0].result()

    def complete(
        self, queries: Sequence[Query], deadline_s: float | None = None, is_cancelled: IsCancelled | None = None
    ) -> list[Pending]:
        """Some queries, all done, or QueueFull; the caller waits, and runs the model itself if nobody does."""
        last = threading.Lock()
        last.acquire()
        pending = self._pending(queries, deadline_s, is_cancelled)
        pending[-1].on_done = last.release
        self._add(pending)
        with self._lock:
            leads, self._running = not self._running, True
        if leads:
            self._lead(pending[-1])
        # The queue keeps its order, so the others are done too.
        last.acquire()
        return pending

    def put(self, query: Query, deadline_s: float | None, is_cancelled: IsCancelled | None, on_done: OnDone) -> Pending:
        """As `complete`, for one query and without waiting: it is answered by the next run, which calls `on_done`."""
        (pending,) = self._pending([query], deadline_s, is_cancelled)
        pending.on_done = on_done
        self._add([pending])
        return pending

    def run(self, here_s: float) -> None:
        """Has the model run for those that were put into the queue, in another thread.

        Args:
            here_s: In this one, if the last run of as many, or of a few more, took no more seconds, and if this one
                waits for nothing else. As long as no such run is known, another thread makes it.
        """
        with self._lock:
            if self._running or not self._queue:
                return
            self._running = True
            batch = list(islice(self._queue, self._largest_batch))
            known = [size for size in self._seconds if size >= len(batch)]
            is_short, is_done = bool(known) and self._seconds[min(known)] <= here_s, False
        try:
            is_done = is_short and self._run_at_once(batch)
        finally:
            if not is_done:
                RUNNERS.submit(self._lead, None)

    def _run_at_once(self, batch: Sequence[Pending]) -> bool:
        """Whether the first of the queue are answered and nobody else waits; else another thread is to run for all."""
        if any(pending.is_dropped() for pending in batch):
            return False
        start = time.monotonic()
        try:
            answers = self._at_once([pending.query for pending in batch])
        except Exception:
            # The run that follows says which request is to blame.
            return False
        if answers is None:
            return False
        with self._lock:
            for _ in batch:
                self._queue.popleft()
        seconds = time.monotonic() - start
        for pending, answer in zip(batch, answers, strict=True):
            pending.finish(answer)
            pending.is_dropped()
        _tell(batch)
        self._note(batch, start, seconds)
        with self._lock:
            self._running = bool(self._queue)
        return not self._running

    def _note(self, batch: Sequence[Pending], start: float, seconds: float) -> None:
        """A run that began at `start` took so long."""
        self._seconds[len(batch)] = seconds
        self._seconds_per_request += 0.1 * (seconds / len(batch) - self._seconds_per_request)
        if self._on_run is not None:
            self._on_run(Run(len(batch), tuple(start - pending.since for pending in batch), seconds))

    @staticmethod
    def _pending(queries: Sequence[Query], deadline_s: float | None, is_cancelled: IsCancelled | None) -> list[Pending]:
        deadline = None if deadline_s is None else time.monotonic() + deadline_s
        return [Pending(query, deadline, is_cancelled, _nothing) for query in queries]

    def _add(self, pending: Sequence[Pending]) -> None:
        with self._lock:
            if len(self._queue) + len(pending) > self._capacity:
                waiting_s = self._seconds_per_request * len(self._queue)
                raise QueueFull(self._capacity, min(max(waiting_s, 0.01), 10.0))
            self._queue.extend(pending)

    def _lead(self, until: Pending | None) -> None:
        """Runs the model until a request is done, or once; then another thread goes on if others wait. So the batchers
        take turns in `RUNNERS`."""
        try:
            while True:
                self._run()
                with self._lock:
                    if not self._queue:
                        self._running = False
                        return
                if until is None or until.done:
                    break
        except BaseException:
            RUNNERS.submit(self._lead, None)
            raise
        RUNNERS.submit(self._lead, None)

    def _run(self) -> None:
        """One run of the model for those that wait longest and are still wanted."""
        batch: list[Pending] = []
        taken: list[Pending] = []
        with self._lock:
            while self._queue and len(batch) < self._largest_batch:
                pending = self._queue.popleft()
                taken.append(pending)
                if not pending.is_dropped():
                    batch.append(pending)
        try:
            if batch:
                start = time.monotonic()
                self._answer_all(batch)
                seconds = time.monotonic() - start
                for pending in batch:
                    if pending.error is None:
                        pending.is_dropped()
                self._note(batch, start, seconds)
        finally:
            for pending in taken:
                # Should the thread be interrupted, the others must not wait without end.
                if not pending.done:
                    pending.finish(None, RuntimeError("the run of the model was interrupted"))
            _tell(taken)

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


def _tell(batch: Sequence[Pending]) -> None:
    """Requests are done."""
    left: Sequence[OnDone] = [pending.on_done for pending in batch]
    while left:
        left = [more for work in left if (more := work()) is not None]


def _nothing() -> None:
    """Called when a request is done for which nobody waits by itself."""
