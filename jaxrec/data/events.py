"""The batch of histories that models read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxrec.config import MISSING_RATING
from jaxrec.data.schema import UNKNOWN_GAP

if TYPE_CHECKING:
    import jax


class Events(NamedTuple):
    """A batch of histories, right-padded.

    `item` [batch, length] int32 (0 = padding), `rating` [batch, length] float32 (0..1, MISSING_RATING = none),
    `gap` [batch, length] float32 (seconds since the event before, UNKNOWN_GAP for the first),
    `length` [batch] int32 (real events per row).
    """

    item: jax.Array | np.ndarray
    rating: jax.Array | np.ndarray
    gap: jax.Array | np.ndarray
    length: jax.Array | np.ndarray

    @property
    def where(self) -> jax.Array | np.ndarray:
        """[batch, length] bool: True at real events."""
        return np.arange(self.item.shape[1]) < self.length[:, None]


def pad_events(
    items: Sequence[np.ndarray], ratings: Sequence[np.ndarray], gaps: Sequence[np.ndarray], length: int
) -> Events:
    """A batch of ragged histories, right-padded to `length` events (item 0, MISSING_RATING, UNKNOWN_GAP).

    Each history is three arrays [events] of one length; of more than `length` events the most recent ones are kept.
    """
    shape, counts = (len(items), length), np.array([min(len(row), length) for row in items], np.int32)
    batch = Events(
        np.zeros(shape, np.int32),
        np.full(shape, MISSING_RATING, np.float32),
        np.full(shape, UNKNOWN_GAP, np.float32),
        counts,
    )
    for padded, rows in zip(batch[:3], (items, ratings, gaps), strict=True):
        for into, row, count in zip(padded, rows, counts, strict=True):
            into[:count] = row[len(row) - count :]
    return batch
