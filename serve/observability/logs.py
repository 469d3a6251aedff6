"""Log lines as JSON objects, each with the id of the request that it is about."""

import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from queue import Full, Queue
from typing import Any, TextIO

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
"""Of the call that this thread answers; empty outside of calls."""

MOST_LINES = 10_000
LONGEST_END_S = 2.0
# Of one place in a minute, and places that are remembered.
MOST_REPEATED = 10
MINUTE_S = 60.0
MOST_PLACES = 1_000
# What every record has; anything else came with `extra=`.
_STANDARD = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time (RFC 3339, UTC), level, logger, message, request_id, and what `extra=` gave."""

    def __init__(self, *, with_process: bool = False) -> None:
        """`with_process`: whether lines have the process' id."""
        super().__init__()
        self._with_process = with_process

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        request_id = REQUEST_ID.get()
        if request_id:
            line["request_id"] = request_id
        if self._with_process:
            line["process"] = record.process
        line.update((key, value) for key, value in vars(record).items() if key not in _STANDARD)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class Repeated(logging.Filter):
    """Lets through so many warnings and errors from one place in a minute, and counts the others.

    A store that is away fails every call, and a stranger can make gRPC and asyncio log, with tracebacks. Lines are from
    one place if the code that logs is the same, and the code that failed.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._lock = threading.Lock()
        # By place: when its minute began, and how many lines came in it.
        self._counts: dict[tuple[object, ...], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        place, now = _place(record), self._clock()
        with self._lock:
            since, count = self._counts.get(place, (now, 0))
            left_out = 0
            if now - since >= MINUTE_S:
                since, count, left_out = now, 0, max(0, count - MOST_REPEATED)
            if len(self._counts) >= MOST_PLACES:
                self._counts.clear()
            self._counts[place] = since, count + 1
        if left_out:
            record.msg, record.args = f"{record.getMessage()} (and {left_out} times before, left out here)", None
        return count < MOST_REPEATED


def _place(record: logging.LogRecord) -> tuple[object, ...]:
    error = record.exc_info[1] if record.exc_info else None
    traceback = None if error is None else error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    failed = None if traceback is None else (traceback.tb_frame.f_code, traceback.tb_lineno)
    return record.name, record.pathname, record.lineno, type(error), failed


class DetachedHandler(logging.Handler):
    """Writes lines in a thread of its own, so that a reader of the log that stands still holds up no call.

    Lines for which there is no room are dropped, and counted in a line of their own once there is.
    """

    def __init__(self, stream: TextIO, most_lines: int = MOST_LINES, *, is_shared: bool = False) -> None:
        """`is_shared`: whether other processes write to the stream, whose lines must not come into these."""
        super().__init__()
        self._stream = stream
        self._is_shared = is_shared
        self._lines: Queue[str | None] = Queue(most_lines)
        self._dropped = 0
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        # In the thread of the call, whose request id the line has.
        try:
            self._lines.put_nowait(self.format(record))
        except Full:
            self._dropped += 1
            return
        except Exception:
            # A bad call of the log must not fail who calls it.
            self.handleError(record)
            return
        if self._dropped:
            count, self._dropped = self._dropped, 0
            message = f"{count} lines of the log were dropped"
            notice = logging.makeLogRecord({"name": __name__, "levelname": "WARNING", "msg": message})
            try:
                # Not by `handle`: the filters count how often a line comes, and this one has a number in it.
                self._lines.put_nowait(self.format(notice))
            except Full:
                self._dropped += count

    def finish(self, timeout_s: float = LONGEST_END_S) -> None:
        """Writes what waits, as long as that takes no longer; for the end of the process."""
        with suppress(Full):
            self._lines.put(None, timeout=timeout_s)
            self._thread.join(timeout_s)

    def close(self) -> None:
        """By `logging.shutdown`, which Python calls when it ends."""
        self.finish()
        super().close()

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            # Nobody could be told.
            with suppress(OSError, ValueError), _alone(self._stream) if self._is_shared else nullcontext():
                self._stream.write(f"{line}\n")
                self._stream.flush()


@contextmanager
def _alone(stream: TextIO) -> Iterator[None]:
    """No other process that asks as well writes meanwhile. A pipe takes 4 KiB as one piece, and cuts what is longer."""
    import fcntl

    # A stream that cannot be locked is written to all the same.
    with suppress(OSError, ValueError):
        fcntl.lockf(stream, fcntl.LOCK_EX)
    try:
        yield
    finally:
        with suppress(OSError, ValueError):
            fcntl.lockf(stream, fcntl.LOCK_UN)


def start_logging(formatter: logging.Formatter, stream: TextIO | None = None, *, is_shared: bool = False) -> None:
    """Sends all logging to `stream`, standard error by default, from a thread of its own. `is_shared`: see
    `DetachedHandler`."""
    handler = DetachedHandler(stream or sys.stderr, is_shared=is_shared)
    handler.setFormatter(formatter)
    handler.addFilter(Repeated())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
