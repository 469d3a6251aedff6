"""Decayed counts of the events of each item, as stores keep them: for every half-life, as of a reference time.

The reference is the time of the item's latest event, so no event is ever weighted up, and in which order events arrive
does not matter. What is older than a reference is worth less by then; two counters are added at the later reference.
"""

import json
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from serve.model.trend import HALF_LIVES_S

NONE_READ = -1
ONE_EVENT = (1.0,) * len(HALF_LIVES_S)
_LENGTHS = struct.Struct("<qq")


class Counter(NamedTuple):
    """The events of one item."""

    reference: int
    """Seconds since 1970-01-01T00:00Z."""
    counts: Sequence[float]
    """One for each half-life, as of the reference."""


class ItemCounts(NamedTuple):
    """Counters of several items, in columns."""

    item_ids: Sequence[str]
    """Raw ids, each once."""
    references: NDArray[np.int64]
    """`[items]`, seconds."""
    counts: NDArray[np.float64]
    """`[items, half-lives]`."""
    change: int = NONE_READ
    """Of the store when this was read: what to ask with for those that change afterwards."""
    arrival: int = 0
    """Of the last event that the store had counted by then, as `EventStore.all_events` numbers it; 0: there is none."""

    @classmethod
    def of(cls, counters: Mapping[str, Counter]) -> Self:
        """By item id."""
        counts = np.array([counter.counts for counter in counters.values()], np.float64)
        references = np.array([counter.reference for counter in counters.values()], np.int64)
        return cls(list(counters), references, counts.reshape(-1, len(HALF_LIVES_S)))

    def to_bytes(self) -> bytes:
        """What `from_bytes` reads; without the change number."""
        ids = json.dumps(self.item_ids, ensure_ascii=True).encode()
        arrays = self.references.astype("<i8").tobytes() + self.counts.astype("<f8").tobytes()
        return zlib.compress(_LENGTHS.pack(len(self.item_ids), len(ids)) + ids + arrays, level=1)

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """The reverse of `to_bytes`."""
        content = zlib.decompress(content)
        rows, length = _LENGTHS.unpack_from(content)
        start = _LENGTHS.size + length
        references = np.frombuffer(content, "<i8", rows, start)
        counts = np.frombuffer(content, "<f8", rows * len(HALF_LIVES_S), start + references.nbytes)
        return cls(json.loads(content[_LENGTHS.size : start]), references, counts.reshape(rows, len(HALF_LIVES_S)))


def added(one: Counter, other: Counter) -> Counter:
    """The events of both.

    >>> added(Counter(0, ONE_EVENT), Counter(86_400, ONE_EVENT)).counts[:2]
    (1.0625, 1.5)
    """
    late, early = (one, other) if one.reference >= other.reference else (other, one)
    seconds = late.reference - early.reference
    counts = (
        of_late + of_early * 0.5 ** (seconds / half_life)
        for of_late, of_early, half_life in zip(late.counts, early.counts, HALF_LIVES_S, strict=True)
    )
    return Counter(late.reference, tuple(counts))


def add_events(counters: dict[str, Counter], events: Iterable[tuple[str, int]], now: float) -> None:
    """Adds events to the counters of their items, in place.

    Args:
        counters: By item id; those that are missing are begun.
        events: Item id and time in seconds.
        now: An event after this (seconds) counts as of now: a clock that is ahead must not hide what comes before.
    """
    for item_id, timestamp in events:
        new = Counter(min(timestamp, int(now)), ONE_EVENT)
        counter = counters.get(item_id)
        counters[item_id] = new if counter is None else added(counter, new)


def counted(events: Iterable[tuple[str, int]], now: float) -> dict[str, Counter]:
    """The counters of events by item id, in the order of ids: what several servers lock in one order.

    Args:
        events: Item id and time in seconds.
        now: As in `add_events`.
    """
    counters: dict[str, Counter] = {}
    add_events(counters, events, now)
    return dict(sorted(counters.items()))
