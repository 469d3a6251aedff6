"""The batch of histories that models read."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

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
