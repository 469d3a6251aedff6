"""Recommend in the event loop: calls wait for each other as long as that pays, and share a run of the model."""

import asyncio
from collections import deque
from collections.abc import Awaitable
from functools import partial
from typing import Any

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
# Lately is: at so many runs of the model, and now.
RUNS = 4


class Recommends:
    """The Recommends of a server that are answered in the event loop: all but those that are slow."""

    def __init__(self, servicer: RecommenderServicer, loop: asyncio.AbstractEventLoop) -> None:
        self._servicer = servicer
        self._loop = loop
        self._under_way = 0
        self._lately: deque[int] = deque([0], RUNS)
        self._waiting: list[LoadedModel] = []
        self._timer: asyncio.TimerHandle | None = None

    def check(self) -> None:
        """Raises QueueFull while so many wait that there is no room for another."""
        if self._under_way >= QUEUE_CAPACITY:
            raise QueueFull(QUEUE_CAPACITY, RETRY_AFTER_S)

    def __call__(self, request: pb.RecommendRequest, call: Call) -> Awaitable[Any] | None:
        """What answers a call; None: it takes long."""
        return None if self._servicer.is_slow(request) else self._answer(request, call)

    async def _answer(self, request: pb.RecommendRequest, call: Call) -> pb.RecommendResponse:
        done: asyncio.Future[None] = self._loop.create_future()
        self._under_way += 1
        try:
            loaded, response = self._servicer.start_recommend(request, call, partial(self._wake, done))
            self._waiting.append(loaded)
            if len(self._waiting) >= min(LARGEST_BATCH, COMPANY * max(self._under_way, *self._lately)):
                self.run()
            elif self._timer is None:
                self._timer = self._loop.call_later(LONGEST_WAIT_S, self.run)
            await done
            return response()
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
        for loaded in dict.fromkeys(waiting):
            loaded.run()

    def _wake(self, done: "asyncio.Future[None]") -> None:
        """The run for a call is over; in any thread."""
        self._loop.call_soon_threadsafe(_resume, done)


def _resume(done: "asyncio.Future[None]") -> None:
    # A call that was cancelled waits no more.
    if not done.done():
        done.set_result(None)
