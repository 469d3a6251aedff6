"""Threads for calls that the event loop must not answer, since they compute or wait for long."""

import asyncio
import contextvars
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from serve.serving.batching import RETRY_AFTER_S
from serve.serving.errors import QueueFull

logger = logging.getLogger(__name__)


class Pool:
    """Threads, and how many calls may have or wait for one of them."""

    def __init__(self, threads: int, most: int, name: str) -> None:
        self._threads = ThreadPoolExecutor(threads, name)
        self._most = most
        self._count = 0
        self._lock = threading.Lock()

    def check(self) -> None:
        """Raises QueueFull."""
        if self._count >= self._most:
            raise QueueFull(self._most, RETRY_AFTER_S)

    async def run(self, work: Callable[[], bytes]) -> bytes:
        """What `work` returns or raises in a thread; a caller that is cancelled leaves its place when that is done."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[bytes] = loop.create_future()

        def finish(result: bytes | None, error: Exception | None) -> None:
            if done.done():
                return
            if error is None:
                assert result is not None
                done.set_result(result)
            else:
                done.set_exception(error)

        self.start(work, lambda result, error: loop.call_soon_threadsafe(finish, result, error))
        return await done

    def start(self, work: Callable[[], bytes], finish: Callable[[bytes | None, Exception | None], object]) -> None:
        """Has a thread do some work.

        Args:
            work: What is to be done.
            finish: Called in the thread, with what `work` returned or raised.
        """

        def run() -> None:
            result, error = None, None
            try:
                result = work()
            except BaseException as failure:
                error = failure if isinstance(failure, Exception) else interrupted(failure)
            with self._lock:
                self._count -= 1
            finish(result, error)

        with self._lock:
            self._count += 1
        self._threads.submit(contextvars.copy_context().run, run)

    def close(self) -> None:
        self._threads.shutdown(wait=False)


def interrupted(error: BaseException) -> RuntimeError:
    """What a call fails with that was to end its thread, such as SystemExit."""
    logger.critical("a call was to end the thread that answers it", exc_info=error)
    return RuntimeError(f"{type(error).__name__} in a call")
