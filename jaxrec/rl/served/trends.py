"""The trend that ranked served recommendations, computed again from the store's events.

A server notes with each recommendation as of which second its counts of recent events were (`trend_time`), and the
arrival of the last event in them (`trend_arrival`). Its counts are those of the run's own data, and of what arrived
until then: events up to the last one of the run's data are in the former.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxrec.data.prepared import PreparedData
from jaxrec.data.trend import HALF_LIVES_S, DecayedCounts
from jaxrec.models.hybrid import Hybrid
from jaxrec.rl.scoring import Trends

MOST_BYTES = 2**29  # of all trends together


class Moment(NamedTuple):
    """Which events a server's trend counted: those that arrived up to `arrival`, decayed until `time` (seconds)."""

    time: int
    arrival: int


class ArrivedEvents(NamedTuple):
    """Events of all users in the order of their arrival, on items of the catalogue: `items` int32 from 1 on, `times`
    int64 seconds, `arrivals` int64, each [events]."""

    items: np.ndarray
    times: np.ndarray
    arrivals: np.ndarray


def served_trends(
    hybrid: Hybrid, data: PreparedData, moments: Sequence[Moment], events: ArrivedEvents, most_bytes: int = MOST_BYTES
) -> Trends:
    """The trends at the moments of a log.

    Where those of all moments would take more memory than `most_bytes`, several moments in a row share the first one's.
    Over some minutes a trend hardly changes.

    Args:
        hybrid: Whose `trend` it is.
        data: The prepared data of the run: its events are counted before any other.
        moments: In any order, each once.
        events: Of the store.
        most_bytes: Of `Trends.values`.
    """
    none = np.zeros((1, len(data.catalog) + 1), np.float32)
    places = np.zeros(len(moments) + 1, np.int32)
    if not moments or not np.any(hybrid.trend.weights[...]):
        return Trends(none, places)
    at = np.array(moments, np.int64)
    order = np.lexsort((at[:, 0], at[:, 1]))
    step = -(-len(moments) * none.nbytes // most_bytes)
    exported = DecayedCounts.of(data)
    counts = _Counts(exported.until(exported.last_time), exported.last_time, events)
    values = [none[0]]
    for place, row in enumerate(order):
        if place % step == 0:
            values.append(np.asarray(hybrid.trend(counts.at(moments[row]))))
        places[1 + row] = len(values) - 1
    return Trends(np.stack(values), places)


class _Counts:
    """The decayed counts [half-lives, items + 1] while events arrive."""

    def __init__(self, counts: np.ndarray, counted_until: int, events: ArrivedEvents) -> None:
        later = events.times > counted_until
        self._events = ArrivedEvents(*(column[later] for column in events))
        self._counts, self._time, self._next = counts.astype(np.float64), counted_until, 0

    def at(self, moment: Moment) -> np.ndarray:
        """Float32, at a moment whose arrival is not before the last one's."""
        # Of several servers one may be behind: by seconds, so that nothing grows beyond measure.
        self._counts *= _halved(np.array([moment.time - self._time]))
        self._time = moment.time
        stop = int(np.searchsorted(self._events.arrivals, moment.arrival, side="right"))
        items, times, _ = (column[self._next : stop] for column in self._events)
        self._next = stop
        # A clock that was ahead: the event is as of now.
        weights = _halved(np.maximum(moment.time - times, 0))
        for half_life, weight in enumerate(weights):
            self._counts[half_life] += np.bincount(items, weight, self._counts.shape[1])
        return self._counts.astype(np.float32)


def _halved(seconds: np.ndarray) -> np.ndarray:
    """[n] int64 -> [half-lives, n] float64."""
    return 0.5 ** (seconds / np.array(HALF_LIVES_S, np.float64)[:, None])
