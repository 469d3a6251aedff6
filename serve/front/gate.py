"""Whether calls are let in, and how many are under way."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from serve.api.errors import NotServing

LOADING = "the model is being loaded, try again"
DRAINING = "the server is shutting down, try another or again"


class Gate:
    """Counts the calls under way, and turns calls away while it is closed, which it is at first.

    Health checks and streams pass uncounted. All is for any thread.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._under_way = 0
        self._closed = LOADING

    def open(self) -> None:
        """From now on calls are answered."""
        with self._changed:
            self._closed = ""

    def close(self) -> None:
        """From now on every call that is not under way ends with UNAVAILABLE, upon which a client tries again."""
        with self._changed:
            self._closed = DRAINING

    @property
    def under_way(self) -> int:
        """How many calls are being answered."""
        return self._under_way

    def wait_until_idle(self, timeout_s: float) -> bool:
        """Whether no call is under way any more, within so many seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._under_way, timeout_s)

    @contextmanager
    def call(self) -> Iterator[None]:
        """A call, for as long as it is answered; raises NotServing."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    def enter(self) -> None:
        """A call begins, which is to `leave`; raises NotServing."""
        with self._changed:
            if self._closed:
                raise NotServing(self._closed)
            self._under_way += 1

    def leave(self) -> None:
        """A call that entered is answered."""
        with self._changed:
            self._under_way -= 1
            if self._closed:
                self._changed.notify_all()
