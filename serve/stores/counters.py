"""Decayed counts of the events of each item, as stores keep them: for every half-life, as of a reference time.

The reference is the time of the item's latest event, so no event is ever weighted up, and in which order events arrive
does not matter. What is older than a reference is worth less by then; two counters are added at the later reference.
"""

import logging
import math
import threading
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from serve.model.trend import COUNTED_S

logger = logging.getLogger(__name__)

NONE_READ = -1
ONE_EVENT = (1.0,) * len(COUNTED_S)
EXPECTED = f"{len(COUNTED_S)} finite numbers from 0 on"


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
    def of(cls, counters: Iterable[tuple[str, Counter]], change: int = NONE_READ, arrival: int = 0) -> Self:
        """The columns of counters.

        Args:
            counters: Item ids, each once, and their counters.
            change: As above.
            arrival: As above.

        Raises:
            ValueError: The counts of an item are not one finite number from 0 on for each half-life.
        """
        item_ids, references, rows = [], [], []
        for item_id, (reference, counts) in counters:
            if not are_counts(counts):
                raise ValueError(f"counter of the item {item_id!r}: expected {EXPECTED}, came {counts}")
            item_ids.append(item_id)
            references.append(reference)
            rows.append(counts)
        columns = np.array(rows, np.float64).reshape(-1, len(COUNTED_S))
        return cls(item_ids, np.array(references, np.int64), columns, change, arrival)

    def counters(self) -> dict[str, Counter]:
        """The reverse of `of`: the counters by item id."""
        columns = zip(self.references.tolist(), self.counts.tolist(), strict=True)
        return dict(zip(self.item_ids, (Counter(*row) for row in columns), strict=True))


DAMAGED_COUNTER = (
    f"%s: the counter of the item %r cannot be decoded (expected {EXPECTED}): it stays as it is, and the item's events"
    " are stored without being counted"
)


class Damaged:
    """The items of a store of which something cannot be decoded: each is logged once, however often it is read."""

    def __init__(self, where: str, message: str = DAMAGED_COUNTER) -> None:
        """Of a store, which the messages name.

        Args:
            where: The store.
            message: What is logged, with places for the store and for the item's id.
        """
        self._where = where
        self._message = message
        self._logged: set[str] = set()
        self._lock = threading.Lock()

    def log(self, item_ids: Iterable[str]) -> None:
        """Logs an error for each item that was not logged before."""
        with self._lock:
            new = [item_id for item_id in item_ids if item_id not in self._logged]
            self._logged.update(new)
        for item_id in new:
            logger.error(self._message, self._where, item_id)


def with_hour(counts: Sequence[float]) -> Sequence[float]:
    """The counts of a counter, also of one that was written by a server of before, which counted no last hour.

    >>> with_hour([1.0] * 6)
    [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0]
    """
    return [*counts, 0.0] if len(counts) == len(COUNTED_S) - 1 else counts


def are_counts(counts: Sequence[float]) -> bool:
    """Whether these are one finite number from 0 on for each half-life.

    >>> are_counts([0.0] * 7), are_counts([0.0] * 6), are_counts([0.0] * 6 + [math.nan])
    (True, False, False)
    """
    try:
        return len(counts) == len(COUNTED_S) and all(0 <= count < math.inf for count in counts)
    except TypeError:
        return False


def added(one: Counter, other: Counter) -> Counter:
    """The events of both.

    >>> added(Counter(0, ONE_EVENT), Counter(86_400, ONE_EVENT)).counts[:2]
    (1.0625, 1.5)
    """
    late, early = (one, other) if one.reference >= other.reference else (other, one)
    seconds = late.reference - early.reference
    counts = (
        of_late + of_early * 0.5 ** (seconds / half_life)
        for of_late, of_early, half_life in zip(late.counts, early.counts, COUNTED_S, strict=True)
    )
    return Counter(late.reference, tuple(counts))


def add_events(counters: dict[str, Counter], events: Iterable[tuple[str, int]], now: float) -> None:
    """Adds events to the counters of their items, in place.

    Args:
        counters: By item id; those that are missing begin.
        events: Item id and time in seconds.
        now: An event after this (seconds) counts as of now: a clock that is ahead must not hide what comes before.
    """
    for item_id, timestamp in events:
        new = Counter(min(timestamp, int(now)), ONE_EVENT)
        counter = counters.get(item_id)
        counters[item_id] = new if counter is None else added(counter, new)


def counted(events: Iterable[tuple[str, int]], now: float, until: int) -> dict[str, Counter]:
    """The counters of events by item id, in the order of ids: what several servers lock in one order.

    Args:
        events: Item id and time in seconds.
        now: As in `add_events`.
        until: Seconds; events of this second and of earlier ones are left out, see `EventStore.counted_until`.

    Returns:
        By item id, without items of which no event counts.
    """
    counters: dict[str, Counter] = {}
    add_events(counters, (event for event in events if event[1] > until), now)
    return dict(sorted(counters.items()))
