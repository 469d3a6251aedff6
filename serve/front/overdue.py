"""Calls that wait for their client, to send its message or to take its answer: they hold memory, so they are few.

gRPC has no bound on that memory which could be set from Python. A call that was begun may send 64 KiB, the window that
HTTP/2 gives it; once gRPC is asked for the message, it takes as much as the client announced, up to the largest message
that is allowed. So it is asked for few messages at a time, while other calls stand in line: with 8 MiB,
`MOST_RECEIVING` hold 512 MiB, `MOST_SHORT_RECEIVING` 128 MiB, and a line of `MOST_IN_LINE` 64 MiB. Callers without a
token, who may call only what needs no token, have the short ones and one of the two lines.
"""

import time
from collections import Counter
from collections.abc import Callable
from typing import Protocol

import grpc

# A message travels with its call, and an ordinary one is there when gRPC is asked for it.
MESSAGE_S = 30.0
MOST_RECEIVING = 64
# A call that has had so long makes way for those in line: 8 MiB at 34 Mbit/s.
YIELD_S = 2.0
# Health checks need no token, and have a few bytes.
SHORT_MESSAGE_S = 2.0
MOST_SHORT_RECEIVING = 16
SHORT_YIELD_S = 0.25
# 30 connections that begin 100 calls each at once put 2,000 in line for some milliseconds if their messages have 20 KB,
# and 140 if they have 50 bytes. What is in line has sent 64 KiB at most.
MOST_IN_LINE = 1_000
# A client reads its answer as it comes; one that has not by then is very far away or malicious.
ANSWER_S = 30.0
# What may wait for clients that do not read; of more the oldest goes. Most answers have a few KB.
MOST_UNSENT = 1_000
MOST_UNSENT_BYTES = 64 * 2**20


class Call(Protocol):
    """As much of a `PolledCall` as is needed here."""

    method: str

    def receive(self) -> None: ...

    def cancel(self) -> None: ...

    def give_up(self, code: grpc.StatusCode, details: str) -> None: ...

    def peer(self) -> str: ...


class Unreceived:
    """Calls whose message has not come; in the thread that polls.

    For so many of them gRPC waits for the message. The others stand in line, in which connections take turns.
    """

    def __init__(
        self, most_receiving: int, yield_s: float, seconds: float, most_in_line: int, on_end: Callable[[str], None]
    ) -> None:
        """A call may take `seconds`, and `yield_s` while others are in line; `on_end` gets the method of each call
        that is ended for want of its message."""
        self._most_receiving = most_receiving
        self._yield_s = yield_s
        self._seconds = seconds
        self._most_in_line = most_in_line
        self._on_end = on_end
        # With when they came here, the oldest first.
        self._receiving: dict[Call, float] = {}
        self._lines: dict[str, dict[Call, float]] = {}
        self._in_line = 0

    def add(self, call: Call) -> None:
        """A call more, for which another may have to go."""
        if len(self._receiving) < self._most_receiving:
            self._receive(call)
            return
        self._lines.setdefault(call.peer(), {})[call] = time.monotonic()
        self._in_line += 1
        self._make_way()
        if self._in_line > self._most_in_line:
            longest = max(self._lines.values(), key=len)
            self._end(next(iter(longest)), grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls wait for their message")

    def remove(self, call: Call) -> None:
        """The message came, or the call is over; the next in line has its place."""
        if self._receiving.pop(call, None) is None:
            line = self._lines.get(call.peer(), {})
            if line.pop(call, None) is not None:
                self._in_line -= 1
                if not line:
                    del self._lines[call.peer()]
        elif self._in_line:
            peer, line = next(iter(self._lines.items()))
            del self._lines[peer]
            following = next(iter(line))
            del line[following]
            self._in_line -= 1
            if line:
                self._lines[peer] = line
            self._receive(following)

    def end_overdue(self) -> None:
        """Ends calls whose message should have come."""
        self._make_way()
        now = time.monotonic()
        for waiting in [self._receiving, *self._lines.values()]:
            for call in [call for call, since in waiting.items() if now - since > self._seconds]:
                text = f"the message did not come within {self._seconds:g} s"
                self._end(call, grpc.StatusCode.DEADLINE_EXCEEDED, text)

    def _receive(self, call: Call) -> None:
        self._receiving[call] = time.monotonic()
        call.receive()

    def _make_way(self) -> None:
        """Ends calls that have had their time while others are in line: of the connections with most calls first."""
        until = time.monotonic() - self._yield_s
        while self._in_line and next(iter(self._receiving.values())) < until:
            counts = Counter(call.peer() for call in self._receiving)
            late = [call for call, since in self._receiving.items() if since < until]
            greediest = max(late, key=lambda call: counts[call.peer()])
            self._end(greediest, grpc.StatusCode.RESOURCE_EXHAUSTED, "others wait, and the message did not come")

    def _end(self, call: Call, code: grpc.StatusCode, details: str) -> None:
        self.remove(call)
        call.give_up(code, details)
        self._on_end(call.method)


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
