"""What is popular now, by the decayed counts of all users' events: for users without a history, and for Trending."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from serve.model.catalog import Catalog
from serve.model.filters import ItemFilter
from serve.model.live_catalog import Item, LiveCatalog, Withheld
from serve.model.trend import COUNTED_S, Counted

POPULARITY = "popularity"
"""The policy that ranks by the events of the training data."""
RECENT_POPULARITY = "recent_popularity"
"""The policy that ranks by recent events, blended with those of the training data."""
FALLBACKS = frozenset({POPULARITY, RECENT_POPULARITY})
"""The policies for users without an event that the model knows."""
PRIOR_EVENTS = 1_000
"""The events of the training data count as so many recent ones, shared among the items: with few recent events the
order is that of the training data, with many it is theirs, and one event moves no item to the top. On three logs
it is the best of 100, 1,000 and 10,000 or nearly so (bench/fallback.md)."""
# A half-life of 7 days ranks best on one of these logs, like 3 days on the second; on the third 30 days are better.
WEEK, LONGEST = COUNTED_S.index(604_800), COUNTED_S.index(7_776_000)


class OtherCounts(NamedTuple):
    """Counts of items that a model does not know."""

    item_ids: Sequence[str] = ()
    counts: NDArray[np.float64] = np.zeros((0, len(COUNTED_S)))
    """`[n, half-lives]`, decayed to the time of the others."""


NO_OTHERS = OtherCounts()


def with_hour(counts: NDArray[np.float32]) -> NDArray[np.float32]:
    """The counts of a model's export as those of a store: of the last hour, an export says nothing.

    Args:
        counts: `[half-lives of models, items+1]`.

    Returns:
        `[half-lives of stores, items+1]`.
    """
    return np.concatenate([counts, np.zeros_like(counts[:1])])


@dataclass(frozen=True, slots=True, eq=False)
class PopularNow:
    """What is popular at a time. It is replaced as a whole."""

    counts: NDArray[np.float32]
    """`[half-lives, items+1]`, decayed to `counted.time`; column 0 is zeros."""
    counted: Counted
    """The events in the counts."""
    others: OtherCounts
    """Of items that the model does not know, at the same time."""
    policy: str
    """`RECENT_POPULARITY`; or `POPULARITY`, if the counts are less than one event together."""
    items: NDArray[np.int32]
    """`[items]`, item indices, most popular first by the policy."""
    scores: NDArray[np.float32]
    """`[items+1]`, by the policy: a number of events."""

    @classmethod
    def of(
        cls, catalog: Catalog, counts: NDArray[np.float32], counted: Counted, others: OtherCounts = NO_OTHERS
    ) -> Self:
        """What counts make popular.

        Args:
            catalog: Of the model directory.
            counts: `[half-lives, items+1]`.
            counted: The events in them.
            others: Those of other items.
        """
        items, training = catalog.by_popularity, catalog.popularity.astype(np.float64)
        recent = counts[WEEK].astype(np.float64)
        if recent.sum() < 1:
            return cls(counts, counted, others, POPULARITY, items, training.astype(np.float32))
        scores = recent + PRIOR_EVENTS * training / max(training.sum(), 1.0)
        # Stable, so that ties are in the order of the training data.
        items = items[np.argsort(-scores[items], kind="stable")]
        return cls(counts, counted, others, RECENT_POPULARITY, items, scores.astype(np.float32))


class PopularItems(NamedTuple):
    """What is popular now among the items of a catalogue, added ones too."""

    live: LiveCatalog
    now: PopularNow
    items: NDArray[np.int32]
    """`[items]`, own and added ones, most popular first; those without an event are last."""
    scores: NDArray[np.float32]
    """`[items+1]`, as `PopularNow.scores`; an added item has its recent events."""
    recent: NDArray[np.float32] | None
    """`[items+1]`, the counts of 7 days; None: the policy does not rank by them."""

    @classmethod
    def of(cls, now: PopularNow, live: LiveCatalog) -> Self:
        """Puts the added items of a catalogue where their counts have them."""
        is_recent = now.policy == RECENT_POPULARITY
        recent = now.counts[WEEK] if is_recent else None
        if live.added is None:
            return cls(live, now, now.items, now.scores, recent)
        weeks = dict(zip(now.others.item_ids, now.others.counts[:, WEEK].tolist(), strict=True)) if is_recent else {}
        of_added = np.array([weeks.get(item_id, 0.0) for item_id in live.added.ids], np.float32)
        scores = np.concatenate([now.scores, of_added])
        first = live.added.first
        items = np.concatenate([now.items, np.arange(first, first + len(of_added), dtype=np.int32)])
        items = items[np.argsort(-scores[items], kind="stable")]
        return cls(live, now, items, scores, None if recent is None else np.concatenate([recent, of_added]))


class TrendingItem(NamedTuple):
    """An item that is popular now."""

    item: Item
    events: float
    """How many there are now, decayed."""
    known: bool
    """Whether the model knows it."""


class Allowed(NamedTuple):
    """Which items may be answered."""

    filter: ItemFilter | None
    item_ids: Collection[str]
    """The allow-list of `filter`, also with ids that the model does not know. Empty: every item."""
    excluded: Collection[str]


def trending(
    now: PopularNow,
    live: LiveCatalog,
    stored: Mapping[str, Item],
    half_life: int,
    k: int,
    allowed: Allowed,
    time: int,
) -> list[TrendingItem]:
    """The items with the highest counts.

    Args:
        now: What is popular now.
        live: The model's catalogue.
        stored: The items of the store by their ids, also those that the model does not know.
        half_life: A place in COUNTED_S.
        k: Most items.
        allowed: Which items may be answered.
        time: In seconds, for which items have to be available.

    Returns:
        Highest count first; equal counts by the longest half-life, then by the events of the training data.
    """
    known = _known(now, live, half_life, k, allowed, live.withheld(time))
    others = _others(now.others, stored, half_life, k, allowed, time)
    least = -np.inf if allowed.filter is None else allowed.filter.minimum_score
    found = sorted([*known, *others], key=lambda one: one[0], reverse=True)
    return [item for _, item in found if least is None or item.events >= least][:k]


Rank = tuple[float, float, int]


def _known(
    now: PopularNow, live: LiveCatalog, half_life: int, k: int, allowed: Allowed, withheld: Withheld | None
) -> list[tuple[Rank, TrendingItem]]:
    catalog, index = live.catalog, live.catalog.index
    # Of the model's own items: the counts of the added ones are among the others.
    own = now.counts.shape[1]
    is_allowed = np.ones(own, np.bool_)
    blocked = live.filters.blocked(allowed.filter)
    if blocked is not None:
        is_allowed = ~blocked[:own]
    if withheld is not None:
        is_allowed &= ~withheld.mask[:own]
    excluded = (index.get(item_id, 0) for item_id in allowed.excluded)
    is_allowed[[0, *(item for item in excluded if item < own)]] = False
    items = np.flatnonzero(is_allowed)
    counts, longest = now.counts[half_life], now.counts[LONGEST]
    if len(items) > k:
        # Only what is among the first k by the count alone, with its ties, has to be sorted.
        least = np.partition(counts[items], len(items) - k)[len(items) - k]
        items = items[counts[items] >= least]
    items = items[np.lexsort((-catalog.popularity[items], -longest[items], -counts[items]))][:k]
    return [
        (
            (float(counts[at]), float(longest[at]), int(catalog.popularity[at])),
            TrendingItem(
                Item(catalog.item_ids[at], catalog.titles[at], catalog.genres[at], metadata=live.metadata.get(at, {})),
                float(counts[at]),
                True,
            ),
        )
        for at in items.tolist()
    ]


def _others(
    others: OtherCounts, stored: Mapping[str, Item], half_life: int, k: int, allowed: Allowed, time: int
) -> list[tuple[Rank, TrendingItem]]:
    found: list[tuple[Rank, TrendingItem]] = []
    counts, longest = others.counts[:, half_life], others.counts[:, LONGEST]
    for at in np.lexsort((-longest, -counts)).tolist():
        item = stored.get(others.item_ids[at])
        if len(found) == k:
            break
        if item is not None and item.is_available(time) and _allows(allowed, item):
            count = float(counts[at])
            found.append(((count, float(longest[at]), 0), TrendingItem(item, count, False)))
    return found


def _allows(allowed: Allowed, item: Item) -> bool:
    """Whether an item that the model does not know may be answered."""
    if item.item_id in allowed.excluded or (allowed.item_ids and item.item_id not in allowed.item_ids):
        return False
    return allowed.filter is None or allowed.filter.allows_tags(item.tags)
