"""Why an item was recommended: the past events that resemble it, and the genres they share.

Compares item vectors; it does not look into the network, so it says what speaks for an item and not what the
model computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serve.artifact import RatingScale
from serve.catalog import Catalog
from serve.history import KnownEvent, unit_ratings

MOST_EVENTS = 3


@dataclass(frozen=True, slots=True)
class ExplainingEvent:
    """A past event that speaks for an item; `similarity` is a cosine in 0..1."""

    event: KnownEvent
    similarity: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """Strongest event first; genres of the item that at least one of the events has too."""

    events: tuple[ExplainingEvent, ...]
    shared_genres: tuple[str, ...]
    text: str


def explain(
    items: NDArray[np.int32],
    events: Sequence[KnownEvent],
    unit_vectors: NDArray[np.float32],
    catalog: Catalog,
    scale: RatingScale | None,
) -> tuple[Explanation, ...]:
    """Explains each recommended item by the events that the model saw, in time order.

    An event's weight is the cosine of the two item vectors (`unit_vectors` is `[items+1, width]`, rows of
    length 1) times its rating on 0..1; without a rating 0.5. So a film that the user disliked is no reason.
    Of several events on one item the last counts.
    """
    last = {event.item: event for event in events}
    candidates = list(last.values())
    similarities = np.clip(unit_vectors[items] @ unit_vectors[list(last)].T, 0, 1)
    weights = similarities * unit_ratings(candidates, scale, missing=0.5)
    order = np.argsort(-weights, axis=1, kind="stable")[:, :MOST_EVENTS]
    return tuple(
        _explanation(
            item,
            [
                ExplainingEvent(candidates[at], float(similarities[row, at]))
                for at in order[row]
                if weights[row, at] > 0
            ],
            catalog,
        )
        for row, item in enumerate(items)
    )


def explain_popularity(items: NDArray[np.int32], catalog: Catalog) -> tuple[Explanation, ...]:
    """Explains items that were recommended for their popularity."""
    counts = catalog.popularity[items]
    return tuple(Explanation((), (), f"Popular: {count} events in the training data") for count in counts)


def _explanation(item: int, reasons: list[ExplainingEvent], catalog: Catalog) -> Explanation:
    genres = {genre for reason in reasons for genre in catalog.genres[reason.event.item]}
    shared = tuple(genre for genre in catalog.genres[item] if genre in genres)
    return Explanation(tuple(reasons), shared, _text(reasons, shared, catalog))


def _text(reasons: Sequence[ExplainingEvent], shared: Sequence[str], catalog: Catalog) -> str:
    if not reasons:
        return "Fits the order of your history; no single event resembles it"
    names = []
    for reason in reasons:
        event = reason.event
        name = catalog.titles[event.item] or catalog.item_ids[event.item]
        names.append(name if event.rating is None else f"{name} (rated {event.rating:g})")
    genres = f"; shared genres: {', '.join(shared)}" if shared else ""
    return f"Because of {', '.join(names)}{genres}"
