"""The trend that ranked served recommendations, computed again from the events that the server had counted.

A server notes with each recommendation as of which second its counts were (`trend_time`), and which event of the store
arrived last before they were read (`trend_arrival`). The counts of its store begin with those of the first model that
it loaded, up to that model's last event; events of the store that happened later are added as they arrive. The first
part is counted here from the run's own data. So a trend is reproduced if these hold what the first model's data held.
Events of users that were deleted since are missing here, and stay in the store's counts. A count is the larger one of
the store's and of the run's export (`serve/serving/trend.py`).
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from jaxrec.data.prepared import PreparedData
from jaxrec.data.trend import HALF_LIVES_S, DecayedCounts
from jaxrec.models.hybrid import Hybrid
from jaxrec.models.trend import Trend
from jaxrec.rl.scoring import Trends

MOST_BYTES = 2**29  # of all trends together


class Moment(NamedTuple):
    """Counts as of `time` (seconds), of events that arrived up to `arrival`; None: of no event of the store."""

    time: int
    arrival: int | None


class ArrivedEvents(NamedTuple):
    """Events of all users in the order of their arrival, on items of the catalogue: `items` int32 from 1 on, `times`
    int64 seconds, `arrivals` int64, each [events]."""

    items: np.ndarray
    times: np.ndarray
    arrivals: np.ndarray


def served_trends(
    hybrid: Hybrid,
    data: PreparedData,
    moments: Sequence[Moment],
    events: ArrivedEvents,
    counted_until: int,
    most_bytes: int = MOST_BYTES,
) -> tuple[Trends, int]:
    """The trends at the moments of a log.

    Args:
        hybrid: Whose `trend` it is.
        data: The prepared data of the run.
        moments: In any order, each once.
        events: Of the store.
        counted_until: Time in seconds of the last event that the server's counts began with.
        most_bytes: Of `Trends.values`. Where the trends of all moments are larger, moments of the same few seconds
            share one.

    Returns:
        The trends, and of how many seconds moments share one; 0: each has its own.
    """
    row = 4 * (len(data.catalog) + 1)
    span = 0
    while len({_group(moment, span) for moment in moments}) * row > max(most_bytes, 2 * row):
        span = max(2 * span, 1)
    order = sorted(range(len(moments)), key=lambda at: (moments[at].arrival or 0, moments[at].time))
    counts = DecayedCounts.of(data)
    stored = _Stored(counts.until(counted_until), counted_until, events)
    exported = counts.until(counts.last_time)
    places: dict[tuple[int | None, int], int] = {}
    of_moment = np.zeros(len(moments) + 1, np.int32)
    for at in order:
        of_moment[1 + at] = places.setdefault(_group(moments[at], span), len(places) + 1)
    values = np.zeros((len(places) + 1, len(data.catalog) + 1), np.float32)
    graphdef, weights = nnx.split(hybrid.trend)
    done = 0
    for at in order:
        if of_moment[1 + at] > done:
            done += 1
            moment, age = moments[at], max(moments[at].time - counts.last_time, 0)
            of_export = exported * _halved(np.array([age])).astype(np.float32)
            if moment.arrival is None:
                values[done] = _trend(graphdef, weights, of_export)
                continue
            # Before the run's last event another model served, whose export is not known.
            ranked_by_run = moment.time >= counts.last_time
            of_store = stored.at(moment.time, moment.arrival)
            values[done] = _trend(graphdef, weights, np.maximum(of_store, of_export) if ranked_by_run else of_store)
    return Trends(values, of_moment), span


def _group(moment: Moment, span: int) -> tuple[int | None, int]:
    """Moments with the same one share a trend: those of `span` seconds, with the store or without it."""
    return (moment.arrival and 0, moment.time // span) if span else (moment.arrival, moment.time)


@functools.partial(jax.jit, static_argnums=0)
def _trend(graphdef: nnx.GraphDef[Trend], weights: nnx.State, counts: np.ndarray) -> jax.Array:
    return nnx.merge(graphdef, weights)(counts)


class _Stored:
    """The decayed counts [half-lives, items + 1] of the store while events arrive."""

    def __init__(self, counts: np.ndarray, time: int, events: ArrivedEvents) -> None:
        """`counts` are as of `time`; `events` that happened later are added as they arrive."""
        later = events.times > time
        self._events = ArrivedEvents(*(column[later] for column in events))
        self._counts, self._time, self._next = counts.astype(np.float64), time, 0

    def at(self, time: int, arrival: int) -> np.ndarray:
        """Float32, as of a time, of the events up to an arrival that is not before the last call's.

        A time before the last call's, as one of several servers may have it, gets the counts of the last call's time.
        An event that is dated after the time counts as of the time.
        """
        seconds = max(time - self._time, 0)
        self._counts *= _halved(np.array([seconds]))
        self._time += seconds
        stop = int(np.searchsorted(self._events.arrivals, arrival, side="right"))
        items, times, _ = (column[self._next : stop] for column in self._events)
        self._next = max(self._next, stop)
        weights = _halved(np.maximum(self._time - times, 0))
        for half_life, weight in enumerate(weights):
            self._counts[half_life] += np.bincount(items, weight, self._counts.shape[1])
        return self._counts.astype(np.float32)


def _halved(seconds: np.ndarray) -> np.ndarray:
    """[n] int64 -> [half-lives, n] float64."""
    return 0.5 ** (seconds / np.array(HALF_LIVES_S, np.float64)[:, None])
