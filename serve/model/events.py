"""Events of users, and the scale of their ratings."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from serve.model.catalog import Catalog


class Event(NamedTuple):
    """One past event of one user."""

    item_id: str
    rating: float | None
    timestamp: int
    """Seconds since 1970-01-01T00:00Z."""


class KnownEvent(NamedTuple):
    """An event on an item of the catalogue."""

    item: int
    rating: float | None
    timestamp: int


def known_events(events: Sequence[Event], catalog: Catalog) -> list[KnownEvent]:
    """The events on items that the model knows, by timestamp; equal timestamps keep their order."""
    index = catalog.index
    known = [KnownEvent(index[item_id], rating, timestamp) for item_id, rating, timestamp in events if item_id in index]
    known.sort(key=attrgetter("timestamp"))
    return known


@dataclass(frozen=True, slots=True)
class RatingScale:
    """Lowest and highest rating of the training data, both valid."""

    minimum: float
    maximum: float

    def contains(self, rating: float) -> bool:
        """Whether a rating is valid; the ends also as float32, which is how they travel in a message."""
        if self.minimum <= rating <= self.maximum:
            return True
        return bool(np.float32(self.minimum) <= np.float32(rating) <= np.float32(self.maximum))

    def scaled(self, ratings: NDArray[np.float64]) -> NDArray[np.float64]:
        """Valid ratings on 0..1, never below 0 by rounding; nan (no rating) stays nan."""
        return np.clip((ratings - self.minimum) / (self.maximum - self.minimum), 0, 1)
