"""Why an item was recommended: the past events without which it would have a lower score, and the genres they share.

The model itself is asked: it answers once more for the history without each of the last events (leave-one-out), in one
batch. That is what the network computed, and not what a comparison of item vectors suggests.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serve.model.catalog import Catalog
from serve.model.events import KnownEvent
from serve.model.parts import Parts

MOST_EXPLAINED_EVENTS = 3
ASKED_EVENTS = 16
"""So many of the last events are left out in turn, in one batch: a bound for the cost of an explanation."""
ASKED_ITEMS = 200
"""An item that falls below so many others without an event counts as if it had the score of the last of them. More
when more are explained."""


@dataclass(frozen=True, slots=True)
class ExplainingEvent:
    """A past event that speaks for an item."""

    event: KnownEvent
    similarity: float
    """Cosine of the item vectors, -1..1."""
    influence: float | None
    """By how much the item's score would be lower without the event, above 0; None: the model was not asked."""
    shared_genres: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Explanation:
    """Strongest event first; genres of the item that at least one of the events has too."""

    events: tuple[ExplainingEvent, ...]
    shared_genres: tuple[str, ...]
    text: str
    parts: Parts
    """Of the item's score."""


def explain(
    items: NDArray[np.int32],
    events: Sequence[KnownEvent],
    influences: NDArray[np.float32] | None,
    similarities: NDArray[np.float32],
    catalog: Catalog,
    parts: Sequence[Parts],
) -> tuple[Explanation, ...]:
    """Explains each recommended item by events that the model saw, in time order.

    `influences` is `[items, events]`: by how much an item's score would be lower without an event. Events with a
    positive one are reasons, the strongest first, and of several on one item the strongest. Without influences (None)
    the cosine of the two item vectors counts instead, which is `similarities` `[items, events]`. `parts` are those of
    the items' scores.
    """
    weights = similarities if influences is None else influences
    return tuple(
        _explanation(
            item,
            [
                ExplainingEvent(
                    event=events[at],
                    similarity=float(similarities[row, at]),
                    influence=None if influences is None else float(influences[row, at]),
                    shared_genres=_shared_genres(item, events[at].item, catalog),
                )
                for at in _strongest(weights[row], events)
            ],
            catalog,
            parts[row],
        )
        for row, item in enumerate(items.tolist())
    )


def _strongest(weights: NDArray[np.float32], events: Sequence[KnownEvent]) -> list[int]:
    """Places of the events with the largest positive weights, each item once."""
    strongest: dict[int, int] = {}
    for at in np.argsort(-weights, kind="stable").tolist():
        if weights[at] <= 0 or len(strongest) == MOST_EXPLAINED_EVENTS:
            break
        strongest.setdefault(events[at].item, at)
    return list(strongest.values())


def _shared_genres(item: int, other: int, catalog: Catalog) -> tuple[str, ...]:
    return tuple(genre for genre in catalog.genres[item] if genre in catalog.genres[other])


def explain_popularity(
    items: NDArray[np.int32], recent: NDArray[np.float32] | None, catalog: Catalog, parts: Sequence[Parts]
) -> tuple[Explanation, ...]:
    """Explains items that were recommended for their popularity.

    Args:
        items: `[n]`, item indices.
        recent: `[items+1]`, the recent events that ranked them, decayed; None: none did.
        catalog: With the events of the training data.
        parts: Of their scores.
    """
    lately = [""] * len(items) if recent is None else [f"{count:.1f} recent events, " for count in recent[items]]
    counts = catalog.popularity[items].tolist()
    return tuple(
        Explanation((), (), f"Popular: {of_now}{count} events in the training data", of_item)
        for of_now, count, of_item in zip(lately, counts, parts, strict=True)
    )


def _explanation(item: int, reasons: list[ExplainingEvent], catalog: Catalog, parts: Parts) -> Explanation:
    genres = {genre for reason in reasons for genre in reason.shared_genres}
    shared = tuple(genre for genre in catalog.genres[item] if genre in genres)
    return Explanation(tuple(reasons), shared, _text(reasons, shared, catalog), parts)


def _text(reasons: Sequence[ExplainingEvent], shared: Sequence[str], catalog: Catalog) -> str:
    if not reasons:
        return "Fits the order of your history; no single event speaks for it"
    names = []
    for reason in reasons:
        event = reason.event
        name = catalog.titles[event.item] or catalog.item_ids[event.item]
        names.append(name if event.rating is None else f"{name} (rated {event.rating:g})")
    genres = f"; shared genres: {', '.join(shared)}" if shared else ""
    return f"Because of {', '.join(names)}{genres}"
