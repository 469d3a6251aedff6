"""Answers questions in raw ids with one model. Knows no gRPC and keeps nothing between calls."""

import heapq
import time
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from serve.model.catalog import Catalog
from serve.model.directory import Artifact
from serve.model.events import Event, KnownEvent, disliked_items, known_events, positive_count
from serve.model.explain import ASKED_EVENTS, ASKED_ITEMS, Explanation, explain, explain_popularity
from serve.model.features import Features, features
from serve.model.filters import Filters, ItemFilter
from serve.model.live_catalog import Item, LiveCatalog, Withheld
from serve.model.popular import NO_OTHERS, RECENT_POPULARITY, WEEK, OtherCounts, PopularNow, with_hour
from serve.model.ranking.engine import Engine, Ranking
from serve.model.ranking.live_trend import Blocked, Trend
from serve.model.ranking.search import best_of
from serve.model.rules import Applied, Rules
from serve.model.trend import HALF_LIVES_S, Counted
from serve.settings import Provider, SearchBy

SORTED_AT_ONCE = 20_000


class UnknownItem(LookupError):
    """The model does not know an item."""


class NoNewItems(Exception):
    """A request reserves places for new items, and the model directory has no vectors of new items."""


class Query(NamedTuple):
    """What to recommend for a history or a stored user; times in seconds."""

    events: Sequence[Event]
    """The history that was sent along; empty with `user_id`."""
    k: int
    """Number of items, at least 1."""
    exclude_item_ids: Sequence[str] = ()
    request_time: int | None = None
    """None: not known. Else not before the last event; a stored user's events after it are left out."""
    explain: bool = False
    user_id: str | None = None
    """A stored user, for `StateCache`: a `Recommender` by itself knows no users."""
    started: float | None = None
    """When the request began, by `time.monotonic()`; its answer is not logged if the user was deleted since."""
    filter: ItemFilter | None = None
    """For the model that answers; None: every item is allowed."""
    allow_seen: bool | None = None
    """Whether items of the history may be answered; None: as the model has it."""
    new_item_slots: int = 0
    """How many of the `k` places are reserved for new items; see `with_new_items`."""
    not_shown_within: int = 0
    """What was recommended to the stored user in so many seconds before now is excluded; 0: it is not."""
    withheld: Withheld | None = None
    """The items that the catalogue does not let be answered at the time of the request; None: every item may be."""
    rules: Rules | None = None
    """What is done after the model, by `LoadedModel`: a `Recommender` by itself applies none. None: nothing."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Items best first."""

    items: NDArray[np.int32]
    """`[n]`, item indices from 1 on; n <= k."""
    scores: NDArray[np.float32]
    """`[n]`, logits of the model, or numbers of events for popular items."""
    policy: str
    """What ranked the items: the model's policy, or one of `serve.model.popular.FALLBACKS`."""
    ignored_event_count: int
    """Positive events of the history on items that the model does not know."""
    explanations: tuple[Explanation, ...]
    """One for each item; empty unless asked for."""
    log_propensities: tuple[float, ...] = ()
    """Of each item given those above it; empty: 0 for all, since the same query gets the same answer."""
    counted: Counted | None = None
    """The events of the trend that ranked the items; None: no trend did."""
    disliked: Sequence[int] = ()
    """Item indices that were excluded since the user's last event on them is negative."""
    applied: Mapping[int, tuple[Applied, ...]] = field(default_factory=dict)
    """By item index, which rules changed the item's score or place; other items are missing."""


class Recommender:
    """One loaded model. Immutable but for its trend, what is popular now and its catalogue, and safe to share between
    threads."""

    def __init__(
        self,
        artifact: Artifact,
        provider: Provider = "auto",
        intra_op_threads: int = 1,
        search_by: SearchBy = "auto",
    ) -> None:
        """Loads the graphs.

        Args:
            artifact: A verified model directory.
            provider: What runs the graphs; "auto": CUDA where it works, else the CPU.
            intra_op_threads: Threads within one run of a graph.
            search_by: How the best items are found; "auto": with the index, if there is one and the CPU runs the model.

        Raises:
            ArtifactError: A graph or the index breaks the contract.
            ProviderError: `provider` is "cuda", and CUDA does not run.
        """
        self.info = artifact.info
        self.own_catalog = artifact.catalog
        """That of the model directory alone."""
        self.live = LiveCatalog.of(artifact.catalog)
        """The catalogue, with the items of a store over it. It is replaced as a whole, so that no call sees half of
        each."""
        self.own_tags = frozenset(self.live.filters.of_tag)
        """Those of the model directory."""
        self.stored_tags: Container[str] = ()
        """Those of the items of a store, also of items that the model does not know."""
        self.stored_items: Mapping[str, Item] = {}
        """The items of the store by their ids, also those that the model does not know."""
        self.engine = Engine(artifact, provider, intra_op_threads, search_by)
        self.provider = self.engine.provider
        now = int(time.time())
        self.popular_now = PopularNow.of(artifact.catalog, with_hour(artifact.trend.at(now)), Counted(now, None))
        """It is replaced as a whole, some time after the trend."""
        new_item_count = int(np.count_nonzero(self.catalog.new))
        self._lacks_new_vectors = artifact.index is not None and new_item_count > 0
        self.new_item_count = 0 if self._lacks_new_vectors else new_item_count
        """Items that the model was not trained on, for which places can be reserved."""
        self._vectors = artifact.item_vectors
        lengths = np.sqrt(np.einsum("ij,ij->i", self._vectors, self._vectors))
        # Padding, and an item that was never trained, may have no direction; they resemble nothing.
        self._lengths: NDArray[np.float32] = np.where(lengths == 0, np.float32(1), lengths)

    @property
    def catalog(self) -> Catalog:
        """As of now. Items keep their indices; their titles and genres may change."""
        return self.live.catalog

    @cached_property
    def ids_in_order(self) -> list[str]:
        """The raw ids of all items, sorted."""
        ids = self.catalog.item_ids[1:]
        parts = [sorted(ids[start : start + SORTED_AT_ONCE]) for start in range(0, len(ids), SORTED_AT_ONCE)]
        # Not one sort: no other thread runs during that.
        return list(heapq.merge(*parts))

    @property
    def filters(self) -> Filters:
        """Those of the catalogue as of now."""
        return self.live.filters

    def use_counts(self, counts: NDArray[np.float32], counted: Counted, others: OtherCounts = NO_OTHERS) -> None:
        """From the next answer on, the trend and what is popular now are those of these counts.

        Args:
            counts: `[half-lives of stores, items+1]` float32, decayed to now; column 0 is zeros.
            counted: The events in the counts.
            others: Those of items that the model does not know.

        Raises:
            ValueError: As `Engine.use_counts`; then what is popular now stays as it was, too.
        """
        self.engine.use_counts(counts[: len(HALF_LIVES_S)], counted)
        self.popular_now = PopularNow.of(self.own_catalog, counts, counted, others)

    def recommend(self, queries: Sequence[Query]) -> list[Answer]:
        """Answers each query from its events; queries with a known event share runs of the model.

        Returns:
            The answers in the order of the queries. A query without an event that the model knows gets what is popular
            now.
        """
        # One for all: which items are new, and their scores, must be of the same counts.
        trend = self.engine.trend
        histories = [known_events(query.events, self.catalog) for query in queries]
        dislikes = [disliked_items(query.events, self.catalog) for query in queries]
        masks = [self.masks(query, trend) if history else () for query, history in zip(queries, histories, strict=True)]
        asked = [
            (query, history, disliked, mask)
            for query, history, disliked, of_query in zip(queries, histories, dislikes, masks, strict=True)
            for mask in of_query
        ]
        rows = [
            self._features(query, history, [*self.indices(query.exclude_item_ids), *disliked], mask)
            for query, history, disliked, mask in asked
        ]
        rankings = iter(self.engine.rank(rows, [query.k for query, *_ in asked], trend) if rows else ())
        return [
            self.ranked(
                *(query, [next(rankings) for _ in of_query], positive_count(query.events) - len(history)),
                *(disliked, history),
            )
            if history
            else self.popular(query, positive_count(query.events), disliked)
            for query, history, disliked, of_query in zip(queries, histories, dislikes, masks, strict=True)
        ]

    def new_item_slots(self, asked: int) -> int:
        """How many places of an answer are reserved for new items if a request asks for `asked`: 0 without new items.

        Raises:
            NoNewItems: There are new items, but the model directory has an index, in which their vectors are zero.
        """
        if asked and self._lacks_new_vectors:
            raise NoNewItems(
                f"new_item_slots: the model {self.info.model_version} was exported with an index, so it has no vectors"
                " of its new items; export it with --index never"
            )
        return asked if self.new_item_count else 0

    def masks(self, query: Query, trend: Trend) -> list[Blocked | None]:
        """The blocked items of each ranking that the answer to a query is made of, in the order of `ranked`.

        Without `new_item_slots` there is one ranking: of the items that the filter and the catalogue allow. With it
        there are two: of the allowed items that are not new, and of the allowed new items. Without the other items the
        graphs do not hold the scores of new items down.

        Args:
            query: The query.
            trend: The one that ranks the items. An item with a trend is not new.

        Returns:
            One or two arrays `[items+1]`; None: no item is blocked.
        """
        blocked = self._blocked(query.filter, query.withheld)
        if not query.new_item_slots:
            return [blocked]
        new = self.catalog.new & (trend.values == 0)
        return [new | blocked, ~new | blocked] if blocked is not None else [new, ~new]

    def _blocked(self, item_filter: ItemFilter | None, withheld: Withheld | None) -> Blocked | None:
        """The items that neither a filter nor the catalogue lets be answered; None: every item may be."""
        blocked = self.filters.blocked(item_filter)
        if withheld is None:
            return blocked
        return withheld.mask if blocked is None else blocked | withheld.mask

    def allows_seen(self, query: Query) -> bool:
        """Whether items of the history may be answered."""
        return self.info.repeat is not None if query.allow_seen is None else query.allow_seen

    def ranked(
        self,
        query: Query,
        rankings: Sequence[Ranking],
        ignored_event_count: int,
        disliked: Sequence[int] = (),
        history: Sequence[KnownEvent] = (),
    ) -> Answer:
        """The answer to a query whose items, without `disliked`, the model ranked, once for each of `masks`; `history`
        is needed to explain it."""
        whole, *new = (_at_least(ranking, query.filter) for ranking in rankings)
        items, scores, counted = with_new_items(whole, new[0], query.k, query.new_item_slots) if new else whole
        items, scores = items[: query.k], scores[: query.k]
        explanations = self._explain(query, history, items) if query.explain else ()
        return Answer(
            items, scores, self.info.policy, ignored_event_count, explanations, counted=counted, disliked=disliked
        )

    def _features(
        self, query: Query, history: Sequence[KnownEvent], exclude: Sequence[int], blocked: Blocked | None
    ) -> Features:
        allow_seen = self.allows_seen(query)
        return features(history, query.request_time, exclude, self.info, allow_seen=allow_seen, blocked=blocked)

    def popular(self, query: Query, ignored_event_count: int, disliked: Sequence[int] = ()) -> Answer:
        """The answer, without `disliked` items, to a query without a positive event that the model knows."""
        now = self.popular_now
        exclude = [*self.indices(query.exclude_item_ids), *disliked]
        blocked = self._blocked(query.filter, query.withheld)
        items = now.items
        if blocked is not None:
            items = items[~blocked[items]]
        # Among the first k + len(exclude) at most len(exclude) are dropped.
        items = items[: query.k + len(exclude)]
        items = items[~np.isin(items, np.array(exclude, np.int32))][: query.k]
        items, scores, _ = _at_least(Ranking(items, now.scores[items]), query.filter)
        explanations = self.explain_popular(items, now) if query.explain else ()
        return Answer(items, scores, now.policy, ignored_event_count, explanations, disliked=disliked)

    def explain_popular(self, items: NDArray[np.int32], now: PopularNow) -> tuple[Explanation, ...]:
        """Why items were recommended that are popular at a time.

        Args:
            items: `[n]` int32, item indices.
            now: What ranked them.

        Returns:
            An explanation for each item.
        """
        recent = now.counts[WEEK] if now.policy == RECENT_POPULARITY else None
        return explain_popularity(items, recent, self.catalog)

    def explain(self, query: Query, items: NDArray[np.int32]) -> tuple[Explanation, ...]:
        """Why the model recommended these items.

        Args:
            query: The query that they answer; at least one of its events is known.
            items: `[n]` int32, item indices of the answer.

        Returns:
            An explanation for each item.
        """
        return self._explain(query, known_events(query.events, self.catalog), items)

    def _explain(
        self, query: Query, history: Sequence[KnownEvent], items: NDArray[np.int32]
    ) -> tuple[Explanation, ...]:
        asked = history[-ASKED_EVENTS:]
        influences = self._influences(query, history, items) if len(history) > 1 and len(items) else None
        of_items, of_events = self.directions(items), self.directions([event.item for event in asked])
        return explain(items, asked, influences, np.clip(of_items @ of_events.T, -1, 1), self.catalog)

    def directions(self, items: Sequence[int] | NDArray[np.int32]) -> NDArray[np.float32]:
        """Vectors of length 1."""
        return self._vectors[items] / self._lengths[items, None]

    def _influences(self, query: Query, history: Sequence[KnownEvent], items: NDArray[np.int32]) -> NDArray[np.float32]:
        """By how much each item's score is lower without each of the last events, `[items, events]`."""
        excluded = [*self.indices(query.exclude_item_ids), *disliked_items(query.events, self.catalog)]
        if not self.allows_seen(query):
            excluded += [event.item for event in history]
        # The history may have got events on the items since they were answered.
        exclude = np.setdiff1d(excluded, items).tolist()
        # The history is in `exclude` already.
        query = query._replace(allow_seen=True)
        trend = self.engine.trend
        kept = range(max(0, len(history) - ASKED_EVENTS), len(history))
        histories = [history, *([*history[:at], *history[at + 1 :]] for at in kept)]
        # An item that the filter allows no more, since its tags changed meanwhile, stays without influences.
        scores = np.zeros((len(histories), len(items)), np.float32)
        # All items must be in the ranking with every event, or the difference would be that of others' scores.
        asked_items = max(ASKED_ITEMS, query.k)
        for mask in self.masks(query, trend):
            own = np.ones(len(items), np.bool_) if mask is None else ~mask[items]
            rows = [self._features(query, one, exclude, mask) for one in histories] if own.any() else []
            for at, ranking in enumerate(self.engine.rank(rows, asked_items, trend) if rows else ()):
                scores[at, own] = self._scores(ranking, items[own])
        return (scores[0] - scores[1:]).T

    @staticmethod
    def _scores(ranking: Ranking, items: NDArray[np.int32]) -> NDArray[np.float32]:
        """The items' scores in a ranking; those that are not in it have at most the last one's."""
        place = np.argsort(ranking.items)
        found = place[np.minimum(np.searchsorted(ranking.items, items, sorter=place), len(place) - 1)]
        return np.where(ranking.items[found] == items, ranking.scores[found], ranking.scores[-1])

    def indices(self, item_ids: Sequence[str]) -> list[int]:
        """Item indices of the ids that the model knows."""
        index = self.catalog.index
        return [index[item_id] for item_id in item_ids if item_id in index]

    def similar(
        self,
        item_id: str,
        k: int,
        exclude_item_ids: Sequence[str] = (),
        item_filter: ItemFilter | None = None,
        withheld: Withheld | None = None,
    ) -> Ranking:
        """The items nearest to one item.

        Args:
            item_id: A raw id.
            k: Number of items, cut to those that there are.
            exclude_item_ids: Items that are not answered.
            item_filter: Which of the other items may be answered; None: every item.
            withheld: The items that the catalogue does not let be answered; the item itself may be one of them.

        Returns:
            Item indices `[k]` int32, the item itself not among them, and the cosines of their vectors with that of the
            item `[k]` float32, -1..1.

        Raises:
            UnknownItem: The model does not know the item.
        """
        item = self.catalog.index.get(item_id)
        if item is None:
            raise UnknownItem(f"the model {self.info.model_version} does not know the item {item_id!r}")
        cosines = np.clip(self._vectors @ self.directions([item])[0] / self._lengths, -1, 1)
        allowed = np.ones(len(cosines), np.bool_)
        blocked = self._blocked(item_filter, withheld)
        if blocked is not None:
            allowed = ~blocked
        allowed[[0, item, *self.indices(exclude_item_ids)]] = False
        items = np.flatnonzero(allowed).astype(np.int32)
        return _at_least(Ranking(*best_of(items, cosines[items], min(k, len(items)))), item_filter)


def with_new_items(known: Ranking, new: Ranking, k: int, slots: int) -> Ranking:
    """One ranking of the best known items and the best new ones, by their scores.

    Args:
        known: Items that are not new; at most `k` count.
        new: New items; at most `k` count.
        k: Number of items.
        slots: How many of them are new: fewer where there are not so many, more where too few items are known.
    """
    count = min(max(slots, k - len(known.items)), len(new.items))
    items = np.concatenate([known.items[: k - count], new.items[:count]])
    scores = np.concatenate([known.scores[: k - count], new.scores[:count]])
    order = np.lexsort((items, -scores))
    return Ranking(items[order], scores[order], known.counted)


def _at_least(ranking: Ranking, item_filter: ItemFilter | None) -> Ranking:
    """The items of a ranking that have at least the filter's minimum score."""
    if item_filter is None or item_filter.minimum_score is None:
        return ranking
    n = int(np.count_nonzero(ranking.scores >= np.float32(item_filter.minimum_score)))
    return Ranking(ranking.items[:n], ranking.scores[:n], ranking.counted)
