"""Stopping on request: SIGTERM and Ctrl-C are remembered, and the training loop saves before it ends."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

StopRequested = Callable[[], bool]


def never() -> bool:
    """Nobody asks to stop."""
    return False


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequested]:
    """Yields a function that tells whether SIGTERM or SIGINT (Ctrl-C) came since; a second one interrupts at once.

    Only a process' main thread can do so: elsewhere the function always answers no.
    """
    if threading.current_thread() is not threading.main_thread():
        yield never
        return
    received: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
