"""What the history says of its own items, for models that may answer them again: how often each was met, and when.

What is kept of a history are its meetings, one for each item, which the next event changes without the events before
it. The tables and the edges of their buckets are the model's (`jaxrec.models.repeat`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from serve.model.events import KnownEvent

MEETING = np.dtype([("item", "<i4"), ("count", "<i4"), ("place", "<i4"), ("first", "<i8"), ("last", "<i8")])
"""An item, how often it was met, the last event's place in the history, the first and the last time in seconds."""
NO_INTERVAL = -1.0

Meetings = NDArray[np.void]
"""`[m]` of MEETING, each item once."""


class Seen(NamedTuple):
    """Items of a history, each once, and what is added to their logits."""

    items: NDArray[np.int32]
    """`[m]`; 0 is none."""
    scores: NDArray[np.float32]
    """`[m]`."""


class Buckets(NamedTuple):
    """A feature of a meeting."""

    edges: NDArray[np.float64]
    """`[n]`, increasing; a value from an edge on is in the next bucket."""
    scores: NDArray[np.float32]
    """`[1 or 2, n+1]`, the number of each bucket; a second row is for requests with a time."""


@dataclass(frozen=True, slots=True, eq=False)
class Repeat:
    """What the manifest says of repeats."""

    count: Buckets
    """Of how often the item was met."""
    ago: Buckets
    """Of how many events came after the last meeting."""
    age: Buckets
    """Of the seconds since, until the request, or until the last event where the request has no time."""
    interval: Buckets
    """Of these seconds over the mean time between two meetings; -1 where there is none."""

    def seen(self, met: Meetings, length: int, last: int, request_time: int | None) -> Seen:
        """What is added to the logits.

        Args:
            met: The history's meetings.
            length: Its number of events.
            last: When the last of them was, in seconds.
            request_time: In seconds; None: not known.
        """
        count = met["count"]
        age = np.maximum((last if request_time is None else request_time) - met["last"], 0)
        span = met["last"] - met["first"]
        interval = np.where(span > 0, age * (count - 1) / np.maximum(span, 1), NO_INTERVAL)
        scores = np.zeros(len(met), np.float32)
        for (edges, of_buckets), value in zip(
            (self.count, self.ago, self.age, self.interval),
            (count, length - 1 - met["place"], age, interval),
            strict=True,
        ):
            table = of_buckets[0 if request_time is None else -1]
            scores += table[np.searchsorted(edges, value, side="right")]
        return Seen(np.ascontiguousarray(met["item"]), scores)


def meetings(events: Sequence[KnownEvent]) -> Meetings:
    """Of a whole history in time order.

    >>> meetings([KnownEvent(7, None, 10), KnownEvent(9, None, 20), KnownEvent(7, None, 30)]).tolist()
    [(7, 2, 2, 10, 30), (9, 1, 1, 20, 20)]
    """
    times = np.array([event.timestamp for event in events], np.int64)
    items = np.array([event.item for event in events], np.int32)
    found, first, count = np.unique(items, return_index=True, return_counts=True)
    place = len(items) - 1 - np.unique(items[::-1], return_index=True)[1]
    met = np.empty(len(found), MEETING)
    met["item"], met["count"], met["place"] = found, count, place
    met["first"], met["last"] = times[first], times[place]
    return met


def met_again(met: Meetings, length: int, events: Sequence[KnownEvent]) -> Meetings:
    """The meetings of a history of `length` events after more of them, none before its last one."""
    new = meetings(events)
    new["place"] += length
    old = met.copy()
    row = {item: at for at, item in enumerate(old["item"].tolist())}
    places = np.array([row.get(item, -1) for item in new["item"].tolist()], np.intp)
    known = places >= 0
    old["count"][places[known]] += new["count"][known]
    for name in ("place", "last"):
        old[name][places[known]] = new[name][known]
    return np.concatenate([old, new[~known]])
