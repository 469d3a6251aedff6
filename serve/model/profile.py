"""What a user's events say about the user's taste in genres."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from serve.model.catalog import Catalog
from serve.model.events import KnownEvent

SECONDS_PER_DAY = 86_400
HALF_LIFE_DAYS = 30


@dataclass(frozen=True, slots=True)
class GenrePreference:
    """One genre in a user's events; the shares are 0..1 and can add up to more than 1 over the genres."""

    genre: str
    share: float
    mean_rating: float | None
    """On the rating scale; None when none of the genre's events has a rating."""
    recency_weighted_share: float


def genre_preferences(events: Sequence[KnownEvent], catalog: Catalog) -> list[GenrePreference]:
    """The genres of a user's events in time order, by recency-weighted share, largest first.

    The recency-weighted share gives an event the weight 0.5 ** (days before the newest event / 30).
    """
    if not events:
        return []
    newest = events[-1].timestamp
    counts: dict[str, int] = defaultdict(int)
    weights: dict[str, float] = defaultdict(float)
    ratings: dict[str, list[float]] = defaultdict(list)
    total_weight = 0.0
    for event in events:
        weight = 0.5 ** ((newest - event.timestamp) / SECONDS_PER_DAY / HALF_LIFE_DAYS)
        total_weight += weight
        for genre in catalog.genres[event.item]:
            counts[genre] += 1
            weights[genre] += weight
            if event.rating is not None:
                ratings[genre].append(event.rating)
    preferences = [
        GenrePreference(
            genre=genre,
            share=count / len(events),
            mean_rating=sum(ratings[genre]) / len(ratings[genre]) if ratings[genre] else None,
            recency_weighted_share=weights[genre] / total_weight,
        )
        for genre, count in counts.items()
    ]
    return sorted(preferences, key=lambda preference: (-preference.recency_weighted_share, preference.genre))
