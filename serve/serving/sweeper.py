"""Forgets the kept states of model versions that are not loaded any more."""

import logging
import threading
from collections.abc import Sequence

from serve.stores.base import EventStore, StoreError

logger = logging.getLogger(__name__)

# States to forget in one transaction, and the pause after it.
DROPPED_AT_ONCE = 1000
PAUSE_S = 0.05


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
            while not self._closed and versions is not None:
                try:
                    if not self._store.drop_states(versions, DROPPED_AT_ONCE):
                        break
                except StoreError as error:
                    logger.error("the states of earlier versions stay in the store", exc_info=error)
                    break
                with self._changed:
                    # Between two parts others write.
                    self._changed.wait_for(lambda: self._closed or self._versions is not None, PAUSE_S)
                    versions, self._versions = self._versions or versions, None
            if self._closed:
                return
