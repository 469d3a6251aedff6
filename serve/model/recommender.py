"""Answers questions in raw ids with one model. Knows no gRPC and keeps nothing between calls."""

import heapq
import time
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from serve.model.added_items import FIRST_PLACES, AddedItems, with_added
from serve.model.catalog import Catalog
from serve.model.directory import Artifact
from serve.model.events import (
    NO_UNKNOWN,
    Event,
    KnownEvent,
    UnknownItems,
    disliked_items,
    known_events,
    positive_count,
    unknown_items,
)
from serve.model.explain import ASKED_EVENTS, ASKED_ITEMS, Explanation, explain, explain_popularity
from serve.model.features import Features, features
from serve.model.filters import Filters, ItemFilter
from serve.model.graphs import CPU
from serve.model.live_catalog import LiveCatalog, Withheld
from serve.model.parts import ROUNDING, ROUNDING_CUDA, Part, Parts, parts_of_logits, parts_of_popularity
from serve.model.popular import NO_OTHERS, OtherCounts, PopularItems, PopularNow, with_no_hour
from serve.model.ranking.engine import Basis, Engine, Ranking
from serve.model.ranking.live_trend import Blocked, Trend
from serve.model.ranking.search import best_of
from serve.model.rules import Applied, Rules, boost_log_factors
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
    """The history. Empty with `user_id`: the stored one. With `user_id` and events, those are sent along and the stored
    ones are still to be added (`RecommenderService`), or they are the whole."""
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
    live: LiveCatalog | None = None
    """The catalogue that `filter` and `withheld` are of; None: that of the model directory."""
    event_ids: Sequence[str] = ()
    """Of each of the events that are sent along, "" for none; empty: none has an id."""
    recommendation_id: str = ""
    """Of the answer, the same each time that the request is repeated; "": the answer gets one of its own."""
    rules: Rules | None = None
    """What is done after the model, by `LoadedModel`: a `Recommender` by itself applies none. None: nothing."""
    own_items: bool = False
    """Whether only the model's own items are ranked, and no added ones."""
    model_version: str = ""
    """The version that the request named; "": none, and the traffic decides."""


class Origin(NamedTuple):
    """How an item came into an answer that several rankings made."""

    basis: Basis | None
    """What its score was computed from; None: it is a popular one."""
    held: float
    """What was added to its score, 0 or less, so that it is not above the best items by the model."""


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
    basis: Basis | None = None
    """What the scores were computed from; None: the items are popular ones."""
    origins: Mapping[int, Origin] = field(default_factory=dict)
    """By item index, of those that are not just of `basis`."""


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
        self.own_live = self.live = LiveCatalog.of(artifact.catalog)
        """The catalogue, with the items of a store over it. It is replaced as a whole, so that no call sees half of
        each."""
        self.item_rows = artifact.item_rows
        self.own_tags = frozenset(self.live.filters.of_tag)
        """Those of the model directory."""
        self.stored_tags: Container[str] = ()
        """Those of the items of a store, also of items that the model does not know."""
        self.engine = Engine(artifact, provider, intra_op_threads, search_by)
        self.provider = self.engine.provider
        now = int(time.time())
        self.popular_now = PopularNow.of(artifact.catalog, with_no_hour(artifact.trend.at(now)), Counted(now, None))
        """It is replaced as a whole, some time after the trend."""
        new_item_count = int(np.count_nonzero(self.catalog.new))
        self._lacks_new_vectors = artifact.index is not None and new_item_count > 0
        self.new_item_count = 0 if self._lacks_new_vectors else new_item_count
        """Items that the model was not trained on, for which places can be reserved."""
        self._vectors = artifact.item_vectors
        self._lengths = _lengths(self._vectors)
        self._last_moment: _Moment | None = None
        self._last_popular: PopularItems | None = None

    @property
    def catalog(self) -> Catalog:
        """As of now. Items keep their indices; their titles and genres may change, and more may be added."""
        return self.live.catalog

    @cached_property
    def ids_in_order(self) -> list[str]:
        """The raw ids of the model's own items, sorted."""
        ids = self.own_catalog.item_ids[1:]
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
            others: Those of added items.

        Raises:
            ValueError: As `Engine.use_counts`; then what is popular now stays as it was, too.
        """
        of_models = len(HALF_LIVES_S)
        of_added = others.counts[:, :of_models].T.astype(np.float32) if others.item_ids else None
        self.engine.use_counts(counts[:of_models], counted, others.item_ids, of_added)
        self.popular_now = PopularNow.of(self.own_catalog, counts, counted, others)

    def popular_in(self, live: LiveCatalog) -> PopularItems:
        """What is popular now, with the added items of a catalogue."""
        now, found = self.popular_now, self._last_popular
        if found is None or found.live is not live or found.now is not now:
            found = self._last_popular = PopularItems.of(now, live)
        return found

    def recommend(self, queries: Sequence[Query]) -> list[Answer]:
        """Answers each query from its events; queries with a known event share runs of the model.

        Returns:
            The answers in the order of the queries. A query without an event that the model knows gets what is popular
            now.
        """
        # One for all: which items are new, and their scores, must be of the same counts.
        trend = self.engine.trend
        own = self.own_catalog
        histories = [known_events(query.events, own) for query in queries]
        dislikes = [disliked_items(query.events, own) for query in queries]
        unknown = [unknown_items(query.events, own) for query in queries]
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
        ks = [self.asked_k(query) for query, *_ in asked]
        queries_too = any(self.added_of(query) is not None for query in queries)
        rankings = iter(self.engine.rank(rows, ks, trend, queries=queries_too) if rows else ())
        return [
            self.ranked(
                *(query, [next(rankings) for _ in of_query], of_query, trend),
                *(positive_count(query.events) - len(history), disliked, unknown_to_it, history),
            )
            if history
            else self.popular(query, positive_count(query.events), disliked, unknown_to_it)
            for query, history, disliked, unknown_to_it, of_query in zip(
                queries, histories, dislikes, unknown, masks, strict=True
            )
        ]

    def added_of(self, query: Query) -> AddedItems | None:
        """The added items that may be in the answer to a query; None: there are none."""
        return None if query.live is None or query.own_items else query.live.added

    def asked_k(self, query: Query) -> int:
        """How many items a ranking of the model's own must have for `ranked`."""
        return query.k if self.added_of(query) is None else max(query.k, FIRST_PLACES)

    def new_item_slots(self, asked: int, live: LiveCatalog) -> int:
        """How many places of an answer are reserved for new items if a request asks for `asked`: 0 without new items.

        Raises:
            NoNewItems: There are new items, but the model directory has an index, in which their vectors are zero.
        """
        if asked and self._lacks_new_vectors and live.added is None:
            raise NoNewItems(
                f"new_item_slots: the model {self.info.model_version} was exported with an index, so it has no vectors"
                " of its new items; export it with --index never"
            )
        return asked if self.new_item_count or live.added is not None else 0

    def masks(self, query: Query, trend: Trend) -> list[Blocked | None]:
        """The blocked items of each ranking that the answer to a query is made of, in the order of `ranked`.

        Without `new_item_slots` there is one ranking: of the items that the filter and the catalogue allow. With it
        there are two: of the allowed items that are not new, and of the allowed new items. Without the other items the
        graphs do not hold the scores of new items down.

        Args:
            query: The query.
            trend: The one that ranks the items. An item with a trend is not new.

        Returns:
            One or two arrays `[items+1]` of own and added items; None: no item is blocked.
        """
        live = query.live or self.own_live
        blocked = live.blocked(query.filter, query.withheld)
        if not query.new_item_slots:
            return [blocked]
        new = self._moment(live, trend).new
        return [new | blocked, ~new | blocked] if blocked is not None else [new, ~new]

    def _moment(self, live: LiveCatalog, trend: Trend) -> "_Moment":
        """What follows from a catalogue and a trend, which serve many requests."""
        found = self._last_moment
        if found is None or found.live is not live or found.trend is not trend:
            added = np.array([trend.added.get(item_id, 0.0) for item_id in live.added_ids], np.float32)
            values = np.concatenate([trend.values, added]) if len(added) else trend.values
            found = self._last_moment = _Moment(live, trend, live.catalog.new & (values == 0), added)
        return found

    def allows_seen(self, query: Query) -> bool:
        """Whether items of the history may be answered."""
        return self.info.repeat is not None if query.allow_seen is None else query.allow_seen

    def ranked(
        self,
        query: Query,
        rankings: Sequence[Ranking],
        masks: Sequence[Blocked | None],
        trend: Trend,
        ignored_event_count: int,
        disliked: Sequence[int] = (),
        unknown: UnknownItems = NO_UNKNOWN,
        history: Sequence[KnownEvent] = (),
    ) -> Answer:
        """The answer to a query whose own items, without `disliked`, the model ranked.

        Args:
            query: The query.
            rankings: One for each of `masks`, of `asked_k` items, with the query if there are added items.
            masks: Of `Recommender.masks`.
            trend: The one that ranked the items.
            ignored_event_count: For the answer.
            disliked: For the answer.
            unknown: The items of the history that the model does not know.
            history: Needed to explain the answer.
        """
        added = self.added_of(query)
        if added is not None:
            rankings = [
                self._with_added(query, ranking, mask, trend, unknown)
                for ranking, mask in zip(rankings, masks, strict=True)
            ]
        whole, *new = (_at_least(ranking, query.filter) for ranking in rankings)
        best = with_new_items(whole, new[0], query.k, query.new_item_slots) if new else whole
        items, scores, counted, basis = best.items[: query.k], best.scores[: query.k], best.counted, best.basis
        answer = Answer(
            items, scores, self.info.policy, ignored_event_count, (), counted=counted, disliked=disliked, basis=basis
        )
        return replace(answer, explanations=self._explain(query, history, answer)) if query.explain else answer

    def _with_added(
        self, query: Query, ranking: Ranking, blocked: Blocked | None, trend: Trend, unknown: UnknownItems
    ) -> Ranking:
        """A ranking with the added items that `blocked` lets be answered."""
        live, added = query.live, self.added_of(query)
        assert live is not None
        assert added is not None
        assert ranking.query is not None
        allowed = np.ones(len(added.ids), np.bool_) if blocked is None else ~blocked[added.first :]
        for item in self._never(query, unknown):
            if item >= added.first:
                allowed[item - added.first] = False
        places, moment = np.flatnonzero(allowed), self._moment(live, trend)
        scores = added.scores(ranking.query, moment.of_added)[places]
        items = (places + added.first).astype(np.int32)
        return with_added(ranking, items, scores, moment.new, self.asked_k(query))

    def _never(self, query: Query, unknown: UnknownItems) -> list[int]:
        """Item indices, own and added, that a query excludes, and those of `unknown` that are not to be answered."""
        live, allows_seen = query.live or self.own_live, self.allows_seen(query)
        unwanted = [item_id for item_id, is_disliked in unknown.items() if is_disliked or not allows_seen]
        return live.indices([*query.exclude_item_ids, *unwanted])

    def _features(
        self, query: Query, history: Sequence[KnownEvent], exclude: Sequence[int], blocked: Blocked | None
    ) -> Features:
        allow_seen = self.allows_seen(query)
        return features(history, query.request_time, exclude, self.info, allow_seen=allow_seen, blocked=blocked)

    def popular(
        self, query: Query, ignored_event_count: int, disliked: Sequence[int] = (), unknown: UnknownItems = NO_UNKNOWN
    ) -> Answer:
        """The answer, without `disliked` items and those of `unknown` that are not to be answered, to a query without a
        positive event that the model knows."""
        live = query.live or self.own_live
        now = self.popular_in(live)
        exclude = [*self._never(query, unknown), *disliked]
        blocked = live.blocked(query.filter, query.withheld)
        items = now.items
        if blocked is not None:
            items = items[~blocked[items]]
        # Among the first k + len(exclude) at most len(exclude) are dropped.
        items = items[: query.k + len(exclude)]
        items = items[~np.isin(items, np.array(exclude, np.int32))][: query.k]
        items, scores, *_ = _at_least(Ranking(items, now.scores[items]), query.filter)
        answer = Answer(items, scores, now.now.policy, ignored_event_count, (), disliked=disliked)
        return replace(answer, explanations=self.explain(query, answer)) if query.explain else answer

    def explain(self, query: Query, answer: Answer) -> tuple[Explanation, ...]:
        """Why items were recommended.

        Args:
            query: The query that they answer; with its stored events, if the model ranked them.
            answer: The answer without explanations.

        Returns:
            An explanation for each item.
        """
        if answer.basis is not None:
            return self._explain(query, known_events(query.events, self.own_catalog), answer)
        live = query.live or self.own_live
        parts = parts_of_popularity(answer.scores, np.exp(self._boosts(query, answer)))
        return explain_popularity(answer.items, self.popular_in(live).recent, live.catalog, parts)

    def _boosts(self, query: Query, answer: Answer) -> NDArray[np.float64]:
        """`[n]`: the logarithms of the factors by which the items of an answer are boosted."""
        if query.rules is None or not answer.applied:
            return np.zeros(len(answer.items))
        live = query.live or self.own_live
        return boost_log_factors(answer.items, query.rules.boosts, live.filters.of_tag)

    def _parts(self, query: Query, answer: Answer) -> list[Parts]:
        """What parts of the model gave to the scores of the items that it ranked."""
        of_answer = Origin(answer.basis, 0.0)
        origins = [answer.origins.get(item, of_answer) for item in answer.items.tolist()]
        places: dict[int, list[int]] = {}
        for at, origin in enumerate(origins):
            places.setdefault(id(origin.basis), []).append(at)
        found: list[Parts] = [{}] * len(origins)
        for of_basis in places.values():
            basis = origins[of_basis[0]].basis
            if basis is not None:
                held = np.array([origins[at].held for at in of_basis], np.float32)
                of_items = replace(answer, items=answer.items[of_basis], scores=answer.scores[of_basis])
                for at, parts in zip(of_basis, self._parts_by(basis, held, query, of_items), strict=True):
                    found[at] = parts
        return found

    def _parts_by(self, basis: Basis, held: NDArray[np.float32], query: Query, answer: Answer) -> list[Parts]:
        """As `_parts`, where all scores were computed from one basis; `held` `[n]`: as in `Origin`."""
        live, items = query.live or self.own_live, answer.items
        own = np.where(items <= self.engine.item_count, items, np.int32(0))
        vectors, trend = self._vectors[own], basis.trend.values[own]
        moment, is_added = self._moment(live, basis.trend), own == 0
        bias_of_added = np.zeros(len(items), np.float32)
        if live.added is not None:
            at = items[is_added] - live.added.first
            vectors[is_added], trend[is_added] = live.added.vectors[at], moment.of_added[at]
            bias_of_added[is_added] = live.added.bias[at]
        given = self.engine.parts(basis, own, vectors)
        # It comes from the features of the item.
        given[Part.CONTENT] = given[Part.CONTENT] + bias_of_added
        given[Part.TREND] = trend
        given[Part.BOOST] = self._boosts(query, answer).astype(np.float32)
        given[Part.PLACE] = held
        if basis.seen is not None:
            of_item = dict(zip(basis.seen.items.tolist(), basis.seen.scores.tolist(), strict=True))
            given[Part.REPEAT] = np.array([of_item.get(item, 0.0) for item in own.tolist()], np.float32)
        reranked = ~moment.new[items] & ~is_added & self.info.has_reranker
        return parts_of_logits(answer.scores, given, reranked, ROUNDING if self.provider == CPU else ROUNDING_CUDA)

    def _explain(self, query: Query, history: Sequence[KnownEvent], answer: Answer) -> tuple[Explanation, ...]:
        items = answer.items
        if not len(items):
            return ()
        asked = history[-ASKED_EVENTS:]
        influences = self._influences(query, history, items) if len(history) > 1 else None
        live = query.live or self.own_live
        of_items = self.directions(items, live)
        of_events = self.directions(np.array([event.item for event in asked], np.int32), live)
        cosines = np.clip(of_items @ of_events.T, -1, 1)
        return explain(items, asked, influences, cosines, live.catalog, self._parts(query, answer))

    def directions(self, items: NDArray[np.int32], live: LiveCatalog) -> NDArray[np.float32]:
        """Vectors of length 1."""
        if live.added is None:
            return self._vectors[items] / self._lengths[items, None]
        is_added = items >= live.added.first
        vectors = self._vectors[np.where(is_added, 0, items)]
        vectors[is_added] = live.added.vectors[items[is_added] - live.added.first]
        return vectors / _lengths(vectors)[:, None]

    def _influences(self, query: Query, history: Sequence[KnownEvent], items: NDArray[np.int32]) -> NDArray[np.float32]:
        """By how much each item's score is lower without each of the last events, `[items, events]`."""
        excluded = [*self.indices(query.exclude_item_ids), *disliked_items(query.events, self.own_catalog)]
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
        asked_items, added = max(ASKED_ITEMS, query.k), self.added_of(query)
        is_own = np.ones(len(items), np.bool_) if added is None else items < added.first
        for mask in self.masks(query, trend):
            allowed = np.ones(len(items), np.bool_) if mask is None else ~mask[items]
            rows = [self._features(query, one, exclude, mask) for one in histories] if allowed.any() else []
            rankings = self.engine.rank(rows, asked_items, trend, queries=added is not None) if rows else []
            of_model = allowed & is_own
            for at, ranking in enumerate(rankings):
                if of_model.any():
                    scores[at, of_model] = self._scores(ranking, items[of_model])
                if added is not None and ranking.query is not None:
                    others = allowed & ~is_own
                    scores[at, others] = added.vectors[items[others] - added.first] @ ranking.query
        return (scores[0] - scores[1:]).T

    @staticmethod
    def _scores(ranking: Ranking, items: NDArray[np.int32]) -> NDArray[np.float32]:
        """The items' scores in a ranking; those that are not in it have at most the last one's."""
        place = np.argsort(ranking.items)
        found = place[np.minimum(np.searchsorted(ranking.items, items, sorter=place), len(place) - 1)]
        return np.where(ranking.items[found] == items, ranking.scores[found], ranking.scores[-1])

    def indices(self, item_ids: Sequence[str]) -> list[int]:
        """Indices of the model's own items among the ids."""
        return self.own_live.indices(item_ids)

    def similar(
        self,
        item_id: str,
        k: int,
        live: LiveCatalog,
        exclude_item_ids: Sequence[str] = (),
        item_filter: ItemFilter | None = None,
    ) -> Ranking:
        """The items nearest to one item.

        Args:
            item_id: A raw id.
            k: Number of items, cut to those that there are.
            live: The catalogue. The item itself may be withheld now.
            exclude_item_ids: Items that are not answered.
            item_filter: Which of the other items may be answered; None: every item.

        Returns:
            Item indices `[k]` int32, the item itself not among them, and the cosines of their vectors with that of the
            item `[k]` float32, -1..1.

        Raises:
            UnknownItem: The model does not know the item.
        """
        item = live.catalog.index.get(item_id)
        if item is None:
            raise UnknownItem(f"the model {self.info.model_version} does not know the item {item_id!r}")
        (direction,) = self.directions(np.array([item], np.int32), live)
        cosines = self._vectors @ direction / self._lengths
        if live.added is not None:
            vectors = live.added.vectors
            cosines = np.append(cosines, vectors @ direction / _lengths(vectors))
        cosines = np.clip(cosines, -1, 1)
        allowed = np.ones(len(cosines), np.bool_)
        blocked = live.blocked(item_filter, live.withheld())
        if blocked is not None:
            allowed = ~blocked
        allowed[[0, item, *live.indices(exclude_item_ids)]] = False
        items = np.flatnonzero(allowed).astype(np.int32)
        return _at_least(Ranking(*best_of(items, cosines[items], min(k, len(items)))), item_filter)


class _Moment(NamedTuple):
    """A catalogue and a trend, and what follows from them."""

    live: LiveCatalog
    trend: Trend
    new: NDArray[np.bool_]
    """`[items+1]`, own and added items that are new: without events at the training, and in the trend."""
    of_added: NDArray[np.float32]
    """`[added]`, the trend of the added items."""


def _lengths(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """`[n]` of `[n, width]`; 1 for a vector without a direction, such as that of padding: it resembles nothing."""
    lengths = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
    return np.where(lengths == 0, np.float32(1), lengths)


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
    return known._replace(items=items[order], scores=scores[order])


def _at_least(ranking: Ranking, item_filter: ItemFilter | None) -> Ranking:
    """The items of a ranking that have at least the filter's minimum score."""
    if item_filter is None or item_filter.minimum_score is None:
        return ranking
    n = int(np.count_nonzero(ranking.scores >= np.float32(item_filter.minimum_score)))
    return ranking._replace(items=ranking.items[:n], scores=ranking.scores[:n])
