"""Calls that wait for their client, to send its message or to take its answer: they hold memory, so they are few."""

import time
from typing import Protocol

# A client takes its answer as it comes; who has not done so by then is very far away or up to no good.
ANSWER_S = 30.0
# What may wait for clients that do not read; of more the oldest goes. Most answers have a few KB.
MOST_UNSENT = 1_000
MOST_UNSENT_BYTES = 64 * 2**20


class Call(Protocol):
    """As much of a `PolledCall` as is needed here."""

    def cancel(self) -> None: ...


class Unsent:
    """Calls that were answered and whose answer gRPC still has, the oldest first.

    gRPC sends as much as the client has room for, which may be nothing. Any thread adds; one looks and removes.
    """

    def __init__(self) -> None:
        self._since: dict[Call, tuple[float, int]] = {}

    def __len__(self) -> int:
        return len(self._since)

    def add(self, call: Call, size: int) -> None:
        """An answer of so many bytes, before gRPC has it."""
        self._since[call] = time.monotonic(), size

    def remove(self, call: Call) -> None:
        """The call is over."""
        self._since.pop(call, None)

    def end_overdue(self) -> None:
        """Cancels calls whose answers are too old, or too many or too large together."""
        # In one step: other threads add meanwhile.
        waiting = list(self._since.items())
        count, size = len(waiting), sum(size for _, (_, size) in waiting)
        now = time.monotonic()
        for call, (since, its_size) in waiting:
            if now - since <= ANSWER_S and count <= MOST_UNSENT and size <= MOST_UNSENT_BYTES:
                return
            count, size = count - 1, size - its_size
            self.remove(call)
            call.cancel()
