"""How many events each item had lately, as of any moment: counts that decay with a few half-lives.

Every event counts, whatever its user and its part of the split, but only before the moment that is asked for: it is
what a server knows that has recorded all of them.
"""

import numpy as np

from jaxrec.data.prepared import PreparedData
from jaxrec.data.schema import SECONDS_PER_DAY

HALF_LIVES_S = tuple(round(days * SECONDS_PER_DAY) for days in (0.25, 1, 3, 7, 30, 90))
"""Seconds after which an event counts half, from hours to months. `serve` keeps counts with the same ones."""

EVENTS_AT_A_TIME = 1_000_000  # so that long logs cost no memory


class DecayedCounts:
    """The decayed counts of all items while time goes on.

    Moments are best asked for in their order: one that lies before the last one is counted from the first event.
    """

    def __init__(self, items: np.ndarray, times: np.ndarray, item_count: int) -> None:
        """Takes events in any order.

        Args:
            items: [events] int, from 1 on.
            times: [events] int64, seconds.
            item_count: Number of items, without padding.
        """
        order = np.argsort(times, kind="stable")
        self._items, self._times = items[order], times[order]
        self._half_lives = np.array(HALF_LIVES_S, np.float64)[:, None]
        self._width = item_count + 1
        self._counts = np.zeros((len(HALF_LIVES_S), self._width))
        self._next, self._now = 0, np.iinfo(np.int64).min

    @classmethod
    def of(cls, data: PreparedData) -> "DecayedCounts":
        """Of all events of prepared data, those of validation and test included."""
        return cls(np.asarray(data.histories.items), np.asarray(data.histories.times), len(data.catalog))

    @property
    def last_time(self) -> int:
        """When the last event was, in seconds; 0 without events."""
        return int(self._times[-1]) if len(self._times) else 0

    def before(self, times: np.ndarray) -> np.ndarray:
        """The counts at some moments, of the events before each: not of those in the same second.

        Args:
            times: [n] int64, seconds.

        Returns:
            [n, half-lives, items + 1] float32: the sum of 0.5 ** (age / half-life) over an item's events.

        Examples:
            >>> day = 86400
            >>> counts = DecayedCounts(np.array([1, 1, 2]), np.array([0, day, day]), 2)
            >>> counts.before(np.array([day, 2 * day]))[:, 1].tolist()  # the half-life of one day
            [[0.0, 0.5, 0.0], [0.0, 0.75, 0.5]]
        """
        found = np.empty((len(times), len(HALF_LIVES_S), self._width), np.float32)
        before = None
        for at in np.argsort(times, kind="stable"):
            same = before is not None and times[at] == times[before]
            found[at] = found[before] if same else self._advanced(int(times[at]), "left")
            before = at
        return found

    def until(self, time: int) -> np.ndarray:
        """[half-lives, items + 1] float32: the counts at one moment, of the events up to it and in its second."""
        return self._advanced(time, "right").astype(np.float32)

    def _advanced(self, time: int, side: str) -> np.ndarray:
        stop = int(np.searchsorted(self._times, time, side))  # type: ignore[call-overload]
        if time < self._now or stop < self._next:
            self._counts[:] = 0
            self._next, self._now = 0, np.iinfo(np.int64).min
        if self._next:
            self._counts *= 0.5 ** ((time - self._now) / self._half_lives)
        for start in range(self._next, stop, EVENTS_AT_A_TIME):
            new = slice(start, min(start + EVENTS_AT_A_TIME, stop))
            weights = 0.5 ** ((time - self._times[new]) / self._half_lives)
            for half_life, of_events in enumerate(weights):
                self._counts[half_life] += np.bincount(self._items[new], of_events, self._width)
        self._next, self._now = stop, time
        return self._counts
