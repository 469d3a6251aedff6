"""What the graphs see of a user's history and request."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serve.model.events import KnownEvent, RatingScale
from serve.model.manifest import ModelInfo
from serve.model.repeat import Seen, meetings


@dataclass(frozen=True, slots=True)
class Features:
    """One user's history and request, as the graphs take them."""

    item: NDArray[np.int32]
    """`[n]`, n >= 1, item indices in time order, none of them 0."""
    rating: NDArray[np.float32]
    """`[n]`, 0..1 over the rating scale; -1 = no rating."""
    gap: NDArray[np.float32]
    """`[n]`, seconds since the event before; -1 for the first of the history."""
    request_gap: float
    """Seconds from the last event to the request; -1 = not known."""
    exclude: NDArray[np.int32]
    """`[m]`, m >= 0, item indices that are never answered."""
    seen: Seen | None = None
    """For models that may answer items of the history: what is added to them."""

    def without_last(self) -> "Features":
        """The history before its last event, of at least two; the same exclusions."""
        return Features(self.item[:-1], self.rating[:-1], self.gap[:-1], -1.0, self.exclude, self.seen)


def features(
    events: Sequence[KnownEvent], request_time: int | None, exclude: Sequence[int], info: ModelInfo
) -> Features:
    """What the graphs see of a history in time order, with at least one event.

    All events are excluded from the answer, unless the model may repeat them; only the last `max_history` are fed. The
    first of those keeps the gap to the event before it, which happened all the same.
    """
    fed = events[-info.max_history :]
    timestamps = np.array([event.timestamp for event in fed], np.int64)
    gap = np.empty(len(fed), np.float32)
    gap[0] = fed[0].timestamp - events[-len(fed) - 1].timestamp if len(events) > len(fed) else -1
    gap[1:] = timestamps[1:] - timestamps[:-1]
    repeat, seen = info.repeat, None
    if repeat is not None:
        seen = repeat.seen(meetings(events), len(events), events[-1].timestamp, request_time)
    met = [event.item for event in events] if repeat is None else ()
    return Features(
        item=np.array([event.item for event in fed], np.int32),
        rating=unit_ratings(fed, info.rating_scale, missing=-1),
        gap=gap,
        request_gap=-1.0 if request_time is None else float(request_time - fed[-1].timestamp),
        exclude=np.array([*met, *exclude], np.int32),
        seen=seen,
    )


def unit_ratings(events: Sequence[KnownEvent], scale: RatingScale | None, missing: float) -> NDArray[np.float32]:
    """Ratings on 0..1 as `[n]`, with `missing` for an event without one, or for all when there is no scale."""
    if scale is None:
        return np.full(len(events), missing, np.float32)
    ratings = scale.scaled(np.array([event.rating for event in events], np.float64))
    ratings[np.isnan(ratings)] = missing
    return ratings.astype(np.float32)
