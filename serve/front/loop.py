"""The one event loop of the process, which all its servers share, in a thread of its own."""

import asyncio
import logging
import sys
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

# A thread that computes in Python keeps the loop waiting for so long; Python's own 5 ms come several times a call.
SWITCH_INTERVAL_S = 0.0005

Result = TypeVar("Result")


class LoopThread:
    """An event loop that runs from now on until the process ends."""

    def __init__(self) -> None:
        self.loop = _new_loop()
        self._on_failure: list[Callable[[], None]] = []
        thread = threading.Thread(target=self._run, name="grpc-loop", daemon=True)
        thread.start()
        self.ident = thread.ident
        """The number of its thread."""

    def on_failure(self, callback: Callable[[], None]) -> None:
        """To be called should the loop end: no call is answered any more."""
        self._on_failure.append(callback)

    def forget(self, callback: Callable[[], None]) -> None:
        """Undoes one `on_failure`."""
        self._on_failure.remove(callback)

    def wait_for(self, work: Coroutine[Any, Any, Result]) -> Result:
        """What a coroutine returns that runs in the loop; for other threads."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def _run(self) -> None:
        try:
            asyncio.set_event_loop(self.loop)
            self.loop.run_forever()
        except BaseException:
            logger.critical("the event loop failed, no call is answered any more", exc_info=True)
        for callback in self._on_failure:
            callback()


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


_lock = threading.Lock()
_shared: list[LoopThread] = []


def shared_loop() -> LoopThread:
    """The loop of the process; the first to ask starts it."""
    with _lock:
        if not _shared:
            sys.setswitchinterval(SWITCH_INTERVAL_S)
            _shared.append(LoopThread())
        return _shared[0]
