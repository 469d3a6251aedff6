"""A user's past events, and what of them the model sees."""

from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from serve.model.artifact import ModelInfo, RatingScale
from serve.model.catalog import Catalog
from serve.model.engine import Features


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


def features(
    events: Sequence[KnownEvent], request_time: int | None, exclude: Sequence[int], info: ModelInfo
) -> Features:
    """What the graphs see of a history in time order, with at least one event.

    All events are excluded from the answer; only the last `max_history` are fed. The first of those keeps
    the gap to the event before it, which happened all the same.
    """
    fed = events[-info.max_history :]
    timestamps = np.array([event.timestamp for event in fed], np.int64)
    gap = np.empty(len(fed), np.float32)
    gap[0] = fed[0].timestamp - events[-len(fed) - 1].timestamp if len(events) > len(fed) else -1
    gap[1:] = timestamps[1:] - timestamps[:-1]
    return Features(
        item=np.array([event.item for event in fed], np.int32),
        rating=unit_ratings(fed, info.rating_scale, missing=-1),
        gap=gap,
        request_gap=-1.0 if request_time is None else float(request_time - fed[-1].timestamp),
        exclude=np.array([*[event.item for event in events], *exclude], np.int32),
    )


def unit_ratings(events: Sequence[KnownEvent], scale: RatingScale | None, missing: float) -> NDArray[np.float32]:
    """Ratings on 0..1 as `[n]`, with `missing` for an event without one, or for all when there is no scale."""
    if scale is None:
        return np.full(len(events), missing, np.float32)
    ratings = scale.scaled(np.array([event.rating for event in events], np.float64))
    ratings[np.isnan(ratings)] = missing
    return ratings.astype(np.float32)
