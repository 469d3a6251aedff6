"""What the graphs see of a user's history and request."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from serve.model.events import KnownEvent, RatingScale
from serve.model.manifest import ModelInfo
from serve.model.repeat import SeenScores, item_stats


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
    seen: SeenScores | None = None
    """For models that may recommend items of the history again: what is added to the logits of these items."""
    blocked: NDArray[np.bool_] | None = None
    """`[items+1]`, True: the item is never answered; None: nothing more than `exclude`."""

    def without_last(self) -> "Features":
        """The history before its last event, of at least two; the same exclusions."""
        return replace(self, item=self.item[:-1], rating=self.rating[:-1], gap=self.gap[:-1], request_gap=-1.0)


def features(
    events: Sequence[KnownEvent],
    request_time: int | None,
    exclude: Sequence[int],
    info: ModelInfo,
    *,
    allow_seen: bool | None = None,
    blocked: NDArray[np.bool_] | None = None,
) -> Features:
    """What the graphs see of a history and a request.

    Args:
        events: The history in time order, at least one event.
        request_time: In seconds; None: not known.
        exclude: More items that are excluded.
        info: The model's.
        allow_seen: Whether items of the history may be answered; None: as the model has it.
        blocked: As `Features` has it.
    """
    repeat, row = info.repeat, history_features(events, info)
    allowed = repeat is not None if allow_seen is None else allow_seen
    excluded = exclude if allowed else [*[event.item for event in events], *exclude]
    seen = None
    if repeat is not None:
        seen = repeat.scores_of(item_stats(events), len(events), events[-1].timestamp, request_time)
    return replace(
        row,
        request_gap=-1.0 if request_time is None else float(request_time - events[-1].timestamp),
        exclude=np.array(excluded, np.int32),
        seen=seen,
        blocked=blocked,
    )


def history_features(events: Sequence[KnownEvent], info: ModelInfo) -> Features:
    """`features` of a history alone, for its state: no request time is known, and nothing is excluded or added.

    Only the last `max_history` events are fed. The first of those keeps the gap to the event before it, which happened
    all the same.
    """
    fed = events[-info.max_history :]
    items, ratings, times = zip(*fed, strict=True)
    timestamps = np.array(times, np.int64)
    gap = np.empty(len(fed), np.float32)
    gap[0] = fed[0].timestamp - events[-len(fed) - 1].timestamp if len(events) > len(fed) else -1
    gap[1:] = timestamps[1:] - timestamps[:-1]
    return Features(
        item=np.array(items, np.int32),
        rating=unit_ratings(ratings, info.rating_scale, missing=-1),
        gap=gap,
        request_gap=-1.0,
        exclude=np.zeros(0, np.int32),
    )


def unit_ratings(ratings: Sequence[float | None], scale: RatingScale | None, missing: float) -> NDArray[np.float32]:
    """Ratings on 0..1 as `[n]`, with `missing` for None, or for all when there is no scale."""
    if scale is None:
        return np.full(len(ratings), missing, np.float32)
    scaled = scale.scaled(np.array(ratings, np.float64))
    scaled[np.isnan(scaled)] = missing
    return scaled.astype(np.float32)
