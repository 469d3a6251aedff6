"""Writes that nobody waits for: gathered, and written together by a thread of their own."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence

from serve.store import Shown, SpilledState, StoreError

logger = logging.getLogger(__name__)

INTERVAL_S = 1.0
BATCH = 500
# A store that stays broken costs so much memory and no more: some 20 MB.
LIMIT = 20_000

Write = Callable[[Sequence[Shown], Sequence[SpilledState]], None]


class DeferredWrites:
    """Hands what was added to `write`, at the latest a second later; keeps and repeats what could not be written."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self._waiting: deque[Shown | SpilledState] = deque()
        self._changed = threading.Condition()
        # Held while a batch is written, so that `discard` knows that nothing is half-way.
        self._writing = threading.Lock()
        self._closed = False
        self._failing = False
        self.dropped_count = 0
        self._thread = threading.Thread(target=self._run, name="deferred-writes", daemon=True)
        self._thread.start()

    def add(self, entries: Sequence[Shown | SpilledState]) -> None:
        """Returns at once; beyond the limit the oldest entries are dropped."""
        with self._changed:
            self._waiting.extend(entries)
            while len(self._waiting) > LIMIT:
                self._waiting.popleft()
                self.dropped_count += 1
            if len(self._waiting) >= BATCH:
                self._changed.notify()

    def discard(self, user_id: str) -> None:
        """Forgets what waits for a user; nothing of the user is written after this returns but what is added later."""
        with self._writing, self._changed:
            self._waiting = deque(entry for entry in self._waiting if entry.user_id != user_id)

    def flush(self) -> None:
        """Writes all that waits now; raises StoreError, and keeps it."""
        with self._writing:
            with self._changed:
                left = len(self._waiting)
            while left > 0:
                with self._changed:
                    batch = [self._waiting.popleft() for _ in range(min(BATCH, left, len(self._waiting)))]
                if not batch:
                    return
                left -= len(batch)
                try:
                    self._write(
                        [entry for entry in batch if isinstance(entry, Shown)],
                        [entry for entry in batch if isinstance(entry, SpilledState)],
                    )
                except StoreError:
                    with self._changed:
                        self._waiting.extendleft(reversed(batch))
                    raise

    def close(self) -> None:
        """Writes what waits, or counts it as dropped when that fails."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        try:
            self.flush()
        except StoreError as error:
            self.dropped_count += len(self._waiting)
            logger.error("%d shown recommendations and states are lost", len(self._waiting), exc_info=error)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._has_cause_to_write, INTERVAL_S)
                if self._closed:
                    return
            try:
                self.flush()
                self._failing = False
            except StoreError as error:
                if not self._failing:
                    logger.error("shown recommendations and states wait for the store", exc_info=error)
                self._failing = True

    def _has_cause_to_write(self) -> bool:
        return self._closed or (len(self._waiting) >= BATCH and not self._failing)
