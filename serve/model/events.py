"""Events of users, and the scale of their ratings."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from serve.model.catalog import Catalog

INTERACTION = "interaction"
"""The type of events that do not name one."""


class Event(NamedTuple):
    """One past event of one user."""

    item_id: str
    rating: float | None
    timestamp: int
    """Seconds since 1970-01-01T00:00Z."""
    weight: float = 1.0
    """Above 0: the event is positive, a part of the sequence that the model reads, and counts so much as a reward.
    Below 0: negative, no part of it, and the item is not recommended to the user again. 0: neutral."""


class KnownEvent(NamedTuple):
    """A positive event on an item of the catalogue."""

    item: int
    rating: float | None
    timestamp: int


_TIME, _WEIGHT = attrgetter("timestamp"), attrgetter("weight")


def known_events(events: Sequence[Event], catalog: Catalog) -> list[KnownEvent]:
    """The positive events on items that the model knows, by timestamp; equal timestamps keep their order."""
    index = catalog.index
    known = [
        KnownEvent(index[item_id], rating, timestamp)
        for item_id, rating, timestamp, weight in events
        if weight > 0 and item_id in index
    ]
    known.sort(key=_TIME)
    return known


def positive_count(events: Sequence[Event]) -> int:
    """How many of the events are positive."""
    return sum([event.weight > 0 for event in events])


def disliked_items(events: Sequence[Event], catalog: Catalog) -> list[int]:
    """The items that a user does not want: those whose last event that is not neutral is negative.

    Args:
        events: In any order; of the same second, the later in the list is the later one.
        catalog: The model's.

    Returns:
        Item indices, each once, without items that the model does not know.
    """
    if min(map(_WEIGHT, events), default=0) >= 0:
        return []
    return list(with_dislikes((), sorted(events, key=attrgetter("timestamp")), catalog))


def with_dislikes(disliked: Iterable[int], events: Iterable[Event], catalog: Catalog) -> dict[int, None]:
    """The disliked items once more events came.

    Args:
        disliked: Item indices until then.
        events: In time order, none of them before those that were known.
        catalog: The model's.

    Returns:
        Item indices, as keys.
    """
    items = dict.fromkeys(disliked)
    for event in events:
        item = catalog.index.get(event.item_id, 0)
        if event.weight < 0 and item:
            items[item] = None
        elif event.weight > 0:
            items.pop(item, None)
    return items


UnknownItems = Mapping[str, bool]
"""Items of a history that the model does not know, by raw id in the order of their last events; True: the user does not
want it."""
NO_UNKNOWN: UnknownItems = MappingProxyType({})
MOST_UNKNOWN = 1_000


def unknown_items(events: Iterable[Event], catalog: Catalog, before: UnknownItems = NO_UNKNOWN) -> UnknownItems:
    """The items of a history that the model does not know.

    Args:
        events: Those that came after what `before` says, in any order; of the same second, the later in the list is the
            later one.
        catalog: The model's own.
        before: What was known until then; not changed.

    Returns:
        MOST_UNKNOWN of them at most, without those that have neutral events only: those that the user does not want
        before all others, then the last ones.
    """
    new = [event for event in events if event.item_id not in catalog.index and event.weight]
    if not new:
        return before
    new.sort(key=attrgetter("timestamp"))
    found = dict(before)
    for event in new:
        found.pop(event.item_id, None)
        found[event.item_id] = event.weight < 0
    if len(found) > MOST_UNKNOWN:
        in_order = sorted(found, key=lambda item_id: found[item_id])  # stable: unwanted items are last
        kept = set(in_order[-MOST_UNKNOWN:])
        found = {item_id: is_unwanted for item_id, is_unwanted in found.items() if item_id in kept}
    return found


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
