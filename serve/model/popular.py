"""What is popular now, by the decayed counts of all users' events: for users without a history, and for Trending."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from serve.model.catalog import Catalog
from serve.model.filters import ItemFilter
from serve.model.live_catalog import LiveCatalog
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
    """Counts of the added items of a model, those that have one."""

    item_ids: Sequence[str] = ()
    counts: NDArray[np.float64] = np.zeros((0, len(COUNTED_S)))
    """`[n, half-lives]`, decayed to the time of the others."""


NO_OTHERS = OtherCounts()


def with_no_hour(counts: NDArray[np.float32]) -> NDArray[np.float32]:
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
    """Of added items, at the same time."""
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
            others: Those of added items.
        """
        items, training = catalog.by_popularity, catalog.popularity.astype(np.float64)
        recent = counts[WEEK].astype(np.float64)
        if recent.sum() + others.counts[:, WEEK].sum() < 1:
            return cls(counts, counted, others, POPULARITY, items, training.astype(np.float32))
        scores = recent + PRIOR_EVENTS * training / max(training.sum(), 1.0)
        # Stable, so that ties are in the order of the training data.
        items = items[np.argsort(-scores[items], kind="stable")]
        return cls(counts, counted, others, RECENT_POPULARITY, items, scores.astype(np.float32))


@dataclass(frozen=True, eq=False)
class PopularItems:
    """What is popular now among the items of a catalogue, added ones too. It is replaced as a whole."""

    live: LiveCatalog
    now: PopularNow
    items: NDArray[np.int32]
    """`[items]`, own and added ones, most popular first; those without an event are last."""
    scores: NDArray[np.float32]
    """`[items+1]`, as `PopularNow.scores`; an added item has its recent events."""
    recent: NDArray[np.float32] | None
    """`[items+1]`, the counts of 7 days; None: the policy does not rank by them."""
    of_added: NDArray[np.float32]
    """`[half-lives, added items]`, their counts."""

    @classmethod
    def of(cls, now: PopularNow, live: LiveCatalog) -> Self:
        """Puts the added items of a catalogue where their counts have them."""
        is_recent = now.policy == RECENT_POPULARITY
        recent = now.counts[WEEK] if is_recent else None
        if live.added is None:
            return cls(live, now, now.items, now.scores, recent, np.zeros((len(COUNTED_S), 0), np.float32))
        place_of = {item_id: at for at, item_id in enumerate(now.others.item_ids)}
        # The last row is of items without a count.
        rows = [place_of.get(item_id, len(place_of)) for item_id in live.added.ids]
        of_added = np.concatenate([now.others.counts, np.zeros((1, len(COUNTED_S)))])[rows].T.astype(np.float32)
        weeks = of_added[WEEK] if is_recent else np.zeros_like(of_added[WEEK])
        scores = np.concatenate([now.scores, weeks])
        first = live.added.first
        items = np.concatenate([now.items, np.arange(first, first + len(weeks), dtype=np.int32)])
        items = items[np.argsort(-scores[items], kind="stable")]
        return cls(live, now, items, scores, None if recent is None else np.concatenate([recent, weeks]), of_added)

    def counts(self, half_life: int) -> NDArray[np.float32]:
        """`[items+1]`, by a place in COUNTED_S."""
        own, added = self.now.counts[half_life], self.of_added[half_life]
        return np.concatenate([own, added]) if len(added) else own

    @cached_property
    def by_longest(self) -> NDArray[np.int32]:
        """`[items]`, by the count of the longest half-life, then by the events of the training data."""
        longest, items = self.counts(LONGEST), self.live.catalog.by_popularity
        has_count = longest[items] > 0
        counted = items[has_count]
        # Stable, so that ties are in the order of the training data.
        return np.concatenate([counted[np.argsort(-longest[counted], kind="stable")], items[~has_count]])


class TrendingItem(NamedTuple):
    """An item that is popular now."""

    item: int
    """Its index."""
    events: float
    """How many events there are now, decayed."""


def trending(
    popular: PopularItems, half_life: int, k: int, item_filter: ItemFilter | None, excluded: Iterable[str], time: int
) -> list[TrendingItem]:
    """The items with the highest counts; added ones only if they have a count.

    Args:
        popular: What is popular now.
        half_life: A place in COUNTED_S.
        k: Most items.
        item_filter: Which items may be answered; None: every item.
        excluded: Ids that are not answered.
        time: In seconds, for which items have to be available.

    Returns:
        Highest count first; equal counts by the longest half-life, then by the events of the training data.
    """
    live, counts = popular.live, popular.counts(half_life)
    blocked = live.blocked(item_filter, live.withheld(time))
    is_allowed = np.ones(len(counts), np.bool_) if blocked is None else ~blocked
    is_allowed[live.indices(excluded)] = False
    if live.added is not None:
        is_allowed[live.added.first :] &= counts[live.added.first :] > 0
    least = None if item_filter is None else item_filter.minimum_score
    if least is not None:
        is_allowed &= counts >= least
    items = popular.by_longest
    items = items[is_allowed[items]]
    if len(items) > k:
        # Only what is above the k-th count has to be sorted. What is equal to it is in its order already, and without
        # events that may be the whole catalogue.
        of_items = counts[items]
        positive = of_items[of_items > 0]
        last = np.partition(positive, len(positive) - k)[len(positive) - k] if len(positive) >= k else 0
        above = items[of_items > last]
        items = np.concatenate([above, items[of_items == last][: k - len(above)]])
    items = items[np.argsort(-counts[items], kind="stable")]
    return [TrendingItem(*one) for one in zip(items.tolist(), counts[items].tolist(), strict=True)]
