"""Calls that wait for their client, to send its message or to take its answer: they hold memory, so they are few.

A call that was begun may send 64 KiB, the window that HTTP/2 gives it; once gRPC is asked for the message, it takes as
much as the client announced, up to the largest message that is allowed. So it is asked for few messages at a time,
while other calls stand in line: with 8 MiB, `MOST_RECEIVING` hold 512 MiB, `MOST_SHORT_RECEIVING` 128 MiB, and a line
of `MOST_IN_LINE` 64 MiB. Callers without a token, who may call only what needs no token, have the short ones and one of
the two lines.
"""

import time
from collections import Counter
from collections.abc import Callable
from typing import Protocol

import grpc

from serve.api.errors import Refused

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
# A health check names a service. To decode 8 MiB of it takes the event loop 0.1 to 0.3 s.
MOST_SHORT_BYTES = 2**10
# Answers that gRPC still has, since their clients do not read. Most have a few KB.
MOST_UNSENT = 1_000
MOST_UNSENT_BYTES = 64 * 2**20
# Of one connection, in any case: the largest answer there can be, and some.
MOST_UNSENT_BYTES_OF_ONE = 16 * 2**20
# How often to look for calls that wait too long for their client.
LOOK_S = 0.25
TOO_MANY_STREAMS = "too many streams are open"


class Call(Protocol):
    """As much of a call as is needed here."""

    def method_name(self) -> str: ...

    def receive(self) -> None:
        """From now on the message is waited for."""

    def give_up(self, code: grpc.StatusCode, details: str) -> None:
        """Ends the call with a status."""

    def peer(self) -> str:
        """Names the connection; over a Unix socket, where gRPC names none, the call."""

    def is_written_to(self) -> bool:
        """Whether a response is being written, so that the call cannot be ended."""


class Unreceived:
    """Calls whose message has not come.

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
        self._on_end(call.method_name())


class Open:
    """Streams that are open, each until its handler has returned: with `most` of them the next one ends the oldest of
    the connection that has most."""

    def __init__(self, most: int) -> None:
        self._most = most
        # The oldest first.
        self._calls: dict[Call, None] = {}
        # Those of them that were given up.
        self._ending: set[Call] = set()

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, call: Call) -> None:
        """Raises Refused if the one that would have to go cannot, since its client does not read."""
        going_on = [other for other in self._calls if other not in self._ending]
        if len(going_on) >= self._most:
            counts = Counter(other.peer() for other in [*going_on, call])
            oldest = max(going_on, key=lambda other: counts[other.peer()])
            if oldest.is_written_to() or len(self._ending) >= self._most:
                raise Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, TOO_MANY_STREAMS)
            self._ending.add(oldest)
            oldest.give_up(grpc.StatusCode.RESOURCE_EXHAUSTED, TOO_MANY_STREAMS)
        self._calls[call] = None

    def remove(self, call: Call) -> None:
        """Its handler returns."""
        self._calls.pop(call, None)
        self._ending.discard(call)


class Unsent:
    """Answers that were given to gRPC, until their calls are over.

    gRPC sends as much as the client has room for, which may be nothing, until the connection is too old.
    """

    def __init__(self) -> None:
        self._sizes: dict[Call, int] = {}
        self._bytes = 0
        self._bytes_of: Counter[str] = Counter()
        self._count_of: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._sizes)

    def add(self, call: Call, size: int) -> None:
        """An answer of so many bytes."""
        self._sizes[call] = size
        self._bytes += size
        self._bytes_of[call.peer()] += size
        self._count_of[call.peer()] += 1

    def remove(self, call: Call) -> None:
        """The call is over."""
        size, peer = self._sizes.pop(call), call.peer()
        self._bytes -= size
        self._bytes_of[peer] -= size
        self._count_of[peer] -= 1
        if not self._count_of[peer]:
            del self._count_of[peer], self._bytes_of[peer]

    def has_room(self, call: Call) -> bool:
        """Whether a call may have an answer. None of a connection that has much unread; and while too much is not read,
        none of one that has not read all."""
        peer = call.peer()
        if len(self._sizes) < MOST_UNSENT and self._bytes < MOST_UNSENT_BYTES:
            return self._bytes_of.get(peer, 0) < MOST_UNSENT_BYTES_OF_ONE
        return peer not in self._count_of
