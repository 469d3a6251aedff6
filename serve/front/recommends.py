"""Recommend in the event loop: calls wait for each other as long as that pays, and share a run of the model."""

import asyncio
import threading
from collections import deque
from collections.abc import Awaitable
from functools import partial

from serve.api.recommender import RecommenderServicer
from serve.front.calls import Call
from serve.pb import recommender_pb2 as pb
from serve.serving.batching import LARGEST_BATCH, QUEUE_CAPACITY, RETRY_AFTER_S
from serve.serving.errors import QueueFull
from serve.serving.loaded import LoadedModel

# grpc takes calls in one by one, some 0.2 ms each, so that of 32 callers one or two would wait when the model is free;
# a run for one costs as much as for three. As many as this share of those lately under way wait for each other,
COMPANY = 0.5
# but no longer than this.
LONGEST_WAIT_S = 0.002
# A run that is expected to take longer is not made in the loop, in which all calls would wait for it.
LONGEST_RUN_IN_LOOP_S = 0.002
# Lately is: at so many runs of the model, and now.
RUNS = 4


class Recommends:
    """The Recommends of a server that are answered in the event loop: all but those that are slow."""

    def __init__(self, servicer: RecommenderServicer, loop: asyncio.AbstractEventLoop, loop_thread: int | None) -> None:
        """`loop_thread`: the number of the thread of the loop."""
        self._servicer = servicer
        self._loop = loop
        self._loop_thread = loop_thread
        self._under_way = 0
        self._lately: deque[int] = deque([0], RUNS)
        self._waiting: list[LoadedModel] = []
        self._timer: asyncio.TimerHandle | None = None

    def check(self) -> None:
        """Raises QueueFull while so many wait that there is no room for another."""
        if self._under_way >= QUEUE_CAPACITY:
            raise QueueFull(QUEUE_CAPACITY, RETRY_AFTER_S)

    def __call__(self, request: pb.RecommendRequest, call: Call) -> Awaitable[bytes] | None:
        """What answers a call; None: it takes long."""
        return None if self._servicer.is_slow(request) else self._answer(request, call)

    async def _answer(self, request: pb.RecommendRequest, call: Call) -> bytes:
        turn = _Turn()
        self._under_way += 1
        try:
            begun = self._servicer.start_recommend(request, call, partial(self._wake, turn))
            self._waiting.append(begun.loaded)
            if len(self._waiting) >= min(LARGEST_BATCH, COMPANY * max(self._under_way, *self._lately)):
                self.run()
            elif self._timer is None:
                self._timer = self._loop.call_later(LONGEST_WAIT_S, self.run)
            if not turn.is_done:
                turn.awaited = self._loop.create_future()
                await turn.awaited
            answered = begun.answer()
            answered.log()
            return answered.response
        except asyncio.CancelledError:
            call.cancelled = True
            raise
        finally:
            self._under_way -= 1

    def run(self) -> None:
        """Has the models run for all that wait."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        self._lately.append(self._under_way)
        # For one call the way to another thread and back takes about as long as a run. For more, the loop can look at
        # further calls meanwhile.
        here_s = LONGEST_RUN_IN_LOOP_S if self._under_way == 1 else 0.0
        for loaded in dict.fromkeys(waiting):
            loaded.run(here_s)

    def _wake(self, turn: "_Turn") -> None:
        """The run for a call is over; in any thread."""
        if threading.get_ident() == self._loop_thread:
            turn.end()
        else:
            self._loop.call_soon_threadsafe(turn.end)


class _Turn:
    """Until the run of the model for one call is over; in the event loop."""

    __slots__ = ("awaited", "is_done")

    def __init__(self) -> None:
        self.is_done = False
        self.awaited: asyncio.Future[None] | None = None
        """What the call waits for; None: it does not wait yet."""

    def end(self) -> None:
        self.is_done = True
        # A call that was cancelled waits no more.
        if self.awaited is not None and not self.awaited.done():
            self.awaited.set_result(None)
