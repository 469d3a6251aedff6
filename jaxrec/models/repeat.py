"""Where items of the history may be recommended again: a learned amount is added to their logits, by how often and when
the user had events on them.

Each feature of such an item falls into a bucket, and each bucket has a number. The amount is the sum of these numbers.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrec.data.histories import power_of_two
from jaxrec.models.features import GAP_EDGES
from jaxrec.models.tables import FixedTable

# A bucket ends below an edge, and the next one begins with it. `serve` reads the edges in the manifest.
COUNT_EDGES = (2, 3, 4, 5, 7, 10, 15, 25, 50)
"""Of the number of the user's events on the item."""
AGO_EDGES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512)
"""Of the number of the user's events after the last one on the item."""
AGE_EDGES_S = tuple(GAP_EDGES[1:].tolist())
"""Of the seconds from the last event on the item until the request. If the request has no time: until the user's last
event."""
INTERVAL_EDGES = (0.0, *(2.0 ** (step / 4) for step in (-16, -12, *range(-8, 9), 12, 16)))
"""Of these seconds divided by the mean time between two events of the user on the item. The first bucket is for items
without such a mean: with one event, or with all events in the same second."""
FEATURE_NAMES = ("count", "ago", "age", "interval")
EDGES = (COUNT_EDGES, AGO_EDGES, AGE_EDGES_S, INTERVAL_EDGES)
FEATURES = len(EDGES)
TIMED = (False, False, True, True)
"""Which features have a second table for requests with a time."""
NO_INTERVAL = -1.0
SIZES = tuple((len(edges) + 1) * (1 + timed) for edges, timed in zip(EDGES, TIMED, strict=True))
STARTS = tuple(1 + sum(SIZES[:at]) for at in range(FEATURES))
"""Places in the table at which the features begin. Place 0 is for items that are not of the history."""
TABLE_SIZE = 1 + sum(SIZES)
assert np.iinfo(np.uint8).max >= TABLE_SIZE - 1, "places in the table are uint8"
STEPS = np.setdiff1d(
    np.arange(TABLE_SIZE - 1),
    [
        first + step
        for start, edges, timed in zip(STARTS, EDGES, TIMED, strict=True)
        for first in (start, *([start + len(edges) + 1] if timed else []))
        for step in ((-1, 0) if edges is INTERVAL_EDGES else (-1,))
    ],
)
"""Places of buckets that have a neighbour at the next place: a bucket of the same feature, with larger values."""


class SeenScores(NamedTuple):
    """Items of some histories, and what is added to their logits.

    Attributes:
        items: [batch, m] int32, each item of a history once; 0 = none.
        scores: [batch, m] float32, 0 where there is no item.
    """

    items: np.ndarray
    scores: np.ndarray


class Repeat(nnx.Module):
    """repeat(j) = the sum of one number for each feature of item j, from the table's bucket of the feature's value."""

    def __init__(self, table: np.ndarray) -> None:
        """Checks the table.

        Args:
            table: [TABLE_SIZE] float32, as `jaxrec.training.mix` learned it; its first number is 0.

        Raises:
            ValueError: The table has another length or another first number.
        """
        if len(table) != TABLE_SIZE or table[0]:
            raise ValueError(f"a table of {len(table)} numbers, expected {TABLE_SIZE}, the first of them 0")
        self.table = FixedTable(jnp.asarray(table, jnp.float32))

    def scores_of(
        self, history: np.ndarray, history_time: np.ndarray, time: np.ndarray, timed: np.ndarray
    ) -> SeenScores:
        """The items of some histories, and what is added to their logits.

        Args:
            history, history_time, time, timed: As for `seen_buckets`.

        Returns:
            The items in the order of `seen_buckets`, with their scores.
        """
        items, buckets = seen_buckets(history, history_time, time, timed)
        return SeenScores(items, np.asarray(self.table[...])[buckets].sum(axis=-1, dtype=np.float32))

    def tables(self) -> list[list[list[float]]]:
        """By feature one list of numbers, or two: without and with the request time."""
        parts = np.split(np.asarray(self.table[...])[1:], np.cumsum(SIZES)[:-1])
        return [part.reshape(1 + timed, -1).tolist() for part, timed in zip(parts, TIMED, strict=True)]


def seen_buckets(
    history: np.ndarray, history_time: np.ndarray, time: np.ndarray, timed: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The items of some histories, and their places in the table of `Repeat`.

    Args:
        history: [batch, width] int32, items in the order of time, right-padded with 0.
        history_time: [batch, width] int64, seconds.
        time: [batch] int64, seconds: when the request comes.
        timed: [batch] bool, whether the request has that time; else the time of the history's last event counts.

    Returns:
        Items [batch, m] int32, each once, in the order of their last events, the latest first, 0 where there are no
        more; and their places [batch, m, FEATURES] uint8 in the table, 0 where there is no item. m is the power of two
        that holds the most items of a history, so that few shapes are compiled.

    Raises:
        ValueError: `history_time` has another shape than `history`.
    """
    if history_time.shape != history.shape:
        raise ValueError(f"times of shape {history_time.shape}, expected {history.shape}, that of the history")
    lengths = (history > 0).sum(axis=1)
    of_rows = {
        row: repeat_buckets(history[row, :length], history_time[row, :length], int(time[row]) if timed[row] else None)
        for row, length in enumerate(lengths.tolist())
        if length
    }
    width = power_of_two(max((len(items) for items, _ in of_rows.values()), default=1))
    items, buckets = np.zeros((len(history), width), np.int32), np.zeros((len(history), width, FEATURES), np.uint8)
    for row, (of_items, of_buckets) in of_rows.items():
        items[row, : len(of_items)], buckets[row, : len(of_items)] = of_items, of_buckets
    return items, buckets


def repeat_buckets(items: np.ndarray, times: np.ndarray, request_time: int | None) -> tuple[np.ndarray, np.ndarray]:
    """`seen_buckets` of one history.

    Args:
        items: [events] int, at least one, in the order of time.
        times: [events] int64, seconds.
        request_time: Seconds; None: not known.

    Returns:
        Items [m] by their last events, the latest first, and their places [m, FEATURES] uint8 in the table.

    Examples:
        >>> items, places = repeat_buckets(np.array([7, 9, 7]), np.array([0, 50, 100]), 150)
        >>> items.tolist(), (places - np.array(STARTS)).tolist()  # two events on 7, 100 s apart
        ([7, 9], [[1, 0, 37, 31], [0, 1, 38, 23]])
    """
    found, ago, count = np.unique(items[::-1], return_index=True, return_counts=True)
    first = np.unique(items, return_index=True)[1]
    last = times[len(items) - 1 - ago]
    now = times[-1] if request_time is None else request_time
    age = np.maximum(now - last, 0)
    span = last - times[first]
    interval = np.where(span > 0, age * (count - 1) / np.maximum(span, 1), NO_INTERVAL)
    places = [
        start + np.searchsorted(edges, value, side="right") + (timed and request_time is not None) * (len(edges) + 1)
        for start, edges, timed, value in zip(STARTS, EDGES, TIMED, (count, ago, age, interval), strict=True)
    ]
    order = np.argsort(ago)
    return found[order], np.stack(places, axis=1)[order].astype(np.uint8)
