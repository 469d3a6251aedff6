"""Repeats: in logs where items come again, what the history says of its own items adds to their logits."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrec.models.features import GAP_EDGES
from jaxrec.models.tables import FixedTable

# Values from an edge on are in the next bucket. `serve` reads the edges in the manifest.
COUNT_EDGES = (2, 3, 4, 5, 7, 10, 15, 25, 50)
"""Of how often the item was met."""
AGO_EDGES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512)
"""Of how many events came after the last of them."""
AGE_EDGES_S = tuple(GAP_EDGES[1:].tolist())
"""Of the seconds since it, until the request, or until the last event where the request has no time."""
INTERVAL_EDGES = (0.0, *(2.0 ** (step / 4) for step in (-16, -12, *range(-8, 9), 12, 16)))
"""Of these seconds over the mean time between two meetings; the first bucket: there is no such mean."""
FEATURE_NAMES = ("count", "ago", "age", "interval")
EDGES = (COUNT_EDGES, AGO_EDGES, AGE_EDGES_S, INTERVAL_EDGES)
FEATURES = len(EDGES)
TIMED = (False, False, True, True)
"""Which of them have a second table for requests with a time."""
NO_INTERVAL = -1.0
SIZES = tuple((len(edges) + 1) * (1 + timed) for edges, timed in zip(EDGES, TIMED, strict=True))
STARTS = tuple(1 + sum(SIZES[:at]) for at in range(FEATURES))  # of the tables in the one of all; 0: not in the history
TABLE_SIZE = 1 + sum(SIZES)
STEPS = np.setdiff1d(
    np.arange(TABLE_SIZE - 1),
    [
        first + step
        for start, edges, timed in zip(STARTS, EDGES, TIMED, strict=True)
        for first in (start, *([start + len(edges) + 1] if timed else []))
        for step in ((-1, 0) if edges is INTERVAL_EDGES else (-1,))
    ],
)
"""Places of buckets whose value is followed by that of the next place."""


class Seen(NamedTuple):
    """Items of histories and what is added to their logits: `items` [batch, m] int32 (0 = none; each once), `scores`
    [batch, m] float32, 0 where there is no item."""

    items: np.ndarray
    scores: np.ndarray


class Repeat(nnx.Module):
    """repeat(j) = the sum of one number for each of FEATURES: how often item j was met, how many events ago and how
    long ago it was met last, and that time over the mean time between two meetings of it."""

    def __init__(self, table: np.ndarray) -> None:
        """`table` [TABLE_SIZE] float32, as `jaxrec.training.mix` learned it."""
        if len(table) != TABLE_SIZE or table[0]:
            raise ValueError(f"a table of {len(table)} numbers, expected {TABLE_SIZE}, the first of them 0")
        self.table = FixedTable(jnp.asarray(table, jnp.float32))

    def seen(self, history: np.ndarray, history_time: np.ndarray, time: np.ndarray, timed: np.ndarray) -> Seen:
        """As `seen_buckets`, with the items' scores."""
        items, buckets = seen_buckets(history, history_time, time, timed)
        return Seen(items, np.asarray(self.table[...])[buckets].sum(axis=-1, dtype=np.float32))

    def tables(self) -> list[list[list[float]]]:
        """By feature one list of numbers, or two: without and with the request time."""
        parts = np.split(np.asarray(self.table[...])[1:], np.cumsum(SIZES)[:-1])
        return [part.reshape(1 + timed, -1).tolist() for part, timed in zip(parts, TIMED, strict=True)]


def seen_buckets(
    history: np.ndarray, history_time: np.ndarray, time: np.ndarray, timed: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What `Repeat` knows of the items of some histories.

    Args:
        history: [batch, width] int32, items in the order of time, right-padded with 0.
        history_time: [batch, width] int64, seconds.
        time: [batch] int64, seconds: when the request comes.
        timed: [batch] bool, whether the request has that time; else the last event's is taken.

    Returns:
        Items [batch, width] int32, each once, the one met last first, 0 where there are no more, and their places
        [batch, width, FEATURES] uint8 in the table, 0 where there is no item.
    """
    items = np.zeros(history.shape, np.int32)
    buckets = np.zeros((*history.shape, FEATURES), np.uint8)
    for row, length in enumerate((history > 0).sum(axis=1)):
        if length:
            until = int(time[row]) if timed[row] else None
            of_row = repeat_buckets(history[row, :length], history_time[row, :length], until)
            items[row, : len(of_row[0])], buckets[row, : len(of_row[0])] = of_row
    return items, buckets


def repeat_buckets(items: np.ndarray, times: np.ndarray, request_time: int | None) -> tuple[np.ndarray, np.ndarray]:
    """`seen_buckets` of one history.

    Args:
        items: [events] int, at least one, in the order of time.
        times: [events] int64, seconds.
        request_time: Seconds; None: not known.

    Returns:
        Items [m], the one met last first, and their places [m, FEATURES] uint8 in the table.

    Examples:
        >>> items, places = repeat_buckets(np.array([7, 9, 7]), np.array([0, 50, 100]), 150)
        >>> items.tolist(), (places - np.array(STARTS)).tolist()  # 7 met twice, the mean interval is 100 s
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
