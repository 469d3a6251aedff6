"""For models that may recommend items of the history again: what is added to the logits of these items.

Of a history one row is kept for each of its items: how many events it has, the place of the last one, and the times of
the first and the last one. The next event updates these rows without the events before it. How a row becomes a score,
the edges of the buckets and the number of each bucket, is in the model's manifest (`jaxrec.models.repeat`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from serve.model.events import KnownEvent

ITEM_STATS = np.dtype([("item", "<i4"), ("count", "<i4"), ("place", "<i4"), ("first", "<i8"), ("last", "<i8")])
"""An item, its number of events, the place of the last one in the history (from 0), and the times of the first and the
last one in seconds."""
NO_INTERVAL = -1.0

ItemStats = NDArray[np.void]
"""`[m]` of ITEM_STATS, each item once, in the order of the items."""


class SeenScores(NamedTuple):
    """Items of a history, each once, and what is added to their logits."""

    items: NDArray[np.int32]
    """`[m]`; 0 is none."""
    scores: NDArray[np.float32]
    """`[m]`."""


class Buckets(NamedTuple):
    """The buckets of one feature of an item of the history, and their numbers."""

    edges: NDArray[np.float64]
    """`[n]`, increasing; a value from an edge on is in the next bucket."""
    scores: NDArray[np.float32]
    """`[1 or 2, n+1]`, the number of each bucket; a second row is for requests with a time."""


@dataclass(frozen=True, slots=True, eq=False)
class Repeat:
    """The features of an item of the history, whose numbers add up to its score."""

    count: Buckets
    """Of the number of the user's events on the item."""
    ago: Buckets
    """Of the number of the user's events after the last one on the item."""
    age: Buckets
    """Of the seconds from the last event on the item until the request. If the request has no time: until the user's
    last event."""
    interval: Buckets
    """Of these seconds divided by the mean time between two events on the item; -1 where all were in one second."""

    def scores_of(self, stats: ItemStats, length: int, last: int, request_time: int | None) -> SeenScores:
        """What is added to the logits.

        Args:
            stats: Of the history's items.
            length: Its number of events.
            last: When the last of them was, in seconds.
            request_time: In seconds; None: not known.

        Returns:
            The items in the order of `stats`, with their scores.
        """
        count = stats["count"]
        age = np.maximum((last if request_time is None else request_time) - stats["last"], 0)
        span = stats["last"] - stats["first"]
        interval = np.where(span > 0, age * (count - 1) / np.maximum(span, 1), NO_INTERVAL)
        scores = np.zeros(len(stats), np.float32)
        for (edges, of_buckets), value in zip(
            (self.count, self.ago, self.age, self.interval),
            (count, length - 1 - stats["place"], age, interval),
            strict=True,
        ):
            table = of_buckets[0 if request_time is None else -1]
            scores += table[np.searchsorted(edges, value, side="right")]
        return SeenScores(np.ascontiguousarray(stats["item"]), scores)


def item_stats(events: Sequence[KnownEvent]) -> ItemStats:
    """The rows of a whole history in time order.

    Args:
        events: Any number.

    Returns:
        A row for each item.

    Examples:
        >>> item_stats([KnownEvent(9, None, 10), KnownEvent(7, None, 20), KnownEvent(9, None, 30)]).tolist()
        [(7, 1, 1, 20, 20), (9, 2, 2, 10, 30)]
    """
    times = np.array([event.timestamp for event in events], np.int64)
    items = np.array([event.item for event in events], np.int32)
    found, first, count = np.unique(items, return_index=True, return_counts=True)
    place = len(items) - 1 - np.unique(items[::-1], return_index=True)[1]
    stats = np.empty(len(found), ITEM_STATS)
    stats["item"], stats["count"], stats["place"] = found, count, place
    stats["first"], stats["last"] = times[first], times[place]
    return stats


def updated_stats(stats: ItemStats, length: int, events: Sequence[KnownEvent]) -> ItemStats:
    """The rows of a history that got more events, none of them before its last one.

    Args:
        stats: Of the history without them; it stays as it is.
        length: Its number of events.
        events: The new ones, in time order.

    Returns:
        `item_stats` of the whole.
    """
    new = item_stats(events)
    new["place"] += length
    items = np.append(stats["item"], np.int32(0))  # the 0 is at the place of items above all others
    places = np.searchsorted(items[:-1], new["item"])
    known = items[places] == new["item"]
    updated, at = stats.copy(), places[known]
    updated["count"][at] += new["count"][known]
    updated["place"][at], updated["last"][at] = new["place"][known], new["last"][known]
    return np.insert(updated, places[~known], new[~known])
