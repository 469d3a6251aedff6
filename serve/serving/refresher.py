"""A thread that brings what loaded models use up to date with the store, every few seconds; no request waits for it."""

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from serve.model.recommender import Recommender

logger = logging.getLogger(__name__)


class Refresher(ABC):
    """What is refreshed from a store, and the models that use it. Close it.

    The models in use are refreshed from the first `keep` on.
    """

    name: str
    """Of the thread."""
    failure: str
    """What is logged if a refresh fails for another reason than the store."""

    def __init__(self, refresh_s: float, monotonic: Callable[[], float] = time.monotonic) -> None:
        """Nothing is read yet.

        Args:
            refresh_s: Seconds from one refresh to the next.
            monotonic: Seconds of a clock that is never set, for `age_s`.
        """
        self._refresh_s = refresh_s
        self._monotonic = monotonic
        self._models: Sequence[Recommender] = ()
        # Held while the store is read and what was read is used: by the thread, and by those that load models.
        self._lock = threading.Lock()
        # What fails now, and why.
        self._failing: dict[str, str] = {}
        self._refreshed = monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)

    @abstractmethod
    def prepare(self, model: Recommender) -> None:
        """Brings a model up to date, before it serves; as far as it was read before, if the store fails."""

    @abstractmethod
    def refresh(self) -> None:
        """Reads what changed, and brings each model in use up to date."""

    def keep(self, models: Sequence[Recommender]) -> None:
        """From now on these are refreshed, and no others."""
        with self._lock:
            self._models = tuple(models)
        if not self._thread.is_alive() and not self._closed.is_set():
            self._thread.start()

    def age_s(self) -> float:
        """Seconds since the store was last read, or since the start."""
        return self._monotonic() - self._refreshed

    def close(self) -> None:
        """Stops; the models keep what they have."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._closed.wait(self._refresh_s):
            # Whatever happens, the thread goes on: no other would be started.
            try:
                self.refresh()
            except Exception as error:
                self._failed(self.failure, error)
            else:
                self._works(self.failure)

    def _failed(self, what: str, error: Exception) -> None:
        """Logs a failure, but not again as long as its cause is the same."""
        cause = f"{type(error).__name__}: {error}"
        if self._failing.get(what) != cause:
            logger.error(what, exc_info=error)
        self._failing[what] = cause

    def _works(self, what: str) -> None:
        if self._failing.pop(what, None) is not None:
            logger.info("no longer: %s", what)
