"""Deletes what is not needed any more: states of model versions that are not loaded, and slates that are too old."""

import logging
import threading
import time
from collections.abc import Callable, Sequence

from serve.stores.base import EventStore, StoreError

logger = logging.getLogger(__name__)

# States to look at in one step, and the pause after it.
DROPPED_AT_ONCE = 1000
PAUSE_S = 0.05
DAY_S = 86_400
PRUNED_EVERY_S = 3_600.0


class StateSweeper:
    """Forgets the states of versions that left, in a thread of its own: a million of them takes a minute.

    Such a version is rarely asked again, and its states can be rebuilt.
    """

    def __init__(self, store: EventStore) -> None:
        self._store = store
        self._changed = threading.Condition()
        self._versions: Sequence[str] | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="state-sweeper", daemon=True)
        self._thread.start()

    def keep(self, versions: Sequence[str]) -> None:
        """All states but those of these versions go; returns at once."""
        with self._changed:
            self._versions = versions
            self._changed.notify()

    def close(self) -> None:
        """Stops, wherever it is: what is left goes after the next start."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._versions is not None)
                versions, self._versions = self._versions, None
            if self._closed:
                return
            try:
                while versions is not None and self._drop(versions):
                    pass
            except StoreError as error:
                logger.error("the states of earlier versions stay in the store", exc_info=error)

    def _drop(self, versions: Sequence[str]) -> bool:
        """Looks at all states, part by part; whether to do so once more, since some were dropped. Ends early when it is
        closed, or other versions are to be kept."""
        place, dropped = None, 0
        while True:
            count, place = self._store.drop_states(versions, DROPPED_AT_ONCE, place)
            dropped += count
            with self._changed:
                # Between two parts others write.
                if self._changed.wait_for(lambda: self._closed or self._versions is not None, PAUSE_S):
                    return False
            if place is None:
                return dropped > 0


class SlatePruner:
    """Deletes recommendations and impressions that are older than some days, once an hour, in a thread of its own."""

    def __init__(self, store: EventStore, days: float, clock: Callable[[], float] = time.time) -> None:
        """Begins at once; `clock` gives seconds since 1970-01-01T00:00Z."""
        self._store = store
        self._days = days
        self._clock = clock
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="slate-pruner", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops, wherever it is: what is left goes after the next start."""
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        pause_s = 0.0
        while not self._closed.wait(pause_s):
            pause_s = PAUSE_S
            try:
                before = int(self._clock() - self._days * DAY_S)
                if not self._store.prune_slates(before, DROPPED_AT_ONCE):
                    pause_s = PRUNED_EVERY_S
            # Whatever happens, the thread goes on: no other would be started.
            except Exception as error:
                logger.error("old recommendations stay in the store", exc_info=error)
                pause_s = PRUNED_EVERY_S
